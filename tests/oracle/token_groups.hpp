// Budgets of their own for groups of tokens, as one would write it for dense lists: group by group the candidates, sorted, and
// as many of them as the group's budget has.
#pragma once

#include <cmath>

#include "ada_kv.hpp"

namespace kvpare::oracle {

/// One group: which positions are its tokens, and what it may keep over all layers, per kv head.
struct GroupBudget {
  std::vector<bool> has;  // [positions]
  Index total = 0;
};

struct GroupSettings {
  enum class Heads { each, together, shared } heads = Heads::each;
  double recent_share = 0, floor = 0.2;
  Index first = 0, last = 0;
};

using HeldTokens = std::vector<std::vector<std::vector<Index>>>;  // [layer][kv head], positions, ascending

struct GroupedChoice {
  HeldTokens kept;
  std::vector<Index> budgets;  // per layer, of all groups
  Index nan_scores = 0;        // candidates of all heads whose score is NaN
};

/// What stays of `held`. Even budgets over the layers; tokens of no group stay. scores [layer] [kv_heads, positions].
inline GroupedChoice choose_by_groups(const HeldTokens& held, const std::vector<Array2>& scores,
                                      const std::vector<bool>& is_protected, const std::vector<GroupBudget>& groups,
                                      const GroupSettings& how) {
  const Index layers = count_of(held), positions = count_of(is_protected);
  GroupedChoice out{held, std::vector<Index>(held.size(), 0), 0};
  for (const GroupBudget& group : groups) {
    const auto members = [&](const std::vector<Index>& tokens) {
      std::vector<Index> mine;
      for (const Index p : tokens)
        if (item(group.has, p)) mine.push_back(p);
      return mine;
    };
    std::vector<Index> available;
    for (const auto& heads : held) {
      available.push_back(0);
      for (const auto& tokens : heads) available.back() = std::max(available.back(), count_of(members(tokens)));
    }
    const std::vector<Index> budgets = uniform_budgets(group.total, available);
    for (Index l = 0; l < layers; ++l) {
      const Index heads = count_of(item(held, l));
      item(out.budgets, l) += item(budgets, l);
      Array2 ranks = item(scores, l);
      if (how.heads == GroupSettings::Heads::together)
        for (Index p = 0; p < positions; ++p) {
          double sum = 0;
          for (Index h = 0; h < heads; ++h) sum += item(scores, l).at(h, p);
          for (Index h = 0; h < heads; ++h) ranks.at(h, p) = sum / static_cast<double>(heads);
        }
      std::vector<std::vector<bool>> candidates;
      std::vector<Index> k, count;
      for (Index h = 0; h < heads; ++h) {
        const std::vector<Index> mine = members(item(item(held, l), h));
        auto& up = candidates.emplace_back(static_cast<std::size_t>(positions), false);
        for (Index i = how.first; i < count_of(mine) - how.last; ++i)
          if (!item(is_protected, item(mine, i))) up[static_cast<std::size_t>(item(mine, i))] = true;
        count.push_back(std::count(up.begin(), up.end(), true));
        k.push_back(std::max<Index>(0, item(budgets, l) - (count_of(mine) - count.back())));
        for (Index p = 0; p < positions; ++p) out.nan_scores += item(up, p) && std::isnan(ranks.at(h, p));
      }
      if (how.heads == GroupSettings::Heads::shared)
        k = ada_kv_exact(hits_per_head(ranks, std::accumulate(k.begin(), k.end(), Index{0}), candidates), k[0],
                         how.floor, count);
      for (Index h = 0; h < heads; ++h) {
        std::vector<double> row = ranks.row(h);
        Index newest = static_cast<Index>(how.recent_share * static_cast<double>(item(k, h)) + 1e-9);
        for (Index p = positions; p-- > 0 && newest > 0;)
          if (item(item(candidates, h), p)) item(row, p) = 1e9, --newest;
        const std::vector<Index> best = select_top(row, item(k, h), item(candidates, h));
        std::erase_if(item(item(out.kept, l), h), [&](Index p) {
          return item(item(candidates, h), p) && !std::binary_search(best.begin(), best.end(), p);
        });
      }
    }
  }
  return out;
}

}  // namespace kvpare::oracle

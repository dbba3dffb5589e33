// KVCrush: part of a budget goes to tokens that stand for those that go.
#pragma once

#include "dense.hpp"
#include "select_top.hpp"

namespace kvpare::oracle {

enum class CrushAnchor { alternating, zeros, ones, mean };

struct CrushSettings {
  double share = 0.25;  // of the budget
  CrushAnchor anchor = CrushAnchor::alternating;
  bool even = true;     // spacing: index i (n - 1) / (b - 1), else i floor(n / b)
};

/// The best by `total`, and tokens evenly spaced along their distance from the anchor. A token's bit of a head: is it
/// among the `ones` best of that head?
/// Shapes  heads [heads][tokens], total [tokens] -> indices, ascending
/// Source  KVCrush, arXiv 2503.00022, at token level
inline std::vector<Index> crush(const std::vector<std::vector<double>>& heads, const std::vector<double>& total,
                                Index budget, Index ones, const CrushSettings& how = {}) {
  const Index tokens = count_of(total);
  budget = std::min(budget, tokens);
  const auto stand_ins = static_cast<Index>(std::floor(how.share * static_cast<double>(budget) + 1e-9));
  std::vector<Index> kept = select_top(total, budget - stand_ins);
  std::vector<std::vector<bool>> bit;
  for (const auto& head : heads) {
    bit.emplace_back(head.size(), false);
    for (const Index t : select_top(head, ones)) item(bit.back(), t) = true;
  }
  std::vector<bool> anchor;
  for (Index h = 0; h < count_of(heads); ++h) {
    const Index having = std::min(ones, tokens);
    anchor.push_back(how.anchor == CrushAnchor::ones ||
                     (how.anchor == CrushAnchor::alternating && h % 2 == 1) ||
                     (how.anchor == CrushAnchor::mean && (2 * having > tokens || (2 * having == tokens && h % 2 == 1))));
  }
  std::vector<std::pair<Index, Index>> rest;  // distance, token
  for (Index t = 0; t < tokens; ++t) {
    if (std::find(kept.begin(), kept.end(), t) != kept.end()) continue;
    Index distance = 0;
    for (Index h = 0; h < count_of(heads); ++h) distance += item(item(bit, h), t) != item(anchor, h);
    rest.emplace_back(distance, t);
  }
  std::sort(rest.begin(), rest.end());
  const Index n = count_of(rest);
  for (Index i = 0; i < stand_ins; ++i) {
    const Index at = stand_ins == 1 ? 0 : how.even ? i * (n - 1) / (stand_ins - 1) : i * (n / stand_ins);
    kept.push_back(item(rest, at).second);
  }
  std::sort(kept.begin(), kept.end());
  return kept;
}

/// TopV's recovery: the best, then every s-th of what is left, counted from the first; as many of the best as leave room,
/// and no more samples than the budget has.
inline std::vector<Index> with_samples(const std::vector<double>& scores, Index budget, Index every) {
  const Index tokens = count_of(scores);
  if (budget >= tokens) return select_top(scores, tokens);
  Index best = budget;
  while (best > 0 && best + (tokens - best + every - 1) / every > budget) --best;
  std::vector<Index> kept = select_top(scores, best), left;
  for (Index t = 0; t < tokens; ++t)
    if (std::find(kept.begin(), kept.end(), t) == kept.end()) left.push_back(t);
  for (Index i = 0; i < count_of(left) && count_of(kept) < budget; i += every) kept.push_back(item(left, i));
  std::sort(kept.begin(), kept.end());
  return kept;
}

/// ChunkKV: neighbours have the mean of their scores.
inline std::vector<double> chunk_means(const std::vector<double>& scores, Index chunk) {
  std::vector<double> out;
  for (Index begin = 0; begin < count_of(scores); begin += chunk) {
    const Index end = std::min(begin + chunk, count_of(scores));
    double sum = 0;
    for (Index i = begin; i < end; ++i) sum += item(scores, i);
    for (Index i = begin; i < end; ++i) out.push_back(sum / static_cast<double>(end - begin));
  }
  return out;
}

}  // namespace kvpare::oracle

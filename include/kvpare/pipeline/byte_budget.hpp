// One byte budget over eviction and precision: how many tokens of each list take which form. Pure, on the host.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "../core/config.hpp"
#include "../core/error.hpp"

namespace kvpare {

/// A form that tokens of a list may take, eviction being one of them (no bytes).
struct BudgetForm {
  Index page_bytes = 0;
  double error = 0;  // of a token of weight 1
};

/// One kv head of one layer.
struct BudgetList {
  std::vector<double> weights;    // of its tokens, descending, not negative: what one of them being wrong costs
  std::vector<BudgetForm> forms;  // in any order; there must be one of no bytes
};

struct BudgetSplit {
  std::vector<std::vector<Index>> counts;  // [list][form]: the form of least error takes the heaviest tokens, and so on
  Index bytes = 0;                         // of whole pages: what the pool will report
  double error = 0;
};

namespace detail {

/// One list's forms on the lower convex hull of error over bytes, cheapest first: no other is ever worth its bytes.
class BudgetHull {
 public:
  BudgetHull(const BudgetList& list, Index page_tokens) : list_(list), page_tokens_(page_tokens) {
    std::vector<std::size_t> order(list.forms.size());
    for (std::size_t f = 0; f < order.size(); ++f) order[f] = f;
    const auto& forms = list.forms;
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      return forms[a].page_bytes != forms[b].page_bytes ? forms[a].page_bytes < forms[b].page_bytes
                                                        : forms[a].error < forms[b].error;
    });
    for (const std::size_t f : order) {
      if (!steps_.empty() && forms[f].error >= forms[steps_.back()].error) continue;
      while (steps_.size() >= 2 && price(steps_[steps_.size() - 2], f) <= price(steps_[steps_.size() - 2], steps_.back()))
        steps_.pop_back();
      steps_.push_back(f);
    }
    sums_.push_back(0);
    for (const double w : list.weights) sums_.push_back(sums_.back() + w);
    upto_.assign(steps_.size(), 0);
    upto_[0] = tokens();
  }

  Index tokens() const { return static_cast<Index>(list_.weights.size()); }

  /// Every token takes the form that is best at this price of a byte per token; then pages are filled up, best form first.
  void choose(double price_of_byte) {
    upto_[0] = tokens();
    for (std::size_t s = steps_.size(); s-- > 1;) {
      const double least = price_of_byte * price(steps_[s - 1], steps_[s]);
      const auto past = std::partition_point(list_.weights.begin(), list_.weights.end(),
                                             [&](double w) { return w > 0 && w >= least; });
      const Index wanted = past - list_.weights.begin(), better = s + 1 < steps_.size() ? upto_[s + 1] : 0;
      upto_[s] = std::min(tokens(), better + round_up(std::max<Index>(0, wanted - better), page_tokens_));
    }
  }

  Index bytes() const {
    Index sum = 0;
    for (std::size_t s = 0; s < steps_.size(); ++s) sum += bytes_of(s, count(s));
    return sum;
  }
  double error() const {
    double sum = 0;
    for (std::size_t s = 0; s < steps_.size(); ++s)
      sum += form(s).error * (sums_[static_cast<std::size_t>(upto_[s])] - sums_[static_cast<std::size_t>(upto_[s] - count(s))]);
    return sum;
  }

  /// Up to a page of the heaviest tokens of step s - 1 in the form of step s: what that gains, and costs in bytes.
  struct Upgrade {
    double gain = 0;
    Index bytes = 0, tokens = 0;
  };
  Upgrade upgrade(std::size_t s) const {
    Upgrade u;
    const Index room = round_up(count(s), page_tokens_) - count(s);
    u.tokens = std::min(room > 0 ? room : page_tokens_, count(s - 1));
    if (u.tokens == 0) return u;
    const auto from = static_cast<std::size_t>(upto_[s]);
    u.gain = (form(s - 1).error - form(s).error) * (sums_[from + static_cast<std::size_t>(u.tokens)] - sums_[from]);
    u.bytes = bytes_of(s, count(s) + u.tokens) - bytes_of(s, count(s)) + bytes_of(s - 1, count(s - 1) - u.tokens) -
              bytes_of(s - 1, count(s - 1));
    return u;
  }
  void carry_out(std::size_t s, const Upgrade& u) { upto_[s] += u.tokens; }

  std::size_t steps() const { return steps_.size(); }
  std::vector<Index> counts() const {
    std::vector<Index> of_form(list_.forms.size(), 0);
    for (std::size_t s = 0; s < steps_.size(); ++s) of_form[steps_[s]] = count(s);
    return of_form;
  }
  double highest_price() const {
    double most = 0;
    for (std::size_t s = 1; s < steps_.size() && tokens() > 0; ++s)
      most = std::max(most, list_.weights[0] / price(steps_[s - 1], steps_[s]));
    return most;
  }

 private:
  const BudgetForm& form(std::size_t s) const { return list_.forms[steps_[s]]; }
  /// Bytes of a token for a unit less of error.
  double price(std::size_t a, std::size_t b) const {
    const BudgetForm &x = list_.forms[a], &y = list_.forms[b];
    return static_cast<double>(y.page_bytes - x.page_bytes) / static_cast<double>(page_tokens_) / (x.error - y.error);
  }
  Index count(std::size_t s) const { return upto_[s] - (s + 1 < upto_.size() ? upto_[s + 1] : 0); }
  Index bytes_of(std::size_t s, Index tokens) const { return ceil_div(tokens, page_tokens_) * form(s).page_bytes; }

  const BudgetList& list_;
  Index page_tokens_;
  std::vector<std::size_t> steps_;  // indices of forms
  std::vector<Index> upto_;         // [step] tokens in this form or a better one
  std::vector<double> sums_;        // of the heaviest tokens' weights
};

}  // namespace detail

/// Minimises  Σ_lists Σ_tokens weight * error(form of the token)  under  Σ pages * page_bytes <= budget.
///
/// A price per byte is found by bisection at which every token's own best choice just fits (Lagrange); pages are filled up, and
/// what is left of the budget goes to the upgrades that gain most per byte, a page at a time. Forms above the convex hull of
/// error over bytes are not used.
/// Error   at most that of the best split into whole pages plus what one page per list and step gains: the price of rounding.
///         Tests hold it against all splits of small cases
/// Ties    to the earlier list and the cheaper form; NaN weights must not come here
/// Cost    60 bisections of lists * forms * log(tokens), then lists * forms per upgrade
/// Throws  where a list has no form without bytes: then no budget is sure to be kept
inline BudgetSplit split_bytes(std::span<const BudgetList> lists, Index page_tokens, Index budget) {
  std::vector<detail::BudgetHull> hulls;
  hulls.reserve(lists.size());
  double high = 0;
  for (const BudgetList& list : lists) {
    require(std::any_of(list.forms.begin(), list.forms.end(), [](const BudgetForm& f) { return f.page_bytes == 0; }),
            "byte budget: a list has no form without bytes, must be able to evict");
    hulls.emplace_back(list, page_tokens);
    high = std::max(high, hulls.back().highest_price());
  }
  const auto bytes_at = [&](double price) {
    Index bytes = 0;
    for (detail::BudgetHull& hull : hulls) hull.choose(price), bytes += hull.bytes();
    return bytes;
  };
  high = high * 2 + 1;
  double low = 0;
  if (bytes_at(0) > budget) {
    double least = high;  // below it nothing fits surely; the scale of prices spans many powers
    while (least > 1e-300 && bytes_at(least / 4) <= budget) least /= 4;
    low = least / 4, high = least;
    for (int i = 0; i < 60; ++i) {
      const double middle = (low + high) / 2;
      (bytes_at(middle) <= budget ? high : low) = middle;
    }
    bytes_at(high);
  }

  BudgetSplit split;
  for (const detail::BudgetHull& hull : hulls) split.bytes += hull.bytes();
  for (;;) {
    double best = 0;
    std::size_t best_list = 0, best_step = 0;
    detail::BudgetHull::Upgrade best_upgrade;
    for (std::size_t l = 0; l < hulls.size(); ++l)
      for (std::size_t s = 1; s < hulls[l].steps(); ++s) {
        const auto u = hulls[l].upgrade(s);
        if (u.tokens == 0 || u.gain <= 0 || split.bytes + u.bytes > budget) continue;
        const double worth = u.gain / static_cast<double>(std::max<Index>(u.bytes, 1));
        if (worth > best) best = worth, best_list = l, best_step = s, best_upgrade = u;
      }
    if (best == 0) break;
    hulls[best_list].carry_out(best_step, best_upgrade);
    split.bytes += best_upgrade.bytes;
  }
  for (const detail::BudgetHull& hull : hulls) {
    split.counts.push_back(hull.counts());
    split.error += hull.error();
  }
  return split;
}

}  // namespace kvpare

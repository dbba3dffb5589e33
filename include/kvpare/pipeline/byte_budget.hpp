// One byte budget over eviction and precision: how many tokens of each list take which form. Pure, on the host.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include "../core/config.hpp"
#include "../core/error.hpp"

namespace kvpare {

/// A form that tokens of a list may take.
struct BudgetForm {
  Index page_bytes = 0;
  double error = 0;  // of a token of weight 1
};

/// One kv head of one layer. Tokens stand in the order of their weights, the heaviest first.
struct BudgetList {
  std::vector<double> weights;    // descending, not negative: what a token being wrong costs, by the error of its form
  std::vector<double> losses;     // descending: what evicting a token costs beside all that stand behind it
  std::vector<BudgetForm> forms;  // in any order, at least one
};

struct BudgetSplit {
  std::vector<std::vector<Index>> counts;  // [list][form]: the form of least error takes the heaviest tokens, and so on;
                                           // those behind are evicted
  Index bytes = 0;                         // of whole pages: what the pool will report
  double error = 0;
};

namespace detail {

/// One list's choices, step by step: step 0 evicts, the others are its forms on the lower convex hull of error over bytes,
/// cheapest first. No other is ever worth its bytes.
class BudgetHull {
 public:
  BudgetHull(const BudgetList& list, Index page_tokens)
      : list_(list), page_tokens_(page_tokens), forms_{-1}, upto_{tokens()}, weight_before_{0}, loss_before_{0} {
    std::vector<std::ptrdiff_t> order(list.forms.size());
    std::iota(order.begin(), order.end(), std::ptrdiff_t{0});
    std::sort(order.begin(), order.end(), [&](std::ptrdiff_t a, std::ptrdiff_t b) {
      const BudgetForm &x = at(a), &y = at(b);
      return x.page_bytes != y.page_bytes ? x.page_bytes < y.page_bytes : x.error < y.error;
    });
    for (const std::ptrdiff_t f : order) {
      if (forms_.size() > 1 && at(f).error >= at(forms_.back()).error) continue;
      while (forms_.size() > 2 && price(forms_[forms_.size() - 2], f) <= price(forms_[forms_.size() - 2], forms_.back()))
        forms_.pop_back();
      forms_.push_back(f);
    }
    upto_.resize(forms_.size(), 0);
    for (const double w : list.weights) weight_before_.push_back(weight_before_.back() + w);
    for (const double w : list.losses) loss_before_.push_back(loss_before_.back() + w);
  }

  Index tokens() const { return static_cast<Index>(list_.weights.size()); }

  /// Every token takes what is best at this price of a byte; then pages are filled up, best form first.
  void choose(double price_of_byte) {
    const double per_token = price_of_byte / static_cast<double>(page_tokens_);
    const auto best_form = [&](Index token) {
      double least = std::numeric_limits<double>::infinity();
      for (std::size_t s = 1; s < steps(); ++s)
        least = std::min(least, weight(token) * form(s).error + per_token * static_cast<double>(form(s).page_bytes));
      return least;
    };
    const Index kept = first_without([&](Index token) { return list_.losses[static_cast<std::size_t>(token)] > best_form(token); });
    for (std::size_t s = steps(); s-- > 1;) {
      const double least = s > 1 ? price_of_byte * price(forms_[s - 1], forms_[s]) : 0;
      const Index taken = first_without([&](Index token) { return weight(token) > 0 && weight(token) >= least; });
      const Index wanted = s > 1 ? std::min(taken, kept) : kept, better = s + 1 < steps() ? upto_[s + 1] : 0;
      upto_[s] = std::min(tokens(), better + round_up(std::max<Index>(0, wanted - better), page_tokens_));
    }
  }

  Index bytes() const {
    Index sum = 0;
    for (std::size_t s = 1; s < steps(); ++s) sum += bytes_of(s, count(s));
    return sum;
  }
  double error() const {
    double sum = 0;
    for (std::size_t s = 0; s < steps(); ++s) sum += error_of(s, upto_[s] - count(s), upto_[s]);
    return sum;
  }

  /// Up to a page of the heaviest tokens of step s - 1 go to step s: what that gains, and costs in bytes.
  struct Upgrade {
    double gain = 0;
    Index bytes = 0, tokens = 0;
  };
  Upgrade upgrade(std::size_t s) const {
    Upgrade u;
    const Index room = round_up(count(s), page_tokens_) - count(s);
    u.tokens = std::min(room > 0 ? room : page_tokens_, count(s - 1));
    if (u.tokens == 0) return u;
    u.gain = error_of(s - 1, upto_[s], upto_[s] + u.tokens) - error_of(s, upto_[s], upto_[s] + u.tokens);
    u.bytes = bytes_of(s, count(s) + u.tokens) - bytes_of(s, count(s)) + bytes_of(s - 1, count(s - 1) - u.tokens) -
              bytes_of(s - 1, count(s - 1));
    return u;
  }
  void carry_out(std::size_t s, const Upgrade& u) { upto_[s] += u.tokens; }

  std::size_t steps() const { return forms_.size(); }
  std::vector<Index> counts() const {
    std::vector<Index> of_form(list_.forms.size(), 0);
    for (std::size_t s = 1; s < steps(); ++s) of_form[static_cast<std::size_t>(forms_[s])] = count(s);
    return of_form;
  }
  /// At this price of a byte nothing is kept.
  double highest_price() const {
    if (tokens() == 0) return 0;
    return 2 * static_cast<double>(page_tokens_) * list_.losses[0] / static_cast<double>(form(1).page_bytes);
  }

 private:
  const BudgetForm& at(std::ptrdiff_t f) const { return list_.forms[static_cast<std::size_t>(f)]; }
  const BudgetForm& form(std::size_t s) const { return at(forms_[s]); }
  double weight(Index token) const { return list_.weights[static_cast<std::size_t>(token)]; }
  /// Bytes of a token for a unit less of error.
  double price(std::ptrdiff_t a, std::ptrdiff_t b) const {
    return static_cast<double>(at(b).page_bytes - at(a).page_bytes) / static_cast<double>(page_tokens_) /
           (at(a).error - at(b).error);
  }
  /// Of tokens in order, the first for which it does not hold; it holds for all before.
  template <class F>
  Index first_without(F&& holds) const {
    Index from = 0, to = tokens();
    while (from < to) {
      const Index middle = from + (to - from) / 2;
      if (holds(middle)) from = middle + 1;
      else to = middle;
    }
    return from;
  }
  Index count(std::size_t s) const { return upto_[s] - (s + 1 < upto_.size() ? upto_[s + 1] : 0); }
  Index bytes_of(std::size_t s, Index tokens) const {
    return s == 0 ? 0 : ceil_div(tokens, page_tokens_) * form(s).page_bytes;
  }
  double error_of(std::size_t s, Index from, Index to) const {
    const std::vector<double>& before = s == 0 ? loss_before_ : weight_before_;
    return (before[static_cast<std::size_t>(to)] - before[static_cast<std::size_t>(from)]) * (s == 0 ? 1 : form(s).error);
  }

  const BudgetList& list_;
  Index page_tokens_;
  std::vector<std::ptrdiff_t> forms_;  // [step], -1: evicted
  std::vector<Index> upto_;            // [step] tokens in this step or a better one
  std::vector<double> weight_before_, loss_before_;  // sums over the tokens before
};

}  // namespace detail

/// Minimises  Σ_lists ( Σ_kept weight * error(form) + Σ_evicted loss )  under  Σ pages * page_bytes <= budget.
///
/// A price per byte is found by bisection at which every token's own best choice just fits (Lagrange); pages are filled up, and
/// what is left of the budget goes to the upgrades that gain most per byte, a page at a time. Forms above the convex hull of
/// error over bytes are not used. A loss falls at least as fast from token to token as the weight does, errors are at most 1:
/// then the tokens worth keeping are the first ones.
/// Error   at most that of the best split into whole pages plus what one page per list and step gains: the price of rounding.
///         Tests hold it against all splits of small cases
/// Ties    to the earlier list and the cheaper form; NaN must not come here
/// Cost    60 trials of a price and one for each factor of 4 that it is searched over, lists * forms * log(tokens) each; then
///         lists * forms per upgrade
/// Throws  where a list has no form, or not a loss for every weight
inline BudgetSplit split_bytes(std::span<const BudgetList> lists, Index page_tokens, Index budget) {
  std::vector<detail::BudgetHull> hulls;
  hulls.reserve(lists.size());
  double high = 0;
  for (const BudgetList& list : lists) {
    require(!list.forms.empty(), "byte budget: a list has no forms to choose from");
    require(list.losses.size() == list.weights.size(), "byte budget: losses of ", list.losses.size(), " tokens, weights of ",
            list.weights.size());
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

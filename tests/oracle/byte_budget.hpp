// One byte budget over eviction and precision, by trying everything: for small cases, to hold a solver to.
#pragma once

#include <algorithm>
#include <functional>
#include <optional>

#include "softmax.hpp"

namespace kvpare::oracle {

/// What one (layer, kv head) may do: keep so many tokens in this format.
struct BudgetOption {
  Index kept = 0;
  Index format = 0;
  Index bytes = 0;
  double error = 0;  // estimated
};
/// One option of each (layer, kv head).
struct BudgetChoice {
  std::vector<Index> option;  // [lists], an index into its options
  Index bytes = 0;
  double error = 0;
};

/// The options of one list, smallest count first, formats in order.
///   bytes of pages: each format pays whole pages, ceil(kept / page_tokens) · page_bytes
///   error           `error_of(kept, format)`: the estimate that the solver under test uses
/// None kept is one option, format 0, no bytes.
inline std::vector<BudgetOption> budget_options(const std::vector<Index>& counts, const std::vector<Index>& page_bytes,
                                                Index page_tokens,
                                                const std::function<double(Index, Index)>& error_of) {
  std::vector<BudgetOption> options;
  for (const Index kept : counts)
    for (Index format = 0; format < count_of(page_bytes); ++format) {
      if (kept == 0 && format > 0) continue;
      const Index pages = (kept + page_tokens - 1) / page_tokens;
      options.push_back({kept, format, pages * item(page_bytes, format), error_of(kept, format)});
    }
  return options;
}

/// An estimate to test with: what the dropped tokens weigh, and the format's relative error on what the kept ones
/// weigh,
///   e = Σ_{dropped} a + r Σ_{kept} a
/// the kept being the heaviest. Equal for equal weights, falls with each token kept where r < 1.
inline double mass_error(std::vector<double> weights, Index kept, double relative_error) {
  std::sort(weights.begin(), weights.end(), std::greater<>());
  double error = 0;
  for (Index i = 0; i < count_of(weights); ++i) error += item(weights, i) * (i < kept ? relative_error : 1);
  return error;
}

/// The choice of least Σ error with Σ bytes <= budget, by trying all of them; of equal errors the fewer bytes, of those
/// the lower options of the first lists. Nothing where even the smallest does not fit.
inline std::optional<BudgetChoice> least_error(const std::vector<std::vector<BudgetOption>>& lists, Index budget) {
  double combinations = 1;
  for (const auto& options : lists) combinations *= static_cast<double>(options.size());
  require(combinations <= 5e6, "oracle: too many combinations to try");
  std::optional<BudgetChoice> best;
  if (combinations == 0) return best;
  std::vector<Index> at(lists.size(), 0);
  for (;;) {
    BudgetChoice choice{at, 0, 0};
    for (Index i = 0; i < count_of(lists); ++i) {
      const BudgetOption& option = item(item(lists, i), item(at, i));
      choice.bytes += option.bytes, choice.error += option.error;
    }
    if (choice.bytes <= budget && (!best || choice.error < best->error ||
                                   (choice.error == best->error && choice.bytes < best->bytes)))
      best = choice;
    Index i = count_of(lists) - 1;  // the last list turns fastest: lexicographic order
    while (i >= 0 && ++item(at, i) == count_of(item(lists, i))) item(at, i--) = 0;
    if (i < 0) return best;
  }
}

/// What no choice can beat, for cases too large to try: Σ_lists min_options (error + λ bytes) - λ budget, the largest
/// of it over the λ >= 0 given (Lagrange), and 0, errors being none below it.
inline double error_bound(const std::vector<std::vector<BudgetOption>>& lists, Index budget,
                          const std::vector<double>& lambdas) {
  double bound = 0;
  for (const double lambda : lambdas) {
    double sum = -lambda * static_cast<double>(budget);
    for (const auto& options : lists) {
      double least = infinity;
      for (const BudgetOption& o : options) least = std::min(least, o.error + lambda * static_cast<double>(o.bytes));
      sum += least;
    }
    bound = std::max(bound, sum);
  }
  return bound;
}

}  // namespace kvpare::oracle

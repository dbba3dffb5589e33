// PrefixKV's layer budgets: every layer keeps the same share of its attention, in as many tokens as that takes.
#pragma once

#include <string_view>
#include <tuple>

#include "../contracts.hpp"
#include "apportion.hpp"

namespace kvpare {

/// Formula  C_l[o] = share of a layer's scores that its o best tokens have;  R_l(s) = the smallest o with C_l[o] >= s
///          s = the largest share for which sum of R_l(s) <= total, by bisection;  wish_l = R_l(s)
///          keep = wishes apportioned within [0, available]: what is left, where C jumps, goes out in proportion
/// Ties     equal remainders go to the lower layer. NaN scores count as 0; a layer without any score above 0 keeps 1
/// Cost     one sort per layer, then 60 bisections of O(layers * log tokens) in one thread
/// Source   PrefixKV (Wang et al., arXiv 2412.03409, NeurIPS 2025), section 3.3. Ours: the released code stops within five
///          tokens of the total and rescales what each layer forgets
struct Prefix {
  static constexpr std::string_view name = "prefix";
  static constexpr BudgetNeeds needs = {.curve = true};
  static constexpr auto fields() { return std::tuple{}; }

  KVPARE_HD void allocate(const LayerSummary* layers, const Index* available, Index n, Index total, double* scratch,
                          Index* keep) const {
    // Tokens without a score stay; they are part of the budget.
    const auto reserved = [&](Index l) {
      return available[l] > layers[l].count ? static_cast<double>(available[l] - layers[l].count) : 0.0;
    };
    double tokens = 0, units = 0;
    for (Index l = 0; l < n; ++l) {
      tokens += reserved(l) + static_cast<double>(layers[l].count);
      units += static_cast<double>(available[l]);
    }
    const double target = units > 0 ? static_cast<double>(total) * (tokens / units) : 0;
    double low = 0, high = 1;
    for (int i = 0; i < 60; ++i) {
      const double middle = low + (high - low) / 2;
      double sum = 0;
      for (Index l = 0; l < n; ++l) sum += reserved(l) + prefix(layers[l], middle);
      (sum <= target ? low : high) = middle;
    }
    for (Index l = 0; l < n; ++l) scratch[l] = reserved(l) + prefix(layers[l], low);
    apportion(scratch, available, n, total, 0, keep);
  }
  friend bool operator==(const Prefix&, const Prefix&) = default;

 private:
  /// R_l(share).
  static KVPARE_HD double prefix(const LayerSummary& layer, double share) {
    if (layer.count == 0) return 0;
    const double wanted = share * layer.curve[layer.count - 1];
    Index low = 0, high = layer.count - 1;  // the first whose sum reaches it
    while (low < high) {
      const Index middle = low + (high - low) / 2;
      if (layer.curve[middle] >= wanted)
        high = middle;
      else
        low = middle + 1;
    }
    return static_cast<double>(low + 1);
  }
};

static_assert(BudgetAllocator<Prefix>);

}  // namespace kvpare

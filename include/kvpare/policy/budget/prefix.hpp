// PrefixKV's layer budgets: every layer keeps the same share of its attention, in as many tokens as that takes.
#pragma once

#include <string_view>
#include <tuple>

#include "../contracts.hpp"
#include "apportion.hpp"

namespace kvpare {

/// Formula  C_l[o] = share of a layer's scores that its o best tokens have;  R_l(s) = the smallest o with C_l[o] >= s
///          s = the largest share for which sum of R_l(s) <= total, by bisection;  wish_l = R_l(s)
///          paper: keep = wishes apportioned within [0, available]: what is left, where C jumps, goes out in proportion
///          reference: what is to go, F = sum of available - total, is sought by halving [0, 1] until sum of F_l(s) is less than
///          5 off, F_l(s) = max(0, available - R_l(s) - stays), stays the tokens that stay whatever their score;
///          keep = available - floor(F_l(s) F / sum of F_l(s))
/// Sums     paper: to the total, always. reference: above it by up to a token per layer, and where tokens that stay leave
///          less to go than that; nothing goes where all F_l(s) are 0
/// Ties     equal remainders go to the lower layer. NaN scores count as 0; a layer without any score above 0 keeps 1
/// Cost     one sort per layer, then 60 bisections of O(layers * log tokens) in one thread
/// Source   PrefixKV (Wang et al., arXiv 2412.03409, NeurIPS 2025), section 3.3. `reference` is the released code, but for sums in
///          double and no more than 60 halvings
struct Prefix {
  static constexpr std::string_view name = "prefix";
  static constexpr BudgetNeeds needs = {.curve = true};

  Mode mode = Mode::paper;

  static constexpr auto fields() {
    return std::tuple{Choice{"mode", &Prefix::mode, "exact sums, or as near as the released code comes"}};
  }
  constexpr bool has_reference() const { return true; }

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
    if (mode == Mode::reference) return as_released(layers, available, n, tokens, target, keep);
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
  /// What a layer would forget at a share.
  static KVPARE_HD Index forgotten(const LayerSummary& layer, Index available, double share) {
    const Index unscored = available > layer.count ? available - layer.count : 0;
    const Index protects = layer.stays > unscored ? layer.stays - unscored : 0;
    const Index goes = layer.count - static_cast<Index>(prefix(layer, share)) - protects;
    return goes > 0 ? goes : 0;
  }
  static KVPARE_HD void as_released(const LayerSummary* layers, const Index* available, Index n, double tokens,
                                    double target, Index* keep) {
    const double wanted = tokens - target;
    double low = 0, high = 1, middle = 0, sum = 0;
    for (int i = 0; i < 60; ++i) {
      middle = (low + high) / 2, sum = 0;
      for (Index l = 0; l < n; ++l) sum += static_cast<double>(forgotten(layers[l], available[l], middle));
      if (sum - wanted < 5 && wanted - sum < 5) break;
      (sum < wanted ? high : low) = middle;
    }
    for (Index l = 0; l < n; ++l) {
      const double goes = static_cast<double>(forgotten(layers[l], available[l], middle));
      const Index whole = sum > 0 ? static_cast<Index>(goes * wanted / sum) : 0;
      const Index all = available[l] > layers[l].count ? available[l] : layers[l].count;
      // Where available counts pages, or is of the fullest of heads that differ, in its units.
      keep[l] = whole < all ? (all - whole) * available[l] / all : 0;
    }
  }
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

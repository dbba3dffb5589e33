// AirCache's layer budgets: more for layers that attend strongly to the image, and to few places of it.
#pragma once

#include <string_view>
#include <tuple>

#include "../../codec/rounding.hpp"
#include "../contracts.hpp"
#include "apportion.hpp"

namespace kvpare {

/// Which of the two measures counts.
enum class BudgetUse : std::uint8_t { both, strength, skewness };
inline constexpr std::string_view choices(BudgetUse*) { return "both|strength|skewness"; }

/// Formula  st_l = sum of the candidates' scores (layer mean over heads);  sk_l = max(0, adjusted sample skewness)
///          st' = L st / sum(st),  sk' = L sk / sum(sk)  (mean 1 over the layers that have candidates, 3 for the skewness; all
///          1 when the sum is 0; sk'_l = 1 for fewer than 3 candidates)
///          wish_l = (layer_floor + (1 - layer_floor) * 0.5 (st'_l + sk'_l)) * total / L;  keep = wishes apportioned within [least, available]
/// Ties     equal remainders go to the lower layer. NaN scores are left out
/// Cost     O(layers)
/// Source   AirCache (arXiv 2503.23956, ICCV 2025), the section on layer-wise budgets. Ours: mean-1 normalisation (the
///          reading under which the total keeps its meaning), sk clamped at 0, exact apportionment, and layer_floor (0 = as published).
struct StrengthSkewness {
  static constexpr std::string_view name = "strength_skewness";
  static constexpr BudgetNeeds needs = {.summary = true};

  BudgetUse use = BudgetUse::both;
  Index least = 1;         // tokens every layer keeps, as far as the total allows
  double layer_floor = 0;  // share of the even budget that every layer keeps

  static constexpr auto fields() {
    return std::tuple{
        Choice{"use", &StrengthSkewness::use, "what layer budgets follow"},
        Field<StrengthSkewness, Index>{"least", &StrengthSkewness::least, 0, 1 << 20, "tokens every layer keeps"},
        Field<StrengthSkewness, double>{"layer_floor", &StrengthSkewness::layer_floor, 0.0, 1.0,
                                        "share of the even budget that every layer keeps"}};
  }

  KVPARE_HD void allocate(const LayerSummary* layers, const Index* available, Index n, Index total, double* scratch,
                          Index* keep) const {
    double strength = 0, skewness = 0, with_any = 0, with_skew = 0;
    for (Index l = 0; l < n; ++l) {
      strength += layers[l].sum;
      skewness += skew(layers[l]);
      with_any += layers[l].count > 0;
      with_skew += layers[l].count >= 3;
    }
    for (Index l = 0; l < n; ++l) {
      const double st = strength > 0 ? with_any * layers[l].sum / strength : 1;
      const double sk = layers[l].count < 3 || !(skewness > 0) ? 1 : with_skew * skew(layers[l]) / skewness;
      scratch[l] = use == BudgetUse::strength ? st : use == BudgetUse::skewness ? sk : 0.5 * (st + sk);
      scratch[l] = layer_floor + detail::product(1 - layer_floor, scratch[l]);
    }
    // Wishes are shares of the total weighted by what each layer has (the same for all layers of one prompt).
    for (Index l = 0; l < n; ++l) scratch[l] *= static_cast<double>(available[l]);
    apportion(scratch, available, n, total, least, keep);
  }
  friend bool operator==(const StrengthSkewness&, const StrengthSkewness&) = default;

 private:
  static KVPARE_HD double skew(const LayerSummary& layer) {
    return layer.count >= 3 && layer.skewness > 0 ? layer.skewness : 0;
  }
};

static_assert(BudgetAllocator<StrengthSkewness>);

}  // namespace kvpare

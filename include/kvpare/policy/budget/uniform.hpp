// The same number of tokens in every layer.
#pragma once

#include <string_view>
#include <tuple>

#include "../contracts.hpp"
#include "apportion.hpp"

namespace kvpare {

/// Formula  keep[l] = total / layers; the remainder goes to the first layers; a layer that has fewer passes its share on
/// Cost     O(layers)
/// Source   what SnapKV, H2O and StreamingLLM do
struct Uniform {
  static constexpr std::string_view name = "uniform";
  static constexpr BudgetNeeds needs = {};
  static constexpr auto fields() { return std::tuple{}; }

  KVPARE_HD void allocate(const LayerSummary*, const Index* available, Index n, Index total, double* scratch,
                          Index* keep) const {
    for (Index l = 0; l < n; ++l) scratch[l] = 1;
    apportion(scratch, available, n, total, 0, keep);
  }
  friend bool operator==(const Uniform&, const Uniform&) = default;
};

static_assert(BudgetAllocator<Uniform>);

}  // namespace kvpare

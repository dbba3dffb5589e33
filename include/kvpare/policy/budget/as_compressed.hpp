// Between decode steps every layer goes on at the ratio that `compress` left it with.
#pragma once

#include <string_view>
#include <tuple>

#include "../contracts.hpp"
#include "apportion.hpp"

namespace kvpare {

/// Formula  a layer may hold ceil(keep * given * kept / given_then) tokens: `kept` of `given_then` tokens that it had been given
///          stayed at the last compress, `given` is what it has been given by now; keep is the method's, a ratio
///          At compress itself every layer keeps the same share
/// Ties     none
/// Cost     O(1) per step; O(layers) at compress
/// Source   PrefixKV (arXiv 2412.03409) and Elastic Cache (arXiv 2407.18121), decoding: excess = floor(active - given * ratio)
struct AsCompressed {
  static constexpr std::string_view name = "as_compressed";
  static constexpr BudgetNeeds needs = {};
  static constexpr bool follows_compress = true;
  static constexpr auto fields() { return std::tuple{}; }

  KVPARE_HD void allocate(const LayerSummary*, const Index* available, Index n, Index total, double* scratch,
                          Index* keep) const {
    for (Index l = 0; l < n; ++l) scratch[l] = static_cast<double>(available[l]);
    apportion(scratch, available, n, total, 0, keep);
  }
  friend bool operator==(const AsCompressed&, const AsCompressed&) = default;
};

static_assert(BudgetAllocator<AsCompressed>);

}  // namespace kvpare

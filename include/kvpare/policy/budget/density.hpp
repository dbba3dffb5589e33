// VL-Cache's layer budgets: more for layers whose attention is spread over many tokens.
#pragma once

#include <string_view>
#include <tuple>

#include "../contracts.hpp"
#include "apportion.hpp"

namespace kvpare {

/// Formula  wish_l = d_l / sum(d) * total, d_l the density that the scorer measured (1 - sparsity);
///          keep = wishes apportioned within [least * tokens, tokens]
/// Ties     equal remainders go to the lower layer. A density of NaN counts as 0; all 0 = all equal
/// Cost     O(layers)
/// Source   VL-Cache (arXiv 2410.23317), section 4.2. Ours: the total is met exactly, where the paper clips each layer to
///          [1 %, 100 %] and does not mend the sum
struct Density {
  static constexpr std::string_view name = "density";
  static constexpr BudgetNeeds needs = {.density = true};

  double least = 0.01;  // share of its tokens that every layer keeps, as far as the total allows

  static constexpr auto fields() {
    return std::tuple{
        Field<Density, double>{"least", &Density::least, 0.0, 1.0, "share of its tokens that every layer keeps"}};
  }
  KVPARE_HD void allocate(const LayerSummary* layers, const Index* available, Index n, Index total, double* scratch,
                          Index* keep) const {
    Index most = 0;
    for (Index l = 0; l < n; ++l) {
      scratch[l] = layers[l].density * static_cast<double>(available[l]);
      most = available[l] > most ? available[l] : most;
    }
    const Index floor = static_cast<Index>(least * static_cast<double>(most));
    apportion(scratch, available, n, total, floor > 1 ? floor : 1, keep);
  }
  friend bool operator==(const Density&, const Density&) = default;
};

static_assert(BudgetAllocator<Density>);

}  // namespace kvpare

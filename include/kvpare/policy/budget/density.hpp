// VL-Cache's layer budgets: more for layers whose attention is spread over many tokens.
#pragma once

#include <string_view>
#include <tuple>

#include "../contracts.hpp"
#include "apportion.hpp"

namespace kvpare {

/// Formula  wish_l = d_l / sum(d) * total, d_l the density that the scorer measured (1 - sparsity);
///          paper: keep = wishes apportioned within [least * tokens, tokens]
///          reference: w = max(1, floor(s total / L)) newest tokens in every layer, s the selector's recent_share, none for
///          s = 0; keep = w + max(1, floor(m clip((1 - s) d_l / sum(d) * L total / sum(m), (1 - s) least, 1))), m the layer's
///          tokens, L the number of layers. Where s > 0 the selector has to be in that mode, too
/// Sums     paper: to the total, always. reference: below it by what clipping and rounding take, and above it where `least`
///          lifts layers
/// Ties     equal remainders go to the lower layer. A density of NaN counts as 0; all 0 = all equal
/// Cost     O(layers)
/// Source   VL-Cache (arXiv 2410.23317), section 4.2. Ours: the total is met exactly, where the paper clips each layer to
///          [1 %, 100 %] and does not mend the sum. Its authors released no code: `reference` is the default of EffiVLM-Bench,
///          whose window is a share of the mean budget, not of each layer's own
struct Density {
  static constexpr std::string_view name = "density";
  static constexpr BudgetNeeds needs = {.density = true};

  double least = 0.01;  // share of its tokens that every layer keeps, as far as the total allows
  Mode mode = Mode::paper;

  static constexpr auto fields() {
    return std::tuple{
        Field<Density, double>{"least", &Density::least, 0.0, 1.0, "share of its tokens that every layer keeps"},
        Choice{"mode", &Density::mode, "exact sums, or clipped and rounded layer by layer"}};
  }
  constexpr bool has_reference() const { return true; }
  KVPARE_HD void allocate(const LayerSummary* layers, const Index* available, Index n, Index total, double* scratch,
                          Index* keep) const {
    if (mode == Mode::reference) return as_released(layers, available, n, total, keep);
    Index most = 0;
    for (Index l = 0; l < n; ++l) {
      scratch[l] = layers[l].density * static_cast<double>(available[l]);
      most = available[l] > most ? available[l] : most;
    }
    const Index floor = static_cast<Index>(least * static_cast<double>(most));
    apportion(scratch, available, n, total, floor > 1 ? floor : 1, keep);
  }
  friend bool operator==(const Density&, const Density&) = default;

 private:
  KVPARE_HD void as_released(const LayerSummary* layers, const Index* available, Index n, Index total,
                             Index* keep) const {
    double densities = 0, tokens = 0;
    for (Index l = 0; l < n; ++l) {
      if (layers[l].density > 0) densities += layers[l].density;
      tokens += static_cast<double>(available[l]);
    }
    const double ratio = tokens > 0 ? static_cast<double>(total) / tokens : 0;
    for (Index l = 0; l < n; ++l) {
      const double share = layers[l].recent_share, m = static_cast<double>(available[l]);
      const double density = !(densities > 0)        ? 1.0 / static_cast<double>(n)
                             : layers[l].density > 0 ? layers[l].density / densities
                                                     : 0.0;
      double beta = density * ratio * (1 - share) * static_cast<double>(n);
      const double low = (1 - share) * least;
      beta = beta < low ? low : beta > 1 ? 1 : beta;
      Index best = static_cast<Index>(beta * m);
      const Index newest = newest_of_mean(share, total, n);
      if (best < 1) best = 1;
      keep[l] = best + newest < available[l] ? best + newest : available[l];
    }
  }
};

static_assert(BudgetAllocator<Density>);

}  // namespace kvpare

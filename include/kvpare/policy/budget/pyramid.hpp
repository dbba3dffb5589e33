// PyramidKV's layer budgets: less from layer to layer.
#pragma once

#include <string_view>
#include <tuple>

#include "../contracts.hpp"
#include "apportion.hpp"

namespace kvpare {

/// Formula  C = total / layers; the newest `window` tokens are every layer's, the rest B = C - window falls in a line:
///          low = B / beta, high = 2 B - low, or high = N - window, low = 2 B - high where that is less, N = available;
///          x_l = high - l (high - low) / (layers - 1);  keep[l] = window + x_l
///          paper: the line in real numbers, N that of the longest layer, then apportioned within what each layer has, so
///          that the sum is the total
///          reference: all divisions of whole numbers rounded down, N that of the layer; everything where N < C, x_l = B
///          where N < 2 B
/// Ties     paper: equal remainders go to the lower layer
/// Sums     paper: to the total, always. reference: above it where the rounded step is too small (4.5 % at C = 320,
///          window = 64, 32 layers, 4096 tokens), and below where a layer has fewer tokens than its share
/// Cost     O(layers)
/// Source   PyramidKV (Cai et al. 2024, arXiv 2406.02069), section 4.2; `reference` is the schedule of the released code
struct Pyramid {
  static constexpr std::string_view name = "pyramid";
  static constexpr BudgetNeeds needs = {};

  double beta = 20;  // steepness: the last layer gets B / beta
  Index window = 8;  // newest tokens that every layer keeps
  Mode mode = Mode::paper;

  static constexpr auto fields() {
    return std::tuple{
        Field<Pyramid, double>{"beta", &Pyramid::beta, 1.0, 1e6, "steepness: the last layer gets 1/beta of the mean"},
        Field<Pyramid, Index>{"window", &Pyramid::window, 0, 1 << 20, "newest tokens that every layer keeps"},
        Choice{"mode", &Pyramid::mode, "exact sums, or the released code's whole numbers"}};
  }
  constexpr bool has_reference() const { return true; }

  KVPARE_HD void allocate(const LayerSummary*, const Index* available, Index n, Index total, double* scratch,
                          Index* keep) const {
    if (mode == Mode::reference) {
      for (Index l = 0; l < n; ++l) keep[l] = as_released(l, n, total / n, available[l]);
      return;
    }
    const double capacity = static_cast<double>(total) / static_cast<double>(n);
    const double fixed = capacity < static_cast<double>(window) ? capacity : static_cast<double>(window);
    Index most = 0;
    for (Index l = 0; l < n; ++l) most = available[l] > most ? available[l] : most;
    const double mean = capacity - fixed, room = static_cast<double>(most) - fixed;
    double low = mean / beta, high = 2 * mean - low;
    if (high > room) high = room, low = 2 * mean - high;
    for (Index l = 0; l < n; ++l) {
      const double x = n > 1 ? high - static_cast<double>(l) * (high - low) / static_cast<double>(n - 1) : mean;
      scratch[l] = fixed + x;
    }
    apportion(scratch, available, n, total, static_cast<Index>(fixed), keep);
  }
  friend bool operator==(const Pyramid&, const Pyramid&) = default;

 private:
  KVPARE_HD Index as_released(Index layer, Index layers, Index capacity, Index tokens) const {
    if (tokens < capacity) return tokens;
    const Index least = window < capacity ? window : capacity, mean = capacity - least;
    if (tokens < 2 * mean) return capacity;
    Index low = static_cast<Index>(static_cast<double>(mean) / beta), high = 2 * mean - low;
    if (high >= tokens - least) high = tokens - least, low = 2 * mean - high;
    const Index step = layers > 1 ? (high - low) / (layers - 1) : 0;
    const Index keep = least + high - layer * step;
    return keep < tokens ? keep : tokens;
  }
};

static_assert(BudgetAllocator<Pyramid>);

}  // namespace kvpare

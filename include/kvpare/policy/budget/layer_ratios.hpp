// Layer budgets from a table, such as calibration finds once for a model.
#pragma once

#include <algorithm>
#include <charconv>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "../contracts.hpp"
#include "../select/keep.hpp"
#include "apportion.hpp"

namespace kvpare {

/// A keep ratio per layer, of those that take part. Text: "0.92 0.5 0.31", layer 0 first.
struct Ratios {
  static constexpr int most = 256;
  float of[most] = {};
  int count = 0;

  constexpr Ratios() = default;
  /// The mean over samples of tokens kept by tokens given, layer by layer. Throws on samples of different lengths, and on
  /// more layers than there is room for.
  static Ratios mean_of(std::span<const std::vector<double>> samples) {
    Ratios r;
    require(!samples.empty() && !samples[0].empty() && samples[0].size() <= most,
            "layer ratios: ", samples.empty() ? 0 : samples[0].size(), " layers in ", samples.size(),
            " samples, must be 1 to ", most, " in at least one");
    r.count = static_cast<int>(samples[0].size());
    for (std::size_t l = 0; l < samples[0].size(); ++l) {
      double sum = 0;
      for (const auto& sample : samples) {
        require(sample.size() == samples[0].size(), "layer ratios: a sample has ", sample.size(), " layers, the first ",
                samples[0].size());
        sum += sample[l];
      }
      r.of[l] = static_cast<float>(sum / static_cast<double>(samples.size()));
    }
    return r;
  }
  friend bool operator==(const Ratios& a, const Ratios& b) {
    return a.count == b.count && std::equal(a.of, a.of + a.count, b.of);
  }
};

inline std::string print_setting(const Ratios& ratios) {
  std::string words;
  for (int l = 0; l < ratios.count; ++l) {
    if (l > 0) words += ' ';
    char digits[32];
    words.append(digits, std::to_chars(digits, digits + sizeof digits, ratios.of[l]).ptr);
  }
  return words;
}

/// False unless every word is a ratio within [0, 1].
inline bool parse_setting(std::string_view words, Ratios& out) {
  Ratios ratios;
  const char *at = words.data(), *end = at + words.size();
  while (at < end) {
    float x = 0;
    const auto [next, error] = std::from_chars(at, end, x);
    if (error != std::errc{} || !(x >= 0 && x <= 1) || ratios.count == Ratios::most) return false;
    ratios.of[ratios.count++] = x;
    if (next < end && *next != ' ') return false;
    for (at = next; at < end && *at == ' ';) ++at;
  }
  out = ratios;
  return ratios.count > 0;
}

/// Formula  wish_l = ratio_l * available_l;  keep = wishes apportioned to the total: the table says the shape, `keep` how much
/// Ties     equal remainders go to the lower layer
/// Cost     O(layers)
/// Source   PrefixKV (Wang et al., arXiv 2412.03409), offline estimation. Always what is kept: the tables published with its
///          code say what is forgotten
struct LayerRatios {
  static constexpr std::string_view name = "layer_ratios";
  static constexpr BudgetNeeds needs = {};

  Ratios ratios;

  static constexpr auto fields() {
    return std::tuple{Choice{"ratios", &LayerRatios::ratios, "keep ratio of each layer that takes part"}};
  }
  /// Throws unless there is a ratio for each of so many layers.
  void check_layers(Index layers) const {
    require(ratios.count == layers, name, ": ", ratios.count, " ratios for ", layers, " layers that take part");
  }
  KVPARE_HD void allocate(const LayerSummary*, const Index* available, Index n, Index total, double* scratch,
                          Index* keep) const {
    for (Index l = 0; l < n; ++l)
      scratch[l] = static_cast<double>(l < ratios.count ? ratios.of[l] : 0.0f) * static_cast<double>(available[l]);
    apportion(scratch, available, n, total, 0, keep);
  }
  friend bool operator==(const LayerRatios&, const LayerRatios&) = default;
};

static_assert(BudgetAllocator<LayerRatios>);

}  // namespace kvpare

// PyramidKV: lower layers keep more, linearly.
#pragma once

#include <algorithm>

#include "strength_skewness.hpp"

namespace kvpare::oracle {

struct PyramidSettings {
  Index capacity = 320;  // C, per layer on average, the window included
  Index window = 64;     // W
  Index beta = 20;       // the last layer aims at (C - W) / beta
};

/// The schedule as published: tokens per layer, the window not included, all in whole numbers. It is over budget.
/// Source  PyramidKV, arXiv 2406.02069, KVCache-Factory
inline std::vector<Index> pyramid_published(Index layers, Index tokens, const PyramidSettings& s) {
  require(layers >= 2, "oracle: the published step divides by layers - 1");
  const Index base = s.capacity - s.window;
  if (tokens < s.capacity)
    return std::vector<Index>(static_cast<std::size_t>(layers), std::max<Index>(0, tokens - s.window));
  if (tokens < 2 * base) return std::vector<Index>(static_cast<std::size_t>(layers), base);
  Index least = base / s.beta, most = 2 * base - least;
  if (most >= tokens - s.window) {
    most = tokens - s.window;
    least = 2 * base - most;
  }
  const Index step = (most - least) / (layers - 1);
  std::vector<Index> out;
  for (Index l = 0; l < layers; ++l) out.push_back(most - l * step);
  return out;
}

/// What each layer would take of `total` if tokens could be cut: linear from the first layer's share to the last one's,
/// base / beta, with base = total / layers; their sum is total. No layer aims at more than `available`, and what that
/// takes from the first the last one gains.
inline std::vector<double> pyramid_wishes(Index layers, double total, double beta, double available) {
  const double base = total / static_cast<double>(layers);
  double least = base / beta, most = 2 * base - least;
  if (most > available) {
    most = available;
    least = 2 * base - most;
  }
  std::vector<double> wishes;
  for (Index l = 0; l < layers; ++l)
    wishes.push_back(layers == 1 ? base
                                 : most - (most - least) * static_cast<double>(l) / static_cast<double>(layers - 1));
  return wishes;
}

/// The exact schedule: the wishes in whole numbers, which sum to min(total, all there is); no layer above its candidates.
inline std::vector<Index> pyramid_exact(Index total, double beta, const std::vector<Index>& candidates) {
  const Index all = std::accumulate(candidates.begin(), candidates.end(), Index{0});
  const Index most = candidates.empty() ? 0 : *std::max_element(candidates.begin(), candidates.end());
  if (candidates.empty() || total >= all) return candidates;
  return apportion(pyramid_wishes(count_of(candidates), static_cast<double>(total), beta, static_cast<double>(most)),
                   total, candidates, 0);
}

}  // namespace kvpare::oracle

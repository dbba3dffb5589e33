// ThinK: which channels of a head's keys matter to recent queries, and scores without the others.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>

#include "dense.hpp"

namespace kvpare::oracle {

/// score[j] = || Q[:, j] K[:, j]^T ||_F: every product of a query's number with a key's, squared, summed, rooted. queries
/// [rows, D] of one head, keys [tokens, D]
/// Source  ThinK, arXiv 2407.21018, equation of its criterion
inline std::vector<double> think_scores(const Array2& queries, const Array2& keys) {
  require(queries.columns == keys.columns, "oracle: as many channels in queries and keys");
  std::vector<double> scores;
  for (Index j = 0; j < keys.columns; ++j) {
    double sum = 0;
    for (Index i = 0; i < queries.rows; ++i)
      for (Index t = 0; t < keys.rows; ++t) {
        const double product = queries.at(i, j) * keys.at(t, j);
        sum += product * product;
      }
    scores.push_back(std::sqrt(sum));
  }
  return scores;
}

/// As released: mean over tokens of q_j^2, averaged over the group's query heads, times mean over tokens of k_j^2. queries
/// [rows, heads of the group, D]
inline std::vector<double> think_scores_as_released(const Array3& queries, const Array2& keys) {
  require(queries.c == keys.columns, "oracle: as many channels in queries and keys");
  std::vector<double> scores;
  for (Index j = 0; j < keys.columns; ++j) {
    double over_heads = 0, k = 0;
    for (Index h = 0; h < queries.b; ++h) {
      double q = 0;
      for (Index i = 0; i < queries.a; ++i) q += queries.at(i, h, j) * queries.at(i, h, j);
      over_heads += q / static_cast<double>(queries.a);
    }
    for (Index t = 0; t < keys.rows; ++t) k += keys.at(t, j) * keys.at(t, j);
    scores.push_back(over_heads / static_cast<double>(queries.b) * (k / static_cast<double>(keys.rows)));
  }
  return scores;
}

/// Channels left when the floor(percent / 100 * D) lowest go, rounded up to a multiple of `align`; ascending.
/// Uncertain  of equal scores: here the lower channel stays
inline std::vector<Index> think_kept(const std::vector<double>& scores, Index percent, Index align = 1) {
  const Index width = count_of(scores);
  Index kept = width - width * percent / 100;
  while (kept % align != 0 && kept < width) ++kept;
  std::vector<Index> channels(scores.size());
  std::iota(channels.begin(), channels.end(), Index{0});
  std::stable_sort(channels.begin(), channels.end(),
                   [&](Index a, Index b) { return item(scores, a) > item(scores, b); });
  channels.resize(static_cast<std::size_t>(kept));
  std::sort(channels.begin(), channels.end());
  return channels;
}

/// q[kept]·k[kept] of every key.
inline std::vector<double> thin_scores(const std::vector<double>& q, const Array2& keys,
                                       const std::vector<Index>& kept) {
  std::vector<double> scores;
  for (Index t = 0; t < keys.rows; ++t) {
    double sum = 0;
    for (const Index j : kept) sum += item(q, j) * keys.at(t, j);
    scores.push_back(sum);
  }
  return scores;
}

}  // namespace kvpare::oracle

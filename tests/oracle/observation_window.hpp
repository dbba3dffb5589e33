// SnapKV: the last rows of the prompt vote for the tokens before them.
#pragma once

#include <algorithm>

#include "causal_attention.hpp"
#include "reduce.hpp"
#include "select_top.hpp"

namespace kvpare::oracle {

enum class Pooling { none, average, max };

struct ObservationWindowSettings {
  Index window = 32;  // W, query rows that vote
  Index kernel = 5;   // odd, tokens
  Pooling pooling = Pooling::average;
};

/// vote[h, j] = sum over the last W rows of A[h, row, j], j < tokens - W; A the ordinary causal attention.
/// Shapes  queries [tokens, q_heads, width], keys [tokens, kv_heads, width] -> [q_heads, max(tokens - W, 0)]
inline Array2 window_votes(const Array3& queries, const Array3& keys, Index window, const AttentionSettings& how) {
  const Index tokens = keys.a, older = std::max<Index>(tokens - window, 0);
  Array2 votes(queries.b, older);
  for (Index h = 0; h < queries.b; ++h)
    for (Index row = older; row < tokens; ++row) {
      const std::vector<double> p = attention_row(queries, keys, h, row, how);
      for (Index j = 0; j < older; ++j) votes.at(h, j) += item(p, j);
    }
  return votes;
}

/// One-dimensional pooling, stride 1, kernel / 2 zeros at both ends; the average divides by `kernel` at the ends too.
inline std::vector<double> pool(const std::vector<double>& x, Index kernel, Pooling pooling) {
  require(kernel > 0 && kernel % 2 == 1, "oracle: kernel must be odd");
  if (pooling == Pooling::none) return x;
  std::vector<double> out;
  for (Index i = 0; i < count_of(x); ++i) {
    double sum = 0, largest = -infinity;
    for (Index j = i - kernel / 2; j <= i + kernel / 2; ++j) {
      const double v = j >= 0 && j < count_of(x) ? item(x, j) : 0.0;
      sum += v;
      largest = std::max(largest, v);
    }
    out.push_back(pooling == Pooling::average ? sum / static_cast<double>(kernel) : largest);
  }
  return out;
}

inline Array2 pool_rows(const Array2& x, Index kernel, Pooling pooling) {
  Array2 out(x.rows, x.columns);
  for (Index i = 0; i < x.rows; ++i) {
    const std::vector<double> row = pool(x.row(i), kernel, pooling);
    for (Index j = 0; j < x.columns; ++j) out.at(i, j) = item(row, j);
  }
  return out;
}

/// Votes, mean over the query group, then pooling. -> [kv_heads, tokens - W]
inline Array2 observation_window(const Array3& queries, const Array3& keys, const AttentionSettings& how,
                                 const ObservationWindowSettings& settings = {}) {
  const Array2 votes = window_votes(queries, keys, settings.window, how);
  return pool_rows(mean_per_kv_head(votes, keys.b), settings.kernel, settings.pooling);
}

/// Pooled votes of the older tokens, each times exp(weight * z): z the standard score of ln ||v|| among the older tokens of
/// its head, at most 8 either way, with a deviation of at least 0.001.
/// Shapes  votes [kv_heads, older], values [tokens, kv_heads, width]
inline Array2 raised_by_values(const Array2& votes, const Array3& values, double weight) {
  Array2 out = votes;
  for (Index h = 0; h < votes.rows; ++h) {
    std::vector<double> lengths;
    for (Index t = 0; t < votes.columns; ++t) {
      double squares = 0;
      for (Index c = 0; c < values.c; ++c) squares += values.at(t, h, c) * values.at(t, h, c);
      lengths.push_back(std::log(std::max(std::sqrt(squares), 1e-15)));
    }
    double mean = 0, variance = 0;
    for (const double x : lengths) mean += x / static_cast<double>(lengths.size());
    for (const double x : lengths) variance += (x - mean) * (x - mean) / static_cast<double>(lengths.size());
    const double deviation = std::max(std::sqrt(variance), 1e-3);
    for (Index t = 0; t < votes.columns; ++t)
      out.at(h, t) = votes.at(h, t) * std::exp(weight * std::clamp((item(lengths, t) - mean) / deviation, -8.0, 8.0));
  }
  return out;
}

/// Votes, mean over all query heads of the layer, then pooling. -> [tokens - W]
inline std::vector<double> observation_window_of_layer(const Array3& queries, const Array3& keys, const AttentionSettings& how,
                                                       const ObservationWindowSettings& settings = {}) {
  const Array2 votes = window_votes(queries, keys, settings.window, how);
  return pool(mean_of_layer(votes), settings.kernel, settings.pooling);
}

/// The capacity - W best of the older tokens and the last W, ascending; everything when tokens <= capacity.
/// `scores` are those of the older tokens. Needs capacity >= W.
/// Source  SnapKV, arXiv 2404.14469
inline std::vector<Index> observation_window_keep(const std::vector<double>& scores, Index tokens, Index window, Index capacity) {
  require(capacity >= window, "oracle: capacity must hold the window");
  const Index older = std::max<Index>(tokens - window, 0);
  require(count_of(scores) == older, "oracle: a score for each older token");
  std::vector<Index> kept = select_top(scores, capacity - window);  // all of them when tokens <= capacity
  for (Index j = older; j < tokens; ++j) kept.push_back(j);
  return kept;
}

}  // namespace kvpare::oracle

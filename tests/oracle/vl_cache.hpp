// VL-Cache: the rows after the image say how dense a layer is and which tokens of the prompt stay.
#pragma once

#include <algorithm>
#include <cmath>

#include "causal_attention.hpp"
#include "strength_skewness.hpp"

namespace kvpare::oracle {

struct RowRange {
  Index first = 0, count = 0;
};

/// The rows that are asked: those after the last visual token, of these the newest `max_rows` when max_rows > 0.
/// Without any, or without a visual token, the last min(fallback, tokens) rows, however large max_rows is.
/// Shapes  visual [tokens]
inline RowRange post_vision_rows(const std::vector<bool>& visual, Index max_rows, Index fallback) {
  const Index tokens = count_of(visual);
  Index last_visual = -1;
  for (Index j = 0; j < tokens; ++j)
    if (item(visual, j)) last_visual = j;
  Index count = tokens - 1 - last_visual;
  if (last_visual < 0 || count == 0)
    count = std::min(fallback, tokens);
  else if (max_rows > 0)
    count = std::min(count, max_rows);
  return {tokens - count, count};
}

struct VlCacheScores {
  Array2 scores;       // [q_heads, tokens]
  double density = 0;  // d = 1 - sparsity, 0 without rows
};

/// scores[h, j] = sum over the rows from `first_row` of A[h, row, j], for all tokens j.
/// density = mean over query heads of (entries with A[h, row, j] >= p max_j A[h, row, j]) / (causal entries).
/// The causal entries of a row are row + 1: what a sliding window hides is among them and never counts as dense.
/// Shapes  queries [tokens, q_heads, width], keys [tokens, kv_heads, width]
/// Source  VL-Cache, arXiv 2410.23317
inline VlCacheScores vl_cache_scores(const Array3& queries, const Array3& keys, const AttentionSettings& how,
                                     Index first_row, double p = 0.01) {
  require(queries.a == keys.a, "oracle: a query for each token");
  AttentionSettings without_window = how;
  without_window.window = 0;
  VlCacheScores out{Array2(queries.b, keys.a), 0};
  for (Index h = 0; h < queries.b; ++h) {
    Index dense = 0, causal = 0;
    for (Index row = first_row; row < queries.a; ++row) {
      const std::vector<double> a = attention_row(queries, keys, h, row, how);
      const double most = *std::max_element(a.begin(), a.end());
      for (Index j = 0; j < keys.a; ++j) {
        out.scores.at(h, j) += item(a, j);
        if (sees(without_window, row, j)) ++causal;
        if (sees(how, row, j) && item(a, j) >= p * most) ++dense;
      }
    }
    if (causal > 0)
      out.density += static_cast<double>(dense) / static_cast<double>(causal) / static_cast<double>(queries.b);
  }
  return out;
}

/// Layers wish for d_l / sum d * total, each at least max(1, floor(least * the most any layer has)) and at most what it
/// has; whole numbers that sum to min(total, all there is). If the total does not cover the least of all layers, there
/// is none. (A product within 1e-9 of a whole number counts as there.)
/// Shapes  densities, available [layers] -> tokens per layer
inline std::vector<Index> vl_cache_budgets(const std::vector<double>& densities, const std::vector<Index>& available,
                                           Index total, double least = 0.01) {
  const Index most = available.empty() ? 0 : *std::max_element(available.begin(), available.end());
  const auto lowest = static_cast<Index>(std::floor(least * static_cast<double>(most) + 1e-9));
  return apportion(densities, total, available, std::max<Index>(1, lowest));
}

struct VlCacheBudgets {
  Index window = 0;         // newest tokens, in every layer
  std::vector<Index> best;  // tokens beside them, per layer
};

/// Without a mended sum: layer l keeps max(1, int(m clip((1 - recent) alpha L d_l / sum d, (1 - recent) least, 1))) beside
/// max(1, int(recent alpha m)) newest ones, alpha = total / (L m).
/// Source  EffiVLM-Bench's VL-Cache with one window for all layers, where recent = 0.1
inline VlCacheBudgets vl_cache_reference(const std::vector<double>& densities, Index tokens, Index total, double recent,
                                         double least = 0.01) {
  const double layers = static_cast<double>(densities.size()), m = static_cast<double>(tokens),
               alpha = static_cast<double>(total) / (layers * m);
  double all = 0;
  for (const double d : densities) all += d;
  VlCacheBudgets out{std::max<Index>(1, static_cast<Index>(std::floor(recent * static_cast<double>(total) / layers))),
                     {}};
  for (const double d : densities) {
    const double beta = std::clamp(d / all * alpha * (1 - recent) * layers, least * (1 - recent), 1.0);
    out.best.push_back(std::max<Index>(1, static_cast<Index>(std::floor(beta * m))));
  }
  return out;
}

}  // namespace kvpare::oracle

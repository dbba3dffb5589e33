// Ada-KV: the heads of a layer share its budget; a head whose tokens matter more keeps more of them.
#pragma once

#include <algorithm>
#include <cmath>

#include "select_top.hpp"
#include "strength_skewness.hpp"

namespace kvpare::oracle {

/// c_h = how many of the layer's `count` best scores are of head h; equal scores: the lower head, then the lower token.
/// `candidates` empty: every token is one. scores [kv_heads, tokens] -> [kv_heads]
inline std::vector<Index> hits_per_head(const Array2& scores, Index count,
                                        const std::vector<std::vector<bool>>& candidates = {}) {
  std::vector<double> flat;
  std::vector<bool> takes_part;
  for (Index h = 0; h < scores.rows; ++h)
    for (Index j = 0; j < scores.columns; ++j) {
      flat.push_back(scores.at(h, j));
      takes_part.push_back(candidates.empty() || item(item(candidates, h), j));
    }
  std::vector<Index> hits(static_cast<std::size_t>(scores.rows), 0);
  for (const Index i : select_top(flat, count, takes_part)) ++item(hits, i / scores.columns);
  return hits;
}

/// b_h = round(c_h (1 - f) + floor(B f)), halves to even; may miss the total.
/// Source  Ada-KV, arXiv 2407.11550
inline std::vector<Index> ada_kv_published(const std::vector<Index>& hits, Index per_head, double floor_share) {
  const double reserved = std::floor(static_cast<double>(per_head) * floor_share);
  std::vector<Index> budgets;
  for (const Index c : hits)
    budgets.push_back(static_cast<Index>(std::nearbyint(static_cast<double>(c) * (1 - floor_share) + reserved)));
  return budgets;
}

/// The same without loss: c_h (1 - f) + B f, apportioned to exactly min(H B, all candidates), no head above its own.
inline std::vector<Index> ada_kv_exact(const std::vector<Index>& hits, Index per_head, double floor_share,
                                       const std::vector<Index>& candidates) {
  std::vector<double> wishes;
  for (const Index c : hits)
    wishes.push_back(static_cast<double>(c) * (1 - floor_share) + static_cast<double>(per_head) * floor_share);
  return apportion(wishes, per_head * count_of(hits), candidates, 0);
}

/// Each head's own best, ascending. -> [kv_heads][kept tokens]
inline std::vector<std::vector<Index>> keep_per_head(const Array2& scores, const std::vector<Index>& budgets) {
  std::vector<std::vector<Index>> kept;
  for (Index h = 0; h < scores.rows; ++h) kept.push_back(select_top(scores.row(h), item(budgets, h)));
  return kept;
}

}  // namespace kvpare::oracle

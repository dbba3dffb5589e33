// H2O: keep the newest tokens and those that have gathered most attention so far.
#pragma once

#include "causal_attention.hpp"
#include "reduce.hpp"
#include "select_top.hpp"

namespace kvpare::oracle {

/// acc[j] = sum over rows of A[row, j]; row i has entries for the tokens it knows.
inline std::vector<double> column_sums(const std::vector<std::vector<double>>& rows) {
  std::vector<double> acc;
  for (const auto& row : rows) {
    if (row.size() > acc.size()) acc.resize(row.size(), 0.0);
    for (Index j = 0; j < count_of(row); ++j) item(acc, j) += item(row, j);
  }
  return acc;
}

/// acc[h, j] over all rows of the prompt's causal attention.
/// Shapes  queries [tokens, q_heads, width], keys [tokens, kv_heads, width] -> [q_heads, tokens]
inline Array2 accumulated_attention(const Array3& queries, const Array3& keys, const AttentionSettings& how) {
  Array2 acc(queries.b, keys.a);
  for (Index h = 0; h < queries.b; ++h)
    for (Index row = 0; row < queries.a; ++row) {
      const std::vector<double> p = attention_row(queries, keys, h, row, how);
      for (Index j = 0; j < keys.a; ++j) acc.at(h, j) += item(p, j);
    }
  return acc;
}

/// The `recent` newest and the `heavy` best of the older ones, ascending; everything when it fits.
inline std::vector<Index> heavy_and_recent(const std::vector<double>& acc, Index heavy, Index recent) {
  const Index tokens = count_of(acc), older = std::max<Index>(tokens - recent, 0);
  std::vector<bool> candidate(acc.size(), false);
  for (Index j = 0; j < older; ++j) item(candidate, j) = true;
  std::vector<Index> kept = acc.empty() ? std::vector<Index>{} : select_top(acc, heavy, candidate);
  for (Index j = older; j < tokens; ++j) kept.push_back(j);
  return kept;
}

/// What one head still holds.
struct HeavyHitters {
  std::vector<Index> positions;
  std::vector<double> acc;
};

/// Drops what `heavy_and_recent` does not keep; acc is compacted with the positions.
inline void evict(HeavyHitters& held, Index heavy, Index recent) {
  HeavyHitters kept;
  for (Index j : heavy_and_recent(held.acc, heavy, recent)) {
    kept.positions.push_back(item(held.positions, j));
    kept.acc.push_back(item(held.acc, j));
  }
  held = kept;
}

/// One decode step without its eviction: the new token joins, its attention row over everything held adds up.
/// Shapes  row [held + 1], the new token last
inline void add_decode_row(HeavyHitters& held, Index position, const std::vector<double>& row) {
  require(row.size() == held.positions.size() + 1, "oracle: a decode row covers what is held and the new token");
  held.positions.push_back(position);
  held.acc.push_back(0.0);
  for (Index j = 0; j < count_of(row); ++j) item(held.acc, j) += item(row, j);
}

/// A decode step as H2O does it: add the row, then evict.
/// Source  H2O, arXiv 2306.14048
inline void decode_step(HeavyHitters& held, Index position, const std::vector<double>& row, Index heavy, Index recent) {
  add_decode_row(held, position, row);
  evict(held, heavy, recent);
}

}  // namespace kvpare::oracle

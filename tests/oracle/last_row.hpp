// TOVA: what the newest token attends to least goes.
#pragma once

#include "causal_attention.hpp"
#include "reduce.hpp"
#include "select_top.hpp"

namespace kvpare::oracle {

/// A[h, last, j], attention of the last row of the prompt. -> [q_heads, tokens]
inline Array2 last_attention_row(const Array3& queries, const Array3& keys, const AttentionSettings& how) {
  require(queries.a == keys.a && keys.a > 0, "oracle: a query for each token");
  Array2 rows(queries.b, keys.a);
  for (Index h = 0; h < queries.b; ++h) {
    const std::vector<double> p = attention_row(queries, keys, h, queries.a - 1, how);
    for (Index j = 0; j < keys.a; ++j) rows.at(h, j) = item(p, j);
  }
  return rows;
}

/// score[h, j] = mean over the query heads of kv head h of A[., last, j].
/// Shapes  queries [tokens, q_heads, width], keys [tokens, kv_heads, width] -> [kv_heads, tokens]
inline Array2 last_row(const Array3& queries, const Array3& keys, const AttentionSettings& how) {
  return mean_per_kv_head(last_attention_row(queries, keys, how), keys.b);
}

/// The same, mean over all query heads of the layer: what TOVA chooses by, once for the layer. -> [tokens]
/// Source  TOVA, arXiv 2401.06104
inline std::vector<double> last_row_of_layer(const Array3& queries, const Array3& keys, const AttentionSettings& how) {
  return mean_of_layer(last_attention_row(queries, keys, how));
}

}  // namespace kvpare::oracle

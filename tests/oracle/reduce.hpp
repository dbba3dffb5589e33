// Row summaries: `statistics` of each row, and the mean over heads.
#pragma once

#include "statistics.hpp"

namespace kvpare::oracle {

/// One Statistics per row; rows may differ in length.
inline std::vector<Statistics> reduce(const std::vector<std::vector<double>>& rows, Nan nan = Nan::propagate) {
  std::vector<Statistics> out;
  for (const auto& row : rows) out.push_back(statistics(row, nan));
  return out;
}

inline std::vector<Statistics> reduce(const Array2& rows, Nan nan = Nan::propagate) {
  std::vector<Statistics> out;
  for (Index i = 0; i < rows.rows; ++i) out.push_back(statistics(rows.row(i), nan));
  return out;
}

/// Mean over the query heads of each kv head. [q_heads, n] -> [kv_heads, n]
inline Array2 mean_per_kv_head(const Array2& x, Index kv_heads) {
  require(kv_heads > 0 && x.rows % kv_heads == 0, "oracle: q_heads must be a multiple of kv_heads");
  const Index group = x.rows / kv_heads;
  Array2 out(kv_heads, x.columns);
  for (Index h = 0; h < x.rows; ++h)
    for (Index j = 0; j < x.columns; ++j) out.at(h / group, j) += x.at(h, j) / static_cast<double>(group);
  return out;
}

/// Mean over all heads of the layer. [heads, n] -> [n]
inline std::vector<double> mean_of_layer(const Array2& x) { return mean_per_kv_head(x, 1).row(0); }

}  // namespace kvpare::oracle

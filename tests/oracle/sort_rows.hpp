// Descending order of a row, with its running sum.
#pragma once

#include <algorithm>
#include <cmath>

#include "dense.hpp"

namespace kvpare::oracle {

struct SortedRow {
  std::vector<Index> order;         // index in the row, best first
  std::vector<double> values;       // row[order[i]]
  std::vector<double> running_sum;  // values[0] + ... + values[i]
};

/// a before b: larger first, NaN after every number, equals (and two NaN) by the lower index.
inline bool ranks_before(const std::vector<double>& row, Index a, Index b) {
  const double x = item(row, a), y = item(row, b);
  if (std::isnan(x) != std::isnan(y)) return std::isnan(y);
  if (!std::isnan(x) && x != y) return x > y;
  return a < b;
}

inline SortedRow sort_row(const std::vector<double>& row) {
  SortedRow out;
  for (Index i = 0; i < count_of(row); ++i) out.order.push_back(i);
  std::sort(out.order.begin(), out.order.end(), [&](Index a, Index b) { return ranks_before(row, a, b); });
  double sum = 0;
  for (Index i : out.order) {
    out.values.push_back(item(row, i));
    out.running_sum.push_back(sum += item(row, i));
  }
  return out;
}

inline std::vector<SortedRow> sort_rows(const std::vector<std::vector<double>>& rows) {
  std::vector<SortedRow> out;
  for (const auto& row : rows) out.push_back(sort_row(row));
  return out;
}

}  // namespace kvpare::oracle

// Dense arrays of the oracles: row-major, bounds-checked, with their own indexing on purpose.
// If an oracle read through the library's views, a wrong stride would be wrong on both sides.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace kvpare::oracle {

using Index = std::int64_t;

/// Position of element (i, j, k) in a row-major array of shape [a, b, c]; out of range throws.
inline std::size_t dense_offset(Index i, Index a, Index j, Index b, Index k, Index c) {
  if (i < 0 || i >= a || j < 0 || j >= b || k < 0 || k >= c) throw std::out_of_range("oracle: index outside the array");
  return static_cast<std::size_t>((i * b + j) * c + k);
}

/// Doubles of shape [rows, columns].
struct Array2 {
  Index rows = 0, columns = 0;
  std::vector<double> values;

  Array2() = default;
  Array2(Index rows_, Index columns_, double fill = 0)
      : rows(rows_), columns(columns_), values(static_cast<std::size_t>(rows_ * columns_), fill) {}

  double& at(Index i, Index j) { return values[dense_offset(0, 1, i, rows, j, columns)]; }
  double at(Index i, Index j) const { return values[dense_offset(0, 1, i, rows, j, columns)]; }

  std::vector<double> row(Index i) const {
    std::vector<double> out;
    for (Index j = 0; j < columns; ++j) out.push_back(at(i, j));
    return out;
  }
};

/// Doubles of shape [a, b, c], for example queries [rows, q_heads, key_width] or keys [tokens, kv_heads, key_width].
struct Array3 {
  Index a = 0, b = 0, c = 0;
  std::vector<double> values;

  Array3() = default;
  Array3(Index a_, Index b_, Index c_, double fill = 0)
      : a(a_), b(b_), c(c_), values(static_cast<std::size_t>(a_ * b_ * c_), fill) {}

  double& at(Index i, Index j, Index k) { return values[dense_offset(i, a, j, b, k, c)]; }
  double at(Index i, Index j, Index k) const { return values[dense_offset(i, a, j, b, k, c)]; }
};

/// Number of elements, signed.
template <class T>
Index count_of(const std::vector<T>& v) {
  return static_cast<Index>(v.size());
}

/// Bounds-checked element by signed index.
template <class T>
typename std::vector<T>::const_reference item(const std::vector<T>& v, Index i) {
  return v.at(static_cast<std::size_t>(i));
}
template <class T>
typename std::vector<T>::reference item(std::vector<T>& v, Index i) {
  return v.at(static_cast<std::size_t>(i));
}

/// Says what an oracle was given wrongly.
inline void require(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

/// y = M x
inline std::vector<double> times(const Array2& matrix, const std::vector<double>& x) {
  require(matrix.columns == count_of(x), "oracle: a matrix that fits the row");
  std::vector<double> y;
  for (Index i = 0; i < matrix.rows; ++i) {
    double sum = 0;
    for (Index j = 0; j < matrix.columns; ++j) sum += matrix.at(i, j) * item(x, j);
    y.push_back(sum);
  }
  return y;
}
inline Array2 transposed(const Array2& matrix) {
  Array2 out(matrix.columns, matrix.rows);
  for (Index i = 0; i < matrix.rows; ++i)
    for (Index j = 0; j < matrix.columns; ++j) out.at(j, i) = matrix.at(i, j);
  return out;
}
inline Array2 times(const Array2& a, const Array2& b) {
  require(a.columns == b.rows, "oracle: matrices that fit");
  Array2 c(a.rows, b.columns);
  for (Index i = 0; i < c.rows; ++i)
    for (Index j = 0; j < c.columns; ++j)
      for (Index k = 0; k < a.columns; ++k) c.at(i, j) += a.at(i, k) * b.at(k, j);
  return c;
}

}  // namespace kvpare::oracle

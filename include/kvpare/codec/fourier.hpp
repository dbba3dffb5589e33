// The Fourier transform of real rows, as an orthogonal matrix: half of the spectrum, in which nothing is said twice.
#pragma once

#include <cmath>

#include "../core/config.hpp"

namespace kvpare::detail {

/// cos(2 pi j / m), exact to the last bits of a double.
constexpr double cos_of_turn(Index j, Index m) {
  j = (j % m + m) % m;
  if (2 * j > m) j = m - j;                              // the upper half turn mirrors the lower one
  if (4 * j > m) return -cos_of_turn(m - 2 * j, 2 * m);  // cos(pi - x) = -cos x
  const bool swap = 8 * j > m;                           // cos x = sin(pi / 2 - x)
  const double x =
      6.283185307179586476925 * static_cast<double>(swap ? m - 4 * j : j) / static_cast<double>(swap ? 4 * m : m);
  double term = swap ? x : 1.0, sum = term;
  for (int n = swap ? 2 : 1; n < 24; n += 2) {
    term *= -x * x / static_cast<double>(n * (n + 1));
    sum += term;
  }
  return sum;
}
constexpr double sin_of_turn(Index j, Index m) { return cos_of_turn(4 * j - m, 4 * m); }

/// Cosines and sines of a size that is known. Columns are whole vectors, zeros behind.
template <Index m>
struct FourierTable {
  static constexpr Index half = m / 2, cosines = round_up(half + 1, 4), sines = round_up(half - 1, 4);
  float cosine[half + 1][cosines] = {};  // cos(2 pi n k / m), n and k in 0 … m / 2
  float sine[half - 1][sines] = {};      // sin(2 pi n k / m), n and k in 1 … m / 2 - 1

  constexpr FourierTable() {
    float turn[m] = {};
    for (Index j = 0; j < m; ++j) turn[j] = static_cast<float>(cos_of_turn(j, m));
    for (Index n = 0; n <= half; ++n)
      for (Index k = 0; k <= half; ++k) cosine[n][k] = turn[n * k % m];
    for (Index j = 0; j < m; ++j) turn[j] = static_cast<float>(sin_of_turn(j, m));
    for (Index n = 1; n < half; ++n)
      for (Index k = 1; k < half; ++k) sine[n - 1][k - 1] = turn[n * k % m];
  }
  void even(const float* x, float* y) const { product<cosines>(half + 1, cosine, x, y); }
  void odd(const float* x, float* y) const { product<sines>(half - 1, sine, x, y); }

 private:
  template <Index columns>
  static void product(Index n, const float (*table)[columns], const float* x, float* y) {
    float sum[columns] = {};
    for (Index i = 0; i < n; ++i)
      for (Index k = 0; k < columns; ++k) sum[k] += x[i] * table[i][k];
    for (Index k = 0; k < n; ++k) y[k] = sum[k];
  }
};
template <Index m>
inline constexpr FourierTable<m> fourier_table{};

/// The same of any even size up to `largest`, made anew each time: several times as slow.
template <Index largest>
struct AnyFourierTable {
  Index m;
  float cosine[largest], sine[largest];

  explicit AnyFourierTable(Index size) : m(size) {
    for (Index j = 0; j < m; ++j) {
      cosine[j] = static_cast<float>(cos_of_turn(j, m));
      sine[j] = static_cast<float>(sin_of_turn(j, m));
    }
  }
  void even(const float* x, float* y) const { product(0, m / 2 + 1, cosine, x, y); }
  void odd(const float* x, float* y) const { product(1, m / 2 - 1, sine, x, y); }

 private:
  void product(Index first, Index count, const float* turn, const float* x, float* y) const {
    for (Index k = 0; k < count; ++k) {
      float sum = 0;
      for (Index n = 0; n < count; ++n) sum += x[n] * turn[(n + first) * (k + first) % m];
      y[k] = sum;
    }
  }
};

/// Calls f(table) for rows of m numbers: sizes that halves and quarters of usual heads have are compiled in.
template <Index largest, class F>
void with_fourier_table(Index m, const F& f) {
  switch (m) {
    case 16:
      return f(fourier_table<16>);
    case 20:
      return f(fourier_table<20>);
    case 24:
      return f(fourier_table<24>);
    case 32:
      return f(fourier_table<32>);
    case 40:
      return f(fourier_table<40>);
    case 48:
      return f(fourier_table<48>);
    case 64:
      return f(fourier_table<64>);
    case 128:
      return f(fourier_table<128>);
    default:
      return f(AnyFourierTable<largest>(m));
  }
}

/// x [m] becomes its spectrum X_k = Σ_n x_n e^(-2 pi i n k / m), times √(1 / m) for k = 0 and m / 2, √(2 / m) for the others:
///
///   Re X_0, Re X_1, …, Re X_{m/2}, Im X_1, …, Im X_{m/2-1}
///
/// These are products with m orthonormal rows, so lengths and products stay, and the transpose is the way back.
/// Size  m even, 2 … largest
/// Sums  of floats: relative 2^-20 of the row's length; compilers that contract a * b + c may give other last bits
template <Index largest>
void real_fourier(float* x, Index m) {
  const Index half = m / 2;
  float even[largest / 2 + 1], odd[largest / 2 + 1];
  even[0] = x[0], even[half] = x[half];
  for (Index n = 1; n < half; ++n) even[n] = x[n] + x[m - n], odd[n - 1] = x[n] - x[m - n];
  with_fourier_table<largest>(m, [&](const auto& table) {
    table.even(even, x);
    table.odd(odd, x + half + 1);
  });
  const float inner = std::sqrt(2.0f / static_cast<float>(m)), outer = std::sqrt(1.0f / static_cast<float>(m));
  for (Index k = 1; k < half; ++k) x[k] *= inner;
  x[0] *= outer, x[half] *= outer;
  for (Index k = half + 1; k < m; ++k) x[k] *= -inner;
}

/// The inverse of real_fourier.
template <Index largest>
void real_fourier_back(float* x, Index m) {
  const Index half = m / 2;
  const float inner = std::sqrt(2.0f / static_cast<float>(m)), outer = std::sqrt(1.0f / static_cast<float>(m));
  float even[largest / 2 + 1], odd[largest / 2 + 1];
  for (Index k = 1; k < half; ++k) x[k] *= inner;
  x[0] *= outer, x[half] *= outer;
  for (Index k = half + 1; k < m; ++k) x[k] *= -inner;
  with_fourier_table<largest>(m, [&](const auto& table) {
    table.even(x, even);
    table.odd(x + half + 1, odd);
  });
  x[0] = even[0], x[half] = even[half];
  for (Index n = 1; n < half; ++n) x[n] = even[n] + odd[n - 1], x[m - n] = even[n] - odd[n - 1];
}

}  // namespace kvpare::detail

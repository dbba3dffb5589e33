// VidKV's keys as the paper tells them: the Fourier transform of every token's normal channels, all of its complex numbers
// viewed as twice as many real rows, one bit each, and back.
#pragma once

#include <algorithm>
#include <cmath>
#include <complex>
#include <numbers>
#include <numeric>

#include "quantisers.hpp"

namespace kvpare::oracle {

/// The int(percent / 100 * D) channels of widest max - min over all tokens and kv heads, as flags. keys [tokens, heads, D]
/// Uncertain  of equal ranges: here the lower channel is abnormal
inline std::vector<bool> abnormal_channels(const Array3& keys, Index percent) {
  std::vector<double> range;
  for (Index c = 0; c < keys.c; ++c) {
    double low = keys.at(0, 0, c), high = low;
    for (Index t = 0; t < keys.a; ++t)
      for (Index h = 0; h < keys.b; ++h) low = std::min(low, keys.at(t, h, c)), high = std::max(high, keys.at(t, h, c));
    range.push_back(high - low);
  }
  std::vector<Index> order(range.size());
  std::iota(order.begin(), order.end(), Index{0});
  std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) { return item(range, a) > item(range, b); });
  std::vector<bool> abnormal(range.size(), false);
  for (Index i = 0; i < keys.c * percent / 100; ++i) abnormal[static_cast<std::size_t>(item(order, i))] = true;
  return abnormal;
}

using Complexes = std::vector<std::complex<double>>;

inline std::complex<double> on_circle(Index turns, Index of, double sign) {
  const double angle = sign * 2 * std::numbers::pi * static_cast<double>(turns % of) / static_cast<double>(of);
  return {std::cos(angle), std::sin(angle)};
}
/// Y_k = Σ_n y_n e^(-2 pi i n k / m)
inline Complexes fourier(const Complexes& y) {
  const Index m = count_of(y);
  Complexes out(y.size());
  for (Index k = 0; k < m; ++k)
    for (Index n = 0; n < m; ++n)
      out[static_cast<std::size_t>(k)] += y[static_cast<std::size_t>(n)] * on_circle(n * k, m, -1);
  return out;
}
/// y_n = 1/m Σ_k Y_k e^(2 pi i n k / m)
inline Complexes inverse_fourier(const Complexes& spectrum) {
  const Index m = count_of(spectrum);
  Complexes out(spectrum.size());
  for (Index n = 0; n < m; ++n) {
    for (Index k = 0; k < m; ++k)
      out[static_cast<std::size_t>(n)] += spectrum[static_cast<std::size_t>(k)] * on_circle(n * k, m, 1);
    out[static_cast<std::size_t>(n)] /= static_cast<double>(m);
  }
  return out;
}

enum class BitDecode : std::uint8_t { symmetric, literal };

/// One group of one row: s = mean|x|, bit = [x >= 0]; -s and s, or 0 and s.
inline std::vector<double> one_bit(const std::vector<double>& x, BitDecode how) {
  double s = 0;
  for (const double v : x) s += std::abs(v) / static_cast<double>(x.size());
  std::vector<double> out;
  for (const double v : x) out.push_back(v >= 0 ? s : how == BitDecode::literal ? 0.0 : -s);
  return out;
}
/// Rows [tokens, D] of one head coded and decoded: along tokens, in groups. Abnormal channels by KIVI's 2 bits, scale and
/// minimum as halves; the scales of single bits exact.
inline Array2 vid_kv_keys(const Array2& rows, const std::vector<bool>& abnormal, Index group, BitDecode how,
                          bool with_fourier) {
  Array2 out(rows.rows, rows.columns);
  std::vector<Index> normal;
  for (Index c = 0; c < rows.columns; ++c)
    if (!abnormal[static_cast<std::size_t>(c)]) normal.push_back(c);
  // What the normal channels are coded as: their numbers, or real and imaginary parts, a row of this per token.
  const Index m = count_of(normal), parts = with_fourier ? 2 * m : m;
  Array2 coded(rows.rows, parts);
  for (Index t = 0; t < rows.rows; ++t) {
    Complexes y;
    for (const Index c : normal) y.push_back(rows.at(t, c));
    if (with_fourier) y = fourier(y);
    for (Index k = 0; k < m; ++k) {
      coded.at(t, k) = y[static_cast<std::size_t>(k)].real();
      if (with_fourier) coded.at(t, m + k) = y[static_cast<std::size_t>(k)].imag();
    }
  }
  for (Index first = 0; first < rows.rows; first += group) {
    const Index end = std::min(first + group, rows.rows);
    const auto column = [&](const Array2& of, Index c) {
      std::vector<double> x;
      for (Index t = first; t < end; ++t) x.push_back(of.at(t, c));
      return x;
    };
    for (Index c = 0; c < rows.columns; ++c) {
      if (!abnormal[static_cast<std::size_t>(c)]) continue;
      const auto x = affine(column(rows, c), {.bits = 2}).values();
      for (Index t = first; t < end; ++t) out.at(t, c) = item(x, t - first);
    }
    for (Index k = 0; k < parts; ++k) {
      const auto x = one_bit(column(coded, k), how);
      for (Index t = first; t < end; ++t) coded.at(t, k) = item(x, t - first);
    }
  }
  for (Index t = 0; t < rows.rows; ++t) {
    Complexes y;
    for (Index k = 0; k < m; ++k) y.emplace_back(coded.at(t, k), with_fourier ? coded.at(t, m + k) : 0.0);
    if (with_fourier) y = inverse_fourier(y);
    for (Index k = 0; k < m; ++k) out.at(t, item(normal, k)) = y[static_cast<std::size_t>(k)].real();
  }
  return out;
}

}  // namespace kvpare::oracle

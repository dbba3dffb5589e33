// KVQuant as its description tells it: ranges, nearest entries, outliers, k-means, Q-Norm and rotation, in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

namespace kvpare::oracle {

struct NuqNumber {
  int code = 0;
  double delta = 0;  // 0: no outlier
};

/// The entry nearest to x, first wins.
inline int nearest_entry(const std::vector<double>& levels, double x) {
  int best = 0;
  for (int i = 1; i < static_cast<int>(levels.size()); ++i)
    if (std::abs(levels[static_cast<std::size_t>(i)] - x) < std::abs(levels[static_cast<std::size_t>(best)] - x))
      best = i;
  return best;
}

/// A key at a channel whose numbers lie in [lower, upper].
inline NuqNumber nuq_key(const std::vector<double>& levels, double lower, double upper, double x) {
  const double middle = (upper + lower) / 2, range = (upper - lower) / 2;
  NuqNumber n;
  n.code = nearest_entry(levels, (x - middle) / range);
  if (x < lower || x > upper) n.delta = x - (levels[static_cast<std::size_t>(n.code)] * range + middle);
  return n;
}

/// A token of values: the (listed + 1)th numbers from either end are its range, those beyond are outliers.
inline std::vector<double> nuq_value_row(const std::vector<double>& levels, std::size_t listed,
                                         const std::vector<double>& row) {
  std::vector<double> sorted = row;
  std::sort(sorted.begin(), sorted.end());
  const double lower = sorted[listed], upper = sorted[sorted.size() - 1 - listed];
  const double middle = (upper + lower) / 2, range = (upper - lower) / 2;
  std::vector<double> out;
  for (const double x : row) {
    const int code = nearest_entry(levels, range > 0 ? (x - middle) / range : 0);
    out.push_back(x < lower || x > upper ? x : levels[static_cast<std::size_t>(code)] * range + middle);
  }
  return out;
}

/// The quantile q, linear between neighbours.
inline double quantile(std::vector<double> x, double q) {
  std::sort(x.begin(), x.end());
  const double at = q * static_cast<double>(x.size() - 1);
  const auto low = static_cast<std::size_t>(at);
  const double high = low + 1 < x.size() ? x[low + 1] : x[low];
  return x[low] + (high - x[low]) * (at - std::floor(at));
}

/// Lloyd's steps from given centres, weighted.
inline std::vector<double> k_means(const std::vector<double>& x, const std::vector<double>& weights,
                                   std::vector<double> centres, int iterations) {
  for (int i = 0; i < iterations; ++i) {
    std::vector<double> sum(centres.size()), weight(centres.size());
    for (std::size_t n = 0; n < x.size(); ++n) {
      const auto k = static_cast<std::size_t>(nearest_entry(centres, x[n]));
      sum[k] += weights[n] * x[n], weight[k] += weights[n];
    }
    for (std::size_t k = 0; k < centres.size(); ++k)
      if (weight[k] > 0) centres[k] = sum[k] / weight[k];
  }
  return centres;
}

/// Rotation of pairs (c, c + pairs), or (2c, 2c + 1), by position times frequency.
inline std::vector<double> rotated(std::vector<double> row, const std::vector<double>& frequencies, bool interleaved,
                                   double position) {
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    const std::size_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : i + frequencies.size();
    const double angle = position * frequencies[i], x = row[a], y = row[b];
    row[a] = x * std::cos(angle) - y * std::sin(angle);
    row[b] = x * std::sin(angle) + y * std::cos(angle);
  }
  return row;
}

}  // namespace kvpare::oracle

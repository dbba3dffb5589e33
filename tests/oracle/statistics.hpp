// Summaries of a list of numbers, and of Q, K or V over tokens or channels.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "dense.hpp"

namespace kvpare::oracle {

/// NaN in sum, mean and moments: `propagate` as arithmetic does, or `skip` as if it were not there.
enum class Nan { propagate, skip };

/// min, max and argmax never choose a NaN unless there is nothing else (then NaN and index -1), nor does an empty list.
struct Statistics {
  double sum = 0;
  double min = std::numeric_limits<double>::quiet_NaN();
  double max = std::numeric_limits<double>::quiet_NaN();
  Index argmax = -1;  // lowest index of the largest
  double mean = std::numeric_limits<double>::quiet_NaN();
  double moment2 = std::numeric_limits<double>::quiet_NaN();  // mean of (x - mean)^2
  double moment3 = std::numeric_limits<double>::quiet_NaN();  // mean of (x - mean)^3
  double moment4 = std::numeric_limits<double>::quiet_NaN();  // mean of (x - mean)^4
  Index nans = 0;
  Index counted = 0;  // numbers behind mean and moments
};

inline Statistics statistics(const std::vector<double>& x, Nan nan = Nan::propagate) {
  Statistics s;
  std::vector<double> used;
  for (Index i = 0; i < count_of(x); ++i) {
    const double v = item(x, i);
    if (std::isnan(v)) {
      ++s.nans;
    } else {
      if (s.argmax < 0 || v > s.max) s.max = v, s.argmax = i;
      if (std::isnan(s.min) || v < s.min) s.min = v;
    }
    if (!std::isnan(v) || nan == Nan::propagate) used.push_back(v);
  }
  s.counted = count_of(used);
  for (double v : used) s.sum += v;
  if (used.empty()) return s;
  const auto n = static_cast<double>(used.size());
  s.mean = s.sum / n;
  s.moment2 = s.moment3 = s.moment4 = 0;
  for (double v : used) {
    const double d = v - s.mean;
    s.moment2 += d * d / n;
    s.moment3 += d * d * d / n;
    s.moment4 += d * d * d * d / n;
  }
  return s;
}

/// Bias-adjusted skewness: n / ((n-1)(n-2)) * sum ((x - mean) / sigma)^3, sigma the *sample* deviation (n-1).
/// Fewer than three numbers, or all equal: 0.
/// Source  AirCache step 6
inline double adjusted_skewness(const std::vector<double>& x) {
  if (count_of(x) < 3 || std::all_of(x.begin(), x.end(), [&](double v) { return v == x.front(); })) return 0;
  const auto n = static_cast<double>(x.size());
  double mean = 0, squares = 0, cubes = 0;
  for (double v : x) mean += v / n;
  for (double v : x) squares += (v - mean) * (v - mean);
  const double sigma = std::sqrt(squares / (n - 1));
  for (double v : x) cubes += std::pow((v - mean) / sigma, 3);
  return n / ((n - 1) * (n - 2)) * cubes;
}

/// min, max, sum and sum of squares along one axis. Nothing chosen: sums 0, min +infinity, max -infinity.
struct Spread {
  Array2 min, max, sum, sum_of_squares;
};

/// Over the chosen tokens, per (head, channel). x [tokens, heads, width] -> each [heads, width]; empty mask: all tokens
inline Spread spread_over_tokens(const Array3& x, const std::vector<bool>& mask = {}) {
  const double inf = std::numeric_limits<double>::infinity();
  Spread s{Array2(x.b, x.c, inf), Array2(x.b, x.c, -inf), Array2(x.b, x.c), Array2(x.b, x.c)};
  for (Index t = 0; t < x.a; ++t) {
    if (!mask.empty() && !item(mask, t)) continue;
    for (Index h = 0; h < x.b; ++h)
      for (Index d = 0; d < x.c; ++d) {
        const double v = x.at(t, h, d);
        s.min.at(h, d) = std::min(s.min.at(h, d), v);
        s.max.at(h, d) = std::max(s.max.at(h, d), v);
        s.sum.at(h, d) += v;
        s.sum_of_squares.at(h, d) += v * v;
      }
  }
  return s;
}

/// Over the channels, per (head, token). x [tokens, heads, width] -> each [heads, tokens]
inline Spread spread_over_channels(const Array3& x) {
  const double inf = std::numeric_limits<double>::infinity();
  Spread s{Array2(x.b, x.a, inf), Array2(x.b, x.a, -inf), Array2(x.b, x.a), Array2(x.b, x.a)};
  for (Index t = 0; t < x.a; ++t)
    for (Index h = 0; h < x.b; ++h)
      for (Index d = 0; d < x.c; ++d) {
        const double v = x.at(t, h, d);
        s.min.at(h, t) = std::min(s.min.at(h, t), v);
        s.max.at(h, t) = std::max(s.max.at(h, t), v);
        s.sum.at(h, t) += v;
        s.sum_of_squares.at(h, t) += v * v;
      }
  return s;
}

}  // namespace kvpare::oracle

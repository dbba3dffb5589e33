// LagKV: keys and values of a partition, seen against the partition after it.
#pragma once

#include <algorithm>
#include <cmath>

#include "softmax.hpp"

namespace kvpare::oracle {

struct LagKvSettings {
  Index sinks = 4;      // tokens before the first partition
  Index lag = 128;      // tokens per partition
  bool across = false;  // scores of all partitions are compared with each other
};

using Vectors = std::vector<std::vector<double>>;  // [tokens][width]

/// softmax over a partition's tokens of the deviation (n - 1) over channels of (x - min) / (max - min), with the channel's
/// min and max over `reference`; a channel that is constant there counts 0, one channel has no deviation.
inline std::vector<double> lag_relative(const Vectors& partition, const Vectors& reference) {
  std::vector<double> deviations;
  for (const auto& row : partition) {
    std::vector<double> y;
    for (Index c = 0; c < count_of(row); ++c) {
      double least = infinity, most = -infinity;
      for (const auto& r : reference) least = std::min(least, item(r, c)), most = std::max(most, item(r, c));
      y.push_back(most == least ? 0 : (item(row, c) - least) / (most - least));
    }
    double mean = 0, squares = 0;
    for (const double v : y) mean += v / static_cast<double>(y.size());
    for (const double v : y) squares += (v - mean) * (v - mean);
    deviations.push_back(y.size() > 1 ? std::sqrt(squares / static_cast<double>(y.size() - 1)) : 0);
  }
  return softmax(deviations);
}

/// Scores of the tokens of one head, in order. Compared tokens: rank within the partition (0 = least, the earlier of equals
/// higher) / lag, or with `across` what it ranks. Then from 4 up, one by one, the last partition and what fills none; above
/// them, downwards, the sinks.
/// Source  LagKV, arXiv 2504.04704
inline std::vector<double> lag_kv_of_head(const Vectors& keys, const Vectors& values, const LagKvSettings& settings) {
  require(keys.size() == values.size(), "oracle: a key and a value for each token");
  const Index tokens = count_of(keys), sinks = std::min(settings.sinks, tokens), lag = settings.lag;
  std::vector<double> scores(keys.size());
  const auto part = [&](const Vectors& x, Index begin) { return Vectors(x.begin() + begin, x.begin() + begin + lag); };
  Index begin = sinks;
  for (; begin + 2 * lag <= tokens; begin += lag) {
    std::vector<double> sum = lag_relative(part(keys, begin), part(keys, begin + lag));
    const std::vector<double> of_values = lag_relative(part(values, begin), part(values, begin + lag));
    for (Index t = 0; t < lag; ++t) item(sum, t) += item(of_values, t);
    for (Index t = 0; t < lag; ++t) {
      Index rank = 0;
      for (Index u = 0; u < lag; ++u)
        if (item(sum, u) < item(sum, t) || (item(sum, u) == item(sum, t) && u > t)) ++rank;
      item(scores, begin + t) = settings.across ? item(sum, t) : static_cast<double>(rank) / static_cast<double>(lag);
    }
  }
  double above = 4;
  for (Index t = begin; t < tokens; ++t) item(scores, t) = above++;
  for (Index t = 0; t < sinks; ++t) item(scores, t) = static_cast<double>(4 + tokens - t);
  return scores;
}

/// Shapes  keys, values [tokens, kv_heads, width] -> [kv_heads, tokens]
inline Array2 lag_kv(const Array3& keys, const Array3& values, const LagKvSettings& settings) {
  Array2 scores(keys.b, keys.a);
  const auto head_of = [](const Array3& x, Index h) {
    Vectors rows;
    for (Index t = 0; t < x.a; ++t) {
      rows.emplace_back();
      for (Index d = 0; d < x.c; ++d) rows.back().push_back(x.at(t, h, d));
    }
    return rows;
  };
  for (Index h = 0; h < keys.b; ++h) {
    const std::vector<double> row = lag_kv_of_head(head_of(keys, h), head_of(values, h), settings);
    for (Index t = 0; t < keys.a; ++t) scores.at(h, t) = item(row, t);
  }
  return scores;
}

}  // namespace kvpare::oracle

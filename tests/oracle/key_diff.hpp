// KeyDiff: keys that point elsewhere than the others stay.
#pragma once

#include <cmath>

#include "dense.hpp"

namespace kvpare::oracle {

/// x . y / (||x|| ||y||); 0 when either has no length.
inline double cosine(const std::vector<double>& x, const std::vector<double>& y) {
  require(x.size() == y.size(), "oracle: a cosine of vectors of one width");
  double dot = 0, xx = 0, yy = 0;
  for (Index d = 0; d < count_of(x); ++d) {
    dot += item(x, d) * item(y, d);
    xx += item(x, d) * item(x, d);
    yy += item(y, d) * item(y, d);
  }
  return xx == 0 || yy == 0 ? 0 : dot / (std::sqrt(xx) * std::sqrt(yy));
}

/// anchor = mean of k / ||k|| over the tokens of one head; a key without length counts as zeros. keys [tokens][width]
inline std::vector<double> key_anchor(const std::vector<std::vector<double>>& keys) {
  std::vector<double> anchor;
  for (const auto& key : keys) {
    anchor.resize(key.size(), 0.0);
    double squares = 0;
    for (const double x : key) squares += x * x;
    for (Index d = 0; d < count_of(key); ++d)
      if (squares > 0) item(anchor, d) += item(key, d) / std::sqrt(squares) / static_cast<double>(keys.size());
  }
  return anchor;
}

/// score[j] = -cos(k[j], anchor) of one head. keys [tokens][width] -> [tokens]
inline std::vector<double> key_diff_of_head(const std::vector<std::vector<double>>& keys) {
  const std::vector<double> anchor = key_anchor(keys);
  std::vector<double> scores;
  for (const auto& key : keys) scores.push_back(-cosine(key, anchor));
  return scores;
}

/// keys [tokens, kv_heads, width] -> [kv_heads, tokens]
/// Source  KeyDiff, arXiv 2504.15364
inline Array2 key_diff(const Array3& keys) {
  Array2 scores(keys.b, keys.a);
  for (Index h = 0; h < keys.b; ++h) {
    std::vector<std::vector<double>> of_head;
    for (Index j = 0; j < keys.a; ++j) {
      of_head.emplace_back();
      for (Index d = 0; d < keys.c; ++d) of_head.back().push_back(keys.at(j, h, d));
    }
    const std::vector<double> row = key_diff_of_head(of_head);
    for (Index j = 0; j < keys.a; ++j) scores.at(h, j) = item(row, j);
  }
  return scores;
}

}  // namespace kvpare::oracle

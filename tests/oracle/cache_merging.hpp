// CaM: what goes gives its value to the next that stay.
#pragma once

#include <algorithm>
#include <functional>

#include "dense.hpp"

namespace kvpare::oracle {

struct CacheMerging {
  std::vector<std::vector<double>> values;  // [kept][width]
  std::vector<Index> merged;                // tokens that were added to others
};

/// One head: token by token, each that goes tosses its coin and is given away.
/// Shapes  values [tokens][width], scores [tokens] (attention so far), kept ascending; coin(token) within [0, 1)
/// Source  Zhang et al., ICML 2024: V_k += b V_i / m, b ~ Bernoulli(clamp(A_i / mean of A_k, 0, 1)), k the m that follow i
inline CacheMerging cache_merging(const std::vector<std::vector<double>>& values, const std::vector<double>& scores,
                                  const std::vector<Index>& kept, Index m, const std::function<double(Index)>& coin) {
  require(values.size() == scores.size(), "oracle: a score for each value");
  CacheMerging out;
  for (const Index k : kept) out.values.push_back(item(values, k));
  for (Index i = 0; i < count_of(values); ++i) {
    if (std::find(kept.begin(), kept.end(), i) != kept.end()) continue;
    std::vector<std::size_t> next;
    for (std::size_t a = 0; a < kept.size(); ++a)
      if (kept[a] > i && count_of(next) < m) next.push_back(a);
    double mean = 0;
    for (const std::size_t a : next) mean += item(scores, kept[a]);
    mean /= static_cast<double>(next.size());
    if (next.empty() || item(scores, i) <= 0) continue;
    if (mean > 0 && coin(i) >= std::clamp(item(scores, i) / mean, 0.0, 1.0)) continue;
    out.merged.push_back(i);
    for (const std::size_t a : next)
      for (std::size_t c = 0; c < out.values[a].size(); ++c)
        out.values[a][c] += item(values, i)[c] / static_cast<double>(next.size());
  }
  return out;
}

}  // namespace kvpare::oracle

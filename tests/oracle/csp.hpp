// CSP: two lists of attention, within a modality and across modalities, and the union of their best.
#pragma once

#include <algorithm>

#include "causal_attention.hpp"
#include "reduce.hpp"
#include "select_top.hpp"

namespace kvpare::oracle {

struct CrossSelfSettings {
  double cross = 0.5;  // c
  double n = 1;        // joins every row's denominator
  Index window = 1;    // O, query rows looked at, from the end
};

/// Steps 2 to 5 of one query head: what each key gets from rows of its own modality and from the others.
struct CrossSelfParts {
  Array2 self, cross;  // [heads, tokens]
};

/// A = exp(s) / (n + exp(sink) + sum exp(s)), causal; sums over the last `window` rows, mean over each kv head's group.
/// Shapes  queries [tokens, q_heads, width], keys [tokens, kv_heads, width], modality [tokens] -> [kv_heads, tokens]
inline CrossSelfParts cross_self_parts(const Array3& queries, const Array3& keys, const std::vector<int>& modality,
                                       const AttentionSettings& how, const CrossSelfSettings& settings) {
  require(keys.a == count_of(modality) && queries.a == keys.a, "oracle: a modality for each token");
  CrossSelfParts all{Array2(queries.b, keys.a), Array2(queries.b, keys.a)};
  for (Index h = 0; h < queries.b; ++h)
    for (Index row = std::max<Index>(0, keys.a - settings.window); row < keys.a; ++row) {
      double sum = settings.n + (how.sink.empty() ? 0.0 : std::exp(item(how.sink, h)));
      for (Index j = 0; j < keys.a; ++j)
        if (sees(how, row, j)) sum += std::exp(capped_logit(how, dot_of(queries, keys, row, h, j)));
      for (Index j = 0; j < keys.a; ++j)
        if (sees(how, row, j))
          (item(modality, row) == item(modality, j) ? all.self : all.cross).at(h, j) +=
              std::exp(capped_logit(how, dot_of(queries, keys, row, h, j))) / sum;
    }
  return {mean_per_kv_head(all.self, keys.b), mean_per_kv_head(all.cross, keys.b)};
}

/// Place of token j in a list, from 1 up: one more than the ranked tokens before it. 0: it has no part.
inline Index place_in(const std::vector<double>& part, const std::vector<bool>& ranked, Index j) {
  if (!(item(part, j) > 0)) return 0;
  Index place = 1;
  for (Index i = 0; i < count_of(part); ++i)
    if (i != j && item(ranked, i) && ranks_before(part, i, j)) ++place;
  return place;
}

/// The budget from which token j is in one of the two lists; lower = kept earlier. A list without share goes on after all
/// of the other one; infinity: no place in either.
inline double kept_from(const std::vector<double>& self, const std::vector<double>& cross,
                        const std::vector<bool>& ranked, double c, Index j) {
  const double tokens = static_cast<double>(self.size()), a = static_cast<double>(place_in(self, ranked, j)),
               b = static_cast<double>(place_in(cross, ranked, j));
  double from = infinity;
  if (a > 0) from = std::min(from, c < 1 ? a / (1 - c) : tokens + a);
  if (b > 0) from = std::min(from, c > 0 ? b / c : tokens + b);
  return from;
}

inline std::vector<double> cross_self_order(const std::vector<double>& self, const std::vector<double>& cross,
                                            const std::vector<bool>& ranked, double c) {
  std::vector<double> order;
  for (Index j = 0; j < count_of(self); ++j) order.push_back(kept_from(self, cross, ranked, c, j));
  return order;
}

/// Steps 6 and 7 as the specification has them, among all tokens of two lists: the union of the best int(k (1 - c)) by self
/// and the best int(k c) by cross, those of part 0 left out. Ascending; may be fewer than k.
/// Source  CSP, arXiv 2412.04652
inline std::vector<Index> cross_self_union(const std::vector<double>& self, const std::vector<double>& cross, Index k,
                                           double c) {
  std::vector<Index> both;
  const auto add = [&](const std::vector<double>& part, double share) {
    for (const Index j : select_top(part, static_cast<Index>(static_cast<double>(k) * share + 1e-9)))
      if (item(part, j) > 0 && std::find(both.begin(), both.end(), j) == both.end()) both.push_back(j);
  };
  add(self, 1 - c);
  add(cross, c);
  std::sort(both.begin(), both.end());
  return both;
}

}  // namespace kvpare::oracle

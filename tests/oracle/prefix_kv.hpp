// PrefixKV: one share of the attention for all layers says how many of its best tokens each keeps; decode deletes at a
// fixed index.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>

#include "sort_rows.hpp"
#include "strength_skewness.hpp"

namespace kvpare::oracle {

/// C_l[o] / C_l[end]: what the best o + 1 tokens hold of the layer's attention. A layer without any: 1 throughout.
inline std::vector<double> prefix_shares(const std::vector<double>& scores) {
  std::vector<double> shares = sort_row(scores).running_sum;
  const double all = shares.empty() ? 0 : shares.back();
  for (double& c : shares) c = all > 0 ? c / all : 1;
  return shares;
}

/// R_l(share) = the smallest o >= 1 with C_l[o] >= share * C_l[end]; 0 for a layer without tokens. Within 1e-12 of the
/// share counts as there, so the order of floating-point sums does not decide between layers.
inline std::vector<Index> prefix_lengths(const std::vector<std::vector<double>>& scores, double share) {
  std::vector<Index> lengths;
  for (const auto& layer : scores) {
    const std::vector<double> shares = prefix_shares(layer);
    Index o = 0;
    while (o < count_of(shares) && (o == 0 || item(shares, o - 1) < share - 1e-12)) ++o;
    lengths.push_back(o);
  }
  return lengths;
}

/// The largest share whose prefixes together hold no more than `total`; 0 when one token each is too many already.
/// R_l grows only behind one of the layer's own cumulative shares, so the answer is among these.
inline double prefix_share(const std::vector<std::vector<double>>& scores, Index total) {
  double best = 0;
  for (const auto& layer : scores)
    for (const double share : prefix_shares(layer)) {
      const std::vector<Index> lengths = prefix_lengths(scores, share);
      if (std::accumulate(lengths.begin(), lengths.end(), Index{0}) <= total) best = std::max(best, share);
    }
  return best;
}

/// The prefixes at that share, scaled to exactly min(total, all there is); no layer above its tokens.
/// Shapes  scores [layers][tokens of that layer] -> tokens per layer
/// Source  PrefixKV, arXiv 2412.03409; whole numbers by largest remainder instead of the code's truncation
inline std::vector<Index> prefix_budgets(const std::vector<std::vector<double>>& scores, Index total) {
  std::vector<double> weights;
  std::vector<Index> available;
  for (const Index length : prefix_lengths(scores, prefix_share(scores, total)))
    weights.push_back(static_cast<double>(length));
  for (const auto& layer : scores) available.push_back(count_of(layer));
  return apportion(weights, total, available, 1);
}

/// As released: what layers forget at a share, less the tokens that stay anyway and no less than 0, is brought within 5 of
/// what is to go by halving [0, 1], then scaled and cut to whole numbers. May be more than `total`, and less than what stays.
/// Shapes  scores [layers][tokens of that layer] -> tokens per layer
/// Source  THU-MIG/PrefixKV, prefixkv.py
inline std::vector<Index> prefix_budgets_reference(const std::vector<std::vector<double>>& scores, Index total,
                                                   Index protects) {
  Index tokens = 0;
  for (const auto& layer : scores) tokens += count_of(layer);
  const double wanted = static_cast<double>(tokens - total);
  double low = 0, high = 1, sum = 0;
  std::vector<double> forgets;
  for (int step = 0; step < 60; ++step) {
    const double share = (low + high) / 2;
    const std::vector<Index> lengths = prefix_lengths(scores, share);
    forgets.clear();
    for (std::size_t l = 0; l < scores.size(); ++l)
      forgets.push_back(static_cast<double>(std::max<Index>(0, count_of(scores[l]) - lengths[l] - protects)));
    sum = std::accumulate(forgets.begin(), forgets.end(), 0.0);
    if (std::abs(sum - wanted) < 5) break;
    (sum < wanted ? high : low) = share;
  }
  std::vector<Index> keeps;
  for (std::size_t l = 0; l < scores.size(); ++l) {
    const Index gone = sum > 0 ? static_cast<Index>(std::floor(forgets[l] * wanted / sum)) : 0;
    keeps.push_back(std::max<Index>(0, count_of(scores[l]) - gone));
  }
  return keeps;
}

/// Where decode deletes: an absolute index when distance > 0; else so far before the end of what prefill kept, and in
/// its middle when that is less than 1.
inline Index fixed_index(Index kept_after_prefill, Index distance = -25) {
  require(distance != 0, "oracle: a distance of 0 is neither");
  if (distance > 0) return distance;
  const Index f = kept_after_prefill + distance;
  return f < 1 ? kept_after_prefill / 2 : f;
}

/// Deletes at compact index f while int(active - logical * ratio) >= 1; where nothing is at f, nothing goes. An excess
/// within 1e-9 of 1 counts as there.
/// Source  Elastic Cache, arXiv 2407.18121; PrefixKV, arXiv 2412.03409, whose code deletes at most one per step
inline std::vector<Index> fixed_point_decode(std::vector<Index> positions, Index f, Index logical, double ratio) {
  require(f >= 0, "oracle: an index before the first");
  while (f < count_of(positions) &&
         static_cast<double>(count_of(positions)) - static_cast<double>(logical) * ratio >= 1 - 1e-9)
    positions.erase(positions.begin() + f);
  return positions;
}

}  // namespace kvpare::oracle

// AirCache steps 5 to 8: how many tokens each layer keeps; and the even spread it is compared with.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>

#include "statistics.hpp"

namespace kvpare::oracle {

/// round(keep_ratio * sum of candidates), halves up.
inline Index total_tokens(double keep_ratio, const std::vector<Index>& candidates) {
  const auto all = std::accumulate(candidates.begin(), candidates.end(), Index{0});
  return static_cast<Index>(std::floor(keep_ratio * static_cast<double>(all) + 0.5));
}

/// Real shares x_l = clamp(t * weight_l, lowest_l, highest_l) with the one t that makes them sum to `total`: the excess
/// of clamped entries goes to the others in proportion, until stable. Each pass clamps only the side that moves the sum
/// more, since clamping both at once can freeze an entry at a bound it would have left again. Entries that are left
/// with no weight at all share in proportion to `highest`. Needs sum lowest <= total <= sum highest.
inline std::vector<double> clamped_shares(const std::vector<double>& weights, double total,
                                          const std::vector<double>& lowest, const std::vector<double>& highest) {
  const Index n = count_of(weights);
  std::vector<double> share(weights.size(), 0.0);
  std::vector<bool> frozen(weights.size(), false);

  // Entries without weight: their lowest, unless all the others at their highest do not reach the total.
  double most = 0;
  bool any_weight = false;
  for (Index i = 0; i < n; ++i) {
    most += item(weights, i) > 0 ? item(highest, i) : item(lowest, i);
    any_weight = any_weight || item(weights, i) > 0;
  }
  for (Index i = 0; i < n && any_weight; ++i) {
    if (most >= total && item(weights, i) == 0) item(share, i) = item(lowest, i), item(frozen, i) = true;
    if (most < total && item(weights, i) > 0) item(share, i) = item(highest, i), item(frozen, i) = true;
  }

  while (true) {
    double rest = total, weight_left = 0, room_left = 0;
    for (Index i = 0; i < n; ++i) {
      if (item(frozen, i)) {
        rest -= item(share, i);
      } else {
        weight_left += item(weights, i);
        room_left += item(highest, i);
      }
    }
    double below = 0, above = 0;  // what clamping would add, and take away
    for (Index i = 0; i < n; ++i) {
      if (item(frozen, i)) continue;
      if (weight_left > 0) item(share, i) = rest * (item(weights, i) / weight_left);
      else item(share, i) = room_left > 0 ? rest * (item(highest, i) / room_left) : 0;
      below += std::max(0.0, item(lowest, i) - item(share, i));
      above += std::max(0.0, item(share, i) - item(highest, i));
    }
    if (below == 0 && above == 0) return share;
    for (Index i = 0; i < n; ++i) {
      if (item(frozen, i)) continue;
      if (below >= above && item(share, i) < item(lowest, i)) item(share, i) = item(lowest, i), item(frozen, i) = true;
      else if (above >= below && item(share, i) > item(highest, i)) item(share, i) = item(highest, i), item(frozen, i) = true;
    }
  }
}

/// Whole numbers that sum to `total` from real shares that do: floors, then one each to the largest remainders, ties to
/// the lower index. Remainders count as equal within 1e-9, so the order of floating-point sums does not decide.
inline std::vector<Index> largest_remainder(const std::vector<double>& shares, Index total) {
  std::vector<Index> whole, order;
  std::vector<double> remainder;
  Index missing = total;
  for (Index i = 0; i < count_of(shares); ++i) {
    const double x = item(shares, i);
    whole.push_back(static_cast<Index>(std::floor(x)));
    remainder.push_back(std::round((x - std::floor(x)) * 1e9));
    order.push_back(i);
    missing -= whole.back();
  }
  std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) { return item(remainder, a) > item(remainder, b); });
  require(missing >= 0 && missing <= count_of(order), "oracle: shares do not sum to the total");
  for (Index i = 0; i < missing; ++i) ++item(whole, item(order, i));
  return whole;
}

/// Layer budgets in proportion to `weights`, each within [min(lowest, candidates_l), candidates_l], summing exactly to
/// min(total, sum of candidates). If the total cannot give every layer its `lowest`, the sum wins and the floor is 0.
inline std::vector<Index> apportion(const std::vector<double>& weights, Index total, const std::vector<Index>& candidates,
                                    Index lowest) {
  require(weights.size() == candidates.size(), "oracle: a weight for each layer");
  total = std::clamp<Index>(total, 0, std::accumulate(candidates.begin(), candidates.end(), Index{0}));
  std::vector<double> low, high;
  for (Index c : candidates) {
    low.push_back(static_cast<double>(std::min(lowest, c)));
    high.push_back(static_cast<double>(c));
  }
  if (std::accumulate(low.begin(), low.end(), 0.0) > static_cast<double>(total)) low.assign(low.size(), 0.0);
  return largest_remainder(clamped_shares(weights, static_cast<double>(total), low, high), total);
}

struct StrengthSkewnessSettings {
  bool use_strength = true;  // both: their mean; neither: every layer weighs the same per candidate
  bool use_skewness = true;
  Index lowest = 1;          // tokens per layer at least
  double even_share = 0;     // of every weight: that part is 1
};

/// x_l / mean(x) over the layers that take part; their sum 0: 1 each. Layers that do not take part get 1.
inline std::vector<double> normalised_to_mean_one(const std::vector<double>& x, const std::vector<bool>& takes_part) {
  double sum = 0, layers = 0;
  for (Index l = 0; l < count_of(x); ++l)
    if (item(takes_part, l)) sum += item(x, l), layers += 1;
  std::vector<double> out;
  for (Index l = 0; l < count_of(x); ++l) out.push_back(item(takes_part, l) && sum > 0 ? layers * item(x, l) / sum : 1.0);
  return out;
}

/// Step 7 and the mean of step 8: r_l / r = (st'_l + sk'_l) / 2.
/// st' and sk' have mean 1 over the layers; sk is clamped at 0 first; a layer with fewer than 3 candidates has sk' = 1
/// and is left out of that mean; layers without candidates are left out of both; all zero gives 1.
inline std::vector<double> layer_weights(const std::vector<double>& strength, std::vector<double> skewness,
                                         const std::vector<Index>& candidates, const StrengthSkewnessSettings& settings = {}) {
  std::vector<bool> has_any, has_three;
  for (Index c : candidates) {
    has_any.push_back(c >= 1);
    has_three.push_back(c >= 3);
  }
  for (double& sk : skewness) sk = std::max(sk, 0.0);
  const std::vector<double> st = normalised_to_mean_one(strength, has_any);
  const std::vector<double> sk = normalised_to_mean_one(skewness, has_three);
  std::vector<double> out;
  for (Index l = 0; l < count_of(candidates); ++l) {
    if (settings.use_strength && settings.use_skewness) out.push_back(0.5 * (item(st, l) + item(sk, l)));
    else if (settings.use_strength) out.push_back(item(st, l));
    else if (settings.use_skewness) out.push_back(item(sk, l));
    else out.push_back(1.0);
  }
  return out;
}

/// Steps 7 and 8 with guards, from the layers' strength and skewness: shares r_l * Nv_l scaled to `total` tokens, clamped,
/// and rounded by largest remainder.
/// Shapes  strength, skewness, candidates (Nv) [layers] -> tokens per layer
inline std::vector<Index> strength_skewness_budgets(const std::vector<double>& strength, const std::vector<double>& skewness,
                                                    const std::vector<Index>& candidates, Index total,
                                                    const StrengthSkewnessSettings& settings = {}) {
  std::vector<double> weights = layer_weights(strength, skewness, candidates, settings);
  for (Index l = 0; l < count_of(weights); ++l) item(weights, l) = (settings.even_share + (1 - settings.even_share) * item(weights, l)) *
                                                               static_cast<double>(item(candidates, l));
  return apportion(weights, total, candidates, settings.lowest);
}

/// Steps 5 to 8 from the layers' importance: st = sum I_v, sk = adjusted skewness of I_v.
/// Shapes  importance [layers][visual tokens of that layer], the layer-wide average over heads
/// Source  AirCache, arXiv 2503.23956
inline std::vector<Index> strength_skewness(const std::vector<std::vector<double>>& importance, Index total,
                                            const StrengthSkewnessSettings& settings = {}) {
  std::vector<double> strength, skewness;
  std::vector<Index> candidates;
  for (const auto& layer : importance) {
    strength.push_back(std::accumulate(layer.begin(), layer.end(), 0.0));
    skewness.push_back(adjusted_skewness(layer));
    candidates.push_back(count_of(layer));
  }
  return strength_skewness_budgets(strength, skewness, candidates, total, settings);
}

/// Evenly over the layers, the first ones take the remainder; a layer with fewer candidates than its share takes them
/// all and passes the excess on. Sums to min(total, sum of candidates).
inline std::vector<Index> uniform_budgets(Index total, const std::vector<Index>& candidates) {
  std::vector<Index> out(candidates.size(), 0);
  std::vector<bool> full(candidates.size(), false);
  while (true) {
    Index rest = total, open = 0;
    for (Index l = 0; l < count_of(out); ++l) {
      if (item(full, l)) rest -= item(out, l);
      else ++open;
    }
    if (open == 0) return out;
    bool again = false;
    for (Index l = 0; l < count_of(out); ++l)
      if (!item(full, l) && item(candidates, l) <= rest / open) {
        item(out, l) = item(candidates, l);
        item(full, l) = again = true;
      }
    if (again) continue;
    Index place = 0;
    for (Index l = 0; l < count_of(out); ++l)
      if (!item(full, l)) item(out, l) = rest / open + (place++ < rest % open ? 1 : 0);
    return out;
  }
}

}  // namespace kvpare::oracle

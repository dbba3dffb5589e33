// Splits a whole number in proportion to wishes, within bounds, exactly.
#pragma once

#include "../../core/config.hpp"

namespace kvpare {

/// keep[l] whole, least <= keep[l] <= available[l], sum = total clamped to [0, sum of available].
///
/// Formula  x_l = clamp(f * wish_l, min(least, available_l), available_l) with the one factor f for which they sum to the
///          total: what clamping takes from some layers goes to the others in proportion. Then largest remainder.
/// Ties     equal remainders go to the lower layer. NaN and negative wishes count as 0 and get what the others have no room
///          for, in proportion to what is available; all zero = all equal.
/// Bounds   when the total is below the sum of the lower bounds, these are dropped.
/// Cost     O(n) * 200, plus O(n * leftover) with leftover < n; no memory but `wish`, which is overwritten with x_l
KVPARE_HD inline void apportion(double* wish, const Index* available, Index n, Index total, Index least, Index* keep) {
  Index most = 0, lowest = 0;
  double sum = 0;
  for (Index l = 0; l < n; ++l) {
    if (!(wish[l] > 0)) wish[l] = 0;
    sum += wish[l];
    most += available[l];
    lowest += least < available[l] ? least : available[l];
  }
  if (total > most) total = most;
  if (total < 0) total = 0;
  if (lowest > total) least = 0;
  if (!(sum > 0))
    for (Index l = 0; l < n; ++l) wish[l] = 1;

  const auto clamped = [&](Index l, double factor) {
    const double low = static_cast<double>(least < available[l] ? least : available[l]);
    const double high = static_cast<double>(available[l]);
    const double x = factor * wish[l];
    return x < low ? low : x > high ? high : x;
  };
  const auto sum_at = [&](double factor) {
    double all = 0;
    for (Index l = 0; l < n; ++l) all += clamped(l, factor);
    return all;
  };
  sum = 0;
  for (Index l = 0; l < n; ++l) sum += wish[l];
  const double target = static_cast<double>(total);
  double factor = target / sum;  // the one, unless something is clamped
  if (const double now = sum_at(factor); now - target > 1e-9 || target - now > 1e-9) {
    double low = 0, high = factor;
    while (sum_at(high) < target && high <= 1e300) high *= 2;
    if (sum_at(high) < target) {  // who has a wish is full: the others share the rest in proportion to what they have
      for (Index l = 0; l < n; ++l) wish[l] = wish[l] > 0 ? 1e300 : static_cast<double>(available[l]);
      high = 1;
    }
    for (int i = 0; i < 200; ++i) {
      const double middle = low + (high - low) / 2;
      (sum_at(middle) < target ? low : high) = middle;
    }
    factor = high;
  }

  Index given = 0;
  for (Index l = 0; l < n; ++l) {
    const double x = clamped(l, factor);
    const double near = static_cast<double>(static_cast<Index>(x + 0.5));
    // A whole number that rounding left a hair below itself is that number.
    const Index floor = x - near < 1e-9 && near - x < 1e-9 ? static_cast<Index>(near) : static_cast<Index>(x);
    keep[l] = floor > available[l] ? available[l] : floor;
    wish[l] = x;
    given += keep[l];
  }
  while (given < total) {  // one more to the largest remainder that has room
    Index best = -1;
    for (Index l = 0; l < n; ++l)
      if (keep[l] < available[l] &&
          (best < 0 || wish[l] - static_cast<double>(keep[l]) > wish[best] - static_cast<double>(keep[best]) + 1e-12))
        best = l;
    ++keep[best];
    ++given;
  }
  while (given > total) {  // only when rounding up near-whole numbers overshot
    Index worst = -1;
    for (Index l = 0; l < n; ++l)
      if (keep[l] > 0 &&
          (worst < 0 || wish[l] - static_cast<double>(keep[l]) < wish[worst] - static_cast<double>(keep[worst])))
        worst = l;
    --keep[worst];
    --given;
  }
}

}  // namespace kvpare

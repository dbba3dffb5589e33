// Elimination at a fixed point of the list: what was kept of the prompt stays, what is generated flows through.
#pragma once

#include <string_view>
#include <tuple>
#include <vector>

#include "../contracts.hpp"

namespace kvpare {

/// Scores tokens so that those at a fixed place of their list go, one after the other.
///
/// Formula  f = kept + distance for a negative distance, kept the tokens of the head after the last compress; kept / 2 where that
///          is below 1; f = distance for a positive one. Token i of the list, oldest first:
///          score = i for i >= f;  2^20 + i below: those at f go first, those before f last
/// Shapes   lists -> scores [kv_heads, columns]
/// Ties     none
/// Cost     host bookkeeping and one copy of it; no attention
/// Source   Elastic Cache (arXiv 2407.18121), section 3.3, and PrefixKV (arXiv 2412.03409): distance -25. Ours: several tokens
///          may go in one step (the released code deletes at most one)
struct FixedPoint {
  static constexpr std::string_view name = "fixed_point";

  Index distance = -25;  // of the place from the end of what was kept; positive: its index

  static constexpr auto fields() {
    return std::tuple{Field<FixedPoint, Index>{"distance", &FixedPoint::distance, -(1 << 20), 1 << 20,
                                               "of the place from the end of what compress kept; positive: its index"}};
  }
  void check() const { require(distance != 0, name, ".distance = 0, must be negative, or positive: an index"); }
  constexpr Reads reads() const { return {}; }
  /// Index of the place.
  constexpr Index place(Index kept) const {
    if (distance > 0) return distance;
    return kept + distance < 1 ? kept / 2 : kept + distance;
  }
  friend bool operator==(const FixedPoint&, const FixedPoint&) = default;
};

template <Backend B>
void score(B& be, const FixedPoint& policy, const Observation<B>& seen, Scores out) {
  const Index n = out.columns, place = policy.place(seen.compressed_to);
  std::vector<float> scores(static_cast<std::size_t>(out.heads * n), 0.0f);
  for (Index h = 0; h < out.heads; ++h)
    for (Index c = 0, i = 0; c < n; ++c)
      if (seen.columns->has(seen.columns->live_in(h), c)) {
        scores[static_cast<std::size_t>(h * n + c)] = static_cast<float>(i < place ? (1 << 20) + i : i);
        ++i;
      }
  be.to_backend(out.data, scores.data(), out.heads * n * static_cast<Index>(sizeof(float)));
}

}  // namespace kvpare

// Rows through a codec and back, on the host: what measuring a codec needs.
#pragma once

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "codec.hpp"

namespace kvpare {

/// What else is known of the rows of a round trip; what is left empty is unknown, positions count from 0.
struct RoundTripFacts {
  std::vector<float> query_peak = {};      // [width] the largest |q| per channel
  std::vector<float> query_squares = {};   // [width] sum of q^2 per channel, of so many vectors:
  Index query_vectors = 0;
  std::vector<float> attention = {};       // [tokens] see TokenFacts
  std::vector<Position> positions = {};    // [tokens]
  std::vector<float> numbers = {};         // see Measured::numbers
  RopeView rope = {};                      // of keys, in host memory

  std::vector<Position> positions_of(Index tokens) const {
    std::vector<Position> all = positions;
    if (all.empty()) all.resize(static_cast<std::size_t>(tokens)), std::iota(all.begin(), all.end(), 0);
    return all;
  }
};

/// The state that a codec makes of rows [tokens, width] and of `facts`, as if the layer had one head; empty where it makes none.
template <Codec C>
std::vector<float> made_state(const std::vector<float>& rows, Index width, const RoundTripFacts& facts = {}) {
  std::vector<float> state;
  if constexpr (MakesState<C>) {
    const auto or_null = [](const std::vector<float>& v) { return v.empty() ? nullptr : v.data(); };
    std::vector<float> min(static_cast<std::size_t>(width), std::numeric_limits<float>::infinity());
    std::vector<float> max(min.size(), -std::numeric_limits<float>::infinity()), squares(min.size(), 0.0f);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const std::size_t c = i % min.size();
      min[c] = std::min(min[c], rows[i]), max[c] = std::max(max[c], rows[i]), squares[c] += rows[i] * rows[i];
    }
    const std::vector<Position> positions = facts.positions_of(static_cast<Index>(rows.size()) / width);
    state.resize(static_cast<std::size_t>(state_floats<C>(width)));
    Measured m{.min = min.data(), .max = max.data(), .query_peak = or_null(facts.query_peak), .sum_squares = squares.data(),
               .tokens = std::ssize(positions), .query_squares = or_null(facts.query_squares),
               .query_vectors = facts.query_vectors, .layer_min = min.data(), .layer_max = max.data(), .rope = facts.rope};
    if constexpr (state_reads_rows<C>()) m.rows = rows.data(), m.positions = positions.data();
    m.numbers = or_null(facts.numbers), m.number_count = std::ssize(facts.numbers);
    C::make_state(width, m, state.data());
  }
  return state;
}

/// Rows [tokens, width] coded page by page, as canonical bytes, and decoded, with this state; null = the neutral one.
///
/// Needs  C::fits({page_tokens, width}); tokens that fill pages where the codec measures whole ones   Cost: one tile of memory
template <Codec C>
std::vector<float> round_trip_with(const float* state, const std::vector<float>& rows, Index width, Index page_tokens,
                                   const RoundTripFacts& facts = {}) {
  const Index tokens = static_cast<Index>(rows.size()) / width;
  const std::vector<Position> positions = facts.positions_of(tokens);
  const TileShape shape{page_tokens, width};
  std::vector<std::byte> tile(static_cast<std::size_t>(C::tile_bytes(shape)));
  std::vector<float> decoded(rows.size());
  for (Index t = 0; t < tokens; t += page_tokens) {
    const Index count = std::min(page_tokens, tokens - t);
    const TokenFacts of_rows{positions.data(), facts.attention.empty() ? nullptr : facts.attention.data()};
    encode_rows<C>(shape, rows.data() + t * width, 0, count, of_rows.from(t), state, tile.data());
    for (Index r = 0; r < count; ++r)
      decode_row<C>(shape, tile.data(), r, positions[static_cast<std::size_t>(t + r)], state, decoded.data() + (t + r) * width);
  }
  return decoded;
}

/// The same with the state that the codec makes of these rows, or the neutral one.
template <Codec C>
std::vector<float> round_trip(const std::vector<float>& rows, Index width, Index page_tokens,
                              const RoundTripFacts& facts = {}) {
  const std::vector<float> state = made_state<C>(rows, width, facts);
  return round_trip_with<C>(state.empty() ? nullptr : state.data(), rows, width, page_tokens, facts);
}

}  // namespace kvpare

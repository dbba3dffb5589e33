// A codec from outside the library that makes its own state.
#pragma once

#include <algorithm>
#include <cmath>
#include <kvpare/codec/codec.hpp>

namespace kvpare::test {

/// A codec with a state that it makes itself: every channel in 8 bits of its own range.
struct Ranged {
  static constexpr std::string_view name = "ranged";
  static constexpr bool rows_move = true;
  static constexpr bool fits(TileShape) { return true; }
  static constexpr Index tile_bytes(TileShape s) { return s.tokens * s.width; }
  static constexpr Index state_floats(Index width) { return width; }
  KVPARE_HD static void make_state(Index width, const Measured& r, float* state) {
    for (Index c = 0; c < width; ++c) state[c] = -r.min[c] > r.max[c] ? -r.min[c] : r.max[c];
  }
  KVPARE_HD static void encode(TileShape s, const float* rows, Index first, Index count, const float* state, std::byte* tile) {
    for (Index i = 0; i < count * s.width; ++i) {
      const float x = std::clamp(rows[i] / factor(state, i % s.width), -1.0f, 1.0f);
      tile[first * s.width + i] = static_cast<std::byte>(static_cast<int>(std::lround(x * 127)));
    }
  }
  KVPARE_HD static void decode(TileShape s, const std::byte* tile, Index slot, const float* state, float* row) {
    for (Index c = 0; c < s.width; ++c)
      row[c] = static_cast<float>(static_cast<signed char>(tile[slot * s.width + c])) / 127.0f * factor(state, c);
  }
  KVPARE_HD static float factor(const float* state, Index c) { return state != nullptr && state[c] > 0 ? state[c] : 1.0f; }
};
static_assert(Codec<Ranged> && MakesState<Ranged>);

}  // namespace kvpare::test

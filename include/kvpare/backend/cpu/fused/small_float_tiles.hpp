// Tiles of floats of 8 bits (E4M3, E5M2), attended to as they lie.
//
// Keys are [tokens / 16][channels][16 tokens], values [tokens][channels]; a byte a number, nothing else. They become floats
// in a few integer steps and a conversion from half, exactly, subnormals included; sums are made in float. Codes of NaN and
// infinity, which the codec never writes, count as what their bits would be one step further up.
//
// Fits  16, 32 or 64 tokens; width a multiple of 32, at most 256
#pragma once

#include <algorithm>

#include "../tile_ops.hpp"
#include "loops.hpp"

namespace kvpare::cpu::fused {

template <GroupCodec C>
constexpr bool is_small_float(bool e5m2) {
  if constexpr (C::form.bits == 8 && C::form.table && C::form.scale == ScaleType::one)
    return e5m2 ? C::levels[0x3c] == 1 && C::levels[0x7b] == 57344 : C::levels[0x38] == 1 && C::levels[0x7e] == 448;
  else
    return false;
}

template <GroupCodec C, Side side>
struct SmallFloatTiles {
  static constexpr bool e5m2 = is_small_float<C>(true);

  static constexpr bool fits(TileShape s) {
    return s.tokens % 16 == 0 && s.tokens <= max_tokens && s.width % 32 == 0 && s.width <= max_width;
  }
  static constexpr Index at(TileShape s, Index slot, Index channel) {
    return side == Side::keys ? slot / 16 * 16 * s.width + channel * 16 + slot % 16 : slot * s.width + channel;
  }
  static Index tile_bytes(TileShape s) { return C::tile_bytes(s); }

  static void encode(const Kernels&, TileShape s, const float* rows, Index first, Index count, const TokenFacts&,
                     const float* state, std::byte* tile) {
    std::uint8_t codes[max_width];
    for (Index r = 0; r < count; ++r) {
      C::quantize(rows + r * s.width, 1, s.width, state, codes, 1);
      for (Index c = 0; c < s.width; ++c) tile[at(s, first + r, c)] = std::byte{codes[c]};
    }
  }
  static void decode(const Kernels&, TileShape s, const std::byte* tile, Index slot, Position, const float* state,
                     float* row) {
    const float scale = C::scale_of({}, state);
    for (Index c = 0; c < s.width; ++c) row[c] = scale * C::level(std::to_integer<std::uint8_t>(tile[at(s, slot, c)]));
  }
  static void move_rows(const Kernels&, TileShape s, const std::byte* from, Index from_slot, std::byte* to,
                        Index to_slot, Index count) {
    const bool down = from == to && to_slot > from_slot;
    for (Index i = 0; i < count; ++i) {
      const Index r = down ? count - 1 - i : i;
      for (Index c = 0; c < s.width; ++c) to[at(s, to_slot + r, c)] = from[at(s, from_slot + r, c)];
    }
  }
  static void to_canonical(const Kernels&, TileShape s, const std::byte* tile, std::byte* canonical) {
    for (Index t = 0; t < s.tokens; ++t)
      for (Index c = 0; c < s.width; ++c) canonical[t * s.width + c] = tile[at(s, t, c)];
  }
  static void from_canonical(const Kernels&, TileShape s, const std::byte* canonical, std::byte* tile) {
    for (Index t = 0; t < s.tokens; ++t)
      for (Index c = 0; c < s.width; ++c) tile[at(s, t, c)] = canonical[t * s.width + c];
  }

  static Index query_bytes(Index rows, Index) { return rows * max_width * 4; }
  static void prepare_query(const Kernels& k, const float* q, Index q_stride, Index rows, Index width,
                            const float* state, std::byte* prepared) {
    const float factor = C::scale_of({}, state) * Loops(k).small_unit<e5m2>();
    for (Index i = 0; i < rows; ++i) {
      float* row = reinterpret_cast<float*>(prepared) + i * max_width;
      std::copy_n(q + i * q_stride, width, row);
      k.multiply(row, width, factor);
    }
  }
  static void score(const Kernels& k, const std::byte* prepared, Index rows, const TileRows& keys, AheadBytes ahead,
                    float* out, Index out_stride) {
    if (keys.count == 0 || rows == 0) return;
    Loops(k).score_small_keys<e5m2>({layout(keys.shape), {}, prepared, rows, keys, ahead, out, out_stride});
  }
  static void accumulate(const Kernels& k, const float* p, Index p_stride, const float* alpha, Index rows,
                         const TileRows& tile, AheadBytes ahead, float* acc, Index acc_stride) {
    if (rows == 0) return;
    Values values;
    values.factor = C::scale_of({}, tile.state);
    Loops(k).accumulate_small_values<e5m2>(
        {layout(tile.shape), values, p, p_stride, alpha, rows, tile, ahead, acc, acc_stride});
  }
  static void finish_output(Index, Index, const float*, const float*, float*, Index) {}

 private:
  static constexpr Layout layout(TileShape s) {
    return {.side = side, .shape = s, .group = s.width, .scale = ScaleType::one};
  }
};

}  // namespace kvpare::cpu::fused

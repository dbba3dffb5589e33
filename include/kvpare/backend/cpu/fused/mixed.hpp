// What the loops over tiles of mixed bits are told; see mixed.inl.
#pragma once

#include "layout.hpp"

namespace kvpare::cpu::fused {

/// A tile whose tokens lie in blocks of 16 places, each of its own bits, one scale and zero per token; and the slots
/// of it that are looked at.
///
/// Layout  of the codes of a block: that of layout.hpp for 16 tokens with one group per token
struct MixedTile {
  static constexpr Index block = 16, most_blocks = max_tokens / block;

  TileShape shape;
  Side side = Side::keys;
  std::uint8_t bits[most_blocks] = {};  // 0, 1, 2, 3, 4, 5 or 8; values 0, 2, 4 or 8
  const std::byte* codes[most_blocks] = {};
  const std::byte *scales = nullptr, *zeros = nullptr;  // halves [tokens], by place
  Index outliers = 0;                                   // of each token
  const std::byte* deltas = nullptr;                    // halves [outliers][tokens], by slot
  const std::byte* channels = nullptr;                  // bytes, likewise
  const std::uint8_t* slots = nullptr;                  // [count]
  int count = 0;
  bool gapless = true;                   // slots 0, 1, 2, …
  std::uint8_t places[max_tokens] = {};  // of these slots; the rest are 0
  bool used[most_blocks] = {};           // whether one of them is there

  Layout layout(int block_bits) const {
    return {.side = side,
            .shape = {block, shape.width},
            .units = {block_bits},
            .flip = side == Side::values && block_bits > 0 ? 1 << (block_bits - 1) : 0,
            .along = Along::channels,
            .group = shape.width,
            .scale = ScaleType::f16,
            .zero = ZeroType::minimum};
  }
};

struct MixedKeyCall {
  const MixedTile& tile;
  const QueryRow* queries[9] = {};  // [rows], by bits
  const float* fours = nullptr;     // the same queries as floats, [rows / 4][width][4]
  Index rows = 0;
  AheadBytes ahead;
  float* out = nullptr;
  Index out_stride = 0;
};

struct MixedValueCall {
  const MixedTile& tile;
  const float* p = nullptr;
  Index p_stride = 0;
  const float* alpha = nullptr;
  Index rows = 0;
  AheadBytes ahead;
  float* acc = nullptr;
  Index acc_stride = 0;
};

}  // namespace kvpare::cpu::fused

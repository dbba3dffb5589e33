// What loops over a codec's canonical bytes have in common: bytes as they are, queries as floats.
#pragma once

#include <array>
#include <cstring>

#include "tile_ops.hpp"

namespace kvpare::cpu {

/// The slots of a page, all of them.
inline constexpr auto slots_in_order = [] {
  std::array<std::uint8_t, 64> slots{};
  for (std::uint8_t s = 0; s < 64; ++s) slots[s] = s;
  return slots;
}();

/// The part of TileOps that such loops share; those that inherit bring encode, decode, score and accumulate.
template <class C>
struct CanonicalTiles {
  static Index tile_bytes(TileShape shape) { return C::tile_bytes(shape); }
  /// Rows of a codec that moves them are canonically one after the other.
  static void move_rows(const Kernels&, TileShape shape, const std::byte* from, Index from_slot, std::byte* to,
                        Index to_slot, Index count) {
    const Index row = C::tile_bytes({1, shape.width});
    std::memmove(to + to_slot * row, from + from_slot * row, static_cast<std::size_t>(count * row));
  }
  static void to_canonical(const Kernels&, TileShape shape, const std::byte* from, std::byte* to) {
    std::memcpy(to, from, static_cast<std::size_t>(C::tile_bytes(shape)));
  }
  static void from_canonical(const Kernels& k, TileShape shape, const std::byte* from, std::byte* to) {
    to_canonical(k, shape, from, to);
  }

  static Index query_stride(Index width) { return round_up(width, 16); }
  static Index query_bytes(Index rows, Index width) { return rows * query_stride(width) * 4; }
  static void prepare_query(const Kernels&, const float* q, Index q_stride, Index rows, Index width, const float*,
                            std::byte* prepared) {
    for (Index i = 0; i < rows; ++i)
      std::memcpy(prepared + i * query_stride(width) * 4, q + i * q_stride, static_cast<std::size_t>(width * 4));
  }
  static void finish_output(Index, Index, const float*, const float*, float*, Index) {}
};

}  // namespace kvpare::cpu

// Tiles of raw rows inside other codecs: read as they lie, by the loops over raw pages.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>

#include "../../../codec/raw.hpp"
#include "../tile_ops.hpp"

namespace kvpare::cpu::fused {

template <class C>
struct RawTiles {
  static Index tile_bytes(TileShape shape) { return C::tile_bytes(shape); }
  static void encode(const Kernels& k, TileShape shape, const float* rows, Index first, Index count, const TokenFacts&,
                     const float*, std::byte* tile) {
    k.from_float(rows, count * shape.width, C::dtype, tile + first * C::row_bytes(shape.width));
  }
  static void decode(const Kernels& k, TileShape shape, const std::byte* tile, Index slot, Position, const float*,
                     float* row) {
    k.to_float(tile + slot * C::row_bytes(shape.width), C::dtype, shape.width, row);
  }
  static void move_rows(TileShape shape, const std::byte* from, Index from_slot, std::byte* to, Index to_slot,
                        Index count) {
    const Index row = C::row_bytes(shape.width);
    std::memmove(to + to_slot * row, from + from_slot * row, static_cast<std::size_t>(count * row));
  }
  static void to_canonical(TileShape shape, const std::byte* from, std::byte* to) {
    std::memcpy(to, from, static_cast<std::size_t>(C::tile_bytes(shape)));
  }
  static void from_canonical(TileShape shape, const std::byte* from, std::byte* to) { to_canonical(shape, from, to); }

  static Index query_stride(Index width) { return round_up(width, 16); }
  static Index query_bytes(Index rows, Index width) { return rows * query_stride(width) * 4; }
  static void prepare_query(const Kernels&, const float* q, Index q_stride, Index rows, Index width, const float*,
                            std::byte* prepared) {
    for (Index i = 0; i < rows; ++i)
      std::memcpy(prepared + i * query_stride(width) * 4, q + i * q_stride, static_cast<std::size_t>(width * 4));
  }
  static void score(const Kernels& k, const std::byte* prepared, Index rows, const TileRows& keys, AheadBytes ahead,
                    float* out, Index out_stride) {
    k.dot(reinterpret_cast<const float*>(prepared), query_stride(keys.shape.width), rows, keys.shape.width,
          listed(keys), as_rows(ahead, keys.shape.width), out, out_stride);
  }
  static void accumulate(const Kernels& k, const float* p, Index p_stride, const float* alpha, Index rows,
                         const TileRows& values, AheadBytes ahead, float* acc, Index acc_stride) {
    k.accumulate(p, p_stride, alpha, rows, values.shape.width, listed(values), as_rows(ahead, values.shape.width), acc,
                 acc_stride);
  }
  static void finish_output(Index, Index, const float*, const float*, float*, Index) {}

 private:
  static RowSet listed(const TileRows& tile) {
    return {tile.tile, C::row_bytes(tile.shape.width), tile.slots, tile.count, C::dtype};
  }
  /// What comes next may be of another form: its bytes count as rows of this one.
  static RowSet as_rows(AheadBytes ahead, Index width) {
    static constexpr auto in_order = [] {
      std::array<std::uint8_t, 64> slots{};
      for (std::uint8_t s = 0; s < 64; ++s) slots[s] = s;
      return slots;
    }();
    const Index row = C::row_bytes(width), rows = std::min<Index>(64, ahead.bytes / row);
    return {ahead.data, row, in_order.data(), static_cast<int>(rows), C::dtype};
  }
};

}  // namespace kvpare::cpu::fused

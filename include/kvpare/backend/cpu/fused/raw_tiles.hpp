// Tiles of raw rows inside other codecs: read as they lie, by the loops over raw pages.
#pragma once

#include <algorithm>

#include "../../../codec/raw.hpp"
#include "../canonical_tiles.hpp"

namespace kvpare::cpu::fused {

template <class C>
struct RawTiles : CanonicalTiles<C> {
  static void encode(const Kernels& k, TileShape shape, const float* rows, Index first, Index count, const TokenFacts&,
                     const float*, std::byte* tile) {
    k.from_float(rows, count * shape.width, C::dtype, tile + first * C::row_bytes(shape.width));
  }
  static void decode(const Kernels& k, TileShape shape, const std::byte* tile, Index slot, Position, const float*,
                     float* row) {
    k.to_float(tile + slot * C::row_bytes(shape.width), C::dtype, shape.width, row);
  }
  static void score(const Kernels& k, const std::byte* prepared, Index rows, const TileRows& keys, AheadBytes ahead,
                    float* out, Index out_stride) {
    k.dot(reinterpret_cast<const float*>(prepared), RawTiles::query_stride(keys.shape.width), rows, keys.shape.width,
          listed(keys), as_rows(ahead, keys.shape.width), out, out_stride);
  }
  static void accumulate(const Kernels& k, const float* p, Index p_stride, const float* alpha, Index rows,
                         const TileRows& values, AheadBytes ahead, float* acc, Index acc_stride) {
    k.accumulate(p, p_stride, alpha, rows, values.shape.width, listed(values), as_rows(ahead, values.shape.width), acc,
                 acc_stride);
  }

 private:
  static RowSet listed(const TileRows& tile) {
    return {tile.tile, C::row_bytes(tile.shape.width), tile.slots, tile.count, C::dtype};
  }
  /// What comes next may be of another form: its bytes count as rows of this one.
  static RowSet as_rows(AheadBytes ahead, Index width) {
    const Index row = C::row_bytes(width), rows = std::min<Index>(64, ahead.bytes / row);
    return {ahead.data, row, slots_in_order.data(), static_cast<int>(rows), C::dtype};
  }
};

}  // namespace kvpare::cpu::fused

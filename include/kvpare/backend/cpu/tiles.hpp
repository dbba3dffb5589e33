// Codecs on the CPU: for every codec of a cache a table of loops over its tiles.
//
// A codec whose bytes the CPU keeps in an order of its own (`Layout`) and attends to as codes has its loops in
// cpu/fused/; every other codec keeps its canonical bytes and runs through `GenericTiles`, which decodes the rows that are
// looked at. `tile_ops<C, side>` picks; `support<C>` tells.
#pragma once

#include <vector>

#include "../../codec/codec.hpp"
#include "../arguments.hpp"
#include "canonical_tiles.hpp"
#include "fused/folded_tiles.hpp"
#include "fused/group_tiles.hpp"
#include "fused/outlier_tiles.hpp"
#include "fused/qaq_tiles.hpp"
#include "fused/raw_tiles.hpp"
#include "fused/small_float_tiles.hpp"
#include "fused/sparse_tiles.hpp"
#include "fused/split_tiles.hpp"
#include "fused/unrotated_tiles.hpp"
#include "team.hpp"
#include "tile_ops.hpp"

namespace kvpare::cpu {

namespace detail {

/// Any codec: canonical bytes, rows decoded to floats where they are looked at, then the loops over raw rows.
template <class C>
struct GenericTiles : CanonicalTiles<C> {
  static void encode(const Kernels&, TileShape shape, const float* rows, Index first, Index count,
                     const TokenFacts& facts, const float* state, std::byte* tile) {
    encode_rows<C>(shape, rows, first, count, facts, state, tile);
  }
  static void decode(const Kernels&, TileShape shape, const std::byte* tile, Index slot, Position position,
                     const float* state, float* row) {
    decode_row<C>(shape, tile, slot, position, state, row);
  }
  /// The rows listed, as floats one after the other.
  static RowSet decoded(const TileRows& tile, float* memory) {
    for (int t = 0; t < tile.count; ++t)
      decode_row<C>(tile.shape, tile.tile, tile.slots[t], tile.positions != nullptr ? tile.positions[t] : Position{0},
                    tile.state, memory + t * tile.shape.width);
    return {reinterpret_cast<const std::byte*>(memory), tile.shape.width * 4, slots_in_order.data(), tile.count,
            DType::f32};
  }
  static float* memory_for(const TileRows& tile) {
    thread_local std::vector<float> memory;
    const auto size = static_cast<std::size_t>(64 * tile.shape.width);
    if (memory.size() < size) memory.resize(size);
    return memory.data();
  }
  static void score(const Kernels& k, const std::byte* prepared, Index rows, const TileRows& keys, AheadBytes,
                    float* out, Index out_stride) {
    k.dot(reinterpret_cast<const float*>(prepared), GenericTiles::query_stride(keys.shape.width), rows,
          keys.shape.width, decoded(keys, memory_for(keys)), {}, out, out_stride);
  }
  static void accumulate(const Kernels& k, const float* p, Index p_stride, const float* alpha, Index rows,
                         const TileRows& values, AheadBytes, float* acc, Index acc_stride) {
    k.accumulate(p, p_stride, alpha, rows, values.shape.width, decoded(values, memory_for(values)), {}, acc,
                 acc_stride);
  }
};

/// Calls `f.template operator()<Tiles, support>()` with the loops of a codec. The first that fits is taken.
template <Codec C, Side side, class F>
const TileOps* with_tiles(TileShape shape, const F& f) {
  if constexpr (FoldedCodec<C>) {
    const TileShape inner{shape.tokens, inner_width<C>(shape.width)};
    return with_tiles<typename C::Inner, side>(inner, [&]<class Tiles, Support support>() {
      return f.template operator()<fused::FoldedTiles<C, Tiles>, support>();
    });
  } else if constexpr (SplitCodec<C>) {
    return with_tiles<typename C::First, side>(C::first(shape), [&]<class A, Support a>() {
      return with_tiles<typename C::Second, side>(C::second(shape), [&]<class B, Support b>() {
        return f.template operator() < fused::SplitTiles<C, A, B>, a == b ? a : Support::generic > ();
      });
    });
  } else if constexpr (is_raw<C>) {
    return f.template operator()<fused::RawTiles<C>, Support::fused>();
  } else if constexpr (GroupCodec<C>) {
    if constexpr (fused::is_small_float<C>(false) || fused::is_small_float<C>(true)) {
      using Tiles = fused::SmallFloatTiles<C, side>;
      if (Tiles::fits(shape)) return f.template operator()<Tiles, Support::fused>();
    } else if constexpr (fused::has_group_loops<C, side>()) {
      using Tiles = fused::GroupTiles<C, side>;
      if (Tiles::fits(shape)) return f.template operator()<Tiles, Support::fused>();
    }
    return f.template operator()<GenericTiles<C>, Support::generic>();
  } else if constexpr (fused::is_qaq<C>) {
    using Tiles = fused::QaqTiles<C, side>;
    if (Tiles::fits(shape)) return f.template operator()<Tiles, Support::fused>();
    return f.template operator()<GenericTiles<C>, Support::generic>();
  } else if constexpr (fused::is_outliers<C>) {
    return with_tiles<typename C::Inner, side>(shape, [&]<class Tiles, Support support>() {
      if constexpr (support == Support::fused && requires { Tiles::decode_channel(shape, nullptr, 0, 0, nullptr); })
        return f.template operator()<fused::OutlierTiles<C, Tiles>, support>();
      else
        return f.template operator()<GenericTiles<C>, Support::generic>();
    });
  } else if constexpr (fused::is_unrotated<C> && side == Side::keys) {
    return with_tiles<typename C::Inner, side>(shape, [&]<class Tiles, Support support>() {
      if constexpr (support == Support::fused && fused::DecodesBlocks<Tiles>)
        if (shape.width <= fused::max_width) return f.template operator()<fused::UnrotatedTiles<C, Tiles>, support>();
      return f.template operator()<GenericTiles<C>, Support::generic>();
    });
  } else if constexpr (SparseCodec<C>) {
    return f.template operator()<fused::SparseTiles<C>, Support::fused>();
  } else {
    return f.template operator()<GenericTiles<C>, Support::generic>();
  }
}

}  // namespace detail

/// The loops for a codec on one side, or null when there is no such tile.
///
/// `probability_bits` 16 or 8: how finely fused loops over values hold the probabilities, see Options.
template <Codec C, Side side>
const TileOps* tile_ops(TileShape shape, int probability_bits) {
  if (!C::fits(shape)) return nullptr;
  return detail::with_tiles<C, side>(shape, [&]<class Tiles, Support support>() -> const TileOps* {
    if constexpr (side == Side::values && !std::is_same_v<Tiles, fused::NarrowOf<Tiles>>) {
      if (probability_bits == 8) return &detail::narrow_table_of<C, Tiles, support>;
    }
    return &detail::table_of<C, Tiles, support>;
  });
}
template <Codec C>
const TileOps* tile_ops(Side side, TileShape shape, int probability_bits) {
  return side == Side::keys ? tile_ops<C, Side::keys>(shape, probability_bits)
                            : tile_ops<C, Side::values>(shape, probability_bits);
}

}  // namespace kvpare::cpu

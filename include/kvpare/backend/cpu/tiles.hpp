// Codecs on the CPU: for every codec of a cache a table of loops over its tiles.
//
// A codec whose bytes the CPU keeps in an order of its own (`Layout`) and attends to as codes has its loops in
// cpu/fused/; every other codec keeps its canonical bytes and runs through `GenericTiles`, which decodes the rows that are
// looked at. `tile_ops<C, side>` picks; `support<C>` tells.
#pragma once

#include <array>
#include <cstring>
#include <vector>

#include "../../codec/codec.hpp"
#include "../arguments.hpp"
#include "fused/folded_tiles.hpp"
#include "fused/group_tiles.hpp"
#include "fused/outlier_tiles.hpp"
#include "fused/small_float_tiles.hpp"
#include "fused/unrotated_tiles.hpp"
#include "team.hpp"
#include "tile_ops.hpp"

namespace kvpare::cpu {

namespace detail {

/// Any codec: canonical bytes, rows decoded to floats where they are looked at, then the loops over raw rows.
template <class C>
struct GenericTiles {
  static Index tile_bytes(TileShape shape) { return C::tile_bytes(shape); }
  static void encode(const Kernels&, TileShape shape, const float* rows, Index first, Index count,
                     const TokenFacts& facts, const float* state, std::byte* tile) {
    encode_rows<C>(shape, rows, first, count, facts, state, tile);
  }
  static void decode(const Kernels&, TileShape shape, const std::byte* tile, Index slot, Position position,
                     const float* state, float* row) {
    decode_row<C>(shape, tile, slot, position, state, row);
  }
  /// Rows of a codec that moves them are canonically one after the other.
  static void move_rows(TileShape shape, const std::byte* from, Index from_slot, std::byte* to, Index to_slot,
                        Index count) {
    const Index row = C::tile_bytes({1, shape.width});
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

  /// The rows listed, as floats one after the other.
  static RowSet decoded(const TileRows& tile, float* memory) {
    static constexpr auto in_order = [] {
      std::array<std::uint8_t, 64> slots{};
      for (std::uint8_t s = 0; s < 64; ++s) slots[s] = s;
      return slots;
    }();
    for (int t = 0; t < tile.count; ++t)
      decode_row<C>(tile.shape, tile.tile, tile.slots[t], tile.positions != nullptr ? tile.positions[t] : Position{0},
                    tile.state, memory + t * tile.shape.width);
    return {reinterpret_cast<const std::byte*>(memory), tile.shape.width * 4, in_order.data(), tile.count, DType::f32};
  }
  static float* memory_for(const TileRows& tile) {
    thread_local std::vector<float> memory;
    const auto size = static_cast<std::size_t>(64 * tile.shape.width);
    if (memory.size() < size) memory.resize(size);
    return memory.data();
  }
  static void score(const Kernels& k, const std::byte* prepared, Index rows, const TileRows& keys, AheadBytes,
                    float* out, Index out_stride) {
    k.dot(reinterpret_cast<const float*>(prepared), query_stride(keys.shape.width), rows, keys.shape.width,
          decoded(keys, memory_for(keys)), {}, out, out_stride);
  }
  static void accumulate(const Kernels& k, const float* p, Index p_stride, const float* alpha, Index rows,
                         const TileRows& values, AheadBytes, float* acc, Index acc_stride) {
    k.accumulate(p, p_stride, alpha, rows, values.shape.width, decoded(values, memory_for(values)), {}, acc,
                 acc_stride);
  }
  static void finish_output(Index, Index, const float*, const float*, float*, Index) {}
};

}  // namespace detail

namespace detail {

template <class C, class Tiles, Support support>
inline constexpr TileOps table_of = ops_of<C, Tiles>(support, FoldedCodec<C>);

/// Calls `f.template operator()<Tiles, support>()` with the loops of a codec. The first that fits is taken.
template <Codec C, Side side, class Set, bool wide, class F>
const TileOps* with_tiles(TileShape shape, const F& f) {
  if constexpr (FoldedCodec<C>) {
    const TileShape inner{shape.tokens, inner_width<C>(shape.width)};
    return with_tiles<typename C::Inner, side, Set, wide>(inner, [&]<class Tiles, Support support>() {
      return f.template operator()<fused::FoldedTiles<C, Tiles>, support>();
    });
  } else if constexpr (GroupCodec<C>) {
    if constexpr (fused::is_small_float<C>(false) || fused::is_small_float<C>(true)) {
      using Tiles = fused::SmallFloatTiles<C, side, Set>;
      if (Tiles::fits(shape)) return f.template operator()<Tiles, Support::fused>();
    } else if constexpr (fused::has_group_loops<C, side>()) {
      using Tiles = fused::GroupTiles<C, side, Set, wide>;
      if (Tiles::fits(shape)) return f.template operator()<Tiles, Support::fused>();
    }
    return f.template operator()<GenericTiles<C>, Support::generic>();
  } else if constexpr (fused::is_outliers<C>) {
    return with_tiles<typename C::Inner, side, Set, wide>(shape, [&]<class Tiles, Support support>() {
      if constexpr (support == Support::fused && requires { Tiles::decode_channel(shape, nullptr, 0, 0, nullptr); })
        return f.template operator()<fused::OutlierTiles<C, Tiles, side, Set>, support>();
      else
        return f.template operator()<GenericTiles<C>, Support::generic>();
    });
  } else if constexpr (fused::is_unrotated<C> && side == Side::keys) {
    return with_tiles<typename C::Inner, side, Set, wide>(shape, [&]<class Tiles, Support support>() {
      if constexpr (support == Support::fused && fused::DecodesBlocks<Tiles>)
        return f.template operator()<fused::UnrotatedTiles<C, Tiles, Set>, support>();
      else
        return f.template operator()<GenericTiles<C>, Support::generic>();
    });
  } else {
    return f.template operator()<GenericTiles<C>, Support::generic>();
  }
}

template <Codec C, class Set>
const TileOps* ops_for(Side side, TileShape shape, int probability_bits) {
  const auto table = []<class Tiles, Support support>() -> const TileOps* { return &table_of<C, Tiles, support>; };
  if (side == Side::keys) return with_tiles<C, Side::keys, Set, true>(shape, table);
  return probability_bits == 8 ? with_tiles<C, Side::values, Set, false>(shape, table)
                               : with_tiles<C, Side::values, Set, true>(shape, table);
}

}  // namespace detail

/// The loops for a codec on one side, on an instruction set, or null when there is no such tile.
///
/// `probability_bits` 16 or 8: how finely fused loops over values hold the probabilities, see Options.
template <Codec C>
const TileOps* tile_ops(Side side, TileShape shape, Isa isa, int probability_bits) {
  if (!C::fits(shape)) return nullptr;
  if constexpr (GroupCodec<C> || FoldedCodec<C> || fused::is_outliers<C> || fused::is_unrotated<C>)
    return fused::with_set(isa,
                           [&](auto set) { return detail::ops_for<C, decltype(set)>(side, shape, probability_bits); });
  static constexpr TileOps ops = detail::ops_of<C, detail::GenericTiles<C>>(Support::generic, false);
  return &ops;
}

}  // namespace kvpare::cpu

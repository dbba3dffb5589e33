// What the CPU runs a codec with: a table of loops over its tiles.
#pragma once

#include "../../codec/split.hpp"
#include "fused/layout.hpp"
#include "kernels.hpp"

namespace kvpare::cpu {

/// The loops of one codec on one side; `k` says the instruction set. A tile lies at a 64-byte boundary. Nothing throws or
/// allocates, scratch aside.
struct TileOps {
  Support support = Support::generic;
  bool rows_move = true;
  bool folds = false;  // accumulators of values need `finish_output` before they mean anything
  bool reads_positions = false;  // TileRows must bring them

  Index (*tile_bytes)(TileShape shape) = nullptr;

  /// As Codec::encode, in this backend's order.
  void (*encode)(const Kernels& k, TileShape shape, const float* rows, Index first, Index count,
                 const TokenFacts& facts, const float* state, std::byte* tile) = nullptr;
  /// As Codec::decode.
  void (*decode)(const Kernels& k, TileShape shape, const std::byte* tile, Index slot, Position position,
                 const float* state, float* row) = nullptr;
  /// Rows to other slots of the same or another tile, codes and scales as they are; overlapping stretches of one tile as
  /// memmove. Null where rows do not move.
  void (*move_rows)(const Kernels& k, TileShape shape, const std::byte* from, Index from_slot, std::byte* to,
                    Index to_slot, Index count) = nullptr;
  /// A whole tile into the codec's canonical bytes, and back. The two tiles are different memory.
  void (*to_canonical)(const Kernels& k, TileShape shape, const std::byte* tile, std::byte* canonical) = nullptr;
  void (*from_canonical)(const Kernels& k, TileShape shape, const std::byte* canonical, std::byte* tile) = nullptr;

  // Keys. A query is prepared once per state, for any number of pages.

  /// Bytes of prepared queries; a multiple of 64.
  Index (*query_bytes)(Index rows, Index width) = nullptr;
  /// q [rows, q_stride] floats that include scale and log2(e).
  void (*prepare_query)(const Kernels& k, const float* q, Index q_stride, Index rows, Index width, const float* state,
                        std::byte* prepared) = nullptr;
  /// Formula  out[i * out_stride + t] = q_i·key'[slots[t]]
  void (*score)(const Kernels& k, const std::byte* prepared, Index rows, const TileRows& keys, AheadBytes ahead,
                float* out, Index out_stride) = nullptr;

  // Values. Accumulators are floats [rows, acc_stride], acc_stride a multiple of 16, in the space of what is stored.

  /// Formula  acc[i] = alpha_i * acc[i] + sum_t p[i * p_stride + t] * (what is stored in slots[t]);   0 <= p <= 1
  /// Alpha    one factor per row; null = 1. Where it is 0, the old acc is not read, whatever it holds.
  void (*accumulate)(const Kernels& k, const float* p, Index p_stride, const float* alpha, Index rows,
                     const TileRows& values, AheadBytes ahead, float* acc, Index acc_stride) = nullptr;
  /// What is stored becomes what it stands for; `sum` [rows] are the sums of all p that went into the accumulators.
  void (*finish_output)(Index rows, Index width, const float* state, const float* sum, float* acc,
                        Index acc_stride) = nullptr;

  // Values that add up in an arrangement of the codec's own, null for most. Rows that are accumulated together have one such
  // memory, at a 64-byte boundary: started, added to page by page, and turned into accumulators once, before finish_output.

  Index (*sums_bytes)(Index rows, Index width) = nullptr;
  void (*start_sums)(Index rows, Index width, std::byte* sums) = nullptr;
  /// As accumulate.
  void (*add_to_sums)(const Kernels& k, const float* p, Index p_stride, const float* alpha, Index rows,
                      const TileRows& values, AheadBytes ahead, std::byte* sums) = nullptr;
  void (*finish_sums)(const Kernels& k, Index rows, Index width, const float* state, std::byte* sums, float* acc,
                      Index acc_stride) = nullptr;

  // Where a stretch of a list costs much once, whatever its length.

  Index long_stretch = 0;            // stretches should have so many tokens; 0: as any
  const TileOps* of_short = nullptr;  // other loops over the same bytes, for short stretches and for many rows; or null
  Index short_tokens = 0, most_rows = 0;

  /// The loops for a stretch.
  const TileOps* loops(Index tokens, Index rows) const {
    return of_short != nullptr && (tokens < short_tokens || rows > most_rows) ? of_short : this;
  }
};

namespace fused {

/// The tiles that differ in `accumulate` only, which takes probabilities of 8 bits: Tiles::Narrow, the same where that is
/// not said.
template <class Tiles>
struct NarrowTiles {
  using Type = Tiles;
};
template <class Tiles>
  requires requires { typename Tiles::Narrow; }
struct NarrowTiles<Tiles> {
  using Type = typename Tiles::Narrow;
};
template <class Tiles>
using NarrowOf = typename NarrowTiles<Tiles>::Type;

}  // namespace fused

namespace detail {

/// Whether values add up in an arrangement of the codec's own: Tiles::has_sums, false where that is not said.
template <class Tiles>
inline constexpr bool has_sums = false;
template <class Tiles>
  requires requires { Tiles::has_sums; }
inline constexpr bool has_sums<Tiles> = Tiles::has_sums;

/// Whether accumulators are in a space of their own.
template <Codec C>
constexpr bool folds() {
  if constexpr (SplitCodec<C>)
    return folds<typename C::First>() || folds<typename C::Second>();
  else
    return FoldedCodec<C>;
}

template <class C, class Tiles>
constexpr TileOps ops_of(Support support, bool folds);

template <class C, class Tiles, Support support>
inline constexpr TileOps table_of = ops_of<C, Tiles>(support, folds<C>());

/// The same for probabilities of 8 bits.
template <class C, class Tiles, Support support>
inline constexpr TileOps narrow_table_of = [] {
  TileOps ops = table_of<C, Tiles, support>;
  ops.accumulate = fused::NarrowOf<Tiles>::accumulate;
  return ops;
}();

template <class C, class Tiles>
constexpr TileOps ops_of(Support support, bool folds) {
  TileOps ops;
  ops.support = support, ops.rows_move = C::rows_move, ops.folds = folds, ops.reads_positions = reads_positions<C>();
  ops.tile_bytes = Tiles::tile_bytes, ops.encode = Tiles::encode, ops.decode = Tiles::decode;
  if constexpr (C::rows_move) ops.move_rows = Tiles::move_rows;
  ops.to_canonical = Tiles::to_canonical, ops.from_canonical = Tiles::from_canonical;
  ops.query_bytes = Tiles::query_bytes, ops.prepare_query = Tiles::prepare_query, ops.score = Tiles::score;
  ops.accumulate = Tiles::accumulate, ops.finish_output = Tiles::finish_output;
  if constexpr (has_sums<Tiles>) {
    ops.folds = true;
    ops.sums_bytes = Tiles::sums_bytes, ops.start_sums = Tiles::start_sums;
    ops.add_to_sums = Tiles::add_to_sums, ops.finish_sums = Tiles::finish_sums;
  }
  if constexpr (requires { typename Tiles::Short; }) {
    ops.of_short = &table_of<C, typename Tiles::Short, Support::fused>, ops.short_tokens = Tiles::short_tokens, ops.most_rows = Tiles::most_rows;
    ops.long_stretch = Tiles::long_stretch;
  }
  return ops;
}

}  // namespace detail
}  // namespace kvpare::cpu

// What the CPU runs a codec with: a table of loops over its tiles.
#pragma once

#include "../../codec/codec.hpp"
#include "fused/layout.hpp"
#include "kernels.hpp"

namespace kvpare::cpu {

/// The loops of one codec on one side, for one instruction set. A tile lies at a 64-byte boundary. Nothing throws or
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
  void (*move_rows)(TileShape shape, const std::byte* from, Index from_slot, std::byte* to, Index to_slot,
                    Index count) = nullptr;
  /// A whole tile into the codec's canonical bytes, and back. The two tiles are different memory.
  void (*to_canonical)(TileShape shape, const std::byte* tile, std::byte* canonical) = nullptr;
  void (*from_canonical)(TileShape shape, const std::byte* canonical, std::byte* tile) = nullptr;

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
};

namespace detail {

template <class C, class Tiles>
constexpr TileOps ops_of(Support support, bool folds) {
  TileOps ops;
  ops.support = support, ops.rows_move = C::rows_move, ops.folds = folds, ops.reads_positions = reads_positions<C>();
  ops.tile_bytes = Tiles::tile_bytes, ops.encode = Tiles::encode, ops.decode = Tiles::decode;
  if constexpr (C::rows_move) ops.move_rows = Tiles::move_rows;
  ops.to_canonical = Tiles::to_canonical, ops.from_canonical = Tiles::from_canonical;
  ops.query_bytes = Tiles::query_bytes, ops.prepare_query = Tiles::prepare_query, ops.score = Tiles::score;
  ops.accumulate = Tiles::accumulate, ops.finish_output = Tiles::finish_output;
  return ops;
}

}  // namespace detail
}  // namespace kvpare::cpu

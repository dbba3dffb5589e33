// Tiles of codecs that are a linear transform around another codec: the other one's loops, and the transform at both ends.
#pragma once

#include <algorithm>
#include <vector>

#include "../tile_ops.hpp"

namespace kvpare::cpu::fused {

template <FoldedCodec C, class Tiles>
struct FoldedTiles;

/// The loops for short stretches, where Inner has such.
template <FoldedCodec C, class Tiles>
struct FoldedShort {};
template <FoldedCodec C, class Tiles>
  requires requires { typename Tiles::Short; }
struct FoldedShort<C, Tiles> {
  using Short = FoldedTiles<C, typename Tiles::Short>;
  static constexpr Index short_tokens = Tiles::short_tokens, most_rows = Tiles::most_rows;
  static constexpr Index long_stretch = Tiles::long_stretch;
};

/// `Tiles` are those of C::Inner.
template <FoldedCodec C, class Tiles>
struct FoldedTiles : FoldedShort<C, Tiles> {
  using Narrow = FoldedTiles<C, NarrowOf<Tiles>>;
  static constexpr bool has_sums = cpu::detail::has_sums<Tiles>;

  static const float* inner(Index width, const float* state) {
    return state == nullptr ? nullptr : state + C::own_state_floats(width);
  }
  /// What Inner stores of a row may be narrower.
  static TileShape inner(TileShape shape) { return {shape.tokens, inner_width<C>(shape.width)}; }
  static TileRows inner(TileRows rows) {
    rows.state = inner(rows.shape.width, rows.state);
    rows.shape = inner(rows.shape);
    return rows;
  }

  static Index tile_bytes(TileShape shape) { return Tiles::tile_bytes(inner(shape)); }
  static void encode(const Kernels& k, TileShape shape, const float* rows, Index first, Index count,
                     const TokenFacts& facts, const float* state, std::byte* tile) {
    const Index stored = inner(shape).width;
    float* turned = memory(count * shape.width);
    for (Index r = 0; r < count; ++r) {  // a narrower row leaves room for the next one to be turned in
      float* row = turned + r * stored;
      std::copy_n(rows + r * shape.width, shape.width, row);
      C::forward(shape.width, state, row);
    }
    Tiles::encode(k, inner(shape), turned, first, count, facts, inner(shape.width, state), tile);
  }
  static void decode(const Kernels& k, TileShape shape, const std::byte* tile, Index slot, Position position,
                     const float* state, float* row) {
    Tiles::decode(k, inner(shape), tile, slot, position, inner(shape.width, state), row);
    C::backward(shape.width, state, row);
  }
  /// As GroupTiles::decode_block, without what the transform does: `stretch` says that, gains [width] and shifts [width].
  static void decode_block(const Kernels& k, TileShape shape, const std::byte* tile, Index first, const float* state,
                           const float* gain, const float* shift, float* out) requires(!FoldedCodec<typename C::Inner>) && requires {
    C::stretch(shape.width, state, first);
    Tiles::decode_block(k, shape, tile, first, state, gain, shift, out);
  } {
    Tiles::decode_block(k, shape, tile, first, inner(shape.width, state), gain, shift, out);
  }
  static void stretch(Index width, const float* state, float* gain, float* shift) {
    for (Index c = 0; c < width; ++c) {
      const auto [factor, added] = C::stretch(width, state, c);
      gain[c] = factor, shift[c] = added;
    }
  }
  static void move_rows(const Kernels& k, TileShape shape, const std::byte* from, Index from_slot, std::byte* to,
                        Index to_slot, Index count) {
    Tiles::move_rows(k, inner(shape), from, from_slot, to, to_slot, count);
  }
  static void to_canonical(const Kernels& k, TileShape shape, const std::byte* from, std::byte* to) {
    Tiles::to_canonical(k, inner(shape), from, to);
  }
  static void from_canonical(const Kernels& k, TileShape shape, const std::byte* from, std::byte* to) {
    Tiles::from_canonical(k, inner(shape), from, to);
  }

  /// Behind the prepared queries: what each row adds to all of its scores.
  static Index query_bytes(Index rows, Index width) { return inner_bytes(rows, width) + round_up(rows * 4, 64); }
  static void prepare_query(const Kernels& k, const float* q, Index q_stride, Index rows, Index width,
                            const float* state, std::byte* prepared) {
    const Index stride = round_up(width, 16);
    float* folded = memory(rows * stride);
    float* bias = reinterpret_cast<float*>(prepared + inner_bytes(rows, width));
    for (Index i = 0; i < rows; ++i) {
      std::copy_n(q + i * q_stride, width, folded + i * stride);
      bias[i] = C::fold_query(width, state, folded + i * stride);
    }
    Tiles::prepare_query(k, folded, stride, rows, inner_width<C>(width), inner(width, state), prepared);
  }
  static void score(const Kernels& k, const std::byte* prepared, Index rows, const TileRows& keys, AheadBytes ahead,
                    float* out, Index out_stride) {
    Tiles::score(k, prepared, rows, inner(keys), ahead, out, out_stride);
    const float* bias = reinterpret_cast<const float*>(prepared + inner_bytes(rows, keys.shape.width));
    for (Index i = 0; i < rows; ++i)
      if (const float more = bias[i]; more != 0)
        for (int t = 0; t < keys.count; ++t) out[i * out_stride + t] += more;
  }

  static void accumulate(const Kernels& k, const float* p, Index p_stride, const float* alpha, Index rows,
                         const TileRows& values, AheadBytes ahead, float* acc, Index acc_stride) {
    Tiles::accumulate(k, p, p_stride, alpha, rows, inner(values), ahead, acc, acc_stride);
  }
  static void finish_output(Index rows, Index width, const float* state, const float* sum, float* acc,
                            Index acc_stride) {
    Tiles::finish_output(rows, inner_width<C>(width), inner(width, state), sum, acc, acc_stride);
    for (Index i = 0; i < rows; ++i) C::fold_output(width, state, sum[i], acc + i * acc_stride);
  }

  static Index sums_bytes(Index rows, Index width) requires(has_sums) {
    return Tiles::sums_bytes(rows, inner_width<C>(width));
  }
  static void start_sums(Index rows, Index width, std::byte* sums) requires(has_sums) {
    Tiles::start_sums(rows, inner_width<C>(width), sums);
  }
  static void add_to_sums(const Kernels& k, const float* p, Index p_stride, const float* alpha, Index rows,
                          const TileRows& values, AheadBytes ahead, std::byte* sums) requires(has_sums) {
    Tiles::add_to_sums(k, p, p_stride, alpha, rows, inner(values), ahead, sums);
  }
  static void finish_sums(const Kernels& k, Index rows, Index width, const float* state, std::byte* sums, float* acc,
                          Index acc_stride) requires(has_sums) {
    Tiles::finish_sums(k, rows, inner_width<C>(width), inner(width, state), sums, acc, acc_stride);
  }

 private:
  static Index inner_bytes(Index rows, Index width) { return Tiles::query_bytes(rows, inner_width<C>(width)); }
  /// One for each codec, so that a folded codec inside a folded one has its own.
  static float* memory(Index floats) {
    thread_local std::vector<float> scratch;
    if (static_cast<Index>(scratch.size()) < floats) scratch.resize(static_cast<std::size_t>(floats));
    return scratch.data();
  }
};

}  // namespace kvpare::cpu::fused

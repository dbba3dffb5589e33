// Tiles of two codecs side by side: the loops of either on its own channels.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../../../codec/split.hpp"
#include "../tile_ops.hpp"

namespace kvpare::cpu::fused {

/// `A` and `B` are the tiles of C::First and C::Second. A page has the tile of A | the tile of B, each in its own order. The
/// second begins where the first ends, at 64 bytes or not: the loops load from anywhere.
template <SplitCodec C, class A, class B>
struct SplitTiles {
  using Narrow = SplitTiles<C, NarrowOf<A>, NarrowOf<B>>;

  static Index tile_bytes(TileShape s) { return A::tile_bytes(C::first(s)) + B::tile_bytes(C::second(s)); }

  static void encode(const Kernels& k, TileShape s, const float* rows, Index first, Index count,
                     const TokenFacts& facts, const float* state, std::byte* tile) {
    const TileShape a = C::first(s), b = C::second(s);
    float* part = memory(count * s.width);
    C::gather(rows, s.width, 0, a.width, count, part);
    A::encode(k, a, part, first, count, facts, C::first_state(s.width, state), tile);
    C::gather(rows, s.width, a.width, b.width, count, part);
    B::encode(k, b, part, first, count, facts, C::second_state(s.width, state), tile + A::tile_bytes(a));
  }
  static void decode(const Kernels& k, TileShape s, const std::byte* tile, Index slot, Position position,
                     const float* state, float* row) {
    const TileShape a = C::first(s), b = C::second(s);
    A::decode(k, a, tile, slot, position, C::first_state(s.width, state), row);
    B::decode(k, b, tile + A::tile_bytes(a), slot, position, C::second_state(s.width, state), row + a.width);
  }
  static void move_rows(const Kernels& k, TileShape s, const std::byte* from, Index from_slot, std::byte* to,
                        Index to_slot, Index count) requires(C::rows_move) {
    const Index first = A::tile_bytes(C::first(s));
    A::move_rows(k, C::first(s), from, from_slot, to, to_slot, count);
    B::move_rows(k, C::second(s), from + first, from_slot, to + first, to_slot, count);
  }
  static void to_canonical(const Kernels& k, TileShape s, const std::byte* tile, std::byte* canonical) {
    const TileShape a = C::first(s), b = C::second(s);
    const Index first = A::tile_bytes(a);
    if constexpr (!C::rows_move) {
      A::to_canonical(k, a, tile, canonical);
      B::to_canonical(k, b, tile + first, canonical + C::First::tile_bytes(a));
    } else {
      std::vector<std::byte> parts(static_cast<std::size_t>(C::tile_bytes(s)));
      A::to_canonical(k, a, tile, parts.data());
      B::to_canonical(k, b, tile + first, parts.data() + C::First::tile_bytes(a));
      each_row(s, [&](Index in_parts, Index in_rows, Index bytes) {
        std::memcpy(canonical + in_rows, parts.data() + in_parts, static_cast<std::size_t>(bytes));
      });
    }
  }
  static void from_canonical(const Kernels& k, TileShape s, const std::byte* canonical, std::byte* tile) {
    const TileShape a = C::first(s), b = C::second(s);
    const Index first = A::tile_bytes(a);
    if constexpr (!C::rows_move) {
      A::from_canonical(k, a, canonical, tile);
      B::from_canonical(k, b, canonical + C::First::tile_bytes(a), tile + first);
    } else {
      std::vector<std::byte> parts(static_cast<std::size_t>(C::tile_bytes(s)));
      each_row(s, [&](Index in_parts, Index in_rows, Index bytes) {
        std::memcpy(parts.data() + in_parts, canonical + in_rows, static_cast<std::size_t>(bytes));
      });
      A::from_canonical(k, a, parts.data(), tile);
      B::from_canonical(k, b, parts.data() + C::First::tile_bytes(a), tile + first);
    }
  }

  static Index query_bytes(Index rows, Index width) {
    const Index n = C::first_width(width);
    return A::query_bytes(rows, n) + B::query_bytes(rows, width - n);
  }
  static void prepare_query(const Kernels& k, const float* q, Index q_stride, Index rows, Index width,
                            const float* state, std::byte* prepared) {
    const Index n = C::first_width(width);
    A::prepare_query(k, q, q_stride, rows, n, C::first_state(width, state), prepared);
    B::prepare_query(k, q + n, q_stride, rows, width - n, C::second_state(width, state),
                     prepared + A::query_bytes(rows, n));
  }
  static void score(const Kernels& k, const std::byte* prepared, Index rows, const TileRows& keys, AheadBytes ahead,
                    float* out, Index out_stride) {
    const auto [next_a, next_b] = halves(ahead, keys.shape);
    A::score(k, prepared, rows, first(keys), next_a, out, out_stride);
    const Index stride = 64;
    float* rest = memory(rows * stride);
    B::score(k, prepared + A::query_bytes(rows, C::first_width(keys.shape.width)), rows, second(keys), next_b, rest,
             stride);
    for (Index i = 0; i < rows; ++i) k.add_scaled(rest + i * stride, keys.count, 1.0f, out + i * out_stride);
  }

  static void accumulate(const Kernels& k, const float* p, Index p_stride, const float* alpha, Index rows,
                         const TileRows& values, AheadBytes ahead, float* acc, Index acc_stride) {
    const auto [next_a, next_b] = halves(ahead, values.shape);
    A::accumulate(k, p, p_stride, alpha, rows, first(values), next_a, acc, acc_stride);
    B::accumulate(k, p, p_stride, alpha, rows, second(values), next_b, acc + C::first_width(values.shape.width),
                  acc_stride);
  }
  static void finish_output(Index rows, Index width, const float* state, const float* sum, float* acc,
                            Index acc_stride) {
    const Index n = C::first_width(width);
    A::finish_output(rows, n, C::first_state(width, state), sum, acc, acc_stride);
    B::finish_output(rows, width - n, C::second_state(width, state), sum, acc + n, acc_stride);
  }

 private:
  struct Halves {
    AheadBytes a, b;
  };
  static Halves halves(AheadBytes ahead, TileShape s) {
    const Index n = std::min(A::tile_bytes(C::first(s)), ahead.bytes);
    return {{ahead.data, n}, {ahead.data + n, ahead.bytes - n}};
  }
  static TileRows first(TileRows rows) {
    const Index width = rows.shape.width;
    rows.shape = C::first(rows.shape), rows.state = C::first_state(width, rows.state);
    return rows;
  }
  static TileRows second(TileRows rows) {
    const Index width = rows.shape.width;
    rows.tile += A::tile_bytes(C::first(rows.shape));
    rows.shape = C::second(rows.shape), rows.state = C::second_state(width, rows.state);
    return rows;
  }
  /// Calls f(offset in the parts one after the other, offset in rows of both, bytes) for both parts of every row.
  template <class F>
  static void each_row(TileShape s, const F& f) {
    const Index a = C::First::tile_bytes(C::first({1, s.width})), b = C::Second::tile_bytes(C::second({1, s.width}));
    for (Index t = 0; t < s.tokens; ++t) {
      f(t * a, t * (a + b), a);
      f(s.tokens * a + t * b, t * (a + b) + a, b);
    }
  }
  /// One for each codec, as a part may be split again.
  static float* memory(Index floats) {
    thread_local std::vector<float> scratch;
    if (static_cast<Index>(scratch.size()) < floats) scratch.resize(static_cast<std::size_t>(floats));
    return scratch.data();
  }
};

}  // namespace kvpare::cpu::fused

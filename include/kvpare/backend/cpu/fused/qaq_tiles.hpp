// Tiles of tokens in different numbers of bits, attended to as codes (mixed.inl).
//
// Layout   codes block by block, each as layout.hpp has a tile of 16 tokens; everything else as in codec/qaq.hpp
#pragma once

#include <algorithm>

#include "../../../codec/qaq.hpp"
#include "../tile_ops.hpp"
#include "loops.hpp"

namespace kvpare::cpu::fused {

template <class C>
inline constexpr bool is_qaq = false;
template <int capacity_bits, QaqSide side, int outliers, QaqRule rule>
inline constexpr bool is_qaq<Qaq<capacity_bits, side, outliers, rule>> = true;

template <class C, Side side, bool wide_values = true>
struct QaqTiles {
  using Narrow = QaqTiles<C, side, false>;
  using Parts = typename C::Parts;
  static constexpr Index block = MixedTile::block, listed = C::listed;

  static constexpr bool fits(TileShape shape) {
    return C::fits(shape) && (C::coded_side == QaqSide::keys) == (side == Side::keys);
  }

  static Index tile_bytes(TileShape shape) { return C::tile_bytes(shape); }

  static void encode(const Kernels& k, TileShape shape, const float* rows, Index, Index count, const TokenFacts& facts,
                     const float* state, std::byte* tile) {
    const Parts at(shape);
    const Loops loops(k);
    Index first[MixedTile::most_blocks] = {};
    C::encode_with(
        shape, rows, count, facts, state, tile,
        [&](const std::uint8_t* bits) {
          C::starts(shape, bits, first);
          const Index last = shape.tokens / block - 1;
          std::fill(tile + first[last] + block * shape.width * bits[last] / 8, tile + at.scales, std::byte{0});
        },
        [&](Index place, int bits, const std::uint8_t* codes) {
          if (bits > 0) loops.place(layout(shape, bits), tile + first[place / block], place % block, codes);
        });
  }

  static void decode(const Kernels&, TileShape shape, const std::byte* tile, Index slot, Position, const float*,
                     float* row) {
    C::decode_with(shape, tile, slot, row, [&](Index place, Index first, int bits, std::uint8_t* codes) {
      take(layout(shape, bits), tile + first, place % block, codes);
    });
  }

  static void to_canonical(const Kernels&, TileShape shape, const std::byte* tile, std::byte* canonical) {
    each_row(shape, tile, [&](Index place, Index first, int bits) {
      std::uint8_t codes[max_width];
      take(layout(shape, bits), tile + first, place % block, codes);
      C::put_row(shape, canonical + first, place, bits, codes);
    });
    const Index end = C::code_end(shape, tile);
    std::copy(tile + end, tile + Parts(shape).end, canonical + end);
  }
  static void from_canonical(const Kernels& k, TileShape shape, const std::byte* canonical, std::byte* tile) {
    const Loops loops(k);
    each_row(shape, canonical, [&](Index place, Index first, int bits) {
      alignas(64) std::uint8_t codes[max_width];
      C::get_row(shape, canonical + first, place, bits, codes);
      loops.place(layout(shape, bits), tile + first, place % block, codes);
    });
    const Index end = C::code_end(shape, canonical);
    std::copy(canonical + end, canonical + Parts(shape).end, tile + end);
  }

  // Prepared queries: [rows] for blocks of 8 bits | [rows] each for 1 to 5 bits, which differ in what sums begin with
  // only | for outliers: [rows / 4][width] of four queries.

  static Index query_bytes(Index rows, Index width) {
    return rows * 6 * Index{sizeof(QueryRow)} + round_up(rows, 4) * width * 4;
  }
  static void prepare_query(const Kernels& k, const float* q, Index q_stride, Index rows, Index width, const float*,
                            std::byte* prepared) {
    const Layout whole{.side = side, .shape = {max_tokens, width}, .units = {1}, .group = width};
    auto* first = reinterpret_cast<QueryRow*>(prepared);
    const Loops loops(k);
    loops.prepare_query<8, false, true>(whole, Values{}, q, q_stride, rows, prepared);
    loops.prepare_query<1, false, false>(whole, Values{}, q, q_stride, rows,
                                         reinterpret_cast<std::byte*>(first + rows));
    for (int bits = 2; bits <= 5; ++bits)
      for (Index i = 0; i < rows; ++i) {
        QueryRow& to = first[bits * rows + i];
        to = first[rows + i];
        to.start[0] *= 1 << (bits - 1);  // codes count from the middle one
      }
    auto* fours = reinterpret_cast<float*>(first + 6 * rows);
    for (Index i = 0; i < round_up(rows, 4); ++i)
      for (Index c = 0; c < width; ++c)
        fours[i / 4 * 4 * width + 4 * c + i % 4] = i < rows ? q[i * q_stride + c] : 0.0f;
  }

  static void score(const Kernels& k, const std::byte* prepared, Index rows, const TileRows& keys, AheadBytes ahead,
                    float* out, Index out_stride) {
    if (keys.count == 0 || rows == 0) return;
    const MixedTile tile = tile_of(keys);
    const auto* first = reinterpret_cast<const QueryRow*>(prepared);
    MixedKeyCall call{.tile = tile,
                      .fours = reinterpret_cast<const float*>(first + 6 * rows),
                      .rows = rows,
                      .ahead = ahead,
                      .out = out,
                      .out_stride = out_stride};
    for (int bits = 1; bits <= 5; ++bits) call.queries[bits] = first + bits * rows;
    call.queries[8] = first;
    Loops(k).score_mixed_keys(call);
  }

  static void accumulate(const Kernels& k, const float* p, Index p_stride, const float* alpha, Index rows,
                         const TileRows& values, AheadBytes ahead, float* acc, Index acc_stride) {
    if (rows == 0) return;
    const MixedTile tile = tile_of(values);
    Loops(k).accumulate_mixed_values<wide_values>({.tile = tile,
                                                   .p = p,
                                                   .p_stride = p_stride,
                                                   .alpha = alpha,
                                                   .rows = rows,
                                                   .ahead = ahead,
                                                   .acc = acc,
                                                   .acc_stride = acc_stride});
  }
  static void finish_output(Index, Index, const float*, const float*, float*, Index) {}

 private:
  static Layout layout(TileShape shape, int bits) {
    MixedTile tile;
    tile.shape = shape, tile.side = side;
    return tile.layout(bits);
  }
  static void take(const Layout& from, const std::byte* codes, Index row, std::uint8_t* to) {
    for (Index c = 0; c < from.shape.width; ++c) to[c] = from.code(codes, row, c);
  }
  /// f(place, where the codes of its block begin, bits) for all rows that have codes.
  template <class F>
  static void each_row(TileShape shape, const std::byte* tile, const F& f) {
    std::uint8_t bits[MixedTile::most_blocks] = {};
    Index first[MixedTile::most_blocks] = {};
    C::read_bits(shape, tile, bits);
    C::starts(shape, bits, first);
    for (Index place = 0; place < shape.tokens; ++place)
      if (bits[place / block] > 0) f(place, first[place / block], int{bits[place / block]});
  }

  static MixedTile tile_of(const TileRows& rows) {
    const Parts at(rows.shape);
    MixedTile tile;
    Index first[MixedTile::most_blocks] = {};
    C::read_bits(rows.shape, rows.tile, tile.bits);
    C::starts(rows.shape, tile.bits, first);
    for (int b = 0; b < MixedTile::most_blocks; ++b) tile.codes[b] = rows.tile + first[b];
    tile.shape = rows.shape, tile.side = side, tile.outliers = listed;
    tile.scales = rows.tile + at.scales, tile.zeros = rows.tile + at.zeros;
    tile.deltas = rows.tile + at.deltas, tile.channels = rows.tile + at.channels;
    tile.slots = rows.slots, tile.count = rows.count, tile.gapless = rows.gapless;
    const auto* places = reinterpret_cast<const std::uint8_t*>(rows.tile + at.places);
    const auto last = static_cast<std::uint8_t>(rows.shape.tokens - 1);
    const bool all = rows.gapless && rows.count == rows.shape.tokens;
    if (all)
      for (Index t = 0; t < rows.shape.tokens; ++t) tile.places[t] = places[t] < last ? places[t] : last;
    else
      for (int t = 0; t < rows.count; ++t) tile.places[t] = std::min(places[rows.slots[t]], last);
    std::fill_n(tile.used, MixedTile::most_blocks, all);
    for (int t = 0; t < rows.count && !all; ++t) tile.used[tile.places[t] / block] = true;
    return tile;
  }
};

}  // namespace kvpare::cpu::fused

// Keys stored before their rotation, attended to as codes: 16 of them at a time become floats, turn, and meet the query.
//
// A block's tokens mostly stand one behind the other: the query turns back by the position of the first, and the keys by
// 0 … 15 positions, whose angles are made once with the query. A block with gaps has the angles of its own.
#pragma once

#include <algorithm>
#include <new>
#include <vector>

#include "../../../codec/unrotated.hpp"
#include "../tile_ops.hpp"
#include "loops.hpp"

namespace kvpare::cpu::fused {

template <class C>
inline constexpr bool is_unrotated = false;
template <Codec Inner>
inline constexpr bool is_unrotated<Unrotated<Inner>> = true;

/// Can the tiles of a codec give 16 keys as floats?
template <class Tiles>
concept DecodesBlocks = requires(const Kernels& k, TileShape s, const std::byte* tile, const float* state, float* out) {
  Tiles::decode_block(k, s, tile, s.tokens, state, state, state, out);
};

/// `Tiles` are those of C::Inner, for keys.
template <class C, DecodesBlocks Tiles>
struct UnrotatedTiles {
  static const float* inner(Index width, const float* state) { return C::inner_state(width, state); }

  static Index tile_bytes(TileShape s) { return Tiles::tile_bytes(s); }
  static void encode(const Kernels& k, TileShape s, const float* rows, Index first, Index count,
                     const TokenFacts& facts, const float* state, std::byte* tile) {
    thread_local std::vector<float> turned;
    turned.resize(static_cast<std::size_t>(count * s.width));
    const Rotation rotation(s.width, state);
    for (Index r = 0; r < count; ++r)
      C::turn_back(s.width, rotation, rows + r * s.width, facts.positions != nullptr ? facts.positions[r] : 0,
                   turned.data() + r * s.width);
    Tiles::encode(k, s, turned.data(), first, count, facts, inner(s.width, state), tile);
  }
  static void decode(const Kernels& k, TileShape s, const std::byte* tile, Index slot, Position position,
                     const float* state, float* row) {
    Tiles::decode(k, s, tile, slot, position, inner(s.width, state), row);
    Rotation(s.width, state).turn(row, position);
  }
  static void move_rows(const Kernels& k, TileShape s, const std::byte* from, Index from_slot, std::byte* to,
                        Index to_slot, Index count) {
    Tiles::move_rows(k, s, from, from_slot, to, to_slot, count);
  }
  static void to_canonical(const Kernels& k, TileShape s, const std::byte* from, std::byte* to) {
    Tiles::to_canonical(k, s, from, to);
  }
  static void from_canonical(const Kernels& k, TileShape s, const std::byte* from, std::byte* to) {
    Tiles::from_canonical(k, s, from, to);
  }

  static Index query_bytes(Index rows, Index) { return Index{sizeof(TurnedQuery)} + rows * turned_floats * 4; }
  static void prepare_query(const Kernels& k, const float* q, Index q_stride, Index rows, Index width,
                            const float* state, std::byte* prepared) {
    const Rotation rotation(width, state);
    TurnedQuery& to = *std::launder(reinterpret_cast<TurnedQuery*>(prepared));  // lives there by itself: nvcc has no new for it
    to.pairs = rotation.pairs, to.width = width;
    to.first_step = rotation.pairing == RopePairing::halves ? 1 : 2;
    to.partner = rotation.pairing == RopePairing::halves ? rotation.pairs : 1;
    std::copy_n(rotation.phases, max_width / 2, to.phases);
    Loops(k).turn_offsets(to);
    to.stretched = requires { Tiles::stretch(width, state, to.gain, to.shift); };
    if constexpr (requires { Tiles::stretch(width, state, to.gain, to.shift); })
      Tiles::stretch(width, inner(width, state), to.gain, to.shift);
    float* row = reinterpret_cast<float*>(prepared + sizeof(TurnedQuery));
    for (Index i = 0; i < rows; ++i, row += turned_floats, q += q_stride) {
      std::fill_n(row, max_width, 0.0f);
      for (Index pair = 0; pair < to.pairs; ++pair)
        row[pair] = q[pair * to.first_step], row[max_width / 2 + pair] = q[pair * to.first_step + to.partner];
      std::copy_n(q, width, row + max_width);
    }
  }
  static void score(const Kernels& k, const std::byte* prepared, Index rows, const TileRows& keys, AheadBytes ahead,
                    float* out, Index out_stride) {
    if (keys.count == 0 || rows == 0) return;
    const TurnedQuery& q = *std::launder(reinterpret_cast<const TurnedQuery*>(prepared));
    const float* rest = reinterpret_cast<const float*>(prepared + sizeof(TurnedQuery));
    const float* state = inner(keys.shape.width, keys.state);
    const std::uint64_t listed = listed_slots(keys);
    const Loops loops(k);
    alignas(64) float block[max_width * 16], cosines[max_width / 2 * 16], sines[max_width / 2 * 16];
    const Index lines = ceil_div(ahead.bytes, 64), blocks = keys.shape.tokens / 16;
    alignas(64) float turned[rows_at_once * turned_floats];
    Index turned_by = -1;  // position
    int seen = 0;          // of the slots listed
    bool straight = keys.gapless && keys.count == keys.shape.tokens && keys.positions != nullptr;
    if (straight) {
      Position bent = 0;
      for (int t = 0; t < keys.count; ++t) bent |= (keys.positions[t] - t) ^ keys.positions[0];
      straight = bent == 0;
    }
    for (Index b = 0; b < blocks; ++b) {
      for (Index i = lines * b / blocks; i < lines * (b + 1) / blocks; ++i)
        __builtin_prefetch(ahead.data + i * 64, 0, 3);
      if ((listed >> 16 * b & 0xffff) == 0) continue;
      Position positions[16] = {}, base = 0;
      bool in_line = true;
      if (straight) {
        base = keys.positions[16 * b];
      } else {
        const int before = seen;
        for (; seen < keys.count && keys.slots[seen] < 16 * (b + 1); ++seen)
          positions[keys.slots[seen] % 16] = keys.positions != nullptr ? keys.positions[seen] : 0;
        base = static_cast<Position>(positions[keys.slots[before] % 16] - keys.slots[before] % 16);
        for (int t = before; t < seen; ++t)
          in_line = in_line && positions[keys.slots[t] % 16] == base + keys.slots[t] % 16;
      }
      if (!in_line) loops.turn_block(q, positions, cosines, sines);
      Tiles::decode_block(k, keys.shape, keys.tile, 16 * b, state, q.stretched ? q.gain : nullptr, q.shift, block);
      for (Index i = 0; i < rows; i += rows_at_once) {
        const Index n = std::min(rows - i, rows_at_once);
        const float* from = rest + i * turned_floats;
        if (in_line && q.pairs > 0) {
          if (turned_by >= 0 && rows <= rows_at_once && base == turned_by + 16)
            loops.step_rows(q, n, turned);
          else
            loops.turn_rows(q, base, from, n, turned);
          turned_by = base;
        }
        loops.score_turned(q, block, in_line ? q.cosines : cosines, in_line ? q.sines : sines,
                           in_line && q.pairs > 0 ? turned : from, from, n, listed, 16 * b, out + i * out_stride,
                           out_stride);
      }
    }
  }
  // Values do not turn; these run where somebody codes them so all the same, in GenericTiles.
  static void accumulate(const Kernels&, const float*, Index, const float*, Index, const TileRows&, AheadBytes, float*,
                         Index) {}
  static void finish_output(Index, Index, const float*, const float*, float*, Index) {}

 private:
  static constexpr Index rows_at_once = 8;
};

}  // namespace kvpare::cpu::fused

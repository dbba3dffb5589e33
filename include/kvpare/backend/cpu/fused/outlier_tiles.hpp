// Tiles of codes with a list of single numbers beside them: the loops over the codes, and the list's share on top.
//
// A tile is  the codes' tile | deltas [2 per_side][tokens], halves | channels [2 per_side][tokens], bytes.
//
// Fits  where the codes' tile has loops of its own: so width is at most 256, and a channel is a byte
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "../../../codec/outliers.hpp"
#include "../tile_ops.hpp"
#include "loops.hpp"

namespace kvpare::cpu::fused {

template <class C>
inline constexpr bool is_outliers = false;
template <Codec Inner, Index per_side>
inline constexpr bool is_outliers<Outliers<Inner, per_side>> = true;

/// `Tiles` are those of C::Inner.
template <class C, class Tiles>
struct OutlierTiles {
  using Narrow = OutlierTiles<C, NarrowOf<Tiles>>;
  static constexpr Index slots = C::slots;
  static_assert(slots <= max_listed);

  static constexpr Index deltas_at(TileShape s) { return C::Inner::tile_bytes(s); }
  static constexpr Index channels_at(TileShape s) { return deltas_at(s) + slots * s.tokens * 2; }
  static ListedNumbers list_of(TileShape s, const std::byte* tile) {
    return {slots, s.tokens, tile + deltas_at(s), tile + channels_at(s)};
  }
  static Index tile_bytes(TileShape s) { return C::tile_bytes(s); }

  static void encode(const Kernels& k, TileShape s, const float* rows, Index first, Index count, const TokenFacts&,
                     const float* state, std::byte* tile) {
    alignas(64) float seen[max_width];
    std::uint16_t channels[slots] = {};
    for (Index r = 0; r < count; ++r, rows += s.width) {
      const Index slot = first + r, listed = C::split(s.width, state, rows, seen, channels);
      Tiles::encode(k, s, seen, slot, 1, {}, state, tile);
      for (Index i = 0; i < slots; ++i) {
        const Index c = i < listed ? channels[i] : 0;
        const std::uint16_t delta =
            i < listed ? C::delta_of(rows[c], Tiles::decode_channel(s, tile, slot, c, state)) : std::uint16_t{0};
        std::memcpy(tile + deltas_at(s) + (i * s.tokens + slot) * 2, &delta, 2);
        tile[channels_at(s) + i * s.tokens + slot] = static_cast<std::byte>(c);
      }
    }
  }
  static void decode(const Kernels& k, TileShape s, const std::byte* tile, Index slot, Position, const float* state,
                     float* row) {
    Tiles::decode(k, s, tile, slot, 0, state, row);
    for (Index i = 0; i < slots; ++i)
      if (const Index c = channel(s, tile, i, slot); c < s.width) row[c] += delta(s, tile, i, slot);
  }
  static void decode_block(const Kernels& k, TileShape s, const std::byte* tile, Index first, const float* state,
                           const float* gain, const float* shift, float* out) requires requires {
    Tiles::decode_block(k, s, tile, first, state, gain, shift, out);
  }
  {
    Tiles::decode_block(k, s, tile, first, state, gain, shift, out);
    Loops(k).add_listed(list_of(s, tile), first, s.width, gain, out);
  }

  static void move_rows(const Kernels& k, TileShape s, const std::byte* from, Index from_slot, std::byte* to,
                        Index to_slot, Index count) {
    Tiles::move_rows(k, s, from, from_slot, to, to_slot, count);
    for (Index i = 0; i < slots; ++i) {
      const Index at = deltas_at(s) + i * s.tokens * 2, channels = channels_at(s) + i * s.tokens;
      std::memmove(to + at + to_slot * 2, from + at + from_slot * 2, static_cast<std::size_t>(count * 2));
      std::memmove(to + channels + to_slot, from + channels + from_slot, static_cast<std::size_t>(count));
    }
  }
  static void to_canonical(const Kernels& k, TileShape s, const std::byte* tile, std::byte* canonical) {
    std::vector<std::byte> codes(static_cast<std::size_t>(C::Inner::tile_bytes(s)));
    Tiles::to_canonical(k, s, tile, codes.data());
    const Index inner = C::Inner::tile_bytes({1, s.width});
    for (Index t = 0; t < s.tokens; ++t) {
      std::byte* row = canonical + t * C::row_bytes(s.width);
      std::copy_n(codes.data() + t * inner, inner, row);
      for (Index i = 0; i < slots; ++i) {
        std::copy_n(tile + deltas_at(s) + (i * s.tokens + t) * 2, 2, row + inner + 2 * i);
        row[inner + 2 * slots + i] = tile[channels_at(s) + i * s.tokens + t];
      }
    }
  }
  static void from_canonical(const Kernels& k, TileShape s, const std::byte* canonical, std::byte* tile) {
    std::vector<std::byte> codes(static_cast<std::size_t>(C::Inner::tile_bytes(s)));
    const Index inner = C::Inner::tile_bytes({1, s.width});
    for (Index t = 0; t < s.tokens; ++t) {
      const std::byte* row = canonical + t * C::row_bytes(s.width);
      std::copy_n(row, inner, codes.data() + t * inner);
      for (Index i = 0; i < slots; ++i) {
        std::copy_n(row + inner + 2 * i, 2, tile + deltas_at(s) + (i * s.tokens + t) * 2);
        tile[channels_at(s) + i * s.tokens + t] = row[inner + 2 * slots + i];
      }
    }
    Tiles::from_canonical(k, s, codes.data(), tile);
  }

  /// Behind the prepared queries: the rows as floats [rows][max_width], for the list.
  static Index query_bytes(Index rows, Index width) { return Tiles::query_bytes(rows, width) + rows * max_width * 4; }
  static void prepare_query(const Kernels& k, const float* q, Index q_stride, Index rows, Index width,
                            const float* state, std::byte* prepared) {
    Tiles::prepare_query(k, q, q_stride, rows, width, state, prepared);
    float* floats = reinterpret_cast<float*>(prepared + Tiles::query_bytes(rows, width));
    for (Index i = 0; i < rows; ++i, floats += max_width)
      std::fill(std::copy_n(q + i * q_stride, width, floats), floats + max_width, 0.0f);
  }
  static void score(const Kernels& k, const std::byte* prepared, Index rows, const TileRows& keys, AheadBytes ahead,
                    float* out, Index out_stride) {
    if (keys.count == 0 || rows == 0) return;
    Tiles::score(k, prepared, rows, keys, ahead, out, out_stride);
    Loops(k).score_listed(list_of(keys.shape, keys.tile), keys,
                          reinterpret_cast<const float*>(prepared + Tiles::query_bytes(rows, keys.shape.width)), rows,
                          out, out_stride);
  }
  static void accumulate(const Kernels& k, const float* p, Index p_stride, const float* alpha, Index rows,
                         const TileRows& values, AheadBytes ahead, float* acc, Index acc_stride) {
    Tiles::accumulate(k, p, p_stride, alpha, rows, values, ahead, acc, acc_stride);
    if (values.count > 0)
      Loops(k).accumulate_listed(list_of(values.shape, values.tile), values, p, p_stride, rows, acc, acc_stride);
  }
  static void finish_output(Index, Index, const float*, const float*, float*, Index) {}

 private:
  static Index channel(TileShape s, const std::byte* tile, Index i, Index slot) {
    return std::to_integer<Index>(tile[channels_at(s) + i * s.tokens + slot]);
  }
  static float delta(TileShape s, const std::byte* tile, Index i, Index slot) {
    std::uint16_t bits = 0;
    std::memcpy(&bits, tile + deltas_at(s) + (i * s.tokens + slot) * 2, 2);
    return kvpare::detail::half_to_float(bits);
  }
};

}  // namespace kvpare::cpu::fused

// Tiles of tokens in different numbers of bits: stretches of equal bits are group-quantised tiles, and run as those.
//
// Layout   codes, stretch by stretch (blocks that follow each other with the same bits), each as layout.hpp has a tile of
//          that many tokens; then up to tokens * width * capacity_bits / 8 | scales, then zeros, of the first stretch, of the
//          second, … | the rest as in codec/qaq.hpp
// Order    Stretches have their tokens by place. Scores come out in that order and go to their slots, probabilities go the
//          other way.
#pragma once

#include <algorithm>

#include "../../../codec/qaq.hpp"
#include "../tile_ops.hpp"
#include "sets.hpp"

namespace kvpare::cpu::fused {

template <class C>
inline constexpr bool is_qaq = false;
template <int capacity_bits, QaqSide side, int outliers, QaqRule rule>
inline constexpr bool is_qaq<Qaq<capacity_bits, side, outliers, rule>> = true;

template <class C, Side side, class Set, bool wide_values>
struct QaqTiles {
  using Parts = typename C::Parts;
  static constexpr Index block = kvpare::detail::qaq_block, listed = C::listed;

  static constexpr bool fits(TileShape shape) {
    return C::fits(shape) && (C::coded_side == QaqSide::keys) == (side == Side::keys);
  }

  /// Places [first, first + shape.tokens), as a tile of their own.
  struct Stretch {
    Index first = 0;
    Layout layout;
    Index codes = 0;   // where they begin
    Index scales = 0;  // likewise; the zeros follow

    /// What `layout` calls the tile: its scales lie behind as many bytes as the codes have.
    const std::byte* tile(const std::byte* whole) const { return whole + scales - layout.code_bytes(); }
    std::byte* tile(std::byte* whole) const { return whole + scales - layout.code_bytes(); }
  };
  struct Stretches {
    Stretch all[kvpare::detail::qaq_most_blocks];
    int count = 0;
    int of_block[kvpare::detail::qaq_most_blocks] = {};

    Stretches(TileShape shape, const std::uint8_t* bits) {
      Index codes = 0, scales = Parts(shape).scales;
      for (Index b = 0; b < shape.tokens / block; ++b) {
        if (count > 0 && bits[b] == bits[b - 1]) {
          all[count - 1].layout.shape.tokens += block;
        } else {
          Stretch& s = all[count++];
          s.first = b * block, s.codes = codes, s.scales = scales;
          s.layout = {.side = side,
                      .shape = {block, shape.width},
                      .units = {bits[b]},
                      .flip = side == Side::values && bits[b] > 0 ? 1 << (bits[b] - 1) : 0,
                      .along = Along::channels,
                      .group = shape.width,
                      .scale = ScaleType::f16,
                      .zero = ZeroType::minimum};
        }
        of_block[b] = count - 1;
        codes += block * shape.width * bits[b] / 8, scales += 4 * block;
      }
    }
    static Stretches of(TileShape shape, const std::byte* tile) {
      std::uint8_t bits[kvpare::detail::qaq_most_blocks] = {};
      C::read_bits(shape, tile, bits);
      return {shape, bits};
    }
    const Stretch& at(Index place) const { return all[of_block[place / block]]; }
  };

  static Index tile_bytes(TileShape shape) { return C::tile_bytes(shape); }

  static void encode(const Kernels&, TileShape shape, const float* rows, Index, Index count, const TokenFacts& facts,
                     const float* state, std::byte* tile) {
    Stretches stretches(shape, std::array<std::uint8_t, kvpare::detail::qaq_most_blocks>{}.data());
    C::encode_with(
        shape, rows, count, facts, state, tile,
        [&](const kvpare::detail::QaqPlan& plan) {
          stretches = Stretches(shape, plan.bits);
          const Stretch& last = stretches.all[stretches.count - 1];
          const Index end = last.codes + last.layout.code_bytes();
          std::fill(tile + end, tile + Parts(shape).scales, std::byte{0});
        },
        [&](Index place, int bits, const std::uint8_t* codes, std::uint16_t scale, std::uint16_t zero) {
          const Stretch& s = stretches.at(place);
          put_bits(s, tile, place, scale, zero);
          if (bits > 0) Set::place(s.layout, tile + s.codes, place - s.first, codes);
        });
  }

  static void decode(const Kernels&, TileShape shape, const std::byte* tile, Index slot, Position, const float*,
                     float* row) {
    const Index place = C::place_of(shape, tile, slot);
    const Stretches stretches = Stretches::of(shape, tile);
    const Stretch& s = stretches.at(place);
    const GroupBits bits = s.layout.bits(s.tile(tile), place - s.first);
    const float scale = number(bits.scale), zero = number(bits.zero);
    for (Index c = 0; c < shape.width; ++c)
      row[c] = s.layout.units.bits == 0
                   ? zero
                   : C::value(scale, s.layout.code(tile + s.codes, place - s.first, c), zero);
    C::add_outliers(shape, tile, slot, row);
  }

  static void to_canonical(TileShape shape, const std::byte* tile, std::byte* canonical) {
    const Parts at(shape);
    const Stretches stretches = Stretches::of(shape, tile);
    std::copy(tile + at.deltas, tile + at.end, canonical + at.deltas);
    Index to = 0;
    std::uint8_t codes[max_width];
    for (Index place = 0; place < shape.tokens; ++place) {
      const Stretch& s = stretches.at(place);
      const GroupBits bits = s.layout.bits(s.tile(tile), place - s.first);
      kvpare::detail::put_bytes(canonical + at.scales + 2 * place, bits.scale, 2);
      kvpare::detail::put_bytes(canonical + at.zeros + 2 * place, bits.zero, 2);
      if (s.layout.units.bits == 0) continue;
      for (Index c = 0; c < shape.width; ++c) codes[c] = s.layout.code(tile + s.codes, place - s.first, c);
      kvpare::detail::with_qaq_bits(s.layout.units.bits,
                                    [&]<int b>() { kvpare::detail::pack_codes<b>(codes, shape.width, canonical + to); });
      to += shape.width * s.layout.units.bits / 8;
    }
    std::copy(tile + to, tile + at.scales, canonical + to);
  }
  static void from_canonical(TileShape shape, const std::byte* canonical, std::byte* tile) {
    const Parts at(shape);
    const Stretches stretches = Stretches::of(shape, canonical);
    std::copy(canonical + at.deltas, canonical + at.end, tile + at.deltas);
    Index from = 0;
    alignas(64) std::uint8_t codes[max_width];
    for (Index place = 0; place < shape.tokens; ++place) {
      const Stretch& s = stretches.at(place);
      put_bits(s, tile, place,
               static_cast<std::uint16_t>(kvpare::detail::get_bytes(canonical + at.scales + 2 * place, 2)),
               static_cast<std::uint16_t>(kvpare::detail::get_bytes(canonical + at.zeros + 2 * place, 2)));
      if (s.layout.units.bits == 0) continue;
      kvpare::detail::with_qaq_bits(
          s.layout.units.bits, [&]<int b>() { kvpare::detail::unpack_codes<b>(canonical + from, shape.width, codes); });
      Set::place(s.layout, tile + s.codes, place - s.first, codes);
      from += shape.width * s.layout.units.bits / 8;
    }
    std::copy(canonical + from, canonical + at.scales, tile + from);
  }

  // Prepared queries: [rows] for blocks of 8 bits | [rows] each for 1 to 5 bits, which differ in what sums begin with only |
  // for outliers: [rows / 4][width] of four queries.

  static Index query_bytes(Index rows, Index width) {
    return rows * 6 * Index{sizeof(QueryRow)} + round_up(rows, 4) * width * 4;
  }
  static const QueryRow* query_of(const std::byte* prepared, Index rows, int bits) {
    return reinterpret_cast<const QueryRow*>(prepared) + (bits == 8 ? 0 : bits * rows);
  }
  static void prepare_query(const Kernels&, const float* q, Index q_stride, Index rows, Index width, const float*,
                            std::byte* prepared) {
    const Layout layout{.side = side, .shape = {max_tokens, width}, .units = {4}, .group = width};
    auto* first = reinterpret_cast<QueryRow*>(prepared);
    Set::template prepare_query<8, false, true>(layout, Values{}, q, q_stride, rows, prepared);
    Set::template prepare_query<1, false, false>(layout, Values{}, q, q_stride, rows,
                                                 reinterpret_cast<std::byte*>(first + rows));
    for (int bits = 2; bits <= 5; ++bits)
      for (Index i = 0; i < rows; ++i) {
        QueryRow& to = first[bits * rows + i];
        to = first[rows + i];
        to.start[0] *= 1 << (bits - 1);  // sums count from the middle code
      }
    auto* fours = reinterpret_cast<float*>(first + 6 * rows);
    for (Index i = 0; i < round_up(rows, 4); ++i)
      for (Index c = 0; c < width; ++c)
        fours[i / 4 * 4 * width + 4 * c + i % 4] = i < rows ? q[i * q_stride + c] : 0.0f;
  }

  static void score(const Kernels& k, const std::byte* prepared, Index rows, const TileRows& keys, AheadBytes ahead,
                    float* out, Index out_stride) {
    if (keys.count == 0 || rows == 0) return;
    const TileShape shape = keys.shape;
    const Parts at(shape);
    const Stretches stretches = Stretches::of(shape, keys.tile);
    std::uint8_t places[max_tokens];
    bool used[kvpare::detail::qaq_most_blocks] = {};
    for (int t = 0; t < keys.count; ++t) {
      places[t] = static_cast<std::uint8_t>(C::place_of(shape, keys.tile, keys.slots[t]));
      used[stretches.of_block[places[t] / block]] = true;
    }
    alignas(64) float deltas[listed * max_tokens + 16];
    k.to_float(keys.tile + at.deltas, DType::f16, listed * shape.tokens, deltas);
    const auto* fours = reinterpret_cast<const float*>(reinterpret_cast<const QueryRow*>(prepared) + 6 * rows);

    alignas(64) float scores[at_once * max_tokens];
    for (Index i = 0, n; i < rows; i += n) {
      n = std::min(at_once, rows - i);
      for (int r = 0; r < stretches.count; ++r) {
        const Stretch& s = stretches.all[r];
        const int bits = s.layout.units.bits;
        if (!used[r]) continue;
        const QueryRow* q = query_of(prepared, rows, bits == 0 ? 1 : bits) + i;
        float* to = scores + s.first;
        if (bits == 0) {
          float zeros[max_tokens];
          k.to_float(s.tile(keys.tile) + 2 * s.layout.shape.tokens, DType::f16, s.layout.shape.tokens, zeros);
          for (Index j = 0; j < n; ++j)
            for (Index t = 0; t < s.layout.shape.tokens; ++t) to[j * max_tokens + t] = q[j].sum[0] * zeros[t];
          continue;
        }
        const TileRows all{s.tile(keys.tile), s.layout.shape, nullptr, nullptr, static_cast<int>(s.layout.shape.tokens)};
        kvpare::detail::with_qaq_bits(bits, [&]<int b>() {
          Set::template score_keys<b, false, b == 8>({s.layout, values(b), reinterpret_cast<const std::byte*>(q), n, all,
                                                      part(ahead, shape, s, i), to, max_tokens,
                                                      keys.tile + s.codes});
        });
      }
      for (Index j = 0; j < n; j += 4)
        to_slots(scores + j * max_tokens, places, fours + (i + j) * shape.width, deltas, keys, std::min<Index>(4, n - j),
                 out + (i + j) * out_stride, out_stride);
    }
  }

  static void accumulate(const Kernels& k, const float* p, Index p_stride, const float* alpha, Index rows,
                         const TileRows& tile, AheadBytes ahead, float* acc, Index acc_stride) {
    if (rows == 0) return;
    const TileShape shape = tile.shape;
    const Parts at(shape);
    const Stretches stretches = Stretches::of(shape, tile.tile);
    std::uint8_t places[max_tokens];
    bool used[kvpare::detail::qaq_most_blocks] = {};
    for (int t = 0; t < tile.count; ++t) {
      places[t] = static_cast<std::uint8_t>(C::place_of(shape, tile.tile, tile.slots[t]));
      used[stretches.of_block[places[t] / block]] = true;
    }
    alignas(64) float deltas[listed * max_tokens + 16], sorted[at_once * max_tokens];
    k.to_float(tile.tile + at.deltas, DType::f16, listed * shape.tokens, deltas);
    for (Index i = 0, n; i < rows; i += n) {
      n = std::min(at_once, rows - i);
      const float* factor = alpha == nullptr ? nullptr : alpha + i;
      float* to = acc + i * acc_stride;
      if (tile.count < shape.tokens) std::fill_n(sorted, n * max_tokens, 0.0f);
      for (Index j = 0; j < n; ++j)
        for (int t = 0; t < tile.count; ++t) sorted[j * max_tokens + places[t]] = p[(i + j) * p_stride + t];
      float constant[at_once] = {};
      for (int r = 0; r < stretches.count; ++r) {
        const Stretch& s = stretches.all[r];
        const Index tokens = s.layout.shape.tokens;
        if (!used[r]) continue;
        if (s.layout.units.bits == 0) {
          float zeros[max_tokens];
          k.to_float(s.tile(tile.tile) + 2 * tokens, DType::f16, tokens, zeros);
          for (Index j = 0; j < n; ++j)
            for (Index t = 0; t < tokens; ++t) constant[j] += sorted[j * max_tokens + s.first + t] * zeros[t];
          continue;
        }
        const TileRows all{s.tile(tile.tile), s.layout.shape, nullptr, nullptr, static_cast<int>(tokens)};
        kvpare::detail::with_qaq_bits(s.layout.units.bits, [&]<int b>() {
          if constexpr (b == 2 || b == 4 || b == 8)
            Set::template accumulate_values<b, Levels::plain, wide_values>(
                {s.layout, values(b), sorted + s.first, max_tokens, factor, n, all, part(ahead, shape, s, i), to,
                 acc_stride, tile.tile + s.codes});
        });
        factor = ones;
      }
      for (Index j = 0; j < n; ++j) {
        float* row = to + j * acc_stride;
        if (factor == nullptr || factor == ones) {
          if (constant[j] != 0)
            for (Index c = 0; c < shape.width; ++c) row[c] += constant[j];
        } else {
          for (Index c = 0; c < shape.width; ++c) row[c] = (factor[j] == 0 ? 0.0f : factor[j] * row[c]) + constant[j];
        }
      }
      add_outliers(p + i * p_stride, p_stride, n, tile, deltas, to, acc_stride);
    }
  }
  static void finish_output(Index, Index, const float*, const float*, float*, Index) {}

 private:
  static constexpr Index at_once = 28;  // query rows
  static constexpr float ones[at_once] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  using Four = float __attribute__((vector_size(16)));

  static float number(std::uint32_t bits) { return kvpare::detail::half_to_float(static_cast<std::uint16_t>(bits)); }
  static Values values(int bits) {
    Values v;
    v.shift = static_cast<float>(1 << (bits - 1));
    return v;
  }
  static void put_bits(const Stretch& s, std::byte* tile, Index place, std::uint16_t scale, std::uint16_t zero) {
    std::byte* at = tile + s.scales + 2 * (place - s.first);
    kvpare::detail::put_bytes(at, scale, 2);
    kvpare::detail::put_bytes(at + 2 * s.layout.shape.tokens, zero, 2);
  }
  /// What is read ahead during a stretch.
  static AheadBytes part(AheadBytes ahead, TileShape shape, const Stretch& s, Index row) {
    if (row > 0) return {};
    const Index from = ahead.bytes * s.first / shape.tokens,
                to = ahead.bytes * (s.first + s.layout.shape.tokens) / shape.tokens;
    return {ahead.data + from, to - from};
  }

  /// Scores by place, of up to four rows, to slots; and what outliers add.
  static void to_slots(const float* scores, const std::uint8_t* places, const float* q, const float* deltas,
                       const TileRows& keys, Index rows, float* out, Index out_stride) {
    const Index tokens = keys.shape.tokens;
    const std::byte* channels = keys.tile + Parts(keys.shape).channels;
    for (int t = 0; t < keys.count; ++t) {
      Four sum = {};
      for (Index x = 0; x < listed; ++x) {
        const Index slot = x * tokens + keys.slots[t];
        const Index c = std::min<Index>(std::to_integer<Index>(channels[slot]), keys.shape.width - 1);
        Four v;
        std::memcpy(&v, q + 4 * c, 16);
        sum += v * deltas[slot];
      }
      for (Index j = 0; j < rows; ++j) out[j * out_stride + t] = scores[j * max_tokens + places[t]] + sum[j];
    }
  }

  static void add_outliers(const float* p, Index p_stride, Index rows, const TileRows& tile, const float* deltas,
                           float* acc, Index acc_stride) {
    const Index tokens = tile.shape.tokens;
    const std::byte* channels = tile.tile + Parts(tile.shape).channels;
    for (int t = 0; t < tile.count; ++t)
      for (Index x = 0; x < listed; ++x) {
        const Index slot = x * tokens + tile.slots[t];
        const Index c = std::min<Index>(std::to_integer<Index>(channels[slot]), tile.shape.width - 1);
        for (Index j = 0; j < rows; ++j) acc[j * acc_stride + c] += p[j * p_stride + t] * deltas[slot];
      }
  }
};

}  // namespace kvpare::cpu::fused

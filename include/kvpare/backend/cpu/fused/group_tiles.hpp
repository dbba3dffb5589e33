// Tiles of group-quantised codecs, attended to as codes. The bytes are those of layout.hpp.
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>

#include "../../../codec/group.hpp"
#include "../tile_ops.hpp"
#include "loops.hpp"

namespace kvpare::cpu::fused {

/// Whether scales may be negative: such values take one more step per code.
template <GroupCodec C>
constexpr bool signed_scales() {
  if constexpr (C::form.ternary || requires { C::positive_scales; })
    return false;
  else if constexpr (requires { C::spec; })
    return C::spec.fit == std::remove_cvref_t<decltype(C::spec.fit)>::extreme;
  else
    return C::form.scale == ScaleType::f16 || C::form.scale == ScaleType::f32;
}

/// A table of levels as signed bytes: level ≈ unit * bytes[code].
///
/// Exact where a unit of a power of two makes all of them integers up to 127 (ggml's iq4_nl, E2M1, signs). Otherwise the
/// largest is 127 units, and no level is off by more than half a unit, 1/254 of the largest: far less than half the
/// distance between two of 16 levels.
struct LevelTable {
  float unit = 1;
  std::array<std::int8_t, 16> bytes{};
};
template <GroupCodec C>
constexpr LevelTable level_table() {
  LevelTable table;
  float largest = 0;
  for (float level : C::levels) largest = std::max(largest, level < 0 ? -level : level);
  bool exact = false;
  for (float unit = 1; unit >= 0.125f && !exact; unit /= 2) {
    exact = true;
    for (float level : C::levels) {
      const float steps = level / unit;
      exact = exact && steps >= -127 && steps <= 127 && static_cast<float>(static_cast<int>(steps)) == steps;
    }
    if (exact) table.unit = unit;
  }
  if (!exact) table.unit = largest / 127;
  for (std::size_t c = 0; c < C::levels.size(); ++c) {
    const float steps = C::levels[c] / table.unit;
    table.bytes[c] = static_cast<std::int8_t>(static_cast<int>(steps + (steps < 0 ? -0.5f : 0.5f)));
  }
  return table;
}

/// Does the state say the levels?
template <class C>
concept RuntimeLevels = requires(const float* state, float* levels) { C::runtime_levels(state, levels); };

/// The same of levels that the state says: the largest is 127 units. Levels too large to have an inverse count as 0.
template <RuntimeLevels C>
LevelTable level_table(const float* state) {
  LevelTable table;
  alignas(64) float levels[16] = {};
  C::runtime_levels(state, levels);
  float largest = 0;
  for (const float level : levels) largest = std::max(largest, level < 0 ? -level : level);
  const float inverse = largest >= 0x1p-100f && largest <= 0x1p100f ? 127 / largest : 0.0f;
  table.unit = largest <= 0x1p100f ? largest / 127 : 0.0f;
  for (std::size_t c = 0; c < 16; ++c) {
    const float steps = levels[c] * inverse;
    table.bytes[c] = static_cast<std::int8_t>(static_cast<int>(steps + (steps < 0 ? -0.5f : 0.5f)));
  }
  return table;
}

/// One codec on one side.
template <GroupCodec C, Side side, bool wide_values = true>
struct GroupTiles {
  using Narrow = GroupTiles<C, side, false>;
  static constexpr GroupForm form = C::form;
  static constexpr bool along_channels = form.along == Along::channels;
  static constexpr bool flips = side == Side::values && along_channels && signed_scales<C>();
  static constexpr Levels levels = form.table ? flips ? Levels::flipped_table : Levels::table
                                   : flips    ? Levels::flipped
                                              : Levels::plain;
  static constexpr int bits = form.bits;
  /// Integer queries of 16 bits where 8 would show: at 8 bits, and at 5 where scales have moved into the query.
  static constexpr bool wide_query = bits == 8 || (bits == 5 && !along_channels);

  static constexpr Layout layout(TileShape shape) {
    return {.side = side,
            .shape = shape,
            .units = {bits},
            .flip = side == Side::values && levels == Levels::plain ? 1 << (bits - 1) : 0,
            .along = form.along,
            .group = form.group_of(shape),
            .scale = form.scale,
            .zero = form.zero,
            .ternary = form.ternary};
  }
  static constexpr bool fits(TileShape shape) {
    if ((form.table && bits > 4) || (bits == 8 && flips)) return false;
    const Index bytes = layout(shape).bytes(), canonical = C::tile_bytes(shape);
    return layout(shape).fits() && (form.ternary ? bytes <= canonical : bytes == canonical);
  }

  /// `made` is where levels go that the state says.
  static Values values(const float* state, LevelTable& made) {
    Values v;
    if constexpr (RuntimeLevels<C>) {
      made = level_table<C>(state);
      v.unit = made.unit, v.table = made.bytes.data();
      return v;
    }
    if constexpr (form.table) {
      static constexpr LevelTable table = level_table<C>();
      v.unit = table.unit, v.table = table.bytes.data();
    } else if constexpr (form.ternary) {
      static_assert(form.offset == 1, "unpacked codes are code + 1, around 2");
    } else {
      v.shift = static_cast<float>((1 << (bits - 1)) - form.offset);
    }
    if constexpr (form.scale == ScaleType::e8m0 || form.scale == ScaleType::e4m3) {
      static const std::array<float, 256> all = [] {
        std::array<float, 256> scales{};
        for (std::uint32_t b = 0; b < 256; ++b) scales[b] = C::scale_of({b, 0}, nullptr);
        return scales;
      }();
      v.scales = all.data();
    }
    if (state_floats<C>(1) > 0) v.factor = state != nullptr ? *state : 1.0f;
    return v;
  }

  static Index tile_bytes(TileShape shape) { return C::tile_bytes(shape); }

  static void encode(const Kernels& k, TileShape shape, const float* rows, Index first, Index count, const TokenFacts&,
                     const float* state, std::byte* tile) {
    const Layout at = layout(shape);
    const Loops loops(k);
    if constexpr (along_channels) {
      alignas(64) std::uint8_t codes[max_width];
      for (Index r = 0; r < count; ++r) {
        if (!quantize_fast(loops, at, rows + r * shape.width, first + r, codes, tile))
          for (Index g = 0; g < at.row_groups(); ++g)
            at.put_bits(
                tile, at.group_at(first + r, g * at.group),
                C::quantize(rows + r * shape.width + g * at.group, 1, at.group, state, codes + g * at.group, 1));
        loops.place(at, tile, first + r, codes);
      }
    } else {
      alignas(64) std::uint8_t codes[max_tokens * max_width];
      std::fill_n(codes, shape.tokens * shape.width, std::uint8_t{0});
      for (Index t = 0; t < shape.tokens; t += at.group) {
        const Index present = std::clamp<Index>(count - t, 0, at.group);
        for (Index c = 0; c < shape.width; ++c) {
          GroupBits b;
          if (present > 0)
            b = C::quantize(rows + t * shape.width + c, shape.width, present, state, codes + t * shape.width + c,
                            shape.width);
          at.put_bits(tile, at.group_at(t, c), b);
        }
      }
      for (Index t = 0; t < shape.tokens; ++t) loops.place(at, tile, t, codes + t * shape.width);
    }
  }

  static void decode(const Kernels&, TileShape shape, const std::byte* tile, Index slot, Position, const float* state,
                     float* row) {
    const Layout at = layout(shape);
    for (Index c = 0; c < shape.width; ++c) {
      const GroupBits b = at.bits(tile, at.group_at(slot, c));
      row[c] = C::scale_of(b, state) * kvpare::detail::level_of<C>(at.code(tile, slot, c), state);
      if constexpr (form.zero != ZeroType::none) row[c] += C::zero_of(b, state);
    }
  }

  /// One channel of it.
  static float decode_channel(TileShape shape, const std::byte* tile, Index slot, Index c, const float* state) {
    const Layout at = layout(shape);
    const GroupBits b = at.bits(tile, at.group_at(slot, c));
    const float x = C::scale_of(b, state) * kvpare::detail::level_of<C>(at.code(tile, slot, c), state);
    return form.zero != ZeroType::none ? x + C::zero_of(b, state) : x;
  }
  /// 16 keys from `first` on as floats [channels][16], each channel times its gain, plus its shift (null: as it is).
  static void decode_block(const Kernels& k, TileShape shape, const std::byte* tile, Index first, const float* state,
                           const float* gain, const float* shift,
                           float* out) requires(side == Side::keys && along_channels && bits <= 4 && !form.ternary) {
    alignas(64) float levels_of_codes[16] = {};
    for (int c = 0; c < 16; ++c)
      levels_of_codes[c] = kvpare::detail::level_of<C>(static_cast<std::uint8_t>(c & ((1 << bits) - 1)), state);
    Values v;
    if constexpr (!RuntimeLevels<C>) {
      LevelTable made;
      v = values(state, made);
      v.shift = 0;
    }
    Loops(k).template decode_keys<bits>(layout(shape), v, levels_of_codes, tile, first, gain, shift, out);
  }

  static void move_rows(const Kernels& k, TileShape shape, const std::byte* from, Index from_slot, std::byte* to,
                        Index to_slot, Index count) {
    const Layout at = layout(shape);
    const Loops loops(k);
    alignas(64) std::uint8_t codes[max_width];
    const bool down = from == to && to_slot > from_slot;  // the last one first, or rows would be overwritten unread
    for (Index i = 0; i < count; ++i) {
      const Index r = down ? count - 1 - i : i;
      take_row(at, from, from_slot + r, codes);
      loops.place(at, to, to_slot + r, codes);
      for (Index g = 0; g < at.row_groups(); ++g)
        at.put_bits(to, at.group_at(to_slot + r, g * at.group),
                    at.bits(from, at.group_at(from_slot + r, g * at.group)));
    }
  }

  static void to_canonical(const Kernels&, TileShape shape, const std::byte* tile, std::byte* canonical) {
    const Layout at = layout(shape);
    std::uint8_t codes[max_width];
    if constexpr (along_channels) {
      GroupBits b[max_groups];
      for (Index t = 0; t < shape.tokens; ++t) {
        take_row(at, tile, t, codes);
        for (Index g = 0; g < at.row_groups(); ++g) b[g] = at.bits(tile, at.group_at(t, g * at.group));
        C::write_row(shape, canonical, t, codes, b);
      }
    } else {
      for (Index t = 0; t < shape.tokens; t += at.group)
        for (Index c = 0; c < shape.width; ++c) {
          for (Index i = 0; i < at.group; ++i) codes[i] = at.code(tile, t + i, c);
          const Index place = at.group_at(t, c);
          C::write_run(shape, canonical, place, codes, at.bits(tile, place));
        }
    }
  }
  static void from_canonical(const Kernels& k, TileShape shape, const std::byte* canonical, std::byte* tile) {
    const Layout at = layout(shape);
    const Loops loops(k);
    alignas(64) std::uint8_t codes[max_width];
    if constexpr (along_channels) {
      GroupBits b[max_groups];
      for (Index t = 0; t < shape.tokens; ++t) {
        C::read_row(shape, canonical, t, codes, b);
        loops.place(at, tile, t, codes);
        for (Index g = 0; g < at.row_groups(); ++g) at.put_bits(tile, at.group_at(t, g * at.group), b[g]);
      }
    } else {
      for (Index t = 0; t < shape.tokens; t += at.group)
        for (Index c = 0; c < shape.width; ++c) {
          const Index place = at.group_at(t, c);
          at.put_bits(tile, place, C::read_run(shape, canonical, place, codes));
          for (Index i = 0; i < at.group; ++i) at.put_code(tile, t + i, c, codes[i]);
        }
    }
  }

  static Index query_bytes(Index rows, Index) {
    return rows * (along_channels ? Index{sizeof(QueryRow)} : entering_floats * 4);
  }
  static void prepare_query(const Kernels& k, const float* q, Index q_stride, Index rows, Index width,
                            const float* state, std::byte* prepared) {
    LevelTable made;
    Loops(k).template prepare_query<bits, form.table, wide_query>(layout({max_tokens, width}), values(state, made), q,
                                                                  q_stride, rows, prepared);
  }
  static void score(const Kernels& k, const std::byte* prepared, Index rows, const TileRows& keys, AheadBytes ahead,
                    float* out, Index out_stride) {
    if (keys.count == 0 || rows == 0) return;
    const Layout at = layout(keys.shape);
    const Loops loops(k);
    alignas(64) std::byte codes[unpacked_bytes];
    if constexpr (form.ternary) {  // no further than slots are looked at
      const Index last = keys.gapless ? keys.count - 1 : keys.slots[keys.count - 1];
      loops.unpack_ternary(at, keys.tile, (last / 16 + 1) * at.block_bytes() / 64, codes);
    }
    LevelTable made;
    loops.template score_keys<bits, form.table, wide_query>({at, values(keys.state, made), prepared, rows, keys, ahead,
                                                             out, out_stride, form.ternary ? codes : nullptr});
  }
  static void accumulate(const Kernels& k, const float* p, Index p_stride, const float* alpha, Index rows,
                         const TileRows& tile, AheadBytes ahead, float* acc, Index acc_stride) {
    if (rows == 0) return;
    if (tile.count == 0) return scale_rows(k, alpha, rows, tile.shape.width, acc, acc_stride);
    const Layout at = layout(tile.shape);
    const Loops loops(k);
    alignas(64) std::byte codes[unpacked_bytes];
    if constexpr (form.ternary) loops.unpack_ternary(at, tile.tile, at.quads() / 4, codes);
    LevelTable made;
    loops.template accumulate_values<bits, levels, wide_values>({at, values(tile.state, made), p, p_stride, alpha, rows,
                                                                 tile, ahead, acc, acc_stride,
                                                                 form.ternary ? codes : nullptr});
  }
  static void finish_output(Index, Index, const float*, const float*, float*, Index) {}

 private:
  static constexpr Index unpacked_bytes = form.ternary ? max_tokens * max_width / 4 : 1;

  /// A row by the set's vectors, where its form and its numbers are of the common kind.
  static bool quantize_fast(const Loops& loops, const Layout& at, const float* x, Index slot, std::uint8_t* codes,
                            std::byte* tile) {
    if constexpr (requires { C::spec; }) {
      constexpr GroupSpec spec = C::spec;
      constexpr bool known = spec.fit == Fit::amax || spec.fit == Fit::extreme || spec.fit == Fit::min_max;
      constexpr bool rounds = spec.ties == Ties::even || spec.ties == Ties::away || spec.ties == Ties::up;
      if constexpr (known && rounds && bits > 1 && spec.scale == ScaleType::f16) {
        if (at.group % loops.quantize_lanes() != 0) return false;
        half scales[max_groups], zeros[max_groups];
        constexpr Rule rule = spec.fit == Fit::amax      ? Rule::amax
                              : spec.fit == Fit::extreme ? Rule::extreme
                                                         : Rule::min_max;
        constexpr Rounding rounding = spec.ties == Ties::even   ? Rounding::even
                                      : spec.ties == Ties::away ? Rounding::away
                                                                : Rounding::up;
        if (!loops.template quantize<rule, rounding>(bits, spec.from == CodesFrom::exact, x, at.shape.width, at.group,
                                                     codes, scales, zeros))
          return false;
        std::byte* to = tile + at.code_bytes();
        const Index step = at.shape.tokens * 2;  // from a group's scales to the next one's
        for (Index g = 0; g < at.row_groups(); ++g) {
          std::memcpy(to + g * step + slot * 2, &scales[g].bits, 2);
          if (rule == Rule::min_max) std::memcpy(to + (at.row_groups() + g) * step + slot * 2, &zeros[g].bits, 2);
        }
        return true;
      }
    }
    return false;
  }

  static void take_row(const Layout& at, const std::byte* tile, Index slot, std::uint8_t* codes) {
    for (Index c = 0; c < at.shape.width; ++c) codes[c] = at.code(tile, slot, c);
  }
  static void scale_rows(const Kernels& k, const float* alpha, Index rows, Index width, float* acc, Index acc_stride) {
    for (Index i = 0; i < rows && alpha != nullptr; ++i) {
      if (alpha[i] == 0)
        std::fill_n(acc + i * acc_stride, width, 0.0f);
      else
        k.multiply(acc + i * acc_stride, width, alpha[i]);
    }
  }
};

/// Whether a codec's codes have loops at all, whatever the shape.
template <GroupCodec C, Side side>
constexpr bool has_group_loops() {
  if (C::form.table && C::form.bits > 4) return false;
  return side == Side::keys || C::form.bits != 8 || C::form.along == Along::tokens || !signed_scales<C>();
}

}  // namespace kvpare::cpu::fused

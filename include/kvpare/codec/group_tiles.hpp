// Tiles of codecs that are group quantisation: where codes, scales and zeros lie, once for all of them.
#pragma once

#include <algorithm>

#include "codec.hpp"
#include "packing.hpp"
#include "rounding.hpp"

namespace kvpare::detail {

constexpr KVPARE_HD Index scale_size(ScaleType type) {
  switch (type) {
    case ScaleType::one:
      return 0;
    case ScaleType::f16:
      return 2;
    case ScaleType::f32:
      return 4;
    default:
      return 1;
  }
}
constexpr KVPARE_HD Index zero_size(const GroupForm& form) {
  return form.zero == ZeroType::none ? 0 : form.zero == ZeroType::integer ? 2 : scale_size(form.scale);
}

/// The level of a code: the codec's own, or the one its state says.
template <class C>
KVPARE_HD float level_of(std::uint8_t code, const float* state) {
  if constexpr (requires { C::level(code, state); })
    return C::level(code, state);
  else
    return C::level(code);
}

/// What follows from a form alone; `C` is the codec that inherits from this and brings quantize, scale_of, zero_of, level.
///
/// Layout  along channels, row by row:  codes of the row | its scales [groups] | its zeros [groups]
///         along tokens:  codes [T / G][W] of runs of G codes | scales [T / G][W] | zeros [T / G][W]
///         Codes by `packing`, ternary ones as pack_ternary says; numbers little-endian; no padding anywhere.
/// Fits    groups divide the row (the tokens), codes of a row (a run) fill whole bytes (ternary: the last byte may hold
///         fewer than five), width and tokens at most 1024
/// Empty   slots of a tile along tokens have code 0 and take no part in their group; a group without tokens is all zeros
template <class C, GroupForm group_form, Packing packing = Packing::neighbours>
struct GroupTiles {
  static constexpr GroupForm form = group_form;
  static constexpr bool rows_move = form.along == Along::channels;
  static constexpr Index scale_bytes = scale_size(form.scale), zero_bytes = zero_size(form);

  /// What the form says of a tile. Device code has the values of static members, not their address, hence the copies.
  static constexpr KVPARE_HD Index group_of(TileShape t) {
    constexpr GroupForm own = group_form;
    return own.group_of(t);
  }
  static constexpr KVPARE_HD Index groups_of(TileShape t) {
    constexpr GroupForm own = group_form;
    return own.groups(t);
  }

  static constexpr KVPARE_HD bool fits(TileShape t) {
    if (t.width < 1 || t.width > max_coded_width || t.tokens < 1 || t.tokens > max_coded_width) return false;
    const Index all = form.along == Along::channels ? t.width : t.tokens;
    if (all % form.parts != 0 || all % group_of(t) != 0) return false;
    const Index run = form.along == Along::channels && packing == Packing::neighbours ? t.width : group_of(t);
    return form.ternary || run * form.bits % 8 == 0;
  }
  static constexpr KVPARE_HD Index row_bytes(Index width) {
    return code_bytes(width) + groups_of({1, width}) * (scale_bytes + zero_bytes);
  }
  static constexpr KVPARE_HD Index tile_bytes(TileShape t) {
    if (form.along == Along::channels) return t.tokens * row_bytes(t.width);
    return groups_of(t) * (code_bytes(group_of(t)) + scale_bytes + zero_bytes);
  }

  static KVPARE_HD void encode(TileShape t, const float* rows, Index first, Index count, const float* state,
                               std::byte* tile) {
    std::uint8_t codes[max_coded_width];
    const Index group = group_of(t);
    if constexpr (form.along == Along::channels) {
      const Index groups = t.width / group;
      for (Index r = 0; r < count; ++r) {
        std::byte* row = tile + (first + r) * row_bytes(t.width);
        std::byte* scales = row + code_bytes(t.width);
        for (Index g = 0; g < groups; ++g)
          put(C::quantize(rows + r * t.width + g * group, 1, group, state, codes + g * group, 1), scales,
              scales + groups * scale_bytes, g);
        pack(codes, t.width, group, row);
      }
    } else {
      const Index run = code_bytes(group), groups = groups_of(t);
      std::byte* scales = tile + groups * run;
      std::byte* zeros = scales + groups * scale_bytes;
      for (Index g = 0; g < t.tokens / group; ++g) {
        const Index present = std::clamp<Index>(count - g * group, 0, group);
        for (Index c = 0; c < t.width; ++c) {
          GroupBits bits;
          if (present > 0) bits = C::quantize(rows + g * group * t.width + c, t.width, present, state, codes, 1);
          std::fill(codes + present, codes + group, std::uint8_t{0});
          put(bits, scales, zeros, g * t.width + c);
          pack(codes, group, group, tile + (g * t.width + c) * run);
        }
      }
    }
  }

  static KVPARE_HD void decode(TileShape t, const std::byte* tile, Index slot, const float* state, float* row) {
    const Index group = group_of(t);
    if constexpr (form.along == Along::channels) {
      std::uint8_t codes[max_coded_width];
      const std::byte* bytes = tile + slot * row_bytes(t.width);
      const std::byte* scales = bytes + code_bytes(t.width);
      const Index groups = t.width / group;
      unpack(bytes, t.width, group, codes);
      for (Index g = 0; g < groups; ++g) {
        const GroupBits bits = get(scales, scales + groups * scale_bytes, g);
        const float scale = C::scale_of(bits, state), zero = C::zero_of(bits, state);
        for (Index c = g * group; c < (g + 1) * group; ++c) row[c] = value(scale, codes[c], zero, state);
      }
    } else {
      const Index run = code_bytes(group), groups = groups_of(t), g = slot / group;
      const std::byte* scales = tile + groups * run;
      const std::byte* zeros = scales + groups * scale_bytes;
      for (Index c = 0; c < t.width; ++c) {
        const Index place = g * t.width + c;
        const GroupBits bits = get(scales, zeros, place);
        row[c] =
            value(C::scale_of(bits, state), code_of(tile + place * run, slot % group, run), C::zero_of(bits, state), state);
      }
    }
  }

  // For backends that keep codes in an order of their own: codes and bits as they are, one row (groups along channels) or one
  // run of a channel (`place` = group of tokens * width + channel) at a time.

  static KVPARE_HD void write_row(TileShape t, std::byte* tile, Index slot, const std::uint8_t* codes,
                                  const GroupBits* bits) {
    std::byte* row = tile + slot * row_bytes(t.width);
    std::byte* scales = row + code_bytes(t.width);
    const Index groups = groups_of({1, t.width});
    for (Index g = 0; g < groups; ++g) put(bits[g], scales, scales + groups * scale_bytes, g);
    pack(codes, t.width, group_of(t), row);
  }
  static KVPARE_HD void read_row(TileShape t, const std::byte* tile, Index slot, std::uint8_t* codes, GroupBits* bits) {
    const std::byte* row = tile + slot * row_bytes(t.width);
    const std::byte* scales = row + code_bytes(t.width);
    const Index groups = groups_of({1, t.width});
    for (Index g = 0; g < groups; ++g) bits[g] = get(scales, scales + groups * scale_bytes, g);
    unpack(row, t.width, group_of(t), codes);
  }
  static KVPARE_HD void write_run(TileShape t, std::byte* tile, Index place, const std::uint8_t* codes,
                                  GroupBits bits) {
    const Index group = group_of(t), run = code_bytes(group), groups = groups_of(t);
    std::byte* scales = tile + groups * run;
    put(bits, scales, scales + groups * scale_bytes, place);
    pack(codes, group, group, tile + place * run);
  }
  static KVPARE_HD GroupBits read_run(TileShape t, const std::byte* tile, Index place, std::uint8_t* codes) {
    const Index group = group_of(t), run = code_bytes(group), groups = groups_of(t);
    const std::byte* scales = tile + groups * run;
    unpack(tile + place * run, group, group, codes);
    return get(scales, scales + groups * scale_bytes, place);
  }

 protected:
  static constexpr KVPARE_HD Index code_bytes(Index n) { return form.ternary ? ceil_div(n, 5) : n * form.bits / 8; }
  static KVPARE_HD float value(float scale, std::uint8_t code, float zero, const float* state) {
    if constexpr (form.zero == ZeroType::none)
      return product(scale, level_of<C>(code, state));
    else
      return product(scale, level_of<C>(code, state)) + zero;
  }
  static KVPARE_HD void put(GroupBits bits, std::byte* scales, std::byte* zeros, Index g) {
    if constexpr (scale_bytes > 0) put_bytes(scales + g * scale_bytes, bits.scale, scale_bytes);
    if constexpr (zero_bytes > 0) put_bytes(zeros + g * zero_bytes, bits.zero, zero_bytes);
  }
  static KVPARE_HD GroupBits get(const std::byte* scales, const std::byte* zeros, Index g) {
    GroupBits bits;
    if constexpr (scale_bytes > 0) bits.scale = get_bytes(scales + g * scale_bytes, scale_bytes);
    if constexpr (zero_bytes > 0) bits.zero = get_bytes(zeros + g * zero_bytes, zero_bytes);
    return bits;
  }
  static KVPARE_HD void pack(const std::uint8_t* codes, Index n, Index group, std::byte* bytes) {
    if constexpr (form.ternary)
      pack_ternary(codes, n, bytes);
    else if constexpr (packing == Packing::halves)
      pack_halves<form.bits>(codes, n, group, bytes);
    else
      pack_codes<form.bits>(codes, n, bytes);
  }
  static KVPARE_HD void unpack(const std::byte* bytes, Index n, Index group, std::uint8_t* codes) {
    if constexpr (form.ternary)
      unpack_ternary(bytes, n, codes);
    else if constexpr (packing == Packing::halves)
      unpack_halves<form.bits>(bytes, n, group, codes);
    else
      unpack_codes<form.bits>(bytes, n, codes);
  }
  static KVPARE_HD std::uint8_t code_of(const std::byte* run, Index i, Index run_bytes) {
    if constexpr (form.ternary)
      return ternary_at(run, i);
    else if constexpr (packing == Packing::halves)
      return code_at<form.bits>(run + i % run_bytes, i / run_bytes);
    else
      return code_at<form.bits>(run, i);
  }
};

}  // namespace kvpare::detail

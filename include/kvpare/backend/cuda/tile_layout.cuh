// How a codec's tile lies on the device: the same codes, scales and zeros in just as many bytes as the canonical ones.
//
//   fragments   [codes][scales][zeros], each part dense; scales and zeros [tokens][groups of a row] or [groups of
//               tokens][channels] as the form says. Rows of codes are aligned as the tile is, so a thread of an mma fragment
//               loads its own codes, up to 16 bytes at once, and pairs of codes are in place for 16-bit arithmetic:
//                 keys     code c of token t at bit t * W * bits + c * bits: a word's codes i and i + 16 / bits are a pair
//                 values   tokens 2u and 2u + 1 interleaved by 16 bits: a word's low half is 16 / bits channels of token 2u,
//                          its high half the same channels of token 2u + 1: the same channel of both tokens is a pair
//               3 bits: [low bits][high bits][scales][zeros]. The two low bits lie as codes of 2 bits do. The highest
//               bits of 8 codes, those of a half word of low bits, are a byte: that of code i is bit 2 (i % 4) + i / 4,
//               so that four pairs find theirs with one shift. Bytes go by fours, of two words of low bits: a word of
//               high bits has in its low half the bytes of both low halves, in its high half those of both high halves.
//   canonical   what is not group quantisation, codes of 5 bits, and 3 bits of widths that 32 does not divide
//
// `repack` goes between this and the canonical bytes.
#pragma once

#include "../../codec/codec.hpp"
#include "../../codec/group_tiles.hpp"
#include "../arguments.hpp"

namespace kvpare::cuda {

template <class C>
constexpr bool has_fragment_order() {
  if constexpr (GroupCodec<C>) {
    constexpr GroupForm form = C::form;
    return !form.ternary && (form.bits == 8 || (form.bits >= 1 && form.bits <= 4));
  } else {
    return false;
  }
}

/// Of a GroupCodec in fragment order.
template <class C, Side side>
struct FragmentLayout {
  static_assert(has_fragment_order<C>());
  static constexpr GroupForm form = C::form;
  static constexpr int bits = form.bits;
  static constexpr bool has_high = bits == 3;           // whether highest bits have a plane of their own
  static constexpr int low_bits = has_high ? 2 : bits;  // of a code in the other one
  static constexpr int per_unit = 16 / low_bits;        // codes whose low bits are 16
  static constexpr Index scale_bytes = kvpare::detail::scale_size(form.scale);
  static constexpr Index zero_bytes = kvpare::detail::zero_size(form);

  /// Whether a tile of the codec can lie so: else it is kept as the codec has it.
  static constexpr bool fits(TileShape s) {
    return (has_high ? s.width % 32 == 0 : s.width * bits % 16 == 0) && s.tokens % 2 == 0;
  }

  static constexpr KVPARE_HD Index row_bytes(TileShape s) { return s.width * low_bits / 8; }
  static constexpr KVPARE_HD Index high_row_bytes(TileShape s) { return has_high ? s.width / 8 : 0; }
  static constexpr KVPARE_HD Index high_at(TileShape s) { return s.tokens * row_bytes(s); }
  static constexpr KVPARE_HD Index scales_at(TileShape s) { return high_at(s) + s.tokens * high_row_bytes(s); }
  static constexpr KVPARE_HD Index zeros_at(TileShape s) { return scales_at(s) + groups(s) * scale_bytes; }
  static constexpr KVPARE_HD Index groups(TileShape s) { return own_form().groups(s); }
  static constexpr KVPARE_HD Index group(TileShape s) { return own_form().group_of(s); }
  /// Which group's scale and zero hold for channel c of token t.
  static constexpr KVPARE_HD Index group_of(TileShape s, Index t, Index c) {
    return form.along == Along::channels ? (t * s.width + c) / group(s) : t / group(s) * s.width + c;
  }
  /// The 16 bits that hold the (low bits of the) codes [c, c + per_unit) of token t, c a multiple of that: their offset
  /// in bytes.
  static constexpr KVPARE_HD Index unit_at(TileShape s, Index t, Index c) {
    const Index unit = c / per_unit;
    return side == Side::keys ? t * row_bytes(s) + unit * 2 : t / 2 * 2 * row_bytes(s) + unit * 4 + t % 2 * 2;
  }
  /// The byte that holds their highest bits, and which bit of it is that of code c + i.
  static constexpr KVPARE_HD Index high_unit_at(TileShape s, Index t, Index c) {
    const Index unit = c / per_unit;
    return high_at(s) + (side == Side::keys ? t * high_row_bytes(s) + unit / 4 * 4 + unit % 2 * 2 + unit / 2 % 2
                                            : t / 2 * 2 * high_row_bytes(s) + unit / 2 * 4 + t % 2 * 2 + unit % 2);
  }
  static constexpr KVPARE_HD int high_bit(int i) { return i % 4 * 2 + i / 4; }

 private:
  static constexpr KVPARE_HD GroupForm own_form() { return C::form; }  // a copy: device code has no static members
};

namespace detail {
template <Codec C>
struct InnermostOf {
  using type = C;
};
template <FoldedCodec C>
struct InnermostOf<C> {
  using type = typename InnermostOf<typename C::Inner>::type;
};
}  // namespace detail

/// How the tiles of any codec lie: those of a folded codec as those of the codec within all folds.
template <Codec C, Side side>
struct DeviceTiles {
  using Stored = typename detail::InnermostOf<C>::type;
  /// FragmentLayout<Stored, side>; else canonical.
  static constexpr bool in_fragments(TileShape shape) {
    if constexpr (has_fragment_order<Stored>())
      return FragmentLayout<Stored, side>::fits(shape);
    else
      return false;
  }
};

}  // namespace kvpare::cuda

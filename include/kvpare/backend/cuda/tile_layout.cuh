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
//               ternary, 128 channels: [16 bytes of each row][10 of each row][scales]. 16 channels are three bytes of
//               five and one more: channels 0 to 4 and 5 to 9 of run u are bytes 2u and 2u + 1 of the row, 10 to 14
//               byte 16 + u, channel 15 is in byte 24 + u % 2. A byte is ceil(256 / 243 v), v its digits in base 3, the
//               first one highest (channel 15 of run u the (u / 2)-th): three times the byte is a digit above 8 bits of
//               which the next digits come the same way. Values interleave as above. Canonical bytes above 242,
//               which nobody writes, come back as bytes of the digits they are read as.
//   canonical   what is not group quantisation, codes of 5 bits, 3 bits of widths that 32 does not divide, ternary codes
//               of other widths or along tokens
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
    if (form.ternary) return form.along == Along::channels;
    return form.bits == 8 || (form.bits >= 1 && form.bits <= 4);
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
    if (form.ternary) return s.width == 128 && s.tokens % 2 == 0;
    return (has_high ? s.width % 32 == 0 : s.width * bits % 16 == 0) && s.tokens % 2 == 0;
  }

  static constexpr KVPARE_HD Index row_bytes(TileShape s) { return own_form().ternary ? 16 : s.width * low_bits / 8; }
  /// Of the second plane: of highest bits, or of what 16 bytes of a ternary row do not hold.
  static constexpr KVPARE_HD Index high_row_bytes(TileShape s) {
    return own_form().ternary ? 10 : has_high ? s.width / 8 : 0;
  }
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

  /// Byte y of a ternary row of 26: its offset; and which channel is digit k of it, k below trits_of(y).
  static constexpr Index trit_bytes = 26;
  static constexpr KVPARE_HD Index trit_byte_at(TileShape s, Index t, Index y) {
    const Index plane = y < 16 ? 0 : high_at(s), bytes = y < 16 ? 16 : 10, place = y < 16 ? y : y - 16;
    return plane + (side == Side::keys ? t * bytes + place
                                       : t / 2 * 2 * bytes + place / 2 * 4 + t % 2 * 2 + place % 2);
  }
  static constexpr KVPARE_HD int trits_of(Index y) { return y < 24 ? 5 : 4; }
  static constexpr KVPARE_HD Index trit_channel(Index y, Index k) {
    return y < 16 ? y / 2 * 16 + y % 2 * 5 + k : y < 24 ? (y - 16) * 16 + 10 + k : (k * 2 + y - 24) * 16 + 15;
  }

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

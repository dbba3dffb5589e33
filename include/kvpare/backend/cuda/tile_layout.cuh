// How a codec's tile lies on the device: the same codes, scales and zeros in just as many bytes as the canonical ones.
//
//   fragments   [codes][scales][zeros], each part dense; scales and zeros [tokens][groups of a row] or [groups of
//               tokens][channels] as the form says. Rows of codes are aligned as the tile is, so a thread of an mma fragment
//               loads its own codes, up to 16 bytes at once, and pairs of codes are in place for 16-bit arithmetic:
//                 keys     code c of token t at bit t * W * bits + c * bits: a word's codes i and i + 16 / bits are a pair
//                 values   tokens 2u and 2u + 1 interleaved by 16 bits: a word's low half is 16 / bits channels of token 2u,
//                          its high half the same channels of token 2u + 1: the same channel of both tokens is a pair
//   canonical   what is not group quantisation, and codes that do not divide 16 bits
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
    return !form.ternary && (form.bits == 8 || form.bits == 4 || form.bits == 2 || form.bits == 1);
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
  static constexpr Index scale_bytes = kvpare::detail::scale_size(form.scale);
  static constexpr Index zero_bytes = kvpare::detail::zero_size(form);

  /// Whether a tile of the codec can lie so: else it is kept as the codec has it.
  static constexpr bool fits(TileShape s) { return s.width * bits % 16 == 0 && s.tokens % 2 == 0; }

  static constexpr KVPARE_HD Index row_bytes(TileShape s) { return s.width * bits / 8; }
  static constexpr KVPARE_HD Index scales_at(TileShape s) { return s.tokens * row_bytes(s); }
  static constexpr KVPARE_HD Index zeros_at(TileShape s) { return scales_at(s) + groups(s) * scale_bytes; }
  static constexpr KVPARE_HD Index groups(TileShape s) { return own_form().groups(s); }
  static constexpr KVPARE_HD Index group(TileShape s) { return own_form().group_of(s); }
  /// Which group's scale and zero hold for channel c of token t.
  static constexpr KVPARE_HD Index group_of(TileShape s, Index t, Index c) {
    return form.along == Along::channels ? (t * s.width + c) / group(s) : t / group(s) * s.width + c;
  }
  /// The 16 bits that hold codes [c, c + 16 / bits) of token t, c a multiple of that: their offset in bytes.
  static constexpr KVPARE_HD Index unit_at(TileShape s, Index t, Index c) {
    const Index unit = c * bits / 16;
    return side == Side::keys ? t * row_bytes(s) + unit * 2 : t / 2 * 2 * row_bytes(s) + unit * 4 + t % 2 * 2;
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

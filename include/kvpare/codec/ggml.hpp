// ggml's block formats for KV caches: the same codes and scales, in our order, and rows of ggml in and out.
//
// | codec   | ggml    | numbers that share a scale | bytes of a ggml block  | bits per number |
// |---------|---------|----------------------------|------------------------|-----------------|
// | `Q8_0`  | q8_0    | 32                         | d, 32 x i8             | 8.5             |
// | `Q5_1`  | q5_1    | 32                         | d, m, qh u32, 16       | 6               |
// | `Q5_0`  | q5_0    | 32                         | d, qh u32, 16          | 5.5             |
// | `Q4_1`  | q4_1    | 32                         | d, m, 16               | 5               |
// | `Q4_0`  | q4_0    | 32                         | d, 16                  | 4.5             |
// | `Iq4Nl` | iq4_nl  | 32                         | d, 16                  | 4.5             |
// | `Q2_0`  | q2_0    | 64                         | d, 16                  | 2.25            |
// | `Q1_0`  | q1_0    | 128                        | d, 16                  | 1.125           |
// | `MxFp4` | mxfp4   | 32                         | e, 16                  | 4.25            |
// | `NvFp4` | nvfp4   | 16, blocks of 64           | 4 x ue4m3, 32          | 4.5             |
//
// d and m are halves. In ggml's blocks of 32 (of 16 for nvfp4) byte j holds number j low and number j + 16 (j + 8) high; bit j
// of qh is the fifth bit of number j; q2_0 and q1_0 hold neighbours, lowest bits first. Our rows are codes of the whole row,
// neighbours lowest bits first, then d of all blocks, then m of all blocks: just as many bytes.
//
// Encoders form codes with the float d before it becomes a half, and 1 / d rather than a division; `trunc(x / d + 8.5)` rounds
// the sum first. Compiled without contraction they are ggml's reference encoders bit for bit, as long as d fits a half (where
// ggml would write an infinity, ours saturates) and is no denormal float. q1_0 alone adds in double what ggml adds in float.
#pragma once

#include "block_float.hpp"
#include "group.hpp"

namespace kvpare {

/// d = max|x| / 127, x' = d * q, q = round(x / d), ties away from zero; stored as q + 128.
struct Q8_0 : Group<GroupSpec{.bits = 8, .fit = Fit::amax, .group = 32, .ties = Ties::away, .from = CodesFrom::exact}> {
  static constexpr std::string_view name = "q8_0";
};
/// d = v / -8, v the first number of largest magnitude, x' = d * (q - 8), q = min(15, trunc(x / d + 8.5)).
struct Q4_0
    : Group<GroupSpec{.bits = 4, .fit = Fit::extreme, .group = 32, .ties = Ties::up, .from = CodesFrom::exact}> {
  static constexpr std::string_view name = "q4_0";
};
/// d = (max - min) / 15, m = min, x' = d * q + m, q = min(15, trunc((x - m) / d + 0.5)).
struct Q4_1
    : Group<GroupSpec{.bits = 4, .fit = Fit::min_max, .group = 32, .ties = Ties::up, .from = CodesFrom::exact}> {
  static constexpr std::string_view name = "q4_1";
};
/// As Q4_0 with 32 codes: d = v / -16, x' = d * (q - 16).
struct Q5_0
    : Group<GroupSpec{.bits = 5, .fit = Fit::extreme, .group = 32, .ties = Ties::up, .from = CodesFrom::exact}> {
  static constexpr std::string_view name = "q5_0";
};
/// As Q4_1 with 32 codes: d = (max - min) / 31.
struct Q5_1
    : Group<GroupSpec{.bits = 5, .fit = Fit::min_max, .group = 32, .ties = Ties::up, .from = CodesFrom::exact}> {
  static constexpr std::string_view name = "q5_1";
};
/// d = mean|x|, x' = ±d, code 1 for x >= 0.
struct Q1_0 : Group<GroupSpec{.bits = 1, .fit = Fit::mean, .group = 128}> {
  static constexpr std::string_view name = "q1_0";
};

/// Three levels in two bits.
///
/// Value   x' = d * (q - 1), d = max|x|, q = clamp(round(x / d) + 1, 0, 3), ties away from zero; q = 3 is never written
/// Bytes   tile_bytes({T, W}) = T * (W / 4 + W / 32)
/// Error   |x - x'| <= d / 2, and the rounding of d
/// NaN     as Group
/// Source  ggml q2_0
struct Q2_0 : detail::GroupTiles<Q2_0, GroupForm{.bits = 2, .offset = 1, .group = 64}> {
  static constexpr std::string_view name = "q2_0";
  static KVPARE_HD float scale_of(GroupBits bits, const float* = nullptr) {
    return detail::half_to_float(static_cast<std::uint16_t>(bits.scale));
  }
  static KVPARE_HD float zero_of(GroupBits, const float* = nullptr) { return 0.0f; }
  static KVPARE_HD float level(std::uint8_t code) { return static_cast<float>(code) - 1.0f; }
  static KVPARE_HD GroupBits quantize(const float* x, Index stride, Index n, const float*, std::uint8_t* codes,
                                      Index code_stride) {
    const float amax = detail::largest_magnitude(x, stride, n);
    const float inverse = amax < detail::least_scale ? 0.0f : 1.0f / amax;
    for (Index i = 0; i < n; ++i) {
      const float q = detail::round_away(detail::product(detail::as_coded(x[i * stride]), inverse)) + 1;
      codes[i * code_stride] = static_cast<std::uint8_t>(static_cast<int>(q));
    }
    return {detail::saturated_half(amax), 0};
  }
};

/// Sixteen levels that lie closer together near zero.
///
/// Value   x' = d * T[q], T = -127, -104, -83, …, 1, …, 113 below
/// Codes   nearest to x / d0, ties up, d0 = v / -127, v the first number of largest magnitude; then d is fitted to the codes:
///         d = Σ x² T x / Σ x² T², and the codes stay
/// Bytes   tile_bytes({T, W}) = T * (W / 2 + W / 16)
/// Error   |x - x'| <= 0.12 max|x| before the fit of d, which moves each number by at most its share of that
/// NaN     counts as 0, infinities as 2^64 (weights are squares); a block below 1e-15 has d = 0 and codes 0
/// Source  ggml iq4_nl, its fast encoder
struct Iq4Nl : detail::GroupTiles<Iq4Nl, GroupForm{.bits = 4, .table = true, .group = 32}> {
  static constexpr std::string_view name = "iq4_nl";
  static constexpr std::array<float, 16> levels = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                   1,    13,   25,  38,  53,  69,  89,  113};
  static constexpr float lowest = levels[0];
  static KVPARE_HD float scale_of(GroupBits bits, const float* = nullptr) {
    return detail::half_to_float(static_cast<std::uint16_t>(bits.scale));
  }
  static KVPARE_HD float zero_of(GroupBits, const float* = nullptr) { return 0.0f; }
  static KVPARE_HD float level(std::uint8_t code) { return detail::entry_of<levels>(code & 15u); }
  static KVPARE_HD GroupBits quantize(const float* x, Index stride, Index n, const float*, std::uint8_t* codes,
                                      Index code_stride) {
    float amax = 0, extreme = 0;
    for (Index i = 0; i < n; ++i)
      if (const float v = number(x[i * stride]); std::abs(v) > amax) amax = std::abs(v), extreme = v;
    if (amax < 1e-15f) {
      for (Index i = 0; i < n; ++i) codes[i * code_stride] = 0;
      return {};
    }
    const float inverse = 1.0f / (extreme / lowest);
    float with_x = 0, with_level = 0;
    for (Index i = 0; i < n; ++i) {
      const float v = number(x[i * stride]), weight = v * v;
      const std::uint8_t code = nearest(detail::product(v, inverse));
      const float at = level(code);
      codes[i * code_stride] = code;
      with_x += detail::product(weight * at, v);
      with_level += detail::product(weight * at, at);
    }
    return {detail::saturated_half(with_x / with_level), 0};
  }

 private:
  static KVPARE_HD float number(float x) {
    if (x != x) return 0.0f;
    return x > 0x1p64f ? 0x1p64f : x < -0x1p64f ? -0x1p64f : x;
  }
  static KVPARE_HD std::uint8_t nearest(float v) {
    if (v <= lowest) return 0;
    for (std::uint8_t c = 1; c < 16; ++c)
      if (v < level(c)) return static_cast<std::uint8_t>(v - level(c - 1) < level(c) - v ? c - 1 : c);
    return 15;
  }
};

/// Numbers in a block of the ggml format that a codec is; 0 where it is none.
template <class C>
inline constexpr Index ggml_block = 0;
template <>
inline constexpr Index ggml_block<Q8_0> = 32;
template <>
inline constexpr Index ggml_block<Q5_1> = 32;
template <>
inline constexpr Index ggml_block<Q5_0> = 32;
template <>
inline constexpr Index ggml_block<Q4_1> = 32;
template <>
inline constexpr Index ggml_block<Q4_0> = 32;
template <>
inline constexpr Index ggml_block<Iq4Nl> = 32;
template <>
inline constexpr Index ggml_block<Q2_0> = 64;
template <>
inline constexpr Index ggml_block<Q1_0> = 128;
template <Ties ties>
inline constexpr Index ggml_block<MxFp4<ties>> = 32;
template <Ties ties>
inline constexpr Index ggml_block<NvFp4<ties>> = 64;

template <class C>
concept GgmlCodec = GroupCodec<C> &&(ggml_block<C> > 0);

/// Whether ggml has rows of this width, at most as wide as codecs take them.
template <GgmlCodec C>
constexpr KVPARE_HD bool ggml_fits(Index width) {
  return width % ggml_block<C> == 0 && C::fits({1, width});
}
/// Bytes of a ggml row, which are those of ours.
template <GgmlCodec C>
constexpr KVPARE_HD Index ggml_row_bytes(Index width) {
  return C::row_bytes(width);
}

namespace detail {

/// Where things lie in one block of ggml: scales, minima, fifth bits, codes.
template <GgmlCodec C>
struct GgmlBlock {
  static constexpr Index numbers = ggml_block<C>, group = C::form.group, groups = numbers / group;
  static constexpr int bits = C::form.bits, low_bits = bits == 5 ? 4 : bits;
  static constexpr Index zeros = groups * C::scale_bytes, fifth = zeros + groups * C::zero_bytes;
  static constexpr Index codes = fifth + (bits == 5 ? numbers / 8 : 0), bytes = codes + numbers * low_bits / 8;
  static constexpr unsigned flip = bits == 8 ? 0x80 : 0;  // signed bytes there, code = q + 128 here
};

}  // namespace detail

/// One row of ggml, as it lies in an engine's cache, into one row of ours (row t of a tile: at t * C::row_bytes(width)), and
/// back. Bit for bit, whatever the bytes are; exactly ggml_row_bytes<C>(width) bytes are read and written.
template <GgmlCodec C>
KVPARE_HD void from_ggml(Index width, const std::byte* ggml_row, std::byte* row) {
  using Block = detail::GgmlBlock<C>;
  std::uint8_t codes[detail::max_coded_width];
  std::byte* scales = row + width * Block::bits / 8;
  std::byte* zeros = scales + width / Block::group * C::scale_bytes;
  for (Index b = 0; b < width / Block::numbers; ++b, ggml_row += Block::bytes) {
    std::uint8_t* to = codes + b * Block::numbers;
    if constexpr (Block::low_bits == 4)
      detail::unpack_halves<4>(ggml_row + Block::codes, Block::numbers, Block::group, to);
    else
      detail::unpack_codes<Block::bits>(ggml_row + Block::codes, Block::numbers, to);
    for (Index i = 0; i < Block::numbers; ++i) {
      to[i] = static_cast<std::uint8_t>(to[i] ^ Block::flip);
      if constexpr (Block::bits == 5)
        to[i] = static_cast<std::uint8_t>(to[i] | detail::code_at<1>(ggml_row + Block::fifth, i) << 4);
    }
    std::memcpy(scales + b * Block::zeros, ggml_row, static_cast<std::size_t>(Block::zeros));
    std::memcpy(zeros + b * (Block::fifth - Block::zeros), ggml_row + Block::zeros,
                static_cast<std::size_t>(Block::fifth - Block::zeros));
  }
  detail::pack_codes<Block::bits>(codes, width, row);
}

template <GgmlCodec C>
KVPARE_HD void to_ggml(Index width, const std::byte* row, std::byte* ggml_row) {
  using Block = detail::GgmlBlock<C>;
  std::uint8_t codes[detail::max_coded_width];
  const std::byte* scales = row + width * Block::bits / 8;
  const std::byte* zeros = scales + width / Block::group * C::scale_bytes;
  detail::unpack_codes<Block::bits>(row, width, codes);
  for (Index b = 0; b < width / Block::numbers; ++b, ggml_row += Block::bytes) {
    std::uint8_t* from = codes + b * Block::numbers;
    std::memcpy(ggml_row, scales + b * Block::zeros, static_cast<std::size_t>(Block::zeros));
    std::memcpy(ggml_row + Block::zeros, zeros + b * (Block::fifth - Block::zeros),
                static_cast<std::size_t>(Block::fifth - Block::zeros));
    if constexpr (Block::bits == 5) {
      std::uint8_t fifth[Block::numbers];
      for (Index i = 0; i < Block::numbers; ++i) {
        fifth[i] = static_cast<std::uint8_t>(from[i] >> 4);
        from[i] &= 15;
      }
      detail::pack_codes<1>(fifth, Block::numbers, ggml_row + Block::fifth);
    }
    for (Index i = 0; i < Block::numbers; ++i) from[i] = static_cast<std::uint8_t>(from[i] ^ Block::flip);
    if constexpr (Block::low_bits == 4)
      detail::pack_halves<4>(from, Block::numbers, Block::group, ggml_row + Block::codes);
    else
      detail::pack_codes<Block::bits>(from, Block::numbers, ggml_row + Block::codes);
  }
}

static_assert(GgmlCodec<Q8_0> && GgmlCodec<Q5_1> && GgmlCodec<Iq4Nl> && GgmlCodec<Q2_0> &&
              GgmlCodec<NvFp4<Ties::down>>);

}  // namespace kvpare

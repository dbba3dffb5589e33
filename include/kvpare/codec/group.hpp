// Group quantisation: one family of codecs. Numbers share a scale, and perhaps a zero, with their group.
//
// Names    int<bits>[_channel][_g<group>|_p<parts>][_min|_zero|_extreme][_f32][_away|_down|_up][_exact][_halves]
//
//   _channel   groups go along the tokens of a channel; else along the channels of a token
//   _g<group>  numbers in a group; without: all channels of the head, or all slots of the page
//   _p<parts>  the head in this many equal groups
//   _min       affine: a scale and the least number       (Fit::min_max)
//   _zero      affine: a scale and an integer             (Fit::integer)
//   _extreme   symmetric, reaching one end of the codes   (Fit::extreme)
//   neither    symmetric: scale = max|x| / top            (Fit::amax; 1 bit: Fit::mean)
//   _f32       scale and least number are floats; else halves
//   _away, _down, _up, _exact, _halves   Ties, CodesFrom and Packing that are not the usual ones
//
// e.g. int4_g32, int8, int2_min, int2_channel_g32_min (KIVI's keys).
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <type_traits>

#include "../core/dtype.hpp"
#include "../core/text.hpp"
#include "group_tiles.hpp"
#include "rounding.hpp"

namespace kvpare {

/// How a group's scale and zero follow from its numbers; b bits.
enum class Fit : std::uint8_t {
  amax,     // scale = max|x| / (2^(b-1) - 1), levels ±(2^(b-1) - 1): symmetric, one code unused
  extreme,  // scale = x_j / -2^(b-1), x_j the first number of largest magnitude; levels -2^(b-1) … 2^(b-1) - 1 (ggml)
  mean,     // 1 bit: scale = mean|x|, levels -1 and 1; code 1 for x >= 0
  min_max,  // zero = min x, scale = (max x - zero) / (2^b - 1), levels 0 … 2^b - 1
  integer   // scale = max(max - min, 1e-5) / (2^b - 1), z = round(min / scale) + 2^(b-1), levels ±2^(b-1) (KVTuner)
};

/// Which scale and zero the codes are made with.
enum class CodesFrom : std::uint8_t {
  stored,  // as decode will see them, rounded to their type
  exact    // before that rounding (ggml)
};

/// One member of the family: all that distinguishes it.
struct GroupSpec {
  int bits = 8;  // 8, 5, 4, 3, 2, 1
  Fit fit = Fit::amax;
  Along along = Along::channels;
  Index group = 0;  // numbers per group; 0 = all of them, in `parts` equal groups
  Index parts = 1;
  ScaleType scale = ScaleType::f16;  // or f32; of a float zero as well
  Ties ties = Ties::even;
  CodesFrom from = CodesFrom::stored;
  Packing packing = Packing::neighbours;
  friend bool operator==(const GroupSpec&, const GroupSpec&) = default;
};

namespace detail {

constexpr ShortText name_of(GroupSpec s) {
  ShortText t("int");
  t << s.bits;
  if (s.along == Along::tokens) t << "_channel";
  if (s.group > 0) t << "_g" << s.group;
  if (s.parts > 1) t << "_p" << s.parts;
  if (s.fit == Fit::min_max) t << "_min";
  if (s.fit == Fit::integer) t << "_zero";
  if (s.fit == Fit::extreme) t << "_extreme";
  if (s.scale == ScaleType::f32) t << "_f32";
  if (s.ties == Ties::away) t << "_away";
  if (s.ties == Ties::down) t << "_down";
  if (s.ties == Ties::up) t << "_up";
  if (s.from == CodesFrom::exact) t << "_exact";
  if (s.packing == Packing::halves) t << "_halves";
  return t;
}

constexpr GroupForm form_of(GroupSpec s) {
  return {.bits = s.bits,
          .table = s.fit == Fit::mean,
          .offset = s.fit == Fit::mean || s.fit == Fit::min_max ? 0 : 1 << (s.bits - 1),
          .along = s.along,
          .group = s.group,
          .parts = s.parts,
          .scale = s.scale,
          .zero = s.fit == Fit::min_max   ? ZeroType::minimum
                  : s.fit == Fit::integer ? ZeroType::integer
                                          : ZeroType::none};
}

struct NoLevels {};
struct SignLevels {
  static constexpr std::array<float, 2> levels = {-1.0f, 1.0f};
};

}  // namespace detail

/// Integer codes of few bits in groups that share a scale.
///
/// Value   x' = scale * level(code) + zero, two roundings. By Fit:
///         amax, extreme  level = code - 2^(b-1)           no zero      0 is exact; extreme: x_j too, up to its rounding
///         mean           level = -1, 1                    no zero
///         min_max        level = code                     the minimum  a constant group: scale 0, code 0; -0 is stored as 0
///         integer        level = code - 2^(b-1)           scale * z    0 is exact
/// Codes   round((x - zero) * (1 / scale)), every step a float, clamped. Scale and zero are those that are stored (CodesFrom).
/// Bytes   tile_bytes({T, W}) = T * W * bits / 8 + groups * (scale + zero), scale 2 or 4 bytes, zero 0, 2 or 4 bytes
/// Layout  along channels, row by row:  codes of the row | its scales [groups] | its zeros [groups]
///         along tokens:  codes [T / G][W] of runs of G codes | scales [T / G][W] | zeros [T / G][W]
///         Codes by Packing, least significant bit first; numbers little-endian; no padding anywhere.
/// Fits    groups divide the row (the tokens), codes of a row (a run) fill whole bytes, width at most 1024
/// Error   |x - x'| <= scale / 2, plus 2^-11 (|min| + max - min) where these are stored as halves (nothing when numbers are
///         halves to begin with and min_max has a representable scale), plus 2^b * 2^-25 where a half scale is subnormal.
///         extreme: up to one scale at the end that has a code less. mean: max|x| at most.
/// NaN     counts as 0; infinities, and all above 2^126, count as ±2^126. A scale or minimum that does not fit a half is
///         ±65504: codes saturate, what is decoded is finite. Other groups never notice.
///         A scale below 2^-126 is 0, and so is one that a half rounds to 0: all numbers decode to the zero, or 0.
/// State   none
/// Empty   slots of a tile along tokens have code 0 and take no part in their group
template <GroupSpec s>
struct Group : detail::GroupTiles<Group<s>, detail::form_of(s), s.packing>,
               std::conditional_t<s.fit == Fit::mean, detail::SignLevels, detail::NoLevels> {
  static_assert(s.bits == 8 || (s.bits >= 1 && s.bits <= 5), "bits are 8, 5, 4, 3, 2 or 1");
  static_assert(s.fit == Fit::mean ? s.bits == 1 : s.bits > 1 || s.fit == Fit::min_max,
                "with 1 bit there is mean and min_max; mean is for 1 bit");
  static_assert(s.scale == ScaleType::f16 || s.scale == ScaleType::f32, "scales are halves or floats");
  static_assert(s.group >= 0 && s.parts >= 1 && (s.group == 0 || s.parts == 1), "a group size, or parts");
  static_assert(s.packing == Packing::neighbours || 8 % s.bits == 0, "halves are for 4, 2 and 1 bits");

 private:
  static constexpr ShortText text = detail::name_of(s);
  static constexpr int half_range = 1 << (s.bits - 1);
  static constexpr float top_code = static_cast<float>((1 << s.bits) - 1);

 public:
  static constexpr GroupSpec spec = s;
  static constexpr std::string_view name = text.view();

  static KVPARE_HD float scale_of(GroupBits bits, const float* = nullptr) { return number(bits.scale); }
  static KVPARE_HD float zero_of(GroupBits bits, const float* = nullptr) {
    if constexpr (s.fit == Fit::min_max)
      return number(bits.zero);
    else if constexpr (s.fit == Fit::integer)
      return detail::product(number(bits.scale), static_cast<float>(static_cast<std::int16_t>(bits.zero)));
    else
      return 0.0f;
  }
  static constexpr KVPARE_HD float level(std::uint8_t code) {
    if constexpr (s.fit == Fit::mean)
      return (code & 1u) != 0 ? 1.0f : -1.0f;  // SignLevels
    else
      return static_cast<float>(static_cast<int>(code) - Group::form.offset);
  }

  static KVPARE_HD GroupBits quantize(const float* x, Index stride, Index n, const float*, std::uint8_t* codes,
                                      Index code_stride) {
#if defined(__CUDA_ARCH__)
    return quantize_in_place(x, stride, n, nullptr, codes, code_stride);
#endif
    float numbers[detail::max_coded_width];
    numbers[0] = 0;
    std::uint8_t own[detail::max_coded_width];
    if (stride != 1) {
      for (Index i = 0; i < n; ++i) numbers[i] = x[i * stride];
      x = numbers;
    }
    std::uint32_t top = detail::magnitude_bits(x, n);
    if (top > std::bit_cast<std::uint32_t>(detail::largest_coded)) {
      for (Index i = 0; i < n; ++i) numbers[i] = detail::as_coded(x[i]);
      x = numbers, top = detail::magnitude_bits(x, n);
    }
    const GroupBits bits = plain(x, n, std::bit_cast<float>(top), own);
    for (Index i = 0; i < n; ++i) codes[i * code_stride] = own[i];
    return bits;
  }
  /// The same numbers without memory of its own: for devices, where every thread would have to have it.
  static KVPARE_HD GroupBits quantize_in_place(const float* x, Index stride, Index n, const float*, std::uint8_t* codes,
                                               Index code_stride) {
    const NumbersInPlace numbers{x, stride};
    std::uint32_t top = 0;
    for (Index i = 0; i < n; ++i) {
      const std::uint32_t word = std::bit_cast<std::uint32_t>(numbers[i]) & 0x7fffffffu;
      top = word > top ? word : top;
    }
    return plain(numbers, n, std::bit_cast<float>(top), CodesInPlace{codes, code_stride});
  }

 private:
  struct NumbersInPlace {
    const float* x;
    Index stride;
    KVPARE_HD float operator[](Index i) const { return detail::as_coded(x[i * stride]); }
  };
  struct CodesInPlace {
    std::uint8_t* codes;
    Index stride;
    KVPARE_HD std::uint8_t& operator[](Index i) const { return codes[i * stride]; }
  };
  static KVPARE_HD float number(std::uint32_t bits) {
    if constexpr (s.scale == ScaleType::f16)
      return detail::half_to_float(static_cast<std::uint16_t>(bits));
    else
      return std::bit_cast<float>(bits);
  }
  static KVPARE_HD std::uint32_t stored(float x) {
    if constexpr (s.scale == ScaleType::f16)
      return detail::saturated_half(x);
    else
      return std::bit_cast<std::uint32_t>(x);
  }

  /// Codes are `offset` + v rounded and clamped to lowest … 2^bits - 1; v is a number over the scale.
  template <int offset, int lowest>
  static KVPARE_HD std::uint8_t code(float v) {
    if constexpr (s.ties == Ties::even) {
      constexpr int top = (1 << s.bits) - 1;
      const int c = detail::round_even_int(v) + offset;
      const int not_low = c > lowest ? c : lowest;
      return static_cast<std::uint8_t>(not_low < top ? not_low : top);
    } else if constexpr (s.ties == Ties::up) {
      v = std::min(std::max(v + (static_cast<float>(offset) + 0.5f), static_cast<float>(lowest)), float{top_code});
      return static_cast<std::uint8_t>(static_cast<int>(v));
    } else {
      v = std::min(std::max(v, static_cast<float>(lowest - offset)), top_code - static_cast<float>(offset));
      v = s.ties == Ties::away ? detail::round_away(v) : detail::round_down(v);
      return static_cast<std::uint8_t>(static_cast<int>(v) + offset);
    }
  }

  /// The group's codes, all numbers finite and of sane size, `amax` the largest magnitude.
  template <class Numbers, class Codes>
  static KVPARE_HD GroupBits plain(Numbers x, Index n, float amax, Codes codes) {
    GroupBits bits;
    if constexpr (s.fit == Fit::mean) {
      const double sum = detail::sum_of(n, [x](Index i) { return std::abs(x[i]); });
      bits.scale = stored(n > 0 ? static_cast<float>(sum / static_cast<double>(n)) : 0.0f);
      for (Index i = 0; i < n; ++i) codes[i] = x[i] >= 0 ? 1 : 0;
    } else if constexpr (s.fit == Fit::amax || s.fit == Fit::extreme) {
      float scale = amax / static_cast<float>(half_range - 1);
      if constexpr (s.fit == Fit::extreme) {
        Index first = 0;
        while (first < n && std::abs(x[first]) != amax) ++first;
        scale = (first < n ? x[first] : 0.0f) / static_cast<float>(-half_range);
      }
      if (std::abs(scale) < detail::least_scale) scale = 0;
      bits.scale = stored(scale);
      const float inverse = detail::inverse_of(s.from == CodesFrom::exact ? scale : number(bits.scale));
      for (Index i = 0; i < n; ++i)
        codes[i] = code < half_range, s.fit == Fit::amax ? 1 : 0 > (detail::product(x[i], inverse));
    } else {
      const auto [low, high] = range(x, n);
      if constexpr (s.fit == Fit::min_max) {
        float scale = (high - low) / top_code;
        if (scale < detail::least_scale) scale = 0;
        bits.scale = stored(scale), bits.zero = stored(low);
        const float inverse = detail::inverse_of(s.from == CodesFrom::exact ? scale : number(bits.scale));
        const float zero = s.from == CodesFrom::exact ? low : number(bits.zero);
        for (Index i = 0; i < n; ++i) codes[i] = code<0, 0>(detail::rounded((x[i] - zero) * inverse));
      } else {
        // A group far from 0 and narrow would need an integer of more than 16 bits: no scale below 2^-14 of its numbers.
        const float scale = std::max(std::max(high - low, 1e-5f) / top_code, amax * 0x1p-14f);
        bits.scale = stored(scale);
        const float inverse = detail::inverse_of(s.from == CodesFrom::exact ? scale : number(bits.scale));
        const float least = std::min(std::max(low * inverse, -32000.0f), 32000.0f);
        const float zero = detail::round_even(least) + static_cast<float>(half_range);
        bits.zero = static_cast<std::uint16_t>(static_cast<std::int16_t>(zero));
        for (Index i = 0; i < n; ++i) codes[i] = code<half_range, 0>(detail::rounded(x[i] * inverse) - zero);
      }
    }
    return bits;
  }
  struct Range {
    float low = 0, high = 0;
  };
  /// Zeros of either sign are 0.
  template <class Numbers>
  static KVPARE_HD Range range(Numbers x, Index n) {
    if (n <= 0) return {};
    std::int32_t low = detail::ordered(x[0]), high = low;
    for (Index i = 1; i < n; ++i) {
      const std::int32_t word = detail::ordered(x[i]);
      low = word < low ? word : low, high = word > high ? word : high;
    }
    return {detail::from_ordered(low) + 0.0f, detail::from_ordered(high) + 0.0f};
  }
};

/// Symmetric, per token and head, or per `group` channels of it: b + 16 / group bits per number.
template <int bits, Index group = 0>
using Symmetric = Group<GroupSpec{.bits = bits, .fit = bits == 1 ? Fit::mean : Fit::amax, .group = group}>;
using Int8 = Symmetric<8>;
using Int4 = Symmetric<4>;
using Int3 = Symmetric<3>;
using Int2 = Symmetric<2>;
using Int1 = Symmetric<1>;

/// Affine with a float minimum, per token and head, or per `group` channels of it: b + 32 / group bits per number.
/// The form in which LMDeploy (uint4 and uint8, whole heads) and MLX (groups of 64) decode theirs; their encoders round scale
/// and zero in their own ways and keep them in other tensors.
template <int bits, Index group = 0>
using Affine = Group<GroupSpec{.bits = bits, .fit = Fit::min_max, .group = group}>;
template <int bits>
using Lmdeploy = Affine<bits>;
template <int bits, Index group = 64>
using Mlx = Affine<bits, group>;

/// KIVI: keys per channel over `group` tokens (0 = the page), values per token over `group` channels.
/// Source  Liu et al. 2024, "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache"
template <int bits, Index group = 32>
using KiviKeys = Group<GroupSpec{.bits = bits, .fit = Fit::min_max, .along = Along::tokens, .group = group}>;
template <int bits, Index group = 32>
using KiviValues = Affine<bits, group>;

/// MiKV's retained tokens: per token, two groups of half the head.
/// Source  Yang et al. 2024, "No Token Left Behind"
template <int bits>
using MikvGroup = Group<GroupSpec{.bits = bits, .fit = Fit::min_max, .parts = 2}>;

/// KVTuner's per-token mode: the whole head, integer zero.
/// Source  Li et al. 2025, "KVTuner"
template <int bits, Index group = 0>
using KvTunerToken = Group<GroupSpec{.bits = bits, .fit = Fit::integer, .group = group}>;

static_assert(GroupCodec<Int8> && GroupCodec<Int1> && GroupCodec<KiviKeys<2>> && GroupCodec<KvTunerToken<4>>);

}  // namespace kvpare

// Floats of 4 bits in small blocks that share a scale of 8 bits: MXFP4 and NVFP4.
#pragma once

#include <algorithm>
#include <cmath>

#include "group_tiles.hpp"
#include "small_float.hpp"

namespace kvpare {

namespace detail {

/// Codes of a block whose scale is known. `even`: nearest(x * (1 / scale)), as hardware converts. `down`: the first of the
/// sixteen values, in the order of their codes, with the least |value * scale - x|, as ggml has it.
template <Ties ties>
KVPARE_HD void quantize_e2m1(const float* x, Index stride, Index n, float scale, std::uint8_t* codes,
                             Index code_stride) {
  static_assert(ties == Ties::even || ties == Ties::down, "4-bit floats round ties to even, or down as ggml does");
  if constexpr (ties == Ties::even) {
    const float inverse = inverse_of(scale);
    if (stride == 1 && code_stride == 1) {
      for (Index i = 0; i < n; ++i) codes[i] = E2M1::nearest(as_coded(x[i]) * inverse);
    } else {
      for (Index i = 0; i < n; ++i) codes[i * code_stride] = E2M1::nearest(as_coded(x[i * stride]) * inverse);
    }
  } else {
    for (Index i = 0; i < n; ++i) {
      const float v = as_coded(x[i * stride]);
      std::uint8_t best = 0;
      float least = std::abs(v);
      for (unsigned c = 1; c < 16; ++c)
        if (const float error = std::abs(product(entry_of<E2M1::values>(c), scale) - v); error < least)
          least = error, best = static_cast<std::uint8_t>(c);
      codes[i * code_stride] = best;
    }
  }
}

KVPARE_HD inline float largest_magnitude(const float* x, Index stride, Index n) {
  if (stride == 1)
    if (const std::uint32_t top = magnitude_bits(x, n); top <= std::bit_cast<std::uint32_t>(largest_coded))
      return std::bit_cast<float>(top);
  float amax = 0;
  for (Index i = 0; i < n; ++i) amax = std::max(amax, std::abs(as_coded(x[i * stride])));
  return amax;
}

/// E8M0: 2^(e - 127); 255 is NaN.
constexpr KVPARE_HD float e8m0_value(std::uint32_t e) {
  if (e == 255) return std::numeric_limits<float>::quiet_NaN();
  return e == 0 ? 0x1p-127f : std::bit_cast<float>(e << 23);
}

/// ggml's unsigned E4M3: half a step rounds up, subnormals stop below the least normal number, 256 and above are 448.
KVPARE_HD inline std::uint8_t ggml_ue4m3(float x) {
  if (!(x > 0)) return 0;
  const std::uint32_t word = std::bit_cast<std::uint32_t>(x);
  const int e = static_cast<int>(word >> 23) - 120;
  if (e <= 0) return static_cast<std::uint8_t>(std::min(static_cast<int>(x * 512.0f + 0.5f), 7));
  if (e >= 15) return 0x7e;
  const std::uint32_t code = (static_cast<std::uint32_t>(e) << 3 | (word >> 20 & 7u)) + (word >> 19 & 1u);
  return static_cast<std::uint8_t>(code >= 0x78 ? 0x7e : code);
}

}  // namespace detail

/// OCP MXFP4: 32 numbers in E2M1 share a power of two.
///
/// Value   x' = e2m1(code) * 2^(e - 127), e = floor(log2 max|x|) + 125, at least 0
/// Layout  per row:  codes, two to a byte, the even channel low | e [W / 32], one byte each
/// Bytes   tile_bytes({T, W}) = T * (W / 2 + W / 32): 4.25 bits per number
/// Error   |x - x'| <= max|x| / 4 (numbers above 6 scales are 6 scales); numbers of the format are exact
/// Ties    even (hardware) or down (ggml): 2.5 is 2 both ways, 3.5 is 4 or 3
/// NaN     counts as 0, infinities as 2^126; a block of zeros has e = 0. e = 255 is never written and decodes to NaN.
/// State   none
/// Source  OCP Microscaling Formats 1.0
template <Ties ties = Ties::even>
struct MxFp4
    : detail::GroupTiles<MxFp4<ties>, GroupForm{.bits = 4, .table = true, .group = 32, .scale = ScaleType::e8m0}> {
  static constexpr std::string_view name = ties == Ties::even ? "mxfp4" : "mxfp4_ggml";
  static constexpr const auto& levels = detail::E2M1::values;
  static KVPARE_HD float scale_of(GroupBits bits, const float* = nullptr) { return detail::e8m0_value(bits.scale); }
  static KVPARE_HD float zero_of(GroupBits, const float* = nullptr) { return 0.0f; }
  static KVPARE_HD float level(std::uint8_t code) { return detail::entry_of<detail::E2M1::values>(code & 15u); }
  static KVPARE_HD GroupBits quantize(const float* x, Index stride, Index n, const float*, std::uint8_t* codes,
                                      Index code_stride) {
    const auto word = std::bit_cast<std::uint32_t>(detail::largest_magnitude(x, stride, n));
    const GroupBits bits{static_cast<std::uint32_t>(std::max(static_cast<int>(word >> 23) - 2, 0)), 0};
    detail::quantize_e2m1<ties>(x, stride, n, scale_of(bits), codes, code_stride);
    return bits;
  }
};

/// How the global scale of NVFP4 follows from the largest number of a tensor.
enum class NvFp4Global : std::uint8_t {
  standard,    // amax / (448 * 6): block scales use all of E4M3
  flashinfer,  // amax / 448, paged KV: block scales up to 74.7
  none         // 1, as ggml
};
/// The state of an NvFp4; 1 where there is nothing to scale.
constexpr KVPARE_HD float nvfp4_global(NvFp4Global convention, float amax) {
  if (convention == NvFp4Global::none || !(amax >= 0x1p-100f && amax <= detail::largest_coded)) return 1.0f;
  return amax / (convention == NvFp4Global::standard ? 448.0f * 6.0f : 448.0f);
}

/// NVFP4: 16 numbers in E2M1 share an E4M3 scale; one float g for all of them is state.
///
/// Value   x' = e2m1(code) * (e4m3(s) * g), s = e4m3(max|x| / 6 / g), ties to even, saturating
/// Scale   g positive, null = 1; nvfp4_global(convention, amax of the tensor)
/// Layout  per row:  codes, two to a byte, the even channel low | s [W / 16], one byte each
/// Bytes   tile_bytes({T, W}) = T * (W / 2 + W / 16): 4.5 bits per number
/// Error   |x - x'| <= max|x| / 6 (1 + 2^-4) while s is a normal number that does not saturate: max|x| / 6 in [g / 64, 448 g];
///         smaller numbers lose up to 3 g 2^-9 more: without a global scale (g = 1) numbers below 0.006 are 0.
/// Ties    `even`: of codes and of s, as hardware. `down`: ggml, codes down, s half up, 256 and more is 448.
/// NaN     counts as 0, infinities as 2^126. Scale bytes above 0x7e are never written; 0x7f and 0xff decode to NaN.
/// State   1 float: g
template <Ties ties = Ties::even>
struct NvFp4
    : detail::GroupTiles<NvFp4<ties>, GroupForm{.bits = 4, .table = true, .group = 16, .scale = ScaleType::e4m3}> {
  static constexpr std::string_view name = ties == Ties::even ? "nvfp4" : "nvfp4_ggml";
  static constexpr const auto& levels = detail::E2M1::values;
  static constexpr KVPARE_HD Index state_floats(Index) { return 1; }
  /// The standard convention; ggml's codec has none, FlashInfer's is the caller's to set.
  static KVPARE_HD void make_state(Index width, const Measured& r, float* state) {
    *state = nvfp4_global(ties == Ties::even ? NvFp4Global::standard : NvFp4Global::none, r.peak(width));
  }
  static KVPARE_HD float scale_of(GroupBits bits, const float* state) {
    return detail::entry_of<detail::E4M3::values>(bits.scale & 255u) * (state ? *state : 1.0f);
  }
  static KVPARE_HD float zero_of(GroupBits, const float*) { return 0.0f; }
  static KVPARE_HD float level(std::uint8_t code) { return detail::entry_of<detail::E2M1::values>(code & 15u); }
  static KVPARE_HD GroupBits quantize(const float* x, Index stride, Index n, const float* state, std::uint8_t* codes,
                                      Index code_stride) {
    float scale = detail::largest_magnitude(x, stride, n) / 6.0f;
    if (state) scale /= *state;
    GroupBits bits;
    bits.scale = ties == Ties::even ? detail::E4M3::nearest(scale) : detail::ggml_ue4m3(scale);
    detail::quantize_e2m1<ties>(x, stride, n, scale_of(bits, state), codes, code_stride);
    return bits;
  }
};

static_assert(GroupCodec<MxFp4<>> && GroupCodec<NvFp4<>>);

}  // namespace kvpare

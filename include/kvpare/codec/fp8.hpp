// Floats of 8 bits with one scale for all tokens of a head, or of a tensor.
#pragma once

#include "group_tiles.hpp"
#include "small_float.hpp"

namespace kvpare {

/// The scale with which `amax` is the largest number; 1 where there is nothing to scale.
template <class C>
constexpr KVPARE_HD float fp8_scale(float amax) {
  return amax >= detail::least_scale * C::largest && amax <= detail::largest_coded ? amax / C::largest : 1.0f;
}

/// FP8 as OCP defines it. The scale is state, not stored with the rows: one float per head; per tensor = the same for all.
///
/// Value   x' = value(code) * scale, code = the code nearest to x * (1 / scale), ties to even, saturating
/// Scale   positive; null or 1 = uncalibrated; calibrated: fp8_scale(amax) = amax / largest
/// Bytes   tile_bytes({T, W}) = T * W, exact; row t at t * W
/// Error   E4M3: |x - x'| <= |x| 2^-4, or scale * 2^-10 if more, up to |x| = 448 scale; E5M2: |x| 2^-3, scale * 2^-17, 57344
///         Values of the format times the scale are exact where that product is.
/// NaN     counts as 0; infinities and all above the largest saturate. NaN and infinity codes are never written; decode of
///         foreign bytes gives what the format says.
/// Source  OCP 8-bit Floating Point Specification 1.0: E4M3 (FN: no infinity, up to 448), E5M2
template <class Float>
struct Fp8 : detail::GroupTiles<Fp8<Float>, GroupForm{.bits = 8, .table = true, .scale = ScaleType::one}> {
  static_assert(Float::bits == 8, "8 bits");
  static constexpr std::string_view name = std::is_same_v<Float, detail::E4M3> ? "fp8_e4m3" : "fp8_e5m2";
  static constexpr float largest = Float::magnitude(std::is_same_v<Float, detail::E4M3> ? 0x7e : 0x7b);
  static constexpr const auto& levels = Float::values;

  static constexpr KVPARE_HD Index state_floats(Index) { return 1; }
  static KVPARE_HD void make_state(Index width, const Measured& r, float* state) {
    *state = fp8_scale<Fp8>(r.peak(width));
  }
  static KVPARE_HD float scale_of(GroupBits, const float* state) { return state ? *state : 1.0f; }
  static KVPARE_HD float zero_of(GroupBits, const float*) { return 0.0f; }
  static KVPARE_HD float level(std::uint8_t code) { return detail::entry_of<Float::values>(code); }
  static KVPARE_HD GroupBits quantize(const float* x, Index stride, Index n, const float* state, std::uint8_t* codes,
                                      Index code_stride) {
    const float inverse = state ? 1.0f / *state : 1.0f;
    if (stride == 1 && code_stride == 1) {
      for (Index i = 0; i < n; ++i) codes[i] = Float::nearest(x[i] * inverse);
    } else {
      for (Index i = 0; i < n; ++i) codes[i * code_stride] = Float::nearest(x[i * stride] * inverse);
    }
    return {};
  }
};
using Fp8E4M3 = Fp8<detail::E4M3>;
using Fp8E5M2 = Fp8<detail::E5M2>;

static_assert(GroupCodec<Fp8E4M3> && GroupCodec<Fp8E5M2>);

}  // namespace kvpare

// Three levels, five numbers to a byte.
#pragma once

#include "group.hpp"

namespace kvpare {

/// What a ternary group's scale is, and from where on a number is not 0.
enum class TernaryFit : std::uint8_t {
  nonzero,  // 0 for |x| <= γ mean|x|; scale = mean|x| of the others: least error for these codes (VidKV, mended)
  mean,     // 0 for |x| <= γ mean|x|; scale = mean|x| of all
  amax      // scale = max|x|, 0 for |x| < scale / 2 (ggml's tq1_0 and tq2_0); γ has no part in it
};

/// Codes 0, 1, 2 for -scale, 0, scale.
///
/// Value   x' = scale * (code - 1); γ = gamma_percent / 100: 70 in the paper, 50 in its code
/// Layout  along channels, row by row:  ceil(W / 5) bytes of codes | scales [W / G], halves
///         along tokens:  codes [T / G][W] of ceil(G / 5) bytes | scales [T / G][W]
///         A byte is c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4.
/// Bytes   per row of 128, one group: 26 + 2, 1.75 bits per number; along 32 tokens: 7 + 2 bytes, 2.25 bits
/// Error   nonzero, mean: |x - x'| <= max(γ mean|x|, max|x| - scale, scale - γ mean|x|); amax: scale / 2
/// NaN     counts as 0; infinities and all above 2^126 as 2^126; scales above 65504 are 65504
/// State   none
/// Source  "Plug-and-Play 1.x-Bit KV Cache Quantization for Video LLMs" (VidKV), arXiv 2503.16257; its released code drops the
///         scale when it decodes, which is not copied
template <TernaryFit fit = TernaryFit::nonzero, Along along = Along::channels, Index group = 0, int gamma_percent = 70>
struct Ternary
    : detail::GroupTiles<Ternary<fit, along, group, gamma_percent>,
                         GroupForm{.bits = 2, .ternary = true, .offset = 1, .along = along, .group = group}> {
  static_assert(gamma_percent >= 0 && gamma_percent <= 200, "gamma is a share of the mean, up to twice");

 private:
  static constexpr ShortText text = [] {
    ShortText t("ternary");
    if (along == Along::tokens) t << "_channel";
    if (group > 0) t << "_g" << group;
    if (fit == TernaryFit::mean) t << "_mean";
    if (fit == TernaryFit::amax) t << "_amax";
    if (fit != TernaryFit::amax && gamma_percent != 70) t << "_gamma" << Index{gamma_percent};
    return t;
  }();

 public:
  static constexpr std::string_view name = text.view();
  static KVPARE_HD float scale_of(GroupBits bits, const float* = nullptr) {
    return detail::half_to_float(static_cast<std::uint16_t>(bits.scale));
  }
  static KVPARE_HD float zero_of(GroupBits, const float* = nullptr) { return 0.0f; }
  static KVPARE_HD float level(std::uint8_t code) { return static_cast<float>(code) - 1.0f; }
  static KVPARE_HD GroupBits quantize(const float* x, Index stride, Index n, const float*, std::uint8_t* codes,
                                      Index code_stride) {
    const auto magnitude = [x, stride](Index i) { return std::abs(detail::as_coded(x[i * stride])); };
    float amax = 0;
    for (Index i = 0; i < n; ++i) amax = magnitude(i) > amax ? magnitude(i) : amax;
    const double sum = detail::sum_of(n, magnitude);
    const float mean = n > 0 ? static_cast<float>(sum / static_cast<double>(n)) : 0.0f;
    // From `threshold` on a number counts, where it is not 0 itself; for the means only above it.
    const float threshold = fit == TernaryFit::amax ? amax / 2 : mean * (static_cast<float>(gamma_percent) / 100.0f);
    double kept = 0;
    Index count = 0;
    for (Index i = 0; i < n; ++i) {
      const float v = detail::as_coded(x[i * stride]), a = std::abs(v);
      const bool counts = (fit == TernaryFit::amax ? a >= threshold : a > threshold) && a > 0;
      codes[i * code_stride] = static_cast<std::uint8_t>(!counts ? 1 : v < 0 ? 0 : 2);
      if (counts) kept += static_cast<double>(a), ++count;
    }
    const float of_kept = count > 0 ? static_cast<float>(kept / static_cast<double>(count)) : 0.0f;
    const float scale = fit == TernaryFit::amax ? amax : fit == TernaryFit::mean ? mean : of_kept;
    return {detail::saturated_half(scale), 0};
  }
};

static_assert(GroupCodec<Ternary<>> && GroupCodec<Ternary<TernaryFit::mean, Along::tokens, 32>>);

}  // namespace kvpare

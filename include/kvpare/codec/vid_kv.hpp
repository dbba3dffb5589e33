// VidKV: keys of 1.x bits, a few channels of 2 bits and the spectrum of the others of 1 bit; values of three levels.
#pragma once

#include <array>

#include "fourier.hpp"
#include "split.hpp"
#include "ternary.hpp"
#include "thin.hpp"

namespace kvpare {

/// What one bit of a key stands for.
enum class OneBit : std::uint8_t {
  symmetric,  // -s and s: half the error
  literal     // 0 and s, as printed and as released
};

namespace detail {

/// One bit per number along tokens, x >= 0, as Fit::mean makes it, with levels 0 and 1, or -1/2 and 1/2.
///
/// Value   x' = scale * level, scale = mean|x|
/// Bytes, NaN, Empty  as Group of 1 bit
template <Index group, bool halves>
struct LiteralBit : GroupTiles<LiteralBit<group, halves>,
                               GroupForm{.bits = 1, .table = true, .along = Along::tokens, .group = group}> {
 private:
  using Signs = Group<GroupSpec{.bits = 1, .fit = Fit::mean, .along = Along::tokens, .group = group}>;
  static constexpr ShortText text = [] {
    ShortText t(halves ? "bit_halves_channel" : "bit_channel");
    if (group > 0) t << "_g" << group;
    return t;
  }();

 public:
  static constexpr std::string_view name = text.view();
  static constexpr std::array<float, 2> levels = {halves ? -0.5f : 0.0f, halves ? 0.5f : 1.0f};
  static KVPARE_HD float scale_of(GroupBits bits, const float* = nullptr) { return Signs::scale_of(bits); }
  static KVPARE_HD float zero_of(GroupBits, const float* = nullptr) { return 0.0f; }
  static constexpr KVPARE_HD float level(std::uint8_t code) {
    return static_cast<float>(code & 1u) - (halves ? 0.5f : 0.0f);
  }
  static KVPARE_HD GroupBits quantize(const float* x, Index stride, Index n, const float*, std::uint8_t* codes,
                                      Index code_stride) {
    return Signs::quantize(x, stride, n, nullptr, codes, code_stride);
  }
};

/// Of a half spectrum as real_fourier leaves it: the real parts.
struct RealParts {
  static constexpr void name(ShortText& to) { to << "_spectrum"; }
  static constexpr KVPARE_HD Index first(Index width) { return width / 2 + 1; }
};

template <Index group, OneBit decode, bool fourier>
struct NormalKeys {
  using type = Group<GroupSpec{.bits = 1, .fit = Fit::mean, .along = Along::tokens, .group = group}>;
};
template <Index group>
struct NormalKeys<group, OneBit::literal, false> {
  using type = LiteralBit<group, false>;
};
template <Index group>
struct NormalKeys<group, OneBit::literal, true> {
  using type = Split<LiteralBit<group, false>, LiteralBit<group, true>, RealParts>;
};

template <int percent, Index group, OneBit decode, bool fourier>
using VidKvInner = Split<KiviKeys<2, group>, typename NormalKeys<group, decode, fourier>::type, FirstPercent<percent>>;

}  // namespace detail

/// Keys whose channels of wide range have 2 bits, and the others 1 bit of their spectrum.
///
/// Order    stored channels are the `abnormal` ones, ascending, then the normal ones, ascending. Abnormal: the floor(percent / 100
///          * W) channels with the widest max - min over the tokens of all heads of the layer, of equal ones the lower channel.
///          (One more where the rest would be odd.)
/// Value    abnormal: KiviKeys<2, group>. Normal, m of them: y -> detail::real_fourier(y), each of its m real numbers as one
///          bit with s = mean|.| over `group` tokens, and back. Without `fourier` the numbers themselves.
///          symmetric: bits stand for -s and s.
///          literal: for 0 and s in every row of the full spectrum. Rows k and m - k of imaginary parts have opposite bits, and
///          what the inverse makes of both is ±s/2 in the half that is stored. (A part of exactly 0 is +s/2 here and 0 there.)
/// Why half a spectrum  the paper's m complex numbers of a real row are 2 m numbers that say everything twice: 2 bits. Scaled
///          to orthonormal rows the same half has the weights of Parseval, and mean|.| scales along.
/// Folds    the same transform of the query once: no inverse per token
/// Bytes    tile_bytes({T, W}) = n (T / 4 + 4 T / G) + m (T / 8 + 2 T / G), n abnormal, m = W - n, G = group or T:
///          percent 50, group 32: 2.25 bits per number, nominally 1.5
/// Error    abnormal: scale / 2 as KiviKeys. Normal: each coordinate of the spectrum by at most max|.| of its group.
/// NaN      counts as 0; magnitudes above 2^100 count as 2^100 and drown the rest of their row's spectrum
/// State    order [W] as floats: stored number i is channel order[i]; null = as they are. Other floats count as the nearest
///          channel; what names one twice then decodes to some floats.
/// Source   Tao et al. 2025, "Plug-and-Play 1.x-Bit KV Cache Quantization for Video LLMs" (VidKV), arXiv 2503.16257. Its
///          Fourier transform is for k of 50 and 75 percent. Deviates: half a spectrum; symmetric bits unless `literal`.
template <int percent = 50, Index group = 32, OneBit decode_as = OneBit::symmetric, bool fourier = (percent >= 50)>
struct VidKvKeys : detail::Around<VidKvKeys<percent, group, decode_as, fourier>,
                                  detail::VidKvInner<percent, group, decode_as, fourier>> {
  static_assert(percent > 0 && percent < 100, "percent of the channels that have 2 bits: 1 to 99");

 private:
  static constexpr ShortText text = [] {
    ShortText t("vid_kv");
    t << Index{percent};
    if (group > 0) t << "_g" << group;
    if (fourier != (percent >= 50)) t << (fourier ? "_fourier" : "_plain");
    if (decode_as == OneBit::literal) t << "_literal";
    return t;
  }();
  static constexpr Index largest = detail::max_coded_width;

 public:
  static constexpr std::string_view name = text.view();
  static constexpr bool host_only = true;
  static constexpr Index own_state_floats(Index width) { return width; }
  /// Channels of 2 bits.
  static constexpr Index abnormal(Index width) { return FirstPercent<percent>::first(width); }

  static constexpr bool ranges_of_all = true;
  static void make_state(Index width, const Measured& m, float* state) {
    const float* low = m.layer_min != nullptr ? m.layer_min : m.min;
    const float* high = m.layer_max != nullptr ? m.layer_max : m.max;
    const auto range = [low, high](Index c) { return low[c] <= high[c] ? high[c] - low[c] : 0.0f; };
    Index first = 0, rest = abnormal(width);
    for (Index c = 0; c < width; ++c)
      state[detail::among_largest(width, abnormal(width), c, range) ? first++ : rest++] = static_cast<float>(c);
  }

  static void forward(Index width, const float* state, float* x) {
    for (Index c = 0; c < width; ++c)
      if (!(std::abs(x[c]) <= 0x1p100f)) x[c] = x[c] != x[c] ? 0.0f : std::copysign(0x1p100f, x[c]);
    turn(width, state, x);
  }
  static void backward(Index width, const float* state, float* x) {
    if constexpr (fourier) detail::real_fourier_back<largest>(x + abnormal(width), width - abnormal(width));
    if (state == nullptr) return;
    float stored[largest];
    for (Index i = 0; i < width; ++i) stored[i] = x[i], x[i] = 0;
    for (Index i = 0; i < width; ++i) x[detail::channel_in(state[i], width)] = stored[i];
  }
  static float fold_query(Index width, const float* state, float* q) {
    turn(width, state, q);
    return 0.0f;
  }
  static void fold_output(Index width, const float* state, float, float* out) { backward(width, state, out); }

 private:
  static void turn(Index width, const float* state, float* x) {
    if (state != nullptr) {
      float given[largest];
      for (Index c = 0; c < width; ++c) given[c] = x[c];
      for (Index i = 0; i < width; ++i) x[i] = given[detail::channel_in(state[i], width)];
    }
    if constexpr (fourier) detail::real_fourier<largest>(x + abnormal(width), width - abnormal(width));
  }
};

/// Its values: ternary per channel over `group` tokens; gamma_percent 70 in the paper, 50 in its code.
template <Index group = 32, int gamma_percent = 70>
using VidKvValues = Ternary<TernaryFit::nonzero, Along::tokens, group, gamma_percent>;
/// Values of tokens that a caller protects: 2 bits per channel, in pages of their own, so groups are among themselves.
template <Index group = 32>
using VidKvProtectedValues = KiviKeys<2, group>;

static_assert(FoldedCodec<VidKvKeys<>> && MakesState<VidKvKeys<>> && SplitCodec<VidKvKeys<>::Inner>);
static_assert(VidKvKeys<>::tile_bytes({64, 128}) * 8 * 4 == 9 * 64 * 128, "2.25 bits per number");

}  // namespace kvpare

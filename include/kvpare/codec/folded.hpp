// Codecs around codecs: a factor and a shift per channel, which attention folds into the query and the output.
#pragma once

#include <cmath>

#include "group.hpp"

namespace kvpare {

namespace detail {

/// What every codec around another one has in common; `C` brings own_state_floats, forward, backward, and their folds.
template <class C, Codec InnerCodec>
struct Around {
  using Inner = InnerCodec;
  static constexpr bool rows_move = Inner::rows_move, host_only = kvpare::host_only<Inner>();
  static constexpr KVPARE_HD bool fits(TileShape t) {
    return t.width >= 1 && t.width <= max_coded_width && (rows_move || t.tokens <= 64) && Inner::fits(inner(t));
  }
  static constexpr KVPARE_HD Index tile_bytes(TileShape t) { return Inner::tile_bytes(inner(t)); }
  static constexpr bool state_of_layer = kvpare::state_of_layer<Inner>() && C::own_state_floats(1024) == 0;
  static constexpr bool needs_state = kvpare::needs_state<Inner>();
  static constexpr KVPARE_HD Index state_floats(Index width) {
    return C::own_state_floats(width) + kvpare::state_floats<Inner>(inner({1, width}).width);
  }
  static KVPARE_HD const float* inner_state(Index width, const float* state) {
    return state && state_floats(width) > C::own_state_floats(width) ? state + C::own_state_floats(width) : nullptr;
  }
  /// The tile that Inner sees.
  static constexpr KVPARE_HD TileShape inner(TileShape t) {
    if constexpr (requires { C::inner_width(t.width); })
      return {t.tokens, C::inner_width(t.width)};
    else
      return t;
  }

  static KVPARE_HD void encode(TileShape t, const float* rows, Index first, Index count, const float* state,
                               std::byte* tile) requires(Inner::rows_move) {
    float row[max_coded_width];
    for (Index r = 0; r < count; ++r) {
      for (Index c = 0; c < t.width; ++c) row[c] = rows[r * t.width + c];
      C::forward(t.width, state, row);
      Inner::encode(inner(t), row, first + r, 1, inner_state(t.width, state), tile);
    }
  }
  /// A whole tile at once needs all its rows transformed: up to 64 rows on the stack, 256 KiB at the widest. No device has
  /// that for every thread; there a kernel lends the memory, see encode_over.
  static void encode(TileShape t, const float* rows, Index first, Index count, const float* state,
                     std::byte* tile) requires(!Inner::rows_move) {
    float all[64 * max_coded_width];
    for (Index i = 0; i < count * t.width; ++i) all[i] = rows[i];
    encode_over(t, all, first, count, state, tile);
  }
  /// The same bytes; `rows` are written over.
  static KVPARE_HD void encode_over(TileShape t, float* rows, Index first, Index count, const float* state,
                                    std::byte* tile) {
    const Index stored = inner(t).width;
    for (Index r = 0; r < count; ++r) {
      float* row = rows + r * t.width;
      C::forward(t.width, state, row);
      for (Index c = 0; c < stored && stored < t.width; ++c) rows[r * stored + c] = row[c];
    }
    if constexpr (requires { Inner::encode_over(t, rows, first, count, state, tile); })
      Inner::encode_over(inner(t), rows, first, count, inner_state(t.width, state), tile);
    else
      Inner::encode(inner(t), rows, first, count, inner_state(t.width, state), tile);
  }
  static KVPARE_HD void decode(TileShape t, const std::byte* tile, Index slot, const float* state, float* row) {
    Inner::decode(inner(t), tile, slot, inner_state(t.width, state), row);
    C::backward(t.width, state, row);
  }
};

}  // namespace detail

// The states, channel by channel.

/// Factor and shift of a channel whose numbers lie in [low, high], for Fixed codes. A constant channel has factor 0.
struct ChannelRange {
  float factor = 1, shift = 0;
};
constexpr KVPARE_HD ChannelRange channel_range(float low, float high, int bits) {
  return {(high - low) / static_cast<float>((1 << bits) - 1), low};
}
/// ZipCache's factor of a value channel: sqrt(max|v|); 1 where all are zero.
KVPARE_HD inline float channel_factor(float amax) { return amax > 0 ? std::sqrt(amax) : 1.0f; }
/// MiKV's balancer: sqrt(max|q| / max|k|) within [1e-4, 1e4]; 1 where either is zero.
KVPARE_HD inline float channel_balance(float query_amax, float key_amax) {
  if (!(query_amax > 0) || !(key_amax > 0)) return 1.0f;
  const float b = std::sqrt(query_amax / key_amax);
  return b < 1e-4f ? 1e-4f : b > 1e4f ? 1e4f : b;
}

/// What a ChannelMap stores for a number x of a channel with factor f and shift h.
enum class ChannelRule : std::uint8_t {
  affine,   // (x - h) / f   state: f [W], h [W]
  scaled,   // x / f         state: f [W]
  balanced  // x * f         state: f [W]
};

/// A factor, and perhaps a shift, per channel around another codec.
///
/// Value    x' = y' f + h, y' f, or y' / f of what Inner stores
/// State    own: f [W], then h [W] where the rule has one; null = ones and zeros
/// Folds    keys: q f (or q / f), bias q·h; values: out f + h Σp (or out / f): one multiplication per channel
/// Error    Inner's, times f (or over f)
/// Special  a factor of 0, a subnormal one, an infinity or a NaN counts as 0: such a channel stores zeros and is read as h (0)
/// NaN      as Inner: where it counts as 0, a NaN is read as h
///
/// ZipVL's keys are `affine` around Fixed codes: channel parameters of a token class; its values `scaled` around Affine codes,
/// per token and head where ZipCache takes one scale per token across heads: groups never span heads here, which costs
/// 32 / D bits per number instead of 32 / (H D). MiKV's keys are `balanced`.
template <Codec InnerCodec, ChannelRule rule>
struct ChannelMap : detail::Around<ChannelMap<InnerCodec, rule>, InnerCodec> {
 private:
  static constexpr ShortText text = [] {
    ShortText t(rule == ChannelRule::affine ? "affine_" : rule == ChannelRule::scaled ? "scaled_" : "balanced_");
    return t << InnerCodec::name;
  }();
  static constexpr bool shifts = rule == ChannelRule::affine;

 public:
  static constexpr std::string_view name = text.view();
  static constexpr KVPARE_HD Index own_state_floats(Index width) { return shifts ? 2 * width : width; }

  /// affine: the range of each channel over the codes; scaled: sqrt(max|v|); balanced: sqrt(max|q| / max|k|).
  static constexpr bool needs_query_peak = rule == ChannelRule::balanced;
  /// MiKV's and ZipVL's maxima are the prompt's; ranges of codes are those of the tokens that get them.
  static constexpr bool ranges_of_all = rule != ChannelRule::affine;
  static KVPARE_HD void make_state(Index width, const Measured& r,
                                   float* state) requires(kvpare::state_floats<InnerCodec>(1) == 0 &&
                                                          (rule != ChannelRule::affine || GroupCodec<InnerCodec>)) {
    for (Index c = 0; c < width; ++c) {
      const bool any = r.min[c] <= r.max[c];
      const float low = any ? r.min[c] : 0.0f, high = any ? r.max[c] : 0.0f;
      const float amax = -low > high ? -low : high;
      if constexpr (rule == ChannelRule::affine) {
        const ChannelRange range = channel_range(low, high, InnerCodec::form.bits);
        state[c] = range.factor, state[width + c] = range.shift;
      } else if constexpr (rule == ChannelRule::scaled) {
        state[c] = channel_factor(amax);
      } else {
        state[c] = channel_balance(r.query_peak != nullptr ? r.query_peak[c] : 0.0f, amax);
      }
    }
  }

  static KVPARE_HD void forward(Index width, const float* state, float* x) {
    if (!state) return;
    for (Index c = 0; c < width; ++c) {
      const float f = factor(state[c]), h = shifts ? state[width + c] : 0.0f;
      if constexpr (rule == ChannelRule::balanced)
        x[c] *= f;
      else
        x[c] = f != 0 ? (x[c] - h) / f : 0.0f;
    }
  }
  static KVPARE_HD void backward(Index width, const float* state, float* x) {
    if (!state) return;
    for (Index c = 0; c < width; ++c) x[c] = detail::product(x[c], gain(state[c])) + (shifts ? state[width + c] : 0.0f);
  }
  /// The same of one channel: x' = y' factor + shift.
  static KVPARE_HD ChannelRange stretch(Index width, const float* state, Index c) {
    if (!state) return {};
    return {gain(state[c]), shifts ? state[width + c] : 0.0f};
  }
  static KVPARE_HD float fold_query(Index width, const float* state, float* q) {
    float bias = 0;
    if (!state) return bias;
    for (Index c = 0; c < width; ++c) {
      if constexpr (shifts) bias += detail::product(q[c], state[width + c]);
      q[c] *= gain(state[c]);
    }
    return bias;
  }
  static KVPARE_HD void fold_output(Index width, const float* state, float sum, float* out) {
    if (!state) return;
    for (Index c = 0; c < width; ++c)
      out[c] = detail::product(out[c], gain(state[c])) + (shifts ? detail::product(sum, state[width + c]) : 0.0f);
  }

 private:
  static KVPARE_HD float factor(float f) {
    return std::abs(f) >= detail::least_scale && std::abs(f) <= detail::largest_coded ? f : 0.0f;
  }
  /// What a stored number is multiplied with.
  static KVPARE_HD float gain(float f) {
    return rule == ChannelRule::balanced ? detail::inverse_of(factor(f)) : factor(f);
  }
};

template <Codec Inner>
using ChannelAffine = ChannelMap<Inner, ChannelRule::affine>;
template <Codec Inner>
using ChannelScaled = ChannelMap<Inner, ChannelRule::scaled>;
template <Codec Inner>
using Balanced = ChannelMap<Inner, ChannelRule::balanced>;

/// Codes without a scale: x' = code, code = x to the nearest of 0 … 2^b - 1, ties to even. For ChannelAffine to stretch.
///
/// Bytes   tile_bytes({T, W}) = T * W * bits / 8: not one byte beside the codes
/// Error   |x - x'| <= 1/2 within [-1/2, 2^b - 1/2]; numbers outside of that saturate
/// NaN     counts as 0
template <int bits>
struct Fixed : detail::GroupTiles<Fixed<bits>, GroupForm{.bits = bits, .scale = ScaleType::one}> {
  static_assert(bits == 8 || (bits >= 1 && bits <= 5), "bits are 8, 5, 4, 3, 2 or 1");

 private:
  static constexpr ShortText text = [] { return ShortText("fixed") << Index{bits}; }();

 public:
  static constexpr std::string_view name = text.view();
  static KVPARE_HD float scale_of(GroupBits, const float* = nullptr) { return 1.0f; }
  static KVPARE_HD float zero_of(GroupBits, const float* = nullptr) { return 0.0f; }
  static KVPARE_HD float level(std::uint8_t code) { return static_cast<float>(code); }
  static KVPARE_HD GroupBits quantize(const float* x, Index stride, Index n, const float*, std::uint8_t* codes,
                                      Index code_stride) {
    constexpr float top = static_cast<float>((1 << bits) - 1);
    for (Index i = 0; i < n; ++i) {
      const float v = x[i * stride] > 0 ? x[i * stride] : 0.0f;  // NaN too
      codes[i * code_stride] = static_cast<std::uint8_t>(static_cast<int>(detail::round_even(v < top ? v : top)));
    }
    return {};
  }
};

/// ZipVL: keys with one range per channel and token class; values over a factor per channel, then affine per token.
/// Source  He et al. 2024, "ZipVL" and "ZipCache"
template <int bits>
using ZipVlKeys = ChannelAffine<Fixed<bits>>;
template <int bits>
using ZipVlValues = ChannelScaled<Group<GroupSpec{.bits = bits, .fit = Fit::min_max}>>;
/// MiKV: retained keys balanced against the query.
template <int bits>
using MikvKeys = Balanced<Group<GroupSpec{.bits = bits, .fit = Fit::min_max, .parts = 2}>>;

static_assert(MakesState<ZipVlKeys<4>> && MakesState<ZipVlValues<2>> && MakesState<MikvKeys<2>>);
static_assert(FoldedCodec<ZipVlKeys<4>> && FoldedCodec<ZipVlValues<2>> && FoldedCodec<MikvKeys<2>>);

}  // namespace kvpare

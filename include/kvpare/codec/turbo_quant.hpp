// TurboQuant: rotate, then one fixed codebook for every number; and the sketch that makes products unbiased.
#pragma once

#include "rotation.hpp"

namespace kvpare {

namespace detail {

/// Lloyd-Max centroids of the standard normal distribution, the positive half.
template <int bits>
inline constexpr std::array<float, 1> positive_centroids{};
template <>
inline constexpr std::array<float, 1> positive_centroids<1> = {0.7978846f};
template <>
inline constexpr std::array<float, 2> positive_centroids<2> = {0.4527800f, 1.5104176f};
template <>
inline constexpr std::array<float, 4> positive_centroids<3> = {0.2450942f, 0.7560053f, 1.3439093f, 2.1519457f};
template <>
inline constexpr std::array<float, 8> positive_centroids<4> = {0.1283950f, 0.3880483f, 0.6567591f, 0.9423405f,
                                                               1.2562312f, 1.6180464f, 2.0690172f, 2.7325896f};

}  // namespace detail

/// Lloyd-Max codes for rows whose numbers look normal, as they do after a rotation.
///
/// Value     x' = scale * c[code], c the 2^b centroids of N(0, 1), ascending
/// Scale     ||x|| / √W; corrected: ||x|| / ||c[codes]||, so that x' has the length of x ("nc"). The published codecs store ||x||
///           and divide at decode; as one half per row this is as many bytes and one multiplication less.
/// Codes     the centroid nearest to x √W / ||x||, thresholds midway, a tie goes to the lower one
/// Layout    per row:  codes, least significant bit first | scale, a half
/// Bytes     tile_bytes({T, W}) = T * (W b / 8 + 2)
/// Error     ||x - x'||² / ||x||² averages 0.363, 0.117, 0.035, 0.0095 for b = 1 … 4 on rotated rows; a single number far out
///           (a row that was not rotated) is cut to the last centroid
/// NaN       counts as 0, infinities and all above 2^126 as 2^126; scales above 65504 are 65504. A zero row has scale 0.
/// State     none
template <int bits, bool corrected = false>
struct Lloyd : detail::GroupTiles<Lloyd<bits, corrected>, GroupForm{.bits = bits, .table = true}> {
  static_assert(bits >= 1 && bits <= 4, "there are codebooks for 1 to 4 bits");

 private:
  static constexpr ShortText text = [] {
    ShortText t("lloyd");
    t << Index{bits};
    if (corrected) t << "_nc";
    return t;
  }();
  static constexpr std::size_t half_count = std::size_t{1} << (bits - 1);

 public:
  static constexpr std::string_view name = text.view();
  static constexpr auto levels = [] {
    std::array<float, 2 * half_count> all{};
    for (std::size_t k = 0; k < half_count; ++k) {
      all[half_count + k] = detail::positive_centroids<bits>[k];
      all[half_count - 1 - k] = -detail::positive_centroids<bits>[k];
    }
    return all;
  }();
  static constexpr auto thresholds = [] {
    std::array<float, 2 * half_count - 1> all{};
    for (std::size_t k = 0; k < all.size(); ++k) all[k] = (levels[k] + levels[k + 1]) / 2;
    return all;
  }();

  static KVPARE_HD float scale_of(GroupBits bits_, const float* = nullptr) {
    return detail::half_to_float(static_cast<std::uint16_t>(bits_.scale));
  }
  static KVPARE_HD float zero_of(GroupBits, const float* = nullptr) { return 0.0f; }
  static KVPARE_HD float level(std::uint8_t code) { return detail::entry_of<levels>(code & (2 * half_count - 1)); }
  static KVPARE_HD GroupBits quantize(const float* x, Index stride, Index n, const float*, std::uint8_t* codes,
                                      Index code_stride) {
    const double length = length_of(x, stride, n);
    float scale = n > 0 ? static_cast<float>(length / std::sqrt(static_cast<double>(n))) : 0.0f;
    if (scale < detail::least_scale) scale = 0;
    const float inverse = detail::inverse_of(scale);
    std::uint8_t own[detail::max_coded_width];
    for (Index i = 0; i < n; ++i) own[i] = nearest(detail::as_coded(x[i * stride]) * inverse);
    for (Index i = 0; i < n; ++i) codes[i * code_stride] = own[i];
    if (corrected && scale > 0)
      scale = static_cast<float>(length / std::sqrt(detail::sum_of(n, [&own](Index i) {
                                   return static_cast<double>(level(own[i])) * static_cast<double>(level(own[i]));
                                 })));
    return {detail::saturated_half(scale), 0};
  }

  static KVPARE_HD double length_of(const float* x, Index stride, Index n) {
    return std::sqrt(detail::sum_of(n, [x, stride](Index i) {
      const auto v = static_cast<double>(detail::as_coded(x[i * stride]));
      return v * v;
    }));
  }
  static KVPARE_HD std::uint8_t nearest(float v) {
    unsigned code = 0;
    for (std::size_t k = 0; k < 2 * half_count - 1; ++k) code += v > detail::entry_of<thresholds>(k) ? 1u : 0u;
    return static_cast<std::uint8_t>(code);
  }
};

/// A sketch matrix of ±1 entries with orthogonal rows, √W H D with random signs: what it makes of a vector looks as if the
/// matrix were normal, at W log2 W additions. (The papers draw W² normal numbers.)
template <std::uint64_t seed = 1>
struct HadamardSketch {
  static_assert(seed > 0, "a sketch needs random signs");
  static constexpr std::uint64_t name = seed;
  /// x <- S x
  static KVPARE_HD void project(Index width, float* x) {
    for (Index c = 0; c < width; ++c) x[c] *= detail::channel_sign<seed>(c);
    detail::hadamard_blocks(x, width);
    scale(width, x);
  }
  /// x <- Sᵀ x
  static KVPARE_HD void transpose(Index width, float* x) {
    detail::hadamard_blocks(x, width);
    for (Index c = 0; c < width; ++c) x[c] *= detail::channel_sign<seed>(c);
    scale(width, x);
  }

 private:
  static KVPARE_HD void scale(Index width, float* x) {
    const float root = std::sqrt(static_cast<float>(width));
    for (Index c = 0; c < width; ++c) x[c] = detail::product(x[c], root);
  }
};

/// Lloyd codes with one bit less, and the signs of a sketch of what they leave over: products with a query are unbiased.
///
/// Value   x' = scale * c[code] + factor * (Sᵀ z),  z = ±1
/// Codes   Lloyd<bits - 1>; rest r = x / ||x|| - c[codes] / √W, z = sign(S r), sign(0) = 1
/// Scale   ||x|| / √W;  factor = ||x|| ||r|| √(π/2) / W
/// Layout  per row:  codes | signs, a bit each, 1 for +1 | scale, a half | factor, a half
/// Bytes   tile_bytes({T, W}) = T * (W b / 8 + 4)
/// Error   E[q·x'] = q·x over sketches. ||x - x'||² is π/2 - 1 of what Lloyd<bits - 1> leaves (orthogonal rows; π/2 of it with
///         independent normal ones), more than Lloyd<bits>: softmax makes error of variance, so engines leave this stage out
/// NaN     as Lloyd
/// State   none
template <int bits, class Sketch = HadamardSketch<>>
struct LloydSketch {
  static_assert(bits >= 2 && bits <= 5, "1 to 4 bits of codes and one of signs");
  using Codes = Lloyd<bits - 1>;

 private:
  static constexpr ShortText text = [] {
    return ShortText("lloyd") << Index{bits - 1} << "_sketch" << Index{Sketch::name};
  }();

 public:
  static constexpr std::string_view name = text.view();
  static constexpr bool rows_move = true;
  static constexpr KVPARE_HD bool fits(TileShape t) { return t.width % 8 == 0 && Codes::fits(t); }
  static constexpr KVPARE_HD Index row_bytes(Index width) { return width * bits / 8 + 4; }
  static constexpr KVPARE_HD Index tile_bytes(TileShape t) { return t.tokens * row_bytes(t.width); }

  static KVPARE_HD void encode(TileShape t, const float* rows, Index first, Index count, const float*,
                               std::byte* tile) {
    std::uint8_t codes[detail::max_coded_width];
    float rest[detail::max_coded_width];
    const Index width = t.width;
    const float root = std::sqrt(static_cast<float>(width));
    for (Index r = 0; r < count; ++r, rows += width) {
      std::byte* row = tile + (first + r) * row_bytes(width);
      const double length = Codes::length_of(rows, 1, width);
      const GroupBits scale = Codes::quantize(rows, 1, width, nullptr, codes, 1);
      const float inverse = length >= static_cast<double>(detail::least_scale) ? static_cast<float>(1 / length) : 0.0f;
      double left = 0;
      for (Index c = 0; c < width; ++c) {
        rest[c] =
            inverse == 0 ? 0.0f : detail::product(detail::as_coded(rows[c]), inverse) - Codes::level(codes[c]) / root;
        left += static_cast<double>(rest[c]) * static_cast<double>(rest[c]);
      }
      detail::pack_codes<bits - 1>(codes, width, row);
      Sketch::project(width, rest);
      for (Index c = 0; c < width; ++c) codes[c] = rest[c] >= 0 ? 1 : 0;
      detail::pack_codes<1>(codes, width, row + width * (bits - 1) / 8);
      const double factor = length * std::sqrt(left) * 1.2533141373155003 / static_cast<double>(width);
      detail::put_bytes(row + width * bits / 8, scale.scale, 2);
      detail::put_bytes(row + width * bits / 8 + 2, detail::saturated_half(static_cast<float>(factor)), 2);
    }
  }
  static KVPARE_HD void decode(TileShape t, const std::byte* tile, Index slot, const float*, float* row) {
    std::uint8_t codes[detail::max_coded_width];
    const std::byte* bytes = tile + slot * row_bytes(t.width);
    const auto number = [&](Index at) {
      return detail::half_to_float(static_cast<std::uint16_t>(detail::get_bytes(bytes + t.width * bits / 8 + at, 2)));
    };
    detail::unpack_codes<1>(bytes + t.width * (bits - 1) / 8, t.width, codes);
    for (Index c = 0; c < t.width; ++c) row[c] = codes[c] != 0 ? 1.0f : -1.0f;
    Sketch::transpose(t.width, row);
    detail::unpack_codes<bits - 1>(bytes, t.width, codes);
    const float scale = number(0), factor = number(2);
    for (Index c = 0; c < t.width; ++c)
      row[c] = detail::product(factor, row[c]) + detail::product(scale, Codes::level(codes[c]));
  }
};

/// TurboQuant: `bits` per number in all. vLLM's keys are TurboQuant<4, true> and TurboQuant<3, true> (or Fp8E4M3), its values
/// TurboValues<4> and <3>, not rotated. LMDeploy's keys are TurboProduct<4>, its values TurboQuant<2>.
/// Source  Zandieh et al. 2025, "TurboQuant", arXiv 2504.19874; a Hadamard rotation in place of a uniformly random one
template <int bits, bool corrected = false, std::uint64_t seed = 0>
using TurboQuant = Rotated<Lloyd<bits, corrected>, seed>;
template <int bits, std::uint64_t seed = 0, class Sketch = HadamardSketch<>>
using TurboProduct = Rotated<LloydSketch<bits, Sketch>, seed>;
template <int bits>
using TurboValues = Group<GroupSpec{.bits = bits, .fit = Fit::min_max, .ties = Ties::up}>;

static_assert(GroupCodec<Lloyd<3>> && FoldedCodec<TurboQuant<3>> && FoldedCodec<TurboProduct<3>>);

}  // namespace kvpare

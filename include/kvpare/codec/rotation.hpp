// A codec that sees its rows rotated: outliers of one channel become a little of every channel.
#pragma once

#include <array>

#include "../core/random.hpp"
#include "folded.hpp"

namespace kvpare {

namespace detail {

/// x <- H x, n a power of two: halves first, then the butterflies between them. Sizes are constants so that every loop but the
/// smallest is made of whole vectors.
template <Index n>
KVPARE_HD inline void butterflies(float* x) {
  if constexpr (n == 4) {
    const float a = x[0] + x[1], b = x[0] - x[1], c = x[2] + x[3], d = x[2] - x[3];
    x[0] = a + c, x[1] = b + d, x[2] = a - c, x[3] = b - d;
  } else if constexpr (n > 1) {
    butterflies<n / 2>(x);
    butterflies<n / 2>(x + n / 2);
    for (Index i = 0; i < n / 2; ++i) {
      const float a = x[i], b = x[i + n / 2];
      x[i] = a + b, x[i + n / 2] = a - b;
    }
  }
}

/// x <- H x / sqrt(n), n a power of two up to max_coded_width: the Walsh-Hadamard matrix in natural order, its own inverse.
template <Index largest = max_coded_width>
KVPARE_HD inline void hadamard(float* x, Index n) {
#if defined(__CUDA_ARCH__)
  // The same sums in a loop: one thread has no vectors to gain, and all sizes unrolled take a minute to compile.
  for (Index half = 1; half < n; half *= 2)
    for (Index i = 0; i < n; ++i)
      if ((i & half) == 0) {
        const float a = x[i], b = x[i + half];
        x[i] = a + b, x[i + half] = a - b;
      }
  const float unit = 1.0f / std::sqrt(static_cast<float>(n));
  for (Index i = 0; i < n; ++i) x[i] = product(x[i], unit);
#else
  if constexpr (largest > 1) {
    if (n < largest) return hadamard<largest / 2>(x, n);
  }
  butterflies<largest>(x);
  const float unit = 1.0f / std::sqrt(static_cast<float>(largest));
  for (Index i = 0; i < largest; ++i) x[i] = product(x[i], unit);
#endif
}

/// Block-diagonal where n is no power of two: 96 = 64 + 32, 80 = 64 + 16, the largest blocks first.
KVPARE_HD inline void hadamard_blocks(float* x, Index n) {
  for (Index block = max_coded_width; block >= 1; block /= 2)
    for (; n >= block; x += block, n -= block) hadamard(x, block);
}

template <std::uint64_t seed>
inline constexpr auto channel_signs = [] {
  std::array<float, max_coded_width> signs{};
  for (Index c = 0; c < max_coded_width; ++c)
    signs[static_cast<std::size_t>(c)] = (random_bits(seed, c) & 1) != 0 ? -1.0f : 1.0f;
  return signs;
}();

/// One of them. Device code makes it anew: a few integer operations, where a table would take up the cache of constants.
template <std::uint64_t seed>
KVPARE_HD inline float channel_sign(Index c) {
#if defined(__CUDA_ARCH__)
  return (random_bits(seed, c) & 1) != 0 ? -1.0f : 1.0f;
#else
  return channel_signs<seed>[static_cast<std::size_t>(c)];
#endif
}

}  // namespace detail

/// Inner codes H x, or H D x with random signs D where there is a seed: an orthogonal transform, so lengths and products stay.
///
/// Value   x' = D H y', H the normalised Walsh-Hadamard matrix of natural order, block-diagonal (detail::hadamard_blocks)
/// Folds   q·x' = (H D q)·y', Σ p x' = D H Σ p y': one transform per query and per output, W log2 W additions
/// Error   ||x - x'|| is Inner's ||y - y'||
/// Seed    0 = no signs, as engines do it: enough unless the data itself looks like rows of H
/// NaN     counts as 0 in a row that is coded; magnitudes above 2^100, infinities too, count as 2^100 and drown their block.
///         Queries and outputs pass as they are.
/// State   none of its own
template <Codec InnerCodec, std::uint64_t seed = 0>
struct Rotated : detail::Around<Rotated<InnerCodec, seed>, InnerCodec> {
 private:
  static constexpr ShortText text = [] {
    ShortText t("hadamard");
    if (seed != 0) t << static_cast<Index>(seed);
    return t << "_" << InnerCodec::name;
  }();

 public:
  static constexpr std::string_view name = text.view();
  static_assert(seed < std::uint64_t{1} << 62, "the seed is part of the name");
  static constexpr KVPARE_HD Index own_state_floats(Index) { return 0; }
  static KVPARE_HD void forward(Index width, const float*, float* x) {
    for (Index c = 0; c < width; ++c) {
      if (!(std::abs(x[c]) <= 0x1p100f)) x[c] = x[c] != x[c] ? 0.0f : std::copysign(0x1p100f, x[c]);
    }
    rotate(width, x);
  }
  static KVPARE_HD void backward(Index width, const float*, float* x) {
    detail::hadamard_blocks(x, width);
    turn(width, x);
  }
  static KVPARE_HD float fold_query(Index width, const float*, float* q) {
    rotate(width, q);
    return 0.0f;
  }
  static KVPARE_HD void fold_output(Index width, const float* state, float, float* out) { backward(width, state, out); }

 private:
  static KVPARE_HD void rotate(Index width, float* x) {
    turn(width, x);
    detail::hadamard_blocks(x, width);
  }
  static KVPARE_HD void turn(Index width, float* x) {
    if constexpr (seed != 0)
      for (Index c = 0; c < width; ++c) x[c] *= detail::channel_sign<seed>(c);
  }
};

static_assert(FoldedCodec<Rotated<Int4>> && FoldedCodec<Balanced<Rotated<Int4, 1>>>);

}  // namespace kvpare

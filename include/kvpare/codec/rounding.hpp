// How codecs round: the same few operations everywhere, so that codes are the same bits everywhere.
#pragma once

#include <bit>
#include <cstdint>

#include "../core/dtype.hpp"

namespace kvpare {

/// Where a number goes that lies midway between two codes.
enum class Ties : std::uint8_t {
  even,
  away,  // from zero
  down,  // towards zero
  up     // trunc(x / scale + offset + 0.5), the sum rounded to float first, as ggml says it
};

namespace detail {

/// A number whose magnitude is more than this counts as this; then no difference of two numbers overflows.
inline constexpr float largest_coded = 0x1p126f;
/// Scales below this count as 0: their inverse would overflow.
inline constexpr float least_scale = 0x1p-126f;

constexpr KVPARE_HD float as_coded(float x) {
  if (x != x) return 0.0f;
  return x > largest_coded ? largest_coded : x < -largest_coded ? -largest_coded : x;
}

constexpr KVPARE_HD std::uint16_t saturated_half(float x) {
  const std::uint16_t h = float_to_half(x);
  return (h & 0x7fffu) >= 0x7c00u ? static_cast<std::uint16_t>((h & 0x8000u) | 0x7bffu) : h;
}

/// |x| < 2^22, to the nearest integer, ties to even.
KVPARE_HD inline float round_even(float x) {
  constexpr float shift = 0x1.8p23f;
  return (x + shift) - shift;
}

/// A product that is rounded before anything is added to it: compilers that contract a * b + c see an operation in between.
/// (Infinities of positive sign become the largest float.)
KVPARE_HD inline float rounded(float x) {
  constexpr std::int32_t largest = 0x7f7fffff;
  const auto word = std::bit_cast<std::int32_t>(x);
  return std::bit_cast<float>(word < largest ? word : largest);
}

/// a * b, rounded, where the next thing done to it may be an addition. Compilers for devices contract unless told not to,
/// and a header cannot tell them: codes and decoded numbers would not be the host's, where this is a * b and nothing else.
KVPARE_HD inline float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
KVPARE_HD inline double product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

/// table[i] of a constexpr array of floats. Device code knows the values of such an array, not its address, and so needs a
/// copy for places that are known at run time: one in its constant memory, however many functions look up.
template <const auto& table>
KVPARE_HD inline float entry_of(std::size_t i) {
#if defined(__CUDA_ARCH__)
  static constexpr auto copy = table;
  return copy[i];
#else
  return table[i];
#endif
}

/// To the nearest integer, ties to even, within -2^22 … 2^22 - 1; whatever lies outside becomes something outside on the same
/// side, for a clamp to catch. No NaN. The sum's bits are integers in the order of floats, so nothing here can branch.
KVPARE_HD inline std::int32_t round_even_int(float x) {
  constexpr float shift = 0x1.8p23f;
  const auto word = std::bit_cast<std::int32_t>(x + shift);
  return (word > 0 ? word : 0) - std::bit_cast<std::int32_t>(shift);
}

/// |x| < 2^22, to the nearest integer, ties away from zero.
KVPARE_HD inline float round_away(float x) {
  const float whole = static_cast<float>(static_cast<int>(x));
  const float rest = x - whole;
  return rest >= 0.5f ? whole + 1.0f : rest <= -0.5f ? whole - 1.0f : whole;
}

/// |x| < 2^22, to the nearest integer, ties towards zero.
KVPARE_HD inline float round_down(float x) {
  const float whole = static_cast<float>(static_cast<int>(x));
  const float rest = x - whole;
  return rest > 0.5f ? whole + 1.0f : rest < -0.5f ? whole - 1.0f : whole;
}

/// The bits of the largest magnitude, NaN above all others. Integers: their maximum vectorises whatever the compiler may
/// assume of floats.
KVPARE_HD inline std::uint32_t magnitude_bits(const float* x, Index n) {
  std::int32_t top = 0;
  for (Index i = 0; i < n; ++i) {
    const std::int32_t word = std::bit_cast<std::int32_t>(x[i]) & 0x7fffffff;
    top = word > top ? word : top;
  }
  return static_cast<std::uint32_t>(top);
}

/// Floats as integers of the same order, and back.
constexpr KVPARE_HD std::int32_t ordered(float x) {
  const auto word = std::bit_cast<std::int32_t>(x);
  return word ^ (word >> 31 & 0x7fffffff);
}
constexpr KVPARE_HD float from_ordered(std::int32_t word) {
  return std::bit_cast<float>(word ^ (word >> 31 & 0x7fffffff));
}

/// Σ term(i) in four interleaved sums: additions need not wait for each other.
template <class Term>
KVPARE_HD double sum_of(Index n, Term term) {
  double sums[4] = {};
  const Index whole = n / 4 * 4;
  for (Index i = 0; i < whole; i += 4)
    for (Index k = 0; k < 4; ++k) sums[k] += static_cast<double>(term(i + k));
  for (Index i = whole; i < n; ++i) sums[0] += static_cast<double>(term(i));
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

constexpr KVPARE_HD float inverse_of(float scale) { return scale != 0 ? 1.0f / scale : 0.0f; }

}  // namespace detail
}  // namespace kvpare

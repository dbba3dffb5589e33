// Floats of 8 and 4 bits: their values and their rounding.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <limits>

#include "rounding.hpp"

namespace kvpare::detail {

/// 2^k, -126 <= k <= 127.
constexpr KVPARE_HD float power_of_two(int k) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(127 + k) << 23);
}

/// A sign, `exponent` bits, `mantissa` bits; codes up to `top` are finite. Nothing here ever gives an infinity or a NaN code.
template <int exponent, int mantissa, int bias, unsigned top>
struct SmallFloat {
  static constexpr int bits = 1 + exponent + mantissa;
  static constexpr unsigned sign = 1u << (bits - 1);

  static constexpr KVPARE_HD float magnitude(unsigned code) {
    const int e = static_cast<int>(code >> mantissa), m = static_cast<int>(code & ((1u << mantissa) - 1u));
    return e == 0 ? static_cast<float>(m) * power_of_two(1 - bias - mantissa)
                  : static_cast<float>((1 << mantissa) + m) * power_of_two(e - bias - mantissa);
  }
  /// Of every code, signs included; those above `top` as IEEE has it: infinity where E5M2 has one, else NaN.
  static constexpr KVPARE_HD float value(unsigned code) {
    const unsigned c = code & (sign - 1u);
    float v = magnitude(c);
    if (c > top)
      v = mantissa == 2 && c == top + 1 ? std::numeric_limits<float>::infinity()
                                        : std::numeric_limits<float>::quiet_NaN();
    return (code & sign) != 0 ? -v : v;
  }
  static constexpr auto values = [] {
    std::array<float, 1u << bits> all{};
    for (unsigned c = 0; c < all.size(); ++c) all[c] = value(c);
    return all;
  }();

  /// The nearest code, ties to even, saturating; NaN is 0. Negative numbers that round to zero keep their sign.
  static constexpr KVPARE_HD std::uint8_t nearest(float x) {
    constexpr float limit = magnitude(top), least_normal = power_of_two(1 - bias), shift = 0x1.8p23f;
    // No branch, and integers of one type, so that loops over this are vectors.
    const auto word = std::bit_cast<std::int32_t>(x);
    const std::int32_t is_number = (word & 0x7fffffff) > 0x7f800000 ? 0 : -1;
    std::int32_t a = word & 0x7fffffff & is_number;
    a = a < std::bit_cast<std::int32_t>(limit) ? a : std::bit_cast<std::int32_t>(limit);
    const std::int32_t odd = a >> (23 - mantissa) & 1;
    const std::int32_t normal =
        ((a + (1 << (22 - mantissa)) - 1 + odd) >> (23 - mantissa)) - ((127 - bias) << mantissa);
    const float steps = std::bit_cast<float>(a) * power_of_two(bias + mantissa - 1);
    const std::int32_t subnormal = std::bit_cast<std::int32_t>(steps + shift) - std::bit_cast<std::int32_t>(shift);
    const std::int32_t code = a < std::bit_cast<std::int32_t>(least_normal) ? subnormal : normal;
    return static_cast<std::uint8_t>(code | (word >> 31 & is_number & static_cast<std::int32_t>(sign)));
  }
};

using E4M3 = SmallFloat<4, 3, 7, 0x7e>;   // E4M3FN: up to 448, no infinity, NaN 0x7f
using E5M2 = SmallFloat<5, 2, 15, 0x7b>;  // up to 57344, infinity 0x7c, NaN above
using E2M1 = SmallFloat<2, 1, 1, 7>;      // 0, 0.5, 1, 1.5, 2, 3, 4, 6

}  // namespace kvpare::detail

// Element types of keys, values, queries and outputs, and their exact conversions.
#pragma once

#include <bit>
#include <cstdint>
#include <string_view>
#include <type_traits>

#include "config.hpp"

namespace kvpare {

namespace detail {

// IEEE 754 binary16 <-> binary32, round to nearest even, subnormals, infinities and NaN kept.
constexpr KVPARE_HD float half_to_float(std::uint16_t h) {
#if defined(__CUDA_ARCH__)
  if (!std::is_constant_evaluated()) {  // one instruction
    float x = 0;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
    return x;
  }
#endif
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
  const std::uint32_t magnitude = h & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Shifting the exponent into place leaves it 112 too small; one exact product by 2^112 mends it, subnormals included.
  const float value = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(value));
}

constexpr KVPARE_HD std::uint16_t float_to_half(float f) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(f);
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 rounds at the subnormal step of 2^-24
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3f000000u));
  }
  const std::uint32_t odd = magnitude >> 13 & 1u;
  return static_cast<std::uint16_t>(sign | (magnitude - 0x38000000u + 0xfffu + odd) >> 13);
}

constexpr KVPARE_HD float bfloat16_to_float(std::uint16_t b) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(b) << 16);
}

constexpr KVPARE_HD std::uint16_t float_to_bfloat16(float f) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace detail

/// IEEE binary16.
struct half {
  std::uint16_t bits = 0;
  constexpr half() = default;
  constexpr KVPARE_HD explicit half(float value) : bits(detail::float_to_half(value)) {}
  constexpr KVPARE_HD explicit operator float() const { return detail::half_to_float(bits); }
};

/// The upper 16 bits of a binary32.
struct bfloat16 {
  std::uint16_t bits = 0;
  constexpr bfloat16() = default;
  constexpr KVPARE_HD explicit bfloat16(float value) : bits(detail::float_to_bfloat16(value)) {}
  constexpr KVPARE_HD explicit operator float() const { return detail::bfloat16_to_float(bits); }
};

enum class DType : std::uint8_t { f32, f16, bf16 };

constexpr KVPARE_HD Index size_of(DType type) { return type == DType::f32 ? 4 : 2; }

constexpr std::string_view name_of(DType type) {
  return type == DType::f32 ? "float" : type == DType::f16 ? "half" : "bfloat16";
}

template <class T>
inline constexpr bool is_element = false;
template <>
inline constexpr bool is_element<float> = true;
template <>
inline constexpr bool is_element<half> = true;
template <>
inline constexpr bool is_element<bfloat16> = true;

/// float, half or bfloat16.
template <class T>
concept Element = is_element<T>;

template <Element T>
constexpr KVPARE_HD DType dtype_of() {
  if constexpr (sizeof(T) == 4)
    return DType::f32;
  else if constexpr (std::is_same_v<T, half>)
    return DType::f16;
  else
    return DType::bf16;
}

/// Calls `f` with a null pointer of the element type that `type` names: the one switch from run time to compile time.
template <class F>
constexpr decltype(auto) with_type(DType type, F&& f) {
  switch (type) {
    case DType::f16:
      return f(static_cast<half*>(nullptr));
    case DType::bf16:
      return f(static_cast<bfloat16*>(nullptr));
    default:
      return f(static_cast<float*>(nullptr));
  }
}

}  // namespace kvpare

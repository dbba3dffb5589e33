// Counting bits, where kernels do it too: <bit> compiles in device code without a word and gives 0 there, since its
// builtins are the host's.
#pragma once

#include <bit>
#include <type_traits>

#include "config.hpp"

namespace kvpare {

/// How many bits are set.
constexpr KVPARE_HD int count_bits(std::uint64_t word) {
#if defined(__CUDA_ARCH__)
  if (!std::is_constant_evaluated()) return __popcll(word);
#endif
  return std::popcount(word);
}

constexpr KVPARE_HD int count_bits(std::uint32_t word) {
#if defined(__CUDA_ARCH__)
  if (!std::is_constant_evaluated()) return __popc(word);
#endif
  return std::popcount(word);
}

/// The place of the lowest set bit; 64 where there is none.
constexpr KVPARE_HD int lowest_bit(std::uint64_t word) {
#if defined(__CUDA_ARCH__)
  if (!std::is_constant_evaluated()) return word != 0 ? __ffsll(static_cast<long long>(word)) - 1 : 64;
#endif
  return std::countr_zero(word);
}

/// The place of the highest set bit; -1 where there is none.
constexpr KVPARE_HD int highest_bit(std::uint64_t word) {
#if defined(__CUDA_ARCH__)
  if (!std::is_constant_evaluated()) return 63 - __clzll(static_cast<long long>(word));
#endif
  return 63 - std::countl_zero(word);
}

}  // namespace kvpare

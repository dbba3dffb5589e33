// Deterministic random numbers without state: the same (seed, place) gives the same number on every backend.
#pragma once

#include "config.hpp"

namespace kvpare {

/// The finaliser of splitmix64: a bijection whose output bits all depend on all input bits.
constexpr KVPARE_HD std::uint64_t mix_bits(std::uint64_t x) {
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

template <class... Places>
constexpr KVPARE_HD std::uint64_t random_bits(std::uint64_t seed, Places... places) {
  std::uint64_t x = mix_bits(seed + 0x9e3779b97f4a7c15u);
  ((x = mix_bits(x ^ (static_cast<std::uint64_t>(places) + 0x9e3779b97f4a7c15u))), ...);
  return x;
}

/// Uniform in [0, 1), a multiple of 2^-24.
template <class... Places>
constexpr KVPARE_HD float random_unit(std::uint64_t seed, Places... places) {
  return static_cast<float>(random_bits(seed, places...) >> 40) * 0x1p-24f;
}

}  // namespace kvpare

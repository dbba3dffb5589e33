// Codes of few bits in bytes: the canonical order, least significant bit first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>

#include "../core/config.hpp"

namespace kvpare {

/// Where the codes of a run go.
enum class Packing : std::uint8_t {
  neighbours,  // code i in bits [i * bits, (i + 1) * bits) of the run
  halves  // byte j of the m bytes of a run holds codes j, j + m, j + 2m, …, the first one lowest (ggml, ZipCache)
};

namespace detail {

/// The widest head that codecs with codes take: rows of codes lie on the stack.
inline constexpr Index max_coded_width = 1024;

/// The fewest codes that fill whole bytes.
constexpr KVPARE_HD Index codes_per_block(int bits) { return 8 / std::gcd(bits, 8); }

/// n codes, n * bits divisible by 8, into n * bits / 8 bytes.
template <int bits>
constexpr KVPARE_HD void pack_codes(const std::uint8_t* codes, Index n, std::byte* bytes) {
  constexpr Index per = codes_per_block(bits);
  for (Index i = 0; i < n; i += per) {
    std::uint64_t word = 0;
    for (Index k = 0; k < per; ++k) word |= std::uint64_t{codes[i + k]} << k * bits;
    for (Index k = 0; k < per * bits / 8; ++k) *bytes++ = static_cast<std::byte>(word >> 8 * k & 0xffu);
  }
}

template <int bits>
constexpr KVPARE_HD void unpack_codes(const std::byte* bytes, Index n, std::uint8_t* codes) {
  constexpr Index per = codes_per_block(bits);
  for (Index i = 0; i < n; i += per) {
    std::uint64_t word = 0;
    for (Index k = 0; k < per * bits / 8; ++k) word |= std::to_integer<std::uint64_t>(*bytes++) << 8 * k;
    for (Index k = 0; k < per; ++k) codes[i + k] = static_cast<std::uint8_t>(word >> k * bits & ((1u << bits) - 1u));
  }
}

/// Code i of a packed run.
template <int bits>
constexpr KVPARE_HD std::uint8_t code_at(const std::byte* bytes, Index i) {
  const Index bit = i * bits;
  unsigned word = std::to_integer<unsigned>(bytes[bit / 8]);
  if (bit % 8 + bits > 8) word |= std::to_integer<unsigned>(bytes[bit / 8 + 1]) << 8;
  return static_cast<std::uint8_t>(word >> bit % 8 & ((1u << bits) - 1u));
}

/// Runs of `run` codes in `halves` order: bits 8, 4, 2 or 1, run * bits divisible by 8.
template <int bits>
constexpr KVPARE_HD void pack_halves(const std::uint8_t* codes, Index n, Index run, std::byte* bytes) {
  static_assert(8 % bits == 0, "bytes of halves hold whole codes");
  const Index m = run * bits / 8;
  for (Index start = 0; start < n; start += run, bytes += m)
    for (Index j = 0; j < m; ++j) {
      unsigned byte = 0;
      for (int k = 0; k < 8 / bits; ++k) byte |= unsigned{codes[start + j + k * m]} << k * bits;
      bytes[j] = static_cast<std::byte>(byte);
    }
}

template <int bits>
constexpr KVPARE_HD void unpack_halves(const std::byte* bytes, Index n, Index run, std::uint8_t* codes) {
  static_assert(8 % bits == 0, "bytes of halves hold whole codes");
  const Index m = run * bits / 8;
  for (Index start = 0; start < n; start += run, bytes += m)
    for (Index j = 0; j < m; ++j)
      for (int k = 0; k < 8 / bits; ++k)
        codes[start + j + k * m] =
            static_cast<std::uint8_t>(std::to_integer<unsigned>(bytes[j]) >> k * bits & ((1u << bits) - 1u));
}

/// Codes 0, 1, 2, five to a byte: the first one counts once, the next ones 3, 9, 27 and 81 times. A last byte that holds
/// fewer is filled up with 0. Bytes above 242 are never written and read as 0, 1 or 2 all the same.
constexpr KVPARE_HD void pack_ternary(const std::uint8_t* codes, Index n, std::byte* bytes) {
  for (Index i = 0; i < n; i += 5) {
    unsigned byte = 0;
    for (Index k = i + 5 < n ? i + 5 : n; k-- > i;) byte = byte * 3 + codes[k];
    *bytes++ = static_cast<std::byte>(byte);
  }
}
constexpr KVPARE_HD std::uint8_t ternary_at(const std::byte* bytes, Index i) {
  constexpr unsigned powers[] = {1, 3, 9, 27, 81};
  return static_cast<std::uint8_t>(std::to_integer<unsigned>(bytes[i / 5]) / powers[i % 5] % 3);
}
constexpr KVPARE_HD void unpack_ternary(const std::byte* bytes, Index n, std::uint8_t* codes) {
  for (Index i = 0; i < n; ++i) codes[i] = ternary_at(bytes, i);
}

/// The low `size` bytes of a number, least significant first, and back.
KVPARE_HD inline void put_bytes(std::byte* to, std::uint32_t bits, Index size) {
  for (Index k = 0; k < size; ++k) to[k] = static_cast<std::byte>(bits >> 8 * k & 0xffu);
}
KVPARE_HD inline std::uint32_t get_bytes(const std::byte* from, Index size) {
  std::uint32_t bits = 0;
  for (Index k = 0; k < size; ++k) bits |= std::to_integer<std::uint32_t>(from[k]) << 8 * k;
  return bits;
}

}  // namespace detail
}  // namespace kvpare

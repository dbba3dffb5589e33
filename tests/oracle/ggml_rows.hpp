// ggml's block formats for caches, as rows of bytes: 32 numbers to a block, blocks one after the other.
//
// Encoders compute in single precision, unlike the other oracles: what is documented is the very bytes, and those
// depend on how 1 / d and the products round. No sum of products may be contracted to a fused one for them to come out.
#pragma once

#include <array>

#include "number_formats.hpp"

namespace kvpare::oracle {

static_assert(std::numeric_limits<float>::is_iec559);

/// | type   | bytes | layout              | decode      |
/// |--------|-------|---------------------|-------------|
/// | q8_0   | 34    | d, 32 int8          | d·q         |
/// | q4_0   | 18    | d, 16 B             | d·(q - 8)   |
/// | q4_1   | 20    | d, m, 16 B          | d·q + m     |
/// | q5_0   | 22    | d, qh u32, 16 B     | d·(q - 16)  |
/// | q5_1   | 24    | d, m, qh u32, 16 B  | d·q + m     |
/// | iq4_nl | 18    | d, 16 B             | d·T[q]      |
///
/// d and m are half precision, little-endian as all fields are. Byte j of the 16 holds element j in its low nibble and
/// element j + 16 in its high one; bit j of qh is the fifth bit of element j.
enum class Ggml : std::uint8_t { q8_0, q4_0, q4_1, q5_0, q5_1, iq4_nl };
inline constexpr std::array<Ggml, 6> all_ggml{Ggml::q8_0, Ggml::q4_0, Ggml::q4_1, Ggml::q5_0, Ggml::q5_1, Ggml::iq4_nl};

inline constexpr std::array<int, 16> iq4_nl_levels{-127, -104, -83, -65, -49, -35, -22, -10,
                                                   1,    13,   25,  38,  53,  69,  89,  113};

inline bool has_minimum(Ggml type) { return type == Ggml::q4_1 || type == Ggml::q5_1; }
inline int code_bits(Ggml type) {
  return type == Ggml::q8_0 ? 8 : type == Ggml::q5_0 || type == Ggml::q5_1 ? 5 : 4;
}
inline Index block_bytes(Ggml type) { return 2 + (has_minimum(type) ? 2 : 0) + 32 * code_bits(type) / 8; }

/// One block before it is packed.
struct GgmlBlock {
  int d = 0, m = 0;            // half precision, as bits
  std::array<int, 32> q = {};  // q8_0: signed
};

namespace ggml_detail {

/// 1 / d, 0 where d is 0.
inline float inverse(float d) { return d != 0 ? 1 / d : 0; }

/// The element that first reaches the largest magnitude, with its sign; +0 when all are zeros.
inline float signed_extreme(const std::vector<float>& x) {
  float extreme = 0;
  for (const float v : x)
    if (std::abs(v) > std::abs(extreme)) extreme = v;
  return extreme;
}

/// Index of the level nearest to x; of two equally near ones the upper. The least distance is a number of its own on
/// purpose: g++ 12.2 at -O3 vectorises a comparison with level[best] over the caller's elements to wrong codes.
inline int nearest_level(float x) {
  int best = 0;
  float least = std::numeric_limits<float>::infinity();
  for (int i = 0; i < 16; ++i) {
    const float distance = std::abs(x - static_cast<float>(iq4_nl_levels.at(static_cast<std::size_t>(i))));
    if (distance <= least) best = i, least = distance;
  }
  return best;
}

}  // namespace ggml_detail

/// The encoders, by their documentation; all of them form 1 / d from the d that is not yet rounded to half precision.
///   q8_0         d = amax / 127, q = round(x / d), halves away from zero
///   q4_0, q5_0   d = v / -8 or -16, v = the signed extreme; q = min(15 or 31, trunc(x / d + 8.5 or 16.5))
///   q4_1, q5_1   d = (max - min) / 15 or 31, m = min, q = min(15 or 31, trunc((x - m) / d + 0.5))
///   iq4_nl       q = the level nearest to x · (-127 / v), ties up; then d = Σ x² T x / Σ x² T², codes not revisited
/// Zeros   q4_0 and q5_0: d = 0 / -8 is -0, bits 0x8000, codes 8 and 16. iq4_nl: d = 0 where amax < 1e-15
/// Uncertain  iq4_nl of zeros: ggml leaves the codes as its scratch happened to be; here the level nearest to 0, 8
inline GgmlBlock ggml_block(Ggml type, const std::vector<float>& x) {
  require(count_of(x) == 32, "oracle: 32 numbers to a block");
  GgmlBlock block;
  const float extreme = ggml_detail::signed_extreme(x);
  const int codes = 1 << code_bits(type);
  float d = 0;
  if (type == Ggml::q8_0) {
    d = std::abs(extreme) / 127.0f;
    for (std::size_t i = 0; i < 32; ++i)
      block.q.at(i) = static_cast<int>(std::round(x.at(i) * ggml_detail::inverse(d)));
  } else if (type == Ggml::q4_0 || type == Ggml::q5_0) {
    const auto middle = static_cast<float>(codes / 2);
    d = extreme / -middle;
    for (std::size_t i = 0; i < 32; ++i) {
      const float scaled = x.at(i) * ggml_detail::inverse(d);
      block.q.at(i) = std::min(codes - 1, static_cast<int>(scaled + (middle + 0.5f)));
    }
  } else if (has_minimum(type)) {
    const float least = *std::min_element(x.begin(), x.end()), most = *std::max_element(x.begin(), x.end());
    d = (most - least) / static_cast<float>(codes - 1);
    for (std::size_t i = 0; i < 32; ++i) {
      const float scaled = (x.at(i) - least) * ggml_detail::inverse(d);
      block.q.at(i) = std::min(codes - 1, static_cast<int>(scaled + 0.5f));
    }
    block.m = half_code(static_cast<double>(least));
  } else {
    const bool nothing = std::abs(extreme) < 1e-15f;
    const float inverse = nothing ? 0 : ggml_detail::inverse(extreme / -127.0f);
    float with_x = 0, with_itself = 0;
    for (std::size_t i = 0; i < 32; ++i) {
      block.q.at(i) = ggml_detail::nearest_level(x.at(i) * inverse);
      const auto level = static_cast<float>(iq4_nl_levels.at(static_cast<std::size_t>(block.q.at(i))));
      const float weight = x.at(i) * x.at(i);
      const float weighted = weight * level;
      const float toward = weighted * x.at(i), square = weighted * level;
      with_x += toward, with_itself += square;
    }
    d = nothing ? 0 : with_x / with_itself;
  }
  block.d = half_code(static_cast<double>(d));
  return block;
}

/// The block's bytes, as the table above lays them out.
inline Bytes packed(Ggml type, const GgmlBlock& block) {
  Bytes bytes;
  const auto put = [&](std::uint32_t value, int count) {
    for (int i = 0; i < count; ++i) bytes.push_back(static_cast<std::uint8_t>(value >> 8 * i & 255u));
  };
  put(static_cast<std::uint32_t>(block.d), 2);
  if (has_minimum(type)) put(static_cast<std::uint32_t>(block.m), 2);
  if (type == Ggml::q8_0) {
    for (const int q : block.q) put(static_cast<std::uint32_t>(q), 1);
    return bytes;
  }
  if (code_bits(type) == 5) {
    std::uint32_t high = 0;
    for (std::size_t j = 0; j < 32; ++j) high |= static_cast<std::uint32_t>(block.q.at(j) / 16) << j;
    put(high, 4);
  }
  for (std::size_t j = 0; j < 16; ++j)
    put(static_cast<std::uint32_t>(block.q.at(j) % 16 + block.q.at(j + 16) % 16 * 16), 1);
  return bytes;
}

inline GgmlBlock unpacked(Ggml type, const Bytes& bytes) {
  require(count_of(bytes) == block_bytes(type), "oracle: the bytes of one block");
  Index at = 0;
  const auto take = [&](int count) {
    std::uint32_t value = 0;
    for (int i = 0; i < count; ++i) value |= static_cast<std::uint32_t>(item(bytes, at++)) << 8 * i;
    return value;
  };
  GgmlBlock block;
  block.d = static_cast<int>(take(2));
  if (has_minimum(type)) block.m = static_cast<int>(take(2));
  if (type == Ggml::q8_0) {
    for (int& q : block.q) q = static_cast<std::int8_t>(take(1));
    return block;
  }
  const std::uint32_t high = code_bits(type) == 5 ? take(4) : 0;
  for (std::size_t j = 0; j < 16; ++j) {
    const auto pair = static_cast<int>(take(1));
    block.q.at(j) = pair % 16 + static_cast<int>(high >> j & 1u) * 16;
    block.q.at(j + 16) = pair / 16 + static_cast<int>(high >> (j + 16) & 1u) * 16;
  }
  return block;
}

/// In doubles: exact but for types with a minimum, whose sum single precision would round.
inline double ggml_value(Ggml type, const GgmlBlock& block, Index i) {
  const double d = half_value(block.d), m = half_value(block.m);
  const int q = block.q.at(static_cast<std::size_t>(i));
  switch (type) {
    case Ggml::q8_0: return d * q;
    case Ggml::q4_0: return d * (q - 8);
    case Ggml::q5_0: return d * (q - 16);
    case Ggml::q4_1:
    case Ggml::q5_1: return d * q + m;
    case Ggml::iq4_nl: break;
  }
  return d * iq4_nl_levels.at(static_cast<std::size_t>(q));
}

/// Numbers to bytes, any multiple of 32 of them.
inline Bytes ggml_row(Ggml type, const std::vector<float>& x) {
  require(count_of(x) % 32 == 0, "oracle: 32 numbers to a block");
  Bytes bytes;
  for (Index b = 0; b < count_of(x); b += 32) {
    const Bytes block = packed(type, ggml_block(type, std::vector<float>(x.begin() + b, x.begin() + b + 32)));
    bytes.insert(bytes.end(), block.begin(), block.end());
  }
  return bytes;
}

/// Bytes to numbers. Any bytes will do; infinities and NaN in d or m give what IEEE arithmetic gives.
inline std::vector<double> ggml_values(Ggml type, const Bytes& row) {
  require(count_of(row) % block_bytes(type) == 0, "oracle: whole blocks");
  std::vector<double> x;
  for (Index b = 0; b < count_of(row); b += block_bytes(type)) {
    const GgmlBlock block = unpacked(type, Bytes(row.begin() + b, row.begin() + b + block_bytes(type)));
    for (Index i = 0; i < 32; ++i) x.push_back(ggml_value(type, block, i));
  }
  return x;
}

}  // namespace kvpare::oracle

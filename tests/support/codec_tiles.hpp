// What the tests of codecs share: tiles with guard bytes around them, and numbers to code.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <numbers>
#include <string>
#include <vector>

#include "kvpare/codec/codec.hpp"
#include "kvpare/core/random.hpp"

namespace kvpare::test {

inline float gaussian(std::uint64_t seed, Index i) {
  const double u = 1 - static_cast<double>(random_unit(seed, i, 0)), v = static_cast<double>(random_unit(seed, i, 1));
  return static_cast<float>(std::sqrt(-2 * std::log(u)) * std::cos(2 * std::numbers::pi * v));
}
inline std::vector<float> gaussians(std::uint64_t seed, Index n) {
  std::vector<float> x(static_cast<std::size_t>(n));
  for (Index i = 0; i < n; ++i) x[static_cast<std::size_t>(i)] = gaussian(seed, i);
  return x;
}
/// Rows with four channels twenty times as large, as some models' keys have them.
inline std::vector<float> outliers(std::uint64_t seed, Index rows, Index width) {
  auto x = gaussians(seed, rows * width);
  for (Index t = 0; t < rows; ++t)
    for (Index k = 0; k < 4; ++k) x[static_cast<std::size_t>(t * width + (k * width / 4 + 3) % width)] *= 20;
  return x;
}

/// A tile between guard bytes, which `intact` looks at.
template <Codec C>
struct GuardedTile {
  static constexpr std::size_t guard = 64;
  TileShape shape;
  std::vector<std::byte> memory;

  explicit GuardedTile(TileShape s) : shape(s) {
    EXPECT_TRUE(C::fits(s)) << C::name;
    memory.assign(static_cast<std::size_t>(C::tile_bytes(s)) + 2 * guard, std::byte{0xa5});
  }
  std::byte* tile() { return memory.data() + guard; }
  const std::byte* tile() const { return memory.data() + guard; }
  std::size_t size() const { return memory.size() - 2 * guard; }
  bool intact() const {
    for (std::size_t i = 0; i < guard; ++i)
      if (memory[i] != std::byte{0xa5} || memory[memory.size() - 1 - i] != std::byte{0xa5}) return false;
    return true;
  }
  void encode(const std::vector<float>& rows, Index first = 0, const float* state = nullptr) {
    C::encode(shape, rows.data(), first, static_cast<Index>(rows.size()) / shape.width, state, tile());
    EXPECT_TRUE(intact()) << C::name << " writes outside of its tile";
  }
  std::vector<float> decode(Index slot, const float* state = nullptr) const {
    std::vector<float> row(static_cast<std::size_t>(shape.width) + 2, 1234.5f);
    C::decode(shape, tile(), slot, state, row.data() + 1);
    EXPECT_EQ(row.front(), 1234.5f) << C::name << " writes before its row";
    EXPECT_EQ(row.back(), 1234.5f) << C::name << " writes behind its row";
    return {row.begin() + 1, row.end() - 1};
  }
  std::vector<int> bytes() const {
    std::vector<int> all;
    for (std::size_t i = 0; i < size(); ++i) all.push_back(std::to_integer<int>(tile()[i]));
    return all;
  }
};

/// Any bytes at all decode to some floats, in every slot, with and without state.
template <Codec C>
void expect_decodes_anything(TileShape shape, const std::vector<float>& state = {}) {
  GuardedTile<C> tile(shape);
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    for (std::size_t i = 0; i < tile.size(); ++i)
      tile.tile()[i] = seed == 0   ? std::byte{0xff}
                       : seed == 1 ? std::byte{0}
                                   : static_cast<std::byte>(random_bits(seed, i) & 0xffu);
    for (Index t = 0; t < shape.tokens; ++t) tile.decode(t), tile.decode(t, state.empty() ? nullptr : state.data());
  }
  EXPECT_TRUE(tile.intact());
}

/// Rows written one by one, in any order, are the bytes of rows written at once; a moved row decodes to the same floats.
template <Codec C>
void expect_rows_move(TileShape shape, const float* state = nullptr) {
  static_assert(C::rows_move);
  const auto rows = outliers(7, shape.tokens, shape.width);
  GuardedTile<C> at_once(shape), one_by_one(shape);
  at_once.encode(rows, 0, state);
  for (Index k = 0; k < shape.tokens; ++k) {
    const Index t = (k * 5 + 3) % shape.tokens;  // 5 and a power of two have no common divisor
    one_by_one.encode({rows.begin() + t * shape.width, rows.begin() + (t + 1) * shape.width}, t, state);
  }
  EXPECT_EQ(at_once.bytes(), one_by_one.bytes()) << C::name;
  const Index row = C::tile_bytes({1, shape.width});
  EXPECT_EQ(row * shape.tokens, C::tile_bytes(shape)) << C::name << ": rows lie one after the other";
  std::memcpy(one_by_one.tile() + (shape.tokens - 1) * row, at_once.tile(), static_cast<std::size_t>(row));
  EXPECT_EQ(one_by_one.decode(shape.tokens - 1, state), at_once.decode(0, state)) << C::name;
}

/// Numbers and codes that lie apart give the same codes, and nothing between them is touched.
template <GroupCodec C>
void expect_strides_do_not_matter(Index n, const float* state = nullptr) {
  const auto x = outliers(31, 1, n);
  std::vector<float> apart(static_cast<std::size_t>(3 * n), 1e9f);
  for (std::size_t i = 0; i < x.size(); ++i) apart[3 * i] = x[i];
  std::vector<std::uint8_t> codes(x.size()), spread(2 * x.size(), 0xee);
  const GroupBits bits = C::quantize(x.data(), 1, n, state, codes.data(), 1);
  EXPECT_EQ(C::quantize(apart.data(), 3, n, state, spread.data(), 2), bits) << C::name;
  for (std::size_t i = 0; i < x.size(); ++i) {
    EXPECT_EQ(spread[2 * i], codes[i]) << C::name;
    EXPECT_EQ(spread[2 * i + 1], 0xee) << C::name;
  }
}

}  // namespace kvpare::test

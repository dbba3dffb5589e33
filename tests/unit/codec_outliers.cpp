// Lists of numbers beside codes.
#include "kvpare/codec/outliers.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kvpare/codec/group.hpp"
#include "kvpare/codec/kv_quant.hpp"
#include "kvpare/codec/raw.hpp"
#include "support/codec_tiles.hpp"

namespace kvpare::test {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity(),
                not_a_number = std::numeric_limits<float>::quiet_NaN();

TEST(Outliers, BytesAreTheCodesAndThreePerNumber) {
  static_assert(Outliers<Symmetric<4>, 1>::tile_bytes({64, 128}) == 64 * (128 / 2 + 2 + 2 * 3));
  static_assert(Outliers<Symmetric<4>, 3>::tile_bytes({16, 256}) == 16 * (256 / 2 + 2 + 6 * 3));
  static_assert(Outliers<Symmetric<4>, 1>::tile_bytes({16, 512}) == 16 * (512 / 2 + 2 + 2 * 4));
  static_assert(Outliers<Symmetric<4>, 2>::name == "outliers2_int4");
  static_assert(outliers_per_side(128) == 1 && outliers_per_side(200) == 1 && outliers_per_side(256) == 2 &&
                outliers_per_side(4096) == 21);
  EXPECT_FALSE((Outliers<Symmetric<4>, 4>::fits({16, 8})));
  EXPECT_TRUE((Outliers<Symmetric<4>, 3>::fits({16, 8})));
}

TEST(Outliers, TheFurthestAreListedAndTheOthersKeepTheirOwnRange) {
  using C = Outliers<Symmetric<4>, 1>;
  GuardedTile<C> tile({16, 8});
  tile.encode({0.5f, 100, -0.7f, 0.1f, -50, 0.7f, 0.2f, 0});
  const auto row = tile.decode(0);
  const float want[] = {0.5f, 100, -0.7f, 0.1f, -50, 0.7f, 0.2f, 0};
  for (std::size_t c = 0; c < 8; ++c)
    EXPECT_NEAR(row[c], want[c], std::abs(want[c]) > 1 ? std::abs(want[c]) / 2048 : 0.05f) << c;
}

TEST(Outliers, EqualNumbersAreListedOnce) {
  GuardedTile<Outliers<Symmetric<4>, 3>> tile({16, 8});
  tile.encode({2, 2, 2, 2, 2, 2, 2, 2});
  for (const float x : tile.decode(0)) EXPECT_NEAR(x, 2, 2.0f / 1024);
  std::uint16_t channels[6];
  float seen[8];
  const float row[8] = {2, 2, 2, 2, 2, 2, 2, 2};
  ASSERT_EQ((Outliers<Symmetric<4>, 3>::split(8, nullptr, row, seen, channels)), 6);
  std::sort(channels, channels + 6);
  EXPECT_EQ(std::unique(channels, channels + 6), channels + 6);
}

TEST(Outliers, PicksAreThoseOfASortedRow) {
  using C = Outliers<Symmetric<2>, 3>;
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    auto x = gaussians(seed, 40);
    for (float& v : x) v = std::round(v * 2);  // many equal ones
    std::vector<std::uint16_t> order(40), channels(6);
    for (std::size_t c = 0; c < 40; ++c) order[c] = static_cast<std::uint16_t>(c);
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return x[a] < x[b]; });
    std::vector<float> seen(40);
    ASSERT_EQ(C::split(40, nullptr, x.data(), seen.data(), channels.data()), 6);
    EXPECT_EQ(channels, (std::vector<std::uint16_t>{order[0], order[1], order[2], order[39], order[38], order[37]}));
    for (int k = 0; k < 3; ++k) {
      EXPECT_EQ(seen[order[static_cast<std::size_t>(k)]], x[order[3]]);
      EXPECT_EQ(seen[order[static_cast<std::size_t>(39 - k)]], x[order[36]]);
    }
  }
}

TEST(Outliers, ANumberThatIsNoneCountsAsZeroAndInfinitiesAreFinite) {
  GuardedTile<Outliers<Symmetric<4>, 1>> tile({16, 8});
  tile.encode({not_a_number, 1, -infinity, 0.5f, infinity, 0.2f, -1, 0.3f});
  const auto row = tile.decode(0);
  for (const float x : row) EXPECT_TRUE(std::isfinite(x));
  EXPECT_EQ(row[0], 0);
  EXPECT_GT(row[4], 65000);
  EXPECT_LT(row[2], -65000);
  EXPECT_NEAR(row[3], 0.5f, 0.08f);
}

TEST(Outliers, RowsMoveAndAnythingDecodes) {
  expect_rows_move<Outliers<Symmetric<4, 32>, 1>>({16, 64});
  expect_rows_move<Outliers<Affine<3>, 2>>({16, 512});
  expect_rows_move<Outliers<Raw<half>, 2>>({16, 80});
  expect_decodes_anything<Outliers<Symmetric<4, 32>, 1>>({16, 64});
  expect_decodes_anything<Outliers<Affine<2>, 2>>({16, 512});
}

TEST(Outliers, RowsWideEnoughForTwoBytesAChannel) {
  using C = Outliers<Symmetric<4>, 1>;
  std::vector<float> row(512, 0.5f);
  row[500] = 40, row[3] = -30;
  GuardedTile<C> tile({16, 512});
  tile.encode(row);
  const auto back = tile.decode(0);
  EXPECT_NEAR(back[500], 40, 0.02f);
  EXPECT_NEAR(back[3], -30, 0.02f);
  EXPECT_NEAR(back[4], 0.5f, 0.001f);
}

/// A codebook learns of the numbers that it codes.
TEST(Outliers, WhatIsListedIsNotLearntFrom) {
  using C = NuqRange<2>;
  constexpr Index width = 16, tokens = 20;
  const std::vector<float> rows = gaussians(3, tokens * width);
  std::vector<float> rest = rows, low(width, infinity), high(width, -infinity);
  for (Index t = 0; t < tokens; ++t) {
    const auto row = rest.begin() + t * width;
    const auto [least, most] = std::minmax_element(row, row + width);
    *least = *most = not_a_number;
    for (Index c = 0; c < width; ++c) {
      low[static_cast<std::size_t>(c)] = std::fmin(low[static_cast<std::size_t>(c)], row[c]);
      high[static_cast<std::size_t>(c)] = std::fmax(high[static_cast<std::size_t>(c)], row[c]);
    }
  }
  const auto learnt = [&](auto codec, const std::vector<float>& from) {
    Measured m;
    m.rows = from.data(), m.tokens = tokens, m.min = low.data(), m.max = high.data();
    std::vector<float> state(static_cast<std::size_t>(C::state_floats(width)));
    decltype(codec)::make_state(width, m, state.data());
    return state;
  };
  EXPECT_EQ(learnt(Outliers<C, 1>{}, rows), learnt(C{}, rest));
  EXPECT_NE(learnt(C{}, rows), learnt(C{}, rest));
}

}  // namespace
}  // namespace kvpare::test

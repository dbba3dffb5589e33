// Codecs around codecs: channel maps, rotations, their folds, and the methods made of them.
#include <gtest/gtest.h>

#include <limits>

#include "kvpare/codec/fp8.hpp"
#include "kvpare/codec/rotation.hpp"
#include "support/folds.hpp"

namespace kvpare {
namespace {

using test::GuardedTile;

static_assert(ZipVlKeys<4>::name == "affine_fixed4" && ZipVlValues<2>::name == "scaled_int2_min");
static_assert(MikvKeys<2>::name == "balanced_int2_p2_min" && Rotated<Int4>::name == "hadamard_int4");
static_assert(Balanced<Rotated<KiviKeys<2>, 12>>::name == "balanced_hadamard12_int2_channel_g32_min");
static_assert(ZipVlKeys<4>::tile_bytes({64, 128}) == 64 * 64, "ZipVL's keys: codes and nothing else");
static_assert(ZipVlValues<2>::tile_bytes({1, 128}) == 36 && MikvKeys<2>::tile_bytes({1, 128}) == 40);
static_assert(state_floats<ZipVlKeys<2>>(128) == 256 && state_floats<MikvKeys<2>>(128) == 128);
static_assert(state_floats<Rotated<Int4>>(128) == 0 && state_floats<Balanced<Rotated<Fp8E4M3>>>(64) == 65);
static_assert(!Rotated<KiviKeys<2>>::rows_move && Rotated<Int4>::rows_move);
static_assert(GroupCodec<Fixed<2>> && !GroupCodec<ZipVlKeys<2>>);

// ---- Fixed ----------------------------------------------------------------------------------------------------------

TEST(Fixed, CodesSaturateAndTiesAreEven) {
  GuardedTile<Fixed<2>> tile({1, 8});
  tile.encode({-3, 0.5f, 1.5f, 2.4f, 9, std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
               -std::numeric_limits<float>::infinity()});
  EXPECT_EQ(tile.decode(0), (std::vector<float>{0, 0, 2, 2, 3, 0, 3, 0}));
  EXPECT_EQ(tile.bytes(), (std::vector<int>{0 | 0 << 2 | 2 << 4 | 2 << 6, 3 | 0 << 2 | 3 << 4 | 0 << 6}));
  test::expect_decodes_anything<Fixed<3>>({16, 24});
  test::expect_rows_move<Fixed<5>>({16, 24});
  test::expect_strides_do_not_matter<Fixed<5>>(24);
}

// ---- channel maps ---------------------------------------------------------------------------------------------------

TEST(ChannelMap, ZipVlKeysHaveOneRangePerChannel) {
  constexpr Index tokens = 64, width = 24;
  auto rows = test::outliers(1, tokens, width);
  for (Index t = 0; t < tokens; ++t) rows[static_cast<std::size_t>(t * width + 5)] = 7.25f;  // a constant channel
  std::vector<float> state(2 * width);
  for (std::size_t c = 0; c < width; ++c) {
    float low = rows[c], high = rows[c];
    for (std::size_t t = 0; t < tokens; ++t) {
      low = std::min(low, rows[t * width + c]), high = std::max(high, rows[t * width + c]);
    }
    const ChannelRange range = channel_range(low, high, 4);
    state[c] = range.factor, state[width + c] = range.shift;
  }
  GuardedTile<ZipVlKeys<4>> tile({tokens, width});
  tile.encode(rows, 0, state.data());
  for (Index t = 0; t < tokens; ++t) {
    const auto y = tile.decode(t, state.data());
    for (std::size_t c = 0; c < width; ++c) {
      const float x = rows[static_cast<std::size_t>(t) * width + c];
      ASSERT_LE(std::abs(y[c] - x), state[c] * 0.5001f + 1e-6f * std::abs(x));
    }
    EXPECT_EQ(y[5], 7.25f);
  }
  test::expect_folds<ZipVlKeys<4>>({tokens, width}, state.data());
  test::expect_rows_move<ZipVlKeys<2>>({tokens, width}, state.data());
}

TEST(ChannelMap, ZipVlValuesWorkedExample) {
  const float amax[] = {4, 0.1f, 1, 0.2f};
  std::vector<float> c;
  for (const float a : amax) c.push_back(channel_factor(a));
  EXPECT_NEAR(c[1], 0.3162278f, 1e-7f);
  EXPECT_NEAR(c[3], 0.4472136f, 1e-7f);
  EXPECT_EQ(channel_factor(0), 1.0f);
  GuardedTile<ZipVlValues<4>> high({1, 4});
  GuardedTile<ZipVlValues<2>> low({2, 4});
  high.encode({4, 0.1f, 1, -0.2f}, 0, c.data());
  low.encode({-2, 0.05f, 0.25f, 0.16f, 1, -0.09f, -0.5f, 0.04f}, 0, c.data());
  EXPECT_EQ(high.bytes()[0], 15 | 5 << 4);
  EXPECT_EQ(high.bytes()[1], 9 | 0 << 4);
  EXPECT_EQ(low.bytes()[0], 0 | 3 << 2 | 3 << 4 | 3 << 6);
  EXPECT_EQ(low.bytes()[5], 3 | 1 << 2 | 0 << 4 | 2 << 6);
  const auto expect_near = [](const std::vector<float>& y, std::vector<float> want) {
    for (std::size_t i = 0; i < 4; ++i) EXPECT_NEAR(y[i], want[i], std::abs(want[i]) * 1e-3f + 2e-4f);  // half scales
  };
  expect_near(high.decode(0, c.data()), {4, 0.116538f, 1.021115f, -0.2f});
  expect_near(low.decode(0, c.data()), {-2, 0.113137f, 0.357771f, 0.16f});
  expect_near(low.decode(1, c.data()), {1, -0.052705f, -0.5f, 0.074536f});
}

TEST(ChannelMap, MikvBalancerWorkedExample) {
  using C = Balanced<Group<GroupSpec{.bits = 2, .fit = Fit::min_max, .scale = ScaleType::f32}>>;
  const float q_amax[] = {1, 0.5f, 8, 1}, k_amax[] = {0.4f, 1, 0.5f, 4};
  std::vector<float> b;
  for (std::size_t c = 0; c < 4; ++c) b.push_back(channel_balance(q_amax[c], k_amax[c]));
  const float want[] = {1.5811388f, 0.7071068f, 4, 0.5f};
  for (std::size_t c = 0; c < 4; ++c) EXPECT_NEAR(b[c], want[c], 1e-6f);
  GuardedTile<C> tile({2, 4});
  tile.encode({0.2f, 1, 0.4f, -4, -0.4f, 0.5f, 0.5f, 3}, 0, b.data());
  EXPECT_EQ(tile.bytes()[0], 2 | 2 << 2 | 3 << 4 | 0 << 6);
  EXPECT_EQ(tile.bytes()[9], 0 | 1 << 2 | 3 << 4 | 2 << 6);
  float q[] = {1, 0.5f, 8, 0.5f};
  const float original[] = {1, 0.5f, 8, 0.5f};
  EXPECT_EQ(C::fold_query(4, b.data(), q), 0.0f);
  const float scores[] = {1.735825f, 4.895777f};
  for (Index t = 0; t < 2; ++t) {
    float stored[4], folded = 0, direct = 0;
    C::Inner::decode({2, 4}, tile.tile(), t, nullptr, stored);
    for (std::size_t c = 0; c < 4; ++c) folded += q[c] * stored[c], direct += original[c] * tile.decode(t, b.data())[c];
    EXPECT_NEAR(folded, scores[t], 2e-6f);
    EXPECT_NEAR(direct, scores[t], 2e-6f);
  }
}

TEST(ChannelMap, BalancersAreTame) {
  EXPECT_EQ(channel_balance(0, 1), 1.0f);
  EXPECT_EQ(channel_balance(1, 0), 1.0f);
  EXPECT_EQ(channel_balance(std::numeric_limits<float>::quiet_NaN(), 1), 1.0f);
  EXPECT_EQ(channel_balance(1e20f, 1e-20f), 1e4f);
  EXPECT_EQ(channel_balance(1e-20f, 1e20f), 1e-4f);
}

TEST(ChannelMap, UselessFactorsLoseTheirChannelAndNoOther) {
  const float inf = std::numeric_limits<float>::infinity(), nan_value = std::numeric_limits<float>::quiet_NaN();
  const auto rows = test::gaussians(4, 8);
  const auto check = [&](auto codec, float neutral) {
    using C = decltype(codec);
    for (const float bad : {0.0f, inf, nan_value, 1e-44f}) {
      std::vector<float> state(static_cast<std::size_t>(state_floats<C>(8)), 1.0f);
      if (C::own_state_floats(8) == 16) std::fill(state.begin() + 8, state.end(), 0.5f);
      GuardedTile<C> tile({1, 8});
      state[3] = bad;
      tile.encode(rows, 0, state.data());
      const auto y = tile.decode(0, state.data());
      EXPECT_EQ(y[3], neutral) << C::name;
      for (const float v : y) EXPECT_TRUE(std::isfinite(v));
      std::vector<float> q(8, 1.0f);
      EXPECT_TRUE(std::isfinite(C::fold_query(8, state.data(), q.data())));
      EXPECT_EQ(q[3], 0.0f);
    }
  };
  check(ChannelAffine<Int8>{}, 0.5f);
  check(ChannelScaled<Int8>{}, 0.0f);
  check(Balanced<Int8>{}, 0.0f);
}

TEST(ChannelMap, InnerStateFollowsItsOwn) {
  using C = Balanced<Rotated<Fp8E4M3>>;
  std::vector<float> state(17);
  for (std::size_t c = 0; c < 16; ++c) state[c] = static_cast<float>(c + 1);
  state[16] = 0.25f;  // the scale
  auto row = test::gaussians(1, 16);
  GuardedTile<C> tile({1, 16});
  tile.encode(row, 0, state.data());
  for (std::size_t c = 0; c < 16; ++c) row[c] *= static_cast<float>(c + 1);
  Rotated<Fp8E4M3>::forward(16, nullptr, row.data());
  GuardedTile<Fp8E4M3> inner({1, 16});
  inner.encode(row, 0, &state[16]);
  EXPECT_EQ(tile.bytes(), inner.bytes());
  auto want = inner.decode(0, &state[16]);
  Rotated<Fp8E4M3>::backward(16, nullptr, want.data());
  for (std::size_t c = 0; c < 16; ++c)
    EXPECT_FLOAT_EQ(tile.decode(0, state.data())[c], want[c] / static_cast<float>(c + 1));
}

TEST(ChannelMap, NullIsNeutral) {
  const auto rows = test::gaussians(4, 4 * 32);
  const auto check = [&](auto codec) {
    using C = decltype(codec);
    GuardedTile<C> outer({4, 32});
    GuardedTile<typename C::Inner> inner({4, 32});
    outer.encode(rows), inner.encode(rows);
    EXPECT_EQ(outer.bytes(), inner.bytes());
    EXPECT_EQ(outer.decode(3), inner.decode(3));
    test::expect_folds<C>({4, 32}, nullptr);
  };
  check(ChannelAffine<Int8>{}), check(ChannelScaled<Int4>{}), check(Balanced<Affine<2>>{});
}

// ---- rotations ------------------------------------------------------------------------------------------------------

TEST(Rotated, IsTheWalshHadamardMatrix) {
  for (const Index n : {Index{1}, Index{2}, Index{4}, Index{64}, Index{128}, Index{256}})
    for (Index row = 0; row<n; row += n> 64 ? 37 : 1) {
      std::vector<float> x(static_cast<std::size_t>(n), 0.0f);
      x[static_cast<std::size_t>(row)] = 1;
      Rotated<Int8>::forward(n, nullptr, x.data());
      for (Index c = 0; c < n; ++c) {
        const bool odd = std::popcount(static_cast<unsigned>(row & c)) % 2 != 0;
        ASSERT_NEAR(x[static_cast<std::size_t>(c)], (odd ? -1 : 1) / std::sqrt(static_cast<float>(n)), 1e-7f);
      }
    }
}

TEST(Rotated, WidthsThatAreNoPowerOfTwoRotateInBlocks) {
  const auto reach = [](Index width, Index channel) {  // where a number of this channel goes
    std::vector<float> x(static_cast<std::size_t>(width), 0.0f);
    x[static_cast<std::size_t>(channel)] = 1;
    Rotated<Int8, 5>::forward(width, nullptr, x.data());
    Index first = width, last = -1;
    for (Index c = 0; c < width; ++c)
      if (x[static_cast<std::size_t>(c)] != 0) first = std::min(first, c), last = c;
    return std::pair{first, last};
  };
  EXPECT_EQ(reach(96, 3), (std::pair<Index, Index>{0, 63}));
  EXPECT_EQ(reach(96, 95), (std::pair<Index, Index>{64, 95}));
  EXPECT_EQ(reach(80, 63), (std::pair<Index, Index>{0, 63}));
  EXPECT_EQ(reach(80, 70), (std::pair<Index, Index>{64, 79}));
  EXPECT_EQ(reach(7, 6), (std::pair<Index, Index>{6, 6}));
  EXPECT_EQ(reach(576, 575), (std::pair<Index, Index>{512, 575}));
}

TEST(Rotated, IsOrthogonalAndBackIsItsInverse) {
  const auto check = [](auto codec) {
    using C = decltype(codec);
    for (const Index width : {Index{8}, Index{80}, Index{96}, Index{128}, Index{256}, Index{100}}) {
      const auto x = test::gaussians(width, width);
      auto y = x;
      C::forward(width, nullptr, y.data());
      double before = 0, after = 0;
      for (std::size_t c = 0; c < x.size(); ++c)
        before += double{x[c]} * double{x[c]}, after += double{y[c]} * double{y[c]};
      EXPECT_NEAR(after, before, before * 1e-5);
      C::backward(width, nullptr, y.data());
      for (std::size_t c = 0; c < x.size(); ++c) EXPECT_NEAR(y[c], x[c], 2e-6f);
    }
  };
  check(Rotated<Int8>{}), check(Rotated<Int8, 3>{}), check(Rotated<Int8, 4>{});
  std::vector<float> a(64, 1.0f), b = a;
  Rotated<Int8, 3>::forward(64, nullptr, a.data());
  Rotated<Int8, 4>::forward(64, nullptr, b.data());
  EXPECT_NE(a, b) << "the seed chooses the signs";
}

TEST(Rotated, SpreadsOutliers) {
  const TileShape shape{32, 128};
  const auto rows = test::outliers(6, 32, 128);
  const auto error = [&](auto codec) {
    using C = decltype(codec);
    GuardedTile<C> tile(shape);
    tile.encode(rows);
    double sum = 0;
    for (Index t = 0; t < 32; ++t)
      for (std::size_t c = 0; c < 128; ++c) {
        const double d = tile.decode(t)[c] - rows[static_cast<std::size_t>(t) * 128 + c];
        sum += d * d;
      }
    return sum;
  };
  EXPECT_LT(error(Rotated<Int4>{}), 0.5 * error(Int4{}));
}

TEST(Rotated, FoldsWhateverIsInside) {
  const auto check = [](auto codec, TileShape shape) {
    using C = decltype(codec);
    std::vector<float> state;
    for (Index i = 0; i < state_floats<C>(shape.width); ++i) state.push_back(0.5f + random_unit(9, i));
    test::expect_folds<C>(shape, state.empty() ? nullptr : state.data());
    test::expect_decodes_anything<C>(shape, state);
    if constexpr (C::rows_move) test::expect_rows_move<C>({16, shape.width}, state.empty() ? nullptr : state.data());
  };
  for (const Index width : {Index{64}, Index{96}, Index{128}}) {
    check(Rotated<Int4>{}, {16, width});
    check(Rotated<Int8, 7>{}, {16, width});
    check(Rotated<KiviKeys<4>, 7>{}, {64, width});
    check(Rotated<Fp8E5M2, 2>{}, {16, width});
    check(Rotated<Rotated<Int8>, 2>{}, {16, width});
    check(Balanced<Rotated<Affine<4, 32>>>{}, {16, width});
    check(Rotated<ChannelScaled<Int8>>{}, {16, width});
    check(ChannelAffine<Rotated<Affine<8>>>{}, {16, width});
    check(ChannelScaled<KiviKeys<2>>{}, {32, width});
    check(MikvKeys<2>{}, {16, width});
    check(ZipVlValues<4>{}, {16, width});
  }
  check(Rotated<Int8>{}, {16, 80});
  check(Rotated<KiviKeys<2>>{}, {64, 1024});
}

TEST(Rotated, NumbersThatHurt) {
  const float inf = std::numeric_limits<float>::infinity(), nan_value = std::numeric_limits<float>::quiet_NaN();
  const auto calm = test::gaussians(4, 2 * 96);
  using C = Rotated<Int8>;
  GuardedTile<C> before({2, 96}), zero({2, 96}), tile({2, 96});
  before.encode(calm);
  for (const float bad : {nan_value, inf, -inf, std::numeric_limits<float>::max()}) {
    auto rows = calm, with_zero = calm;
    rows[70] = bad, with_zero[70] = 0;
    tile.encode(rows), zero.encode(with_zero);
    EXPECT_EQ(tile.decode(1), before.decode(1));
    for (const float y : tile.decode(0)) EXPECT_TRUE(std::isfinite(y));
    if (std::isnan(bad)) {
      EXPECT_EQ(tile.bytes(), zero.bytes());
    }
  }
}

}  // namespace
}  // namespace kvpare

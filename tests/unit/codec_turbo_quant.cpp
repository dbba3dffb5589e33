// TurboQuant: codebooks, the worked example, distortion, and products that are unbiased with a sketch.
#include "kvpare/codec/turbo_quant.hpp"

#include <gtest/gtest.h>

#include <limits>

#include "support/folds.hpp"

namespace kvpare {
namespace {

using test::GuardedTile;

static_assert(TurboQuant<4, true>::name == "hadamard_lloyd4_nc" && TurboQuant<2, false, 9>::name == "hadamard9_lloyd2");
static_assert(TurboProduct<4>::name == "hadamard_lloyd3_sketch1" && TurboValues<3>::name == "int3_min_up");
static_assert(TurboQuant<4>::tile_bytes({1, 128}) == 66 && TurboQuant<3>::tile_bytes({1, 128}) == 50, "vLLM's keys");
static_assert(TurboValues<4>::tile_bytes({1, 128}) == 68 && TurboValues<3>::tile_bytes({1, 128}) == 52,
              "vLLM's values");
static_assert(TurboProduct<4>::tile_bytes({2, 128}) == 2 * 68);
static_assert(TurboQuant<3>::fits({64, 80}) && !TurboQuant<3>::fits({64, 12}) && TurboQuant<4>::fits({64, 12}));

TEST(Lloyd, ThresholdsLieMidway) {
  const float three[] = {0.5005497f, 1.0499573f, 1.7479275f};
  const float four[] = {0.2582217f, 0.5224037f, 0.7995498f, 1.0992858f, 1.4371388f, 1.8435318f, 2.4008034f};
  for (std::size_t k = 0; k < 3; ++k) {
    EXPECT_NEAR(Lloyd<3>::thresholds[4 + k], three[k], 2e-7f);
    EXPECT_EQ(Lloyd<3>::thresholds[4 + k], -Lloyd<3>::thresholds[2 - k]);
  }
  for (std::size_t k = 0; k < 7; ++k) EXPECT_NEAR(Lloyd<4>::thresholds[8 + k], four[k], 2e-7f);
  EXPECT_EQ(Lloyd<1>::thresholds[0], 0.0f);
  EXPECT_EQ(Lloyd<2>::nearest(0.0f), 1) << "a tie goes to the lower centroid";
  EXPECT_EQ(Lloyd<2>::nearest(1e-30f), 2);
}

TEST(TurboQuant, WorkedExample) {
  using C = TurboQuant<2>;
  GuardedTile<C> tile({1, 4});
  tile.encode({3, 0, 4, 0});
  EXPECT_EQ(tile.bytes(), (std::vector<int>{0x5f, half(2.5f).bits & 255, half(2.5f).bits >> 8}));
  const auto x = tile.decode(0);
  const float want[] = {2.644094f, 0, 4.907994f, 0};
  for (std::size_t c = 0; c < 4; ++c) EXPECT_NEAR(x[c], want[c], 1e-6f);
  float q[] = {1, 2, 0.5f, -1}, row[4];
  EXPECT_NEAR(q[0] * x[0] + q[1] * x[1] + q[2] * x[2] + q[3] * x[3], 5.098091f, 1e-6f);
  C::fold_query(4, nullptr, q);
  EXPECT_EQ(std::vector<float>(q, q + 4), (std::vector<float>{1.25f, 0.25f, 1.75f, -1.25f}));
  C::Inner::decode({1, 4}, tile.tile(), 0, nullptr, row);
  EXPECT_NEAR(q[0] * row[0] + q[1] * row[1] + q[2] * row[2] + q[3] * row[3], 5.098091f, 1e-6f);

  GuardedTile<TurboQuant<2, true>> corrected({1, 4});
  corrected.encode({3, 0, 4, 0});
  const auto y = corrected.decode(0);
  EXPECT_NEAR(y[0] + 2 * y[1] + 0.5f * y[2] - y[3], 4.572352f, 4.6f * 0x1p-11f);
  EXPECT_NEAR(std::sqrt(y[0] * y[0] + y[1] * y[1] + y[2] * y[2] + y[3] * y[3]), 5, 5 * 0x1p-11f);
}

/// The example's test matrix works on rows as they are; the codec sees rotated ones, so this is S H, once per four channels.
struct ExampleSketch {
  static constexpr std::uint64_t name = 0;
  static constexpr float matrix[4][4] = {{1, 0, 1, 0}, {0, 1, 0, -1}, {1, -1, 0, 0}, {0, 0, 1, 1}};
  static void project(Index width, float* x) {
    for (; width > 0; width -= 4, x += 4) {
      detail::hadamard(x, 4);
      float y[4] = {};
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) y[i] += matrix[i][j] * x[j];
      // The example's zeros, which floats miss by an ulp.
      for (int i = 0; i < 4; ++i) x[i] = std::abs(y[i]) < 1e-6f ? 0 : y[i];
    }
  }
  static void transpose(Index width, float* x) {
    for (; width > 0; width -= 4, x += 4) {
      float y[4] = {};
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) y[j] += matrix[i][j] * x[i];
      std::copy(y, y + 4, x);
      detail::hadamard(x, 4);
    }
  }
};

TEST(TurboProduct, WorkedExample) {
  // Signs of four channels fill no byte, so the example stands twice in a row of eight. The row is √2 as long, the share of
  // codes in each half the same, that of the sketch 1/√2: 1.994712 + 2.819974 / √2 where the example has 4.814686.
  using C = LloydSketch<2, ExampleSketch>;
  static_assert(C::name == "lloyd1_sketch0" && !C::fits({1, 4}));
  GuardedTile<C> tile({1, 8});
  const float y[] = {3.5f, 3.5f, -0.5f, -0.5f};  // (3, 0, 4, 0), rotated
  tile.encode({y[0], y[1], y[2], y[3], y[0], y[1], y[2], y[3]});
  EXPECT_EQ(tile.bytes()[0], 0x33) << "codes 1 1 0 0";
  EXPECT_EQ(tile.bytes()[1], 0xff) << "z = 1, also where S r is 0";
  EXPECT_EQ(tile.bytes()[2] | tile.bytes()[3] << 8, half(2.5f).bits);
  EXPECT_EQ(tile.bytes()[4] | tile.bytes()[5] << 8, half(std::sqrt(50.0f) * 0.600004f * 1.2533141f / 8).bits);
  const auto row = tile.decode(0);
  const float q[] = {1.25f, 0.25f, 1.75f, -1.25f};  // (1, 2, 0.5, -1), rotated
  for (std::size_t block = 0; block < 8; block += 4) {
    float score = 0;
    for (std::size_t c = 0; c < 4; ++c) score += q[c] * row[block + c];
    EXPECT_NEAR(score, 1.994712f + 2.819974f / std::sqrt(2.0f), 2.8f * 0x1p-11f);
  }
}

template <class C>
double distortion(Index width) {
  const TileShape shape{64, width};
  double error = 0, signal = 0;
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const auto rows = test::gaussians(seed, 64 * width);
    GuardedTile<C> tile(shape);
    tile.encode(rows);
    for (Index t = 0; t < 64; ++t) {
      const auto y = tile.decode(t);
      for (Index c = 0; c < width; ++c) {
        const double x = static_cast<double>(rows[static_cast<std::size_t>(t * width + c)]);
        const double d = static_cast<double>(y[static_cast<std::size_t>(c)]) - x;
        error += d * d, signal += x * x;
      }
    }
  }
  return error / signal;
}
TEST(TurboQuant, DistortionIsThePapers) {
  EXPECT_NEAR(distortion<TurboQuant<1>>(128), 0.36338, 0.36338 * 0.03);
  EXPECT_NEAR(distortion<TurboQuant<2>>(128), 0.11748, 0.11748 * 0.03);
  EXPECT_NEAR(distortion<TurboQuant<3>>(128), 0.03455, 0.03455 * 0.04);
  EXPECT_NEAR(distortion<TurboQuant<4>>(128), 0.00950, 0.00950 * 0.06);
  EXPECT_NEAR((distortion<TurboQuant<2, false, 5>>(96)), 0.11748, 0.11748 * 0.04);
}

/// Regresses q·x' on q·x over many rows: 1 = unbiased.
template <class C>
double slope() {
  const Index width = 128;
  double xy = 0, xx = 0;
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const auto rows = test::gaussians(100 + seed, 64 * width), q = test::gaussians(200 + seed, width);
    GuardedTile<C> tile({64, width});
    tile.encode(rows);
    for (Index t = 0; t < 64; ++t) {
      const auto y = tile.decode(t);
      double exact = 0, coded = 0;
      for (Index c = 0; c < width; ++c) {
        const auto i = static_cast<std::size_t>(c);
        exact += double{q[i]} * double{rows[static_cast<std::size_t>(t * width + c)]},
            coded += double{q[i]} * double{y[i]};
      }
      xy += exact * coded, xx += exact * exact;
    }
  }
  return xy / xx;
}
/// The paper's sketch: independent normal entries.
struct NormalSketch {
  static constexpr std::uint64_t name = 0;
  static const std::vector<float>& matrix() {
    static const auto all = test::gaussians(77, 128 * 128);
    return all;
  }
  static void project(Index width, float* x) {
    std::vector<float> y(static_cast<std::size_t>(width), 0.0f);
    for (Index i = 0; i < width; ++i)
      for (Index j = 0; j < width; ++j)
        y[static_cast<std::size_t>(i)] += matrix()[static_cast<std::size_t>(i * width + j)] * x[j];
    std::copy(y.begin(), y.end(), x);
  }
  static void transpose(Index width, float* x) {
    std::vector<float> y(static_cast<std::size_t>(width), 0.0f);
    for (Index i = 0; i < width; ++i)
      for (Index j = 0; j < width; ++j)
        y[static_cast<std::size_t>(j)] += matrix()[static_cast<std::size_t>(i * width + j)] * x[i];
    std::copy(y.begin(), y.end(), x);
  }
};
TEST(TurboProduct, ProductsAreUnbiasedWithASketchAndShrunkWithout) {
  EXPECT_NEAR(slope<TurboQuant<1>>(), 1 - 0.363, 0.03);
  EXPECT_NEAR(slope<TurboProduct<2>>(), 1, 0.03);
  EXPECT_NEAR(slope<TurboProduct<3>>(), 1, 0.03);
  EXPECT_NEAR((slope<TurboProduct<2, 0, NormalSketch>>()), 1, 0.05);
  // What is left of the rest: π/2 - 1 of it where the rows of the sketch are orthogonal, π/2 where they are independent.
  EXPECT_NEAR(distortion<TurboProduct<2>>(128), 0.36338 * (std::numbers::pi / 2 - 1), 0.01);
  EXPECT_NEAR((distortion<TurboProduct<2, 0, NormalSketch>>(128)), 0.36338 * std::numbers::pi / 2, 0.03);
}

TEST(TurboQuant, Laws) {
  test::expect_strides_do_not_matter<Lloyd<3>>(64);
  test::expect_strides_do_not_matter<Lloyd<2, true>>(64);
  const auto check = [](auto codec) {
    using C = decltype(codec);
    for (const Index width : {Index{64}, Index{80}, Index{96}, Index{128}}) {
      test::expect_folds<C>({16, width}, nullptr);
      test::expect_rows_move<C>({16, width});
      test::expect_decodes_anything<C>({16, width});
    }
    GuardedTile<C> tile({2, 64}), other({2, 64});
    tile.encode(std::vector<float>(128, 0.0f));
    EXPECT_EQ(tile.decode(0), std::vector<float>(64, 0.0f)) << C::name;
    const auto calm = test::gaussians(3, 128);
    other.encode(calm);
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), 1e-45f}) {
      auto rows = calm, with_zero = calm;
      rows[7] = bad, with_zero[7] = 0;
      tile.encode(rows);
      for (const float y : tile.decode(0)) EXPECT_TRUE(std::isfinite(y)) << C::name << ' ' << bad;
      EXPECT_EQ(tile.decode(1), other.decode(1));
      GuardedTile<C> zero({2, 64});
      zero.encode(with_zero);
      if (std::isnan(bad)) {
        EXPECT_EQ(tile.bytes(), zero.bytes());
      }
    }
    tile.encode(std::vector<float>(128, 1e-42f));
    for (const float y : tile.decode(0)) EXPECT_LE(std::abs(y), 1e-40f);
  };
  check(TurboQuant<1>{}), check(TurboQuant<2, true>{}), check(TurboQuant<3>{}), check(TurboQuant<4, true, 3>{});
  check(TurboProduct<2>{}), check(TurboProduct<4>{}), check(TurboProduct<5, 3, HadamardSketch<8>>{});
}

}  // namespace
}  // namespace kvpare

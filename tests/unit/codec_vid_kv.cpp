// VidKV's keys: which channels have 2 bits, half a spectrum of 1 bit, and what the paper's whole one makes of it.
#include "kvpare/codec/vid_kv.hpp"

#include <gtest/gtest.h>

#include <limits>

#include "oracle/vid_kv.hpp"
#include "support/coded_tiles.hpp"
#include "support/folds.hpp"

namespace kvpare {
namespace {

using test::GuardedTile;
using Literal = VidKvKeys<50, 32, OneBit::literal>;

static_assert(VidKvKeys<>::name == "vid_kv50_g32" && VidKvKeys<25>::name == "vid_kv25_g32");
static_assert(VidKvKeys<75, 64>::name == "vid_kv75_g64" && Literal::name == "vid_kv50_g32_literal");
static_assert(VidKvKeys<50, 32, OneBit::symmetric, false>::name == "vid_kv50_g32_plain");
static_assert(VidKvKeys<25, 0, OneBit::literal, true>::name == "vid_kv25_fourier_literal");
static_assert(VidKvKeys<>::Inner::name == "split50_int2_channel_g32_min_int1_channel_g32");
static_assert(Literal::Inner::name ==
              "split50_int2_channel_g32_min_split_spectrum_bit_channel_g32_bit_halves_channel_g32");
static_assert(VidKvValues<>::name == "ternary_channel_g32" &&
              VidKvValues<64, 50>::name == "ternary_channel_g64_gamma50");
static_assert(VidKvProtectedValues<>::name == "int2_channel_g32_min");
// Bits per number: 3 and 1.5 with scales, by halves; values 1.75 (bytes of five codes) + 0.5.
static_assert(VidKvKeys<50>::tile_bytes({64, 128}) * 8 == 64 * 128 * 9 / 4);
static_assert(VidKvKeys<25>::tile_bytes({64, 128}) * 8 == 64 * (32 * 3 + 96 * 3 / 2));
static_assert(VidKvKeys<75, 64>::tile_bytes({64, 128}) * 8 == 64 * (96 * 5 / 2 + 32 * 5 / 4));
static_assert(Literal::tile_bytes({64, 128}) == VidKvKeys<50>::tile_bytes({64, 128}));
static_assert(VidKvValues<>::tile_bytes({64, 128}) * 8 == 64 * 128 * 9 / 4);
static_assert(!VidKvKeys<>::rows_move && VidKvKeys<>::host_only && state_floats<VidKvKeys<>>(128) == 128);
static_assert(VidKvKeys<>::fits({64, 80}) && VidKvKeys<>::fits({32, 6}) && !VidKvKeys<>::fits({16, 128}));

// ---- the transform --------------------------------------------------------------------------------------------------

/// Re Y_0 … Re Y_{m/2}, Im Y_1 … Im Y_{m/2-1}
std::vector<double> half_spectrum(const std::vector<float>& y) {
  const oracle::Complexes all = oracle::fourier({y.begin(), y.end()});
  std::vector<double> half;
  for (std::size_t k = 0; k <= y.size() / 2; ++k) half.push_back(all[k].real());
  for (std::size_t k = 1; k < y.size() / 2; ++k) half.push_back(all[k].imag());
  return half;
}
std::vector<double> weights(std::size_t m) {
  std::vector<double> w(m, std::sqrt(2.0 / static_cast<double>(m)));
  w[0] = w[m / 2] = std::sqrt(1.0 / static_cast<double>(m));
  return w;
}

TEST(Fourier, VidKvWorkedExample) {
  const auto all = oracle::fourier({1, 3, 2, 0});
  const std::complex<double> want[] = {{6, 0}, {-1, -3}, {0, 0}, {-1, 3}};
  for (std::size_t k = 0; k < 4; ++k) EXPECT_NEAR(std::abs(all[k] - want[k]), 0, 1e-12);
  // The specification's {6, -1, -3, 0} with the imaginary part behind the real ones.
  float x[] = {1, 3, 2, 0};
  detail::real_fourier<4>(x, 4);
  const double half[] = {6, -1, 0, -3};
  for (std::size_t k = 0; k < 4; ++k) EXPECT_NEAR(static_cast<double>(x[k]), half[k] * weights(4)[k], 1e-6);
  detail::real_fourier_back<4>(x, 4);
  for (std::size_t n = 0; n < 4; ++n) EXPECT_NEAR(x[n], (std::vector<float>{1, 3, 2, 0})[n], 1e-6f);
}

TEST(Fourier, IsHalfTheSpectrumAndOrthogonal) {
  for (const Index m : {2, 4, 6, 10, 16, 20, 22, 24, 32, 40, 48, 60, 64, 96, 128, 192, 256, 1024}) {
    const auto y = test::gaussians(static_cast<std::uint64_t>(m), m);
    auto x = y;
    const auto want = half_spectrum(y), w = weights(y.size());
    detail::real_fourier<1024>(x.data(), m);
    double before = 0, after = 0;
    for (std::size_t k = 0; k < x.size(); ++k) {
      ASSERT_NEAR(static_cast<double>(x[k]), want[k] * w[k], 2e-6 * std::sqrt(static_cast<double>(m))) << m << " " << k;
      before += static_cast<double>(y[k]) * static_cast<double>(y[k]);
      after += static_cast<double>(x[k]) * static_cast<double>(x[k]);
    }
    EXPECT_NEAR(after, before, before * 1e-5) << m;
    detail::real_fourier_back<1024>(x.data(), m);
    for (std::size_t n = 0; n < x.size(); ++n) ASSERT_NEAR(x[n], y[n], 4e-6f) << m << " " << n;
  }
}

TEST(Fourier, TurnsAreExact) {
  for (const Index m : {1, 2, 3, 7, 12, 64, 1000, 1024})
    for (Index j = -m; j <= 2 * m; ++j) {
      const double angle = 2 * std::numbers::pi * static_cast<double>(j) / static_cast<double>(m);
      ASSERT_NEAR(detail::cos_of_turn(j, m), std::cos(angle), 4e-15);
      ASSERT_NEAR(detail::sin_of_turn(j, m), std::sin(angle), 4e-15);
    }
  EXPECT_EQ(detail::cos_of_turn(0, 8), 1.0);
  EXPECT_EQ(detail::cos_of_turn(2, 8), 0.0);
  EXPECT_EQ(detail::cos_of_turn(4, 8), -1.0);
}

// ---- one bit --------------------------------------------------------------------------------------------------------

TEST(OneBit, VidKvWorkedExample) {
  const std::vector<double> x = {0.9, -0.1, 0.4, -1.2};
  const auto error = [&](const std::vector<double>& y) {
    double sum = 0;
    for (std::size_t i = 0; i < 4; ++i) sum += (x[i] - y[i]) * (x[i] - y[i]);
    return sum;
  };
  EXPECT_NEAR(error(oracle::one_bit(x, oracle::BitDecode::symmetric)), 0.73, 1e-12);
  EXPECT_NEAR(error(oracle::one_bit(x, oracle::BitDecode::literal)), 1.575, 1e-12);
  // The same by the codecs: channel 0 has 2 bits, channels 1 and 2 the group; a page of 8 slots with 4 rows in it, twice.
  const auto coded_error = [&](auto codec) {
    using C = decltype(codec);
    GuardedTile<C> tile({8, 4});
    std::vector<float> rows(8 * 4, 0.0f);
    for (std::size_t t = 0; t < 8; ++t) rows[4 * t + 2] = static_cast<float>(x[t % 4]);
    tile.encode(rows);
    std::vector<double> y;
    for (Index t = 0; t < 4; ++t) y.push_back(static_cast<double>(tile.decode(t)[2]));
    return error(y);
  };
  EXPECT_NEAR(coded_error(VidKvKeys<50, 8, OneBit::symmetric, false>{}), 0.73, 1e-3);
  EXPECT_NEAR(coded_error(VidKvKeys<50, 8, OneBit::literal, false>{}), 1.575, 1e-3);
}

// ---- the order of channels ------------------------------------------------------------------------------------------

template <class C>
std::vector<float> order_of(const std::vector<float>& low, const std::vector<float>& high) {
  Measured m;
  m.layer_min = low.data(), m.layer_max = high.data();
  std::vector<float> state(low.size() + 1, 1234.5f);
  C::make_state(static_cast<Index>(low.size()), m, state.data());
  EXPECT_EQ(state.back(), 1234.5f);
  state.pop_back();
  return state;
}

TEST(VidKvKeys, WideChannelsComeFirst) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> low = {-1, -5, 0, -2, 3, -1, 0, -4};
  EXPECT_EQ(order_of<VidKvKeys<50>>(low, {1, 5, 1, 2, 4, 7, 0, 0}), (std::vector<float>{1, 3, 5, 7, 0, 2, 4, 6}));
  EXPECT_EQ(order_of<VidKvKeys<25>>(low, {1, 5, 1, 2, 4, 7, 0, 0}), (std::vector<float>{1, 5, 0, 2, 3, 4, 6, 7}));
  const std::vector<float> zeros(8, 0.0f), ones(8, 1.0f);
  EXPECT_EQ(order_of<VidKvKeys<50>>(zeros, ones), (std::vector<float>{0, 1, 2, 3, 4, 5, 6, 7})) << "ties: lower first";
  EXPECT_EQ(order_of<VidKvKeys<25>>({0, 0, inf, nan, 0, -inf, 0, 0}, {1, 2, -inf, 1, inf, 1, 3, 4}),
            (std::vector<float>{4, 5, 0, 1, 2, 3, 6, 7}))
      << "channels without numbers have no range";
  std::vector<float> own(8);
  Measured head;  // no layer: the head's own
  const std::vector<float> high = {1, 5, 1, 2, 4, 7, 0, 0};
  head.min = low.data(), head.max = high.data();
  VidKvKeys<50>::make_state(8, head, own.data());
  EXPECT_EQ(own, (order_of<VidKvKeys<50>>(low, high)));
}

// ---- against the paper ----------------------------------------------------------------------------------------------

/// Two heads of 64 tokens; some channels much wider. Head 0 coded with the layer's order, by codec and by oracle.
template <class C>
void expect_the_papers(Index width, Index percent, Index group, oracle::BitDecode how, bool with_fourier) {
  constexpr Index tokens = 64, heads = 2;
  oracle::Array3 keys(tokens, heads, width);
  oracle::Array2 first(tokens, width);
  std::vector<float> rows;
  const auto w = static_cast<std::size_t>(width);
  std::vector<float> low(w, 1e9f), high(w, -1e9f);
  for (Index t = 0; t < tokens; ++t)
    for (Index h = 0; h < heads; ++h)
      for (Index c = 0; c < width; ++c) {
        const float x = test::gaussian(static_cast<std::uint64_t>(40 + h), t * width + c) *
                            (1 + static_cast<float>((c * 7 + h) % width) / 16) +
                        0.25f;
        keys.at(t, h, c) = static_cast<double>(x);
        const auto at = static_cast<std::size_t>(c);
        low[at] = std::min(low[at], x), high[at] = std::max(high[at], x);
        if (h == 0) rows.push_back(x), first.at(t, c) = static_cast<double>(x);
      }
  const auto abnormal = oracle::abnormal_channels(keys, percent);
  const auto want = oracle::vid_kv_keys(first, abnormal, group, how, with_fourier);
  const auto state = order_of<C>(low, high);
  for (Index i = 0; i < C::abnormal(width); ++i)
    EXPECT_TRUE(abnormal[static_cast<std::size_t>(state[static_cast<std::size_t>(i)])]);
  GuardedTile<C> tile({tokens, width});
  tile.encode(rows, 0, state.data());
  for (Index t = 0; t < tokens; ++t) {
    const auto got = tile.decode(t, state.data());
    for (Index c = 0; c < width;
         ++c)  // the scale of bits is a half: 2^-11 of several units, as often as there are bits
      ASSERT_NEAR(static_cast<double>(got[static_cast<std::size_t>(c)]), want.at(t, c), 0.02)
          << C::name << " token " << t << " channel " << c;
  }
}

TEST(VidKvKeys, DecodesWhatThePaperDecodes) {
  using oracle::BitDecode;
  expect_the_papers<VidKvKeys<50>>(128, 50, 32, BitDecode::symmetric, true);
  expect_the_papers<VidKvKeys<75>>(128, 75, 32, BitDecode::symmetric, true);
  expect_the_papers<VidKvKeys<25>>(128, 25, 32, BitDecode::symmetric, false);
  expect_the_papers<VidKvKeys<50, 64>>(80, 50, 64, BitDecode::symmetric, true);
  expect_the_papers<VidKvKeys<25, 0, OneBit::symmetric, true>>(24, 25, 64, BitDecode::symmetric, true);
}

TEST(VidKvKeys, LiterallyToo) {
  using oracle::BitDecode;
  expect_the_papers<Literal>(128, 50, 32, BitDecode::literal, true);
  expect_the_papers<VidKvKeys<75, 32, OneBit::literal>>(128, 75, 32, BitDecode::literal, true);
  expect_the_papers<VidKvKeys<25, 32, OneBit::literal>>(128, 25, 32, BitDecode::literal, false);
  expect_the_papers<VidKvKeys<50, 16, OneBit::literal>>(24, 50, 16, BitDecode::literal, true);
}

template <class C>
double squared_error(const std::vector<float>& rows) {
  GuardedTile<C> tile({64, 128});
  tile.encode(rows);
  double sum = 0;
  for (Index t = 0; t < 64; ++t)
    for (std::size_t c = 0; c < 128; ++c)
      sum += std::pow(static_cast<double>(tile.decode(t)[c] - rows[static_cast<std::size_t>(t) * 128 + c]), 2);
  return sum;
}

TEST(VidKvKeys, SymmetricBitsHalveTheError) {
  const auto rows = test::gaussians(6, 64 * 128);
  EXPECT_LT(squared_error<VidKvKeys<50>>(rows), 0.75 * squared_error<Literal>(rows));
}

// ---- laws -----------------------------------------------------------------------------------------------------------

template <class C>
class VidKvForms : public ::testing::Test {};
using Forms = ::testing::Types<VidKvKeys<50>, VidKvKeys<25>, VidKvKeys<75>, VidKvKeys<50, 64>, Literal,
                               VidKvKeys<25, 32, OneBit::literal>, VidKvKeys<50, 16, OneBit::symmetric, false>>;
TYPED_TEST_SUITE(VidKvForms, Forms);

TYPED_TEST(VidKvForms, Laws) {
  using C = TypeParam;
  const TileShape shape{64, 64};
  std::vector<float> state;  // 3, 0, 1, 2, 7, 4, 5, 6, …
  for (int c = 0; c < 64; ++c) state.push_back(static_cast<float>(c / 4 * 4 + (c + 3) % 4));
  test::expect_folds<C>(shape, nullptr), test::expect_folds<C>(shape, state.data());
  test::expect_folds<C>({64, 36}, nullptr);
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  test::expect_decodes_anything<C>(shape, state);
  auto odd = state;
  odd[0] = nan, odd[5] = inf, odd[9] = -inf, odd[20] = 1e30f, odd[33] = 0.5f, odd[40] = 64;
  test::expect_decodes_anything<C>(shape, odd);
  auto rows = test::gaussians(5, 64 * 64);
  GuardedTile<C> tile(shape), zero(shape);
  const auto all_finite = [&](const float* s) {
    for (Index t = 0; t < 64; ++t)
      for (const float x : tile.decode(t, s))
        if (!std::isfinite(x)) return false;
    return true;
  };
  tile.encode(rows, 0, odd.data());
  EXPECT_TRUE(all_finite(odd.data()));
  for (const float bad : {nan, inf, -inf, 1e38f, 1e-45f}) {
    auto with_bad = rows, with_zero = rows;
    with_bad[5 * 64 + 37] = bad, with_zero[5 * 64 + 37] = 0;
    tile.encode(with_bad, 0, state.data()), zero.encode(with_zero, 0, state.data());
    EXPECT_TRUE(all_finite(state.data())) << bad;
    if (std::isnan(bad)) {
      EXPECT_EQ(tile.bytes(), zero.bytes());
    }
  }
  std::vector<float> q(64, nan);
  C::fold_query(64, state.data(), q.data());
  EXPECT_TRUE(std::isnan(q[0]) && std::isnan(q[63])) << "a query's NaN stays";
}

TEST(VidKvKeys, OtherGroupsNeverNotice) {
  auto rows = test::gaussians(5, 64 * 64);
  GuardedTile<VidKvKeys<>> calm({64, 64}), tile({64, 64});
  calm.encode(rows);
  rows[5 * 64 + 37] = std::numeric_limits<float>::infinity();
  tile.encode(rows);
  for (Index t = 32; t < 64; ++t) EXPECT_EQ(tile.decode(t), calm.decode(t));
  EXPECT_NE(tile.decode(5), calm.decode(5));
}

// ---- attention ------------------------------------------------------------------------------------------------------

template <Codec C>
void check_tiles(TileShape shape) {
  std::vector<float> state;
  for (Index c = 0; c < shape.width; ++c) state.push_back(static_cast<float>((c * 5 + 3) % shape.width));
  for (const cpu::Isa isa : cpu::sets_of_this_machine())
    if (!::testing::Test::HasFatalFailure())
      cpu::check<C>(Side::keys, shape, isa, 16, {1, 4, 7}, 1.0 / 127, state.data());
}
template <Codec C>
Support support(Side side, TileShape shape) {
  return cpu::tile_ops<C>(side, shape, 16)->support;
}

TEST(VidKvTiles, ScoresAreThoseOfDecodedKeys) {
  check_tiles<VidKvKeys<50>>({64, 128}), check_tiles<VidKvKeys<25>>({32, 128}), check_tiles<VidKvKeys<75>>({64, 128});
  check_tiles<Literal>({64, 128}), check_tiles<VidKvKeys<50>>({32, 96});
}

TEST(VidKvTiles, FusedWhereBothPartsAre) {
  const TileShape shape{64, 128};
  EXPECT_EQ(support<VidKvKeys<50>>(Side::keys, shape), Support::fused);
  EXPECT_EQ(support<VidKvKeys<25>>(Side::keys, shape), Support::fused);
  EXPECT_EQ(support<VidKvKeys<75>>(Side::keys, shape), Support::fused);
  EXPECT_EQ(support<VidKvKeys<50>>(Side::keys, {64, 64}), Support::fused);
  EXPECT_EQ((support<VidKvKeys<25, 32, OneBit::literal>>(Side::keys, shape)), Support::fused);
  EXPECT_EQ(support<VidKvKeys<50>>(Side::keys, {64, 96}), Support::generic) << "48 channels of 1 bit";
  EXPECT_EQ(support<Literal>(Side::keys, shape), Support::generic) << "33 real parts and 31 imaginary ones";
  EXPECT_EQ(support<VidKvValues<>>(Side::values, shape), Support::fused);
  EXPECT_EQ((support<VidKvValues<64, 50>>(Side::values, shape)), Support::fused);
  EXPECT_EQ(support<VidKvProtectedValues<>>(Side::values, shape), Support::fused);
}

}  // namespace
}  // namespace kvpare

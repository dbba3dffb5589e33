// ThinK's thin keys: which channels stay, their bytes, scores without the others.
#include "kvpare/codec/thin.hpp"

#include <gtest/gtest.h>

#include <limits>

#include "kvpare/codec/fp8.hpp"
#include "kvpare/codec/raw.hpp"
#include "kvpare/codec/rotation.hpp"
#include "oracle/think.hpp"
#include "support/coded_tiles.hpp"
#include "support/folds.hpp"

namespace kvpare {
namespace {

using test::GuardedTile;

static_assert(Thin<Int4, 40>::name == "thin40_int4");
static_assert(Thin<KiviKeys<2>, 40, 8>::name == "thin40a8_int2_channel_g32_min");
static_assert(Thin<Raw<half>, 40>::name == "thin40_half");
static_assert(Thin<Raw<half>, 40>::inner_width(128) == 77 && Thin<Raw<half>, 40, 16>::inner_width(128) == 80);
static_assert(Thin<Raw<half>, 0>::inner_width(128) == 128 && Thin<Raw<half>, 99>::inner_width(8) == 1);
static_assert(Thin<Raw<half>, 25, 8>::inner_width(20) == 16 && Thin<Raw<half>, 10, 16>::inner_width(20) == 20,
              "never more than there are");
static_assert(Thin<Raw<half>, 40>::tile_bytes({64, 128}) == 64 * 77 * 2, "nothing but the kept numbers");
static_assert(Thin<Int4, 50>::tile_bytes({64, 128}) == 64 * (64 / 2 + 2));
static_assert(Thin<KiviKeys<2>, 40, 16>::tile_bytes({64, 128}) == 64 * 80 / 4 + 2 * 80 * 4);
static_assert(!Thin<Int4, 40>::fits({64, 128}) && Thin<Int4, 40, 2>::fits({64, 128}),
              "77 codes of 4 bits are no bytes");
static_assert(Thin<KiviKeys<2>, 40>::fits({64, 128}) && !Thin<KiviKeys<2>, 40>::rows_move && Thin<Int4, 50>::rows_move);
static_assert(state_floats<Thin<Int4, 50>>(128) == 64 && state_floats<Thin<Fp8E4M3, 40>>(128) == 78);
static_assert(needs_query_window<Thin<Int4, 50>>() && ranges_of_all<Thin<Int4, 50>>() && Thin<Int4, 50>::host_only);
static_assert(Rotated<Thin<Int4, 50>>::host_only && !Rotated<Int4>::host_only);

/// What a head's state is made of.
struct Facts {
  std::vector<float> query_squares, sum_squares;
  Measured measured() const {
    Measured m;
    m.query_squares = query_squares.empty() ? nullptr : query_squares.data();
    m.sum_squares = sum_squares.data();
    return m;
  }
};
template <class C>
std::vector<Index> kept(const Facts& facts) {
  const Index width = static_cast<Index>(facts.sum_squares.size());
  std::vector<float> state(static_cast<std::size_t>(C::inner_width(width)) + 1, 1234.5f);
  C::make_state(width, facts.measured(), state.data());
  EXPECT_EQ(state.back(), 1234.5f);
  return {state.begin(), state.end() - 1};
}

TEST(Thin, ThinkWorkedExample) {
  oracle::Array2 queries(2, 4), keys(3, 4);
  queries.values = {1, 0.1, 2, 0.5, 2, -0.2, 1, 0.5};
  keys.values = {0.5, 4, 1, 0.1, 0.25, -3, 2, 0.2, 1, 5, -1, 0.1};
  oracle::Array3 grouped(2, 1, 4);
  grouped.values = queries.values;
  const double norms[] = {2.5617377, 1.5811388, 5.4772256, 0.1732051};
  const double released[] = {1.09375, 0.4166667, 5.0, 0.005};
  const auto scores = oracle::think_scores(queries, keys), code = oracle::think_scores_as_released(grouped, keys);
  Facts facts{std::vector<float>(4), std::vector<float>(4)};
  for (std::size_t j = 0; j < 4; ++j) {
    EXPECT_NEAR(scores[j], norms[j], 1e-7);
    EXPECT_NEAR(code[j], released[j], 1e-7);
    for (std::size_t i = 0; i < 2; ++i)
      facts.query_squares[j] += static_cast<float>(queries.values[4 * i + j] * queries.values[4 * i + j]);
    for (std::size_t t = 0; t < 3; ++t)
      facts.sum_squares[j] += static_cast<float>(keys.values[4 * t + j] * keys.values[4 * t + j]);
  }
  using Quarter = Thin<Raw<float>, 25>;
  EXPECT_EQ(kept<Quarter>(facts), (std::vector<Index>{0, 1, 2}));
  EXPECT_EQ((kept<Thin<Raw<float>, 50>>(facts)), (std::vector<Index>{0, 2}))
      << "though the keys of channel 1 are largest";
  EXPECT_EQ(oracle::think_kept(scores, 25), (std::vector<oracle::Index>{0, 1, 2}));
  EXPECT_EQ(oracle::think_kept(scores, 50), (std::vector<oracle::Index>{0, 2}));

  const std::vector<float> state = {0, 1, 2}, rows(keys.values.begin(), keys.values.end());
  GuardedTile<Quarter> tile({3, 4});
  tile.encode(rows, 0, state.data());
  float q[] = {1, 0.3f, -1, 2};
  const double thin[] = {0.7, -2.65, 3.5}, full[] = {0.9, -2.25, 3.7};
  const auto want = oracle::thin_scores({1, 0.3, -1, 2}, keys, {0, 1, 2});
  EXPECT_EQ(Quarter::fold_query(4, state.data(), q), 0.0f);
  for (std::size_t t = 0; t < 3; ++t) {
    const float* stored = reinterpret_cast<const float*>(tile.tile()) + 3 * t;
    EXPECT_NEAR(q[0] * stored[0] + q[1] * stored[1] + q[2] * stored[2], thin[t], 1e-6);
    EXPECT_NEAR(want[t], thin[t], 1e-12);
    EXPECT_NEAR(thin[t] + 2 * keys.values[4 * t + 3], full[t], 1e-12);
    EXPECT_EQ(tile.decode(static_cast<Index>(t), state.data())[3], 0.0f) << "a channel that is left out";
  }
}

TEST(Thin, KeepsTheChannelsOfTheOracle) {
  constexpr Index width = 128, tokens = 50, window = 32, heads = 4;
  for (std::uint64_t seed = 1; seed <= 10; ++seed) {
    oracle::Array3 queries(window, heads, width);
    oracle::Array2 keys(tokens, width);
    Facts facts{std::vector<float>(width), std::vector<float>(width)};
    for (Index i = 0; i < window * heads * width; ++i) {
      const float x = test::gaussian(seed, i) * (1 + static_cast<float>(i % width % 17));
      queries.values[static_cast<std::size_t>(i)] = static_cast<double>(x);
      facts.query_squares[static_cast<std::size_t>(i % width)] += x * x;
    }
    for (Index i = 0; i < tokens * width; ++i) {
      const float x = test::gaussian(seed + 100, i) * (1 + static_cast<float>(i % width % 13));
      keys.values[static_cast<std::size_t>(i)] = static_cast<double>(x);
      facts.sum_squares[static_cast<std::size_t>(i % width)] += x * x;
    }
    const auto scores = oracle::think_scores_as_released(queries, keys);
    EXPECT_EQ((kept<Thin<Int4, 40, 2>>(facts)), oracle::think_kept(scores, 40, 2));
    EXPECT_EQ((kept<Thin<Int4, 40>>(facts)), oracle::think_kept(scores, 40));
    EXPECT_EQ((kept<Thin<Int4, 60, 16>>(facts)), oracle::think_kept(scores, 60, 16));
  }
}

TEST(Thin, TiesAndNumbersThatHurt) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  using Half = Thin<Raw<float>, 50>;
  EXPECT_EQ(kept<Half>({{1, 1, 1, 1}, {2, 2, 2, 2}}), (std::vector<Index>{0, 1})) << "of equal ones the lower stay";
  EXPECT_EQ(kept<Half>({{1, 2, 4, 1}, {4, 2, 1, 5}}), (std::vector<Index>{0, 3}));
  EXPECT_EQ(kept<Half>({{nan, 1, 1, 1}, {9, 1, 2, nan}}), (std::vector<Index>{1, 2}));
  EXPECT_EQ(kept<Half>({{inf, 1, 0, 3e38f}, {0, 1, inf, 3e38f}}), (std::vector<Index>{1, 3})) << "0 times infinity";
  EXPECT_EQ(kept<Half>({{}, {1, 3, 2, 0}}), (std::vector<Index>{1, 2})) << "without queries by the keys alone";
  std::vector<float> state(2);
  Half::make_state(4, {}, state.data());
  EXPECT_EQ(state, (std::vector<float>{0, 1}));
}

TEST(Thin, StoresWhatInnerStoresOfTheKeptChannels) {
  const auto check = [](auto codec) {
    using C = decltype(codec);
    using Inner = typename C::Inner;
    const TileShape shape{32, 64}, inner{32, C::inner_width(64)};
    const auto rows = test::outliers(3, 32, 64);
    std::vector<float> state, picked;
    for (Index c = 63; static_cast<Index>(state.size()) < inner.width; c -= c % 5 == 4 && c > inner.width ? 2 : 1)
      state.insert(state.begin(), static_cast<float>(c));
    for (Index t = 0; t < 32; ++t)
      for (const float c : state)
        picked.push_back(rows[static_cast<std::size_t>(t * 64) + static_cast<std::size_t>(c)]);
    GuardedTile<C> tile(shape);
    GuardedTile<Inner> own(inner);
    tile.encode(rows, 0, state.data()), own.encode(picked);
    EXPECT_EQ(tile.bytes(), own.bytes()) << C::name;
    for (Index t = 0; t < 32; ++t) {
      std::vector<float> want(64, 0.0f);
      for (std::size_t i = 0; i < state.size(); ++i) want[static_cast<std::size_t>(state[i])] = own.decode(t)[i];
      EXPECT_EQ(tile.decode(t, state.data()), want) << C::name;
    }
    test::expect_folds<C>(shape, state.data()), test::expect_folds<C>(shape, nullptr);
    if constexpr (C::rows_move) test::expect_rows_move<C>(shape, state.data());
  };
  check(Thin<Raw<half>, 40>{}), check(Thin<Raw<float>, 75>{}), check(Thin<Int4, 50>{}), check(Thin<Int8, 40>{});
  check(Thin<KiviKeys<2>, 40>{}), check(Thin<KiviKeys<4>, 50, 16>{}), check(Thin<Rotated<Int4>, 50>{});
}

TEST(Thin, AnyStateIsSafe) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  using C = Thin<Affine<4>, 50>;
  for (const std::vector<float>& state :
       {std::vector<float>{nan, inf, -inf, 1e30f, -5, 0.5f, 7.9f, 1e-40f},
        std::vector<float>{15, 13, 11, 9, 7, 5, 3, 1}, std::vector<float>(8, 3.0f), std::vector<float>(8, 16.0f)}) {
    const auto rows = test::gaussians(2, 16 * 16);
    GuardedTile<C> tile({16, 16});
    tile.encode(rows, 0, state.data());
    for (Index t = 0; t < 16; ++t)
      for (const float x : tile.decode(t, state.data())) EXPECT_TRUE(std::isfinite(x));
    auto q = test::gaussians(3, 16);
    C::fold_query(16, state.data(), q.data());
    C::fold_output(16, state.data(), 1, q.data());
    test::expect_decodes_anything<C>({16, 16}, state);
  }
}

TEST(Thin, NaNOfAChannelThatIsLeftOutIsNeverSeen) {
  const std::vector<float> state = {0, 3, 4, 7};
  auto rows = test::gaussians(2, 8);
  GuardedTile<Thin<Int4, 50>> clean({1, 8}), tile({1, 8});
  clean.encode(rows, 0, state.data());
  rows[5] = std::numeric_limits<float>::quiet_NaN();
  tile.encode(rows, 0, state.data());
  EXPECT_EQ(tile.bytes(), clean.bytes());
  float q[] = {1, std::numeric_limits<float>::quiet_NaN(), 1, 1, 1, 1, 1, 1};
  Thin<Int4, 50>::fold_query(8, state.data(), q);
  for (int i = 0; i < 4; ++i) EXPECT_EQ(q[i], 1.0f);
}

// ---- attention ------------------------------------------------------------------------------------------------------

template <Codec C>
void check_tiles(Side side, TileShape shape, double bound) {
  std::vector<float> state(static_cast<std::size_t>(state_floats<C>(shape.width)));
  const Index n = inner_width<C>(shape.width);
  for (Index i = 0; i < n; ++i)  // spread over all channels
    state[static_cast<std::size_t>(i)] = static_cast<float>(i + i * (shape.width - n) / n);
  for (const cpu::Isa isa : cpu::sets_of_this_machine())
    if (!::testing::Test::HasFatalFailure()) cpu::check<C>(side, shape, isa, 16, {1, 4, 7}, bound, state.data());
}
template <Codec C>
Support support(Side side, TileShape shape) {
  return cpu::tile_ops<C>(side, shape, 16)->support;
}

TEST(ThinTiles, ScoresAndSumsAreThoseOfDecodedRows) {
  const TileShape shape{64, 128};
  check_tiles<Thin<Raw<half>, 40>>(Side::keys, shape, 1e-6);
  check_tiles<Thin<Raw<half>, 40>>(Side::values, shape, 1e-6);
  check_tiles<Thin<Raw<float>, 50>>(Side::keys, {16, 64}, 1e-6);
  check_tiles<Thin<Raw<bfloat16>, 40, 16>>(Side::keys, {32, 96}, 1e-6);
  check_tiles<Thin<Int4, 50>>(Side::keys, shape, 1.0 / 127);
  check_tiles<Thin<Int4, 40, 8>>(Side::keys, shape, 1.0 / 127);
  check_tiles<Thin<Int4, 45, 8>>(Side::keys, shape, 1.0 / 127);  // 72 channels
  check_tiles<Thin<Int4, 40, 16>>(Side::values, shape, 1.0 / 32767);
  check_tiles<Thin<KiviKeys<2>, 40>>(Side::keys, shape, 1.0 / 127);
  check_tiles<Thin<KiviKeys<2>, 40, 16>>(Side::keys, shape, 1.0 / 127);
  check_tiles<Thin<KiviKeys<4>, 45, 8>>(Side::keys, shape, 1.0 / 127);
  check_tiles<Thin<Symmetric<4, 32>, 50>>(Side::keys, shape, 1.0 / 127);
}

TEST(ThinTiles, FusedWhereInnerIs) {
  const TileShape shape{64, 128};
  EXPECT_EQ((support<Thin<Raw<half>, 40>>(Side::keys, shape)), Support::fused);
  EXPECT_EQ((support<Thin<Int4, 40, 8>>(Side::keys, shape)), Support::fused);
  EXPECT_EQ((support<Thin<KiviKeys<2>, 40, 16>>(Side::keys, shape)), Support::fused);
  EXPECT_EQ((support<Thin<KiviKeys<2>, 40>>(Side::keys, shape)), Support::generic) << "77 channels";
  EXPECT_EQ((support<Thin<KiviKeys<4>, 45, 8>>(Side::keys, shape)), Support::generic) << "72 channels with scales";
  EXPECT_EQ((cpu::tile_ops<Thin<Int4, 40>>(Side::keys, shape, 16)), nullptr);
}

}  // namespace
}  // namespace kvpare

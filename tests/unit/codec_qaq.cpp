// QAQ: the paper's examples, pages of mixed bits against the oracle, capacity, states and bytes of any kind.
#include "kvpare/codec/qaq.hpp"

#include <gtest/gtest.h>

#include <limits>
#include <set>

#include "oracle/qaq.hpp"
#include "support/codec_tiles.hpp"

namespace kvpare {
namespace {

using test::GuardedTile;
constexpr float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();

template <int capacity, int outliers = 1, QaqRule rule = QaqRule::paper>
using Keys = Qaq<capacity, QaqSide::keys, outliers, rule>;
template <int capacity, int outliers = 1, QaqRule rule = QaqRule::paper>
using Values = Qaq<capacity, QaqSide::values, outliers, rule>;
using CodeKeys = Keys<3, 1, QaqRule::reference_code>;
using CodeValues = Values<3, 1, QaqRule::reference_code>;

static_assert(Keys<3>::name == "qaq3_keys" && Values<2, 0>::name == "qaq2_values_o0");
static_assert(CodeKeys::name == "qaq3_keys_code");
static_assert(Keys<3>::tile_bytes({64, 128}) == 64 * 48 + 64 * 11 + 4);
static_assert(Values<2, 0>::tile_bytes({16, 80}) == 16 * 20 + 16 * 5 + 1);
static_assert(Keys<4, 2>::tile_bytes({32, 64}) == 32 * 32 + 32 * 17 + 2);
static_assert(Keys<3>::fits({64, 256}) && Keys<3>::fits({48, 80}) && !Keys<3>::fits({64, 272}) &&
              !Keys<3>::fits({64, 24}));
static_assert(!Keys<3>::fits({24, 64}) && !Keys<3>::fits({80, 64}) && !Keys<3, 8>::fits({16, 16}));
static_assert(MakesState<Keys<3>> && MakesState<Values<3>> && Keys<3>::host_only && !Keys<3>::rows_move);
static_assert(reads_facts<Values<3>>() && !reads_positions<Values<3>>() && needs_query_window<Keys<3>>() &&
              !needs_query_window<Values<3>>());

TEST(Qaq, BitsOfTheWorkedExamples) {
  // Keys: T = 101, σ_S = 0.01, Σ q² = 64.
  const float numbers[] = {0.01f, 0.02f, 64.0f, 0.0f, 8.0f};
  Measured measured{.tokens = 101, .numbers = numbers, .number_count = 5};
  float state[3] = {};
  Keys<3>::make_state(128, measured, state);
  EXPECT_NEAR(state[0], 0.105192f, 1e-6f);
  EXPECT_NEAR(oracle::qaq::key_sigma(0.01, 101, 64), 0.105192, 1e-6);
  EXPECT_EQ(state[1], 0.0f);
  EXPECT_EQ(state[2], 8.0f);
  const double ranges[] = {8, 4, 2};
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(Keys<3>::bits_for(ranges[i], 0.105192), 5 - i);
    EXPECT_EQ(CodeKeys::bits_for(ranges[i], 0.105192), i == 0 ? 4 : i == 1 ? 3 : 2);
    EXPECT_EQ(oracle::qaq::bits(ranges[i], 0.105192, false), 5 - i);
    EXPECT_EQ(oracle::qaq::bits(ranges[i], 0.105192, true), i == 0 ? 4 : i == 1 ? 3 : 2);
  }
  // Values: T = 100, σ_X = 0.02, range 1.2.
  measured.tokens = 100;
  Values<3>::make_state(128, measured, state);
  EXPECT_NEAR(state[0], 0.002f, 1e-9f);
  const double shares[] = {0.5, 0.05, 0.005}, sigmas[] = {0.004, 0.04, 0.4};
  const int paper[] = {7, 4, 0}, code[] = {6, 3, 1};
  for (int i = 0; i < 3; ++i) {
    EXPECT_NEAR(oracle::qaq::value_sigma(0.02, 100, shares[i]), sigmas[i], 1e-12);
    EXPECT_EQ(Values<3>::bits_for(1.2 * shares[i], 0.002), paper[i]);
    EXPECT_EQ(Values<3>::bits_for(1.2, sigmas[i]), paper[i]);
    EXPECT_EQ(CodeValues::bits_for(1.2, sigmas[i]), code[i]);
  }
}

TEST(Qaq, StateOfObservedQueriesAndOfWhatIsMissing) {
  std::vector<float> squares(64, 3.0f);
  const float errors[] = {0.01f, 0.02f};
  Measured measured{
      .tokens = 101, .query_squares = squares.data(), .query_vectors = 3, .numbers = errors, .number_count = 2};
  float state[3] = {};
  Keys<2>::make_state(64, measured, state);  // 64 * 3 / 3 = 64
  EXPECT_NEAR(state[0], 0.105192f, 1e-6f);
  EXPECT_EQ(state[1], 0.0f);
  EXPECT_EQ(state[2], 8.0f);
  measured.query_squares = nullptr;
  Keys<2>::make_state(64, measured, state);
  EXPECT_EQ(state[0], 0.0f);  // nothing known of the queries: no target
  measured.tokens = 1;        // T - 1 would be 0
  Values<2>::make_state(64, measured, state);
  EXPECT_NEAR(state[0], 0.02f / std::sqrt(2.0f), 1e-7f);
  measured.numbers = nullptr, measured.number_count = 0;
  Values<2>::make_state(64, measured, state);
  EXPECT_EQ(state[0], 0.0f);
  EXPECT_EQ(state[2], 8.0f);
}

TEST(Qaq, CellsOfTheWorkedExample) {
  // Four numbers, over and over: -1, -0.2, 0.3, 1 in 2 bits.
  const float x[] = {-1, -0.2f, 0.3f, 1}, middle[] = {-0.75f, -0.25f, 0.25f, 0.75f};
  std::vector<float> rows(16 * 32);
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = x[i % 4];
  GuardedTile<Keys<2, 0>> tile({16, 32});
  tile.encode(rows);
  EXPECT_EQ(tile.bytes().front(), 0 + 1 * 4 + 2 * 16 + 3 * 64);
  for (Index t = 0; t < 16; ++t)
    for (std::size_t c = 0; c < 32; ++c) EXPECT_EQ(tile.decode(t)[c], middle[c % 4]);
  const oracle::qaq::Cells cells(-1, 1, 2);
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(cells.code(static_cast<double>(x[i])), i);
    EXPECT_EQ(cells.value(i), static_cast<double>(middle[i]));
  }
}

TEST(Qaq, WithoutBitsATokenIsTheMiddleOfItsRange) {
  auto rows = test::gaussians(3, 16 * 64);
  for (std::size_t i = 0; i < 32; ++i) rows[i] = i % 2 == 0 ? -3.0f : 5.0f;
  rows.resize(16 * 64);
  for (std::size_t c = 0; c < 64; ++c) rows[c] = c % 2 == 0 ? -3.0f : 5.0f;
  rows[7] = 100, rows[10] = -100;
  const float state[] = {1e6f, 0, 8};  // whatever error
  GuardedTile<Keys<3>> tile({16, 64});
  tile.encode(rows, 0, state);
  const auto row = tile.decode(0, state);
  for (std::size_t c = 0; c < 64; ++c) EXPECT_EQ(row[c], c == 7 ? 100.0f : c == 10 ? -100.0f : 1.0f);
}

/// Against the oracle: order, bits and decoded numbers of one page.
template <class C>
void expect_page(TileShape shape, Index count, const std::vector<float>& rows, const std::vector<float>& attention,
                 oracle::qaq::Settings settings, const std::vector<float>& state) {
  SCOPED_TRACE(std::string(C::name) + " tokens " + std::to_string(shape.tokens) + " width " +
               std::to_string(shape.width) + " count " + std::to_string(count));
  std::vector<std::vector<double>> x;
  std::vector<std::optional<double>> shares;
  for (Index t = 0; t < count; ++t) {
    x.emplace_back(rows.begin() + t * shape.width, rows.begin() + (t + 1) * shape.width);
    const float a = attention.empty() ? nan : attention[static_cast<std::size_t>(t)];
    shares.push_back(std::isnan(a) ? std::nullopt : std::optional<double>(static_cast<double>(a)));
  }
  const oracle::qaq::Page page(x, shape.tokens, shares, settings);
  const TokenFacts facts{nullptr, attention.empty() ? nullptr : attention.data()};
  const float* given_state = state.empty() ? nullptr : state.data();
  GuardedTile<C> tile(shape);
  C::encode(shape, rows.data(), 0, count, facts, given_state, tile.tile());
  ASSERT_TRUE(tile.intact());
  std::uint8_t bits[4] = {};
  C::read_bits(shape, tile.tile(), bits);
  int all = 0;
  for (Index b = 0; b < shape.tokens / 16; ++b) {
    ASSERT_EQ(bits[b], oracle::item(page.blocks, b)) << "block " << b;
    all += bits[b];
  }
  ASSERT_LE(all, settings.capacity * shape.tokens / 16);
  double asked = 0, given = 0;
  for (Index t = 0; t < count; ++t) {
    asked += oracle::item(page.asked, t) / static_cast<double>(count);
    given += oracle::item(page.given, t) / static_cast<double>(count);
    ASSERT_EQ(oracle::item(page.order, C::place_of(shape, tile.tile(), t)), t);
    const auto row = tile.decode(t, given_state);
    double largest = 0;  // the scale's last bit depends on a subtraction in float
    for (const double v : oracle::item(page.rows, t)) largest = std::max(largest, std::abs(v));
    for (Index c = 0; c < shape.width; ++c) {
      if (oracle::item(oracle::item(page.from_border, t), c) < 1e-4) continue;
      const double want = oracle::item(oracle::item(page.rows, t), c);
      ASSERT_NEAR(static_cast<double>(oracle::item(row, c)), want, 3e-3 * largest + 1e-6)
          << "token " << t << " channel " << c;
    }
  }
  for (Index t = count; t < shape.tokens; ++t)
    ASSERT_EQ(tile.decode(t, given_state), std::vector<float>(static_cast<std::size_t>(shape.width), 0.0f));
  const auto demand = C::demand(shape, rows.data(), count, facts, given_state);
  ASSERT_NEAR(demand.asked, asked, 1e-9);
  ASSERT_NEAR(demand.given, given, 1e-9);
}

/// Rows of very different ranges.
std::vector<float> uneven(std::uint64_t seed, Index tokens, Index width) {
  auto rows = test::gaussians(seed, tokens * width);
  for (Index t = 0; t < tokens; ++t)
    for (Index c = 0; c < width; ++c)
      rows[static_cast<std::size_t>(t * width + c)] *= std::exp2(3 * test::gaussian(seed + 1, t));
  return rows;
}
std::vector<float> shares(std::uint64_t seed, Index tokens) {
  std::vector<float> all;
  for (Index t = 0; t < tokens; ++t) all.push_back(t > tokens - 5 ? nan : std::exp2(-1 - 8 * random_unit(seed, t)));
  return all;
}

template <int capacity, int outliers, QaqRule rule>
void expect_pages() {
  std::uint64_t seed = 1;
  for (const Index width : {16, 64, 80, 96, 128, 256})
    for (const Index tokens : {16, 32, 64})
      for (const Index count : {tokens, tokens - 5, Index{1}}) {
        if (width != 128 && tokens != 64) continue;
        const auto rows = uneven(++seed, count, width);
        oracle::qaq::Settings s{.keys = true,
                                .reference_code = rule == QaqRule::reference_code,
                                .capacity = capacity,
                                .outliers = outliers};
        expect_page<Keys<capacity, outliers, rule>>({tokens, width}, count, rows, {}, s, {});
        s.sigma = static_cast<double>(0.3f), s.b_max = 5;
        expect_page<Keys<capacity, outliers, rule>>({tokens, width}, count, rows, {}, s, {0.3f, 0, 5});
        s.sigma = static_cast<double>(4.0f), s.b_min = 1, s.b_max = 8;
        expect_page<Keys<capacity, outliers, rule>>({tokens, width}, count, rows, {}, s, {4.0f, 1, 8});
        s.keys = false, s.b_min = 0, s.sigma = 0;
        expect_page<Values<capacity, outliers, rule>>({tokens, width}, count, rows, {}, s, {});
        expect_page<Values<capacity, outliers, rule>>({tokens, width}, count, rows, shares(seed, count), s, {});
        s.sigma = static_cast<double>(0.05f);
        expect_page<Values<capacity, outliers, rule>>({tokens, width}, count, rows, shares(seed, count), s,
                                                      {0.05f, 0, 8});
        s.b_max = 4;
        expect_page<Values<capacity, outliers, rule>>({tokens, width}, count, rows, {}, s, {0.05f, 0, 4});
        if (::testing::Test::HasFatalFailure()) return;
      }
}
TEST(Qaq, PagesAreTheOracles) {
  expect_pages<1, 1, QaqRule::paper>();
  expect_pages<2, 0, QaqRule::paper>();
  expect_pages<3, 1, QaqRule::reference_code>();
  expect_pages<4, 2, QaqRule::paper>();
}

TEST(Qaq, BlocksHaveAtLeastWhatTheirTokensAskFor) {
  // A target that the page can meet: noise stays below it, for every token.
  const TileShape shape{64, 128};
  const auto rows = uneven(11, 64, 128);
  float sigma = 0.05f;
  const auto fits = [&] {
    const float state[] = {sigma, 0, 8};
    std::uint8_t bits[4] = {};
    GuardedTile<Keys<4>> tile(shape);
    tile.encode(rows, 0, state);
    Keys<4>::read_bits(shape, tile.tile(), bits);
    int all = 0, largest = 0;
    for (const int b : bits) all += b, largest = std::max(largest, b);
    return all < 16 && largest < 8;
  };
  while (!fits()) sigma *= 2;
  const float state[] = {sigma, 0, 8};
  GuardedTile<Keys<4>> tile(shape);
  tile.encode(rows, 0, state);
  for (Index t = 0; t < 64; ++t) {
    const auto row = tile.decode(t, state);
    double square = 0;
    for (std::size_t c = 0; c < 128; ++c) square += std::pow(row[c] - rows[static_cast<std::size_t>(t) * 128 + c], 2);
    EXPECT_LE(std::sqrt(square / 128), 1.1 * static_cast<double>(sigma)) << "token " << t;
  }
}

TEST(Qaq, NumbersLieWithinTheStatedBound) {
  for (const Index width : {64, 128}) {
    const TileShape shape{64, width};
    const auto rows = test::outliers(5, 64, width);
    GuardedTile<Values<3>> tile(shape);
    tile.encode(rows);
    using Parts = Values<3>::Parts;
    for (Index t = 0; t < 64; ++t) {
      const auto row = tile.decode(t);
      const Index place = Values<3>::place_of(shape, tile.tile(), t);
      half scale;
      std::memcpy(&scale, tile.tile() + Parts(shape).scales + 2 * place, 2);
      float largest = 0;
      std::vector<float> sorted(rows.begin() + t * width, rows.begin() + (t + 1) * width);
      std::sort(sorted.begin(), sorted.end());
      largest = std::max(std::abs(sorted[1]), std::abs(sorted[sorted.size() - 2]));
      for (Index c = 0; c < width; ++c)
        ASSERT_LE(std::abs(row[static_cast<std::size_t>(c)] - rows[static_cast<std::size_t>(t * width + c)]),
                  static_cast<float>(scale) / 2 + largest * 0x1p-10f + 100 * 0x1p-11f);
    }
  }
}

TEST(Qaq, NanCountsAsZeroAndInfinityAsALargeNumber) {
  auto rows = test::gaussians(9, 16 * 64), plain = rows;
  for (const std::size_t i : {3u, 70u, 71u, 500u}) rows[i] = nan, plain[i] = 0;
  rows[130] = infinity, plain[130] = 0x1p126f;
  rows[131] = -infinity, plain[131] = -0x1p126f;
  rows[200] = -3e38f, plain[200] = -0x1p126f;
  GuardedTile<Keys<3>> odd({16, 64}), usual({16, 64});
  odd.encode(rows), usual.encode(plain);
  EXPECT_EQ(odd.bytes(), usual.bytes());
}

TEST(Qaq, AnyNumbersAnyBytesAnyState) {
  auto rows = test::gaussians(9, 64 * 80);
  for (std::size_t i = 0; i < rows.size(); i += 3)
    rows[i] = i % 5 == 0 ? nan : i % 5 == 1 ? infinity : i % 5 == 2 ? -infinity : 1e38f;
  for (std::size_t c = 0; c < 80; ++c) rows[c] = nan, rows[80 + c] = 1e-42f, rows[160 + c] = -infinity;
  std::vector<float> attention(64, nan);
  attention[3] = infinity, attention[4] = -1e38f, attention[5] = 0;
  const std::vector<std::vector<float>> states = {{0, 0, 8},  {nan, nan, nan}, {infinity, -1, 1e30f},
                                                  {-1, 3, 2}, {1e-45f, 8, 0},  {1e38f, 2, 4}};
  for (const auto& state : states) {
    GuardedTile<Keys<3>> keys({64, 80});
    GuardedTile<Values<2, 8>> values({64, 80});
    Keys<3>::encode({64, 80}, rows.data(), 0, 64, {}, state.data(), keys.tile());
    Values<2, 8>::encode({64, 80}, rows.data(), 0, 64, {nullptr, attention.data()}, state.data(), values.tile());
    EXPECT_TRUE(keys.intact() && values.intact());
    for (Index t = 0; t < 64; ++t)
      for (const float x : keys.decode(t, state.data())) EXPECT_TRUE(std::isfinite(x));
    for (Index t = 0; t < 64; ++t)
      for (const float x : values.decode(t, state.data())) EXPECT_TRUE(std::isfinite(x));
    EXPECT_EQ(keys.decode(0), std::vector<float>(80, 0.0f));  // NaN are 0
  }
  test::expect_decodes_anything<Keys<3>>({64, 128}, {nan, 1, 2});
  test::expect_decodes_anything<Values<1, 8>>({48, 80}, {infinity, -1, 1e9f});
  test::expect_decodes_anything<Keys<8, 0>>({16, 16}, {1, 8, 0});
}

}  // namespace
}  // namespace kvpare

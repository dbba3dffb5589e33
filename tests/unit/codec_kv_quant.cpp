// KVQuant's keys and values: the worked examples of its description, its oracle, and what is learned.
#include "kvpare/codec/kv_quant.hpp"

#include <limits>

#include "oracle/kv_quant.hpp"
#include "support/folds.hpp"

namespace kvpare::test {
namespace {

using Doubles = std::vector<double>;

const Doubles example_levels = {-1, -0.35, 0.2, 0.9};

/// State of keys whose channels all have one range, and of a codebook.
template <int bits>
std::vector<float> state_of(Index width, float lower, float upper, const Doubles& levels) {
  std::vector<float> state(static_cast<std::size_t>(2 * width), 0.0f);
  for (Index c = 0; c < width; ++c) {
    state[static_cast<std::size_t>(c)] = (upper - lower) / 2;
    state[static_cast<std::size_t>(width + c)] = (upper + lower) / 2;
  }
  for (int twice = 0; twice < 2; ++twice)
    for (const double level : levels) state.push_back(static_cast<float>(level));
  EXPECT_EQ(static_cast<Index>(state.size()), (KvQuantRanges<bits>::state_floats(width)));
  return state;
}

TEST(KvQuant, WorkedExample) {
  const auto state = state_of<2>(8, -1, 1, example_levels);
  const std::vector<float> row = {-0.9f, 0.1f, 0.6f, -0.2f, 2.5f, 0, 0, 0};
  GuardedTile<KvQuantRanges<2>> tile({16, 8});
  tile.encode(row, 0, state.data());
  std::uint8_t codes[8];
  detail::unpack_codes<2>(tile.tile(), 8, codes);
  const int want[] = {0, 2, 3, 1, 3, 2, 2, 2};
  for (int c = 0; c < 8; ++c) EXPECT_EQ(codes[c], want[c]) << c;
  EXPECT_NEAR(detail::half_to_float(static_cast<std::uint16_t>(detail::get_bytes(tile.tile() + 2, 2))), 1.6f, 1e-3f);
  EXPECT_EQ(detail::get_bytes(tile.tile() + 2 + 4, 1), 4u);  // the channel
  EXPECT_EQ(detail::get_bytes(tile.tile() + 4, 2), 0u);      // the other slot is unused
  const auto back = tile.decode(0, state.data());
  const float read[] = {-1, 0.2f, 0.9f, -0.35f, 2.5f};
  for (std::size_t c = 0; c < 5; ++c) EXPECT_NEAR(back[c], read[c], 1e-3f) << c;
  for (std::size_t c = 0; c < 5; ++c) {
    const auto n = oracle::nuq_key(example_levels, -1, 1, static_cast<double>(row[c]));
    EXPECT_EQ(codes[c], n.code);
    EXPECT_NEAR(n.delta, c == 4 ? 1.6 : 0.0, 1e-12);
  }
}

/// A codebook has what codes are made with, and what they are read as.
TEST(KvQuant, CodesAreReadAsTheSecondEntries) {
  using C = NuqCodes<2>;
  const float state[] = {-1, -0.35f, 0.2f, 0.9f, -2, -1, 1, 2};
  const float row[] = {-0.9f, 0.1f, 0.6f, -0.2f}, want[] = {-2, 1, 2, -1};
  std::vector<std::byte> tile(static_cast<std::size_t>(C::tile_bytes({16, 4})));
  C::encode({16, 4}, row, 0, 1, state, tile.data());
  float back[4];
  C::decode({16, 4}, tile.data(), 0, state, back);
  for (int c = 0; c < 4; ++c) EXPECT_EQ(back[c], want[c]) << c;
}

TEST(KvQuant, ThreeBitsInWords) {
  std::uint8_t codes[32];
  for (int i = 0; i < 32; ++i) codes[i] = static_cast<std::uint8_t>((5 * i + 3) % 8);
  std::byte bytes[12];
  detail::pack_codes<3>(codes, 32, bytes);
  EXPECT_EQ(detail::get_bytes(bytes, 4), 0x43C67543u);
  EXPECT_EQ(detail::get_bytes(bytes + 4, 4), 0x7543C675u);
  EXPECT_EQ(detail::get_bytes(bytes + 8, 4), 0xC67543C6u);
}

TEST(KvQuant, BytesAreCodesAndTheList) {
  static_assert(KvQuantKeys<4>::tile_bytes({64, 128}) == 64 * (64 + 6));
  static_assert(KvQuantKeys<3>::tile_bytes({64, 128}) == 64 * (48 + 6));
  static_assert(KvQuantValues<2>::tile_bytes({64, 128}) == 64 * (32 + 4 + 6));
  static_assert(KvQuantKeys<2>::name == "unrotated_kv_quant_outliers1_nuq2");
  static_assert(KvQuantValues<4>::name == "outliers1_nuq4_range");
}

TEST(KvQuant, NeutralCodebooksAreSymmetricAndReachOne) {
  for (const auto& all : {std::vector<float>(NuqCodes<2>::levels.begin(), NuqCodes<2>::levels.end()),
                          std::vector<float>(NuqCodes<3>::levels.begin(), NuqCodes<3>::levels.end()),
                          std::vector<float>(NuqCodes<4>::levels.begin(), NuqCodes<4>::levels.end())}) {
    EXPECT_EQ(all.back(), 1);
    for (std::size_t k = 0; k < all.size(); ++k) EXPECT_EQ(all[k], -all[all.size() - 1 - k]);
    EXPECT_TRUE(std::is_sorted(all.begin(), all.end()));
  }
}

template <int bits>
void keys_against_oracle(std::uint64_t seed) {
  const Index width = 64;
  Doubles levels;
  for (int k = 0; k < 1 << bits; ++k)
    levels.push_back(-1 + 2 * (k + 0.3 * static_cast<double>(random_unit(seed, k))) / ((1 << bits) - 1));
  const auto state = state_of<bits>(width, -2, 2.5f, levels);
  const auto rows = gaussians(seed + 100, 16 * width);
  GuardedTile<KvQuantRanges<bits, 8>> listed({16, width});  // room for all outliers
  listed.encode(rows, 0, state.data());
  for (Index t = 0; t < 16; ++t) {
    const auto back = listed.decode(t, state.data());
    for (Index c = 0; c < width; ++c) {
      const double x = static_cast<double>(rows[static_cast<std::size_t>(t * width + c)]);
      const auto n = oracle::nuq_key(levels, -2, 2.5, x);
      const double want = levels[static_cast<std::size_t>(n.code)] * 2.25 + 0.25 + n.delta;
      EXPECT_NEAR(back[static_cast<std::size_t>(c)], want, 1e-5 + std::abs(n.delta) / 1024) << bits << " " << x;
    }
  }
}
TEST(KvQuant, KeysAreTheOracles) { keys_against_oracle<2>(1), keys_against_oracle<3>(2), keys_against_oracle<4>(3); }

TEST(KvQuant, OnlyTheFurthestOutliersAreListed) {
  const auto state = state_of<2>(8, -1, 1, example_levels);
  GuardedTile<KvQuantRanges<2>> tile({16, 8});
  tile.encode({3, 5, -2, 4, -6, -4, 0, 0}, 0, state.data());
  const auto back = tile.decode(0, state.data());
  const float want[] = {0.9f, 5, -1, 0.9f, -6, -1, 0.2f, 0.2f};  // the others saturate
  for (std::size_t c = 0; c < 8; ++c) EXPECT_NEAR(back[c], want[c], 4e-3f) << c;
}

TEST(KvQuant, ValuesAreTheOracles) {
  const Index width = 64;
  const auto rows = outliers(5, 16, width);
  std::vector<float> state;
  for (int twice = 0; twice < 2; ++twice)
    for (const double level : example_levels) state.push_back(static_cast<float>(level));
  GuardedTile<KvQuantValues<2, 2>> tile({16, width});
  tile.encode(rows, 0, state.data());
  for (Index t = 0; t < 16; ++t) {
    const Doubles row(rows.begin() + t * width, rows.begin() + (t + 1) * width);
    const auto want = oracle::nuq_value_row(example_levels, 2, row);
    const auto back = tile.decode(t, state.data());
    int other = 0;  // entries that halves of the range have moved
    for (std::size_t c = 0; c < want.size(); ++c)
      if (std::abs(static_cast<double>(back[c]) - want[c]) > 0.05 + std::abs(want[c]) / 1000) ++other;
    EXPECT_LE(other, 1) << t;
  }
}

TEST(KvQuant, CodebooksAreThoseOfKMeans) {
  const auto numbers = gaussians(9, 4000);
  CodebookFit fit;
  Doubles x, weights;
  for (Index i = 0; i < 4000; ++i) {
    const float v = numbers[static_cast<std::size_t>(i)] / 3, w = 0.5f + random_unit(10, i);
    fit.add(v, w);
    if (std::abs(v) <= 1) x.push_back(static_cast<double>(v)), weights.push_back(static_cast<double>(w));
  }
  fit.add(std::numeric_limits<float>::quiet_NaN()), fit.add(0.5f, -1), fit.add(0.5f, 0), fit.add(7);
  std::vector<float> first(16), state(16), normed(16);
  fit.make_state<3>({.iterations = 0}, first.data());
  fit.make_state<3>({.iterations = 50}, state.data());
  const Doubles want = oracle::k_means(x, weights, Doubles(first.begin(), first.begin() + 8), 50);
  for (std::size_t k = 0; k < 8; ++k) {
    EXPECT_NEAR(state[k], want[k], 2e-3) << k;
    EXPECT_EQ(state[k], state[8 + k]);
  }
  EXPECT_TRUE(std::is_sorted(state.begin(), state.begin() + 8));

  // Q-Norm: what codes are read as has the mean and deviation of the data.
  fit.make_state<3>({.iterations = 50, .q_norm = true}, normed.data());
  const Doubles own_entries(normed.begin(), normed.begin() + 8);
  double total = 0, mean = 0, square = 0, own = 0, own_square = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double y =
        static_cast<double>(normed[8 + static_cast<std::size_t>(oracle::nearest_entry(own_entries, x[i]))]);
    total += weights[i], mean += weights[i] * y, square += weights[i] * y * y;
    own += weights[i] * x[i], own_square += weights[i] * x[i] * x[i];
  }
  EXPECT_NEAR(mean / total, own / total, 1e-3);
  EXPECT_NEAR(square / total - mean * mean / total / total, own_square / total - own * own / total / total, 1e-3);
  for (std::size_t k = 0; k < 8; ++k) EXPECT_EQ(normed[k], state[k]);
}

TEST(KvQuant, WithoutNumbersTheCodebookIsTheNeutralOne) {
  std::vector<float> state(32);
  CodebookFit{}.make_state<4>({}, state.data());
  for (std::size_t k = 0; k < 16; ++k) {
    EXPECT_EQ(state[k], NuqCodes<4>::levels[k]);
    EXPECT_EQ(state[16 + k], NuqCodes<4>::levels[k]);
  }
}

TEST(KvQuant, KeysLearnRangesAndLeaveOutTheFirstTokens) {
  const Index width = 8, tokens = 400;
  auto rows = gaussians(12, tokens * width);
  std::vector<Position> positions;
  for (Index t = 0; t < tokens; ++t) {
    positions.push_back(static_cast<Position>(t));
    for (Index c = 0; c < width; ++c) rows[static_cast<std::size_t>(t * width + c)] *= static_cast<float>(c + 1);
  }
  for (Index c = 0; c < width; ++c) rows[static_cast<std::size_t>(c)] = 1e6f;  // the sink
  Measured measured;
  measured.rows = rows.data(), measured.positions = positions.data(), measured.tokens = tokens;
  std::vector<float> state(static_cast<std::size_t>(KvQuantRanges<3>::state_floats(width)));
  KvQuantRanges<3>::make_state(width, measured, state.data());
  for (Index c = 0; c < width; ++c) {
    Doubles column;
    for (Index t = 1; t < tokens; ++t)
      column.push_back(static_cast<double>(rows[static_cast<std::size_t>(t * width + c)]));
    const double lower = oracle::quantile(column, 0.005), upper = oracle::quantile(column, 0.995);
    EXPECT_NEAR(state[static_cast<std::size_t>(c)], (upper - lower) / 2, 1e-4);
    EXPECT_NEAR(state[static_cast<std::size_t>(width + c)], (upper + lower) / 2, 1e-4);
  }
  // The method may say otherwise: {share outside, first tokens}.
  const float numbers[] = {0.1f, 5};
  measured.numbers = numbers, measured.number_count = 2;
  KvQuantRanges<3>::make_state(width, measured, state.data());
  Doubles column;
  for (Index t = 5; t < tokens; ++t) column.push_back(static_cast<double>(rows[static_cast<std::size_t>(t * width)]));
  EXPECT_NEAR(state[0], (oracle::quantile(column, 0.95) - oracle::quantile(column, 0.05)) / 2, 1e-4);
  // No rows: the neutral state.
  KvQuantRanges<3>::make_state(width, {}, state.data());
  EXPECT_EQ(state[0], 1);
  EXPECT_EQ(state[static_cast<std::size_t>(width)], 0);
  EXPECT_EQ(state[static_cast<std::size_t>(2 * width + 7)], 1);
}

template <class C>
double error_of(const std::vector<float>& rows, Index width, const float* state) {
  GuardedTile<C> tile({64, width});
  tile.encode(rows, 0, state);
  double off = 0, all = 0;
  for (Index t = 0; t < 64; ++t) {
    const auto back = tile.decode(t, state);
    for (Index c = 0; c < width; ++c) {
      const double x = static_cast<double>(rows[static_cast<std::size_t>(t * width + c)]);
      off += std::pow(static_cast<double>(back[static_cast<std::size_t>(c)]) - x, 2), all += x * x;
    }
  }
  return std::sqrt(off / all);
}

TEST(KvQuant, LearnedStatesAreBetterThanNeutralOnesAndThanScales) {
  const Index width = 128;
  const auto rows = outliers(33, 64, width);
  Measured measured;
  measured.rows = rows.data(), measured.tokens = 64;
  std::vector<float> keys(static_cast<std::size_t>(KvQuantRanges<4>::state_floats(width)));
  std::vector<float> values(static_cast<std::size_t>(KvQuantValues<4>::state_floats(width)));
  KvQuantRanges<4>::make_state(width, measured, keys.data());
  KvQuantValues<4>::make_state(width, measured, values.data());
  const double learned = error_of<KvQuantRanges<4>>(rows, width, keys.data());
  EXPECT_LT(learned, 0.1);
  EXPECT_LT(learned, error_of<KvQuantRanges<4>>(rows, width, nullptr) / 5);
  EXPECT_LT(learned, error_of<Symmetric<4>>(rows, width, nullptr) / 1.5);
  const auto plain = gaussians(34, 64 * width);
  measured.rows = plain.data();
  KvQuantValues<4>::make_state(width, measured, values.data());
  const double of_values = error_of<KvQuantValues<4>>(plain, width, values.data());
  EXPECT_LT(of_values, error_of<KvQuantValues<4>>(plain, width, nullptr));
  EXPECT_LT(of_values, error_of<Affine<4>>(plain, width, nullptr));
}

TEST(KvQuant, FoldsAndMoves) {
  const auto state = state_of<3>(64, -1.5f, 2, {-1, -0.6, -0.3, -0.1, 0.1, 0.4, 0.7, 1});
  expect_folds<KvQuantRanges<3>>({16, 64}, state.data());
  expect_rows_move<KvQuantRanges<3>>({16, 64}, state.data());
  expect_rows_move<KvQuantValues<3>>({16, 64}, state.data());
  expect_strides_do_not_matter<NuqCodes<3>>(64);
  expect_strides_do_not_matter<NuqRange<3>>(64);
}

TEST(KvQuant, AnyBytesAnyStateAndAnyNumbers) {
  for (std::uint64_t seed = 0; seed < 6; ++seed) {
    std::vector<float> state(static_cast<std::size_t>(KvQuantRanges<4>::state_floats(64)));
    for (std::size_t i = 0; i < state.size(); ++i)
      state[i] = std::bit_cast<float>(static_cast<std::uint32_t>(random_bits(seed, i)));
    state[static_cast<std::size_t>(seed)] = std::numeric_limits<float>::quiet_NaN();
    expect_decodes_anything<KvQuantRanges<4>>({16, 64}, state);
    expect_decodes_anything<KvQuantValues<4>>({16, 64}, state);
    std::vector<float> rows(16 * 64);
    for (std::size_t i = 0; i < rows.size(); ++i)
      rows[i] = std::bit_cast<float>(static_cast<std::uint32_t>(random_bits(seed + 50, i)));
    for (const float* s : {static_cast<const float*>(nullptr), static_cast<const float*>(state.data())}) {
      GuardedTile<KvQuantRanges<4>> keys({16, 64});
      GuardedTile<KvQuantValues<4>> values({16, 64});
      keys.encode(rows, 0, s), values.encode(rows, 0, s);
      for (Index t = 0; t < 16 && s == nullptr; ++t) {
        for (const float x : keys.decode(t, s)) EXPECT_TRUE(std::isfinite(x));
        for (const float x : values.decode(t, s)) EXPECT_TRUE(std::isfinite(x));
      }
    }
    Measured measured;
    measured.rows = rows.data(), measured.tokens = 16;
    KvQuantRanges<4>::make_state(64, measured, state.data());
    KvQuantValues<4>::make_state(64, measured, state.data());
  }
}

}  // namespace
}  // namespace kvpare::test

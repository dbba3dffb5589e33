// select_top and sort_rows of the CUDA backend on rows long enough for every way through the kernels: a row of several
// batches per warp, a row that does not fit in shared memory, ties across warps, thresholds met at each digit.
#define KVPARE_TEST_SIMT
#include <gtest/gtest.h>

#include "oracle/select_top.hpp"
#include "support/inputs.hpp"

namespace kvpare::test {
namespace {

using B = SimtRig::Backend;

const float nan = std::numeric_limits<float>::quiet_NaN();

enum class Plant { distinct, log_spread, ties, all_equal, zeros, many_nan, all_nan, last_digit, last_columns };
constexpr Plant plants[] = {Plant::distinct, Plant::log_spread, Plant::ties,       Plant::all_equal,   Plant::zeros,
                            Plant::many_nan, Plant::all_nan,    Plant::last_digit, Plant::last_columns};

struct LongRow {
  std::vector<float> scores;
  std::vector<bool> candidate;
  bool masked = true;
  Index word_tokens = 64;

  Index columns() const { return static_cast<Index>(scores.size()); }
  std::vector<bool> candidates() const { return masked ? candidate : std::vector<bool>(scores.size(), true); }
  Index count() const {
    const auto all = candidates();
    return std::count(all.begin(), all.end(), true);
  }
  /// Bits that stand for no column are set, and must be ignored.
  std::vector<std::uint64_t> bitmap() const {
    std::vector<std::uint64_t> words(static_cast<std::size_t>(ceil_div(columns(), word_tokens)), ~std::uint64_t{0});
    for (Index c = 0; c < columns(); ++c)
      if (!candidate[static_cast<std::size_t>(c)])
        words[static_cast<std::size_t>(c / word_tokens)] &= ~(std::uint64_t{1} << (c % word_tokens));
    return words;
  }
};

LongRow long_row(Dice& dice, Index columns, Plant plant, Index word_tokens, bool masked) {
  LongRow row;
  row.word_tokens = word_tokens, row.masked = masked;
  for (Index c = 0; c < columns; ++c) {
    float x = static_cast<float>(dice.symmetric());
    switch (plant) {
      case Plant::distinct:
        break;
      case Plant::log_spread:  // as attention is: over many powers of two
        x = std::ldexp(std::abs(x), -static_cast<int>(dice.below(30)));
        break;
      case Plant::ties:  // some hundred of each, in all parts of the row
        x = static_cast<float>(dice.below(16)) - 8;
        break;
      case Plant::all_equal:
        x = -0.25f;
        break;
      case Plant::zeros:  // a few numbers in a row of zeros of either sign
        x = dice.chance(0.01) ? x : dice.chance(0.5) ? 0.0f : -0.0f;
        break;
      case Plant::many_nan:
        x = dice.chance(0.4) ? (dice.chance(0.5) ? nan : -nan) : x;
        break;
      case Plant::all_nan:
        x = nan;
        break;
      case Plant::last_digit:  // the same upper 22 bits: the third digit decides
        x = std::bit_cast<float>(0x3f800000u + static_cast<std::uint32_t>(dice.below(1024)));
        break;
      case Plant::last_columns:  // the best are the last
        x = static_cast<float>(c / 2);
        break;
    }
    row.scores.push_back(x);
    row.candidate.push_back(dice.chance(0.8));
  }
  return row;
}

/// Every k that could be special, for one row: all in one launch.
void check(B& be, const LongRow& row) {
  const Index count = row.count();
  const std::vector<Index> ks{-1, 0, 1, 2, 100, count / 2, count - 1, count, count + 1, row.columns() + 1000};
  const auto scores = upload(be, row.scores);
  const auto bitmap = upload(be, row.bitmap());
  const auto k = upload(be, ks);
  const auto nans = upload(be, std::vector<Index>(ks.size(), -1));
  const Index words = ceil_div(row.columns(), row.word_tokens), all_words = words * static_cast<Index>(ks.size());
  const auto chosen = upload(be, std::vector<std::uint64_t>(static_cast<std::size_t>(all_words), ~std::uint64_t{0}));
  std::vector<TopRow> tops;
  for (std::size_t i = 0; i < ks.size(); ++i)
    tops.push_back({scores.data(), row.masked ? bitmap.data() : nullptr, k.data() + i,
                    chosen.data() + static_cast<Index>(i) * words, nans.data() + i, row.columns(), row.word_tokens});
  be.select_top(tops);

  const auto got = download(be, chosen);
  const auto got_nans = download(be, nans);
  const auto candidates = row.candidates();
  Index nan_count = 0;
  for (std::size_t c = 0; c < row.scores.size(); ++c) nan_count += candidates[c] && std::isnan(row.scores[c]);
  const std::vector<double> doubles(row.scores.begin(), row.scores.end());
  for (std::size_t i = 0; i < ks.size(); ++i) {
    std::vector<std::uint64_t> wanted(static_cast<std::size_t>(words), 0);
    for (const Index c : oracle::select_top(doubles, ks[i], candidates))
      wanted[static_cast<std::size_t>(c / row.word_tokens)] |= std::uint64_t{1} << (c % row.word_tokens);
    EXPECT_EQ(got_nans[i], nan_count) << "k " << ks[i];
    for (Index w = 0; w < words; ++w)
      ASSERT_EQ(got[i * static_cast<std::size_t>(words) + static_cast<std::size_t>(w)],
                wanted[static_cast<std::size_t>(w)])
          << "k " << ks[i] << " of " << count << ", word " << w << " of " << words << " of " << row.word_tokens;
  }
}

TEST(SelectTopLong, EveryPlantAndK) {
  B be;
  Dice dice{1};
  int i = 0;
  for (const Plant plant : plants) {
    const Index words[] = {64, 32, 16};
    // The shorter takes few threads, the longer many; each plant meets each width of a word, with and without a bitmap.
    for (const Index columns : {5000 + 7 * i, 9000 + 13 * i}) {
      SCOPED_TRACE("plant " + std::to_string(static_cast<int>(plant)) + ", " + std::to_string(columns) + " columns");
      check(be, long_row(dice, columns, plant, words[i % 3], i % 2 == 0));
      ++i;
    }
  }
}

TEST(SelectTopLong, FortyThousandColumns) {
  B be;
  Dice dice{2};
  check(be, long_row(dice, 40000, Plant::log_spread, 64, true));
  check(be, long_row(dice, 39999, Plant::ties, 16, false));
}

TEST(SelectTopLong, MoreColumnsThanSharedMemoryHolds) {
  B be;
  Dice dice{3};
  check(be, long_row(dice, 70001, Plant::ties, 64, true));
}

TEST(SelectTopLong, WordsOfAnyWidth) {
  B be;
  Dice dice{4};
  for (const Index word_tokens : {1, 2, 5, 8, 24, 31, 33, 48, 63}) {
    SCOPED_TRACE("words of " + std::to_string(word_tokens));
    check(be, long_row(dice, 700 + word_tokens, Plant::ties, word_tokens, true));
    check(be, long_row(dice, 700, Plant::distinct, word_tokens, false));
  }
}

/// Many rows, more than travel with the launch, of different lengths.
TEST(SelectTopLong, ManyRowsOfDifferentLengths) {
  B be;
  Dice dice{5};
  std::vector<LongRow> rows;
  std::vector<Buffer<B, float>> scores;
  std::vector<Buffer<B, std::uint64_t>> chosen;
  std::vector<Index> ks;
  for (Index i = 0; i < 90; ++i) {
    rows.push_back(long_row(dice, 1 + dice.below(400), Plant::distinct, 64, false));
    scores.push_back(upload(be, rows.back().scores));
    chosen.push_back(upload(be, rows.back().bitmap()));
    ks.push_back(dice.below(rows.back().columns() + 1));
  }
  const auto k = upload(be, ks);
  for (const std::size_t many : {std::size_t{64}, std::size_t{65}, rows.size()}) {
    std::vector<TopRow> tops;
    for (std::size_t i = 0; i < many; ++i)
      tops.push_back({scores[i].data(), nullptr, k.data() + i, chosen[i].data(), nullptr, rows[i].columns(), 64});
    be.select_top(tops);
    for (std::size_t i = 0; i < many; ++i) {
      std::vector<Index> got;
      const auto words = download(be, chosen[i]);
      for (std::size_t w = 0; w < words.size(); ++w)
        for_each_bit(words[w], [&](Index b) { got.push_back(static_cast<Index>(w) * 64 + b); });
      ASSERT_EQ(got, oracle::select_top({rows[i].scores.begin(), rows[i].scores.end()}, ks[i])) << "row " << i;
    }
  }
}

/// The same bits whatever order threads ran in.
TEST(SelectTopLong, SeedsOfTheScheduleDoNotMatter) {
  Dice dice{6};
  const LongRow row = long_row(dice, 6000, Plant::ties, 64, true);
  for (std::uint64_t seed = 1; seed <= 6; ++seed) {
    B be;
    be.runtime().seed(seed);
    SCOPED_TRACE("seed " + std::to_string(seed));
    check(be, row);
  }
}

/// Several tiles per row, so that places carry over from tile to tile.
TEST(SortRowsLong, StableOverManyTiles) {
  Dice dice{7};
  for (std::uint64_t seed = 1; seed <= 2; ++seed)
    for (const Plant plant : {Plant::ties, Plant::many_nan, Plant::log_spread}) {
      B be;
      be.runtime().seed(seed);
      const LongRow row = long_row(dice, 5003, plant, 32, true);
      const auto values = upload(be, row.scores);
      const auto bitmap = upload(be, row.bitmap());
      const Buffer<B, Index> columns(be, row.columns()), count(be, 1);
      const Buffer<B, double> sums(be, row.columns());
      const SortRow sort{
          {values.data(), bitmap.data(), row.columns(), 32}, columns.data(), nullptr, sums.data(), count.data()};
      be.sort_rows(std::span(&sort, 1));
      std::vector<double> candidates;
      std::vector<Index> column_of;
      for (std::size_t c = 0; c < row.scores.size(); ++c)
        if (row.candidate[c])
          candidates.push_back(static_cast<double>(row.scores[c])), column_of.push_back(static_cast<Index>(c));
      const auto wanted = oracle::sort_row(candidates);
      ASSERT_EQ(download(be, count)[0], static_cast<Index>(candidates.size()));
      const auto got = download(be, columns);
      const auto got_sums = download(be, sums);
      double sum = 0;
      for (std::size_t i = 0; i < candidates.size(); ++i) {
        ASSERT_EQ(got[i], column_of[static_cast<std::size_t>(wanted.order[i])]) << "place " << i;
        sum += std::isnan(wanted.values[i]) ? 0 : wanted.values[i];
        ASSERT_NEAR(got_sums[i], sum, 1e-9) << "place " << i;
      }
    }
}

}  // namespace
}  // namespace kvpare::test

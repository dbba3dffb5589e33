// The verbs over rows of scores: select_top, sort_rows, reduce.
#include <gtest/gtest.h>

#include "oracle/reduce.hpp"
#include "oracle/select_top.hpp"
#include "support/inputs.hpp"
#include "support/tolerance.hpp"

namespace kvpare::test {
namespace {

const float nan = std::numeric_limits<float>::quiet_NaN();
const float inf = std::numeric_limits<float>::infinity();

/// A row of scores and who may be chosen.
struct Row {
  std::vector<float> values;
  std::vector<bool> candidate;
  Index word_tokens = 64;
  bool masked = true;  // false: no bitmap, all are candidates
  Index k = 0;

  Index columns() const { return static_cast<Index>(values.size()); }
  std::vector<double> doubles() const { return {values.begin(), values.end()}; }
  std::vector<bool> candidates() const { return masked ? candidate : std::vector<bool>(values.size(), true); }

  /// Bits past the last column are set on purpose: they stand for nothing and must be ignored.
  std::vector<std::uint64_t> bitmap() const {
    std::vector<std::uint64_t> words(static_cast<std::size_t>(ceil_div(columns(), word_tokens)), 0);
    for (std::size_t c = 0; c < words.size() * static_cast<std::size_t>(word_tokens); ++c)
      if (c >= candidate.size() || candidate[c])
        words[c / static_cast<std::size_t>(word_tokens)] |= std::uint64_t{1}
                                                            << (c % static_cast<std::size_t>(word_tokens));
    return words;
  }
};

/// How the values of a row are drawn; each hurts in its own way.
enum class Values { distinct, few, equal, with_nan, all_nan, extremes, neighbours };
constexpr Values all_values[] = {Values::distinct, Values::few,      Values::equal,     Values::with_nan,
                                 Values::all_nan,  Values::extremes, Values::neighbours};

Row random_row(Dice& dice, Index columns, Values values, Index word_tokens, bool masked) {
  Row row;
  row.word_tokens = word_tokens, row.masked = masked;
  const float edge[] = {
      0.0f, -0.0f, inf, -inf, std::numeric_limits<float>::max(), std::numeric_limits<float>::denorm_min(), -1.0f, nan};
  for (Index c = 0; c < columns; ++c) {
    float x = static_cast<float>(dice.symmetric());
    switch (values) {
      case Values::distinct:
        break;
      case Values::few:
        x = static_cast<float>(dice.below(3)) - 1;
        break;
      case Values::equal:
        x = 0.5f;
        break;
      case Values::with_nan:
        x = dice.chance(0.3) ? nan : x;
        break;
      case Values::all_nan:
        x = dice.chance(0.5) ? nan : -nan;
        break;
      case Values::extremes:
        x = edge[dice.below(8)];
        break;
      case Values::neighbours:
        x = std::bit_cast<float>(0x3f800000u +
                                 static_cast<std::uint32_t>(dice.below(5)) * (dice.chance(0.5) ? 1u : 1u << 10));
        break;
    }
    row.values.push_back(x);
    row.candidate.push_back(dice.chance(0.7));
  }
  return row;
}

std::vector<Row> random_rows(std::uint64_t seed, std::initializer_list<Index> lengths) {
  Dice dice{seed};
  std::vector<Row> rows;
  for (const Index columns : lengths)
    for (const Values values : all_values)
      for (const Index word : {16, 32, 64})
        for (const bool masked : {true, false}) {
          rows.push_back(random_row(dice, columns, values, word, masked));
          const Index ks[] = {-3, 0, 1, columns / 2, columns - 1, columns, columns + 7, dice.below(columns + 1)};
          rows.back().k = ks[dice.below(8)];
        }
  return rows;
}

template <Backend B>
struct Uploaded {
  std::vector<Buffer<B, float>> values;
  std::vector<Buffer<B, std::uint64_t>> bitmaps;
  Uploaded(B& be, const std::vector<Row>& rows) {
    for (const Row& r : rows) {
      values.push_back(upload(be, r.values));
      bitmaps.push_back(upload(be, r.masked ? r.bitmap() : std::vector<std::uint64_t>{}));
    }
  }
};

/// Bitmaps chosen and NaN counts, per row.
template <Backend B>
std::pair<std::vector<std::vector<std::uint64_t>>, std::vector<Index>> select(B& be, const std::vector<Row>& rows) {
  const Uploaded<B> in(be, rows);
  std::vector<Index> ks;
  for (const Row& r : rows) ks.push_back(r.k);
  const auto k = upload(be, ks);
  const auto nans = upload(be, std::vector<Index>(rows.size(), -1));
  std::vector<Buffer<B, std::uint64_t>> chosen;
  std::vector<TopRow> tops;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    chosen.push_back(upload(be, std::vector<std::uint64_t>(rows[i].bitmap().size(), ~std::uint64_t{0})));
    tops.push_back({in.values[i].data(), in.bitmaps[i].data(), k.data() + i, chosen[i].data(),
                    i % 5 == 4 ? nullptr : nans.data() + i, rows[i].columns(), rows[i].word_tokens});
  }
  be.select_top(tops);
  std::vector<std::vector<std::uint64_t>> out;
  for (const auto& c : chosen) out.push_back(download(be, c));
  return {out, download(be, nans)};
}

std::vector<Index> columns_in(const std::vector<std::uint64_t>& words, Index word_tokens) {
  std::vector<Index> columns;
  for (std::size_t w = 0; w < words.size(); ++w)
    for (Index b = 0; b < 64; ++b)
      if (words[w] >> b & 1u)
        columns.push_back(b < word_tokens ? static_cast<Index>(w) * word_tokens + b
                                          : -1);  // -1: a bit that stands for nothing
  return columns;
}

template <class Rig>
class Ranking : public OnRig<Rig> {};
TYPED_TEST_SUITE(Ranking, AllRigs, RigNames);

TYPED_TEST(Ranking, SelectTopIsExact) {
  const auto rows = random_rows(1, {1, 2, 15, 16, 17, 63, 64, 65, 200, 3000});
  const auto [chosen, nans] = select(this->be(), rows);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const Row& r = rows[i];
    EXPECT_EQ(columns_in(chosen[i], r.word_tokens), oracle::select_top(r.doubles(), r.k, r.candidates()))
        << "row " << i << " of " << r.columns() << ", k " << r.k;
    Index nan_count = 0;
    for (std::size_t c = 0; c < r.values.size(); ++c) nan_count += r.candidates()[c] && std::isnan(r.values[c]);
    EXPECT_EQ(nans[i], i % 5 == 4 ? -1 : nan_count) << "row " << i;
  }
}

TYPED_TEST(Ranking, EqualScoresKeepTheLowerColumn) {
  Row row;
  row.values = {1, 2, 2, 1, 2, -0.0f, 0.0f, 2};
  row.masked = false, row.candidate.resize(8, true);
  row.k = 2;
  EXPECT_EQ(columns_in(select(this->be(), {row}).first[0], 64), (std::vector<Index>{1, 2}));
  row.k = 7;
  EXPECT_EQ(columns_in(select(this->be(), {row}).first[0], 64), (std::vector<Index>{0, 1, 2, 3, 4, 5, 7}))
      << "-0 equals 0: the lower one stays";
}

TYPED_TEST(Ranking, SortRowsDescendsStably) {
  const auto rows = random_rows(2, {1, 17, 64, 300});
  using Rig = typename TestFixture::B;
  const Uploaded<Rig> in(this->be(), rows);
  std::vector<Buffer<Rig, Index>> columns;
  std::vector<Buffer<Rig, float>> values;
  std::vector<Buffer<Rig, double>> sums;
  const auto counts = upload(this->be(), std::vector<Index>(rows.size(), -1));
  std::vector<SortRow> sorts;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    columns.emplace_back(this->be(), rows[i].columns());
    values.emplace_back(this->be(), rows[i].columns());
    sums.emplace_back(this->be(), rows[i].columns());
    sorts.push_back({{in.values[i].data(), in.bitmaps[i].data(), rows[i].columns(), rows[i].word_tokens},
                     columns[i].data(),
                     i % 3 == 1 ? nullptr : values[i].data(),
                     i % 3 == 2 ? nullptr : sums[i].data(),
                     counts.data() + i});
  }
  this->be().sort_rows(sorts);
  const auto got_counts = download(this->be(), counts);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    std::vector<double> candidates;
    std::vector<Index> column_of;
    for (Index c = 0; c < rows[i].columns(); ++c)
      if (rows[i].candidates()[static_cast<std::size_t>(c)])
        candidates.push_back(static_cast<double>(rows[i].values[static_cast<std::size_t>(c)])), column_of.push_back(c);
    const auto wanted = oracle::sort_row(candidates);
    ASSERT_EQ(got_counts[i], static_cast<Index>(candidates.size())) << "row " << i;
    const auto got_columns = download(this->be(), columns[i]);
    const auto got_values = download(this->be(), values[i]);
    const auto got_sums = download(this->be(), sums[i]);
    double sum = 0;  // NaN count as 0 here; the oracle's sum would be NaN from the first on
    for (std::size_t j = 0; j < candidates.size(); ++j) {
      ASSERT_EQ(got_columns[j], column_of[static_cast<std::size_t>(wanted.order[j])]) << "row " << i << " place " << j;
      if (i % 3 != 1) {
        ASSERT_TRUE(close(static_cast<double>(got_values[j]), wanted.values[j], {})) << "row " << i;
      }
      sum += std::isnan(wanted.values[j]) ? 0 : wanted.values[j];
      if (i % 3 != 2) {
        ASSERT_TRUE(close(got_sums[j], sum, {0, 1e-12})) << "row " << i;
      }
    }
  }
}

TYPED_TEST(Ranking, ReduceSummarisesWhatIsANumber) {
  auto rows = random_rows(3, {1, 2, 3, 17, 64, 300});
  std::erase_if(rows, [](const Row& r) {
    return std::any_of(r.values.begin(), r.values.end(), [](float x) { return std::isinf(x) || std::abs(x) > 1e30f; });
  });
  const Uploaded<typename TestFixture::B> in(this->be(), rows);
  const Buffer<typename TestFixture::B, RowSummary> out(this->be(), static_cast<Index>(rows.size()));
  std::vector<MaskedRow> masked;
  for (std::size_t i = 0; i < rows.size(); ++i)
    masked.push_back({in.values[i].data(), in.bitmaps[i].data(), rows[i].columns(), rows[i].word_tokens});
  this->be().reduce(masked, out.data());
  const auto got = download(this->be(), out);
  const Tolerance t{1e-12, 1e-12};  // sums in double on both sides, in another order
  for (std::size_t i = 0; i < rows.size(); ++i) {
    std::vector<double> x, numbers;
    std::vector<Index> column_of;
    for (Index c = 0; c < rows[i].columns(); ++c)
      if (rows[i].candidates()[static_cast<std::size_t>(c)])
        x.push_back(static_cast<double>(rows[i].values[static_cast<std::size_t>(c)])), column_of.push_back(c);
    for (const double v : x)
      if (!std::isnan(v)) numbers.push_back(v);
    const auto wanted = oracle::statistics(x, oracle::Nan::skip);
    const RowSummary& s = got[i];
    EXPECT_EQ(s.nan_count, wanted.nans) << i;
    ASSERT_EQ(s.count, wanted.counted) << i;
    EXPECT_EQ(s.argmax, wanted.argmax < 0 ? -1 : column_of[static_cast<std::size_t>(wanted.argmax)]) << i;
    EXPECT_TRUE(close(s.sum, wanted.sum, t)) << i;
    if (s.count == 0) {
      EXPECT_EQ(s.min, inf);
      EXPECT_EQ(s.max, -inf);
      EXPECT_EQ(s.skewness(), 0);
      continue;
    }
    const double n = static_cast<double>(s.count);
    EXPECT_EQ(static_cast<double>(s.min), wanted.min);
    EXPECT_EQ(static_cast<double>(s.max), wanted.max);
    EXPECT_TRUE(close(s.mean, wanted.mean, t)) << i;
    EXPECT_TRUE(close(s.moment2, n * wanted.moment2, {1e-12, 1e-11})) << i;
    EXPECT_TRUE(close(s.moment3, n * wanted.moment3, {1e-11, 1e-11})) << i;
    EXPECT_TRUE(close(s.skewness(), oracle::adjusted_skewness(numbers), {1e-9, 1e-9})) << i;
  }
}

TYPED_TEST(Ranking, NoRowsAreNoWork) {
  this->be().select_top({});
  this->be().sort_rows({});
  this->be().reduce({}, nullptr);
}

TEST(Skewness, OfTheSpecsExample) {
  cpu::Backend be({.threads = 1});
  const std::vector<float> importance{0.05f, 0.075f, 0.20f, 0.05f, 0.40f};
  RowSummary s;
  const MaskedRow row{importance.data(), nullptr, 5, 64};
  be.reduce(std::span(&row, 1), &s);
  EXPECT_NEAR(s.skewness(), 1.465548, 1e-6);  // 2.048165 would be the population's
}

}  // namespace
}  // namespace kvpare::test

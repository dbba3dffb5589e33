// Pages coded by the attention of their tokens, and coded anew, from parked originals, when that has changed.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <kvpare/kvpare.hpp>
#include <numeric>
#include <sstream>

#include "kvpare/codec/qaq.hpp"
#include "kvpare/policy/score/recent_maximum.hpp"

namespace kvpare {
namespace {

/// Floats, exact where a token has at least half of the attention, else to the nearest quarter.
struct Quarters {
  static constexpr std::string_view name = "quarters";
  static constexpr bool rows_move = false, reads_facts = true, host_only = true;
  static bool fits(TileShape) { return true; }
  static Index tile_bytes(TileShape s) { return s.tokens * s.width * 4; }
  static void encode(TileShape s, const float* rows, Index, Index count, const TokenFacts& facts, const float*,
                     std::byte* tile) {
    for (Index i = 0; i < count * s.width; ++i) {
      const bool exact = facts.attention != nullptr && facts.attention[i / s.width] >= 0.5f;
      const float x = exact ? rows[i] : std::round(rows[i] * 4) / 4;
      std::memcpy(tile + i * 4, &x, 4);
    }
  }
  static void decode(TileShape s, const std::byte* tile, Index slot, const float*, float* row) {
    std::memcpy(row, tile + slot * s.width * 4, static_cast<std::size_t>(s.width * 4));
  }
};
static_assert(Codec<Quarters>);

using Exact = Pair<Raw<float>, Raw<float>>;
using Cache = KvCache<cpu::Backend, Formats<Exact, Pair<Quarters, Quarters>>>;

constexpr Index width = 8, page = 16;

/// Token t has a key of its own, of length 8, so that a query of the same direction looks at it alone.
struct Text {
  cpu::Backend backend{{.threads = 1}};
  Cache cache{backend, {{{.q_heads = 1, .kv_heads = 1, .key_dim = width, .value_dim = width, .scale = 4}}},
              {.page_tokens = page, .pool_bytes = 1 << 20}};
  SequenceId id = cache.create();
  Precision precision;

  explicit Text(bool recode, Index tokens = page) {
    precision.said = "quarters", precision.kept = Form("quarters"), precision.recode = recode;
    append(0, tokens);
  }
  static float key(Index token, Index channel) {
    return 8 * std::cos(1.7f * static_cast<float>(token + 1) * static_cast<float>(channel + 1));
  }
  static float value(Index token, Index channel) { return static_cast<float>(token * width + channel) / 100; }
  void append(Index first, Index count) {
    std::vector<float> k, v;
    std::vector<Position> positions;
    for (Index t = first; t < first + count; ++t) {
      positions.push_back(static_cast<Position>(t));
      for (Index c = 0; c < width; ++c) k.push_back(key(t, c)), v.push_back(value(t, c));
    }
    ASSERT_EQ(cache.append(id, 0, ConstTensor(k.data(), count, 1, width), ConstTensor(v.data(), count, 1, width), positions),
              Outcome::done);
  }
  /// A token behind the others, too few of them to fill a page, whose query looks at an earlier one.
  void look_at(SequenceId sequence, Index token) {
    const std::vector<float> nothing(width, 0.0f);
    std::vector<float> q;
    for (Index c = 0; c < width; ++c) q.push_back(key(token, c));
    const Position at[] = {1000 + looks++};
    const ConstTensor row(nothing.data(), 1, 1, width);
    ASSERT_EQ(cache.append(sequence, 0, row, row, at), Outcome::done);
    cache.observe(sequence, 0, method(), ConstTensor(q.data(), 1, 1, width), at);
  }
  Compressor<RecentMaximum, Uniform, TopK, Precision> method() const {
    return {RecentMaximum{.rows = 1, .every = 1}, Uniform{}, TopK{}, Keep::ratio(1), precision};
  }
  bool is_exact(SequenceId sequence, Index token) const {
    const HeadPages list = cache.pages(sequence, 0)[0];
    float row[width];
    for (const Entry& e : list.entries)
      for (Index slot = 0; slot < e.used; ++slot)
        if (list.position(e, slot) == token) {
          const PageGeometry& g = list.formats[e.format];
          if (e.format == 0) return true;
          Quarters::decode({page, width}, g.value_row(e.page, 0), slot, nullptr, row);
          return std::equal(row, row + width, std::vector<float>{value(token, 0), value(token, 1), value(token, 2),
                                                                 value(token, 3), value(token, 4), value(token, 5),
                                                                 value(token, 6), value(token, 7)}.data());
        }
    ADD_FAILURE() << "token " << token << " is gone";
    return false;
  }
  Position looks = 0;
};

TEST(Recode, AttentionReachesTheCodec) {
  Text text(false);
  text.look_at(text.id, 3);
  const CompressReport report = text.cache.compress(text.id, text.method());
  EXPECT_EQ(report.tokens_changed, page);
  EXPECT_EQ(report.tokens_recoded, 0);
  for (Index t = 0; t < page; ++t) EXPECT_EQ(text.is_exact(text.id, t), t == 3) << t;
}

TEST(Recode, LowersAndRaisesFromOriginals) {
  for (const bool recode : {false, true}) {
    Text text(recode);
    text.look_at(text.id, 3);
    text.cache.compress(text.id, text.method());
    EXPECT_EQ(text.cache.stats(text.id).parked_bytes, recode ? page * (2 * width + 1) * 4 : 0);
    text.look_at(text.id, 9);
    const CompressReport report = text.cache.compress(text.id, text.method());
    EXPECT_EQ(report.tokens_recoded, recode ? page : 0);
    EXPECT_EQ(report.tokens_changed, 0);
    EXPECT_EQ(text.is_exact(text.id, 3), !recode);
    EXPECT_EQ(text.is_exact(text.id, 9), recode);
    EXPECT_EQ(report.pages_after, report.pages_before);
    EXPECT_EQ(text.cache.pool().stats().pages_in_use, 2) << "pages taken for the while are back";
  }
}

TEST(Recode, ForksKeepTheirPages) {
  Text text(true);
  text.look_at(text.id, 3);
  text.cache.compress(text.id, text.method());
  const SequenceId fork = text.cache.fork(text.id);
  text.look_at(fork, 9);
  EXPECT_EQ(text.cache.compress(fork, text.method()).tokens_recoded, page);
  EXPECT_TRUE(text.is_exact(fork, 9) && !text.is_exact(fork, 3));
  EXPECT_TRUE(text.is_exact(text.id, 3) && !text.is_exact(text.id, 9));
}

TEST(Recode, EvictedTokensLeaveTheirOriginalsAndTheirSlots) {
  Text text(true, 2 * page);
  text.look_at(text.id, 3);
  text.cache.compress(text.id, text.method());
  auto evicts = text.method();
  evicts.keep = Keep::tokens(page + 4);
  text.look_at(text.id, 20);
  text.cache.compress(text.id, evicts);
  EXPECT_TRUE(text.is_exact(text.id, 20));
  evicts.keep = Keep::tokens(0);
  text.look_at(text.id, 20);
  text.cache.compress(text.id, evicts);
  EXPECT_EQ(text.cache.stats(text.id).parked_bytes, 0);
}

TEST(Recode, WaitsWhereThePoolHasNoPageForTheWhile) {
  Text text(true);
  text.look_at(text.id, 3);
  text.cache.compress(text.id, text.method());
  std::vector<SequenceId> others;
  for (bool room = true; room;) {
    others.push_back(text.cache.create());
    std::vector<float> rows(static_cast<std::size_t>(page * width), 1.0f);
    std::vector<Position> positions(static_cast<std::size_t>(page));
    std::iota(positions.begin(), positions.end(), 0);
    const ConstTensor t(rows.data(), page, 1, width);
    room = text.cache.append(others.back(), 0, t, t, positions) == Outcome::done;
  }
  text.look_at(text.id, 9);
  const CompressReport report = text.cache.compress(text.id, text.method());
  EXPECT_EQ(report.tokens_recoded + report.tokens_waiting, page);
  EXPECT_EQ(text.is_exact(text.id, 3), report.tokens_recoded == 0);
}

TEST(Recode, ASnapshotKeepsTheRuleButNotTheOriginalsSoItsPagesStay) {
  Text text(true);
  text.look_at(text.id, 3);
  text.cache.compress(text.id, text.method());
  std::stringstream bytes;
  save(bytes, text.cache, text.id);
  const std::optional<SequenceId> copy = load(bytes, text.cache);
  ASSERT_TRUE(copy);
  EXPECT_EQ(text.cache.stats(*copy).parked_bytes, 0);
  text.look_at(*copy, 9);
  EXPECT_EQ(text.cache.compress(*copy, text.method()).tokens_recoded, 0);
  EXPECT_TRUE(text.is_exact(*copy, 3) && !text.is_exact(*copy, 9));
}

/// What attention has not changed coding anew does not change, however often.
TEST(Recode, TheSameAttentionGivesTheSamePages) {
  using Codes = Pair<Qaq<3, QaqSide::keys>, Qaq<3, QaqSide::values>>;
  constexpr Index heads = 2, channels = 32, tokens = 70;
  cpu::Backend backend({.threads = 1});
  KvCache<cpu::Backend, Formats<Exact, Codes>> cache(
      backend, {{{.q_heads = heads, .kv_heads = heads, .key_dim = channels, .value_dim = channels, .scale = 1}}},
      {.page_tokens = 32, .pool_bytes = 1 << 20});
  const SequenceId id = cache.create();
  std::vector<float> rows;
  std::vector<Position> positions;
  for (Index t = 0; t < tokens; ++t) {
    positions.push_back(static_cast<Position>(t));
    for (Index c = 0; c < heads * channels; ++c) rows.push_back(std::sin(static_cast<float>(t * 31 + c * c)));
  }
  const ConstTensor given(rows.data(), tokens, heads, channels);
  ASSERT_EQ(cache.append(id, 0, given, given, positions), Outcome::done);
  Precision precision;
  precision.said = "qaq", precision.kept = {"qaq3_keys", "qaq3_values"}, precision.recode = true;
  const Compressor<RecentMaximum, Uniform, TopK, Precision> method{RecentMaximum{.rows = 1, .every = 1}, Uniform{}, TopK{},
                                                                   Keep::ratio(1), precision};
  cache.observe(id, 0, method, given, positions);
  cache.compress(id, method);
  const SequenceImage first = cache.image(id);
  for (int again = 0; again < 4; ++again) {
    EXPECT_EQ(cache.compress(id, method).tokens_recoded, heads * 64);
    for (std::size_t h = 0; h < heads; ++h)
      EXPECT_EQ(cache.image(id).layers[0].heads[h].pages, first.layers[0].heads[h].pages);
  }
}

TEST(Recode, EmptySlotsHaveNoAttentionAndNewTokensAnUnknownOne) {
  using detail::TakeAttention;
  const float scores[] = {0.5f, 0};
  const std::int32_t source[] = {0, 1, TakeAttention::no_token, TakeAttention::unknown};
  float attention[4];
  for (Index i = 0; i < 4; ++i) TakeAttention{scores, source, attention}(i);
  EXPECT_EQ(attention[0], 0.5f);
  EXPECT_TRUE(std::isnan(attention[1])) << "no row has seen it";
  EXPECT_EQ(attention[2], 0);
  EXPECT_TRUE(std::isnan(attention[3]));
}

}  // namespace
}  // namespace kvpare

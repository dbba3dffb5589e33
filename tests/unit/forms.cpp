// Pages of several formats in one head: tiers, age, states, sharing, truncation, a full pool, snapshots. What is read back
// is compared with what each codec makes of the tokens; attention with the oracle over what is read back.
#include <gtest/gtest.h>

#include <kvpare/codec/group.hpp>
#include <kvpare/codec/ternary.hpp>
#include <kvpare/kvpare.hpp>
#include <map>
#include <sstream>

#include "oracle/attend.hpp"
#include "support/inputs.hpp"
#include "support/ranged_codec.hpp"
#include "support/walled_backend.hpp"

namespace kvpare::test {
namespace {

/// A codec from outside the library: the sign of each number, and nothing else.
struct Signs {
  static constexpr std::string_view name = "signs";
  static constexpr bool rows_move = true;
  static constexpr bool fits(TileShape s) { return s.width % 8 == 0; }
  static constexpr Index tile_bytes(TileShape s) { return s.tokens * s.width / 8; }
  static void encode(TileShape s, const float* rows, Index first, Index count, const float*, std::byte* tile) {
    for (Index i = 0; i < count * s.width; ++i) {
      const Index bit = first * s.width + i;
      const std::byte mask{static_cast<unsigned char>(1u << bit % 8)};
      tile[bit / 8] = rows[i] < 0 ? tile[bit / 8] | mask : tile[bit / 8] & ~mask;
    }
  }
  static void decode(TileShape s, const std::byte* tile, Index slot, const float*, float* row) {
    for (Index c = 0, bit = slot * s.width; c < s.width; ++c, ++bit)
      row[c] = (tile[bit / 8] >> bit % 8 & std::byte{1}) != std::byte{0} ? -1.0f : 1.0f;
  }
};
static_assert(Codec<Signs>);

using Half = Raw<half>;
enum : int { raw, int8, int4, kivi_keys, kivi, signs, ranged, int2, ternary };
using Listed = Formats<Pair<Half, Half>, Pair<Int8, Int8>, Pair<Symmetric<4, 16>, Symmetric<4, 16>>,
                       Pair<KiviKeys<2, 16>, Half>, Pair<KiviKeys<2, 16>, KiviValues<2, 16>>, Pair<Signs, Signs>,
                       Pair<Ranged, Ranged>, Pair<Symmetric<2, 16>, Symmetric<2, 16>>, Pair<Ternary<>, Ternary<>>>;

template <class B>
class Forms : public ::testing::Test {
 public:
  static constexpr Index layers = 2, kv_heads = 2, group = 3, width = 32, page = 16;
  using Cache = KvCache<B, Listed>;

  static LayerShape shape() {
    return {.q_heads = kv_heads * group, .kv_heads = kv_heads, .key_dim = width, .value_dim = width, .scale = 0.3f};
  }
  Index pool_bytes = 1 << 20;
  B be;
  Cache cache{be, Model{{shape(), shape()}}, {.page_tokens = page, .pool_bytes = pool_bytes}};
  SequenceId id = cache.create();
  Dice dice{7};
  std::map<std::pair<Index, Position>, std::pair<oracle::Array3, oracle::Array3>> given;  // (layer, position)

  Outcome append(Index tokens) {
    Outcome outcome = Outcome::done;
    for (Index l = 0; l < layers; ++l) {
      const oracle::Array3 keys = random_array(dice, tokens, kv_heads, width, DType::f16),
                           values = random_array(dice, tokens, kv_heads, width, DType::f16);
      std::vector<Position> positions;
      for (Index t = 0; t < tokens; ++t) positions.push_back(static_cast<Position>(next[l] + t));
      outcome = cache.append(id, l, TensorBuffer<B>(be, keys, DType::f16).tensor(),
                             TensorBuffer<B>(be, values, DType::f16).tensor(), positions);
      if (outcome != Outcome::done) return outcome;
      for (Index t = 0; t < tokens; ++t) {
        oracle::Array3 k(1, kv_heads, width), v(1, kv_heads, width);
        for (Index h = 0; h < kv_heads; ++h)
          for (Index c = 0; c < width; ++c) k.at(0, h, c) = keys.at(t, h, c), v.at(0, h, c) = values.at(t, h, c);
        given[{l, static_cast<Position>(next[l] + t)}] = {k, v};
      }
      next[l] += tokens;
    }
    return outcome;
  }
  Index next[layers] = {0, 0};

  /// The live tokens of a head as the cache decodes them, in list order, with the format each is in.
  struct Token {
    oracle::CachedToken token;
    int format;
  };
  std::vector<Token> read(SequenceId of, Index layer, Index head) {
    const HeadPages list = cache.pages(of, layer)[static_cast<std::size_t>(head)];
    const Index n = list.live_tokens();
    const Buffer<B, float> keys(be, n * width), values(be, n * width);
    const GatherRow rows[] = {{list, Side::keys, nullptr, width, keys.data()},
                              {list, Side::values, nullptr, width, values.data()}};
    be.gather(rows);
    const std::vector<float> k = download(be, keys), v = download(be, values);
    std::vector<Token> tokens;
    for (const Entry& e : list.entries)
      for_each_bit(e.live, [&](Index slot) {
        const auto at = static_cast<std::ptrdiff_t>(tokens.size()) * width;
        tokens.push_back({{list.position(e, slot),
                           {k.begin() + at, k.begin() + at + width},
                           {v.begin() + at, v.begin() + at + width}},
                          e.format});
      });
    return tokens;
  }
  std::map<int, Index> counts(Index layer = 0, Index head = 0) {
    std::map<int, Index> n;
    for (const Token& t : read(id, layer, head)) ++n[t.format];
    return n;
  }

  /// What is read back is what the codecs make of what was given; attention goes over it.
  void verify(SequenceId of, double kivi_bound = 0.7) {
    for (Index l = 0; l < layers; ++l) {
      oracle::AttendInput in;
      in.queries = random_array(dice, 2, kv_heads * group, width, DType::f32);
      in.positions = {next[l] - 1, next[l] / 2};
      in.value_width = width;
      in.how.scale = 0.3f;
      for (Index h = 0; h < kv_heads; ++h) {
        oracle::CachedHead head;
        for (const Token& t : read(of, l, h)) {
          const auto& [k, v] = given.at({l, static_cast<Position>(t.token.position)});
          for (Index c = 0; c < width; ++c) {
            const double bound = t.format == raw ? 0 : t.format == int8 || t.format == ranged ? 0.006
                                 : t.format == int4 ? 0.08 : t.format == signs ? 2 : t.format == int2 || t.format == ternary ? 0.8 : kivi_bound;
            ASSERT_NEAR(t.token.key[static_cast<std::size_t>(c)], k.at(0, h, c), bound) << "format " << t.format;
            ASSERT_NEAR(t.token.value[static_cast<std::size_t>(c)], v.at(0, h, c), t.format == kivi_keys ? 0 : bound);
          }
          head.push_back(t.token);
        }
        in.heads.push_back(std::move(head));
      }
      const oracle::AttendResult wanted = oracle::attend(in);
      const TensorBuffer<B> q(be, in.queries, DType::f32);
      const TensorBuffer<B> out(be, oracle::Array3(2, kv_heads * group, width), DType::f32);
      const std::vector<Position> positions(in.positions.begin(), in.positions.end());
      cache.attend(l, {{.sequence = of, .queries = q.tensor(), .positions = positions, .out = out.writable()}});
      const oracle::Array3 got = out.download();
      for (std::size_t i = 0; i < got.values.size(); ++i) ASSERT_NEAR(got.values[i], wanted.out.values[i], 5e-3);
    }
  }

  /// A plan that moves the tokens of three quarters of the positions: into `format` those that leave this rest by n.
  struct Every {
    int format;
    Index n, rest;
  };
  Plan tiers(std::vector<Every> every) {
    Plan p;
    p.sequence = id, p.epoch = cache.epoch(id);
    p.layers.resize(layers);
    for (Index l = 0; l < layers; ++l) {
      const std::vector<HeadPages> lists = cache.pages(id, l);
      for (const Every& some : every) {
        Tier tier{.format = some.format};
        for (std::size_t h = 0; h < lists.size(); ++h) {
          Selection s(static_cast<Index>(lists[h].entries.size()));
          for (Index e = 0; e < s.entries(); ++e)
            for_each_bit(lists[h].entries[static_cast<std::size_t>(e)].live, [&](Index slot) {
              const Index position = lists[h].position(lists[h].entries[static_cast<std::size_t>(e)], slot);
              if (position % some.n == some.rest && position < 3 * next[l] / 4) s.insert(e, slot);
            });
          tier.tokens.push_back(std::move(s));
        }
        p.layers[static_cast<std::size_t>(l)].tiers.push_back(std::move(tier));
      }
    }
    return p;
  }
};
using Backends = ::testing::Types<cpu::Backend, WalledBackend>;
TYPED_TEST_SUITE(Forms, Backends);

TYPED_TEST(Forms, AUsersCodecHoldsTokensAndIsAttendedTo) {
  ASSERT_EQ(this->append(100), Outcome::done);
  const CompressReport r = this->cache.commit(this->tiers({{signs, 7, 3}}));
  EXPECT_GT(r.tokens_changed, 0);
  EXPECT_EQ(r.tokens_waiting, 0);
  EXPECT_GT(this->counts()[signs], 0);
  this->verify(this->id);
  EXPECT_EQ(this->cache.support(0, signs), Support::generic);
}

TYPED_TEST(Forms, TiersOfSeveralFormatsShareAHeadAndFreeBytes) {
  ASSERT_EQ(this->append(400), Outcome::done);
  this->verify(this->id);
  const CompressReport r = this->cache.commit(this->tiers({{int8, 4, 1}, {int4, 4, 2}, {signs, 8, 3}}));
  EXPECT_EQ(r.tokens_waiting, 0);
  EXPECT_EQ(r.tokens_before, r.tokens_after);
  EXPECT_LT(r.page_bytes_after, r.page_bytes_before);
  EXPECT_EQ(r.page_bytes_before - r.page_bytes_after,
            this->cache.stats(this->id).page_bytes == r.page_bytes_after ? r.page_bytes_before - r.page_bytes_after
                                                                         : -1);
  EXPECT_EQ(this->cache.pool().stats().bytes_in_use, r.page_bytes_after);
  const auto n = this->counts();
  EXPECT_EQ(n.at(int8), 75);
  EXPECT_EQ(n.at(int4), 75);
  EXPECT_GT(n.at(raw), 0);
  this->verify(this->id);
  ASSERT_EQ(this->append(20), Outcome::done);  // the form that is appended stands last
  this->verify(this->id);
  this->cache.commit(this->tiers({{int8, 4, 1}, {int4, 4, 2}}));  // open pages of both forms take more
  this->verify(this->id);
  EXPECT_EQ(this->cache.kept(this->id, 0, 0).size(), 420u);
}

TYPED_TEST(Forms, HalfEightFourTwoAndThreeLevelsInOneHead) {
  ASSERT_EQ(this->append(500), Outcome::done);
  const CompressReport r = this->cache.commit(
      this->tiers({{int8, 8, 1}, {int4, 8, 2}, {int2, 8, 3}, {ternary, 8, 4}, {int4, 8, 5}, {int2, 8, 6}}));
  EXPECT_EQ(r.tokens_waiting, 0);
  const auto n = this->counts();
  for (const int format : {raw, int8, int4, int2, ternary}) EXPECT_GT(n.at(format), 40) << format;
  EXPECT_LT(r.page_bytes_after, r.page_bytes_before * 2 / 3);
  this->verify(this->id);
}

TYPED_TEST(Forms, EvictionAndTiersInOnePlan) {
  ASSERT_EQ(this->append(200), Outcome::done);
  Plan p = this->tiers({{int4, 3, 2}});
  for (Index l = 0; l < 2; ++l) {
    LayerPlan& lp = p.layers[static_cast<std::size_t>(l)];
    lp.touched = true;
    for (const HeadPages& list : this->cache.pages(this->id, l)) {
      Selection keep = Selection::live(list.entries);
      for (Index e = 0; e < keep.entries(); ++e) keep.word(e) &= 0xf0f3;
      lp.keep.push_back(keep);
    }
  }
  const CompressReport r = this->cache.commit(p);
  EXPECT_LT(r.tokens_after, r.tokens_before);
  EXPECT_GT(r.tokens_changed, 0);
  this->verify(this->id);
}

TYPED_TEST(Forms, KiviAges) {
  // R = 32, pages of 16: keys leave 32 at a time, values by whole pages while 32 stay.
  for (Index l = 0; l < 2; ++l)
    this->cache.set_aging(this->id, l,
                          {.format = kivi, .keys_first = kivi_keys, .keep_raw_keys = 0, .flush_keys = 32,
                           .keep_raw_values = 32, .flush_values = 16});
  ASSERT_EQ(this->append(100), Outcome::done);
  EXPECT_EQ(this->counts()[raw], 100);  // a prompt is attended to as it is
  this->verify(this->id);
  this->cache.age(this->id);
  auto n = this->counts();
  EXPECT_EQ(n[kivi], 64);       // 100 - 32 = 68, by whole pages
  EXPECT_EQ(n[kivi_keys], 32);  // keys: 96 of 100
  EXPECT_EQ(n[raw], 4);
  this->verify(this->id);
  for (Index step = 0; step < 70; ++step) {
    ASSERT_EQ(this->append(1), Outcome::done);
    n = this->counts();
    const Index tokens = 101 + step;
    EXPECT_EQ(n[raw], (tokens - 1) % 32 + 1) << tokens;  // the tail of keys is flushed when the next token comes
    EXPECT_GE(n[raw] + n[kivi_keys], 32);
    EXPECT_LE(n[raw] + n[kivi_keys], 32 + 16);
  }
  this->verify(this->id);
}

TYPED_TEST(Forms, ValuesAreCodedOnceAndKeysKeepTheirCodes) {
  this->cache.set_aging(this->id, 0, {.format = kivi, .keys_first = kivi_keys, .keep_raw_keys = 0, .flush_keys = 16,
                                      .keep_raw_values = 64, .flush_values = 16});
  ASSERT_EQ(this->append(64), Outcome::done);
  this->cache.age(this->id);
  const auto before = this->read(this->id, 0, 1);
  ASSERT_EQ(this->append(60), Outcome::done);
  this->cache.age(this->id);
  const auto after = this->read(this->id, 0, 1);
  for (std::size_t t = 0; t < 48; ++t) {
    ASSERT_EQ(after[t].format, kivi);
    ASSERT_EQ(before[t].format, kivi_keys);
    ASSERT_EQ(after[t].token.key, before[t].token.key);
  }
}

TYPED_TEST(Forms, AgeSparesClassesAndSinks) {
  this->cache.tag(this->id, {.begin = 20, .end = 70, .token_class = TokenClass::image});
  this->cache.set_aging(this->id, 0, {.format = int4, .keep_raw_values = 10, .flush_values = 1, .classes = visual});
  this->cache.set_aging(this->id, 1, {.format = int8, .keep_raw_values = 10, .flush_values = 1, .sinks = 4});
  ASSERT_EQ(this->append(100), Outcome::done);
  this->cache.age(this->id);
  for (const auto& t : this->read(this->id, 0, 0))
    EXPECT_EQ(t.format, t.token.position >= 20 && t.token.position < 60 ? int4 : raw) << t.token.position;
  for (const auto& t : this->read(this->id, 1, 0))
    EXPECT_EQ(t.format, t.token.position >= 4 && t.token.position < 90 ? int8 : raw) << t.token.position;
  this->verify(this->id);
}

TYPED_TEST(Forms, StateIsMadeOnceSharedByForksAndCounted) {
  ASSERT_EQ(this->append(64), Outcome::done);
  this->cache.commit(this->tiers({{ranged, 2, 0}}));
  const Index bytes = this->cache.stats(this->id).state_bytes;
  EXPECT_EQ(bytes, 2 * 2 * (32 + 32) * 4);  // layers, heads, floats
  this->verify(this->id);
  const SequenceId fork = this->cache.fork(this->id);
  EXPECT_EQ(this->cache.stats(fork).state_bytes, bytes);
  this->cache.release(this->id);
  this->verify(fork);
}

TYPED_TEST(Forms, StateMayBeGiven) {
  const std::vector<float> all(2 * 32, 1.0f);
  this->cache.set_state(this->id, 0, ranged, all, all);
  ASSERT_EQ(this->append(64), Outcome::done);
  this->cache.commit(this->tiers({{ranged, 2, 0}}));
  for (const auto& t : this->read(this->id, 0, 0))
    if (t.format == ranged) {
      EXPECT_EQ(static_cast<float>(t.token.key[0]),
                static_cast<float>(std::lround(t.token.key[0] * 127)) / 127.0f);
    }
  EXPECT_THROW(this->cache.set_state(this->id, 0, ranged, std::span(all).first(3), all), InvalidArgument);
}

TYPED_TEST(Forms, AForkKeepsItsFormsWhenTheOtherChanges) {
  ASSERT_EQ(this->append(90), Outcome::done);
  const SequenceId fork = this->cache.fork(this->id);
  const auto before = this->read(fork, 0, 0);
  this->cache.commit(this->tiers({{int4, 2, 0}, {int8, 2, 1}}));
  const auto after = this->read(fork, 0, 0);
  ASSERT_EQ(before.size(), after.size());
  for (std::size_t t = 0; t < before.size(); ++t) {
    EXPECT_EQ(before[t].format, after[t].format);
    EXPECT_EQ(before[t].token.key, after[t].token.key);
  }
  this->verify(this->id), this->verify(fork);
}

TYPED_TEST(Forms, TruncationReachesIntoInterleavedPages) {
  ASSERT_EQ(this->append(200), Outcome::done);
  this->cache.commit(this->tiers({{int4, 2, 0}, {int8, 2, 1}}));
  for (const Position n : {180, 133, 50, 3}) {
    this->cache.truncate(this->id, n);
    for (Index l = 0; l < 2; ++l) this->next[l] = n;
    EXPECT_EQ(this->cache.kept(this->id, 1, 1).size(), static_cast<std::size_t>(n));
    this->verify(this->id);
  }
  ASSERT_EQ(this->append(30), Outcome::done);
  EXPECT_EQ(this->cache.kept(this->id, 0, 1).size(), 33u);
  this->verify(this->id);
}

TYPED_TEST(Forms, SnapshotsHoldEveryForm) {
  this->cache.set_aging(this->id, 0, {.format = kivi, .keys_first = kivi_keys, .flush_keys = 16, .keep_raw_values = 40});
  ASSERT_EQ(this->append(120), Outcome::done);
  this->cache.commit(this->tiers({{int4, 5, 2}, {ranged, 5, 3}, {signs, 10, 4}}));
  std::stringstream stream;
  save(stream, this->cache, this->id);
  const auto copy = load(stream, this->cache);
  ASSERT_TRUE(copy.has_value());
  EXPECT_EQ(this->cache.image(this->id), this->cache.image(*copy));
  for (Index l = 0; l < 2; ++l)
    for (Index h = 0; h < 2; ++h) {
      const auto a = this->read(this->id, l, h), b = this->read(*copy, l, h);
      ASSERT_EQ(a.size(), b.size());
      for (std::size_t t = 0; t < a.size(); ++t) {
        ASSERT_EQ(a[t].format, b[t].format);
        ASSERT_EQ(a[t].token.key, b[t].token.key);
        ASSERT_EQ(a[t].token.value, b[t].token.value);
      }
    }
  this->verify(*copy);
}

TYPED_TEST(Forms, AFullPoolChangesFormAFewPagesAtATime) {
  while (this->append(16) == Outcome::done) {
  }
  // The layers may differ by a page now: bring them level.
  const Index least = std::min(this->next[0], this->next[1]);
  this->cache.truncate(this->id, static_cast<Position>(least));
  this->next[0] = this->next[1] = least;
  const CompressReport r = this->cache.commit(this->tiers({{int8, 2, 1}, {int4, 2, 0}}));
  EXPECT_EQ(r.tokens_waiting, 0);
  EXPECT_LT(r.page_bytes_after, r.page_bytes_before);
  this->verify(this->id);
  EXPECT_EQ(this->cache.pool().stats().bytes_in_use, r.page_bytes_after);
}

TYPED_TEST(Forms, RunningScoresFollowTheirTokens) {
  const auto method = make_compressor("h2o(keep=1000t)");
  ASSERT_EQ(this->append(80), Outcome::done);
  for (Index l = 0; l < 2; ++l) {
    const TensorBuffer<TypeParam> q(this->be, random_array(this->dice, 80, 6, 32, DType::f32), DType::f32);
    std::vector<Position> positions(80);
    std::iota(positions.begin(), positions.end(), 0);
    this->cache.observe(this->id, l, method, q.tensor(), positions);
  }
  const LayerScores before = this->cache.scores(this->id, 1, method);
  this->cache.commit(this->tiers({{int8, 4, 1}, {int4, 4, 2}}));
  const LayerScores after = this->cache.scores(this->id, 1, method);
  EXPECT_EQ(before.positions, after.positions);
  EXPECT_EQ(before.values, after.values);
}

TYPED_TEST(Forms, OneByteBudgetOverEvictionAndForms) {
  this->cache.tag(this->id, {.begin = 0, .end = 5, .token_class = TokenClass::system, .is_protected = true});
  ASSERT_EQ(this->append(300), Outcome::done);
  auto method = make_compressor("h2o(keep=24KiB) + joint(forms=int8+int4_g16)");
  for (Index l = 0; l < 2; ++l) {
    const TensorBuffer<TypeParam> q(this->be, random_array(this->dice, 300, 6, 32, DType::f32, 4), DType::f32);
    std::vector<Position> positions(300);
    std::iota(positions.begin(), positions.end(), 0);
    this->cache.observe(this->id, l, method, q.tensor(), positions);
  }
  auto all = method;
  all.precision.held = Joint{.forms = {{Form("int8"), Form("int4_g16")}}, .evict = false};
  EXPECT_THROW(this->cache.plan(this->id, all), InvalidArgument);  // 300 tokens in 4 bits take 25 KiB and more
  all.keep = Keep::bytes(60 << 10);
  const Plan nothing_goes = this->cache.plan(this->id, all);
  for (const LayerPlan& lp : nothing_goes.layers)
    for (const Selection& keep : lp.keep) EXPECT_EQ(keep.count(), 300);
  EXPECT_LE(nothing_goes.promised_bytes, 60 << 10);

  const Plan plan = this->cache.plan(this->id, method);
  EXPECT_LE(plan.promised_bytes, 24 << 10);
  EXPECT_GT(plan.promised_bytes, 22 << 10);
  const CompressReport r = this->cache.commit(plan);
  EXPECT_EQ(r.page_bytes_after, plan.promised_bytes);
  EXPECT_EQ(this->cache.pool().stats().bytes_in_use, plan.promised_bytes);
  EXPECT_GT(r.tokens_changed, 0);
  this->verify(this->id);
  const auto kept = this->cache.kept(this->id, 0, 0);
  for (Position p = 0; p < 5; ++p) EXPECT_EQ(kept[static_cast<std::size_t>(p)], p);
  EXPECT_THROW(this->cache.plan(this->id, make_compressor("joint(keep=0.2)")), InvalidArgument);
  for (const char* words : {"h2o(keep=24KiB, merge=nearest) + joint", "h2o(keep=24KiB, chunk=4) + joint",
                            "h2o(keep=24KiB, only_positive=yes) + joint"})
    try {
      this->cache.plan(this->id, make_compressor(words));
      FAIL() << words << " was accepted";
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find("do not go with it"), std::string::npos) << e.what();
    }
}

TYPED_TEST(Forms, WhatMakesNoSenseIsRefused) {
  ASSERT_EQ(this->append(40), Outcome::done);
  EXPECT_THROW(this->cache.set_aging(this->id, 0, {.format = 99}), InvalidArgument);
  EXPECT_THROW(this->cache.set_aging(this->id, 0, {.format = raw}), InvalidArgument);
  EXPECT_THROW(this->cache.set_aging(this->id, 0, {.format = kivi, .keys_first = int8}), InvalidArgument);
  EXPECT_THROW(this->cache.set_aging(this->id, 0, {.format = kivi, .flush_values = 0}), InvalidArgument);
  Plan p = this->tiers({{int8, 2, 1}});
  p.layers[0].tiers[0].format = 99;
  EXPECT_THROW(this->cache.commit(p), InvalidArgument);
  p = this->tiers({{int8, 2, 1}, {int4, 3, 1}});  // some tokens twice
  EXPECT_THROW(this->cache.commit(p), InvalidArgument);
  EXPECT_EQ(this->counts()[raw], 40);
  using Coded = KvCache<TypeParam, Formats<Pair<KiviKeys<2, 16>, Half>>>;
  EXPECT_THROW(Coded(this->be, Model{{this->shape()}}, {.page_tokens = 16, .pool_bytes = 1 << 20}), InvalidArgument);
  // A format without tiles of this shape may be listed, and is refused where it is asked for.
  KvCache<TypeParam, Formats<Pair<Half, Half>, Pair<Symmetric<4, 64>, Half>>> odd(
      this->be, Model{{this->shape()}}, {.page_tokens = 16, .pool_bytes = 1 << 20});
  EXPECT_EQ(odd.support(0, 0), Support::fused);
  EXPECT_EQ(odd.support(0, 1), Support::unsupported);
  EXPECT_THROW(odd.set_aging(odd.create(), 0, {.format = 1}), InvalidArgument);
}

TYPED_TEST(Forms, TheFirstFormatMayBeCoded) {
  KvCache<TypeParam, Formats<Pair<Int8, Int8>>> coded(this->be, Model{{this->shape()}}, {.page_tokens = 16, .pool_bytes = 1 << 20});
  const SequenceId s = coded.create();
  const oracle::Array3 keys = random_array(this->dice, 21, 2, 32, DType::f16);
  const TensorBuffer<TypeParam> rows(this->be, keys, DType::f16);
  std::vector<Position> positions(21);
  std::iota(positions.begin(), positions.end(), 0);
  for (Index t = 0; t < 21; ++t)
    ASSERT_EQ(coded.append(s, 0, rows.tensor().part(t, 1), rows.tensor().part(t, 1), std::span(positions).subspan(static_cast<std::size_t>(t), 1)),
              Outcome::done);
  const HeadPages list = coded.pages(s, 0)[1];
  EXPECT_EQ(list.entries.size(), 2u);
  const Buffer<TypeParam, float> out(this->be, 21 * 32);
  const GatherRow row{list, Side::keys, nullptr, 32, out.data()};
  this->be.gather(std::span(&row, 1));
  const std::vector<float> got = download(this->be, out);
  for (Index t = 0; t < 21; ++t)
    for (Index c = 0; c < 32; ++c) EXPECT_NEAR(got[static_cast<std::size_t>(t * 32 + c)], keys.at(t, 1, c), 0.005);
}

}  // namespace
}  // namespace kvpare::test

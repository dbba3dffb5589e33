// KvCache: what it promises, one test each, and every mistake it refuses. What holds for any sequence of operations is
// in fuzz/cache_operations.cpp and property/cache.cpp, what happens when memory runs out in fault.cpp.
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "support/checked_cache.hpp"

namespace kvpare::test {
namespace {

using F = Formats<Pair<Raw<float>, Raw<float>>>;
using Checked = CheckedCache<F>;
using Cache = KvCache<cpu::Backend, F>;

constexpr float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();

cpu::Backend& backend() {
  static cpu::Backend one({.threads = 1});
  return one;
}

/// Two layers of two heads of width 4; a page of 16 tokens takes 512 bytes.
LayerShape small_shape() { return {.q_heads = 4, .kv_heads = 2, .key_dim = 4, .value_dim = 4, .scale = 0.5f}; }
Model small_model() { return {{small_shape(), small_shape()}}; }
constexpr CacheOptions small_options{.page_tokens = 16, .pool_bytes = 64 << 10};

struct CacheTest : ::testing::Test {
  Checked c{backend(), small_model(), small_options};
  SequenceId id = c.create();

  void fill(Index tokens) {
    for (Index l = 0; l < c.cache.layers(); ++l) ASSERT_EQ(c.append(id, l, tokens), Outcome::done);
  }
  Plan plan(std::string_view method) { return c.cache.plan(id, make_compressor(method)); }
  Positions kept(Index layer = 0, Index head = 0) { return c.cache.kept(id, layer, head); }

  /// A plan that keeps these slots of a head of layer 0 and everything else.
  Plan keep_slots(Index head, Index entry, std::uint64_t word) {
    Plan p = c.random_plan(id, 1);
    p.layers[0].keep[static_cast<std::size_t>(head)].word(entry) = word;
    return p;
  }
};

Positions first_positions(Index n) {
  Positions p(static_cast<std::size_t>(n));
  std::iota(p.begin(), p.end(), 0);
  return p;
}

// ---- layout

TEST_F(CacheTest, ConsecutivePositionsTakeNoOffsetsAndGapsDo) {
  ASSERT_EQ(c.append(id, 0, Positions{0, 1, 2}), Outcome::done);
  EXPECT_EQ(c.cache.pages(id, 0)[0].entries[0].offsets, 0u);
  ASSERT_EQ(c.append(id, 0, Positions{3, 7}), Outcome::done);
  EXPECT_NE(c.cache.pages(id, 0)[0].entries[0].offsets, 0u);
  EXPECT_EQ(kept(), (Positions{0, 1, 2, 3, 7}));
}

TEST_F(CacheTest, APageSpansLessThan65536Positions) {
  ASSERT_EQ(c.append(id, 0, Positions{10, 10 + 65535}), Outcome::done);
  EXPECT_EQ(c.cache.stats(id).heads[0][0].pages, 1);
  ASSERT_EQ(c.append(id, 0, Positions{10 + 65536}), Outcome::done);
  EXPECT_EQ(c.cache.stats(id).heads[0][0].pages, 2);
  c.verify_all();
}

TEST_F(CacheTest, ThePoolMayBeTheEnginesMemory) {
  alignas(64) static std::byte memory[16 << 10];
  Checked borrowed(backend(), small_model(), {.page_tokens = 16, .pool_bytes = sizeof memory, .pool_memory = memory});
  const SequenceId s = borrowed.create();
  ASSERT_EQ(borrowed.append(s, 0, 20), Outcome::done);
  const HeadPages list = borrowed.cache.pages(s, 0)[0];
  for (const Entry& e : list.entries) {
    EXPECT_GE(list.formats[0].key_row(e.page, 0), memory);
    EXPECT_LE(list.formats[0].value_row(e.page, 15) + 16, memory + sizeof memory);
    EXPECT_EQ(list.formats[0].key_row(e.page, 0), borrowed.cache.pool().address(e.page));
  }
  borrowed.verify_all();
}

TEST_F(CacheTest, StatsCountAsWorkedByHand) {
  fill(20);  // per head: a full page and one of 4
  const SequenceStats s = c.cache.stats(id);
  EXPECT_EQ(s.live_tokens, 4 * 20);
  EXPECT_EQ(s.pages, 4 * 2);
  EXPECT_EQ(s.page_bytes, 4 * 2 * 512);
  EXPECT_EQ(s.live_bytes, 4 * 20 * 32);
  EXPECT_EQ(s.slack_bytes(), 4 * 12 * 32);
  EXPECT_EQ(s.shared_pages, 0);
  EXPECT_EQ(s.observation_bytes, 0);
  EXPECT_EQ(s.total_bytes(), s.page_bytes + s.bookkeeping_bytes);
  c.fork(id);
  EXPECT_EQ(c.cache.stats(id).shared_pages, 8);
}

TEST_F(CacheTest, CommitReportsAsWorkedByHand) {
  fill(64);
  Plan p = c.empty_plan(id);
  p.layers[0].touched = true, p.layers[0].budget = 7, p.nan_scores = 3;
  p.layers[0].keep = {Selection({0xffff, 0, 0x00ff, 0x8000}), Selection({0, 0, 0, 0})};
  const CompressReport r = c.commit(p);
  EXPECT_EQ(r.layer_budgets, (std::vector<Index>{7, -1}));
  EXPECT_EQ(r.nan_scores, 3);
  EXPECT_EQ(r.tokens_before, 256);
  EXPECT_EQ(r.tokens_after, 128 + 25);
  EXPECT_EQ(r.pages_before, 16);
  EXPECT_EQ(r.pages_after, 8 + 2);  // the full page stays, 8 and 1 tokens are joined
  EXPECT_EQ(r.pages_freed, 6);
  EXPECT_EQ(r.bytes_freed, 6 * 512);
  EXPECT_EQ(r.rows_moved, 1);  // to the 8, which are at the front of their page
  c.verify_all();
}

// ---- sharing

TEST_F(CacheTest, AForkSharesPagesAndThenGoesItsOwnWay) {
  fill(20);
  const Index pages = c.cache.pool().stats().pages_in_use;
  const SequenceId copy = c.fork(id);
  EXPECT_EQ(c.cache.pool().stats().pages_in_use, pages);
  ASSERT_EQ(c.append(copy, 0, 1), Outcome::done);
  EXPECT_EQ(c.cache.pool().stats().pages_in_use, pages + 2) << "an open page that is shared is not written";
  c.commit(c.random_plan(id, 0.5));
  c.truncate(copy, 17);
  c.verify_all();
}

TEST_F(CacheTest, ObservationsAreNotForked) {
  fill(20);
  for (Index l = 0; l < 2; ++l) c.observe(id, l, snap_kv(), 20);
  const SequenceId copy = c.fork(id);
  EXPECT_GT(c.cache.stats(id).observation_bytes, 0);
  EXPECT_EQ(c.cache.stats(copy).observation_bytes, 0);
  EXPECT_NE(error_of([&] { (void)c.cache.plan(copy, snap_kv()); }).find("compress: layer 0 was not observed"),
            std::string::npos);
}

/// One head's open page became private earlier than the other's; were only that one written, equal heads would come to
/// differ in their slots, and scores of earlier tokens would mean others.
TEST_F(CacheTest, HeadsStayAlignedWhenOnlySomeOfTheirPagesAreShared) {
  fill(20);
  const SequenceId first = std::exchange(id, c.fork(id));
  Plan p = c.random_plan(first, 1);
  p.layers[0].keep[0].word(1) = 0;
  c.commit(p);  // head 0 of the first sequence lets go of its last page
  for (Index l = 0; l < 2; ++l) c.observe(id, l, snap_kv(), 8);
  ASSERT_EQ(c.append(id, 0, 1), Outcome::done);
  const auto lists = c.cache.pages(id, 0);
  EXPECT_EQ(lists[0].entries.size(), lists[1].entries.size());
  EXPECT_EQ(lists[0].entries[1].used, lists[1].entries[1].used);
  c.commit(c.cache.plan(id, snap_kv()));
  c.verify_all();
}

// ---- truncate

TEST_F(CacheTest, TruncateForgetsAndPositionsMayComeAgain) {
  fill(40);
  c.truncate(id, 18);
  EXPECT_EQ(kept(), first_positions(18));
  fill(5);
  EXPECT_EQ(kept(), first_positions(23));
  c.truncate(id, 0);
  EXPECT_EQ(c.cache.pool().stats().pages_in_use, 0);
  fill(3);
  c.verify_all();
}

TEST_F(CacheTest, TruncateGivesBackPagesOfWhichOnlyDeadTokensAreLeft) {
  fill(16);
  c.commit(keep_slots(0, 0, 0xfff8));  // 13 of 16: dense, so it stays in place
  const Index pages = c.cache.pool().stats().pages_in_use;
  c.truncate(id, 3);
  EXPECT_TRUE(kept().empty());
  EXPECT_EQ(c.cache.pool().stats().pages_in_use, pages - 1);
  c.verify_all();
}

TEST_F(CacheTest, SpeculationWithGapsDoesNotPileUpOffsets) {
  fill(16);
  const auto speculate = [&] {
    ASSERT_EQ(c.append(id, 0, Positions{20, 22, 25}), Outcome::done);
    c.truncate(id, 16);
  };
  speculate();
  const Index bytes = c.cache.stats(id).bookkeeping_bytes;
  for (int i = 0; i < 100; ++i) speculate();
  EXPECT_EQ(c.cache.stats(id).bookkeeping_bytes, bytes);
}

// ---- compress

TEST_F(CacheTest, TokensAppendedAfterTheObservationStay) {
  fill(10);
  for (Index l = 0; l < 2; ++l) c.observe(id, l, h2o(), 10);
  for (Index l = 0; l < 2; ++l) ASSERT_EQ(c.append(id, l, 30), Outcome::done);  // from slot 10 of the same page on
  auto method = h2o();
  method.keep = Keep::tokens(0);
  c.commit(c.cache.plan(id, method));
  Positions unscored(30);
  std::iota(unscored.begin(), unscored.end(), 10);
  EXPECT_EQ(kept(), unscored);
  c.verify_all();
}

TEST_F(CacheTest, ALayerWhoseFirstHeadIsEmptyMayBeObserved) {
  fill(20);
  Plan p = c.random_plan(id, 1);
  p.layers[0].keep[0] = Selection(2);
  c.commit(p);
  for (Index l = 0; l < 2; ++l) c.observe(id, l, h2o(), 20);
  auto method = h2o();
  method.keep = Keep::ratio(0.3);
  c.commit(c.cache.plan(id, method));
  EXPECT_TRUE(kept(0, 0).empty());
  EXPECT_EQ(kept(0, 1).size(), 6u);
  EXPECT_EQ(kept(1, 0).size(), 6u);
  c.verify_all();
}

/// H2O has seen the prompt; then StreamingLLM decodes, whose tokens H2O has not seen. What it knows follows its tokens.
TEST_F(CacheTest, RunningScoresOutliveTheStepsOfAnotherMethod) {
  const auto heavy = make_compressor("h2o"), streaming = make_compressor("streaming_llm(keep=60t)");
  fill(40);
  for (const Index l : {0, 1}) c.observe(id, l, heavy, 40);
  const LayerScores before = c.cache.scores(id, 0, heavy);
  for (Position t = 40; t < 100; ++t) {
    ASSERT_EQ(c.append(id, 0, Positions{t}), Outcome::done);
    ASSERT_EQ(c.decode(id, 0, streaming, {t}), "");
    c.verify(id);
    const LayerScores after = c.cache.scores(id, 0, heavy);
    ASSERT_EQ(after.positions.size(), 30u);
    for (std::size_t h = 0; h < 2; ++h)
      for (std::size_t i = 0; i < 30; ++i) {
        const Position p = after.positions[i];
        if (p < 40) {
          ASSERT_EQ(after.values[h][i], before.values[h][static_cast<std::size_t>(p)])
              << "step " << t << " position " << p;
        } else {
          ASSERT_TRUE(std::isnan(after.values[h][i])) << "step " << t << " position " << p;
        }
      }
  }
  c.commit(plan("h2o(keep=0.1)"));
  c.verify_all();
}

TEST_F(CacheTest, PlanChangesNothing) {
  fill(40);
  for (Index l = 0; l < 2; ++l) c.observe(id, l, snap_kv(), 20);
  const Counted before = c.counted(id);
  const Plan random = c.cache.plan(id, kvpare::random_choice()), snap = c.cache.plan(id, snap_kv());
  EXPECT_EQ(c.counted(id), before);
  EXPECT_EQ(c.cache.plan(id, snap_kv()), snap) << "a plan without observation has not disturbed one with";
  EXPECT_EQ(c.cache.plan(id, kvpare::random_choice()), random);
}

TEST_F(CacheTest, ChunksOfQueriesCountAsOneAndNoMoreOfThemAreKeptThanRead) {
  fill(60);
  const AnyCompressor method = make_compressor("snap_kv(keep=0.4, window=8)");
  const oracle::Array3 queries = c.rows(60, 4, 4);
  const TensorBuffer<cpu::Backend> q(backend(), queries, DType::f32);
  const Positions positions = kept();
  const auto plan_in_chunks_of = [&](Index chunk) {
    for (Index l = 0; l < 2; ++l)
      for (Index first = 0; first < 60; first += chunk) {
        if (first > 8) {
          EXPECT_EQ(c.cache.stats(id).observation_bytes - l * (2 * 60 * 4 + 4), 8 * 4 * 4 * 4)
              << "8 rows of 4 heads of 4 floats, and layer 0's scores";
        }
        c.cache.observe(id, l, method, q.tensor().part(first, chunk),
                        std::span(positions).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(chunk)),
                        first + chunk == 60);
      }
    Plan p = c.cache.plan(id, method);
    c.commit(c.empty_plan(id));  // forgets what was observed
    p.epoch = 0;
    return p;
  };
  const Plan at_once = plan_in_chunks_of(60);
  EXPECT_EQ(plan_in_chunks_of(30), at_once);
  EXPECT_EQ(plan_in_chunks_of(12), at_once);
  EXPECT_EQ(plan_in_chunks_of(5), at_once);
}

TEST_F(CacheTest, BudgetsOfNothingOneAndMoreThanThereIs) {
  struct Case {
    std::string_view method;
    Index per_layer_and_head[2];
  };
  for (const Case& wanted :
       {Case{"random(keep=0)", {0, 0}}, Case{"random(keep=0t)", {0, 0}}, Case{"random(keep=1t)", {1, 0}},
        Case{"random(keep=2t)", {1, 1}}, Case{"random(keep=3t)", {2, 1}}, Case{"random(keep=100000t)", {40, 40}},
        Case{"random(keep=0p)", {0, 0}}, Case{"random(keep=1p)", {16, 0}}, Case{"random(keep=1GiB)", {40, 40}},
        Case{"random(keep=511B)", {0, 0}}, Case{"random(keep=1023B)", {0, 0}}, Case{"random(keep=1024B)", {16, 0}},
        Case{"random(keep=1)", {40, 40}}}) {
    Checked fresh(backend(), small_model(), small_options);
    const SequenceId s = fresh.create();
    for (Index l = 0; l < 2; ++l) ASSERT_EQ(fresh.append(s, l, 40), Outcome::done);
    fresh.commit(fresh.cache.plan(s, make_compressor(wanted.method)));
    for (Index l = 0; l < 2; ++l)
      for (Index h = 0; h < 2; ++h)
        EXPECT_EQ(std::ssize(fresh.cache.kept(s, l, h)), wanted.per_layer_and_head[l])
            << wanted.method << " layer " << l;
    fresh.verify_all();
    fresh.verify_attend(s, 0);
  }
}

TEST_F(CacheTest, ProtectedTokensStayWhateverTheBudget) {
  fill(40);
  c.tag(id, {.begin = 5, .end = 9, .is_protected = true});
  c.commit(plan("random(keep=0)"));
  EXPECT_EQ(kept(), (Positions{5, 6, 7, 8}));
  c.tag(id, {.begin = 0, .end = 40, .is_protected = true});
  const CompressReport all = c.commit(plan("random(keep=0)"));
  EXPECT_EQ(all.tokens_after, all.tokens_before);
  c.verify_all();
}

TEST_F(CacheTest, LayersNotToBeCompressedAreLeftAlone) {
  Model model = small_model();
  model.layers[1].compress = false;
  Checked partly(backend(), model, small_options);
  const SequenceId s = partly.create();
  for (Index l = 0; l < 2; ++l) ASSERT_EQ(partly.append(s, l, 40), Outcome::done);
  const CompressReport report = partly.commit(partly.cache.plan(s, make_compressor("random(keep=0.5)")));
  EXPECT_EQ(report.layer_budgets, (std::vector<Index>{20, -1}));
  EXPECT_EQ(partly.cache.kept(s, 1, 0).size(), 40u);
}

TEST_F(CacheTest, NanAndInfinityInKeysOrQueriesAreCountedAndRankLast) {
  for (const float bad : {nan, infinity, -infinity})
    for (const bool in_keys : {true, false})
      for (const std::string_view recipe : {"snap_kv(keep=0.5, window=4)", "h2o(keep=0.5)", "air_cache(keep=0.5)"}) {
        Cache cache(backend(), small_model(), small_options);
        const SequenceId s = cache.create();
        cache.tag(s, {.begin = 2, .end = 20, .token_class = TokenClass::image});
        const AnyCompressor method = make_compressor(recipe);
        std::vector<float> k(24 * 2 * 4, 0.5f), q(24 * 4 * 4, 0.25f);
        (in_keys ? k[5 * 2 * 4] : q[23 * 4 * 4]) = bad;  // head 0 of token 5; query head 0 of the last row
        const Positions positions = first_positions(24);
        for (Index l = 0; l < 2; ++l) {
          ASSERT_EQ(cache.append(s, l, ConstTensor(k.data(), 24, 2, 4), ConstTensor(k.data(), 24, 2, 4), positions),
                    Outcome::done);
          cache.observe(s, l, method, ConstTensor(q.data(), 24, 4, 4), positions);
        }
        const Plan p = cache.plan(s, method);
        const CompressReport report = cache.commit(p);
        EXPECT_EQ(report.nan_scores, p.nan_scores);
        EXPECT_LT(report.tokens_after, report.tokens_before) << recipe;
        if (!in_keys && bad != -infinity) {
          EXPECT_GT(p.nan_scores, 0) << recipe;
        }
      }
}

// ---- what is refused: the message says what was got and what was wanted, and nothing has changed

struct CacheRefuses : CacheTest {
  std::vector<float> floats = std::vector<float>(1 << 14);

  void SetUp() override { fill(20); }

  template <class Act>
  void expect(const std::string& words, Act&& act) {
    const Counted before = c.counted(id);
    const PoolStats pool = c.cache.pool().stats();
    EXPECT_EQ(error_of(act), words);
    EXPECT_EQ(c.counted(id), before);
    EXPECT_EQ(c.cache.pool().stats(), pool);
    c.verify(id);
  }
  ConstTensor tensor(Index rows, Index heads, Index width) const { return {floats.data(), rows, heads, width}; }
  Tensor writable(Index rows, Index heads, Index width) { return {floats.data(), rows, heads, width}; }
};

TEST_F(CacheRefuses, SequencesThatDoNotExist) {
  const SequenceId gone = c.create();
  c.release(gone);
  const std::string words = "sequence " + std::to_string(gone) + " does not exist (never created, or released)";
  const Positions one{30};
  Plan other = c.empty_plan(id);
  other.sequence = gone;
  expect(words, [&] { (void)c.cache.append(gone, 0, tensor(1, 2, 4), tensor(1, 2, 4), one); });
  expect(words, [&] { c.cache.observe(gone, 0, h2o(), tensor(1, 4, 4), one); });
  expect(words, [&] { (void)c.cache.plan(gone, h2o()); });
  expect(words, [&] { (void)c.cache.commit(other); });
  expect(words, [&] {
    c.cache.attend(0, {{.sequence = gone, .queries = tensor(1, 4, 4), .positions = one, .out = writable(1, 4, 4)}});
  });
  expect(words, [&] { (void)c.cache.fork(gone); });
  expect(words, [&] { c.cache.release(gone); });
  expect(words, [&] { c.cache.truncate(gone, 0); });
  expect(words, [&] { c.cache.tag(gone, {.begin = 0, .end = 1}); });
  expect(words, [&] { (void)c.cache.tags(gone); });
  expect(words, [&] { (void)c.cache.kept(gone, 0, 0); });
  expect(words, [&] { (void)c.cache.pages(gone, 0); });
  expect(words, [&] { (void)c.cache.stats(gone); });
  expect(words, [&] { (void)c.cache.epoch(gone); });
}

TEST_F(CacheRefuses, LayersAndHeadsOutOfRange) {
  const Positions one{30};
  for (const Index layer : {-1, 2}) {
    const std::string words = ": layer = " + std::to_string(layer) + ", must be within [0, 2)";
    expect("append" + words, [&] { (void)c.cache.append(id, layer, tensor(1, 2, 4), tensor(1, 2, 4), one); });
    expect("observe" + words, [&] { c.cache.observe(id, layer, h2o(), tensor(1, 4, 4), one); });
    expect("attend" + words, [&] { c.cache.attend(layer, {}); });
    expect("kept" + words, [&] { (void)c.cache.kept(id, layer, 0); });
    expect("pages" + words, [&] { (void)c.cache.pages(id, layer); });
  }
  for (const Index head : {-1, 2})
    expect("kept: kv_head = " + std::to_string(head) + ", must be within [0, 2)",
           [&] { (void)c.cache.kept(id, 0, head); });
}

TEST_F(CacheRefuses, AppendOfWrongShapesOrPositions) {
  const auto append = [&](ConstTensor k, ConstTensor v, Positions positions) {
    return [this, k, v, positions] { (void)c.cache.append(id, 0, k, v, positions); };
  };
  const ConstTensor right = tensor(2, 2, 4);
  expect("append: keys are [3, 2, 4], must be [2, 2, 4]", append(tensor(3, 2, 4), right, {20, 21}));
  expect("append: keys are [2, 1, 4], must be [2, 2, 4]", append(tensor(2, 1, 4), right, {20, 21}));
  expect("append: keys are [2, 2, 8], must be [2, 2, 4]", append(tensor(2, 2, 8), right, {20, 21}));
  expect("append: values are [2, 2, 3], must be [2, 2, 4]", append(right, tensor(2, 2, 3), {20, 21}));
  expect("append: values are [2, 2, 4], must be [3, 2, 4]", append(tensor(3, 2, 4), right, {20, 21, 22}));
  expect("append: keys: no memory", append(ConstTensor(static_cast<const float*>(nullptr), 2, 2, 4), right, {20, 21}));
  expect("append: values: no memory",
         append(right, ConstTensor(static_cast<const float*>(nullptr), 2, 2, 4), {20, 21}));
  const std::string must = ", positions must ascend and not be negative";
  expect("append: position 19 of token 0 follows 19 in layer 0" + must, append(right, right, {19, 20}));
  expect("append: position 22 of token 1 follows 22 in layer 0" + must, append(right, right, {22, 22}));
  expect("append: position 21 of token 1 follows 23 in layer 0" + must, append(right, right, {23, 21}));
  c.truncate(id, 0);
  expect("append: position -1 of token 0 follows -1 in layer 0" + must, append(right, right, {-1, 0}));
  expect("append: position 2147483647, must be below 2147483647",
         append(right, right, {20, std::numeric_limits<Position>::max()}));
  EXPECT_EQ(c.append(id, 0, Positions{std::numeric_limits<Position>::max() - 1}), Outcome::done);
  c.verify_all();
}

TEST_F(CacheRefuses, ObservationsOfWrongRows) {
  const Positions at{18, 19};
  expect("observe: queries are [3, 4, 4], must be [2, 4, 4]",
         [&] { c.cache.observe(id, 0, h2o(), tensor(3, 4, 4), at); });
  expect("observe: queries are [2, 2, 4], must be [2, 4, 4]",
         [&] { c.cache.observe(id, 0, h2o(), tensor(2, 2, 4), at); });
  expect("observe: queries are [2, 4, 5], must be [2, 4, 4]",
         [&] { c.cache.observe(id, 0, h2o(), tensor(2, 4, 5), at); });
  expect("observe: queries: no memory",
         [&] { c.cache.observe(id, 0, h2o(), ConstTensor(static_cast<const float*>(nullptr), 2, 4, 4), at); });
  const std::string no_token = ", but layer 0 holds no such token (append first; rows in ascending order)";
  expect("observe: row 1 is of position 20" + no_token, [&] {
    c.cache.observe(id, 0, h2o(), tensor(2, 4, 4), Positions{19, 20});
  });
  expect("observe: row 1 is of position 18" + no_token, [&] {
    c.cache.observe(id, 0, h2o(), tensor(2, 4, 4), Positions{19, 18});
  });
  const SequenceId empty = c.create();
  expect("observe: layer 1 holds no tokens yet, got 2 rows; append first",
         [&] { c.cache.observe(empty, 1, h2o(), tensor(2, 4, 4), at); });
}

TEST_F(CacheRefuses, ObservationsThatDoNotGoTogether) {
  const Positions at{18, 19};
  std::vector<half> halves(2 * 4 * 4);
  c.cache.observe(id, 0, snap_kv(), tensor(2, 4, 4), at, false);
  expect("observe: layer 0 was observed by another policy; compress first or use the same",
         [&] { c.cache.observe(id, 0, h2o(), tensor(2, 4, 4), at); });
  auto other_setting = snap_kv();
  other_setting.scorer.window = 7;
  expect("observe: layer 0 was observed by another policy; compress first or use the same",
         [&] { c.cache.observe(id, 0, other_setting, tensor(2, 4, 4), at); });
  expect("observe: queries are half, earlier chunks were float",
         [&] { c.cache.observe(id, 0, snap_kv(), ConstTensor(halves.data(), 2, 4, 4), at); });
  expect("compress: layer 0 was not observed; call observe first, final chunk included",
         [&] { (void)c.cache.plan(id, snap_kv()); });
  expect("observe: a row of position 18 follows one of position 19 of an earlier chunk, rows must ascend",
         [&] { c.cache.observe(id, 0, snap_kv(), tensor(2, 4, 4), at); });
  c.cache.observe(id, 0, snap_kv(), tensor(0, 4, 4), {});  // the final chunk may be empty
  expect("compress: layer 1 was not observed; call observe first, final chunk included",
         [&] { (void)c.cache.plan(id, snap_kv()); });
  c.cache.observe(id, 1, snap_kv(), tensor(2, 4, 4), at);
  expect("compress: layer 0 was observed by another policy", [&] { (void)c.cache.plan(id, h2o()); });
  EXPECT_GT(c.cache.plan(id, snap_kv()).candidates, 0);
}

TEST_F(CacheRefuses, APolicyWithASettingThatMakesNoSense) {
  auto even = snap_kv();
  even.scorer.pool = 4;
  const Positions at{18, 19};
  expect("observation_window.pool = 4, must be odd", [&] { c.cache.observe(id, 0, even, tensor(2, 4, 4), at); });
  c.cache.observe(id, 0, snap_kv(), tensor(2, 4, 4), at);  // the refused policy has left no trace
}

TEST_F(CacheRefuses, AmountsThatMakeNoSense) {
  const Positions at{19};
  const auto both = [&](Keep keep, const std::string& words) {
    auto method = h2o();
    method.keep = keep;
    expect(words, [&] { (void)c.cache.plan(id, method); });
    expect(words, [&] { c.cache.observe(id, 0, method, tensor(1, 4, 4), at); });
  };
  both(Keep::ratio(1.5), "keep = 1.5, a ratio must be within [0, 1]");
  both(Keep::ratio(-0.1), "keep = -0.1, a ratio must be within [0, 1]");
  both(Keep::ratio(nan), "keep = nan, a ratio must be within [0, 1]");
  both(Keep::tokens(-1), "keep = -1, must be a whole number that is not negative");
  both({2.5, Keep::Unit::pages}, "keep = 2.5, must be a whole number that is not negative");
  both({infinity, Keep::Unit::bytes}, "keep = inf, must be a whole number that is not negative");
}

TEST_F(CacheRefuses, PlansThatAreStaleOrForOtherLists) {
  const Plan right = c.random_plan(id, 0.5);
  Plan p = right;
  p.layers.pop_back();
  expect("commit: plan has 1 layers, the model 2", [&] { (void)c.cache.commit(p); });
  p = right;
  p.layers[1].keep.pop_back();
  expect("commit: layer 1 of the plan has 1 heads, must be 2", [&] { (void)c.cache.commit(p); });
  p = right;
  p.layers[1].keep[1] = Selection(3);
  expect("commit: layer 1 head 1: the plan has 3 entries, the list 2", [&] { (void)c.cache.commit(p); });

  const std::uint64_t then = c.cache.epoch(id);
  const auto stale = [&](const char* after, auto&& change) {
    SCOPED_TRACE(after);
    p = c.random_plan(id, 1);
    change();
    expect("commit: the plan is stale: made at epoch " + std::to_string(p.epoch) + ", the sequence is at " +
               std::to_string(p.epoch + 1),
           [&] { (void)c.cache.commit(p); });
  };
  stale("append", [&] { ASSERT_EQ(c.append(id, 0, 1), Outcome::done); });
  stale("tag", [&] { c.tag(id, {.begin = 0, .end = 1}); });
  stale("truncate", [&] { c.truncate(id, 20); });
  stale("commit", [&] { c.commit(p); });
  EXPECT_EQ(c.cache.epoch(id), then + 4);
}

TEST_F(CacheRefuses, AttendWithWrongRowsOrShapes) {
  const Positions none, one{19}, most(65, 19);
  float* const no_mass[] = {nullptr, nullptr};
  const auto attend = [&](AttendRequest request, MassKind kind = MassKind::none) {
    request.sequence = id;
    return [this, request, kind] { c.cache.attend(0, {request}, kind); };
  };
  expect("attend: rows = 0, must be within [1, 64]",
         attend({.queries = tensor(0, 4, 4), .positions = none, .out = writable(0, 4, 4)}));
  expect("attend: rows = 65, must be within [1, 64]",
         attend({.queries = tensor(65, 4, 4), .positions = most, .out = writable(65, 4, 4)}));
  expect("attend: queries are [2, 4, 4], must be [1, 4, 4]",
         attend({.queries = tensor(2, 4, 4), .positions = one, .out = writable(1, 4, 4)}));
  expect("attend: queries are [1, 2, 4], must be [1, 4, 4]",
         attend({.queries = tensor(1, 2, 4), .positions = one, .out = writable(1, 4, 4)}));
  expect("attend: out are [1, 4, 5], must be [1, 4, 4]",
         attend({.queries = tensor(1, 4, 4), .positions = one, .out = writable(1, 4, 5)}));
  expect("attend: out: no memory",
         attend({.queries = tensor(1, 4, 4), .positions = one, .out = Tensor(static_cast<float*>(nullptr), 1, 4, 4)}));
  expect("attend: 0 mass rows, must be 2",
         attend({.queries = tensor(1, 4, 4), .positions = one, .out = writable(1, 4, 4)}, MassKind::sum));
  expect("attend: 2 mass rows, must be 0",
         attend({.queries = tensor(1, 4, 4), .positions = one, .out = writable(1, 4, 4), .mass = no_mass}));
}

TEST_F(CacheRefuses, TruncationToNegativePositionsAndBadTags) {
  expect("truncate: n = -1, must not be negative", [&] { c.cache.truncate(id, -1); });
  expect("tag: span [5, 5), must be non-empty and not negative", [&] { c.cache.tag(id, {.begin = 5, .end = 5}); });
  expect("tag: span [-1, 5), must be non-empty and not negative", [&] { c.cache.tag(id, {.begin = -1, .end = 5}); });
}

std::string construction_error(Model model, CacheOptions options) {
  return error_of([&] { Cache cache(backend(), std::move(model), options); });
}

TEST(CacheConstruction, RefusesWhatMakesNoSense) {
  for (const Index page_tokens : {0, 8, 17, 48, 128})
    EXPECT_EQ(construction_error(small_model(), {.page_tokens = page_tokens, .pool_bytes = 1 << 20}),
              "cache: page_tokens = " + std::to_string(page_tokens) + ", must be 16, 32 or 64");
  EXPECT_EQ(construction_error(small_model(), {.page_tokens = 16}), "cache: pool_bytes = 0, must be positive");
  EXPECT_EQ(construction_error(small_model(), {.page_tokens = 16, .pool_bytes = -1}),
            "cache: pool_bytes = -1, must be positive");
  EXPECT_EQ(construction_error(small_model(), {.page_tokens = 16, .pool_bytes = 511}),
            "page pool: budget_bytes = 511, must be within [512 (one chunk), 274877906944]");
  EXPECT_EQ(construction_error({}, small_options), "model: no layers");
  alignas(64) static std::byte memory[4096];
  EXPECT_EQ(construction_error(small_model(), {.page_tokens = 16, .pool_bytes = 2048, .pool_memory = memory + 16}),
            "page pool: base is 16 bytes past a multiple of 64, must be aligned to 64");
}

}  // namespace
}  // namespace kvpare::test

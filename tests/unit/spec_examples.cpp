// The worked examples of the papers' specifications, on the library: exact numbers, exact survivors.
#include <gtest/gtest.h>

#include <kvpare/pipeline/engine.hpp>
#include <kvpare/pipeline/recipes.hpp>

#include "support/features.hpp"
#include "support/prompt.hpp"

namespace kvpare::test {
namespace {

using Positions = std::vector<Position>;

template <class Rig>
class SpecExample : public OnRig<Rig> {};
TYPED_TEST_SUITE(SpecExample, PipelineRigs, RigNames);

void expect_near(const std::vector<double>& got, std::size_t first, const std::vector<double>& wanted) {
  for (std::size_t i = 0; i < wanted.size(); ++i) EXPECT_NEAR(got[first + i], wanted[i], 1e-5) << "at " << i;
}

// ---- AirCache

const TagSpan image{.begin = 0, .end = 5, .token_class = TokenClass::image};

TYPED_TEST(SpecExample, AirCacheA_TheEliteSet) {
  // Four visual tokens, four text tokens. Text row r looks at visual token r and at nothing else visual, so that the
  // scores tell who was elected; the last row gives the text tokens 0.10, 0.30, 0.28, 0.32.
  const Prompt p = prompt_of_rows({{1},
                                   {1, 1},
                                   {1, 1, 1},
                                   {1, 1, 1, 1},
                                   {1, 0, 0, 0, 1},
                                   {0, 1, 0, 0, 0, 1},
                                   {0, 0, 1, 0, 0, 0, 1},
                                   {0, 0, 0, 1, 0.10, 0.30, 0.28, 0.32}},
                                  {{.begin = 0, .end = 4, .token_class = TokenClass::image}});
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 8);
  const auto elected = [&](double alpha) {
    const auto scores = fed.scores(0, EliteWindow{.alpha = alpha}, visual, {4, 5, 6, 7})[0];
    std::vector<int> rows;
    for (int r = 0; r < 4; ++r)
      if (scores[static_cast<std::size_t>(r)] > 1e-6) rows.push_back(r);
    return rows;
  };
  EXPECT_EQ(elected(0.9), (std::vector<int>{1, 3})) << "threshold 0.288";
  EXPECT_EQ(elected(0.87), (std::vector<int>{1, 2, 3}));
  EXPECT_EQ(elected(1.0), (std::vector<int>{3}));
}

/// Part B: 5 visual tokens, 4 text tokens of which the second and the fourth are elite (at alpha 0.6).
Prompt part_b() {
  return prompt_of_rows({{1},
                         {1, 1},
                         {1, 1, 1},
                         {1, 1, 1, 1},
                         {1, 1, 1, 1, 1},
                         {1, 1, 1, 1, 1, 1},
                         {1, 2, 4, 1, 8, 0.1, 4},
                         {1, 1, 1, 1, 1, 1, 1, 1},
                         {2, 2, 8, 2, 16, 0.1, 6, 0.1, 4}},
                        {image});
}

TYPED_TEST(SpecExample, AirCacheB_Importance) {
  const Prompt p = part_b();
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 9);
  const auto scores = fed.scores(0, EliteWindow{.alpha = 0.6}, visual, {5, 6, 7, 8})[0];
  expect_near(scores, 0, {0.05, 0.075, 0.20, 0.05, 0.40});
}

TYPED_TEST(SpecExample, AirCacheB_KeepsTwoVisualTokens) {
  const Prompt p = part_b();
  auto method = air_cache();
  method.scorer.alpha = 0.6;
  method.keep = Keep::tokens(2);
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.feed(method, 0, 9);
  fed.cache.compress(fed.id, method);
  EXPECT_EQ(fed.cache.kept(fed.id, 0, 0), (Positions{2, 4, 5, 6, 7, 8})) << "text is untouched";
}

TYPED_TEST(SpecExample, AirCacheB_StrengthAndSkewness) {
  const auto scores = upload(this->be(), std::vector<float>{0.05f, 0.075f, 0.20f, 0.05f, 0.40f});
  const Buffer<typename TestFixture::B, RowSummary> summary(this->be(), 1);
  const MaskedRow row{scores.data(), nullptr, 5, 64};
  this->be().reduce(std::span(&row, 1), summary.data());
  const RowSummary s = download(this->be(), summary)[0];
  EXPECT_NEAR(s.sum, 0.775, 1e-6);
  EXPECT_NEAR(s.mean, 0.155, 1e-7);
  EXPECT_NEAR(std::sqrt(s.moment2 / 4), 0.150416, 1e-6);
  EXPECT_NEAR(s.skewness(), 1.465548, 2e-6) << "2.048165 is what the population's deviation gives";
}

TEST(SpecExamples, AirCacheC_Budgets) {
  const LayerSummary layers[] = {{0.775, 1.5, 100}, {0.5, 1.0, 100}, {0.225, 0.5, 100}};
  const Index available[] = {100, 100, 100};
  double scratch[3];
  Index keep[3];
  StrengthSkewness{}.allocate(layers, available, 3, 120, scratch, keep);
  EXPECT_EQ(keep[0], 61);
  EXPECT_EQ(keep[1], 40);
  EXPECT_EQ(keep[2], 19);
  StrengthSkewness{.use = BudgetUse::strength}.allocate(layers, available, 3, 120, scratch, keep);
  EXPECT_EQ(keep[0], 62);
  EXPECT_EQ(keep[2], 18);
  StrengthSkewness{.use = BudgetUse::skewness}.allocate(layers, available, 3, 120, scratch, keep);
  EXPECT_EQ(keep[0], 60);
  EXPECT_EQ(keep[2], 20);
}

// ---- StreamingLLM

TYPED_TEST(SpecExample, StreamingLlmKeepsSinksAndRecent) {
  const Prompt p = random_prompt(1, 1, 9, 2, 1, {});
  auto method = streaming_llm();
  method.scorer.sinks = 2;
  method.keep = Keep::tokens(5);
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 8);
  fed.cache.compress(fed.id, method);
  for (const Index head : {0, 1}) EXPECT_EQ(fed.cache.kept(fed.id, 0, head), (Positions{0, 1, 5, 6, 7}));

  method.keep = Keep::tokens(4);  // room for one
  fed.cache.compress(fed.id, method);
  fed.append(8, 1);
  for (const Index head : {0, 1}) EXPECT_EQ(fed.cache.kept(fed.id, 0, head), (Positions{0, 1, 6, 7, 8}));
}

// ---- H2O

TYPED_TEST(SpecExample, H2oAccumulatesThePrompt) {
  const Prompt p = prompt_of_rows({{1}, {.6, .4}, {.5, .3, .2}, {.7, .1, .05, .15}});
  auto method = h2o();
  method.selector.recent_share = 2.0 / 3;  // heavy 1, recent 2
  method.keep = Keep::tokens(3);
  for (const Index chunk : {4, 1, 3}) {
    FedCache<typename TestFixture::B> fed(this->be(), p);
    fed.append(0, 4);
    expect_near(fed.scores(0, AccumulatedAttention{}, all_tokens, {0, 1, 2, 3})[0], 0, {2.80, .80, .25, .15});

    FedCache<typename TestFixture::B> again(this->be(), p);
    again.feed(method, 0, 4, chunk);
    again.cache.compress(again.id, method);
    EXPECT_EQ(again.cache.kept(again.id, 0, 0), (Positions{0, 2, 3})) << "chunks of " << chunk;
  }
}

// ---- Values in an observation window, and even shares of layers: ours

TEST(Pare, LongValuesCountMore) {
  // Logarithms of the lengths 0, 1, 2: z = -1.2247, 0, 1.2247. Votes .5, .3, .1 become .1469, .3, .3403.
  const float lengths[] = {0, 1, 2, 0}, own[] = {0, 0, 0, 70};
  RowSummary summary;
  summary.count = 3, summary.sum = 3, summary.mean = 1, summary.moment2 = 2;
  float votes[] = {0.5f, 0.3f, 0.1f, 70};
  for (Index i = 0; i < 4; ++i) detail::RaiseByLength{lengths, &summary, own, 4, 1, votes}(i);
  EXPECT_NEAR(votes[0], 0.1469, 1e-4);
  EXPECT_NEAR(votes[1], 0.3, 1e-6);
  EXPECT_NEAR(votes[2], 0.3403, 1e-4);
  EXPECT_EQ(votes[3], 70) << "the window's own tokens stay in front";
}

TEST(Pare, LayersKeepAShareOfTheEvenBudget) {
  // Strengths 3 and 1 of two layers with 100 candidates each: 1.5 and 0.5 of 20 tokens; half even: 1.25 and 0.75.
  const LayerSummary layers[] = {{3, 0, 100}, {1, 0, 100}};
  const Index available[] = {100, 100};
  double scratch[2];
  Index keep[2];
  StrengthSkewness{.use = BudgetUse::strength}.allocate(layers, available, 2, 40, scratch, keep);
  EXPECT_EQ(keep[0], 30);
  EXPECT_EQ(keep[1], 10);
  StrengthSkewness{.use = BudgetUse::strength, .layer_floor = 0.5}.allocate(layers, available, 2, 40, scratch, keep);
  EXPECT_EQ(keep[0], 25);
  EXPECT_EQ(keep[1], 15);
}

// ---- SnapKV

/// Votes .1 .6 .1 .05 .3 .05 from a window of two rows, half each.
Prompt snap_kv_prompt() {
  return prompt_of_rows({{1},
                         {1, 1},
                         {1, 1, 1},
                         {1, 1, 1, 1},
                         {1, 1, 1, 1, 1},
                         {1, 1, 1, 1, 1, 1},
                         {.05, .3, .05, .025, .15, .025, .4},
                         {.05, .3, .05, .025, .15, .025, .2, .2}});
}

TYPED_TEST(SpecExample, SnapKvPoolsTheVotes) {
  const Prompt p = snap_kv_prompt();
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 8);
  const auto scores = [&](Index pool, Pooling how) {
    return fed.scores(0, ObservationWindow{.window = 2, .pool = pool, .pooling = how}, all_tokens, {6, 7})[0];
  };
  expect_near(scores(3, Pooling::avg), 0, {.233333, .266667, .25, .15, .133333, .116667});
  expect_near(scores(3, Pooling::max), 0, {.6, .6, .6, .3, .3, .3});
  expect_near(scores(1, Pooling::avg), 0, {.1, .6, .1, .05, .3, .05});
}

TYPED_TEST(SpecExample, SnapKvKeepsItsWindowAndTheBest) {
  const Prompt p = snap_kv_prompt();
  for (const Index pool : {3, 1}) {
    auto method = snap_kv();
    method.scorer.window = 2, method.scorer.pool = pool;
    method.keep = Keep::tokens(4);
    FedCache<typename TestFixture::B> fed(this->be(), p);
    fed.feed(method, 0, 8);
    fed.cache.compress(fed.id, method);
    EXPECT_EQ(fed.cache.kept(fed.id, 0, 0), pool == 3 ? (Positions{1, 2, 6, 7}) : (Positions{1, 4, 6, 7}))
        << "pool " << pool;
  }
}

// ---- VL-Cache

/// Two layers of one head; the first three tokens are an image.
Prompt vl_cache_prompt() {
  const std::vector<std::vector<double>> begin{{1}, {1, 1}, {1, 1, 1}};
  auto with = [&](std::vector<double> row3, std::vector<double> row4) {
    auto rows = begin;
    rows.push_back(std::move(row3)), rows.push_back(std::move(row4));
    return prompt_of_rows(rows, {TagSpan{.begin = 0, .end = 3, .token_class = TokenClass::image}});
  };
  Prompt p = with({.600, .005, .095, .300}, {.800, .004, .006, .090, .100});
  const Prompt q = with({.900, .003, .005, .092}, {.950, .001, .002, .003, .044});
  p.model.layers.push_back(q.model.layers[0]);
  p.queries.push_back(q.queries[0]), p.keys.push_back(q.keys[0]), p.values.push_back(q.values[0]);
  return p;
}

TYPED_TEST(SpecExample, VlCacheScoresAndBudgets) {
  const Prompt p = vl_cache_prompt();
  for (const Index chunk : {5, 1, 3}) {
    FedCache<typename TestFixture::B> fed(this->be(), p);
    auto method = vl_cache();
    method.keep = Keep::ratio(0.5), method.selector.recent_share = 0, method.selector.last = 0;
    fed.feed(method, 0, 5, chunk);
    const auto report = fed.cache.compress(fed.id, method);
    EXPECT_EQ(report.layer_budgets, (std::vector<Index>{3, 2})) << "densities 2/3 and 4/9, chunks of " << chunk;
    EXPECT_EQ(fed.cache.kept(fed.id, 0, 0), (Positions{0, 2, 3}));
    EXPECT_EQ(fed.cache.kept(fed.id, 1, 0), (Positions{0, 3}));

    FedCache<typename TestFixture::B> again(this->be(), p);
    method.selector.last = 1;
    again.feed(method, 0, 5, chunk);
    again.cache.compress(again.id, method);
    EXPECT_EQ(again.cache.kept(again.id, 0, 0), (Positions{0, 3, 4})) << "with the last token";
    EXPECT_EQ(again.cache.kept(again.id, 1, 0), (Positions{0, 4}));
  }
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 5);
  expect_near(fed.scores(0, PostVision{}, all_tokens, {0, 1, 2, 3, 4})[0], 0, {1.4, .009, .101, .39, .1});
  expect_near(fed.scores(1, PostVision{}, all_tokens, {3, 4})[0], 0, {1.85, .004, .007, .095, .044});
  expect_near(fed.scores(1, PostVision{.max_rows = 1}, all_tokens, {3, 4})[0], 0, {.95, .001, .002, .003, .044});
}

TYPED_TEST(SpecExample, VlCacheWithoutTextAfterTheImageLooksAtTheNewestRows) {
  const Prompt p = prompt_of_rows({{1}, {.6, .4}, {.5, .3, .2}, {.7, .1, .05, .15}},
                                  {TagSpan{.begin = 1, .end = 4, .token_class = TokenClass::image}});
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 4);
  expect_near(fed.scores(0, PostVision{.fallback = 2}, all_tokens, {0, 1, 2, 3})[0], 0, {1.2, .4, .25, .15});
}

TEST(SpecExamples, VlCacheBudgets) {
  const LayerSummary layers[] = {{.density = 2.0 / 3}, {.density = 4.0 / 9}};
  const Index available[] = {5, 5};
  double scratch[2];
  Index keep[2];
  Density{}.allocate(layers, available, 2, 5, scratch, keep);
  EXPECT_EQ(keep[0], 3);
  EXPECT_EQ(keep[1], 2);
  const LayerSummary one_dense[] = {{.density = 0.9}, {.density = 0.0001}};
  const Index many[] = {1000, 1000};
  Density{}.allocate(one_dense, many, 2, 600, scratch, keep);
  EXPECT_EQ(keep[1], 10) << "no layer below 1 %";
  EXPECT_EQ(keep[0], 590);
}

TEST(SpecExamples, VlCacheBudgetsOfTheReference) {
  double scratch[2];
  Index keep[2];
  const auto expect = [&](double first, double second, double recent, Index m, Index total, Index a, Index b) {
    const LayerSummary layers[] = {{.density = first, .recent_share = recent},
                                   {.density = second, .recent_share = recent}};
    const Index available[] = {m, m};
    Density{.mode = Mode::reference}.allocate(layers, available, 2, total, scratch, keep);
    EXPECT_EQ(keep[0], a) << "of " << total;
    EXPECT_EQ(keep[1], b) << "of " << total;
  };
  expect(2.0 / 3, 4.0 / 9, 0, 7, 7, 4, 2);              // 4.2 and 2.8 of 7: one is lost
  expect(0.9, 0.1, 0.1, 1000, 611, 494 + 30, 54 + 30);  // alpha 0.3055; window 30.55; 0.9 * 0.9 * 2 alpha m = 494.91
  expect(0.9, 0.0001, 0.1, 1050, 1510, 1050,
         9 + 75);                              // clipped at both ends, and nobody gets what the first cannot hold
  expect(0, 0, 0.1, 100, 50, 22 + 2, 22 + 2);  // no density at all: alike; 22.5 and 2.5
  expect(0.9, 0.1, 0.1, 1000, 0, 10, 10);      // 0.009 m best and a window of one, whatever the budget
}

TYPED_TEST(SpecExample, VlCacheWindowOfTheReferenceIsTheSameInEveryLayer) {
  const Prompt p = vl_cache_prompt();
  const auto kept = [&](Mode mode, double recent_share) {
    auto method = vl_cache();
    method.keep = Keep::ratio(0.5), method.selector.recent_share = recent_share, method.selector.last = 0;
    method.budget.mode = method.selector.mode = mode;
    FedCache<typename TestFixture::B> fed(this->be(), p);
    fed.feed(method, 0, 5);
    fed.cache.compress(fed.id, method);
    return std::pair{fed.cache.kept(fed.id, 0, 0), fed.cache.kept(fed.id, 1, 0)};
  };
  // 0.3: a window of 0.75, which is one at least; the best 0.7 * 3 = 2.1 and 0.7 * 2 = 1.4
  EXPECT_EQ(kept(Mode::paper, 0.3), (std::pair{Positions{0, 2, 3}, Positions{0, 3}}));
  EXPECT_EQ(kept(Mode::reference, 0.3), (std::pair{Positions{0, 3, 4}, Positions{0, 4}}));
  // 0.9: a window of 2.25; the best 0.3 and 0.2, which is one at least: six tokens, where five were asked for
  EXPECT_EQ(kept(Mode::paper, 0.9), (std::pair{Positions{0, 3, 4}, Positions{0, 4}}));
  EXPECT_EQ(kept(Mode::reference, 0.9), (std::pair{Positions{0, 3, 4}, Positions{0, 3, 4}}));
}

// ---- PrefixKV

TEST(SpecExamples, PrefixKvBudgets) {
  const double flat[] = {28, 54, 78, 100}, steep[] = {80, 89, 95, 100};
  const LayerSummary layers[] = {{.count = 4, .curve = flat}, {.count = 4, .curve = steep}};
  const Index available[] = {4, 4};
  double scratch[2];
  Index keep[2];
  const auto expect = [&](Index total, Index first, Index second) {
    Prefix{}.allocate(layers, available, 2, total, scratch, keep);
    EXPECT_EQ(keep[0], first) << "of " << total;
    EXPECT_EQ(keep[1], second) << "of " << total;
  };
  expect(4, 3, 1);
  expect(3, 2, 1);
  expect(5, 4, 1);
  expect(8, 4, 4);
  expect(0, 0, 0);
}

TEST(SpecExamples, PrefixKvBudgetsOfTheReference) {
  double scratch[2];
  Index keep[2];
  const auto expect = [&](const std::vector<double>& first, const std::vector<double>& second, Index stays, Index total,
                          Index a, Index b) {
    const Index n = static_cast<Index>(first.size()), available[] = {n, n};
    const LayerSummary layers[] = {{.count = n, .curve = first.data(), .stays = stays},
                                   {.count = n, .curve = second.data(), .stays = stays}};
    Prefix{.mode = Mode::reference}.allocate(layers, available, 2, total, scratch, keep);
    EXPECT_EQ(keep[0], a) << "of " << total;
    EXPECT_EQ(keep[1], b) << "of " << total;
  };
  const std::vector<double> flat{28, 54, 78, 100}, steep{80, 89, 95, 100};
  // The first share, 0.5, forgets 2 and 3: near enough to 4. Scaled: 1.6 and 2.4.
  expect(flat, steep, 0, 4, 3, 2);
  // With two protected tokens it forgets 0 and 1; scaled, the second layer would forget 4.
  expect(flat, steep, 2, 4, 4, 0);
  expect(flat, steep, 4, 4, 4, 4);  // nothing can be forgotten

  // To forget 12 of 40: 0.5 forgets 10 + 19, 0.75 5 + 19, 0.875 2 + 12. Scaled: 1.71 and 10.29.
  std::vector<double> even, one_high;
  for (int o = 1; o <= 20; ++o) even.push_back(o), one_high.push_back(80 + o);
  expect(even, one_high, 0, 28, 19, 10);
}

TYPED_TEST(SpecExample, PrefixKvProtectsForFreeInTheReference) {
  Prompt p = prompt_of_rows({{1}, {1, 1}, {1, 1, 1}, {28, 24, 26, 22}});
  const Prompt q = prompt_of_rows({{1}, {1, 1}, {1, 1, 1}, {80, 5, 9, 6}});
  p.model.layers.push_back(q.model.layers[0]);
  p.queries.push_back(q.queries[0]), p.keys.push_back(q.keys[0]), p.values.push_back(q.values[0]);
  const Compressor method{LastRow{}, Prefix{.mode = Mode::reference},
                          TopK{.heads = SelectHeads::layer, .first = 1, .last = 1}, Keep::ratio(0.5)};
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.feed(method, 0, 4);
  fed.cache.compress(fed.id, method);
  EXPECT_EQ(fed.cache.kept(fed.id, 0, 0), (Positions{0, 1, 2, 3})) << "nothing to forget at the first share";
  EXPECT_EQ(fed.cache.kept(fed.id, 1, 0), (Positions{0, 3})) << "all that may go goes";
}

TYPED_TEST(SpecExample, PrefixKvKeepsThePrefixOfEachLayer) {
  // Two layers whose column sums are in the proportions of the example: a last row that outweighs all others.
  Prompt p = prompt_of_rows({{1}, {1, 1}, {1, 1, 1}, {28, 24, 26, 22}});
  const Prompt q = prompt_of_rows({{1}, {1, 1}, {1, 1, 1}, {80, 5, 9, 6}});
  p.model.layers.push_back(q.model.layers[0]);
  p.queries.push_back(q.queries[0]), p.keys.push_back(q.keys[0]), p.values.push_back(q.values[0]);
  auto method = Compressor{LastRow{}, Prefix{}, TopK{.heads = SelectHeads::layer}, Keep::ratio(0.5)};
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.feed(method, 0, 4);
  fed.cache.compress(fed.id, method);
  EXPECT_EQ(fed.cache.kept(fed.id, 0, 0), (Positions{0, 1, 2}));
  EXPECT_EQ(fed.cache.kept(fed.id, 1, 0), (Positions{0}));
  method.selector.first = 1, method.selector.last = 1;
  FedCache<typename TestFixture::B> again(this->be(), p);
  again.feed(method, 0, 4);
  const auto report = again.cache.compress(again.id, method);
  EXPECT_EQ(report.layer_budgets[0] + report.layer_budgets[1], 4);
  for (Index l = 0; l < 2; ++l) {
    const auto kept = again.cache.kept(again.id, l, 0);
    EXPECT_EQ(kept.front(), 0) << "layer " << l;
    EXPECT_EQ(kept.back(), 3) << "layer " << l;
  }
}

// ---- ZipVL

TYPED_TEST(SpecExample, ZipVlKeepsAShareOfTheAttention) {
  const Prompt p = prompt_of_rows({{1}, {.6, .4}, {.5, .3, .2}, {.7, .1, .05, .15}});
  const auto kept = [&](double tau, Index chunk) {
    auto method = zip_vl();
    method.scorer.tau = tau, method.scorer.recent = 1;
    FedCache<typename TestFixture::B> fed(this->be(), p);
    fed.feed(method, 0, 4, chunk);
    fed.cache.compress(fed.id, method);
    return fed.cache.kept(fed.id, 0, 0);
  };
  for (const Index chunk : {4, 1}) {
    EXPECT_EQ(kept(0.70, chunk), (Positions{0, 3})) << "p = 1, and the newest";
    EXPECT_EQ(kept(0.85, chunk), (Positions{0, 1, 3})) << "p = 2, and the newest";
    EXPECT_EQ(kept(0.95, chunk), (Positions{0, 1, 3})) << "p = 3; sums that favour old tokens would take 2";
    EXPECT_EQ(kept(0.975, chunk), (Positions{0, 1, 2, 3}));
  }
}

TYPED_TEST(SpecExample, ZipVlScoresAreAttentionPerRow) {
  const Prompt p = prompt_of_rows({{1}, {.6, .4}, {.5, .3, .2}, {.7, .1, .05, .15}});
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 4);
  const auto scores =
      fed.scores(0, DynamicShare{.tau = 0.85, .recent = 1}, all_tokens, {0, 1, 2, 3})[0];
  expect_near(scores, 0, {1.7, 1 + .8 / 3, .125 - 2, 3});
}

// ---- CSP

/// exp(logits) of the last two rows: 3 1 3 .5 .5 1 and 4 2 1 7 1 1 3; with n = 1 they are divided by 10 and 20. Modalities
/// T V V T V V T.
Prompt csp_prompt() {
  return prompt_of_rows(
      {{1}, {1, 1}, {1, 1, 1}, {1, 1, 1, 1}, {1, 1, 1, 1, 1}, {3, 1, 3, .5, .5, 1}, {4, 2, 1, 7, 1, 1, 3}},
      {{.begin = 1, .end = 3, .token_class = TokenClass::image},
       {.begin = 4, .end = 6, .token_class = TokenClass::image}});
}

TYPED_TEST(SpecExample, CspKeepsTheUnionOfTwoLists) {
  const Prompt p = csp_prompt();
  const auto kept = [&](double cross, Index tokens, double recent_share, Mode mode = Mode::paper) {
    auto method = csp();
    method.scorer.mode = method.selector.mode = mode;
    method.scorer.window = 2, method.scorer.cross = cross;
    method.selector.recent_share = recent_share;
    method.keep = Keep::tokens(tokens);
    FedCache<typename TestFixture::B> fed(this->be(), p);
    fed.feed(method, 0, 7);
    fed.cache.compress(fed.id, method);
    return fed.cache.kept(fed.id, 0, 0);
  };
  EXPECT_EQ(kept(0.5, 5, 0.2), (Positions{0, 1, 2, 3, 6})) << "{3, 2} by self, {0, 1} by cross";
  EXPECT_EQ(kept(0.25, 5, 0.2), (Positions{0, 1, 2, 3, 6})) << "{3, 2, 0} and {0}: 0 is picked twice, 1 fills up";
  // By self alone 3 2 0 1, by cross alone 0 1 and then .05 each.
  EXPECT_EQ(kept(0, 3, 0), (Positions{0, 2, 3}));
  EXPECT_EQ(kept(1, 2, 0), (Positions{0, 1}));
  EXPECT_EQ(kept(0.5, 2, 0), (Positions{0, 3})) << "one of each";

  EXPECT_EQ(kept(0.5, 5, 0.2, Mode::reference), (Positions{0, 1, 2, 3, 6}));
  EXPECT_EQ(kept(0.25, 5, 0.2, Mode::reference), (Positions{0, 2, 3, 6})) << "0, picked twice, has its place twice";
  EXPECT_EQ(kept(0.25, 2, 0.5, Mode::reference), (Positions{6})) << "0.75 and 0.25 of a token, and the newest";
}

/// Keys 5 and 6, the window's own, are in no list and have places beside them: 5 the fifth by self, behind its equal key 1.
TYPED_TEST(SpecExample, CspScores) {
  const Prompt p = csp_prompt();
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 7);
  const auto scores = [&](const CrossSelf& scorer) {
    return fed.scores(0, scorer, all_tokens, {0, 1, 2, 3, 4, 5, 6})[0];
  };
  // By self .20 .10 .30 .35 .05 | .10 .15: places 3 4 2 1 5 | 5 4. By cross .30 .10 and .05 each: 1 2 ….
  expect_near(scores({.cross = 0.5, .window = 2}), 0, {-2, -4, -4, -2, -10, -10, -8});
  expect_near(scores({.cross = 0.25, .window = 2}), 0,
              {-4, -4 / .75, -2 / .75, -1 / .75, -5 / .75, -5 / .75, -4 / .75});
  expect_near(scores({.cross = 0, .window = 2}), 0, {-3, -4, -2, -1, -5, -5, -4});
  // Nothing gives 6 by cross: it goes on after that list, in its place by self.
  expect_near(scores({.cross = 1, .window = 2}), 0, {-1, -2});
  expect_near(scores({.cross = 1, .window = 2}), 6, {-7 - 4});
  EXPECT_EQ(scores({.cross = 0.5, .window_share = 0.3}), scores({.cross = 0.5, .window = 2})) << "2.1 rows";
  // Rows V, T; keys in the lists T V V T V: 2 of 5 and 3 of 5 pairs are of two modalities.
  EXPECT_EQ(scores({.cross = 0.9, .window = 2, .estimate = true}), scores({.cross = 0.5, .window = 2}));
  // The denominator does not matter to one row; of two it changes the weights.
  EXPECT_EQ(scores({.n = 0, .window = 1}), scores({.n = 5, .window = 1}));
  // n = 0: rows of 9 and 19. By self .2105 .1111 .3333 .3684 .0556, by cross .3333 .1053 .0526 .0556 .0526.
  expect_near(scores({.cross = 1, .n = 0, .window = 2}), 0, {-1, -2, -4, -3, -5, -6, -11});
}

// ---- LagKV

/// By hand: a sink, a partition, its reference, one more token. Over the reference keys range 0..2 and 0..4, values 0..1, so
/// that the deviations are 0 and sqrt(1/2) of the keys, sqrt(2) and 0 of the values.
TYPED_TEST(SpecExample, LagKvComparesWithWhatFollows) {
  const std::vector<std::vector<double>> keys{{9, 9}, {2, 4}, {2, 0}, {0, 0}, {2, 4}, {7, 7}},
      values{{9, 9}, {0, 2}, {0, 0}, {1, 0}, {0, 1}, {7, 7}};
  Prompt p = random_prompt(1, 1, 6, 1, 1, {}, 2);
  for (Index t = 0; t < 6; ++t)
    for (Index c = 0; c < 2; ++c) {
      p.keys[0].at(t, 0, c) = keys[static_cast<std::size_t>(t)][static_cast<std::size_t>(c)];
      p.values[0].at(t, 0, c) = values[static_cast<std::size_t>(t)][static_cast<std::size_t>(c)];
    }
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 6);
  const auto scores = [&](const LagKv& scorer) { return fed.scores(0, scorer, all_tokens, {})[0]; };
  expect_near(scores({.sinks = 1, .lag = 2, .across = true}), 0, {10, 1.13467, 0.86533, 4, 5, 6});
  expect_near(scores({.sinks = 1, .lag = 2}), 0, {10, .5, 0, 4, 5, 6});
  expect_near(scores({.sinks = 1, .lag = 3}), 0, {10, 4, 5, 6, 7, 8});

  auto method = lag_kv();
  method.scorer.sinks = 1, method.scorer.lag = 2;
  method.keep = Keep::tokens(5);
  fed.cache.compress(fed.id, method);
  EXPECT_EQ(fed.cache.kept(fed.id, 0, 0), (Positions{0, 1, 3, 4, 5}));
}

// ---- Expected Attention

/// By hand: a sink, then queries 1 and 3, of mean 2 and variance 1, so that x = 2 k + k^2 / 2 is 0, 0 and -2 for keys 0, -4
/// and -2; values of length 5, 1 and 2.
TYPED_TEST(SpecExample, ExpectedAttentionOfAGaussian) {
  Prompt p = random_prompt(1, 1, 4, 1, 1, {}, 1);
  p.queries[0].values = {9, 1, 3, 3}, p.keys[0].values = {50, 0, -4, -2}, p.values[0].values = {70, 5, -1, 2};
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 4);
  const auto scores = [&](const ExpectedAttention& scorer) { return fed.scores(0, scorer, all_tokens, {0, 1, 2})[0]; };
  expect_near(scores({.sinks = 1, .value_norm = false}), 0, {1.46831, .46831, .46831, .06338});
  expect_near(scores({.sinks = 1}), 0, {3.34155, 2.34155, .46831, .12676});
  expect_near(scores({.sinks = 1, .epsilon = 0.1}), 0, {3.84155, 2.84155, .56831, .32676});
  expect_near(scores({.sinks = 1, .covariance = false, .value_norm = false}), 0, {1.98169, .98169, .00033, .01798});

  auto method = expected_attention();
  method.scorer.sinks = 1;
  method.keep = Keep::tokens(2);
  fed.observe(method, 0, 3);
  fed.cache.compress(fed.id, method);
  EXPECT_EQ(fed.cache.kept(fed.id, 0, 0), (Positions{0, 1}));
}

// ---- CaM

/// By hand: the last row gives .4 .1 .3 0 .15 .05; of three to keep one is the newest, so that 0, 2 and 5 stay. Token 4 is three
/// times what follows and always joins it, token 3 is nothing and never does, token 1 joins with a probability of
/// .1 / .3 (next: 2), or .1 / .175 (next: 2 and 5, half of it each).
TYPED_TEST(SpecExample, CacheMergingByHand) {
  const std::vector<double> last{.4, .1, .3, 0, .15, .05};
  Prompt p = prompt_of_rows({{1}, {1, 1}, {1, 1, 1}, {1, 1, 1, 1}, {1, 1, 1, 1, 1}, last});
  p.values[0].values = {1, 10, 100, 1000, 10000, 100000};
  std::set<bool> coins;
  for (const Index m : {1, 2})
    for (const Index seed : {0, 1, 2, 3, 4, 5, 6, 7}) {
      const Compressor method{LastRow{}, Uniform{},
                              TopK{.recent_share = 1.0 / 3, .merge = MergeInto::values, .merge_into = m, .merge_seed = seed},
                              Keep::tokens(3)};
      FedCache<typename TestFixture::B> fed(this->be(), p);
      fed.feed(method, 0, 6);
      const auto report = fed.cache.compress(fed.id, method);
      ASSERT_EQ(fed.cache.kept(fed.id, 0, 0), (Positions{0, 2, 5}));
      const bool joins = static_cast<double>(random_unit(static_cast<std::uint64_t>(seed), 0, 0, 1)) < (m == 1 ? .1 / .3 : .1 / .175);
      coins.insert(joins);
      const auto memory = upload(this->be(), std::vector<float>(3));
      const GatherRow gather{fed.cache.pages(fed.id, 0)[0], Side::values, nullptr, 1, memory.data()};
      this->be().gather(std::span(&gather, 1));
      const std::vector<float> wanted = !joins  ? std::vector<float>{1, 100, 110000}
                                        : m == 1 ? std::vector<float>{1, 110, 110000}
                                                 : std::vector<float>{1, 105, 110005};
      EXPECT_EQ(download(this->be(), memory), wanted) << "m " << m << ", seed " << seed;
      EXPECT_EQ(report.tokens_merged, joins ? 2 : 1);
    }
  EXPECT_EQ(coins.size(), 2u) << "seeds must try both";
}

// ---- decode under a budget

/// One layer whose kv heads are given their attention: keys are one-hot by position, q · k_j = ln of what token j gets.
template <Backend B>
struct GivenAttention {
  using Rows = std::vector<std::vector<double>>;  // [kv head][position], 0 where nothing is to be had
  Index heads, width;
  KvCache<B, Formats<Pair<Raw<float>, Raw<float>>>> cache;
  SequenceId id;
  B& be;

  GivenAttention(B& backend, Index kv_heads, Index tokens)
      : heads(kv_heads), width(tokens),
        cache(backend, model(kv_heads, tokens), {.page_tokens = 16, .pool_bytes = 1 << 20}), id(cache.create()),
        be(backend) {}

  static Model model(Index kv_heads, Index tokens) {
    LayerShape shape;
    shape.kv_heads = shape.q_heads = kv_heads, shape.key_dim = tokens, shape.value_dim = 1, shape.scale = 1;
    return {{shape}};
  }

  /// The token at position `p`, what it attends to, and what is kept then; its value is its position.
  template <class M>
  std::vector<double> decode(Position p, const Rows& row, const M& method) {
    oracle::Array3 k(1, heads, width), v(1, heads, 1, static_cast<double>(p)), q(1, heads, width, -80);
    for (Index h = 0; h < heads; ++h) {
      k.at(0, h, p) = 1;
      const auto& of_head = row[static_cast<std::size_t>(h)];
      for (std::size_t j = 0; j < of_head.size(); ++j)
        if (of_head[j] > 0) q.at(0, h, static_cast<Index>(j)) = std::log(of_head[j]);
    }
    const TensorBuffer<B> keys(be, k, DType::f32), values(be, v, DType::f32), queries(be, q, DType::f32),
        out(be, v, DType::f32);
    const Position at[] = {p};
    EXPECT_EQ(cache.append(id, 0, keys.tensor(), values.tensor(), at), Outcome::done);
    cache.decode(0, {{.sequence = id, .queries = queries.tensor(), .positions = at, .out = out.writable()}}, method);
    return out.download().values;
  }
};

TYPED_TEST(SpecExample, H2oEvictsAtEveryStep) {
  auto method = h2o();
  method.selector.recent_share = 2.0 / 3;  // heavy 1, recent 2
  method.keep = Keep::tokens(3);
  GivenAttention<typename TestFixture::B> given(this->be(), 1, 5);
  given.decode(0, {{1}}, method);
  given.decode(1, {{.6, .4}}, method);
  given.decode(2, {{.5, .3, .2}}, method);
  EXPECT_EQ(given.cache.kept(given.id, 0, 0), (Positions{0, 1, 2}));
  given.decode(3, {{.7, .1, .05, .15}}, method);  // acc 2.80 .80 .25 .15
  EXPECT_EQ(given.cache.kept(given.id, 0, 0), (Positions{0, 2, 3}));
  const auto scores = given.cache.scores(given.id, 0, method);
  EXPECT_EQ(scores.positions, (Positions{0, 2, 3}));
  expect_near({scores.values[0].begin(), scores.values[0].end()}, 0, {2.80, .25, .15});

  const auto out = given.decode(4, {{.5, 0, .1, .2, .2}}, method);
  EXPECT_NEAR(out[0], .1 * 2 + .2 * 3 + .2 * 4, 1e-5);
  EXPECT_EQ(given.cache.kept(given.id, 0, 0), (Positions{0, 3, 4}));
  const auto after = given.cache.scores(given.id, 0, method);
  expect_near({after.values[0].begin(), after.values[0].end()}, 0, {3.30, .35, .20});
}

// ---- KVCrush

/// Scores are attention of the last row, head by head.
TYPED_TEST(SpecExample, KvCrushKeepsRepresentatives) {
  const std::vector<std::vector<double>> of_heads{{.30, .05, .20, .10, .25, .10},
                                                  {.05, .35, .10, .20, .05, .25},
                                                  {.40, .10, .05, .20, .15, .10},
                                                  {.10, .15, .30, .05, .25, .15}};
  Prompt p = random_prompt(1, 1, 6, 4, 1, {}, 6);
  p.model.layers[0].scale = 1;
  for (Index h = 0; h < 4; ++h)
    for (Index t = 0; t < 6; ++t)
      for (Index d = 0; d < 6; ++d) {
        p.keys[0].at(t, h, d) = t == d;
        p.queries[0].at(t, h, d) = std::log(of_heads[static_cast<std::size_t>(h)][static_cast<std::size_t>(d)]);
      }
  const auto kept = [&](double represent, Mode mode) {
    const Compressor method{LastRow{}, Uniform{},
                            TopK{.heads = SelectHeads::layer, .represent = represent, .mode = mode}, Keep::tokens(4)};
    FedCache<typename TestFixture::B> fed(this->be(), p);
    fed.feed(method, 0, 6);
    fed.cache.compress(fed.id, method);
    return fed.cache.kept(fed.id, 0, 0);
  };
  EXPECT_EQ(kept(0.5, Mode::paper), (Positions{0, 1, 3, 4})) << "1 and 3 of the order 1 5 2 3";
  EXPECT_EQ(kept(0.5, Mode::reference), (Positions{0, 1, 2, 4})) << "1 and 2, steps of 4 / 2";
  EXPECT_EQ(kept(0, Mode::paper), (Positions{0, 1, 2, 4})) << "by importance alone";
}

/// Blocks of 2 in an engine's pages. Scores are .9 .15 | .2 .8 | .05 .04 | .7 .6, less 1 each: minus the keys' lengths.
TYPED_TEST(SpecExample, KvCrushKeepsBlocksThatStandForOthers) {
  std::vector<float> keys;
  for (const float score : {.9f, .15f, .2f, .8f, .05f, .04f, .7f, .6f}) keys.insert(keys.end(), {1 - score, 0});
  const auto memory = upload(this->be(), keys);
  const std::int32_t table[] = {0, 1, 2, 3};
  const EngineLayer<float> layer{.shape = {.q_heads = 1, .kv_heads = 1, .key_dim = 2, .value_dim = 2, .scale = 1},
                                 .kv = {.keys = nhd(memory.data(), 4, 2, 1, 2),
                                        .values = nhd(memory.data(), 4, 2, 1, 2),
                                        .pages = table,
                                        .tokens = 8}};
  const std::span<const EngineLayer<float>> layers(&layer, 1);
  const auto done = [&](Index blocks, double represent, Mode mode) {
    EngineSequence<typename TestFixture::B> sequence(this->be());
    const Compressor method{KeyNorm{}, Uniform{},
                            TopK{.heads = SelectHeads::layer,
                                 .granularity = Granularity::page,
                                 .represent = represent,
                                 .anchor = Anchor::mean,
                                 .mode = mode},
                            Keep::tokens(2 * blocks)};
    return sequence.commit(sequence.plan(method, layers), layers)[0].positions[0];
  };
  EXPECT_EQ(done(1, 0, Mode::paper), (Positions{6, 7})) << "block 3 has 1.30";
  EXPECT_EQ(done(3, 2.0 / 3, Mode::reference), (Positions{0, 1, 4, 5, 6, 7}))
      << "two more on top of it: 2 and 0 of 2 0 1";
  EXPECT_EQ(done(3, 2.0 / 3, Mode::paper), (Positions{2, 3, 4, 5, 6, 7})) << "2 and 1";
  EXPECT_EQ(done(3, 0, Mode::paper), (Positions{0, 1, 2, 3, 6, 7})) << "by importance alone";
}

// ---- TopV's recovery

TYPED_TEST(SpecExample, RecoveryTakesEveryFourthOfWhatGoes) {
  // Ten tokens go: 3 5 6 8 9 11 12 14 15 17 of eighteen.
  Prompt p = random_prompt(1, 1, 18, 1, 1, {}, 4);
  std::vector<bool> goes(18, false);
  for (const int t : {3, 5, 6, 8, 9, 11, 12, 14, 15, 17}) goes[static_cast<std::size_t>(t)] = true;
  for (Index t = 0; t < 18; ++t)
    for (Index d = 0; d < 4; ++d) p.keys[0].at(t, 0, d) = goes[static_cast<std::size_t>(t)] ? 2 : 1;  // short keys stay
  const Compressor method{KeyNorm{}, Uniform{}, TopK{.recover = 4}, Keep::tokens(8 + 3)};
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 18);
  fed.cache.compress(fed.id, method);
  EXPECT_EQ(fed.cache.kept(fed.id, 0, 0), (Positions{0, 1, 2, 3, 4, 7, 9, 10, 13, 15, 16}));
}

// ---- CORM

Compressor<RecentMessage, Uniform> corm_of_two() {
  auto method = corm();
  method.scorer.w = 2, method.selector.last = 2;
  return method;
}

TYPED_TEST(SpecExample, CormEvictsWhatTheLastRowsFoundMinor) {
  const auto method = corm_of_two();
  GivenAttention<typename TestFixture::B> given(this->be(), 1, 7);
  // Five tokens, of which only the last row is shown.
  oracle::Array3 k(5, 1, 7), v(5, 1, 1), q(1, 1, 7, -80);
  const double row[] = {.30, .10, .05, .25, .30};
  for (Index t = 0; t < 5; ++t) k.at(t, 0, t) = 1, q.at(0, 0, t) = std::log(row[t]);
  const TensorBuffer<typename TestFixture::B> keys(this->be(), k, DType::f32), values(this->be(), v, DType::f32),
      queries(this->be(), q, DType::f32);
  const Position at[] = {0, 1, 2, 3, 4};
  ASSERT_EQ(given.cache.append(given.id, 0, keys.tensor(), values.tensor(), at), Outcome::done);
  given.cache.observe(given.id, 0, method, queries.tensor(), std::span(at).last(1));

  given.decode(5, {{.40, .08, .02, .10, .20, .20}}, method);
  EXPECT_EQ(given.cache.kept(given.id, 0, 0), (Positions{0, 3, 4, 5})) << "1 and 2 were minor twice";
  const auto out = given.decode(6, {{.50, 0, 0, .10, .10, .15, .15}}, method);
  EXPECT_NEAR(out[0], .10 * 0 + .10 * 0 + .15 * 5 + .15 * 6, 1e-5) << "the step itself still sees all";
  EXPECT_EQ(given.cache.kept(given.id, 0, 0), (Positions{0, 4, 5, 6})) << "3 now, too; 4 was important a row ago";
}

TYPED_TEST(SpecExample, CormEvictsOnceAfterThePrompt) {
  const Prompt p = prompt_of_rows({{1},
                                   {.9, .1},
                                   {.9, .05, .05},
                                   {.9, .04, .03, .03},
                                   {.30, .10, .05, .25, .30},
                                   {.40, .08, .02, .10, .20, .20}});
  for (const Index chunk : {6, 1, 4}) {
    FedCache<typename TestFixture::B> fed(this->be(), p);
    fed.feed(corm_of_two(), 0, 6, chunk);
    fed.cache.compress(fed.id, corm_of_two());
    EXPECT_EQ(fed.cache.kept(fed.id, 0, 0), (Positions{0, 3, 4, 5})) << "chunks of " << chunk;
  }
  auto capped = corm_of_two();
  capped.keep = Keep::tokens(3);
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.feed(capped, 0, 6);
  fed.cache.compress(fed.id, capped);
  EXPECT_EQ(fed.cache.kept(fed.id, 0, 0), (Positions{0, 4, 5})) << "of a bound, those last found important";
}

TYPED_TEST(SpecExample, CormScoresAreTheRowsATokenHasLeft) {
  const Prompt p = prompt_of_rows({{1}, {.9, .1}, {.8, .1, .1}});
  const auto method = corm_of_two();
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 3);
  expect_near(fed.scores(0, method.scorer, all_tokens, {0, 1, 2})[0], 0, {1.5, -0.5, 0.5});
}

/// QAQ: the largest share that the newest rows give; what has not been there for all of them counts as 1.
TYPED_TEST(SpecExample, RecentMaximumOfTheNewestRows) {
  const Prompt p = prompt_of_rows({{1}, {.9, .1}, {.2, .3, .5}, {.4, .35, .05, .2}});
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 4);
  expect_near(fed.scores(0, RecentMaximum{.rows = 1}, all_tokens, {0, 1, 2, 3})[0], 0, {.4, .35, .05, .2});
  expect_near(fed.scores(0, RecentMaximum{.rows = 2}, all_tokens, {0, 1, 2, 3})[0], 0, {.4, .35, .5, 1});
  expect_near(fed.scores(0, RecentMaximum{.rows = 3}, all_tokens, {0, 1, 2, 3})[0], 0, {.9, .35, 1, 1});
  expect_near(fed.scores(0, RecentMaximum{.rows = 5}, all_tokens, {0, 1, 2, 3})[0], 0, {1, 1, 1, 1});
}

/// Of every 4 rows the last 2 count: the maximum is of both whenever 4 divides the number of positions.
TYPED_TEST(SpecExample, RecentMaximumGoesOnBetweenDecodeSteps) {
  auto method = recent_maximum();
  method.scorer = {.rows = 2, .every = 4};
  method.keep = Keep::tokens(100);
  GivenAttention<typename TestFixture::B> given(this->be(), 1, 9);
  const auto expect_scores = [&](const std::vector<double>& wanted) {
    const LayerScores got = given.cache.scores(given.id, 0, method);
    ASSERT_EQ(got.values[0].size(), wanted.size());
    for (std::size_t i = 0; i < wanted.size(); ++i) EXPECT_NEAR(static_cast<double>(got.values[0][i]), wanted[i], 1e-5) << i;
  };
  given.decode(0, {{1}}, method);
  expect_scores({1});
  given.decode(1, {{.6, .4}}, method);
  expect_scores({1, 1});  // nobody knows either
  given.decode(2, {{.2, .3, .5}}, method);
  expect_scores({.2, .3, .5});  // begins anew
  given.decode(3, {{.4, .2, .3, .1}}, method);
  expect_scores({.4, .3, .5, 1});  // of two rows
  given.decode(4, {{.1, .1, .6, .1, .1}}, method);
  expect_scores({.4, .3, .6, 1, 1});
  given.decode(5, {{.5, .1, .1, .1, .1, .1}}, method);
  expect_scores({.5, .3, .6, 1, 1, 1});
  given.decode(6, {{.1, .1, .1, .1, .1, .1, .4}}, method);
  expect_scores({.1, .1, .1, .1, .1, .1, .4});
  given.decode(7, {{.05, .25, .1, .1, .1, .2, .1, .1}}, method);
  expect_scores({.1, .25, .1, .1, .1, .2, .4, 1});
}

TYPED_TEST(SpecExample, StreamingLlmEvictsAtEveryStep) {
  auto method = streaming_llm();
  method.scorer.sinks = 2;
  method.keep = Keep::tokens(5);
  GivenAttention<typename TestFixture::B> given(this->be(), 1, 9);
  for (Position p = 0; p < 9; ++p) {
    given.decode(p, {std::vector<double>(static_cast<std::size_t>(p) + 1, 1.0)}, method);
    if (p == 7) {
      EXPECT_EQ(given.cache.kept(given.id, 0, 0), (Positions{0, 1, 5, 6, 7}));
    }
  }
  EXPECT_EQ(given.cache.kept(given.id, 0, 0), (Positions{0, 1, 6, 7, 8}));
}

/// By hand: the mean of both heads is .30 .35 .35, then, over what is left and the new token, .20 .45 .35.
TYPED_TEST(SpecExample, TovaChoosesOncePerLayerByTheNewestRow) {
  auto method = tova();
  method.keep = Keep::tokens(2);
  GivenAttention<typename TestFixture::B> given(this->be(), 2, 4);
  given.decode(0, {{1}, {1}}, method);
  given.decode(1, {{.9, .1}, {.9, .1}}, method);  // earlier rows do not count
  given.decode(2, {{.1, .6, .3}, {.5, .1, .4}}, method);
  for (const Index h : {0, 1}) EXPECT_EQ(given.cache.kept(given.id, 0, h), (Positions{1, 2})) << "head " << h;
  given.decode(3, {{0, .1, .5, .4}, {0, .3, .4, .3}}, method);
  for (const Index h : {0, 1}) EXPECT_EQ(given.cache.kept(given.id, 0, h), (Positions{2, 3})) << "head " << h;
}

// ---- PyramidKV

TEST(SpecExamples, PyramidKvModes) {
  // C = 320, W = 64, 32 layers, 4096 tokens
  const std::vector<Index> available(32, 4096);
  std::vector<double> scratch(32);
  std::vector<Index> keep(32);
  const auto sum = [&] { return std::accumulate(keep.begin(), keep.end(), Index{0}); };
  Pyramid{.window = 64, .mode = Mode::reference}.allocate(nullptr, available.data(), 32, 32 * 320, scratch.data(),
                                                          keep.data());
  EXPECT_EQ(keep[0], 500 + 64);
  EXPECT_EQ(keep[1], 485 + 64);
  EXPECT_EQ(keep[31], 35 + 64);
  EXPECT_EQ(sum(), 8560 + 32 * 64) << "4.5 % above the budget";
  Pyramid{.window = 64}.allocate(nullptr, available.data(), 32, 32 * 320, scratch.data(), keep.data());
  EXPECT_EQ(keep[0], 499 + 64);
  EXPECT_EQ(keep[31], 13 + 64);
  EXPECT_EQ(sum(), 32 * 320);
}

// ---- Ada-KV

TYPED_TEST(SpecExample, AdaKvSharesTheBudgetOfALayer) {
  const std::vector<std::vector<double>> rows{{.90, .05, .03, .02}, {.30, .28, .22, .20}};
  Prompt p;
  p.model = GivenAttention<typename TestFixture::B>::model(2, 4);
  p.queries.emplace_back(4, 2, 4), p.keys.emplace_back(4, 2, 4), p.values.emplace_back(4, 2, 1);
  for (Index t = 0; t < 4; ++t)
    for (Index h = 0; h < 2; ++h) {
      p.keys[0].at(t, h, t) = 1;
      p.queries[0].at(3, h, t) = std::log(rows[static_cast<std::size_t>(h)][static_cast<std::size_t>(t)]);
    }
  const auto kept = [&](double floor, Mode mode = Mode::paper) {
    const Compressor method{LastRow{}, Uniform{}, TopK{.heads = SelectHeads::shared, .floor = floor, .mode = mode},
                            Keep::tokens(2)};
    FedCache<typename TestFixture::B> fed(this->be(), p);
    fed.feed(method, 0, 4);
    fed.cache.compress(fed.id, method);
    return std::pair{fed.cache.kept(fed.id, 0, 0), fed.cache.kept(fed.id, 0, 1)};
  };
  const std::pair shared{Positions{0}, Positions{0, 1, 2}}, even{Positions{0, 1}, Positions{0, 1}};
  EXPECT_EQ(kept(0), shared);
  EXPECT_EQ(kept(0.2), shared) << "1.2 and 2.8";
  EXPECT_EQ(kept(1), even);

  EXPECT_EQ(kept(0, Mode::reference), shared);
  EXPECT_EQ(kept(0.2, Mode::reference), (std::pair{Positions{0}, Positions{0, 1}}))
      << "0.8 and 2.4: the rounding of the released code loses the fourth token";
  EXPECT_EQ(kept(0.5, Mode::reference), even) << "1.5 and 2.5, halves to even";
}

// ---- TopV

/// Three tokens in a row, features of one channel.
TYPED_TEST(SpecExample, TopVShareOfTheOutputThatATokenSupplies) {
  FeatureSet set;
  set.sources = set.targets = oracle::Array3(3, 1, 1);
  set.sources.values = {0, 1, 3}, set.targets.values = {0, 1, 2};
  set.positions = {0, 1, 2}, set.x = {0, 1, 2}, set.y = {0, 0, 0}, set.image = {0, 0, 0};
  const HeldFeatures<typename TestFixture::B> held(this->be(), set);
  const Prompt p = random_prompt(1, 1, 3, 1, 1, {{.begin = 0, .end = 3, .token_class = TokenClass::image}});
  Compressor method{Transport{.gamma = 0.5, .sigma = 1, .epsilon = 0.5}, Uniform{}, TopK{.among = visual}, Keep::tokens(2)};
  const auto expect = [&](const std::vector<double>& wanted, const Positions& kept) {
    FedCache<typename TestFixture::B> fed(this->be(), p);
    fed.append(0, 3);
    fed.cache.observe_features(fed.id, method, held.get());
    const LayerScores got = fed.cache.scores(fed.id, 0, method);
    for (std::size_t i = 0; i < 3; ++i) EXPECT_NEAR(static_cast<double>(got.values[0][i]), wanted[i], 1e-6) << "token " << i;
    fed.cache.compress(fed.id, method);
    if (!kept.empty()) {
      EXPECT_EQ(fed.cache.kept(fed.id, 0, 0), kept);
    }
  };
  expect({0.244398, 0.586002, 0.169600}, Positions{0, 1});
  method.scorer.plan = TransportPlan::balanced;
  expect({0.333625, 0.332749, 0.333625}, Positions{0, 2});
  method.scorer.rounds = 100;  // as if it had ended on the rows: the cost no longer tells
  expect({1. / 3, 1. / 3, 1. / 3}, {});
}

}  // namespace
}  // namespace kvpare::test

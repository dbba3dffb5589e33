// Methods with budgets or rules of their own against the papers' textbook versions: VL-Cache, PrefixKV, ZipVL, CORM, QAQ's
// recent attention, KVCrush, ChunkKV, samples of what goes.
#include <gtest/gtest.h>

#include "oracle/accumulated_attention.hpp"
#include "oracle/cache_merging.hpp"
#include "oracle/corm.hpp"
#include "oracle/key_norm.hpp"
#include "oracle/prefix_kv.hpp"
#include "oracle/recent_maximum.hpp"
#include "oracle/representatives.hpp"
#include "oracle/rope.hpp"
#include "oracle/vl_cache.hpp"
#include "oracle/zip_vl.hpp"
#include "support/prompt_cases.hpp"
#include "support/tolerance.hpp"

namespace kvpare::test {
namespace {

template <class Rig>
class Rules : public OnRig<Rig> {};
TYPED_TEST_SUITE(Rules, PipelineRigs, RigNames);

std::vector<bool> visual_tokens(const Prompt& p) {
  std::vector<bool> mask;
  for (const TokenClass c : p.classes()) mask.push_back(visual.has(c));
  return mask;
}

// ---- VL-Cache

Kept wanted_kept(const Prompt& p, const Compressor<PostVision, Density>& m) {
  const auto rows = oracle::post_vision_rows(visual_tokens(p), m.scorer.max_rows, m.scorer.fallback);
  std::vector<double> densities;
  std::vector<oracle::Array2> scores;
  for (Index l = 0; l < p.layers(); ++l) {
    const auto at = static_cast<std::size_t>(l);
    const auto seen =
        oracle::vl_cache_scores(p.queries[at], p.keys[at], settings_of(p.shape(l)), rows.first, m.scorer.p);
    densities.push_back(seen.density);
    scores.push_back(oracle::mean_per_kv_head(seen.scores, p.shape(l).kv_heads));
  }
  const std::vector<Index> all(static_cast<std::size_t>(p.layers()), p.tokens());
  const auto budgets =
      oracle::vl_cache_budgets(densities, all, oracle::total_tokens(m.keep.amount, all), m.budget.least);
  const auto released = oracle::vl_cache_reference(densities, p.tokens(), oracle::total_tokens(m.keep.amount, all),
                                                   m.selector.recent_share, m.budget.least);
  Kept kept;
  for (std::size_t l = 0; l < scores.size(); ++l) {
    auto& heads = kept.emplace_back();
    if (m.budget.mode == Mode::reference) {
      const Index window = std::min(released.window, p.tokens());
      for (Index h = 0; h < scores[l].rows; ++h)
        heads.push_back(to_positions(
            oracle::heavy_and_recent(scores[l].row(h), std::min(released.best[l], p.tokens() - window), window)));
      continue;
    }
    const Index k = std::max<Index>(0, budgets[l] - m.selector.last);
    const Index recent = static_cast<Index>(m.selector.recent_share * static_cast<double>(k) + 1e-9);
    for (Index h = 0; h < scores[l].rows; ++h) {
      auto older = scores[l].row(h);
      older.resize(older.size() - static_cast<std::size_t>(m.selector.last));
      heads.push_back(to_positions(oracle::heavy_and_recent(older, k - recent, recent)));
      for (Index t = p.tokens() - m.selector.last; t < p.tokens(); ++t)
        heads.back().push_back(static_cast<Position>(t));
    }
  }
  return kept;
}

TYPED_TEST(Rules, VlCache) {
  std::uint64_t seed = 300;
  for (const Case& c : cases_for<TypeParam>())
    for (const double ratio : is_small<TypeParam>() ? std::vector{0.1} : std::vector{0.0, 0.1, 0.6}) {
      const Prompt p = random_prompt(++seed, 3, c.tokens, c.kv_heads, c.group, c.tags);
      auto method = vl_cache();
      method.keep = Keep::ratio(ratio), method.scorer.fallback = 9;
      keeps_what_the_paper_keeps(this->be(), p, c, method, wanted_kept(p, method));
      method.scorer.max_rows = 4, method.scorer.p = 0.2, method.selector.last = 0;
      keeps_what_the_paper_keeps(this->be(), p, c, method, wanted_kept(p, method));
      method.budget.mode = method.selector.mode = Mode::reference;
      method.budget.least = 0.05;
      keeps_what_the_paper_keeps(this->be(), p, c, method, wanted_kept(p, method));
    }
}

TYPED_TEST(Rules, DensityOfHeadsThatHoldDifferentTokens) {
  // Two kv heads lose different tokens; what is measured afterwards is over what each holds.
  const Prompt p = random_prompt(77, 2, 90, 2, 2, {span(0, 30)});
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.feed(vl_cache(), 0, 60);
  auto half = vl_cache();
  half.keep = Keep::ratio(0.5);
  fed.cache.compress(fed.id, half);
  ASSERT_NE(fed.cache.kept(fed.id, 0, 0), fed.cache.kept(fed.id, 0, 1));
  const Index before = static_cast<Index>(fed.cache.kept(fed.id, 0, 0).size() + fed.cache.kept(fed.id, 1, 0).size());
  fed.feed(half, 60, 90, 7);
  const auto report = fed.cache.compress(fed.id, half);
  EXPECT_EQ(report.layer_budgets[0] + report.layer_budgets[1], 90) << "half of all that was ever given";
  EXPECT_LE(before, 62);
  for (Index l = 0; l < 2; ++l)
    for (Index h = 0; h < 2; ++h)
      EXPECT_EQ(static_cast<Index>(fed.cache.kept(fed.id, l, h).size()),
                report.layer_budgets[static_cast<std::size_t>(l)]);
}

TEST(RulesOnly, ADensityBudgetNeedsAScorerThatMeasuresIt) {
  cpu::Backend be;
  const Prompt p = random_prompt(1, 1, 20, 1, 1, {});
  FedCache<cpu::Backend> fed(be, p);
  const Compressor method{ObservationWindow{}, Density{}, TopK{}, Keep::ratio(0.5)};
  try {
    fed.feed(method, 0, 20);
    FAIL() << "was accepted";
  } catch (const InvalidArgument& e) {
    EXPECT_NE(std::string(e.what()).find("scorer observation_window does not measure"), std::string::npos) << e.what();
  }
}

// ---- lse from the engine

/// With the denominators that the engine's own attention has found the same tokens stay as with those that the scorer
/// computes; with wrong ones others do, so they are used.
TYPED_TEST(Rules, TakesTheEnginesLse) {
  using Cache = FedCache<typename TestFixture::B>;
  Prompt p = random_prompt(61, 2, 90, 2, 2, {span(5, 60)});
  p.model.layers[1].sink_logits = {0.5f, -1, 2, 0};
  p.model.layers[1].window = 40;
  Cache whole(this->be(), p);
  whole.append(0, p.tokens());
  const std::vector<std::vector<float>> lse = whole.attended_lse();
  std::vector<std::vector<float>> wrong = lse;
  for (std::size_t l = 0; l < wrong.size(); ++l)
    for (std::size_t i = 0; i < wrong[l].size(); ++i) wrong[l][i] += static_cast<float>(i % 7) * 3;

  const auto agree = [&](const auto& method) {
    for (const Index chunk : {Index{90}, Index{31}}) {
      const auto kept_with = [&](const std::vector<std::vector<float>>& given) {
        Cache fed(this->be(), p);
        fed.give_lse(given);
        fed.feed(method, 0, p.tokens(), chunk);
        fed.cache.compress(fed.id, method);
        return kept_in(fed, p);
      };
      const Kept computed = kept_with({});
      EXPECT_EQ(kept_with(lse), computed) << method.scorer.name << ", chunks of " << chunk;
      EXPECT_NE(kept_with(wrong), computed) << method.scorer.name << ", chunks of " << chunk;
    }
  };
  agree(h2o());
  agree(vl_cache());
  agree(tova());
  auto window = snap_kv();
  window.scorer.window = 8;
  agree(window);
  window.scorer.window = 34, window.scorer.rows = text, window.keep = Keep::ratio(0.6);  // rows apart from each other
  agree(window);
  auto probes = zip_vl();
  probes.scorer.tau = 0.5;
  agree(probes);
  auto recent = corm();
  recent.scorer.w = 12, recent.selector.last = 12;
  agree(recent);
  auto largest = recent_maximum();
  largest.keep = Keep::ratio(0.3);
  agree(largest);
}

TYPED_TEST(Rules, LseComesWithEveryChunkOrNone) {
  const Prompt p = random_prompt(62, 1, 40, 1, 2, {});
  FedCache<typename TestFixture::B> fed(this->be(), p), whole(this->be(), p);
  whole.append(0, 40);
  const auto lse = whole.attended_lse();
  const auto method = snap_kv();
  fed.append(0, 40);
  fed.observe(method, 0, 20, false);
  fed.give_lse(lse);
  EXPECT_NE(
      error_of([&] { fed.observe(method, 20, 20); }).find("lse was not given with earlier chunks and is given now"),
      std::string::npos);
  fed.give_lse({});
  fed.observe(method, 20, 20);
  EXPECT_EQ(fed.cache.compress(fed.id, method).layer_budgets[0], 8) << "the refused call has changed nothing";
}

// ---- PrefixKV

TYPED_TEST(Rules, PrefixKv) {
  std::uint64_t seed = 400;
  for (const Case& c : cases_for<TypeParam>())
    for (const double ratio : is_small<TypeParam>() ? std::vector{0.3} : std::vector{0.05, 0.3, 0.8}) {
      const Prompt p = random_prompt(++seed, 3, c.tokens, c.kv_heads, c.group, c.tags);
      auto method = prefix_kv();
      method.keep = Keep::ratio(ratio), method.selector.first = method.selector.last = 0;
      std::vector<std::vector<double>> scores;
      for (Index l = 0; l < p.layers(); ++l) {
        const auto at = static_cast<std::size_t>(l);
        scores.push_back(
            oracle::mean_of_layer(oracle::accumulated_attention(p.queries[at], p.keys[at], settings_of(p.shape(l)))));
      }
      const std::vector<Index> all(static_cast<std::size_t>(p.layers()), p.tokens());
      const auto budgets = oracle::prefix_budgets(scores, oracle::total_tokens(ratio, all));
      Kept wanted;
      for (std::size_t l = 0; l < scores.size(); ++l)
        wanted.emplace_back(static_cast<std::size_t>(c.kv_heads),
                            to_positions(oracle::select_top(scores[l], budgets[l])));
      keeps_what_the_paper_keeps(this->be(), p, c, method, wanted);

      // As released: the first and the last token stay, and are no part of what may go.
      method.budget.mode = Mode::reference, method.selector.first = method.selector.last = 1;
      const Index n = p.tokens(), ends = std::min<Index>(2, n);
      const auto released = oracle::prefix_budgets_reference(scores, oracle::total_tokens(ratio, all), ends);
      wanted.clear();
      for (std::size_t l = 0; l < scores.size(); ++l) {
        std::vector<bool> between(static_cast<std::size_t>(n), true);
        between.front() = between.back() = false;
        auto kept = to_positions(oracle::select_top(scores[l], std::max<Index>(0, released[l] - ends), between));
        kept.insert(kept.begin(), 0);
        if (n > 1) kept.push_back(static_cast<Position>(n - 1));
        wanted.emplace_back(static_cast<std::size_t>(c.kv_heads), kept);
      }
      keeps_what_the_paper_keeps(this->be(), p, c, method, wanted);
    }
}

TEST(RulesOnly, RatiosOfCalibrationGoThroughText) {
  const auto ratios = Ratios::mean_of(std::vector<std::vector<double>>{{0.5, 0.25, 1}, {0.25, 0.25, 0}});
  EXPECT_EQ(ratios.count, 3);
  EXPECT_EQ(print_setting(ratios), "0.375 0.25 0.5");
  Ratios read;
  EXPECT_TRUE(parse_setting("0.375  0.25 0.5", read));
  EXPECT_EQ(read, ratios);
  for (const char* words : {"", "0.5 x", "1.5", "-0.1", "0.5,0.5", "nan"})
    EXPECT_FALSE(parse_setting(words, read)) << words;
  EXPECT_THROW(Ratios::mean_of(std::vector<std::vector<double>>{{0.5}, {0.5, 0.5}}), InvalidArgument);
  EXPECT_THROW(Ratios::mean_of({}), InvalidArgument);
}

TYPED_TEST(Rules, LayerBudgetsFromATable) {
  const Prompt p = random_prompt(14, 3, 60, 2, 1, {});
  LayerRatios table;
  ASSERT_TRUE(parse_setting("0.6 0.1 0.2", table.ratios));
  Compressor method{KeyNorm{}, table, TopK{}, Keep::ratio(0.3)};
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 60);
  EXPECT_EQ(fed.cache.plan(fed.id, method).layers[0].budget, 36);
  method.keep = Keep::ratio(0.15);
  const auto report = fed.cache.compress(fed.id, method);
  EXPECT_EQ(report.layer_budgets, (std::vector<Index>{18, 3, 6})) << "the table says the shape, keep how much";
  method.budget.ratios.count = 2;
  method.keep = Keep::ratio(0.1);
  EXPECT_THROW(fed.cache.compress(fed.id, method), InvalidArgument);
}

// ---- ZipVL

TYPED_TEST(Rules, ZipVl) {
  std::uint64_t seed = 500;
  for (const Case& c : cases_for<TypeParam>())
    for (const double tau : {0.5, 0.9, 0.975}) {
      const Prompt p = random_prompt(++seed, 2, c.tokens, c.kv_heads, c.group, c.tags);
      auto method = zip_vl();
      method.scorer.tau = tau, method.scorer.recent = 6, method.scorer.random = 11, method.scorer.seed = 5;
      Kept wanted;
      for (Index l = 0; l < p.layers(); ++l) {
        const auto at = static_cast<std::size_t>(l);
        const Index earlier = c.tokens - 6;
        std::vector<Index> probes(static_cast<std::size_t>(earlier));
        std::iota(probes.begin(), probes.end(), 0);
        std::sort(probes.begin(), probes.end(), [&](Index a, Index b) {
          return random_bits(5, l, static_cast<Position>(a)) < random_bits(5, l, static_cast<Position>(b));
        });
        probes.resize(11);
        for (Index t = earlier; t < c.tokens; ++t) probes.push_back(t);
        std::sort(probes.begin(), probes.end());
        auto important =
            oracle::zipvl_select(p.queries[at], p.keys[at], settings_of(p.shape(l)), probes, tau).important;
        for (Index t = earlier; t < c.tokens; ++t) important.push_back(t);
        std::sort(important.begin(), important.end());
        important.erase(std::unique(important.begin(), important.end()), important.end());
        wanted.emplace_back(static_cast<std::size_t>(c.kv_heads), to_positions(important));
      }
      keeps_what_the_paper_keeps(this->be(), p, c, method, wanted);
    }
}

// ---- CORM

TYPED_TEST(Rules, CormAfterAPrompt) {
  std::uint64_t seed = 600;
  int tried = 0;
  for (const Case& c : cases_for<TypeParam>())
    for (const Index w : {1, 6, 30})
      for (const bool sinks : {false, true}) {
        Prompt p = random_prompt(++seed, 1, c.tokens, c.kv_heads, c.group, c.tags);
        if (sinks) p.model.layers[0].sink_logits.assign(static_cast<std::size_t>(p.shape(0).q_heads), 1.5f);
        if (sinks) p.model.layers[0].window = 25;
        auto method = corm();
        method.scorer.w = w, method.selector.last = 4;
        Kept wanted(1);
        double closest = 1;
        for (Index h = 0; h < c.kv_heads; ++h) {
          auto head = oracle::corm_prompt(p.queries[0], p.keys[0], settings_of(p.shape(0)), h, w);
          head.evict(w, 4);
          closest = std::min(closest, head.closest);
          wanted[0].push_back(to_positions(head.positions()));
        }
        if (closest < 1e-4) continue;  // a float may round to the other side
        keeps_what_the_paper_keeps(this->be(), p, c, method, wanted);
        ++tried;
      }
  EXPECT_GE(tried, 10);
}

/// One layer, every step against the rule on what each head still holds.
template <Backend B>
void corm_decodes(B& be, FairShare share) {
  constexpr Index prompt = 12, steps = 30, heads = 2, group = 3, width = 16, w = 5, recent = 3;
  const Prompt p = random_prompt(share == FairShare::keys ? 44 : 45, 1, prompt + steps, heads, group, {});
  auto method = corm();
  method.scorer.w = w, method.scorer.share = share, method.selector.last = recent;
  FedCache<B> fed(be, p);
  fed.feed(method, 0, prompt);
  fed.cache.compress(fed.id, method);
  std::vector<oracle::CormHead> held(heads);
  const auto take_row = [&](Index h, Index t) {
    oracle::CormHead& head = held[static_cast<std::size_t>(h)];
    head.hold(t);
    std::vector<std::vector<double>> rows;
    for (Index q = h * group; q < (h + 1) * group; ++q) {
      std::vector<double> logits;
      for (const Index j : head.positions())
        logits.push_back(static_cast<double>(p.shape(0).scale) * oracle::dot_of(p.queries[0], p.keys[0], t, q, j));
      rows.push_back(oracle::softmax(logits));
    }
    head.observe(rows, t, share == FairShare::keys ? 0 : t + 1);
  };
  for (Index h = 0; h < heads; ++h) {
    for (Index t = 0; t < prompt; ++t) take_row(h, t);
    held[static_cast<std::size_t>(h)].evict(w, recent);
    held[static_cast<std::size_t>(h)].closest = 1;  // the first row's only entry is its fair share, exactly
    EXPECT_EQ(fed.cache.kept(fed.id, 0, h), to_positions(held[static_cast<std::size_t>(h)].positions()));
  }
  const TensorBuffer<B> out(be, oracle::Array3(1, heads * group, width), DType::f32);
  bool differed = false;
  for (Index t = prompt; t < prompt + steps; ++t) {
    fed.append(t, 1);
    const Position at[] = {static_cast<Position>(t)};
    fed.cache.decode(0, {{.sequence = fed.id, .queries = fed.queries(0, t, 1), .positions = at, .out = out.writable()}},
                     method);
    for (Index h = 0; h < heads; ++h) {
      oracle::CormHead& head = held[static_cast<std::size_t>(h)];
      take_row(h, t);
      head.evict(w, recent);
      ASSERT_GT(head.closest, 1e-5) << "a float may round to the other side: another seed";
      ASSERT_EQ(fed.cache.kept(fed.id, 0, h), to_positions(head.positions())) << "step " << t << ", head " << h;
    }
    differed = differed || held[0].held.size() != held[1].held.size();
  }
  EXPECT_TRUE(differed) << "heads must come to hold different numbers of tokens";
}

TYPED_TEST(Rules, CormBetweenDecodeSteps) {
  corm_decodes(this->be(), FairShare::keys);
  corm_decodes(this->be(), FairShare::position);
}

TEST(RulesOnly, RulesOfTheirOwnTakeOneRowAStep) {
  const auto refused = [](const auto& method) {
    cpu::Backend be;
    const Prompt p = random_prompt(2, 1, 20, 1, 1, {});
    FedCache<cpu::Backend> fed(be, p);
    fed.feed(method, 0, 10);
    fed.append(10, 2);
    const TensorBuffer<cpu::Backend> out(be, oracle::Array3(2, 1, 16), DType::f32);
    const Position at[] = {10, 11};
    EXPECT_THROW(
        fed.cache.decode(
            0, {{.sequence = fed.id, .queries = fed.queries(0, 10, 2), .positions = at, .out = out.writable()}}, method),
        InvalidArgument)
        << method.scorer.name;
  };
  refused(corm());
  auto recent = recent_maximum();
  recent.keep = Keep::tokens(100);
  refused(recent);
}

// ---- QAQ's recent attention

Compressor<RecentMaximum, Uniform> recent_of(Index rows, Index every = 16) {
  auto method = recent_maximum();
  method.scorer = {.rows = rows, .every = std::max(rows, every)};
  return method;
}

/// What a layer's tokens score is the textbook's, of so many rows.
template <Backend B>
void expect_recent(FedCache<B>& fed, Index layer, const Compressor<RecentMaximum, Uniform>& method,
                   const std::vector<oracle::RecentAttention>& wanted, Index rows, const std::string& what) {
  const LayerScores got = fed.cache.scores(fed.id, layer, method);
  for (std::size_t h = 0; h < wanted.size(); ++h) {
    const std::vector<double> scores = wanted[h].scores(rows);
    for (std::size_t i = 0; i < scores.size(); ++i) {
      const Index position = wanted[h].held[i].position;
      const auto at = std::lower_bound(got.positions.begin(), got.positions.end(), position);
      ASSERT_TRUE(at != got.positions.end() && *at == position) << what << ", head " << h << ", position " << position;
      const float score = got.values[h][static_cast<std::size_t>(at - got.positions.begin())];
      ASSERT_GT(score, 0) << what << ": 0 is of tokens that no row has seen";
      ASSERT_TRUE(close(static_cast<double>(score), scores[i], tolerance(Operation::probability)))
          << what << ", head " << h << ", position " << position << ": " << score << ", wanted " << scores[i];
    }
  }
}

TYPED_TEST(Rules, RecentMaximumAfterAPrompt) {
  std::uint64_t seed = 650;
  for (const Case& c : cases_for<TypeParam>())
    for (const Index rows : {1, 5, 64})
      for (const bool modern : {false, true}) {
        Prompt p = random_prompt(++seed, 1, c.tokens, c.kv_heads, c.group, c.tags);
        if (modern) p.model.layers[0].sink_logits.assign(static_cast<std::size_t>(p.shape(0).q_heads), 1.5f);
        if (modern) p.model.layers[0].window = 25, p.model.layers[0].softcap = 3;
        std::vector<oracle::RecentAttention> wanted;
        for (Index h = 0; h < c.kv_heads; ++h)
          wanted.push_back(oracle::recent_attention(p.queries[0], p.keys[0], settings_of(p.shape(0)), h));
        for (const Index chunk : {c.tokens, Index{35}}) {
          if (c.tokens % chunk != 0 && c.tokens % chunk < rows) continue;
          if (chunk < rows) continue;
          FedCache<typename TestFixture::B> fed(this->be(), p, c.page_tokens);
          fed.feed(recent_of(rows), 0, c.tokens, chunk);
          expect_recent(fed, 0, recent_of(rows), wanted, rows,
                        message(c.name, ", ", rows, " rows, chunks of ", chunk, modern ? ", modern" : ""));
        }
      }
}

/// Chunks of fewer rows join by the maximum: then it is of more rows than asked for, until a longer one takes over.
TYPED_TEST(Rules, RecentMaximumOfShortChunks) {
  constexpr Index tokens = 40, rows = 5;
  const Prompt p = random_prompt(651, 1, tokens, 2, 3, {});
  std::vector<oracle::RecentAttention> wanted(2);
  const auto method = recent_of(rows);
  FedCache<typename TestFixture::B> fed(this->be(), p);
  const auto expect_after = [&](Index end, Index counted) {
    oracle::Array3 queries(end, 6, 16), keys(end, 2, 16);
    for (Index t = 0; t < end; ++t)
      for (Index c = 0; c < 16; ++c) {
        for (Index h = 0; h < 6; ++h) queries.at(t, h, c) = p.queries[0].at(t, h, c);
        for (Index h = 0; h < 2; ++h) keys.at(t, h, c) = p.keys[0].at(t, h, c);
      }
    for (Index h = 0; h < 2; ++h)
      wanted[static_cast<std::size_t>(h)] = oracle::recent_attention(queries, keys, settings_of(p.shape(0)), h);
    expect_recent(fed, 0, method, wanted, counted, message("after ", end));
  };
  fed.append(0, 3);
  fed.observe(method, 0, 3);
  expect_after(3, 5);  // nobody knows any of them
  fed.append(3, 17);
  fed.observe(method, 3, 17);
  expect_after(20, 5);
  fed.append(20, 2);
  fed.observe(method, 20, 2);
  expect_after(22, 7);
  fed.append(22, 1);
  fed.observe(method, 22, 1);
  expect_after(23, 8);
  fed.observe(method, 20, 3);  // known already
  expect_after(23, 8);
  fed.append(23, 5);
  fed.observe(method, 23, 5);
  expect_after(28, 5);
  fed.append(28, 12);
  fed.observe(method, 28, 12);
  expect_after(40, 5);
}

TYPED_TEST(Rules, RecentMaximumLeavesRowsOfNaNOut) {
  Prompt p = random_prompt(652, 1, 30, 2, 2, {});
  for (const Index head : {0, 3}) p.queries[0].at(27, head, 4) = std::numeric_limits<double>::quiet_NaN();
  std::vector<oracle::RecentAttention> wanted;
  for (Index h = 0; h < 2; ++h)
    wanted.push_back(oracle::recent_attention(p.queries[0], p.keys[0], settings_of(p.shape(0)), h));
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.feed(recent_of(5), 0, 30);
  expect_recent(fed, 0, recent_of(5), wanted, 5, "a row of NaN");
}

/// One layer, every step against the textbook on what each head still holds: at positions that `every` divides of exactly
/// `rows` rows, between them of those since the maximum began.
template <Backend B>
void recent_maximum_decodes(B& be, Index rows, Index every, Index keep) {
  constexpr Index prompt = 22, steps = 45, heads = 2, group = 3, width = 16;
  Prompt p = random_prompt(653, 1, prompt + steps, heads, group, {});
  if (rows == 1) p.queries[0].at(prompt + 3, 2, 4) = std::numeric_limits<double>::quiet_NaN();
  auto method = recent_of(rows, every);
  method.keep = Keep::tokens(keep);
  FedCache<B> fed(be, p);
  fed.feed(method, 0, prompt);
  fed.cache.compress(fed.id, method);
  std::vector<oracle::RecentAttention> held;
  for (Index h = 0; h < heads; ++h) {
    const auto head = oracle::recent_attention(p.queries[0], p.keys[0], settings_of(p.shape(0)), h);
    held.push_back(head);
    std::erase_if(held.back().held, [&](const auto& token) { return token.position >= prompt; });
    for (auto& token : held.back().held) token.shares.resize(static_cast<std::size_t>(prompt - token.position));
  }
  const auto follow = [&](Index counted, const std::string& what) {
    for (Index h = 0; h < heads; ++h) {
      oracle::RecentAttention& head = held[static_cast<std::size_t>(h)];
      const Positions kept = fed.cache.kept(fed.id, 0, h);
      ASSERT_EQ(std::ssize(kept), std::min(keep, std::ssize(head.held))) << what;
      const std::vector<double> scores = head.scores(counted);
      oracle::RecentAttention left;
      double worst_kept = 1, best_gone = 0;
      for (std::size_t i = 0; i < scores.size(); ++i)
        if (std::ranges::binary_search(kept, static_cast<Position>(head.held[i].position)))
          worst_kept = std::min(worst_kept, scores[i]), left.held.push_back(head.held[i]);
        else
          best_gone = std::max(best_gone, scores[i]);
      ASSERT_LE(best_gone, worst_kept + 1e-5) << what;
      head = left;
    }
    expect_recent(fed, 0, method, held, counted, what);
  };
  follow(rows, "the prompt");
  const TensorBuffer<B> out(be, oracle::Array3(1, heads * group, width), DType::f32);
  Index counted = rows;
  bool begun = false;
  for (Index t = prompt; t < prompt + steps; ++t) {
    fed.append(t, 1);
    const Position at[] = {static_cast<Position>(t)};
    fed.cache.decode(0, {{.sequence = fed.id, .queries = fed.queries(0, t, 1), .positions = at, .out = out.writable()}},
                     method);
    for (Index h = 0; h < heads; ++h) {
      oracle::RecentAttention& head = held[static_cast<std::size_t>(h)];
      head.hold(t);
      std::vector<std::vector<double>> of_row;
      for (Index q = h * group; q < (h + 1) * group; ++q) {
        std::vector<double> logits;
        for (const auto& token : head.held)
          logits.push_back(static_cast<double>(p.shape(0).scale) *
                           oracle::dot_of(p.queries[0], p.keys[0], t, q, token.position));
        of_row.push_back(oracle::softmax(logits));
      }
      head.observe(of_row);
    }
    ++counted;
    if ((t + rows) % every == 0) counted = 1, begun = true;
    if ((t + 1) % every == 0 && begun) {
      ASSERT_EQ(counted, rows);
    }
    follow(counted, message(rows, " of ", every, " rows, ", keep, " tokens, step ", t));
    if (::testing::Test::HasFatalFailure()) return;
  }
}

TYPED_TEST(Rules, RecentMaximumBetweenDecodeSteps) {
  recent_maximum_decodes(this->be(), 5, 16, 1000);
  recent_maximum_decodes(this->be(), 3, 8, 18);
  if constexpr (is_small<TypeParam>()) return;
  recent_maximum_decodes(this->be(), 4, 4, 1000);
  recent_maximum_decodes(this->be(), 1, 1, 12);
}

// ---- what a selector does beyond the best

TYPED_TEST(Rules, StandIns) {
  std::uint64_t seed = 700;
  constexpr bool small = is_small<TypeParam>();
  for (const Index kv_heads : small ? std::vector<Index>{3} : std::vector<Index>{4, 5})
    for (const double ratio : small ? std::vector{0.4} : std::vector{0.1, 0.4, 0.95})
      for (const double share : {0.25, 1.0}) {
        const Prompt p = random_prompt(++seed, 1, 61, kv_heads, 1, {});
        const auto scores = oracle::key_norm(p.keys[0]);
        std::vector<std::vector<double>> heads;
        for (Index h = 0; h < kv_heads; ++h) heads.push_back(scores.row(h));
        const Index budget = even(1, 61, ratio)[0];
        for (const auto& [anchor, ours] : {std::pair{oracle::CrushAnchor::alternating, Anchor::alternating},
                                           {oracle::CrushAnchor::zeros, Anchor::zeros},
                                           {oracle::CrushAnchor::ones, Anchor::ones},
                                           {oracle::CrushAnchor::mean, Anchor::mean}})
          for (const bool kept_bits : {false, true})
            for (const bool by_layer : {true, false}) {
              const bool is_even = by_layer;
              Compressor method{KeyNorm{}, Uniform{},
                                TopK{.heads = by_layer ? SelectHeads::layer : SelectHeads::kv,
                                     .represent = share,
                                     .anchor = ours,
                                     .signature = kept_bits ? Signature::kept : Signature::half,
                                     .mode = is_even ? Mode::paper : Mode::reference},
                                Keep::ratio(ratio)};
              Kept wanted(1);
              for (Index h = 0; h < kv_heads; ++h)
                wanted[0].push_back(to_positions(oracle::crush(
                    heads, by_layer ? oracle::mean_of_layer(scores) : heads[static_cast<std::size_t>(h)], budget,
                    kept_bits ? budget : 61 / 2, {.share = share, .anchor = anchor, .even = is_even})));
              keeps_what_the_paper_keeps(
                  this->be(), p, {.name = "stand-ins", .tags = {}, .tokens = 61, .kv_heads = kv_heads}, method, wanted);
            }
      }
}

TYPED_TEST(Rules, TheRandomAnchorFollowsItsSeed) {
  const Prompt p = random_prompt(3, 1, 60, 6, 1, {});
  Compressor method{KeyNorm{}, Uniform{}, TopK{.heads = SelectHeads::layer, .represent = 0.5, .anchor = Anchor::random},
                    Keep::ratio(0.3)};
  std::vector<Positions> kept;
  for (const Index seed : {1, 1, 2}) {
    method.selector.anchor_seed = seed;
    FedCache<typename TestFixture::B> fed(this->be(), p);
    fed.append(0, 60);
    fed.cache.compress(fed.id, method);
    kept.push_back(fed.cache.kept(fed.id, 0, 0));
    EXPECT_EQ(kept.back().size(), 18u);
  }
  EXPECT_EQ(kept[0], kept[1]);
  EXPECT_NE(kept[0], kept[2]);
}

TYPED_TEST(Rules, SamplesOfWhatGoes) {
  const Prompt p = random_prompt(5, 1, 61, 2, 1, {});
  const auto scores = oracle::key_norm(p.keys[0]);
  for (const double ratio : {0.05, 0.2, 0.5, 0.9})
    for (const Index every : {2, 4, 9}) {
      const Compressor method{KeyNorm{}, Uniform{}, TopK{.recover = every}, Keep::ratio(ratio)};
      Kept wanted(1);
      for (Index h = 0; h < 2; ++h)
        wanted[0].push_back(to_positions(oracle::with_samples(scores.row(h), even(1, 61, ratio)[0], every)));
      keeps_what_the_paper_keeps(this->be(), p, {.name = message("every ", every), .tags = {}, .tokens = 61}, method,
                                 wanted);
    }
}

TYPED_TEST(Rules, ChunksStayOrGoTogether) {
  const Prompt p = random_prompt(6, 1, 61, 2, 1, {});
  const auto scores = oracle::key_norm(p.keys[0]);
  for (const double ratio : {0.1, 0.35, 0.9})
    for (const Index chunk : {2, 10, 100}) {
      const Compressor method{KeyNorm{}, Uniform{}, TopK{.chunk = chunk}, Keep::ratio(ratio)};
      Kept wanted(1);
      for (Index h = 0; h < 2; ++h)
        wanted[0].push_back(
            to_positions(oracle::select_top(oracle::chunk_means(scores.row(h), chunk), even(1, 61, ratio)[0])));
      keeps_what_the_paper_keeps(this->be(), p, {.name = message("chunk ", chunk), .tags = {}, .tokens = 61}, method,
                                 wanted);
    }
}

TYPED_TEST(Rules, TheEndsOfAListStay) {
  const Prompt p = random_prompt(8, 1, 60, 2, 1, {span(10, 50)});
  const Compressor method{KeyNorm{}, Uniform{}, TopK{.among = visual, .first = 3, .last = 2}, Keep::ratio(0.25)};
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 60);
  fed.cache.compress(fed.id, method);
  const auto kept = fed.cache.kept(fed.id, 0, 1);
  EXPECT_EQ(kept.size(), 20u + 10u) << "the ends are part of the budget";
  for (const Position t : {10, 11, 12, 48, 49}) EXPECT_TRUE(std::binary_search(kept.begin(), kept.end(), t)) << t;
  // And at decode.
  Compressor tiny = method;
  tiny.keep = Keep::tokens(7), tiny.selector.among = all_tokens;
  const TensorBuffer<typename TestFixture::B> out(this->be(), oracle::Array3(1, 2, 16), DType::f32);
  const Position at[] = {59};
  fed.cache.decode(0, {{.sequence = fed.id, .queries = fed.queries(0, 59, 1), .positions = at, .out = out.writable()}},
                   tiny);
  const auto left = fed.cache.kept(fed.id, 0, 1);
  EXPECT_EQ(left.size(), 7u);
  for (const Position t : {0, 1, 2, 58, 59}) EXPECT_TRUE(std::binary_search(left.begin(), left.end(), t)) << t;
}

TYPED_TEST(Rules, FirstLayersStayWhole) {
  const Prompt p = random_prompt(9, 3, 40, 2, 1, {});
  const Compressor method{KeyNorm{}, Uniform{}, TopK{.skip_layers = 1}, Keep::ratio(0.25)};
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 40);
  const auto report = fed.cache.compress(fed.id, method);
  EXPECT_EQ(report.layer_budgets, (std::vector<Index>{-1, 10, 10})) << "a quarter of the layers that take part";
  EXPECT_EQ(fed.cache.kept(fed.id, 0, 0).size(), 40u);
  Compressor step = method;
  step.keep = Keep::tokens(10);
  const TensorBuffer<typename TestFixture::B> out(this->be(), oracle::Array3(1, 2, 16), DType::f32);
  const Position at[] = {39};
  for (const Index layer : {0, 1}) {
    fed.cache.decode(
        layer, {{.sequence = fed.id, .queries = fed.queries(layer, 39, 1), .positions = at, .out = out.writable()}},
        step);
    EXPECT_EQ(fed.cache.kept(fed.id, layer, 1).size(), layer == 0 ? 40u : 5u) << "layer " << layer;
  }
}

// ---- a fixed point of the list

TYPED_TEST(Rules, FixedPointBetweenDecodeSteps) {
  for (const auto& [tokens, ratio, distance] : {std::tuple{Index{40}, 0.5, Index{-25}},
                                                {Index{60}, 0.5, Index{-25}},
                                                {Index{40}, 0.35, Index{-3}},
                                                {Index{40}, 0.5, Index{4}}}) {
    const Index steps = 25;
    const Prompt p = random_prompt(12, 2, tokens + steps, 2, 1, {});
    Compressor prune{KeyNorm{}, Uniform{}, TopK{.heads = SelectHeads::layer}, Keep::ratio(ratio)};
    auto step = fixed_point();
    step.scorer.distance = distance;
    FedCache<typename TestFixture::B> fed(this->be(), p);
    fed.append(0, tokens);
    fed.cache.compress(fed.id, prune);
    const TensorBuffer<typename TestFixture::B> out(this->be(), oracle::Array3(1, 2, 16), DType::f32);
    for (Index l = 0; l < 2; ++l) {
      const auto after = fed.cache.kept(fed.id, l, 0);
      std::vector<Index> held(after.begin(), after.end());
      const Index f = oracle::fixed_index(static_cast<Index>(held.size()), distance);
      EXPECT_EQ(step.scorer.place(static_cast<Index>(held.size())), f);
      const double left = static_cast<double>(held.size()) / static_cast<double>(tokens);
      for (Index t = tokens; t < tokens + steps; ++t) {
        fed.append(l, t, 1);
        held.push_back(t);
        const Position at[] = {static_cast<Position>(t)};
        fed.cache.decode(
            l, {{.sequence = fed.id, .queries = fed.queries(l, t, 1), .positions = at, .out = out.writable()}}, step);
        held = oracle::fixed_point_decode(held, f, t + 1, left);
        ASSERT_EQ(fed.cache.kept(fed.id, l, 1), to_positions(held)) << "step " << t << ", distance " << distance;
      }
    }
  }
}

TEST(RulesOnly, WhatGoesOnFromCompressNeedsACompress) {
  cpu::Backend be;
  const Prompt p = random_prompt(2, 1, 20, 1, 1, {});
  FedCache<cpu::Backend> fed(be, p);
  fed.append(0, 10);
  const TensorBuffer<cpu::Backend> out(be, oracle::Array3(1, 1, 16), DType::f32);
  const Position at[] = {9};
  const auto step = [&](const auto& method) {
    fed.cache.decode(0, {{.sequence = fed.id, .queries = fed.queries(0, 9, 1), .positions = at, .out = out.writable()}},
                     method);
  };
  EXPECT_THROW(step(fixed_point()), InvalidArgument);
  fed.cache.compress(fed.id, Compressor{KeyNorm{}, Uniform{}, TopK{}, Keep::ratio(0.5)});
  EXPECT_NO_THROW(step(fixed_point()));
  auto in_tokens = fixed_point();
  in_tokens.keep = Keep::tokens(5);
  EXPECT_THROW(step(in_tokens), InvalidArgument);
}

// ---- merging

/// Rows of a head as the cache holds them, by token.
template <Backend B, class Cache>
std::vector<std::vector<double>> rows_of(B& be, const Cache& cache, SequenceId id, Index head, Side side, Index width) {
  const auto lists = cache.pages(id, 0);
  const Index tokens = static_cast<Index>(cache.kept(id, 0, head).size());
  const auto memory = upload(be, std::vector<float>(static_cast<std::size_t>(tokens * width), -1.0f));
  const GatherRow gather{lists[static_cast<std::size_t>(head)], side, nullptr, width, memory.data()};
  be.gather(std::span(&gather, 1));
  const auto floats = download(be, memory);
  std::vector<std::vector<double>> rows;
  for (Index t = 0; t < tokens; ++t) rows.emplace_back(floats.begin() + t * width, floats.begin() + (t + 1) * width);
  return rows;
}

/// Token t has value t; short keys are those of tokens 2 and 5.
Prompt to_merge() {
  Prompt p = random_prompt(1, 1, 8, 2, 1, {}, 4);
  for (Index t = 0; t < 8; ++t)
    for (Index h = 0; h < 2; ++h)
      for (Index d = 0; d < 4; ++d) {
        p.values[0].at(t, h, d) = static_cast<double>(t + 100 * h);
        p.keys[0].at(t, h, d) = (t == 2 || t == 5 ? 1 : 8) + static_cast<double>(t);
      }
  return p;
}

Compressor<KeyNorm, Uniform> merging(bool ends_absorb) {
  return {
      KeyNorm{}, Uniform{},
      TopK{.heads = SelectHeads::layer, .first = 1, .last = 1, .merge = MergeInto::nearest, .ends_absorb = ends_absorb},
      Keep::tokens(4)};
}

TYPED_TEST(Rules, WhatGoesIsAveragedIntoTheNearestThatStays) {
  const Prompt p = to_merge();
  for (const bool ends_absorb : {true, false}) {
    FedCache<typename TestFixture::B> fed(this->be(), p);
    fed.append(0, 8);
    const auto report = fed.cache.compress(fed.id, merging(ends_absorb));
    ASSERT_EQ(fed.cache.kept(fed.id, 0, 1), (Positions{0, 2, 5, 7}));
    EXPECT_EQ(report.tokens_merged, 8) << "four of each head";
    EXPECT_EQ(report.tokens_not_merged, 0);
    const std::vector<double> wanted = ends_absorb ? std::vector{0.5, 2.5, 5.0, 7.0} : std::vector{0.0, 2.0, 5.0, 7.0};
    for (Index h = 0; h < 2; ++h) {
      const auto values = rows_of(this->be(), fed.cache, fed.id, h, Side::values, 4);
      const auto keys = rows_of(this->be(), fed.cache, fed.id, h, Side::keys, 4);
      for (std::size_t i = 0; i < 4; ++i) EXPECT_EQ(values[i][3], wanted[i] + 100 * static_cast<double>(h)) << i;
      // Keys: 8 9 | 3 11 12 | 13 7 13 | 15 …, as the values go.
      EXPECT_NEAR(keys[1][0], ends_absorb ? (3 + 11) / 2.0 : (9 + 3 + 11) / 3.0, 1e-6);
      EXPECT_NEAR(keys[2][0], (12 + 6 + 14) / 3.0, 1e-6);
    }
  }
}

/// Keys in halves, values in bfloat16: each merged number is rounded once, as its page holds it.
TYPED_TEST(Rules, MergedRowsAreOfTheTypeOfTheirPages) {
  using Be = typename TestFixture::B;
  const Prompt p = to_merge();
  KvCache<Be, Formats<Pair<Raw<half>, Raw<bfloat16>>>> cache(this->be(), p.model,
                                                             {.page_tokens = 16, .pool_bytes = 1 << 20});
  const SequenceId id = cache.create();
  const TensorBuffer<Be> keys(this->be(), p.keys[0], DType::f32), values(this->be(), p.values[0], DType::f32);
  const Position positions[] = {0, 1, 2, 3, 4, 5, 6, 7};
  ASSERT_EQ(cache.append(id, 0, keys.tensor(), values.tensor(), positions), Outcome::done);
  cache.compress(id, merging(false));
  ASSERT_EQ(cache.kept(id, 0, 1), (Positions{0, 2, 5, 7}));
  for (Index h = 0; h < 2; ++h) {
    const auto k = rows_of(this->be(), cache, id, h, Side::keys, 4),
               v = rows_of(this->be(), cache, id, h, Side::values, 4);
    const std::vector<double> wanted{8, (9 + 3 + 11) / 3.0, (12 + 6 + 14) / 3.0, 15};
    for (std::size_t i = 0; i < 4; ++i)
      for (std::size_t c = 0; c < 4; ++c) EXPECT_EQ(k[i][c], rounded(wanted[i], DType::f16)) << "token " << i;
    for (const auto& [i, value] : {std::pair<std::size_t, double>{0, 0}, {1, 2}, {2, 5}, {3, 7}})
      EXPECT_EQ(v[i][3], value + 100 * static_cast<double>(h));
  }
}

TYPED_TEST(Rules, MergingLeavesSharedPagesAsTheyAre) {
  const Prompt p = to_merge();
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 8);
  const SequenceId other = fed.cache.fork(fed.id);
  const auto report = fed.cache.compress(fed.id, merging(false));
  EXPECT_EQ(report.tokens_merged, 8);
  const auto merged = rows_of(this->be(), fed.cache, fed.id, 1, Side::values, 4);
  EXPECT_EQ(merged[1][0], 102);
  const auto untouched = rows_of(this->be(), fed.cache, other, 1, Side::values, 4);
  ASSERT_EQ(untouched.size(), 8u);
  for (std::size_t t = 0; t < 8; ++t) EXPECT_EQ(untouched[t][0], 100 + static_cast<double>(t));
  fed.cache.release(other);
  fed.cache.release(fed.id);
  EXPECT_EQ(fed.cache.pool().stats().pages_in_use, 0);
}

TYPED_TEST(Rules, WithoutAPageForACopyNothingIsMerged) {
  const Prompt p = to_merge();
  FedCache<typename TestFixture::B> fed(this->be(), p, 16, 1 << 16);
  fed.append(0, 8);
  const SequenceId other = fed.cache.fork(fed.id);
  const TensorBuffer<typename TestFixture::B> rows(this->be(), oracle::Array3(1, 2, 4), DType::f32);
  const Position at[] = {0};
  while (fed.cache.append(fed.cache.create(), 0, rows.tensor(), rows.tensor(), at) == Outcome::done) {
  }
  const auto report = fed.cache.compress(fed.id, merging(false));
  EXPECT_EQ(report.tokens_merged, 0) << "the pool is full";
  EXPECT_EQ(report.tokens_merged + report.tokens_not_merged, 8);
  EXPECT_EQ(fed.cache.kept(fed.id, 0, 0), (Positions{0, 2, 5, 7})) << "evicted all the same";
  const auto untouched = rows_of(this->be(), fed.cache, other, 0, Side::values, 4);
  for (std::size_t t = 0; t < 8; ++t) EXPECT_EQ(untouched[t][0], static_cast<double>(t));
}

/// The tokens whose mean a survivor is, itself included; the ends of the list absorb nothing.
Positions joined_in(const Positions& kept, Position survivor, Position tokens) {
  Positions joined;
  for (Position t = 0; t < tokens; ++t) {
    Position nearest = -1;
    for (std::size_t a = 1; a + 1 < kept.size(); ++a)
      if (nearest < 0 || std::abs(kept[a] - t) < std::abs(nearest - t)) nearest = kept[a];
    const bool is_kept = std::binary_search(kept.begin(), kept.end(), t);
    if (is_kept ? t == survivor : nearest == survivor) joined.push_back(t);
  }
  return joined;
}

/// Random prompts: each head's survivors are means over the tokens nearest to them.
TYPED_TEST(Rules, ElasticCache) {
  for (const Index page : {16, 32}) {
    const Prompt p = random_prompt(91, 1, 70, 2, 2, {});
    auto method = elastic_cache();
    method.keep = Keep::ratio(0.3);
    FedCache<typename TestFixture::B> fed(this->be(), p, page);
    fed.feed(method, 0, 70, 19);
    fed.cache.compress(fed.id, method);
    const auto kept = fed.cache.kept(fed.id, 0, 0);
    ASSERT_EQ(kept.size(), 21u);
    ASSERT_EQ(kept, fed.cache.kept(fed.id, 0, 1));
    for (Index h = 0; h < 2; ++h) {
      const auto values = rows_of(this->be(), fed.cache, fed.id, h, Side::values, 16);
      for (std::size_t i = 0; i < kept.size(); ++i) {
        const Positions joined = joined_in(kept, kept[i], 70);
        double sum = 0;
        for (const Position t : joined) sum += p.values[0].at(t, h, 3);
        EXPECT_NEAR(values[i][3], sum / static_cast<double>(joined.size()), 1e-5)
            << "head " << h << ", token " << kept[i];
      }
    }
  }
}

/// As above with keys of before RoPE: each turned back by its position, their mean turned to the survivor's.
TYPED_TEST(Rules, ElasticCacheOfKeysBeforeRope) {
  for (const RopePairing pairing : {RopePairing::halves, RopePairing::interleaved}) {
    Prompt p = random_prompt(92, 1, 70, 2, 2, {});
    const Rope rope = rope_of_base(12, 100, pairing);  // of 16 channels
    p.model.layers[0].rope = rope;
    const oracle::RopeSettings settings{rope.inverse_frequencies, pairing == RopePairing::interleaved};
    auto method = elastic_cache();
    method.keep = Keep::ratio(0.3), method.selector.merge_keys = MergeKeys::unrotated;
    FedCache<typename TestFixture::B> fed(this->be(), p, 16);
    fed.feed(method, 0, 70, 19);
    EXPECT_EQ(fed.cache.compress(fed.id, method).tokens_merged, 2 * 49);
    const auto kept = fed.cache.kept(fed.id, 0, 0);
    ASSERT_EQ(kept.size(), 21u);
    for (Index h = 0; h < 2; ++h) {
      const auto keys = rows_of(this->be(), fed.cache, fed.id, h, Side::keys, 16);
      const auto values = rows_of(this->be(), fed.cache, fed.id, h, Side::values, 16);
      for (std::size_t i = 0; i < kept.size(); ++i) {
        const Positions joined = joined_in(kept, kept[i], 70);
        std::vector<double> before_rope(16, 0.0);
        double value = 0;
        for (const Position t : joined) {
          std::vector<double> key;
          for (Index c = 0; c < 16; ++c) key.push_back(p.keys[0].at(t, h, c));
          const auto back = oracle::times(oracle::transposed(oracle::rotation_matrix(settings, 16, t)), key);
          for (std::size_t c = 0; c < 16; ++c) before_rope[c] += back[c] / static_cast<double>(joined.size());
          value += p.values[0].at(t, h, 3) / static_cast<double>(joined.size());
        }
        const auto wanted = oracle::times(oracle::rotation_matrix(settings, 16, kept[i]), before_rope);
        for (std::size_t c = 0; c < 16; ++c)
          ASSERT_NEAR(keys[i][c], wanted[c], 1e-5) << "head " << h << ", token " << kept[i] << ", channel " << c;
        EXPECT_NEAR(values[i][3], value, 1e-5) << "values do not turn";
      }
    }
  }
}

/// Tokens that say the same before RoPE say it still at the place of the one that stays.
TYPED_TEST(Rules, KeysThatAreTheSameBeforeRopeMergeIntoTheirOwn) {
  Prompt p = to_merge();
  p.model.layers[0].rope = rope_of_base(4, 10);
  const RopeView rope = p.model.layers[0].rope->view();
  for (Index t = 0; t < 8; ++t)
    for (Index h = 0; h < 2; ++h) {
      std::vector<double> key{1, -2, 0.5, 3};
      rope.rotate(key.data(), static_cast<Position>(t));
      for (Index c = 0; c < 4; ++c) p.keys[0].at(t, h, c) = rounded(key[static_cast<std::size_t>(c)], DType::f32);
    }
  for (const MergeKeys which : {MergeKeys::rotated, MergeKeys::unrotated}) {
    auto method = merging(false);
    method.selector.merge_keys = which;
    FedCache<typename TestFixture::B> fed(this->be(), p);
    fed.append(0, 8);
    fed.cache.compress(fed.id, method);
    const auto kept = fed.cache.kept(fed.id, 0, 0);
    const auto keys = rows_of(this->be(), fed.cache, fed.id, 0, Side::keys, 4);
    double off = 0;
    for (std::size_t i = 0; i < kept.size(); ++i)
      for (Index c = 0; c < 4; ++c)
        off = std::max(off, std::abs(keys[i][static_cast<std::size_t>(c)] - p.keys[0].at(kept[i], 0, c)));
    if (which == MergeKeys::unrotated)
      EXPECT_LT(off, 1e-6);
    else
      EXPECT_GT(off, 0.1) << "after RoPE they are not the same";
  }
}

// ---- CaM

double cam_coin(Index seed, Index layer, Index head, Index position) {
  return static_cast<double>(
      random_unit(static_cast<std::uint64_t>(seed), layer, head, static_cast<Position>(position)));
}

/// Once after a prompt, and once more when heads hold different tokens.
TYPED_TEST(Rules, CacheMergingAddsValuesToTheNextThatStay) {
  for (const SelectHeads heads : {SelectHeads::kv, SelectHeads::layer})
    for (const Index m : {1, 3, 32}) {
      const Prompt p = random_prompt(94, 1, 70, 2, 2, {});
      auto method = cam();
      method.selector.heads = heads, method.selector.merge_into = m, method.selector.merge_seed = 5;
      if (heads == SelectHeads::kv)
        method.selector.recent_share = 0;  // the newest have collected little: all would join
      FedCache<typename TestFixture::B> fed(this->be(), p, 16);
      fed.feed(method, 0, 70, 19);
      for (const double ratio : {0.5, 0.2}) {
        method.keep = Keep::ratio(ratio);
        const LayerScores scores = fed.cache.scores(fed.id, 0, method);
        std::vector<std::vector<std::vector<double>>> keys, values;
        std::vector<Positions> held;
        for (Index h = 0; h < 2; ++h) {
          keys.push_back(rows_of(this->be(), fed.cache, fed.id, h, Side::keys, 16));
          values.push_back(rows_of(this->be(), fed.cache, fed.id, h, Side::values, 16));
          held.push_back(fed.cache.kept(fed.id, 0, h));
        }
        const auto report = fed.cache.compress(fed.id, method);
        Index merged = 0;
        for (Index h = 0; h < 2; ++h) {
          const auto at = static_cast<std::size_t>(h);
          const Positions kept = fed.cache.kept(fed.id, 0, h);
          ASSERT_EQ(kept.size(), static_cast<std::size_t>(70 * ratio));
          std::vector<Index> kept_rows;
          std::vector<double> score_of;
          for (std::size_t i = 0; i < held[at].size(); ++i) {
            if (std::ranges::binary_search(kept, held[at][i])) kept_rows.push_back(static_cast<Index>(i));
            const auto column = std::ranges::lower_bound(scores.positions, held[at][i]) - scores.positions.begin();
            score_of.push_back(static_cast<double>(scores.values[at][static_cast<std::size_t>(column)]));
          }
          const auto wanted = oracle::cache_merging(values[at], score_of, kept_rows, m, [&](Index i) {
            return cam_coin(5, 0, h, held[at][static_cast<std::size_t>(i)]);
          });
          merged += std::ssize(wanted.merged);
          EXPECT_GT(wanted.merged.size(), 0u);
          if (heads == SelectHeads::kv) {
            EXPECT_LT(wanted.merged.size(), held[at].size() - kept.size()) << "some coins say no";
          }
          const auto got = rows_of(this->be(), fed.cache, fed.id, h, Side::values, 16);
          const auto got_keys = rows_of(this->be(), fed.cache, fed.id, h, Side::keys, 16);
          for (std::size_t i = 0; i < kept.size(); ++i) {
            EXPECT_EQ(got_keys[i], keys[at][static_cast<std::size_t>(kept_rows[i])]) << "keys stay";
            for (std::size_t c = 0; c < 16; ++c)
              ASSERT_NEAR(got[i][c], wanted.values[i][c], 1e-5)
                  << "m " << m << ", ratio " << ratio << ", head " << h << ", token " << kept[i];
          }
        }
        EXPECT_EQ(report.tokens_merged, merged);
        EXPECT_EQ(report.tokens_not_merged, 0);
      }
    }
}

/// What the coins make of it on average is what eviction took away.
TEST(RulesOnly, CacheMergingKeepsTheOutputOnAverage) {
  const detail::MergeToken tokens[] = {
      {0, 0, false, true}, {1, 1, true, false}, {2, 2, false, true}, {3, 3, false, true}, {4, 4, true, false}};
  const float scores[] = {1, 2, 3, 5, 9};
  const int seeds = 20000;
  double given = 0;
  for (int seed = 0; seed < seeds; ++seed) {
    TopK selector{.merge = MergeInto::values, .merge_into = 2, .merge_seed = seed};
    const Merge merge = detail::merge_values(tokens, scores, selector, 3, 1);
    if (merge.from.empty()) continue;
    ASSERT_EQ(merge.from, (Positions{1})) << "nothing stays after token 4";
    ASSERT_EQ(merge.into, (Positions{2, 3}));
    ASSERT_EQ(merge.weights, (std::vector{0.5}));
    given += (3 * 0.5 + 5 * 0.5) / seeds;
  }
  EXPECT_NEAR(given, 2, 0.05) << "its own attention";
}

TEST(RulesOnly, CacheMergingTakesNoScoresBelowZeroAndNoNaN) {
  const auto merged = [](std::vector<float> scores) {
    const detail::MergeToken tokens[] = {{10, 0, true, false}, {11, 1, false, true}, {12, 2, false, true}};
    return detail::merge_values(tokens, scores, {.merge = MergeInto::values, .merge_into = 2}, 0, 0);
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(merged({5, 1, 1}).from, (Positions{10})) << "as sure as can be";
  EXPECT_EQ(merged({5, 0, 0}).from, (Positions{10}));
  EXPECT_TRUE(merged({0, 0, 0}).from.empty());
  EXPECT_TRUE(merged({-5, -1, -1}).from.empty());
  EXPECT_TRUE(merged({nan, 1, 1}).from.empty());
  EXPECT_TRUE(merged({5, 1, nan}).from.empty());
  // A token that came after the last observation has no score: it takes no part.
  const Merge one = merged({5, 1});
  EXPECT_EQ(one.into, (Positions{11}));
  EXPECT_EQ(one.weights, (std::vector{1.0}));
}

TEST(RulesOnly, KeysBeforeRopeNeedARope) {
  cpu::Backend be;
  Prompt p = random_prompt(93, 2, 40, 1, 1, {});
  p.model.layers[0].rope = rope_of_base(16);
  Compressor method{KeyNorm{}, Uniform{}, TopK{.merge = MergeInto::nearest, .merge_keys = MergeKeys::unrotated},
                    Keep::ratio(0.5)};
  const auto refusal = [&](Index skip) {
    method.selector.skip_layers = skip;
    FedCache<cpu::Backend> fed(be, p);
    fed.append(0, 40);
    const std::string said = error_of([&] { fed.cache.compress(fed.id, method); });
    EXPECT_EQ(fed.cache.kept(fed.id, 1, 0).size(), said == "no error" && skip < 2 ? 20u : 40u);
    return said;
  };
  EXPECT_EQ(refusal(0), "compress: merge_keys = unrotated: layer 1 has no rope, it must be said in LayerShape::rope");
  EXPECT_EQ(refusal(2), "no error") << "the layer takes no part";
  p.model.layers[1].rope = rope_of_base(8);
  EXPECT_EQ(refusal(0), "no error");
  p.model.layers[1].rope->axes = {0, 1, 2, 0};
  EXPECT_NE(refusal(0).find("the rope of layer 1 turns by three numbers of a token"), std::string::npos);
  method.selector.merge = MergeInto::none;
  EXPECT_EQ(refusal(0), "top_k: merge_keys = unrotated is for merge = nearest, which averages keys");
}

TEST(RulesOnly, APlanWhoseMergesMakeNoSenseIsRefused) {
  cpu::Backend be;
  const Prompt p = to_merge();
  FedCache<cpu::Backend> fed(be, p);
  fed.append(0, 8);
  const auto refused = [&](auto&& spoil, const char* words) {
    Plan plan = fed.cache.plan(fed.id, merging(false));
    spoil(plan.layers[0].merges);
    try {
      fed.cache.commit(plan);
      FAIL() << "was accepted";
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(words), std::string::npos) << e.what();
    }
  };
  refused([](auto& m) { m[0].into[0] = 3; }, "position 3 absorbs others but does not stay");
  refused([](auto& m) { m[1].from[0] = 2; }, "position 2 is merged but is no token that goes");
  refused([](auto& m) { m[1].from[1] = m[1].from[0]; }, "a token is merged from twice, must be once");
  refused([](auto& m) { m[1].begin.back() = 9; }, "the ranges of those, must ascend and leave out none of 4");
  refused([](auto& m) { m[1].end.back() = 9; }, "must ascend and leave out none of 4");
  refused([](auto& m) { m[1].end.pop_back(); }, "must ascend and leave out none of 4");
  refused([](auto& m) { m[1].begin.front() = -1; }, "must ascend and leave out none of 4");
  refused([](auto& m) { m[1].end.back() -= 1; }, "must ascend and leave out none of 4");
  refused([](auto& m) { m[1].end.front() -= 1; }, "must ascend and leave out none of 4");
  refused([](auto& m) { std::swap(m[0].into[0], m[0].into[1]); }, "tokens that absorb others, and the ranges");
  refused([](auto& m) { m[1].weights = {1}; }, "1 weights for 4 merged tokens, must be none: means take each once");
  refused([](auto& m) { m[0].rule = MergeRule::added_values; }, "0 weights for 4 merged tokens, must be one each");
  refused(
      [](auto& m) {
        m[0].rule = MergeRule::added_values;
        m[0].weights = {1, std::numeric_limits<double>::infinity(), 1, 1};
      },
      "must be one each, and finite");
  refused([](auto& m) { m.pop_back(); }, "has merges for 1 heads, must be 2");
  refused([](auto& m) { m[1].rule = MergeRule::unrotated_mean; },
          "commit: a merge of unrotated keys: layer 0 has no rope");
  EXPECT_EQ(fed.cache.kept(fed.id, 0, 0).size(), 8u);
}

TEST(Waits, AtMostOneInCompressAndNoneElsewhere) {
  waits_at_most_once(vl_cache());
  waits_at_most_once(prefix_kv());
  waits_at_most_once(zip_vl());
  waits_at_most_once(corm());
  auto recent = recent_maximum();
  recent.keep = Keep::ratio(0.3);
  waits_at_most_once(recent);
  waits_at_most_once(elastic_cache());
  waits_at_most_once(cam());
  waits_at_most_once(kv_crush());
  waits_at_most_once(chunk_kv());
}

}  // namespace
}  // namespace kvpare::test

// Decode under a budget against the naive simulation, step by step: what stays, what attention gives, what memory is used.
//
// The simulation computes in double, so two scores that are equal but for rounding may change places. Where the library
// keeps other tokens, the scores on both sides of the cut must be that close; then the simulation takes the library's
// choice and goes on. Inputs are such that this is rare, and a test that sees it often fails.
#include <gtest/gtest.h>

#include <functional>
#include <kvpare/pipeline/recipes.hpp>
#include <kvpare/runtime/make_compressor.hpp>
#include <kvpare/runtime/snapshot.hpp>
#include <sstream>

#include "oracle/decode_eviction.hpp"
#include "oracle/pyramid.hpp"
#include "support/prompt.hpp"
#include "support/tolerance.hpp"

namespace kvpare::test {
namespace {

using Positions = std::vector<Position>;

struct Scene {
  Index layers = 1, kv_heads = 2, group = 3, width = 8;
  Index page_tokens = 16;
  Index pool_bytes = Index{4} << 20;
  std::vector<TagSpan> tags{};
  bool modern = false;  // softcap, sliding window and sinks
};

Model model_of(const Scene& s) {
  Model model;
  for (Index l = 0; l < s.layers; ++l) {
    LayerShape shape;
    shape.kv_heads = s.kv_heads, shape.q_heads = s.kv_heads * s.group;
    shape.key_dim = s.width, shape.value_dim = s.width + 4;
    shape.scale = static_cast<float>(1.5 / std::sqrt(static_cast<double>(s.width)));
    if (s.modern) {
      shape.softcap = 6, shape.window = 40;
      for (Index h = 0; h < shape.q_heads; ++h) shape.sink_logits.push_back(static_cast<float>(h % 3) - 1);
    }
    model.layers.push_back(shape);
  }
  return model;
}

oracle::DecodeLayer simulated_layer(const LayerShape& s) {
  return {{.scale = static_cast<double>(s.scale), .softcap = static_cast<double>(s.softcap), .window = s.window},
          s.q_heads,
          s.kv_heads,
          s.value_dim,
          {s.sink_logits.begin(), s.sink_logits.end()}};
}

/// How far a score may be off, by method.
template <class S>
Tolerance score_tolerance() {
  if constexpr (std::same_as<S, AccumulatedAttention>) return {1e-5, 1e-4};  // sums over hundreds of steps
  if constexpr (std::same_as<S, LastRow>) return tolerance(Operation::probability);
  return {};
}

/// The rule of a method in the simulation's words, without budget and tags.
template <class M>
oracle::DecodeSettings rule_of(const M& method) {
  using S = decltype(method.scorer);
  oracle::DecodeSettings rule;
  rule.recent_share = method.selector.recent_share;
  if constexpr (std::same_as<S, AccumulatedAttention>) rule.evicts = oracle::Evicts::least_attended;
  if constexpr (std::same_as<S, LastRow>) rule.evicts = oracle::Evicts::least_of_last_row;
  if constexpr (std::same_as<S, SinksAndRecent>) rule.evicts = oracle::Evicts::middle, rule.sinks = method.scorer.sinks;
  return rule;
}

/// Sequences of a cache, each beside its simulation.
template <Backend B, class M>
class DecodeRun {
 public:
  using Cache = KvCache<B, Formats<Pair<Raw<float>, Raw<float>>>>;
  struct Simulated {
    std::vector<oracle::DecodeLayer> layers;
    Position next = 0;
  };

  DecodeRun(B& be, const Scene& scene, const M& chosen, std::uint64_t seed)
      : be_(be), scene_(scene),
        cache(be, model_of(scene), {.page_tokens = scene.page_tokens, .pool_bytes = scene.pool_bytes}),
        method(chosen), dice{seed} {}

  SequenceId create() {
    const SequenceId id = cache.create();
    for (const TagSpan& span : scene_.tags) cache.tag(id, span);
    for (const LayerShape& shape : cache.model().layers) held[id].layers.push_back(simulated_layer(shape));
    return id;
  }
  SequenceId fork(SequenceId id) {
    const SequenceId copy = cache.fork(id);
    held.insert_or_assign(copy, held.at(id));
    return copy;
  }
  /// The sequence goes into a stream and comes back under another name.
  SequenceId reload(SequenceId id) {
    std::stringstream stream;
    save(stream, cache, id);
    cache.release(id);
    const auto back = load(stream, cache);
    require(back.has_value(), "test: the pool is too small");
    held.insert_or_assign(*back, held.at(id));
    held.erase(id);
    return *back;
  }
  void truncate(SequenceId id, Position n) {
    cache.truncate(id, n);
    for (oracle::DecodeLayer& layer : held.at(id).layers) layer.truncate(n);
    held.at(id).next = n;
  }

  /// The simulation's settings for one layer of a sequence, `budget` of which its kv heads may hold.
  oracle::DecodeSettings settings(SequenceId id, Index budget) const {
    oracle::DecodeSettings s = rule_of(method);
    s.budget = budget;
    const Tags& tags = cache.tags(id);
    const ClassSet among = method.selector.among;
    s.counts = [&tags, among](Index p) { return among.has(tags.class_of(static_cast<Position>(p))); };
    s.is_protected = [&tags](Index p) {
      const TagSpan* span = tags.find(static_cast<Position>(p));
      return span != nullptr && span->is_protected;
    };
    return s;
  }

  /// A prompt of `tokens`, observed in chunks and compressed to what decode will hold.
  void prefill(SequenceId id, Index tokens, Index chunk, Index budget) {
    Simulated& sim = held.at(id);
    const Position first = sim.next;
    for (Index at = 0; at < tokens; at += chunk) {
      const Rows rows(*this, std::min(chunk, tokens - at), sim.next);
      for (Index l = 0; l < cache.layers(); ++l) {
        const auto& of_layer = rows.layers[static_cast<std::size_t>(l)];
        ASSERT_EQ(cache.append(id, l, of_layer.k.tensor(), of_layer.v.tensor(), rows.positions), Outcome::done);
        cache.observe(id, l, method, of_layer.q.tensor(), rows.positions, at + chunk >= tokens);
        sim.layers[static_cast<std::size_t>(l)].attend(rows.indices, of_layer.queries, of_layer.keys, of_layer.values);
      }
      sim.next += static_cast<Position>(rows.positions.size());
    }
    M once = method;
    once.keep = Keep::tokens(budget * cache.layers());
    cache.compress(id, once);
    for (Index l = 0; l < cache.layers(); ++l) compare_kept(id, l, budget, "the prompt");
    ASSERT_EQ(sim.next, first + tokens);
  }

  /// The prompt's rows are shown to nobody.
  void hold(SequenceId id, Index tokens) {
    Simulated& sim = held.at(id);
    const Rows rows(*this, tokens, sim.next);
    for (Index l = 0; l < cache.layers(); ++l) {
      const auto& of_layer = rows.layers[static_cast<std::size_t>(l)];
      ASSERT_EQ(cache.append(id, l, of_layer.k.tensor(), of_layer.v.tensor(), rows.positions), Outcome::done);
      sim.layers[static_cast<std::size_t>(l)].hold(rows.indices, of_layer.keys, of_layer.values);
    }
    sim.next += static_cast<Position>(tokens);
  }

  /// One step of all sequences together; `budget(id, layer)` is what a kv head may hold.
  void step(const std::function<Index(SequenceId, Index)>& budget, Index rows_each = 1) {
    std::vector<SequenceId> ids;
    std::vector<Rows> rows;
    for (auto& [id, sim] : held) {
      ids.push_back(id);
      rows.emplace_back(*this, rows_each, sim.next);
      sim.next += static_cast<Position>(rows_each);
    }
    for (Index l = 0; l < cache.layers(); ++l) {
      const LayerShape& shape = cache.model().layers[static_cast<std::size_t>(l)];
      std::vector<TensorBuffer<B>> out;
      std::vector<AttendRequest> batch;
      out.reserve(ids.size());
      Index live_before = 0;
      for (std::size_t i = 0; i < ids.size(); ++i) {
        const auto& of_layer = rows[i].layers[static_cast<std::size_t>(l)];
        ASSERT_EQ(cache.append(ids[i], l, of_layer.k.tensor(), of_layer.v.tensor(), rows[i].positions), Outcome::done);
        out.emplace_back(be_, oracle::Array3(rows_each, shape.q_heads, shape.value_dim), DType::f32);
        AttendRequest r;
        r.sequence = ids[i], r.queries = of_layer.q.tensor(), r.positions = rows[i].positions,
        r.out = out.back().writable();
        batch.push_back(r);
      }
      for (const SequenceId id : ids) live_before += cache.stats(id).live_tokens;
      const PoolStats pool_before = cache.pool().stats();
      const EvictReport report = cache.decode(l, std::span<const AttendRequest>(batch), method);
      const PoolStats pool_after = cache.pool().stats();
      ASSERT_EQ(report.pages_freed, pool_before.pages_in_use - pool_after.pages_in_use);
      ASSERT_EQ(report.bytes_freed, pool_before.bytes_in_use - pool_after.bytes_in_use);
      Index live_after = 0;
      for (const SequenceId id : ids) live_after += cache.stats(id).live_tokens;
      ASSERT_EQ(report.evicted, live_before - live_after);
      moved += report.rows_moved, evicted += report.evicted;

      for (std::size_t i = 0; i < ids.size(); ++i) {
        const auto& of_layer = rows[i].layers[static_cast<std::size_t>(l)];
        oracle::DecodeLayer& sim = held.at(ids[i]).layers[static_cast<std::size_t>(l)];
        const oracle::Array3 wanted = sim.attend(rows[i].indices, of_layer.queries, of_layer.keys, of_layer.values);
        const oracle::Array3 got = out[i].download();
        for (std::size_t x = 0; x < wanted.values.size(); ++x)
          ASSERT_TRUE(close(got.values[x], wanted.values[x], tolerance(Operation::attended)))
              << "sequence " << ids[i] << " layer " << l << " out " << x << " at step " << steps;
        compare_kept(ids[i], l, budget(ids[i], l), "step " + std::to_string(steps));
      }
    }
    if (steps % 8 == 0) expect_running_scores();
    ++steps;
  }
  void step(Index budget, Index rows_each = 1) {
    step([=](SequenceId, Index) { return budget; }, rows_each);
  }

  /// What H2O remembers of each token. Which token goes seldom depends on more than the newest of them.
  void expect_running_scores() const {
    if constexpr (std::same_as<decltype(method.scorer), AccumulatedAttention>)
      for (const auto& [id, sim] : held)
        for (Index l = 0; l < cache.layers(); ++l) {
          const LayerScores scores = cache.scores(id, l, method);
          const oracle::DecodeLayer& wanted = sim.layers[static_cast<std::size_t>(l)];
          for (Index h = 0; h < wanted.kv_heads(); ++h) {
            const std::vector<Index> at = wanted.positions(h);
            for (Index i = 0; i < oracle::count_of(at); ++i) {
              const auto found =
                  std::lower_bound(scores.positions.begin(), scores.positions.end(), oracle::item(at, i));
              ASSERT_TRUE(found != scores.positions.end() && *found == oracle::item(at, i));
              const float got =
                  scores
                      .values[static_cast<std::size_t>(h)][static_cast<std::size_t>(found - scores.positions.begin())];
              ASSERT_TRUE(close(static_cast<double>(got), oracle::item(wanted.gathered(h), i),
                                score_tolerance<AccumulatedAttention>()))
                  << "step " << steps << ", sequence " << id << " layer " << l << " head " << h << " position "
                  << *found;
            }
          }
        }
  }

  /// A shrunken list may not hold more pages than this while all of its tokens count.
  void expect_few_pages(Index budget) const {
    for (const auto& [id, sim] : held) {
      const SequenceStats stats = cache.stats(id);
      for (const auto& of_layer : stats.heads)
        for (const auto& head : of_layer)
          ASSERT_LE(head.pages, ceil_div(4 * budget, 3 * cache.page_tokens()) + 2)
              << head.live_tokens << " tokens in pages of " << cache.page_tokens() << " at step " << steps;
    }
  }

  void expect_few_ties() const {
    EXPECT_LE(ties * 50, choices) << "too many choices between scores that are all but equal";
  }

 private:
  /// Random rows for every layer, queries that attend unevenly.
  struct Rows {
    struct OfLayer {
      oracle::Array3 queries, keys, values;
      TensorBuffer<B> q, k, v;
      OfLayer(B& be, oracle::Array3 q_, oracle::Array3 k_, oracle::Array3 v_)
          : queries(std::move(q_)), keys(std::move(k_)), values(std::move(v_)), q(be, queries, DType::f32),
            k(be, keys, DType::f32), v(be, values, DType::f32) {}
    };
    Positions positions;
    std::vector<Index> indices;
    std::vector<OfLayer> layers;

    Rows(DecodeRun& run, Index n, Position first) {
      for (Index t = 0; t < n; ++t) positions.push_back(first + static_cast<Position>(t));
      indices.assign(positions.begin(), positions.end());
      for (const LayerShape& s : run.cache.model().layers)
        layers.emplace_back(run.be_, random_array(run.dice, n, s.q_heads, s.key_dim, DType::f32, 2),
                            random_array(run.dice, n, s.kv_heads, s.key_dim, DType::f32, 1.5),
                            random_array(run.dice, n, s.kv_heads, s.value_dim, DType::f32));
    }
  };

  /// The library's choice must be the simulation's, or as good but for rounding; the simulation follows it.
  void compare_kept(SequenceId id, Index layer, Index budget, const std::string& when) {
    oracle::DecodeLayer& sim = held.at(id).layers[static_cast<std::size_t>(layer)];
    const std::vector<oracle::EvictionChoice> wanted = sim.choose(settings(id, budget));
    for (Index h = 0; h < sim.kv_heads(); ++h) {
      const oracle::EvictionChoice& choice = oracle::item(wanted, h);
      const Positions kept = cache.kept(id, layer, h);
      const std::vector<Index> got(kept.begin(), kept.end());
      const auto where = [&] {
        return message(when, ", sequence ", id, " layer ", layer, " head ", h, ": holds ") +
               ::testing::PrintToString(got) + "\nwanted " + ::testing::PrintToString(choice.kept);
      };
      ++choices;
      if (got != choice.kept) {
        std::vector<Index> exchanged;
        std::set_symmetric_difference(got.begin(), got.end(), choice.kept.begin(), choice.kept.end(),
                                      std::back_inserter(exchanged));
        const std::vector<Index> before = sim.positions(h);
        ASSERT_TRUE(std::includes(before.begin(), before.end(), got.begin(), got.end())) << where();
        ASSERT_EQ(exchanged.size(), 2u) << where();
        ASSERT_EQ(got.size(), choice.kept.size()) << where();
        ASSERT_LE(choice.worst_kept - choice.best_gone,
                  score_tolerance<decltype(method.scorer)>().of(choice.worst_kept))
            << where();
        ++ties;
      }
      sim.keep(h, got);
    }
  }

  B& be_;
  Scene scene_;

 public:
  Cache cache;
  M method;
  Dice dice;
  std::map<SequenceId, Simulated> held;
  Index steps = 0, choices = 0, ties = 0, moved = 0, evicted = 0;
};

template <class M>
M with(M method, Index budget, Index layers = 1) {
  method.keep = Keep::tokens(budget * layers);
  return method;
}

auto streaming(Index sinks = 4) {
  auto method = streaming_llm();
  method.scorer.sinks = sinks;
  return method;
}

/// Behind the wall every verb opens and closes it, some thousand times slower than a step; there, a part will do.
template <Backend B>
constexpr bool on_fibers = [] {  // the device's kernels on the host: behind the wall, and slow beside
  if constexpr (requires(B& be) { be.runtime(); })
    return std::derived_from<std::remove_cvref_t<decltype(std::declval<B&>().runtime())>, WalledMemory>;
  else
    return false;
}();
template <Backend B>
constexpr bool is_walled = std::same_as<B, WalledBackend> || on_fibers<B>;

template <class Rig>
class Decode : public OnRig<Rig> {};
TYPED_TEST_SUITE(Decode, PipelineRigs, RigNames);

// ---- every budget, page and group

template <Backend B, class M>
void decode_from_nothing(B& be, const M& method) {
  const Index budgets[] = {1, 2, 15, 16, 17, 31, 32, 33, 40, 47, 48, 49, 63, 64, 65}, groups[] = {1, 3, 7};
  Index round = 0;
  for (const Index budget : budgets)
    for (const Index page : {16, 32, 64}) {
      if (is_walled<B> && budget % 16 != 1) continue;
      if (on_fibers<B> && (page == 64 || budget != page + 1)) continue;
      const Scene scene{.group = groups[++round % 3], .page_tokens = page};
      DecodeRun<B, M> run(be, scene, with(method, budget), static_cast<std::uint64_t>(100 * budget + page));
      run.create();
      const Index steps = on_fibers<B> ? 24 : 150;
      for (Index t = 0; t < budget + steps; ++t) {
        run.step(budget);
        if (::testing::Test::HasFailure())
          FAIL() << method.scorer.name << ", budget " << budget << ", pages of " << page;
        run.expect_few_pages(budget);
      }
      run.expect_few_ties();
      EXPECT_EQ(run.evicted, 2 * steps);
      EXPECT_LE(run.moved, 16 * run.evicted) << "rows moved for each token evicted";
    }
}

TYPED_TEST(Decode, H2oFromNothing) { decode_from_nothing(this->be(), h2o()); }
TYPED_TEST(Decode, TovaFromNothing) { decode_from_nothing(this->be(), tova()); }
TYPED_TEST(Decode, StreamingLlmFromNothing) { decode_from_nothing(this->be(), streaming()); }

// ---- after a prompt, in batches, with forks

/// Two sequences with compressed prompts of different length and one without; forks in the middle; ends that are cut off;
/// one sequence that was away in a snapshot.
template <Backend B, class M>
void decode_after_prompts(B& be, const M& method, Scene scene, std::uint64_t seed) {
  constexpr Index budget = 45;
  scene.layers = 2;
  DecodeRun<B, M> run(be, scene, with(method, budget, scene.layers), seed);
  run.prefill(run.create(), 120, 50, budget);
  run.prefill(run.create(), 61, 61, budget);
  run.create();
  const auto steps = [&](Index n) {
    const Index count = on_fibers<B> ? n / 12 : is_walled<B> ? n / 3 : n;
    for (Index t = 0; t < count && !::testing::Test::HasFailure(); ++t) run.step(budget);
  };
  steps(60);
  const SequenceId branch = run.fork(1);
  const SequenceId twig = run.fork(branch);
  steps(60);
  run.truncate(branch, run.held.at(branch).next - 7);
  run.truncate(twig, run.held.at(twig).next - 40);
  steps(50);
  run.cache.release(1);  // the branches live on
  run.held.erase(1);
  run.prefill(2, 30, 11, budget);  // another turn
  run.reload(twig);
  steps(100);
  run.expect_few_ties();
  for (const auto& [id, sim] : run.held) run.cache.release(id);
  EXPECT_EQ(run.cache.pool().stats().pages_in_use, 0);
}

TYPED_TEST(Decode, H2oGoesOnFromThePrompt) {
  decode_after_prompts(this->be(), h2o(), {.group = 1, .page_tokens = 16}, 1);
  if (!is_small<TypeParam>()) decode_after_prompts(this->be(), h2o(), {.group = 3, .page_tokens = 32}, 2);
  decode_after_prompts(this->be(), h2o(), {.kv_heads = 1, .group = 7, .page_tokens = 64, .modern = true}, 3);
}
TYPED_TEST(Decode, TovaGoesOnFromThePrompt) {
  if (!is_small<TypeParam>()) decode_after_prompts(this->be(), tova(), {.group = 1, .page_tokens = 16}, 4);
  if (!is_small<TypeParam>()) decode_after_prompts(this->be(), tova(), {.group = 3, .page_tokens = 32}, 5);
  decode_after_prompts(this->be(), tova(), {.kv_heads = 1, .group = 7, .page_tokens = 64, .modern = true}, 6);
}
TYPED_TEST(Decode, StreamingLlmGoesOnFromThePrompt) {
  decode_after_prompts(this->be(), streaming(3), {.group = 3, .page_tokens = 32, .modern = true}, 7);
}

/// H2O cannot go on from what it has not seen.
TYPED_TEST(Decode, H2oWantsToSeeThePrompt) {
  DecodeRun<typename TestFixture::B, decltype(h2o())> run(this->be(), {}, with(h2o(), 50), 8);
  const SequenceId id = run.create();
  run.hold(id, 40);
  const std::string said = error_of([&] { run.step(50); });
  EXPECT_NE(said.find("holds 41 tokens that accumulated_attention has not seen, got 1 rows"), std::string::npos)
      << said;
  EXPECT_EQ(run.cache.kept(id, 0, 0).size(), 41u);
}

// ---- what may go

/// Protected tokens are paid from the budget first; classes that are not up for eviction do not count at all.
template <Backend B, class M>
void decode_with_tags(B& be, M method, std::uint64_t seed) {
  Scene scene;
  scene.tags = {{.begin = 3, .end = 9, .token_class = TokenClass::system, .is_protected = true},
                {.begin = 12, .end = 90, .token_class = TokenClass::image},
                {.begin = 50, .end = 55, .token_class = TokenClass::image, .is_protected = true},
                {.begin = 110, .end = 160, .token_class = TokenClass::video}};
  for (const ClassSet among : {all_tokens, visual, text}) {
    if (on_fibers<B> && among != visual) continue;
    method.selector.among = among;
    for (const Index budget : {0, 4, 20, 33}) {
      if (is_walled<B> && budget != 20) continue;
      DecodeRun<B, M> run(be, scene, with(method, budget), ++seed);
      run.prefill(run.create(), 60, 25, 40);
      for (Index t = 0; t < 140; ++t) {
        run.step(budget);
        if (::testing::Test::HasFailure())
          FAIL() << method.scorer.name << ", budget " << budget << " among " << print_setting(among);
      }
      run.expect_few_ties();
    }
  }
}

TYPED_TEST(Decode, H2oLeavesProtectedTokensAndOtherClasses) { decode_with_tags(this->be(), h2o(), 20); }
TYPED_TEST(Decode, TovaLeavesProtectedTokensAndOtherClasses) { decode_with_tags(this->be(), tova(), 40); }
TYPED_TEST(Decode, StreamingLlmLeavesProtectedTokensAndOtherClasses) {
  if (is_small<TypeParam>()) GTEST_SKIP() << "runs the kernels that H2O and TOVA run";
  decode_with_tags(this->be(), streaming(2), 60);
}

TYPED_TEST(Decode, SeveralRowsAtOnce) {
  for (const Index rows : is_small<TypeParam>() ? std::vector<Index>{5} : std::vector<Index>{2, 5, 17}) {
    DecodeRun<typename TestFixture::B, decltype(h2o())> heavy(this->be(), {}, with(h2o(), 30), 80);
    DecodeRun<typename TestFixture::B, decltype(streaming())> window(this->be(), {}, with(streaming(), 30), 81);
    heavy.create(), window.create();
    for (Index t = 0; t < 40; ++t) {
      heavy.step(30, rows), window.step(30, rows);
      ASSERT_FALSE(::testing::Test::HasFailure()) << rows << " rows";
    }
    heavy.expect_few_ties();
  }
}

// ---- budgets

TYPED_TEST(Decode, ATotalIsSharedByTheBudgetRule) {
  using Be = typename TestFixture::B;
  const Scene scene{.layers = 3};
  auto even = h2o();
  even.keep = Keep::tokens(100);
  DecodeRun<Be, decltype(even)> run(this->be(), scene, even, 90);
  run.create();
  const auto uniform = oracle::uniform_budgets(100, {1000, 1000, 1000});
  for (Index t = 0; t < 90; ++t) run.step([&](SequenceId, Index l) { return uniform[static_cast<std::size_t>(l)]; });

  const Compressor steep{AccumulatedAttention{}, Pyramid{.beta = 10, .window = 5}, TopK{.recent_share = 0.5},
                         Keep::tokens(100)};
  DecodeRun<Be, std::remove_const_t<decltype(steep)>> pyramid(this->be(), scene, steep, 91);
  pyramid.create();
  auto line = oracle::pyramid_exact(100 - 3 * 5, 10, {100000, 100000, 100000});
  for (Index t = 0; t < 120; ++t)
    pyramid.step([&](SequenceId, Index l) { return 5 + line[static_cast<std::size_t>(l)]; });
  EXPECT_EQ(pyramid.cache.kept(1, 0, 0).size(), static_cast<std::size_t>(5 + line[0]));
}

TYPED_TEST(Decode, LayersThatAreNotCompressedTakeNothingOfTheTotal) {
  using Be = typename TestFixture::B;
  Model model = model_of({.layers = 3});
  model.layers[1].compress = false;
  KvCache<Be, Formats<Pair<Raw<float>, Raw<float>>>> cache(this->be(), model,
                                                           {.page_tokens = 16, .pool_bytes = 1 << 20});
  const SequenceId id = cache.create();
  auto method = streaming();
  method.keep = Keep::tokens(60);
  const TensorBuffer<Be> q(this->be(), oracle::Array3(1, 6, 8), DType::f32),
      k(this->be(), oracle::Array3(1, 2, 8), DType::f32), v(this->be(), oracle::Array3(1, 2, 12), DType::f32),
      out(this->be(), oracle::Array3(1, 6, 12), DType::f32);
  for (Position t = 0; t < 50; ++t)
    for (const Index l : {0, 1, 2}) {
      const Position at[] = {t};
      ASSERT_EQ(cache.append(id, l, k.tensor(), v.tensor(), at), Outcome::done);
      cache.decode(l, {{.sequence = id, .queries = q.tensor(), .positions = at, .out = out.writable()}}, method);
    }
  EXPECT_EQ(cache.kept(id, 0, 0).size(), 30u);
  EXPECT_EQ(cache.kept(id, 1, 0).size(), 50u);
  EXPECT_EQ(cache.kept(id, 2, 1).size(), 30u);
  cache.compress(id, method);
  EXPECT_EQ(cache.kept(id, 0, 0).size(), 30u) << "compress and decode agree";
}

TYPED_TEST(Decode, ARatioIsOfTheTokensEverGiven) {
  auto method = streaming();
  method.keep = Keep::ratio(0.37);
  DecodeRun<typename TestFixture::B, decltype(method)> run(this->be(), {.layers = 2}, method, 92);
  run.create();
  for (Index t = 1; t <= 150; ++t) {
    run.step([&](SequenceId, Index l) {
      const std::vector<Index> given(2, t);
      return oracle::uniform_budgets(oracle::total_tokens(0.37, given), given)[static_cast<std::size_t>(l)];
    });
    ASSERT_FALSE(::testing::Test::HasFailure());
  }
}

// ---- ten thousand steps

/// Ten thousand, and some hundred behind the wall.
TYPED_TEST(Decode, NothingGrowsOverTenThousandSteps) {
  using Be = typename TestFixture::B;
  const auto walk = [&](const auto& method) {
    constexpr Index budget = 40;
    DecodeRun<Be, std::remove_cvref_t<decltype(method)>> run(this->be(), {.kv_heads = 2, .group = 1, .width = 4},
                                                             with(method, budget), 95);
    const SequenceId id = run.create();
    Index pages = 0, bookkeeping = 0, observation = 0;
    const Index steps = on_fibers<Be> ? 4 * budget : is_walled<Be> ? 600 : 10000;
    for (Index t = 0; t < steps; ++t) {
      run.step(budget);
      run.expect_few_pages(budget);
      ASSERT_FALSE(::testing::Test::HasFailure()) << method.scorer.name;
      const SequenceStats stats = run.cache.stats(id);
      if (t < std::min<Index>(steps / 2, 1000)) {  // until sinks, sums and lists have found their room
        pages = std::max(pages, stats.pages);
        bookkeeping = std::max(bookkeeping, stats.bookkeeping_bytes);
        observation = std::max(observation, stats.observation_bytes);
      } else {
        ASSERT_LE(stats.pages, pages) << "step " << t;
        ASSERT_LE(stats.bookkeeping_bytes, bookkeeping) << "step " << t;
        ASSERT_LE(stats.observation_bytes, observation) << "step " << t;
      }
    }
    EXPECT_LE(run.moved, 16 * run.evicted);
    run.expect_few_ties();
  };
  walk(h2o()), walk(tova()), walk(streaming());
}

// ---- methods that score without attention

TYPED_TEST(Decode, KeyNormsAndCoinsActAtDecode) {
  using Be = typename TestFixture::B;
  const Scene scene{.layers = 1, .kv_heads = 2, .group = 2};
  const auto kept_by = [&](const auto& method, auto&& score_of) {
    DecodeRun<Be, std::remove_cvref_t<decltype(method)>> run(this->be(), scene, method, 97);
    const SequenceId id = run.cache.create();
    std::vector<std::vector<std::pair<double, Position>>> held(2);
    for (Position t = 0; t < 80; ++t) {
      const oracle::Array3 q = random_array(run.dice, 1, 4, 8, DType::f32),
                           k = random_array(run.dice, 1, 2, 8, DType::f32),
                           v = random_array(run.dice, 1, 2, 12, DType::f32);
      const TensorBuffer<Be> queries(this->be(), q, DType::f32), keys(this->be(), k, DType::f32),
          values(this->be(), v, DType::f32), out(this->be(), oracle::Array3(1, 4, 12), DType::f32);
      const Position at[] = {t};
      ASSERT_EQ(run.cache.append(id, 0, keys.tensor(), values.tensor(), at), Outcome::done);
      run.cache.decode(0, {{.sequence = id, .queries = queries.tensor(), .positions = at, .out = out.writable()}},
                       method);
      for (Index h = 0; h < 2; ++h) {
        auto& head = held[static_cast<std::size_t>(h)];
        head.emplace_back(score_of(k, h, t), t);
        if (head.size() > 20) head.erase(std::min_element(head.begin(), head.end()));
        Positions wanted;
        for (const auto& [score, position] : head) wanted.push_back(position);
        std::sort(wanted.begin(), wanted.end());
        ASSERT_EQ(run.cache.kept(id, 0, h), wanted) << method.scorer.name << " step " << t << " head " << h;
      }
    }
  };
  kept_by(with(key_norm(), 20), [](const oracle::Array3& k, Index h, Position) {
    double squares = 0;
    for (Index d = 0; d < k.c; ++d) squares += k.at(0, h, d) * k.at(0, h, d);
    return -squares;
  });
  auto coin = with(random_choice(), 20);
  kept_by(coin, [&](const oracle::Array3&, Index h, Position t) {
    return static_cast<double>(random_unit(static_cast<std::uint64_t>(coin.scorer.seed), 0, h, t));
  });
}

// ---- who can not act, and mistakes

TEST(DecodeMethods, WhoCanAct) {
  const auto acts = [](const char* words) { return acts_at_decode(make_compressor(words)); };
  for (const char* words : {"h2o", "tova", "streaming_llm", "random", "key_norm", "key_diff", "lag_kv", "h2o(keep=64t)",
                            "h2o(budget=pyramid)"})
    EXPECT_TRUE(acts(words)) << words;
  for (const char* words : {"snap_kv", "ada_kv", "pyramid_kv", "air_cache", "csp", "expected_attention", "cam",
                            "h2o(keep=8p)", "h2o(keep=1MiB)", "tova(budget=strength_skewness)"})
    EXPECT_FALSE(acts(words)) << words;
  EXPECT_TRUE(acts_at_decode(h2o()));
  EXPECT_FALSE(acts_at_decode(snap_kv()));
}

TYPED_TEST(Decode, MistakesAreNamedAndChangeNothing) {
  using Be = typename TestFixture::B;
  DecodeRun<Be, decltype(tova())> run(this->be(), {}, with(tova(), 10), 98);
  const SequenceId id = run.create();
  run.step(10);
  for (Index t = 0; t < 20; ++t) run.step(10);
  const TensorBuffer<Be> q(this->be(), random_array(run.dice, 2, 6, 8, DType::f32), DType::f32),
      out(this->be(), oracle::Array3(2, 6, 12), DType::f32);
  const Positions kept = run.cache.kept(id, 0, 0);
  const std::uint64_t epoch = run.cache.epoch(id);
  const auto refused = [&](const auto& method, Index rows, const std::string& said, std::span<float* const> mass = {}) {
    const Positions at{19, 20};
    AttendRequest r;
    r.sequence = id, r.queries = q.tensor().part(0, rows), r.out = out.writable().part(0, rows), r.mass = mass;
    r.positions = std::span(at).last(static_cast<std::size_t>(rows));
    const std::string got = error_of([&] { run.cache.decode(0, {r}, method); });
    EXPECT_NE(got.find(said), std::string::npos) << got;
    EXPECT_EQ(run.cache.kept(id, 0, 0), kept);
    EXPECT_EQ(run.cache.epoch(id), epoch);
  };
  refused(snap_kv(), 1, "cannot act between decode steps");
  refused(air_cache(), 1, "decode");
  refused(ada_kv(), 1, "decode");
  auto in_pages = h2o();
  in_pages.keep = Keep::pages(3);
  refused(in_pages, 1, "must be tokens or a ratio");
  refused(run.method, 2, "row");
  float* const rows[] = {nullptr, nullptr};
  refused(run.method, 1, "mass", rows);
  run.step(10);
}

}  // namespace
}  // namespace kvpare::test

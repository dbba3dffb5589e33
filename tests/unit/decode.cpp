// Decode under a budget at its edges: what it says when it cannot act, and what sequences remember from step to step,
// turn to turn, fork to fork. That its choices are right is what conformance/decode.cpp asks.
#include <gtest/gtest.h>

#include <functional>
#include <kvpare/pipeline/recipes.hpp>

#include "oracle/decode_eviction.hpp"
#include "support/scripted_cache.hpp"
#include "support/tolerance.hpp"

namespace kvpare::test {
namespace {

using Floats = Formats<Pair<Raw<float>, Raw<float>>>;

Model model_of(Index layers, Index kv_heads = 2) {
  Model model;
  for (Index l = 0; l < layers; ++l)
    model.layers.push_back(
        {.q_heads = 2 * kv_heads, .kv_heads = kv_heads, .key_dim = 8, .value_dim = 8, .scale = 0.4f});
  return model;
}

template <class Rig>
class UnitDecode : public OnRig<Rig> {
 public:
  using C = ScriptedCache<typename Rig::Backend, Floats>;
  C cache_of(const Model& model, Index page_tokens = 16) {
    return C(this->be(), model, {.page_tokens = page_tokens, .pool_bytes = 2 << 20});
  }

  /// Attention gathered by every token of a layer, by the library and by textbook loops over all rows that were shown.
  static void expect_scores(C& c, SequenceId id, Index layer, const oracle::DecodeLayer& wanted) {
    const LayerScores got = c.cache.scores(id, layer, h2o());
    for (Index h = 0; h < wanted.kv_heads(); ++h) {
      const std::vector<Index> positions = wanted.positions(h);
      const std::vector<double>& sums = wanted.gathered(h);
      ASSERT_EQ(std::ssize(c.cache.kept(id, layer, h)), std::ssize(positions));
      for (std::size_t i = 0; i < positions.size(); ++i) {
        const auto at = std::find(got.positions.begin(), got.positions.end(), positions[i]);
        ASSERT_NE(at, got.positions.end()) << "token " << positions[i];
        const double score = static_cast<double>(
            got.values[static_cast<std::size_t>(h)][static_cast<std::size_t>(at - got.positions.begin())]);
        ASSERT_NEAR(score, sums[i], 1e-4 * (1 + sums[i])) << "head " << h << " token " << positions[i];
      }
    }
  }

  static oracle::DecodeLayer simulated(const C& c, Index layer) {
    const LayerShape& s = c.shape(layer);
    return {{.scale = static_cast<double>(s.scale)}, s.q_heads, s.kv_heads, s.value_dim};
  }
  /// The simulation is given the same rows, and takes the cache's choice.
  static void attend(C& c, oracle::DecodeLayer& sim, Index layer, const Positions& at) {
    const LayerShape& s = c.shape(layer);
    sim.attend({at.begin(), at.end()}, c.queries(layer, at).download(),
               c.rows(2, layer, at, s.kv_heads, s.key_dim, 1.5).download(),
               c.rows(3, layer, at, s.kv_heads, s.value_dim, 1).download());
  }
  static void follow(C& c, oracle::DecodeLayer& sim, SequenceId id, Index layer) {
    for (Index h = 0; h < sim.kv_heads(); ++h) {
      const Positions kept = c.cache.kept(id, layer, h);
      sim.keep(h, {kept.begin(), kept.end()});
    }
  }
};
TYPED_TEST_SUITE(UnitDecode, PipelineRigs, RigNames);

AnyCompressor method_of(const std::string& words) { return make_compressor(words); }

// ---- what it says

TYPED_TEST(UnitDecode, EveryMistakeHasASentenceAndChangesNothing) {
  auto c = this->cache_of(model_of(2));
  const SequenceId good = c.cache.create(), also = c.cache.create(), unseen = c.cache.create(),
                   ragged = c.cache.create();
  for (const SequenceId id : {good, also}) c.decode_steps(id, method_of("h2o(keep=40t, heads=layer)"), 0, 30);
  c.append(unseen, range(0, 12));
  c.decode_steps(ragged, method_of("key_norm(keep=20t)"), 0, 30);

  const Positions at{30};
  const auto q = c.rows(1, 0, range(0, 80), 4, 8, 1), out = c.rows(0, 0, range(0, 80), 4, 8, 0);
  const auto request = [&](SequenceId id, Index rows = 1) {
    static const Positions many = range(30, 80);
    return AttendRequest{.sequence = id,
                         .queries = q.tensor().part(0, rows),
                         .positions = std::span(many).first(static_cast<std::size_t>(rows)),
                         .out = out.writable().part(0, rows)};
  };
  const auto state = [&] {
    std::vector<std::string> all;
    for (const SequenceId id : {good, also, unseen, ragged})
      all.push_back(c.saved(id) + std::to_string(c.cache.epoch(id)) + " " +
                    std::to_string(c.cache.stats(id).running_bytes));
    return all;
  };
  const std::vector<std::string> before = state();
  const PoolStats pool = c.cache.pool().stats();
  const std::vector<std::byte> out_before = out.raw();
  const auto refused = [&](const std::string& said, Index layer, const std::vector<AttendRequest>& batch,
                           const AnyCompressor& method) {
    EXPECT_EQ(error_of([&] { c.cache.decode(layer, std::span<const AttendRequest>(batch), method); }), said);
    EXPECT_EQ(state(), before) << said;
    EXPECT_EQ(c.cache.pool().stats(), pool) << said;
    EXPECT_EQ(out.raw(), out_before) << "attended before it refused: " << said;
  };
  const AnyCompressor h2o = method_of("h2o(keep=40t)"), tova = method_of("tova(keep=20t)");

  refused("decode: layer = -1, must be within [0, 2)", -1, {request(good)}, h2o);
  refused("decode: layer = 2, must be within [0, 2)", 2, {request(good)}, h2o);
  AnyCompressor negative = h2o;
  negative.keep = Keep::tokens(-1);
  EXPECT_NE(error_of([&] { c.cache.decode(0, {request(good)}, negative); }), "no error");
  refused(
      "decode: observation_window scores rows of a prompt and cannot act between decode steps; observe and compress "
      "every few steps instead",
      0, {request(good)}, method_of("snap_kv"));
  refused(
      "decode: elite_window scores rows of a prompt and cannot act between decode steps; observe and compress every "
      "few "
      "steps instead",
      0, {request(good)}, method_of("air_cache"));
  refused("decode: heads = shared splits a budget over the heads at compress only, must be kv or layer", 0,
          {request(good)}, method_of("h2o(heads=shared)"));
  refused("decode: keep is in pages or bytes, must be tokens or a ratio", 0, {request(good)},
          method_of("h2o(keep=8p)"));
  refused("decode: keep is in pages or bytes, must be tokens or a ratio", 0, {request(good)},
          method_of("h2o(keep=1MiB)"));
  refused("decode: this budget needs the scores of all layers; it can be shared out at compress only", 0,
          {request(good)}, method_of("h2o(budget=strength_skewness)"));

  refused("sequence 77 does not exist (never created, or released)", 0, {request(good), request(77)}, h2o);
  refused("decode: rows = 0, must be within [1, 64]", 0, {request(good, 0)}, h2o);
  refused("decode: rows = 65, must be within [1, 64]", 0, {request(good), request(also, 65)}, h2o);
  AttendRequest wrong = request(good);
  wrong.queries.width = 7;
  refused("decode: queries are [1, 4, 7], must be [1, 4, 8]", 0, {wrong}, h2o);
  wrong = request(good), wrong.out.heads = 2;
  refused("decode: out are [1, 2, 8], must be [1, 4, 8]", 0, {wrong}, h2o);
  wrong = request(good), wrong.queries.rows = 2;
  refused("decode: queries are [2, 4, 8], must be [1, 4, 8]", 0, {wrong}, h2o);
  wrong = request(good), wrong.out.data = nullptr;
  refused("decode: out: no memory", 0, {wrong}, h2o);
  float* const mass[] = {nullptr, nullptr};
  wrong = request(good), wrong.mass = mass;
  refused("decode: 2 mass rows, must be 0", 0, {wrong}, h2o);
  refused("decode: sequence 1 is in the batch twice", 0, {request(good), request(also), request(good)}, h2o);
  refused("decode: rows = 2, last_row looks at one row at a time", 0, {request(good), request(also, 2)}, tova);
  refused(
      "decode: layer 0 holds 12 tokens that accumulated_attention has not seen, got 1 rows; observe the prompt first, "
      "and "
      "pass a row for every token appended since",
      0, {request(good), request(unseen)}, h2o);
  refused(
      "decode: layer 1 holds 12 tokens that accumulated_attention has not seen, got 3 rows; observe the prompt first, "
      "and "
      "pass a row for every token appended since",
      1, {request(unseen, 3)}, h2o);
  refused("decode: heads = layer, but head 1 of layer 0 holds other tokens than head 0; use heads = kv", 0,
          {request(good), request(ragged)}, tova);

  c.cache.decode(0, {request(good), request(also, 2)}, h2o);  // and without a mistake it works
  EXPECT_NE(out.raw(), out_before);
}

TYPED_TEST(UnitDecode, OutputsAreThoseOfAttend) {
  for (const char* words : {"h2o(keep=80t)", "tova(keep=80t)", "streaming_llm(keep=80t)", "h2o(keep=0.5)",
                            "key_diff(keep=0t)", "lag_kv(keep=80t, lag=8)"}) {
    auto c = this->cache_of(model_of(2));
    const SequenceId id = c.cache.create();
    for (Index p = 0; p < 70; ++p) {
      const SequenceId twin = c.cache.fork(id);
      const std::string got = c.decode(id, method_of(words), range(p, 1));
      c.append(twin, range(p, 1));
      std::string wanted;
      for (Index l = 0; l < 2; ++l) {
        const auto q = c.queries(l, range(p, 1));
        const TensorBuffer<typename TestFixture::B> out(this->be(), oracle::Array3(1, 4, 8), DType::f32);
        const Positions at = range(p, 1);
        c.cache.attend(l, {{.sequence = twin, .queries = q.tensor(), .positions = at, .out = out.writable()}});
        const auto raw = out.raw();
        wanted.append(reinterpret_cast<const char*>(raw.data()), raw.size());
      }
      // The fork's tokens lie in other pages, so sums may be rounded otherwise.
      for (std::size_t i = 0; i < got.size(); i += sizeof(float)) {
        float x, y;
        std::memcpy(&x, got.data() + i, sizeof x), std::memcpy(&y, wanted.data() + i, sizeof y);
        ASSERT_NEAR(x, y, 1e-5) << words << ", position " << p;
      }
      c.cache.release(twin);
    }
  }
}

// ---- what is remembered

TYPED_TEST(UnitDecode, AForkCarriesTheScoresAndGoesItsOwnWay) {
  auto c = this->cache_of(model_of(2));
  const AnyCompressor method = method_of("h2o(keep=60t)");
  const SequenceId id = c.cache.create();
  c.decode_steps(id, method, 0, 80);
  const SequenceId fork = c.cache.fork(id), idle = c.cache.fork(id);
  const std::string idle_before = c.saved(idle);
  for (Index l = 0; l < 2; ++l) {
    const LayerScores a = c.cache.scores(id, l, h2o()), b = c.cache.scores(fork, l, h2o());
    EXPECT_EQ(a.positions, b.positions);
    EXPECT_EQ(::testing::PrintToString(a.values), ::testing::PrintToString(b.values));
  }
  // Equal rows: equal choices, though pages are packed in one and not in the other. Then other rows: other choices.
  for (Index p = 80; p < 100; ++p) {
    c.decode(id, method, range(p, 1)), c.decode(fork, method, range(p, 1));
    ASSERT_EQ(c.kept(id), c.kept(fork)) << "position " << p;
  }
  const std::string id_before = c.saved(id);
  for (Index p = 1000; p < 1040; ++p) c.decode(fork, method, range(p, 1));
  EXPECT_EQ(c.saved(id), id_before) << "a fork's steps are its own";
  EXPECT_EQ(c.saved(idle), idle_before);
  c.cache.release(id), c.cache.release(fork);
  EXPECT_EQ(c.saved(idle), idle_before);
  c.decode_steps(idle, method, 80, 90);
}

/// Four rows at once, of which some are taken back: speculation.
TYPED_TEST(UnitDecode, RowsThatAreTakenBack) {
  auto c = this->cache_of(model_of(1));
  const AnyCompressor method = method_of("h2o(keep=24t)");
  const SequenceId id = c.cache.create();
  oracle::DecodeLayer sim = this->simulated(c, 0);
  Index next = 0;
  for (Index round = 0; round < 60; ++round) {
    const Positions at = range(next, 4);
    c.decode(id, method, at);
    this->attend(c, sim, 0, at);
    this->follow(c, sim, id, 0);
    const Index accepted = 1 + round % 4;
    next += accepted;
    c.cache.truncate(id, static_cast<Position>(next));
    sim.truncate(next);
    for (Index h = 0; h < 2; ++h) ASSERT_LE(std::ssize(c.cache.kept(id, 0, h)), 24);
    this->expect_scores(c, id, 0, sim);
    ASSERT_EQ(c.cache.image(id).layers[0].last_row, next - 1);
    ASSERT_FALSE(this->HasFailure()) << "round " << round;
  }
}

/// A row counts once, whoever shows it: prompts, steps, turns, with compressions between.
TYPED_TEST(UnitDecode, TurnsGoOnFromWhatWasCounted) {
  auto c = this->cache_of(model_of(1));
  const AnyCompressor method = method_of("h2o(keep=30t)");
  const SequenceId id = c.cache.create();
  oracle::DecodeLayer sim = this->simulated(c, 0);
  Index next = 0;
  const auto turn = [&](Index tokens) {
    const Positions at = range(next, tokens);
    c.append(id, at);
    c.observe(id, method, at);
    this->attend(c, sim, 0, at);
    this->expect_scores(c, id, 0, sim);
    const std::string before = c.saved(id);
    c.observe(id, method, at);
    EXPECT_EQ(c.saved(id), before) << "shown twice";
    next += tokens;
  };
  const auto compress = [&] {
    c.cache.compress(id, method);
    this->follow(c, sim, id, 0);
    this->expect_scores(c, id, 0, sim);
    // What is left of the rows counted before is shown once more.
    Positions held;
    for (const Positions& kept : c.kept(id)) held.insert(held.end(), kept.begin(), kept.end());
    std::sort(held.begin(), held.end());
    held.erase(std::unique(held.begin(), held.end()), held.end());
    c.observe(id, method, held);
    this->expect_scores(c, id, 0, sim);
    EXPECT_EQ(c.cache.image(id).layers[0].last_row, next - 1) << "a compression forgets no rows";
  };
  const auto steps = [&](Index n) {
    for (Index i = 0; i < n; ++i, ++next) {
      const Positions at = range(next, 1);
      c.decode(id, method, at);
      this->attend(c, sim, 0, at);
      this->follow(c, sim, id, 0);
    }
    this->expect_scores(c, id, 0, sim);
  };
  turn(50), compress(), steps(25), turn(20), steps(0), compress(), turn(7), compress(), steps(40), turn(1), steps(0);
  c.cache.truncate(id, static_cast<Position>(next - 1));
  sim.truncate(next - 1);
  --next;
  turn(3), compress(), steps(5);
}

/// Scores belong to one scorer. Another's steps do not count as rows that it has seen.
TYPED_TEST(UnitDecode, AnotherScorersRowsAreNotOnesOwn) {
  auto c = this->cache_of(model_of(1));
  const SequenceId id = c.cache.create(), other = c.cache.create();
  c.decode_steps(id, method_of("tova(keep=100t)"), 0, 20);
  c.append(other, range(0, 20));
  const AnyCompressor method = method_of("h2o(keep=30t)");
  c.observe(id, method, Positions{});  // begins, with nothing
  for (const SequenceId s : {id, other}) c.observe(s, method, range(0, 20));
  EXPECT_EQ(::testing::PrintToString(c.cache.scores(id, 0, h2o()).values),
            ::testing::PrintToString(c.cache.scores(other, 0, h2o()).values));
  c.decode_steps(id, method_of("tova(keep=100t)"), 20, 21);
  EXPECT_NE(error_of([&] { (void)c.cache.scores(id, 0, h2o()); }), "no error") << "gone with TOVA's step";
}

TYPED_TEST(UnitDecode, RowsToObserveMustAscend) {
  auto c = this->cache_of(model_of(1));
  const SequenceId id = c.cache.create();
  const AnyCompressor method = method_of("h2o(keep=30t)");
  c.append(id, range(0, 20)), c.observe(id, method, range(0, 10));
  const std::string before = c.saved(id);
  EXPECT_EQ(error_of([&] {
              c.observe(id, method, {12, 3, 15});
            }),
            "observe: layer 0: positions of the rows must ascend");
  EXPECT_EQ(c.saved(id), before);
}

// ---- budgets

TYPED_TEST(UnitDecode, BudgetZero) {
  for (const char* words : {"h2o(keep=0t)", "tova(keep=0t)", "streaming_llm(keep=0)", "key_norm(keep=0t)"}) {
    auto c = this->cache_of(model_of(2));
    const SequenceId id = c.cache.create();
    const AnyCompressor method = method_of(words);
    for (Index p = 0; p < 40; ++p) {
      c.decode(id, method, range(p, 1));
      for (const Positions& kept : c.kept(id)) ASSERT_TRUE(kept.empty()) << words;
      ASSERT_EQ(c.cache.pool().stats().pages_in_use, 0) << words;
    }
    EXPECT_NE(c.decode(id, method_of("streaming_llm(keep=9t)"), range(40, 5)), "");  // and it goes on
    EXPECT_EQ(c.kept(id)[0].size(), 5u);
    EXPECT_EQ(c.kept(id)[2].size(), 4u) << "9 tokens over two layers";
  }
}

TYPED_TEST(UnitDecode, RatiosAreOfWhatALayerWasGiven) {
  auto c = this->cache_of(model_of(2));
  const SequenceId id = c.cache.create();
  const AnyCompressor method = method_of("h2o(keep=0.4)");
  Index held[] = {0, 0};
  for (Index p = 0; p < 60; ++p) {
    c.decode(id, method, range(p, 1));
    const Index total = static_cast<Index>(std::floor(0.4 * 2 * static_cast<double>(p + 1) + 0.5));
    for (Index l = 0; l < 2; ++l) {
      Index& of_layer = held[static_cast<std::size_t>(l)];
      of_layer = std::min(of_layer + 1, (total + 1 - l) / 2);  // the first layer gets the odd one
      for (Index h = 0; h < 2; ++h) ASSERT_EQ(std::ssize(c.cache.kept(id, l, h)), of_layer) << "position " << p;
    }
  }
  c.cache.truncate(id, 30);
  c.decode(id, method, range(30, 1));
  for (const Positions& kept : c.kept(id)) EXPECT_LE(std::ssize(kept), 12) << "what was taken back was not given";
}

TYPED_TEST(UnitDecode, ProtectedTokensAndOtherClassesStay) {
  auto c = this->cache_of(model_of(1));
  const SequenceId id = c.cache.create();
  c.cache.tag(id, {.begin = 2, .end = 6, .token_class = TokenClass::image, .is_protected = true});
  c.cache.tag(id, {.begin = 10, .end = 30, .token_class = TokenClass::image});
  for (const char* words :
       {"h2o(keep=3t, among=image)", "key_norm(keep=3t, among=image)", "random(keep=0t, among=image)"}) {
    const SequenceId s = c.cache.fork(id);
    c.decode_steps(s, method_of(words), 0, 60);
    for (const Positions& kept : c.kept(s)) {
      Positions wanted{0, 1, 2, 3, 4,
                       5, 6, 7, 8, 9};  // four protected are more than the budget: no other image token stays
      for (Position p = 30; p < 60; ++p) wanted.push_back(p);
      EXPECT_EQ(kept, wanted) << words;
    }
    c.decode(s, method_of("streaming_llm(keep=0t, among=video)"), range(60, 1));
    EXPECT_EQ(std::ssize(c.kept(s)[0]), 41);
    c.cache.release(s);
  }
}

TYPED_TEST(UnitDecode, LayersThatPoliciesLeaveAlone) {
  Model model = model_of(3);
  model.layers[1].compress = false;
  auto c = this->cache_of(model);
  const SequenceId id = c.cache.create();
  for (const char* words : {"h2o(keep=20t)", "tova(keep=20t)", "key_norm(keep=20t)"}) {
    const Index first = c.last(id) + 1;
    c.decode_steps(id, method_of(words), first, first + 40);
    EXPECT_EQ(std::ssize(c.cache.kept(id, 0, 0)), 10);
    EXPECT_EQ(std::ssize(c.cache.kept(id, 1, 0)), first + 40) << "all of it stays";
    EXPECT_EQ(std::ssize(c.cache.kept(id, 2, 1)), 10);
    EXPECT_TRUE(c.cache.image(id).layers[1].scorer.empty()) << "and nothing is remembered";
    c.cache.truncate(id, 0);
  }
}

/// One above its budget, one below, one empty, one with another prompt: each as if alone.
TYPED_TEST(UnitDecode, ABatchIsItsSequences) {
  using Be = typename TestFixture::B;
  for (const char* words : {"h2o(keep=30t)", "tova(keep=30t, heads=kv)", "streaming_llm(keep=30t)",
                            "key_diff(keep=0.5)", "lag_kv(keep=30t, lag=4)"}) {
    auto c = this->cache_of(model_of(1));
    const AnyCompressor method = method_of(words);
    std::vector<SequenceId> together, alone;
    const Index tokens[] = {29, 4, 0, 90};
    for (const Index n : tokens)
      for (auto* ids : {&together, &alone}) {
        const SequenceId id = c.cache.create();
        ids->push_back(id);
        if (n == 0) continue;
        c.append(id, range(0, n));
        c.observe(id, method, range(0, n));
      }
    for (Index step = 0; step < 20; ++step) {
      std::vector<Positions> at;
      std::vector<TensorBuffer<Be>> q, out;
      std::vector<AttendRequest> batch;
      at.reserve(4);
      for (std::size_t i = 0; i < 4; ++i) {
        at.push_back(range(tokens[i] + step, 1));
        c.append(together[i], at[i]);
        q.push_back(c.queries(0, at[i]));
        out.emplace_back(this->be(), oracle::Array3(1, 4, 8), DType::f32);
        batch.push_back(
            {.sequence = together[i], .queries = q[i].tensor(), .positions = at[i], .out = out[i].writable()});
      }
      const EvictReport all = c.cache.decode(0, std::span<const AttendRequest>(batch), method);
      Index evicted = 0;
      for (std::size_t i = 0; i < 4; ++i) {
        const Index before = c.cache.stats(alone[i]).live_tokens + 2;
        const std::string wanted = c.decode(alone[i], method, at[i]);
        evicted += before - c.cache.stats(alone[i]).live_tokens;
        const auto raw = out[i].raw();
        ASSERT_EQ(std::string(reinterpret_cast<const char*>(raw.data()), raw.size()), wanted)
            << words << ", step " << step;
        ASSERT_TRUE(c.cache.image(together[i]) == c.cache.image(alone[i]))
            << words << ", sequence " << i << ", step " << step;
      }
      ASSERT_EQ(all.evicted, evicted);
    }
  }
}

/// What is remembered has its size by the budget, not by the steps.
TYPED_TEST(UnitDecode, RunningBytesDoNotGrow) {
  constexpr bool walled = std::same_as<typename TestFixture::B, WalledBackend>;
  for (const char* words : {"h2o(keep=50t)", "tova(keep=50t)"}) {
    auto c = this->cache_of(model_of(1));
    const SequenceId id = c.cache.create();
    const AnyCompressor method = method_of(words);
    c.decode_steps(id, method, 0, 300);
    const Index settled = c.cache.stats(id).running_bytes;
    EXPECT_LE(settled, 2 * 4 * 4 * 64)
        << "two heads, a float per slot, 4 pages that may be open and half as many again";
    for (Index p = 300; p < (walled ? 500 : 3000); ++p) {
      c.decode(id, method, range(p, 1));
      if (p % 97 == 0) c.cache.release(c.cache.fork(id));
      ASSERT_LE(c.cache.stats(id).running_bytes, settled) << words << ", position " << p;
    }
  }
}

TYPED_TEST(UnitDecode, AnEmptyBatchAndAnEmptyLayer) {
  auto c = this->cache_of(model_of(1));
  const SequenceId id = c.cache.create();
  EXPECT_EQ(c.cache.decode(0, std::span<const AttendRequest>(), method_of("h2o(keep=5t)")).evicted, 0);
  for (const char* words : {"h2o(keep=5t)", "tova(keep=5t)", "key_diff(keep=5t)"}) {
    const Positions at{3};
    const auto q = c.queries(0, at);
    const TensorBuffer<typename TestFixture::B> out(this->be(), c.rows(1, 0, at, 4, 8, 1).download(), DType::f32);
    c.cache.decode(0, {{.sequence = id, .queries = q.tensor(), .positions = at, .out = out.writable()}},
                   method_of(words));
    for (const double x : out.download().values) EXPECT_EQ(x, 0) << words << ": a row that sees nothing";
  }
}

}  // namespace
}  // namespace kvpare::test

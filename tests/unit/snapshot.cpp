// A sequence that was saved and loaded is the same sequence: attention to the last bit, and so is everything it does
// from there on. What its bytes hold, and what they do not.
#include <gtest/gtest.h>

#include <functional>
#include <kvpare/pipeline/recipes.hpp>
#include <streambuf>

#include "support/scripted_cache.hpp"
#include "support/snapshot_bytes.hpp"

namespace kvpare::test {
namespace {

using Floats = Formats<Pair<Raw<float>, Raw<float>>>;
using Halves = Formats<Pair<Raw<half>, Raw<half>>>;
using HalfAndFloat = Formats<Pair<Raw<half>, Raw<float>>>;
using Brains = Formats<Pair<Raw<bfloat16>, Raw<half>>, Pair<Raw<float>, Raw<bfloat16>>>;

/// Layers that differ in everything; the last is left alone by policies.
Model uneven_model() {
  return {{{.q_heads = 4, .kv_heads = 2, .key_dim = 8, .value_dim = 12, .scale = 0.35f},
           {.q_heads = 6,
            .kv_heads = 3,
            .key_dim = 16,
            .value_dim = 5,
            .scale = 0.2f,
            .softcap = 8,
            .window = 90,
            .sink_logits = {0, 1, -1, 0.5f, 2, -3}},
           {.q_heads = 2, .kv_heads = 1, .key_dim = 4, .value_dim = 8, .scale = 0.5f, .compress = false}}};
}

AnyCompressor h2o_of(Index tokens_per_head) { return make_compressor(message("h2o(keep=", 2 * tokens_per_head, "t)")); }

/// Prompt, observed by H2O and compressed.
template <class C>
void h2o_prompt(C& c, SequenceId id, Index tokens, Index kept) {
  c.append(id, range(0, tokens));
  c.observe(id, h2o_of(kept), range(0, tokens));
  c.cache.compress(id, h2o_of(kept));
}

template <class C>
struct History {
  const char* name;
  std::function<void(C&, SequenceId)> go;
  const char* method = "streaming_llm(keep=0.6)";  // by which it goes on
};

/// How sequences come to be what they are.
template <class C>
std::vector<History<C>> histories() {
  const char* go_on_with_h2o = "h2o(keep=80t)";
  return {
      {"empty", [](C&, SequenceId) {}, go_on_with_h2o},
      {"one token", [](C& c, SequenceId id) { c.append(id, range(5, 1)); }},
      {"a prompt", [](C& c, SequenceId id) { c.append(id, range(0, 100)); }, "tova(keep=70t)"},
      {"whole pages", [](C& c, SequenceId id) { c.append(id, range(0, 128)); }, "key_norm(keep=90t)"},
      {"gaps",
       [](C& c, SequenceId id) {
         for (const Positions& at : {Positions{3, 4, 9}, range(11, 30), range(70000, 9), Positions{70020, 140000}})
           c.append(id, at);
       },
       "key_diff(keep=50t)"},
      {"tags and protected tokens",
       [](C& c, SequenceId id) {
         c.cache.tag(id, {.begin = 2, .end = 7, .token_class = TokenClass::system, .is_protected = true});
         c.cache.tag(
             id,
             {.begin = 10, .end = 40, .token_class = TokenClass::image, .image = 3, .grid_rows = 5, .grid_cols = 6});
         c.cache.tag(id, {.begin = 20, .end = 22, .token_class = TokenClass(31), .is_protected = true});
         c.cache.tag(id, {.begin = 500, .end = 2147483647, .token_class = TokenClass::video, .image = 0});
         h2o_prompt(c, id, 70, 30);
       },
       go_on_with_h2o},
      {"heads that hold different tokens",
       [](C& c, SequenceId id) {
         c.append(id, range(0, 90));
         const AnyCompressor method = make_compressor("snap_kv(keep=0.3)");
         c.observe(id, method, range(0, 90));
         c.cache.compress(id, method);
         c.append(id, range(90, 5));
       },
       "random(keep=40t)"},
      {"decoding by H2O",
       [](C& c, SequenceId id) {
         h2o_prompt(c, id, 60, 40);
         c.decode_steps(id, h2o_of(40), 60, 110);
       },
       go_on_with_h2o},
      {"decoding by TOVA", [](C& c, SequenceId id) { c.decode_steps(id, make_compressor("tova(keep=60t)"), 0, 70); },
       "tova(keep=60t)"},
      {"scores from before another method's steps",
       [](C& c, SequenceId id) {
         h2o_prompt(c, id, 60, 40);
         c.decode_steps(id, make_compressor("key_norm(keep=70t)"), 60, 90);
       },
       "key_norm(keep=70t)"},
      {"tokens that came after the scores",
       [](C& c, SequenceId id) {
         h2o_prompt(c, id, 60, 40);
         c.append(id, range(60, 21));
       },
       "key_norm(keep=80t)"},
      {"cut in the middle of a page",
       [](C& c, SequenceId id) {
         h2o_prompt(c, id, 100, 50);
         c.decode_steps(id, h2o_of(50), 100, 120);
         c.cache.truncate(id, 113);
       },
       go_on_with_h2o},
      {"cut to nothing",
       [](C& c, SequenceId id) {
         h2o_prompt(c, id, 40, 20);
         c.cache.truncate(id, 0);
       },
       go_on_with_h2o},
      {"a fork, all pages shared",
       [](C& c, SequenceId id) {
         h2o_prompt(c, id, 70, 60);
         c.cache.fork(id);
       },
       go_on_with_h2o},
      {"a fork, evicted from and decoded by itself",
       [](C& c, SequenceId id) {
         h2o_prompt(c, id, 100, 80);
         c.cache.fork(id);
         c.decode_steps(id, h2o_of(50), 100, 130);
         c.cache.fork(id);
         c.cache.compress(id, h2o_of(30));
         c.decode_steps(id, h2o_of(30), 130, 133);
       },
       go_on_with_h2o},
      {"a head without tokens",
       [](C& c, SequenceId id) {
         c.append(id, range(0, 40));
         Plan plan = c.cache.plan(id, make_compressor("full"));
         for (Index l = 0; l < 2; ++l) {
           LayerPlan& of_layer = plan.layers[static_cast<std::size_t>(l)];
           of_layer.touched = true;
           for (const HeadPages& list : c.cache.pages(id, l)) of_layer.keep.push_back(Selection::live(list.entries));
           of_layer.keep[static_cast<std::size_t>(l)] = Selection(of_layer.keep[0].entries());
         }
         c.cache.commit(plan);
       },
       "key_norm(keep=60t)"},
      {"nothing left but what policies leave alone",
       [](C& c, SequenceId id) { c.decode_steps(id, make_compressor("h2o(keep=0t)"), 0, 40); }, go_on_with_h2o},
      {"tokens in one layer only", [](C& c, SequenceId id) { c.append(id, 1, range(0, 33)); }},
  };
}

/// Everything one can ask of both is the same.
template <class C>
void expect_same(C& c, SequenceId a, SequenceId b) {
  EXPECT_EQ(c.kept(a), c.kept(b));
  EXPECT_EQ(c.cache.tags(a), c.cache.tags(b));
  const Position last = static_cast<Position>(c.last(a));
  const Positions at{-1, 0, last / 2, last, last + 1, 2147483647};
  EXPECT_EQ(c.attend(a, at), c.attend(b, at)) << "attention";
  EXPECT_TRUE(c.cache.image(a) == c.cache.image(b));
  const SequenceStats x = c.cache.stats(a), y = c.cache.stats(b);
  EXPECT_EQ(x.live_tokens, y.live_tokens);
  EXPECT_EQ(x.pages, y.pages);
  EXPECT_EQ(x.page_bytes, y.page_bytes);
  EXPECT_EQ(x.live_bytes, y.live_bytes);
}

template <class C>
std::string refused_or(const std::function<std::string()>& act) {
  try {
    return act();
  } catch (const InvalidArgument& e) {
    return std::string("refused: ") + e.what();
  }
}

/// Steps, ends that are cut off, turns and compressions, the same for both.
template <class C>
void expect_same_future(C& c, SequenceId a, SequenceId b, const std::string& words, Index steps) {
  const AnyCompressor method = make_compressor(words);
  Index next = c.last(a) + 1, acted = 0;
  for (Index s = 1; s <= steps; ++s) {
    const auto step = [&](SequenceId id) {
      return [&c, &method, id, next] { return c.decode(id, method, range(next, 1)); };
    };
    const std::string one = refused_or<C>(step(a)), two = refused_or<C>(step(b));
    ASSERT_EQ(one, two) << "step " << s;
    ASSERT_EQ(one.find("refused"), std::string::npos) << one;
    ++next, ++acted;
    if (s % 13 == 0) {
      for (const SequenceId id : {a, b}) c.append(id, range(next, 3)), c.observe(id, method, range(next, 3));
      next += 3;
      const CompressReport x = c.cache.compress(a, method), y = c.cache.compress(b, method);
      ASSERT_EQ(x.tokens_after, y.tokens_after) << "step " << s;
      ASSERT_EQ(x.pages_freed, y.pages_freed) << "step " << s;
    }
    if (s % 17 == 0) {
      next -= 2;
      for (const SequenceId id : {a, b}) c.cache.truncate(id, static_cast<Position>(next));
    }
    ASSERT_EQ(c.kept(a), c.kept(b)) << "step " << s;
  }
  EXPECT_EQ(acted, steps);
  EXPECT_TRUE(c.cache.image(a) == c.cache.image(b)) << "after " << steps << " steps";
}

template <Backend B, class F>
void every_history_comes_back(B& be, Index page_tokens, Index steps) {
  using C = ScriptedCache<B, F>;
  for (const History<C>& history : histories<C>()) {
    SCOPED_TRACE(message(history.name, ", pages of ", page_tokens));
    C c(be, uneven_model(), {.page_tokens = page_tokens, .pool_bytes = Index{4} << 20});
    const SequenceId before = c.cache.create();  // so that pages do not come in order
    c.append(before, range(0, 40));
    const SequenceId id = c.cache.create();
    history.go(c, id);
    c.cache.release(before);

    const SequenceImage image = c.cache.image(id);
    const std::string bytes = c.saved(id);
    const std::optional<SequenceId> copy = c.loaded(bytes);
    ASSERT_TRUE(copy);
    EXPECT_TRUE(c.cache.image(id) == image) << "saving changes nothing";
    expect_same(c, id, *copy);
    EXPECT_EQ(c.saved(*copy), bytes) << "saved again";
    EXPECT_EQ(c.cache.stats(*copy).shared_pages, 0);

    // Alone again: a sequence does not write into pages that others hold, one from a snapshot has its own.
    for (SequenceId other = id + 1; other < *copy; ++other) c.cache.release(other);
    expect_same_future(c, id, *copy, history.method, steps);
    c.cache.release(id), c.cache.release(*copy);
    EXPECT_EQ(c.cache.pool().stats().pages_in_use, 0);
    ASSERT_FALSE(::testing::Test::HasFailure());
  }
}

template <class Rig>
class Snapshot : public OnRig<Rig> {};
TYPED_TEST_SUITE(Snapshot, PipelineRigs, RigNames);

TYPED_TEST(Snapshot, EveryHistoryComesBackAndGoesOnAlike) {
  using Be = typename TestFixture::B;
  constexpr bool walled = std::same_as<Be, WalledBackend>;
  if constexpr (!walled) {
    every_history_comes_back<Be, Floats>(this->be(), 32, 100);
    every_history_comes_back<Be, Halves>(this->be(), 64, 60);
    every_history_comes_back<Be, HalfAndFloat>(this->be(), 16, 60);
  }
  every_history_comes_back<Be, Brains>(this->be(), 16, walled ? 20 : 60);
}

/// The same while relatives live on: rows land in other pages then, so sums may be rounded otherwise, no more.
TYPED_TEST(Snapshot, GoesOnBesideAForkThatHoldsItsPages) {
  using C = ScriptedCache<typename TestFixture::B, Floats>;
  C c(this->be(), uneven_model(), {.page_tokens = 16, .pool_bytes = Index{4} << 20});
  const SequenceId id = c.cache.create();
  c.append(id, range(0, 77));
  c.cache.fork(id);
  const std::optional<SequenceId> copy = c.loaded(c.saved(id));
  ASSERT_TRUE(copy);
  const AnyCompressor method = make_compressor("streaming_llm(keep=80t)");
  for (Index p = 77; p < 120; ++p) {
    const std::string a = c.decode(id, method, range(p, 1)), b = c.decode(*copy, method, range(p, 1));
    ASSERT_EQ(a.size(), b.size());
    for (std::size_t i = 0; i < a.size(); i += sizeof(float)) {
      float x, y;
      std::memcpy(&x, a.data() + i, sizeof x), std::memcpy(&y, b.data() + i, sizeof y);
      ASSERT_NEAR(x, y, 1e-5) << "position " << p;
    }
    ASSERT_EQ(c.kept(id), c.kept(*copy));
  }
}

/// Pages of a format that append never chooses are as good as others.
TYPED_TEST(Snapshot, PagesOfEveryListedFormat) {
  using C = ScriptedCache<typename TestFixture::B, Formats<Pair<Raw<half>, Raw<half>>, Pair<Raw<float>, Raw<float>>>>;
  C c(this->be(), uneven_model(), {.page_tokens = 16, .pool_bytes = Index{1} << 20});
  const SequenceId id = c.cache.create();
  c.append(id, range(0, 50));
  SequenceImage image = c.cache.image(id);
  const auto widen = [](std::vector<std::byte>& rows) {
    std::vector<std::byte> wide(2 * rows.size());
    for (std::size_t i = 0; i < rows.size(); i += 2)
      write_element(read_element(rows.data() + i, DType::f16), DType::f32, wide.data() + 2 * i);
    rows = wide;
  };
  for (SequenceImage::Layer& layer : image.layers)
    for (SequenceImage::Head& head : layer.heads)
      for (std::size_t p = 0; p < head.pages.size(); p += 2) {
        head.pages[p].format = 1;
        widen(head.pages[p].keys), widen(head.pages[p].values);
      }
  const std::optional<SequenceId> wide = c.cache.restore(image);
  ASSERT_TRUE(wide);
  EXPECT_TRUE(c.cache.image(*wide) == image);
  EXPECT_EQ(c.attend(id, {0, 30, 60}), c.attend(*wide, {0, 30, 60})) << "the numbers are the same";
  const std::optional<SequenceId> again = c.loaded(c.saved(*wide));
  ASSERT_TRUE(again);
  expect_same(c, *wide, *again);
  expect_same_future(c, *wide, *again, "streaming_llm(keep=60t)", 20);
}

// ---- the bytes

Model small_model() {
  return {{{.q_heads = 4,
            .kv_heads = 2,
            .key_dim = 4,
            .value_dim = 3,
            .scale = 0.5f,
            .window = 70,
            .sink_logits = {1, 2, 3, 4}},
           {.q_heads = 1, .kv_heads = 1, .key_dim = 2, .value_dim = 2, .scale = 0.5f, .softcap = 3}}};
}

TEST(SnapshotBytes, AreWhatTheHeaderSays) {
  ScriptedCache<cpu::Backend, Brains> c(CpuRig<cpu::Isa::plain, 2>::backend(), small_model(),
                                        {.page_tokens = 16, .pool_bytes = 1 << 20});
  const SequenceId id = c.cache.create();
  c.cache.tag(id, {.begin = 2, .end = 9, .token_class = TokenClass::image, .image = 1, .grid_rows = 7, .grid_cols = 1});
  h2o_prompt(c, id, 40, 25);
  c.append(id, {50, 60});
  const auto sections = sections_of(c.cache.model(), {{"bfloat16", "half"}, {"float", "bfloat16"}}, c.cache.image(id));
  EXPECT_EQ(c.saved(id), snapshot_bytes(sections));
  EXPECT_EQ(sections.size(), 5u);
  EXPECT_EQ(crc32("123456789"), 0xcbf43926u) << "the check value of CRC-32";
}

TEST(SnapshotBytes, SayNothingOfWherePagesLie) {
  using C = ScriptedCache<cpu::Backend, Halves>;
  cpu::Backend& be = CpuRig<cpu::Isa::plain, 2>::backend();
  C one(be, uneven_model(), {.page_tokens = 16, .pool_bytes = Index{4} << 20});
  const SequenceId id = one.cache.create();
  h2o_prompt(one, id, 80, 50);
  one.decode_steps(id, h2o_of(50), 80, 100);
  const std::string bytes = one.saved(id);
  EXPECT_EQ(one.saved(id), bytes) << "twice";
  const SequenceId fork = one.cache.fork(id);
  EXPECT_EQ(one.saved(fork), bytes) << "a fork";
  EXPECT_EQ(one.saved(id), bytes) << "with shared pages";

  C two(be, uneven_model(), {.page_tokens = 16, .pool_bytes = Index{1} << 20});  // the same amid others
  std::vector<SequenceId> others;
  for (Index i = 0; i < 5; ++i) two.append(others.emplace_back(two.cache.create()), range(i, 20 + 7 * i));
  two.cache.release(others[1]), two.cache.release(others[3]);
  const SequenceId same = two.cache.create();
  h2o_prompt(two, same, 80, 50);
  two.cache.release(others[0]);
  two.decode_steps(same, h2o_of(50), 80, 100);
  EXPECT_EQ(two.saved(same), bytes) << "in another pool";
  const std::optional<SequenceId> loaded = two.loaded(bytes);
  ASSERT_TRUE(loaded);
  EXPECT_EQ(two.saved(*loaded), bytes);
}

/// A policy may leave a layer alone in one cache and not in the other: attention is the same.
TEST(SnapshotBytes, DoNotDependOnWhatPoliciesMayTouch) {
  cpu::Backend& be = CpuRig<cpu::Isa::plain, 2>::backend();
  Model open = uneven_model();
  open.layers[2].compress = true;
  ScriptedCache<cpu::Backend, Floats> one(be, uneven_model(), {.page_tokens = 16, .pool_bytes = 1 << 20}),
      two(be, open, {.page_tokens = 16, .pool_bytes = 1 << 20});
  const SequenceId id = one.cache.create();
  h2o_prompt(one, id, 50, 30);
  const std::optional<SequenceId> copy = two.loaded(one.saved(id));
  ASSERT_TRUE(copy);
  EXPECT_EQ(two.attend(*copy, {10, 60}), one.attend(id, {10, 60}));
}

TEST(SnapshotBytes, HoldNothingOfEvictedTokens) {
  cpu::Backend& be = CpuRig<cpu::Isa::plain, 2>::backend();
  const Model model{{{.q_heads = 2, .kv_heads = 2, .key_dim = 4, .value_dim = 4, .scale = 0.5f}}};
  KvCache<cpu::Backend, Floats> cache(be, model, {.page_tokens = 64, .pool_bytes = 1 << 20});
  const SequenceId id = cache.create();
  constexpr Index tokens = 150;
  const auto mark = [](Index token, Index head, Index side) {  // a number that nothing else is
    return 1000 + static_cast<float>(token * 4 + head * 2 + side) * 0.37f;
  };
  std::vector<float> k, v;
  for (Index t = 0; t < tokens; ++t)
    for (Index h = 0; h < 2; ++h)
      for (Index d = 0; d < 4; ++d) k.push_back(mark(t, h, 0)), v.push_back(mark(t, h, 1));
  ASSERT_EQ(
      cache.append(id, 0, ConstTensor(k.data(), tokens, 2, 4), ConstTensor(v.data(), tokens, 2, 4), range(0, tokens)),
      Outcome::done);
  // Scores that tell a token: by attention that grows with the key's number.
  const std::vector<float> q(2 * 4 * tokens, 0.001f);
  cache.observe(id, 0, h2o(), ConstTensor(q.data(), tokens, 2, 4), range(0, tokens));
  const SequenceImage whole = cache.image(id);

  const SequenceId fork = cache.fork(id);  // so that evicted rows stay in their pages
  Plan plan = cache.plan(id, full());
  plan.layers[0].touched = true;
  for (Index h = 0; h < 2; ++h) {
    Selection& keep = plan.layers[0].keep.emplace_back(Index{3});
    for (Index t = 0; t < tokens; ++t)
      if (t % 3 == h) keep.insert(t / 64, t % 64);
  }
  cache.commit(plan);
  ASSERT_EQ(cache.stats(id).pages, 6) << "nothing was packed";
  std::ostringstream out;
  save(out, cache, id);
  const std::string bytes = out.str();
  const SequenceImage left = cache.image(id);
  const auto holds = [&](float x) {
    return bytes.find(std::string_view(reinterpret_cast<const char*>(&x), sizeof x)) != std::string::npos;
  };
  for (Index t = 0; t < tokens; ++t)
    for (Index h = 0; h < 2; ++h) {
      for (const Index side : {0, 1}) EXPECT_EQ(holds(mark(t, h, side)), t % 3 == h) << "token " << t << " head " << h;
      const float score = whole.layers[0].heads[static_cast<std::size_t>(h)].running[static_cast<std::size_t>(t)];
      ASSERT_NE(score, 0);
      const std::vector<float>& scores = left.layers[0].heads[static_cast<std::size_t>(h)].running;
      if (t < std::ssize(scores))  // none after the last that is left
        EXPECT_EQ(scores[static_cast<std::size_t>(t)], t % 3 == h ? score : 0) << "score of token " << t;
      else
        EXPECT_NE(t % 3, h);
    }
  cache.release(fork);
}

TEST(SnapshotBytes, SeveralInOneStream) {
  using C = ScriptedCache<cpu::Backend, Floats>;
  C c(CpuRig<cpu::Isa::plain, 2>::backend(), uneven_model(), {.page_tokens = 16, .pool_bytes = 1 << 20});
  std::stringstream stream;
  std::vector<SequenceId> ids;
  for (Index i = 0; i < 3; ++i) {
    c.append(ids.emplace_back(c.cache.create()), range(i, 10 + 20 * i));
    save(stream, c.cache, ids.back());
  }
  stream << "and more";
  for (const SequenceId id : ids) {
    const std::optional<SequenceId> copy = load(stream, c.cache);
    ASSERT_TRUE(copy);
    expect_same(c, id, *copy);
  }
  std::string rest;
  std::getline(stream, rest);
  EXPECT_EQ(rest, "and more");
}

TEST(SnapshotBytes, AnImageWaitsOncePerLayer) {
  WalledBackend& be = WalledRig::backend();
  ScriptedCache<WalledBackend, Floats> c(be, uneven_model(), {.page_tokens = 16, .pool_bytes = 1 << 20});
  const SequenceId id = c.cache.create();
  h2o_prompt(c, id, 70, 60);
  const Index waits = be.counts.waits;
  (void)c.cache.image(id);
  EXPECT_EQ(be.counts.waits - waits, c.cache.layers());
}

/// Sinks that make every row NaN are a model all the same.
TEST(SnapshotBytes, AModelWithNaN) {
  Model model = small_model();
  model.layers[0].sink_logits[2] = std::numeric_limits<float>::quiet_NaN();
  ScriptedCache<cpu::Backend, Floats> c(CpuRig<cpu::Isa::plain, 2>::backend(), model,
                                        {.page_tokens = 16, .pool_bytes = 1 << 20});
  const SequenceId id = c.cache.create();
  c.append(id, range(0, 20));
  EXPECT_TRUE(c.loaded(c.saved(id)));
}

/// A row may stand anywhere; what was counted comes back, whatever its position.
TEST(SnapshotBytes, RowsAtTheEdgeOfPositions) {
  using C = ScriptedCache<cpu::Backend, Floats>;
  C c(CpuRig<cpu::Isa::plain, 2>::backend(), uneven_model(), {.page_tokens = 16, .pool_bytes = 1 << 20});
  for (const Position row : {-7, 0, 2147483647}) {
    const SequenceId id = c.cache.create();
    c.append(id, range(0, 1));
    for (Index l = 0; l < 2; ++l) {
      const LayerShape& s = c.shape(l);
      const auto q = c.queries(l, {row});
      const TensorBuffer<cpu::Backend> out(c.be, oracle::Array3(1, s.q_heads, s.value_dim), DType::f32);
      c.cache.decode(l,
                     {{.sequence = id, .queries = q.tensor(), .positions = std::span(&row, 1), .out = out.writable()}},
                     h2o_of(8));
    }
    const std::optional<SequenceId> copy = c.loaded(c.saved(id));
    ASSERT_TRUE(copy);
    EXPECT_TRUE(c.cache.image(id) == c.cache.image(*copy));
    EXPECT_EQ(c.cache.image(id).layers[0].last_row, std::max(row, Position{-1}));
  }
}

}  // namespace
}  // namespace kvpare::test

// Compression of an engine's own pages: scopes, block tables, frozen prefixes, and what the engine reads afterwards.
#include <gtest/gtest.h>

#include <kvpare/pipeline/engine.hpp>
#include <kvpare/pipeline/recipes.hpp>

#include "oracle/attend.hpp"
#include "support/prompt.hpp"
#include "support/tolerance.hpp"

namespace kvpare::test {
namespace {

using Positions = std::vector<Position>;
constexpr double sentinel = 777;  // in every element that no token of ours owns

/// How the engine lays out its cache.
struct EngineLayout {
  Index page_size = 16;
  bool hnd = false;
  Scope scope = Scope::same_tokens;
  bool one_table = false;
  Index frozen = 0;
};

/// An engine that holds a prompt. It addresses its memory by its own arithmetic, never through the library's views.
template <Backend B>
class Engine {
 public:
  Engine(B& be, const Prompt& prompt, EngineLayout layout) : be_(be), prompt_(prompt), layout_(layout) {
    const Index used = ceil_div(prompt.tokens(), layout.page_size);
    pages_ = used + 4;
    for (Index l = 0; l < prompt.layers(); ++l) {
      const auto order = Dice{static_cast<std::uint64_t>(layout.one_table ? 1 : l + 1)}.permutation(pages_);
      tables_.emplace_back(order.begin(), order.begin() + used);
    }
    for (Index l = 0; l < prompt.layers(); ++l) {
      keys_.push_back(upload(be, filled(l, prompt.keys[static_cast<std::size_t>(l)])));
      values_.push_back(upload(be, filled(l, prompt.values[static_cast<std::size_t>(l)])));
      const LayerShape& s = prompt.shape(l);
      const auto view = [&](float* data, Index width) {
        return layout.hnd ? kvpare::hnd(data, pages_, layout.page_size, s.kv_heads, width)
                          : nhd(data, pages_, layout.page_size, s.kv_heads, width);
      };
      EngineLayer<float> layer;
      layer.shape = s;
      layer.kv = {.keys = view(keys_.back().data(), s.key_dim),
                  .values = view(values_.back().data(), s.value_dim),
                  .pages = tables_[static_cast<std::size_t>(l)],
                  .tokens = prompt.tokens(),
                  .scope = layout.scope,
                  .frozen = layout.frozen};
      layers.push_back(layer);
      queries_.emplace_back(be, prompt.queries[static_cast<std::size_t>(l)], DType::f32);
    }
  }

  /// Row `slot` of a page, as a place in the array of one layer.
  Index place(Index page, Index slot, Index head, Index heads, Index width) const {
    return layout_.hnd ? ((page * heads + head) * layout_.page_size + slot) * width
                       : ((page * layout_.page_size + slot) * heads + head) * width;
  }

  /// What token t of a head now is, read from the engine's memory.
  std::vector<double> row(const std::vector<float>& memory, Index layer, Index t, Index head, Index width) const {
    const Index page = tables_[static_cast<std::size_t>(layer)][static_cast<std::size_t>(t / layout_.page_size)];
    const float* at = memory.data() + place(page, t % layout_.page_size, head, prompt_.shape(layer).kv_heads, width);
    return {at, at + width};
  }

  template <class C>
  void observe(EngineSequence<B>& sequence, const C& compressor, Index chunk = 0) {
    const Index tokens = prompt_.tokens();
    if (chunk == 0) chunk = tokens;
    for (Index first = 0; first < tokens; first += chunk)
      for (Index l = 0; l < prompt_.layers(); ++l) {
        const Index count = std::min(chunk, tokens - first);
        EngineLayer<float> so_far = layers[static_cast<std::size_t>(l)];  // a chunk is appended before it is observed
        so_far.kv.tokens = first + count;
        so_far.kv.frozen = std::min(so_far.kv.frozen, so_far.kv.tokens);
        sequence.observe(l, so_far, compressor, queries_[static_cast<std::size_t>(l)].tensor().part(first, count),
                         FedCache<B>::positions(first, count), first + count == tokens);
      }
  }

  std::vector<float> key_memory(Index layer) const { return download(be_, keys_[static_cast<std::size_t>(layer)]); }
  std::vector<float> value_memory(Index layer) const { return download(be_, values_[static_cast<std::size_t>(layer)]); }
  ConstTensor queries(Index layer, Index first, Index count) const {
    return queries_[static_cast<std::size_t>(layer)].tensor().part(first, count);
  }
  std::vector<std::int32_t>& table(Index layer) { return tables_[static_cast<std::size_t>(layer)]; }

  std::vector<EngineLayer<float>> layers;

 private:
  std::vector<float> filled(Index layer, const oracle::Array3& x) const {
    std::vector<float> memory(static_cast<std::size_t>(pages_ * layout_.page_size * x.b * x.c),
                              static_cast<float>(sentinel));
    for (Index t = 0; t < x.a; ++t)
      for (Index h = 0; h < x.b; ++h)
        for (Index c = 0; c < x.c; ++c)
          memory[static_cast<std::size_t>(
              place(tables_[static_cast<std::size_t>(layer)][static_cast<std::size_t>(t / layout_.page_size)],
                    t % layout_.page_size, h, x.b, x.c) +
              c)] = static_cast<float>(x.at(t, h, c));
    return memory;
  }

  B& be_;
  const Prompt& prompt_;
  EngineLayout layout_;
  Index pages_ = 0;
  std::vector<std::vector<std::int32_t>> tables_;
  std::vector<Buffer<B, float>> keys_, values_;
  std::vector<TensorBuffer<B>> queries_;
};

std::vector<double> slice_row(const oracle::Array3& x, Index t, Index h) {
  std::vector<double> row;
  for (Index c = 0; c < x.c; ++c) row.push_back(x.at(t, h, c));
  return row;
}

const std::vector<TagSpan> tags{{.begin = 6, .end = 60, .token_class = TokenClass::image}};

template <Backend B>
EngineSequence<B> sequence_of(B& be, const Prompt& p, bool one_table = false) {
  Tags all;
  for (const TagSpan& s : p.tags) all.add(s);
  return EngineSequence<B>(be, all, one_table);
}

/// What the library's own cache keeps of the same prompt.
template <Backend B, class C>
std::vector<std::vector<Positions>> kept_by_cache(B& be, const Prompt& p, const C& compressor) {
  FedCache<B> fed(be, p);
  fed.feed(compressor, 0, p.tokens());
  fed.cache.compress(fed.id, compressor);
  std::vector<std::vector<Positions>> kept;
  for (Index l = 0; l < p.layers(); ++l) {
    auto& heads = kept.emplace_back();
    for (Index h = 0; h < p.shape(l).kv_heads; ++h) heads.push_back(fed.cache.kept(fed.id, l, h));
  }
  return kept;
}

/// Plans and commits; then every kept row must lie where the engine looks for it, pages past the end are free, and the
/// engine's attention is that over the kept tokens.
template <Backend B, class C>
void compresses(B& be, const Prompt& p, EngineLayout layout, const C& compressor,
                const std::vector<std::vector<Positions>>& wanted, Index chunk = 0) {
  Engine<B> engine(be, p, layout);
  auto sequence = sequence_of(be, p, layout.one_table);
  engine.observe(sequence, compressor, chunk);
  const std::span<const EngineLayer<float>> layers = engine.layers;
  const Plan plan = sequence.plan(compressor, layers);
  const auto reports = sequence.commit(plan, layers);
  for (Index l = 0; l < p.layers(); ++l) {
    const auto at = static_cast<std::size_t>(l);
    const std::string where = message("page ", layout.page_size, layout.hnd ? " hnd" : " nhd", ", layer ", l);
    const Index heads = p.shape(l).kv_heads, kept = static_cast<Index>(wanted[at][0].size());
    ASSERT_EQ(reports[at].tokens, kept) << where;
    ASSERT_EQ(reports[at].positions.size(), layout.scope == Scope::same_tokens ? 1u : static_cast<std::size_t>(heads));
    for (std::size_t h = 0; h < reports[at].positions.size(); ++h)
      EXPECT_EQ(reports[at].positions[h], wanted[at][h]) << where << " head " << h;

    const auto keys = engine.key_memory(l), values = engine.value_memory(l);
    oracle::AttendInput before, after;
    for (Index h = 0; h < heads; ++h) {
      auto& old_tokens = before.heads.emplace_back();
      auto& new_tokens = after.heads.emplace_back();
      for (Index t = 0; t < kept; ++t) {
        const Position position = wanted[at][static_cast<std::size_t>(h)][static_cast<std::size_t>(t)];
        old_tokens.push_back({position, slice_row(p.keys[at], position, h), slice_row(p.values[at], position, h)});
        new_tokens.push_back({position, engine.row(keys, l, t, h, p.shape(l).key_dim),
                              engine.row(values, l, t, h, p.shape(l).value_dim)});
        ASSERT_EQ(new_tokens.back().key, old_tokens.back().key) << where << " head " << h << " token " << t;
        ASSERT_EQ(new_tokens.back().value, old_tokens.back().value) << where << " head " << h << " token " << t;
      }
    }

    std::vector<std::int32_t> freed(engine.table(l).begin() + ceil_div(kept, layout.page_size), engine.table(l).end());
    EXPECT_EQ(reports[at].freed_pages, freed) << where;

    // The engine's next step, on the shorter table.
    EngineLayer<float> shorter = engine.layers[at];
    shorter.kv.tokens = kept;
    const Position decode[] = {static_cast<Position>(p.tokens())};
    const TensorBuffer<B> out(be, oracle::Array3(1, p.shape(l).q_heads, p.shape(l).value_dim), DType::f32);
    sequence.attend(l, shorter, engine.queries(l, p.tokens() - 1, 1), decode, out.writable());
    before.queries = oracle::Array3(1, p.shape(l).q_heads, p.shape(l).key_dim);
    for (Index h = 0; h < before.queries.b; ++h)
      for (Index c = 0; c < before.queries.c; ++c) before.queries.at(0, h, c) = p.queries[at].at(p.tokens() - 1, h, c);
    before.positions = {p.tokens()}, before.value_width = p.shape(l).value_dim;
    before.how.scale = static_cast<double>(p.shape(l).scale);
    const auto answer = oracle::attend(before);
    const auto got = out.download();
    for (std::size_t i = 0; i < got.values.size(); ++i)
      ASSERT_TRUE(close(got.values[i], answer.out.values[i], tolerance(Operation::attended)))
          << where << " element " << i;
  }
}

template <class Rig>
class EngineOwned : public OnRig<Rig> {};
TYPED_TEST_SUITE(EngineOwned, PipelineRigs, RigNames);

TYPED_TEST(EngineOwned, SameTokensForAllHeads) {
  const Prompt p = random_prompt(1, 2, 90, 2, 3, tags);
  auto snap = snap_kv();
  snap.scorer.window = 5, snap.keep = Keep::ratio(0.4);
  auto together = snap;
  together.selector.heads = SelectHeads::layer;
  const auto by_snap = kept_by_cache(this->be(), p, together), by_air = kept_by_cache(this->be(), p, air_cache()),
             by_streaming = kept_by_cache(this->be(), p, streaming_llm());
  for (const Index page : {1, 5, 16, 64})
    for (const bool hnd : {false, true}) {
      compresses(this->be(), p, {.page_size = page, .hnd = hnd}, snap, by_snap);
      compresses(this->be(), p, {.page_size = page, .hnd = hnd}, air_cache(), by_air);
      compresses(this->be(), p, {.page_size = page, .hnd = hnd}, air_cache(), by_air, 37);
      compresses(this->be(), p, {.page_size = page, .hnd = hnd}, streaming_llm(), by_streaming);
    }
}

TYPED_TEST(EngineOwned, SameCountPerHead) {
  const Prompt p = random_prompt(2, 2, 90, 3, 2, tags);
  auto snap = snap_kv();
  snap.scorer.window = 5, snap.keep = Keep::ratio(0.4);
  const auto by_snap = kept_by_cache(this->be(), p, snap), by_h2o = kept_by_cache(this->be(), p, h2o());
  ASSERT_NE(by_snap[0][0], by_snap[0][1]);
  for (const Index page : {7, 16})
    for (const bool hnd : {false, true}) {
      compresses(this->be(), p, {.page_size = page, .hnd = hnd, .scope = Scope::same_count}, snap, by_snap);
      compresses(this->be(), p, {.page_size = page, .hnd = hnd, .scope = Scope::same_count}, h2o(), by_h2o, 30);
    }
}

TYPED_TEST(EngineOwned, OneTableKeepsTheSameNumberInEveryLayer) {
  const Prompt p = random_prompt(3, 3, 90, 2, 2, tags);
  auto method = air_cache();
  method.keep = Keep::ratio(0.25);
  Engine<typename TestFixture::B> engine(this->be(), p, {.one_table = true});
  auto sequence = sequence_of(this->be(), p, true);
  engine.observe(sequence, method);
  const auto reports = sequence.commit(sequence.plan(method, std::span<const EngineLayer<float>>(engine.layers)),
                                       std::span<const EngineLayer<float>>(engine.layers));
  for (const auto& r : reports)
    EXPECT_EQ(r.tokens, 36 + 13) << "text, and a quarter of 54 visual tokens, rounded down to be the same for all";
}

TYPED_TEST(EngineOwned, ImagesHaveBudgetsOfTheirOwn) {
  const Prompt p = random_prompt(23, 3, 100, 2, 1,
                                 {{.begin = 4, .end = 34, .token_class = TokenClass::image, .image = 0},
                                  {.begin = 40, .end = 90, .token_class = TokenClass::image, .image = 1}});
  const Compressor<KeyNorm, Uniform> method{
      {}, {}, {.among = visual, .each = Each::image, .also = {{text, Keep::tokens(3 * 15)}}}, Keep::ratio(0.2)};
  for (const bool one_table : {false, true}) {
    Engine<typename TestFixture::B> engine(this->be(), p, {.one_table = one_table});
    auto sequence = sequence_of(this->be(), p, one_table);
    const std::span<const EngineLayer<float>> layers = engine.layers;
    const auto reports = sequence.commit(sequence.plan(method, layers), layers);
    for (const EngineLayerReport& report : reports) {
      const Positions& kept = report.positions[0];
      const auto within = [&](Position begin, Position end) {
        return std::count_if(kept.begin(), kept.end(), [&](Position t) { return t >= begin && t < end; });
      };
      EXPECT_EQ(within(4, 34), 6);
      EXPECT_EQ(within(40, 90), 10);
      EXPECT_EQ(report.tokens, 6 + 10 + 15);
    }
  }
}

TYPED_TEST(EngineOwned, FrozenTokensAndTheirPagesStay) {
  const Prompt p = random_prompt(4, 2, 90, 2, 2, {});
  for (const Index frozen : {1, 16, 20}) {
    Engine<typename TestFixture::B> engine(this->be(), p, {.frozen = frozen});
    auto sequence = sequence_of(this->be(), p);
    auto method = snap_kv();
    method.scorer.window = 4, method.keep = Keep::tokens(2 * 45);
    engine.observe(sequence, method);
    const std::span<const EngineLayer<float>> layers = engine.layers;
    const auto reports = sequence.commit(sequence.plan(method, layers), layers);
    for (const auto& r : reports) {
      EXPECT_EQ(r.tokens, 45) << "frozen tokens are paid from the budget";
      for (Position t = 0; t < round_up(frozen, 16); ++t) EXPECT_EQ(r.positions[0][static_cast<std::size_t>(t)], t);
    }
    for (Index l = 0; l < 2; ++l) {
      const auto keys = engine.key_memory(l);
      for (Index t = 0; t < round_up(frozen, 16); ++t)
        for (Index h = 0; h < 2; ++h)
          EXPECT_EQ(engine.row(keys, l, t, h, 16), slice_row(p.keys[static_cast<std::size_t>(l)], t, h));
    }
  }
}

TYPED_TEST(EngineOwned, PagesOfOthersAreNeverWritten) {
  const Prompt p = random_prompt(5, 1, 50, 2, 2, {});
  Engine<typename TestFixture::B> engine(this->be(), p, {});
  const auto before = engine.key_memory(0);
  auto sequence = sequence_of(this->be(), p);
  const std::span<const EngineLayer<float>> layers = engine.layers;
  const Plan plan = sequence.plan(streaming_llm(), layers);
  EXPECT_EQ(engine.key_memory(0), before) << "a plan reads only";
  sequence.commit(plan, layers);
  const auto after = engine.key_memory(0);
  for (std::size_t i = 0; i < before.size(); ++i)
    if (before[i] == static_cast<float>(sentinel)) {
      ASSERT_EQ(after[i], before[i]);
    }
}

TYPED_TEST(EngineOwned, ASecondRoundWorksOnWhatIsLeft) {
  const Prompt p = random_prompt(6, 1, 80, 2, 2, {});
  Engine<typename TestFixture::B> engine(this->be(), p, {});
  auto sequence = sequence_of(this->be(), p);
  auto method = streaming_llm();
  method.keep = Keep::tokens(30);
  std::span<const EngineLayer<float>> layers = engine.layers;
  const auto first = sequence.commit(sequence.plan(method, layers), layers);
  engine.layers[0].kv.tokens = first[0].tokens;
  engine.layers[0].kv.positions = first[0].positions[0];
  method.keep = Keep::tokens(10);
  const auto second = sequence.commit(sequence.plan(method, layers), layers);
  EXPECT_EQ(second[0].positions[0], (Positions{0, 1, 2, 3, 74, 75, 76, 77, 78, 79}));
  EXPECT_EQ(second[0].freed_pages, std::vector<std::int32_t>(engine.table(0).begin() + 1, engine.table(0).begin() + 2))
      << "of the two that 30 tokens still had";
  const auto keys = engine.key_memory(0);
  for (Index t = 0; t < 10; ++t)
    EXPECT_EQ(engine.row(keys, 0, t, 1, 16),
              slice_row(p.keys[0], second[0].positions[0][static_cast<std::size_t>(t)], 1));
}

TYPED_TEST(EngineOwned, PlanWaitsOnceAndTheRestNever) {
  if constexpr (std::same_as<typename TestFixture::B, WalledBackend>) {
    const Prompt p = random_prompt(7, 3, 60, 2, 2, tags);
    Engine<WalledBackend> engine(this->be(), p, {});
    auto sequence = sequence_of(this->be(), p);
    const std::span<const EngineLayer<float>> layers = engine.layers;
    const Index start = this->be().counts.waits;
    engine.observe(sequence, air_cache());
    EXPECT_EQ(this->be().counts.waits, start);
    const Plan plan = sequence.plan(air_cache(), layers);
    EXPECT_EQ(this->be().counts.waits, start + 1);
    sequence.commit(plan, layers);
    EXPECT_EQ(this->be().counts.waits, start + 1);
  }
}

TYPED_TEST(EngineOwned, AnEmptySequenceIsNoMistake) {
  const Prompt p = random_prompt(8, 1, 20, 1, 1, {});
  Engine<typename TestFixture::B> engine(this->be(), p, {});
  engine.layers[0].kv.tokens = 0;
  auto sequence = sequence_of(this->be(), p);
  const std::span<const EngineLayer<float>> layers = engine.layers;
  const auto reports = sequence.commit(sequence.plan(snap_kv(), layers), layers);
  EXPECT_EQ(reports[0].tokens, 0);
  EXPECT_TRUE(reports[0].freed_pages.empty());
}

// ---- whole pages: nothing is written

TYPED_TEST(EngineOwned, WholePagesLeaveTheTableWhereTheyStood) {
  const Prompt p = random_prompt(12, 2, 90, 2, 2, tags);
  for (const Scope scope : {Scope::same_tokens, Scope::same_count})
    for (const Index page : {5, 16, 64})
      for (const Index frozen : {0, 7}) {
        auto method = h2o();
        method.selector.heads = SelectHeads::layer, method.selector.granularity = Granularity::page;
        method.selector.recent_share = 0.2, method.keep = Keep::ratio(0.7);
        Engine<typename TestFixture::B> engine(this->be(), p, {.page_size = page, .scope = scope, .frozen = frozen});
        auto sequence = sequence_of(this->be(), p);
        engine.observe(sequence, method, 40);
        const std::span<const EngineLayer<float>> layers = engine.layers;
        const auto before = std::pair{engine.key_memory(0), engine.value_memory(0)};
        const auto reports = sequence.commit(sequence.plan(method, layers), layers);
        EXPECT_EQ(before, std::pair(engine.key_memory(0), engine.value_memory(0)));
        for (Index l = 0; l < 2; ++l) {
          const EngineLayerReport& r = reports[static_cast<std::size_t>(l)];
          EXPECT_EQ(r.rows_moved, 0);
          EXPECT_LE(r.tokens, page == 64 && frozen > 0 ? 64 : 63) << "a page with frozen tokens stays whatever it takes";
          EXPECT_GT(r.tokens, 63 - page);
          EXPECT_FALSE(r.freed_pages.empty());
          // The new table and what left it are the old table; every kept row is where the new one says.
          std::vector<std::int32_t> all = r.pages, old = engine.table(l);
          all.insert(all.end(), r.freed_pages.begin(), r.freed_pages.end());
          std::sort(all.begin(), all.end()), std::sort(old.begin(), old.end());
          EXPECT_EQ(all, old);
          ASSERT_EQ(static_cast<Index>(r.pages.size()), ceil_div(r.tokens, page));
          engine.table(l) = r.pages;
          const auto keys = engine.key_memory(l);
          for (const Positions& positions : r.positions) {
            ASSERT_EQ(static_cast<Index>(positions.size()), r.tokens);
            for (Position t = 0; t < frozen; ++t) EXPECT_EQ(positions[static_cast<std::size_t>(t)], t);
            for (Index t = 0; t < r.tokens; ++t)
              for (Index h = 0; h < 2; ++h)
                ASSERT_EQ(engine.row(keys, l, t, h, 16),
                          slice_row(p.keys[static_cast<std::size_t>(l)], positions[static_cast<std::size_t>(t)], h));
          }
        }
      }
}

TYPED_TEST(EngineOwned, PackedRowsLeaveAShorterTable) {
  const Prompt p = random_prompt(13, 1, 90, 2, 2, {});
  Engine<typename TestFixture::B> engine(this->be(), p, {});
  auto sequence = sequence_of(this->be(), p);
  const std::span<const EngineLayer<float>> layers = engine.layers;
  const auto reports = sequence.commit(sequence.plan(streaming_llm(), layers), layers);
  EXPECT_EQ(reports[0].tokens, 18);
  EXPECT_EQ(reports[0].pages, std::vector<std::int32_t>(engine.table(0).begin(), engine.table(0).begin() + 2));
}

TYPED_TEST(EngineOwned, WholePagesAreRefusedWhereRowsWouldHaveToMove) {
  const Prompt p = random_prompt(14, 2, 60, 2, 2, {});
  auto method = streaming_llm();
  method.selector.granularity = Granularity::page, method.keep = Keep::ratio(0.6);  // the first page and the last
  const auto refused = [&](const std::string& words, auto&& call) {
    const std::string said = error_of(call);
    EXPECT_NE(said.find(words), std::string::npos) << said;
  };
  Engine<typename TestFixture::B> by_head(this->be(), p, {.scope = Scope::same_count});
  auto sequence = sequence_of(this->be(), p);
  std::span<const EngineLayer<float>> layers = by_head.layers;
  refused("the pages of layer 0 hold all heads, and each would drop other pages; heads must be layer",
          [&] { sequence.plan(method, layers); });
  method.selector.heads = SelectHeads::layer;
  Plan plan = sequence.plan(method, layers);
  ASSERT_TRUE(plan.in_place);
  Plan cut = plan;
  for (Selection& keep : cut.layers[1].keep) keep.word(3) &= keep.word(3) - 1;
  refused("layer 1 of the plan keeps 11 of 12 tokens of page 3, but moves no rows",
          [&] { sequence.commit(cut, layers); });
  Plan different = plan;
  different.layers[0].keep[0].word(0) = low_bits(16), different.layers[0].keep[0].word(1) = 0;
  different.layers[0].keep[1].word(0) = 0, different.layers[0].keep[1].word(1) = low_bits(16);
  refused("heads 0 and 1 keep different pages, but the plan moves no rows",
          [&] { sequence.commit(different, layers); });

  Engine<typename TestFixture::B> one(this->be(), p, {.one_table = true});
  auto shared = sequence_of(this->be(), p, true);
  layers = one.layers;
  refused("granularity = page, but 2 layers share one block table", [&] { shared.plan(method, layers); });
  auto by_token = method;
  by_token.selector.granularity = Granularity::token;
  Plan in_place = shared.plan(by_token, layers);
  in_place.in_place = true;
  for (LayerPlan& l : in_place.layers)
    for (Selection& keep : l.keep) keep = Selection(std::vector<std::uint64_t>{low_bits(16), 0, 0, 0});
  refused("drops pages where they stand, but 2 layers share one block table", [&] { shared.commit(in_place, layers); });
}

// ---- mistakes: refused by name, and nothing has changed

TYPED_TEST(EngineOwned, MistakesAreRefused) {
  const Prompt p = random_prompt(9, 2, 60, 2, 2, {});
  Engine<typename TestFixture::B> engine(this->be(), p, {.frozen = 10});
  auto sequence = sequence_of(this->be(), p);
  const std::span<const EngineLayer<float>> layers = engine.layers;
  const auto before = engine.key_memory(0);
  const auto refused = [&](const std::string& words, auto&& call) {
    const std::string said = error_of(call);
    EXPECT_NE(said.find(words), std::string::npos) << said;
    EXPECT_EQ(engine.key_memory(0), before);
  };
  refused("layer 0 was not observed", [&] { sequence.plan(snap_kv(), layers); });
  auto to_come = expected_attention();
  to_come.scorer.future = 9;
  refused("expected_attention: future = 9: layer 0 has no rope", [&] { engine.observe(sequence, to_come); });
  refused("merge writes keys and values", [&] { sequence.plan(elastic_cache(), layers); });
  refused("merge writes keys and values", [&] { sequence.plan(cam(), layers); });
  auto method = streaming_llm();
  method.keep = Keep::ratio(0.6);
  const Plan good = sequence.plan(method, layers);  // the first page is frozen, the second goes, the rest is the newest

  Plan ragged = good;
  ragged.layers[1].keep[1].word(3) &= ragged.layers[1].keep[1].word(3) - 1;
  refused("layer 1 is ragged: head 1 keeps", [&] { sequence.commit(ragged, layers); });

  Plan different = good;  // head 1 takes an evicted token in place of a kept one
  const Index evicted = std::countr_zero(~different.layers[0].keep[1].word(1));
  const Index kept = std::countr_zero(different.layers[0].keep[1].word(3));
  different.layers[0].keep[1].word(1) |= std::uint64_t{1} << evicted;
  different.layers[0].keep[1].word(3) &= ~(std::uint64_t{1} << kept);
  refused("keep different tokens, but the pages' scope is same_tokens", [&] { sequence.commit(different, layers); });

  Plan invented = good;
  for (auto& keep : invented.layers[0].keep) keep.word(3) |= std::uint64_t{1} << 15;
  refused("keeps slots of page 3 that hold no token", [&] { sequence.commit(invented, layers); });

  Plan thawed = good;
  for (auto& keep : thawed.layers[0].keep) keep.word(0) = 0;
  refused("holds frozen tokens", [&] { sequence.commit(thawed, layers); });

  refused("plan has 2 layers, got 1", [&] { sequence.commit(good, layers.first(1)); });

  const auto stale = [&](auto&& change) {
    const auto kept_layers = engine.layers;
    const auto kept_table = engine.table(1);
    change();
    refused("stale", [&] { sequence.commit(good, layers); });
    engine.layers = kept_layers;
    std::copy(kept_table.begin(), kept_table.end(), engine.table(1).begin());
  };
  stale([&] { engine.layers[1].kv.tokens = 59; });
  stale([&] { std::swap(engine.table(1)[0], engine.table(1)[1]); });
  Positions shifted = FedCache<typename TestFixture::B>::positions(5, 60);
  stale([&] { engine.layers[0].kv.positions = shifted; });

  const auto wrong = [&](const std::string& words, auto&& change) {
    const auto kept_layers = engine.layers;
    change(engine.layers[0]);
    refused(words, [&] { sequence.plan(streaming_llm(), layers); });
    engine.layers = kept_layers;
  };
  wrong("tokens, but its 4 pages hold 64", [](auto& l) { l.kv.tokens = 65; });
  wrong("frozen = 61", [](auto& l) { l.kv.frozen = 61; });
  wrong("positions must ascend", [&](auto& l) { shifted[3] = shifted[2], l.kv.positions = shifted; });
  wrong("must be none or one per token", [&](auto& l) { l.kv.positions = std::span(shifted).first(5); });
  wrong("shape[1]", [](auto& l) { l.kv.values.shape[1] = 8; });
  wrong("page_size = 65", [](auto& l) { l.kv.keys.shape[1] = l.kv.values.shape[1] = 65; });
  wrong("channel strides", [](auto& l) { l.kv.keys.stride[3] = 2; });
  wrong("the shape says", [](auto& l) { l.shape.kv_heads = 1; });
  wrong("block table names page", [](auto& l) { l.kv.keys.shape[0] = l.kv.values.shape[0] = 3; });
  EXPECT_NO_THROW(sequence.commit(good, layers));
}

TYPED_TEST(EngineOwned, OneTableRefusesUnequalLayers) {
  const Prompt p = random_prompt(10, 2, 60, 2, 2, {});
  Engine<typename TestFixture::B> engine(this->be(), p, {.one_table = true});
  auto sequence = sequence_of(this->be(), p, true);
  const std::span<const EngineLayer<float>> layers = engine.layers;
  Plan plan = sequence.plan(streaming_llm(), layers);
  for (auto& keep : plan.layers[1].keep) keep.word(0) &= keep.word(0) - 1;
  const std::string said = error_of([&] { sequence.commit(plan, layers); });
  EXPECT_NE(said.find("with one block table for all layers they must be equal"), std::string::npos) << said;
}

TEST(EngineLists, PositionsFarApartAreRefused) {
  std::vector<float> memory(64);
  const std::int32_t table[] = {0};
  const Position far[] = {0, 70000};
  EnginePages<float> kv{.keys = nhd(memory.data(), 1, 16, 1, 2),
                        .values = nhd(memory.data(), 1, 16, 1, 2),
                        .pages = table,
                        .tokens = 2,
                        .positions = far};
  EXPECT_NE(error_of([&] { lists_of(kv, 3); }).find("engine layer 3: page 0 spans positions 0 to 70000"),
            std::string::npos);
}

}  // namespace
}  // namespace kvpare::test

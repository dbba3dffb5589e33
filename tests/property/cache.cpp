// Laws of KvCache that hold for any input. Sequences of random operations are in fuzz/cache_operations.cpp.
#include <gtest/gtest.h>

#include <map>
#include <set>
#include <vector>

#include "support/checked_cache.hpp"
#include "support/sanitizers.hpp"

namespace kvpare::test {
namespace {

using Checked = CheckedCache<Formats<Pair<Raw<float>, Raw<half>>>>;

Model model() {
  LayerShape grouped{.q_heads = 4, .kv_heads = 2, .key_dim = 8, .value_dim = 8, .scale = 0.35f};
  LayerShape sliding{.q_heads = 3, .kv_heads = 3, .key_dim = 4, .value_dim = 8, .scale = 0.5f, .window = 30};
  return {{grouped, sliding}};
}

cpu::Backend& backend() {
  static cpu::Backend one({.threads = 1});
  return one;
}

/// A prompt of text, an image, and text, with a protected stretch.
void prompt(Checked& c, SequenceId id, Index tokens) {
  c.tag(id, {.begin = static_cast<Position>(tokens / 5), .end = static_cast<Position>(tokens * 4 / 5), .token_class = TokenClass::image});
  c.tag(id, {.begin = static_cast<Position>(tokens / 2), .end = static_cast<Position>(tokens / 2 + 3), .token_class = TokenClass::image, .is_protected = true});
  for (Index l = 0; l < 2; ++l) ASSERT_EQ(c.append(id, l, tokens), Outcome::done);
}

struct PageTokens : ::testing::TestWithParam<Index> {
  Checked make(std::uint64_t seed) { return {backend(), model(), {.page_tokens = GetParam(), .pool_bytes = 4 << 20}, seed}; }
};
INSTANTIATE_TEST_SUITE_P(KvCache, PageTokens, ::testing::Values(16, 32, 64));

TEST_P(PageTokens, KeptRowsAscendProtectedStayAndFreedIsWhatWasPromised) {
  for (std::uint64_t seed = 1; seed <= tries(10u); ++seed)
    for (const Recipe& recipe : known_recipes()) {
      Checked c = make(seed);
      const SequenceId id = c.create();
      prompt(c, id, c.dice.within(20, 300));
      AnyCompressor method = recipe.compressor;
      if (recipe.has_settings) method.keep = Keep::ratio(c.dice.unit());
      method.selector.skip_layers = 0;  // there are but two
      c.observe_all(id, method, [&] { return c.dice.within(1, 60); });
      c.commit(c.cache.plan(id, method));  // compares the report with the pool
      c.verify_all();                      // kept rows ascend without repeats, as in the model
      for (Index l = 0; l < 2; ++l)
        for (Index h = 0; h < c.shape(l).kv_heads; ++h) {
          const Positions kept = c.cache.kept(id, l, h);
          for (const TagSpan& span : c.cache.tags(id).spans())
            for (Position p = span.begin; span.is_protected && p < span.end; ++p) ASSERT_TRUE(std::ranges::binary_search(kept, p)) << recipe.name;
        }
    }
}

/// Every method by whole pages, on prompts, on lists with holes and on pages that a fork shares: no row moves, what stays
/// are pages as they were, and every page that goes is free unless the fork holds it.
TEST_P(PageTokens, WholePagesAreFreedWithoutACopy) {
  int dropped = 0;
  for (std::uint64_t seed = 1; seed <= 6; ++seed)
    for (const Recipe& recipe : known_recipes()) {
      AnyCompressor method = recipe.compressor;
      method.selector.granularity = Granularity::page, method.selector.skip_layers = 0;
      method.selector.chunk = 1, method.selector.recover = 0, method.selector.merge = MergeInto::none;
      if (!recipe.has_settings || policy_name(method.budget) == "as_compressed") continue;
      Checked c = make(seed);
      const SequenceId id = c.create();
      prompt(c, id, c.dice.within(20, 400));
      const bool holes = c.dice.below(2) == 0, shared = c.dice.below(3) == 0;
      if (holes) c.commit(c.random_plan(id, 0.85));
      c.observe_all(id, method, [&] { return c.dice.within(1, 60); });
      if (shared) c.fork(id);
      const double amount = c.dice.unit();
      const Index pages_now = c.cache.stats(id).pages;
      method.keep = c.dice.below(2) == 0 ? Keep::ratio(amount)
                                         : Keep::pages(static_cast<Index>(amount * static_cast<double>(pages_now) / 2));
      const Plan plan = c.cache.plan(id, method);
      Index emptied = 0;
      std::set<PageId> stay;
      for (Index l = 0; l < 2; ++l) {
        const auto lists = c.cache.pages(id, l);
        const LayerPlan& of_layer = plan.layers[static_cast<std::size_t>(l)];
        for (std::size_t h = 0; h < lists.size(); ++h)
          for (std::size_t e = 0; e < lists[h].entries.size(); ++e) {
            const std::uint64_t live = lists[h].entries[e].live,
                                kept = of_layer.touched ? of_layer.keep[h].words()[e] & live : live;
            ASSERT_TRUE(kept == 0 || kept == live) << recipe.name << " seed " << seed;
            emptied += kept == 0;
            if (kept != 0) stay.insert(lists[h].entries[e].page);
          }
      }
      const CompressReport report = c.commit(plan, !shared);
      ASSERT_EQ(report.rows_moved, 0) << recipe.name << " seed " << seed;
      ASSERT_EQ(report.pages_before - report.pages_after, emptied);
      ASSERT_EQ(report.pages_freed, shared ? 0 : emptied);
      std::set<PageId> left;
      for (Index l = 0; l < 2; ++l) {
        const auto lists = c.cache.pages(id, l);
        for (const HeadPages& list : lists)
          for (const Entry& e : list.entries) left.insert(e.page);
      }
      ASSERT_EQ(left, stay) << recipe.name << " seed " << seed;
      c.verify_all();
      dropped += emptied > 0;
    }
  EXPECT_GT(dropped, 20);
}

TEST_P(PageTokens, AListHasAtMostAThirdMorePagesThanItsTokensNeedAndOne) {
  for (std::uint64_t seed = 1; seed <= tries(150u); ++seed) {
    Checked c = make(seed);
    const SequenceId id = c.create();
    prompt(c, id, c.dice.within(1, 600));
    for (const double keep : {0.9, 0.8, 0.6, 0.3, 0.9}) {
      c.commit(c.random_plan(id, keep));
      for (const auto& layer : c.cache.stats(id).heads)
        for (const auto& head : layer)
          ASSERT_LE(head.pages, ceil_div(head.live_tokens * 4, 3 * GetParam()) + 1) << head.live_tokens << " live tokens, seed " << seed;
    }
    c.verify_all();
  }
}

TEST_P(PageTokens, CompressingTwiceWithTheSameKeepChangesNothingMore) {
  for (std::uint64_t seed = 1; seed <= tries(50u); ++seed)
    for (const std::string_view recipe : {"random", "streaming_llm"}) {
      Checked c = make(seed);
      const SequenceId id = c.create();
      prompt(c, id, c.dice.within(1, 400));
      AnyCompressor method = make_compressor(recipe);
      method.keep = Keep::ratio(c.dice.unit());
      c.commit(c.cache.plan(id, method));
      const auto entries = [&] {
        std::vector<Entry> all;
        for (Index l = 0; l < 2; ++l)
          for (const HeadPages& list : c.cache.pages(id, l)) all.insert(all.end(), list.entries.begin(), list.entries.end());
        return all;
      };
      const std::vector<Entry> once = entries();
      const CompressReport again = c.commit(c.cache.plan(id, method));
      ASSERT_EQ(entries(), once) << recipe << " seed " << seed;
      ASSERT_EQ(again.rows_moved, 0);
      ASSERT_EQ(again.pages_freed, 0);
      c.verify_all();
    }
}

/// The same operations in pages of 16, 32 and 64, before and after evictions: same tokens, same attention.
TEST(KvCacheLayout, PageTokensNeverMatter) {
  for (std::uint64_t seed = 1; seed <= tries(20u); ++seed)
    for (const std::string_view recipe : {"random(keep=0.85)", "streaming_llm(keep=0.85)", "h2o(keep=0.6)", "air_cache(keep=0.8)", "snap_kv(keep=0.6)",
                                          "snap_kv(keep=0.85, heads=layer)", "h2o(keep=0.85, heads=layer, recent_share=0.2)"}) {
      std::vector<std::vector<Positions>> kept;
      std::vector<std::vector<float>> attended;
      for (const Index page_tokens : {16, 32, 64}) {
        Checked c(backend(), model(), {.page_tokens = page_tokens, .pool_bytes = 4 << 20}, seed);
        const SequenceId id = c.create();
        const AnyCompressor method = make_compressor(recipe);
        auto& positions = kept.emplace_back();
        for (int round = 0; round < 2; ++round) {  // the second time on lists with holes
          prompt(c, id, 90);
          for (Index l = 0; l < 2; ++l) c.observe(id, l, method, 40);
          c.commit(c.cache.plan(id, method));
          for (Index l = 0; l < 2; ++l)
            for (Index h = 0; h < c.shape(l).kv_heads; ++h) positions.push_back(c.cache.kept(id, l, h));
        }
        auto& out = attended.emplace_back();
        for (Index l = 0; l < 2; ++l) {
          const LayerShape& s = c.shape(l);
          const Position at[] = {55, 300};
          const TensorBuffer<cpu::Backend> q(backend(), c.rows(2, s.q_heads, s.key_dim), DType::f32);
          std::vector<float> rows(static_cast<std::size_t>(2 * s.q_heads * s.value_dim));
          c.cache.attend(l, {{.sequence = id, .queries = q.tensor(), .positions = at, .out = Tensor(rows.data(), 2, s.q_heads, s.value_dim)}});
          out.insert(out.end(), rows.begin(), rows.end());
        }
      }
      for (std::size_t other = 1; other < 3; ++other) {
        ASSERT_EQ(kept[other], kept[0]) << recipe << " seed " << seed;
        for (std::size_t i = 0; i < attended[0].size(); ++i)
          ASSERT_TRUE(close(attended[other][i], attended[0][i], tolerance(Operation::attended))) << recipe << " seed " << seed;
      }
    }
}

/// Three forks on which fork, truncate and commit happen in every order.
TEST(KvCacheOrder, ForkTruncateAndCommitInAnyOrderEqualTheModel) {
  enum { fork, truncate, commit, append };
  std::vector<int> order{fork, truncate, commit, append, truncate, commit};
  std::sort(order.begin(), order.end());
  std::uint64_t seed = 0;
  do {
    Checked c(backend(), model(), {.page_tokens = 16, .pool_bytes = 1 << 20}, ++seed);
    std::vector<SequenceId> ids{c.create()};
    prompt(c, ids[0], 70);
    ids.push_back(c.fork(ids[0]));
    for (const int what : order) {
      const SequenceId id = ids[static_cast<std::size_t>(c.dice.below(std::ssize(ids)))];
      if (what == fork) ids.push_back(c.fork(id));
      if (what == truncate) c.truncate(id, static_cast<Position>(c.dice.within(10, 75)));
      if (what == commit) c.commit(c.random_plan(id, c.dice.unit()));
      if (what == append) {
        for (Index l = 0; l < 2; ++l) ASSERT_EQ(c.append(id, l, c.dice.within(1, 40), static_cast<Position>(c.dice.below(3))), Outcome::done);
      }
    }
    c.verify_all();
    for (const SequenceId id : ids) c.verify_attend(id, 0), c.verify_attend(id, 1);
    while (!ids.empty()) {
      const auto at = ids.begin() + c.dice.below(std::ssize(ids));
      c.release(*at);
      ids.erase(at);
      c.verify_all();
    }
    ASSERT_EQ(c.cache.pool().stats().pages_in_use, 0);
    if (HasFailure()) FAIL() << "order " << ::testing::PrintToString(order);
  } while (std::next_permutation(order.begin(), order.end()));
}

}  // namespace
}  // namespace kvpare::test

// What every known method promises, whichever it is: observed in pieces or at once it keeps the same tokens, pages that
// sequences share are never changed under another's feet, and a cache that was compressed takes another turn.
#include <gtest/gtest.h>

#include <kvpare/runtime/make_compressor.hpp>

#include "oracle/token_groups.hpp"
#include "support/features.hpp"
#include "support/prompt_cases.hpp"

namespace kvpare::test {
namespace {

using B = cpu::Backend;
using Fed = FedCache<B>;

constexpr Index first_turn = 120, all_turns = 180;

B& backend() {
  static B one({.threads = 1, .isa = cpu::Isa::plain});
  return one;
}

/// A system prompt, two images and a question; then another image and a question. The second layer slides, so that
/// positions matter beyond their order.
Prompt dialogue(std::uint64_t seed) {
  Prompt p = random_prompt(seed, 3, all_turns, 2, 2,
                           {span(0, 4, TokenClass::system, true), span(8, 48), span(56, 96), span(128, 160)});
  p.model.layers[1].window = 50;
  return p;
}

bool merges(const AnyCompressor& method) { return method.selector.merge != MergeInto::none; }
bool takes_part(const AnyCompressor& method, Index layer) { return layer >= method.selector.skip_layers; }

/// Calls `check(name, method)` for all of them, in sizes that go with three layers and 120 tokens.
template <class F>
void for_each_method(const F& check) {
  for (const Recipe& recipe : known_recipes()) {
    AnyCompressor method = recipe.name == "corm" ? make_compressor("corm(w=16, last=16)") : recipe.compressor;
    if (recipe.has_settings) method.keep = Keep::ratio(0.35);
    method.selector.skip_layers = std::min<Index>(method.selector.skip_layers, 1);
    check(std::string(recipe.name), method);
    if (::testing::Test::HasFailure()) FAIL() << recipe.name;
  }
}

/// Features of some of the tokens of a set.
FeatureSet part_of(const FeatureSet& all, const Positions& held) {
  FeatureSet part;
  std::vector<Index> which;
  for (Index t = 0; t < all.tokens(); ++t)
    if (std::ranges::binary_search(held, all.positions[static_cast<std::size_t>(t)])) which.push_back(t);
  const Index width = all.sources.c;
  part.sources = oracle::Array3(std::ssize(which), 1, width), part.targets = part.sources, part.texts = all.texts;
  for (Index i = 0; i < std::ssize(which); ++i) {
    const auto t = static_cast<std::size_t>(which[static_cast<std::size_t>(i)]);
    part.positions.push_back(all.positions[t]);
    part.x.push_back(all.x[t]), part.y.push_back(all.y[t]), part.image.push_back(all.image[t]);
    for (Index c = 0; c < width; ++c) {
      part.sources.at(i, 0, c) = all.sources.at(static_cast<Index>(t), 0, c);
      part.targets.at(i, 0, c) = all.targets.at(static_cast<Index>(t), 0, c);
    }
  }
  return part;
}

/// What a method reads of the tokens that a sequence holds: their features, or the rows [first, end).
void observe(Fed& fed, const Prompt& p, const AnyCompressor& method, Index first, Index end, bool final = true) {
  if (!method.scorer.reads().features) {
    fed.observe(method, first, end - first, final);
    return;
  }
  if (!final) return;
  Dice dice{77};
  const FeatureSet all = random_features(dice, visual_positions(p.classes()), 8);
  const Index last_layer = p.layers() - 1;  // layers that take part hold the same visual tokens
  fed.cache.observe_features(fed.id, method,
                             HeldFeatures<B>(backend(), part_of(all, fed.cache.kept(fed.id, last_layer, 0))).get());
}

void feed(Fed& fed, const Prompt& p, const AnyCompressor& method, Index first, Index end, Index chunk) {
  for (Index at = first; at < end; at += chunk) {
    const Index next = std::min(at + chunk, end);
    fed.append(at, next - at);
    observe(fed, p, method, at, next, next == end);
  }
}

std::vector<double> attended(Fed& fed, const Prompt& p) {
  std::vector<double> all;
  for (Index l = 0; l < p.layers(); ++l) {
    const auto of_layer = attended_by(backend(), fed, p, l, first_turn - 1).values;
    all.insert(all.end(), of_layer.begin(), of_layer.end());
  }
  return all;
}

/// All that a sequence is: where its tokens are, their rows to the last bit, and what attention reads.
struct Sight {
  std::vector<Entry> entries;
  Kept kept;
  std::vector<float> rows;
  std::vector<double> attended;
  friend bool operator==(const Sight&, const Sight&) = default;
  friend std::ostream& operator<<(std::ostream& out, const Sight& s) {
    return out << "tokens " << ::testing::PrintToString(s.kept) << " read " << ::testing::PrintToString(s.attended);
  }
};

Sight sight_of(Fed& fed, const Prompt& p, SequenceId id) {
  const SequenceId before = std::exchange(fed.id, id);
  Sight sight{{}, kept_in(fed, p), {}, attended(fed, p)};
  for (Index l = 0; l < p.layers(); ++l)
    for (const HeadPages& list : fed.cache.pages(id, l)) {
      sight.entries.insert(sight.entries.end(), list.entries.begin(), list.entries.end());
      for (const Side side : {Side::keys, Side::values}) {
        const Index width = side == Side::keys ? p.shape(l).key_dim : p.shape(l).value_dim;
        std::vector<float> rows(static_cast<std::size_t>(list.live_tokens() * width));
        const GatherRow gather{list, side, nullptr, width, rows.data()};
        backend().gather(std::span(&gather, 1));
        sight.rows.insert(sight.rows.end(), rows.begin(), rows.end());
      }
    }
  fed.id = before;
  return sight;
}

/// Compresses; what the report says of the pool is what happened to it.
CompressReport compress(Fed& fed, const AnyCompressor& method, const std::string& name) {
  const PoolStats before = fed.cache.pool().stats();
  const CompressReport report = fed.cache.compress(fed.id, method);
  const PoolStats after = fed.cache.pool().stats();
  // Merging takes pages for what it writes where others hold them: these come off what goes back.
  EXPECT_EQ(before.pages_in_use - after.pages_in_use, report.pages_before - report.pages_after - report.pages_shared)
      << name;
  EXPECT_EQ(before.bytes_in_use - after.bytes_in_use,
            report.page_bytes_before - report.page_bytes_after - report.bytes_shared)
      << name;
  if (!merges(method)) {
    EXPECT_EQ(report.pages_freed, before.pages_in_use - after.pages_in_use) << name;
    EXPECT_EQ(report.bytes_freed, before.bytes_in_use - after.bytes_in_use) << name;
  }
  EXPECT_EQ(report.nan_scores, 0) << name;
  return report;
}

/// Pages with less than 3/4 of their slots live that others hold as well, in layers that were compressed.
Index sparse_shared_pages(const Fed& fed, const Prompt& p, const CompressReport& report) {
  Index pages = 0;
  for (Index l = 0; l < p.layers(); ++l)
    for (const HeadPages& list : fed.cache.pages(fed.id, l))
      for (const Entry& e : list.entries)
        pages += report.layer_budgets[static_cast<std::size_t>(l)] >= 0 &&
                 4 * std::popcount(e.live) < 3 * list.page_tokens && fed.cache.pool().references(e.page) > 1;
  return pages;
}

TEST(EveryMethod, KeepsTheSameTokensObservedInPiecesOrAtOnce) {
  for (const std::uint64_t seed : {1, 2, 3}) {
    const Prompt p = dialogue(seed);
    for_each_method([&](const std::string& name, const AnyCompressor& method) {
      Fed at_once(backend(), p), in_pieces(backend(), p);
      feed(at_once, p, method, 0, first_turn, first_turn);
      feed(in_pieces, p, method, 0, first_turn, 31);
      const CompressReport wanted = compress(at_once, method, name), got = compress(in_pieces, method, name);
      EXPECT_EQ(kept_in(in_pieces, p), kept_in(at_once, p)) << name;
      EXPECT_EQ(got.layer_budgets, wanted.layer_budgets) << name;
      EXPECT_EQ(got.tokens_merged, wanted.tokens_merged) << name;
      EXPECT_EQ(got.tokens_after < got.tokens_before, name != "full") << name;
      const std::vector<double> a = attended(in_pieces, p), b = attended(at_once, p);
      for (std::size_t i = 0; i < b.size(); ++i)
        EXPECT_TRUE(close(a[i], b[i], tolerance(Operation::attended))) << name << ", number " << i;
    });
  }
}

TEST(EveryMethod, LeavesSharedPagesAsTheyAreAndSaysWhatIsNotFree) {
  const Prompt p = dialogue(4);
  for_each_method([&](const std::string& name, const AnyCompressor& method) {
    Fed fed(backend(), p);
    feed(fed, p, method, 0, first_turn, 31);
    const SequenceId original = fed.id, fork = fed.cache.fork(original);
    const Sight before = sight_of(fed, p, original);

    fed.id =
        fork;  // what adds up goes on from its copy, and counts no row twice; what waits for `compress` is not copied
    observe(fed, p, method, method.scorer.reads().streams ? first_turn - 31 : 0, first_turn);
    const CompressReport of_fork = compress(fed, method, name);
    EXPECT_EQ(sight_of(fed, p, original), before) << name;
    EXPECT_EQ(of_fork.pages_freed, 0) << name << ": the original holds every page";
    EXPECT_EQ(of_fork.bytes_freed, 0) << name;
    EXPECT_EQ(of_fork.rows_moved > 0, merges(method)) << name << ": only copies are written";
    EXPECT_EQ(of_fork.pages_unpacked, sparse_shared_pages(fed, p, of_fork)) << name;
    if (!merges(method)) {
      EXPECT_EQ(of_fork.pages_shared, of_fork.pages_before - of_fork.pages_after) << name;
      EXPECT_EQ(of_fork.bytes_shared, of_fork.page_bytes_before - of_fork.page_bytes_after) << name;
    }
    EXPECT_EQ(of_fork.pages_shared + of_fork.pages_unpacked > 0, name != "full") << name;

    const Sight of_fork_before = sight_of(fed, p, fork);
    const Kept chosen = kept_in(fed, p);
    fed.id = original;
    const CompressReport of_original = compress(fed, method, name);
    EXPECT_EQ(kept_in(fed, p), chosen) << name;
    EXPECT_EQ(sight_of(fed, p, fork), of_fork_before) << name;
    if (!merges(method)) {
      EXPECT_EQ(of_original.pages_freed, of_fork.pages_shared) << name << ": now nobody holds them";
      EXPECT_EQ(of_original.pages_shared, 0) << name;
      EXPECT_EQ(of_original.pages_unpacked, of_fork.pages_unpacked) << name;
    }

    fed.cache.release(fork);
    EXPECT_EQ(kept_in(fed, p), chosen) << name;
    fed.cache.release(original);
    EXPECT_EQ(fed.cache.pool().stats().pages_in_use, 0) << name;
    fed.id = fed.cache.create();
  });
}

/// Tokens that a method may choose among, of the first `end`.
Index given(const Prompt& p, const AnyCompressor& method, Index end) {
  const auto classes = p.classes();
  return std::count_if(classes.begin(), classes.begin() + end,
                       [&](TokenClass c) { return method.selector.among.has(c); });
}

/// Budgets are of all that was ever given, and what is not up for choice stays.
void expect_budgets(const Fed& fed, const Prompt& p, const AnyCompressor& method, Index end, const std::string& name) {
  const auto classes = p.classes();
  const Kept kept = kept_in(fed, p);
  Index chosen = 0, heads = 0;
  std::vector<Index> given_to;
  for (Index l = 0; l < p.layers(); ++l) {
    const auto& of_layer = kept[static_cast<std::size_t>(l)];
    if (takes_part(method, l)) given_to.push_back(given(p, method, end)), heads = std::ssize(of_layer);
    for (const Positions& of_head : of_layer) {
      ASSERT_TRUE(std::ranges::adjacent_find(of_head, std::greater_equal()) == of_head.end()) << name;
      ASSERT_TRUE(of_head.empty() || of_head.back() < end) << name << ": a token that was never given";
      const Index up = std::ranges::count_if(
          of_head, [&](Position t) { return method.selector.among.has(classes[static_cast<std::size_t>(t)]); });
      EXPECT_EQ(std::ssize(of_head) - up, end - given(p, method, end)) << name << ", layer " << l;
      chosen += takes_part(method, l) ? up : 0;
    }
  }
  const Index total = heads * oracle::total_tokens(method.keep.amount, given_to);
  EXPECT_LE(chosen, total) << name << ", turn of " << end;
  if (!method.selector.only_positive) {
    EXPECT_EQ(chosen, total) << name << ", turn of " << end;
  }
}

TEST(EveryMethod, GoesOnFromTurnToTurn) {
  const Prompt p = dialogue(5), other = dialogue(6);
  for_each_method([&](const std::string& name, const AnyCompressor& method) {
    Fed fed(backend(), p);
    feed(fed, p, method, 0, first_turn, 31);
    compress(fed, method, name);
    expect_budgets(fed, p, method, first_turn, name);
    const Kept after_first = kept_in(fed, p);

    Fed alone(backend(), p);
    feed(alone, p, method, 0, first_turn, 31);
    compress(alone, method, name);
    feed(alone, p, method, first_turn, all_turns, 31);
    compress(alone, method, name);

    // A fork goes on with the prompt, the original with a few tokens of another, in between.
    const SequenceId original = fed.id, fork = fed.cache.fork(original);
    fed.id = fork;
    fed.append(first_turn, 31);
    for (Index l = 0; l < p.layers(); ++l) {
      const TensorBuffer<B> keys(backend(), other.keys[static_cast<std::size_t>(l)], DType::f32),
          values(backend(), other.values[static_cast<std::size_t>(l)], DType::f32);
      ASSERT_EQ(fed.cache.append(original, l, keys.tensor().part(first_turn, 5), values.tensor().part(first_turn, 5),
                                 Fed::positions(first_turn, 5)),
                Outcome::done);
    }
    const Sight original_goes_on = sight_of(fed, p, original);
    observe(fed, p, method, first_turn, first_turn + 31, false);
    feed(fed, p, method, first_turn + 31, all_turns, 31);
    if (!merges(method)) attends_to_what_is_kept(backend(), fed, p, name + ", before the second compress");

    const CompressReport report = compress(fed, method, name);
    expect_budgets(fed, p, method, all_turns, name);
    const Kept kept = kept_in(fed, p);
    EXPECT_EQ(kept, kept_in(alone, p)) << name << ": a fork chooses as its original would have";
    for (std::size_t l = 0; l < kept.size(); ++l)
      for (std::size_t h = 0; h < kept[l].size(); ++h)
        EXPECT_TRUE(std::includes(after_first[l][h].begin(), after_first[l][h].end(), kept[l][h].begin(),
                                  std::ranges::lower_bound(kept[l][h], Position{first_turn})))
            << name << ", layer " << l << ", head " << h << ": tokens that had gone";
    EXPECT_EQ(report.tokens_merged > 0, merges(method)) << name;
    if (!merges(method)) attends_to_what_is_kept(backend(), fed, p, name);
    EXPECT_EQ(sight_of(fed, p, original), original_goes_on) << name;

    fed.cache.release(original);
    fed.cache.release(fork);
    EXPECT_EQ(fed.cache.pool().stats().pages_in_use, 0) << name;
    fed.id = fed.cache.create();
  });
}

}  // namespace
}  // namespace kvpare::test

// Pages that stay or go whole: what is kept against the textbook, and that nothing is copied.
#include <gtest/gtest.h>

#include <set>

#include "oracle/key_norm.hpp"
#include "oracle/reduce.hpp"
#include "oracle/whole_pages.hpp"
#include "support/prompt_cases.hpp"

namespace kvpare::test {
namespace {

template <class Rig>
class WholePages : public OnRig<Rig> {};
TYPED_TEST_SUITE(WholePages, PipelineRigs, RigNames);

constexpr Index tokens = 139;

Compressor<KeyNorm, Uniform> by_page(TopK selector, double ratio) {
  selector.granularity = Granularity::page;
  return {KeyNorm{}, Uniform{}, selector, Keep::ratio(ratio)};
}

/// Survivors of one layer, each head for itself or by their mean score.
Kept wanted_kept(const Prompt& p, const Compressor<KeyNorm, Uniform>& method, Index page, Index budget,
                 const oracle::PageRule& rule, const std::vector<bool>& candidates = {},
                 const std::vector<bool>& members = {}) {
  const auto scores = oracle::key_norm(p.keys[0]);
  Kept wanted(1);
  for (Index h = 0; h < p.shape(0).kv_heads; ++h)
    wanted[0].push_back(to_positions(
        oracle::whole_pages(method.selector.heads == SelectHeads::layer ? oracle::mean_of_layer(scores) : scores.row(h),
                            page, budget, rule, candidates, members)));
  return wanted;
}

/// Of every page all tokens are kept, or none.
void holds_whole_pages(const Positions& kept, Index page, Index count) {
  for (Index begin = 0; begin < count; begin += page) {
    Index here = 0;
    for (const Position t : kept) here += begin <= t && t < begin + page;
    EXPECT_TRUE(here == 0 || here == std::min(page, count - begin)) << here << " of the page at " << begin;
  }
}

/// What a plan says of pages: how many lose everything, how many a part.
struct PagesOfPlan {
  Index emptied = 0, cut = 0;
};
template <class Cache>
PagesOfPlan pages_of(const Cache& cache, const Plan& plan) {
  PagesOfPlan out;
  for (std::size_t l = 0; l < plan.layers.size(); ++l) {
    const auto lists = cache.pages(plan.sequence, static_cast<Index>(l));
    for (std::size_t h = 0; h < plan.layers[l].keep.size(); ++h)
      for (std::size_t e = 0; e < lists[h].entries.size(); ++e) {
        const std::uint64_t live = lists[h].entries[e].live, kept = plan.layers[l].keep[h].words()[e] & live;
        out.emptied += kept == 0, out.cut += kept != 0 && kept != live;
      }
  }
  return out;
}

template <Backend B, class M>
CompressReport commits_in_place(FedCache<B>& fed, const M& method) {
  const Plan plan = fed.cache.plan(fed.id, method);
  const PagesOfPlan pages = pages_of(fed.cache, plan);
  EXPECT_EQ(pages.cut, 0);
  const Index pages_before = fed.cache.pool().stats().pages_in_use;
  const CompressReport report = fed.cache.commit(plan);
  EXPECT_EQ(report.rows_moved, 0);
  EXPECT_EQ(report.pages_freed, pages.emptied);
  EXPECT_EQ(report.bytes_freed, report.page_bytes_before - report.page_bytes_after);
  EXPECT_EQ(fed.cache.pool().stats().pages_in_use, pages_before - pages.emptied);
  return report;
}

TYPED_TEST(WholePages, TheBestPagesAsLongAsTheyFit) {
  std::uint64_t seed = 10;
  for (const Index page : is_small<TypeParam>() ? std::vector<Index>{16} : std::vector<Index>{16, 32, 64})
    for (const SelectHeads heads : {SelectHeads::kv, SelectHeads::layer})
      for (const double ratio : is_small<TypeParam>() ? std::vector{0.1, 0.8} : std::vector{0.0, 0.1, 0.37, 0.8, 0.99})
        for (const double recent : {0.0, 0.5}) {
          const Prompt p = random_prompt(++seed, 1, tokens, 3, 1, {});
          const auto method = by_page({.heads = heads, .recent_share = recent}, ratio);
          const Index budget = even(1, tokens, ratio)[0];
          const auto wanted = wanted_kept(p, method, page, budget, {.recent_share = recent});
          for (const auto& kept : wanted[0]) {
            EXPECT_LE(static_cast<Index>(kept.size()), budget);
            holds_whole_pages(kept, page, tokens);
          }
          keeps_what_the_paper_keeps(
              this->be(), p,
              {.name = message("pages of ", page), .tags = {}, .tokens = tokens, .kv_heads = 3, .page_tokens = page},
              method, wanted);
        }
}

TYPED_TEST(WholePages, APageWithATokenThatMustStayStaysAndIsPaidFor) {
  // Image tokens are up for choice but 40 and 41, which are protected, and the ends of the image.
  const std::vector<TagSpan> tags{span(20, 120), span(40, 42, TokenClass::image, true)};
  const Prompt p = random_prompt(6, 1, tokens, 2, 1, tags);
  std::vector<bool> members, candidates;
  for (Index t = 0; t < tokens; ++t) {
    members.push_back(20 <= t && t < 120);
    candidates.push_back(members.back() && t != 40 && t != 41 && t >= 22 && t < 119);
  }
  for (const double ratio : {0.2, 0.5, 0.7, 0.9}) {
    const auto method = by_page({.among = visual, .first = 2, .last = 1}, ratio);
    const auto wanted = wanted_kept(p, method, 16, even(1, 100, ratio)[0], {}, candidates, members);
    for (const Position t : {0, 19, 20, 32, 47, 112, 138})
      EXPECT_TRUE(std::binary_search(wanted[0][0].begin(), wanted[0][0].end(), t)) << t;
    keeps_what_the_paper_keeps(this->be(), p, {.name = "protected", .tags = tags, .tokens = tokens}, method, wanted);
  }
}

TYPED_TEST(WholePages, StandIns) {
  std::uint64_t seed = 40;
  const Index page = 16;
  constexpr bool small = is_small<TypeParam>();
  std::vector<bool> random;
  for (Index s = 0; s < page; ++s) random.push_back((random_bits(5, s) & 1u) != 0);
  std::vector<bool> odd;
  for (Index s = 0; s < page; ++s) odd.push_back(s % 2 == 1);
  const std::vector<bool> zeros(static_cast<std::size_t>(page), false), ones(static_cast<std::size_t>(page), true);
  for (const double ratio : small ? std::vector{0.5} : std::vector{0.3, 0.5, 0.9, 0.995})
    for (const double represent : small ? std::vector{0.5} : std::vector{0.25, 0.5, 1.0}) {
      const Prompt p = random_prompt(++seed, 1, tokens, 2, 1, {});
      for (const auto& [anchor, bits] : {std::pair{Anchor::mean, std::vector<bool>{}},
                                         {Anchor::random, random},
                                         {Anchor::zeros, zeros},
                                         {Anchor::ones, ones},
                                         {Anchor::alternating, odd}})
        for (const bool is_even : {true, false}) {
          const bool kept_bits = !is_even;
          const auto method = by_page({.heads = is_even ? SelectHeads::layer : SelectHeads::kv,
                                       .represent = represent,
                                       .anchor = anchor,
                                       .anchor_seed = 5,
                                       .signature = kept_bits ? Signature::kept : Signature::half,
                                       .mode = is_even ? Mode::paper : Mode::reference},
                                      ratio);
          const oracle::PageRule rule{.represent = represent, .anchor = bits, .kept_bits = kept_bits, .even = is_even};
          const Index budget = even(1, tokens, ratio)[0];
          const auto wanted = wanted_kept(p, method, page, budget, rule);
          for (const auto& kept : wanted[0]) EXPECT_LE(static_cast<Index>(kept.size()), budget);
          keeps_what_the_paper_keeps(
              this->be(), p, {.name = message("anchor ", static_cast<int>(anchor)), .tags = {}, .tokens = tokens},
              method, wanted);
        }
    }
}

/// Keys whose length gives token t the score -lengths[t], in every head.
Prompt prompt_of_lengths(const std::vector<double>& lengths, Index kv_heads = 1) {
  Prompt p = random_prompt(1, 1, static_cast<Index>(lengths.size()), kv_heads, 1, {}, 4);
  for (Index t = 0; t < p.tokens(); ++t)
    for (Index h = 0; h < kv_heads; ++h)
      for (Index d = 0; d < 4; ++d) p.keys[0].at(t, h, d) = d == 0 ? lengths[static_cast<std::size_t>(t)] : 0;
  return p;
}

TYPED_TEST(WholePages, EqualPagesGoToTheLowerAndNanPagesLast) {
  std::vector<double> lengths(80, 3);
  lengths[35] = std::numeric_limits<double>::quiet_NaN();
  for (Index t = 64; t < 80; ++t) lengths[static_cast<std::size_t>(t)] = 100;
  const Prompt p = prompt_of_lengths(lengths);
  const auto kept = [&](Index k) {
    FedCache<typename TestFixture::B> fed(this->be(), p);
    fed.append(0, 80);
    auto method = by_page({}, 1);
    method.keep = Keep::tokens(k);
    const auto report = fed.cache.compress(fed.id, method);
    EXPECT_EQ(report.nan_scores, 1);
    Positions firsts;
    for (const Position t : fed.cache.kept(fed.id, 0, 0))
      if (t % 16 == 0) firsts.push_back(t);
    return firsts;
  };
  EXPECT_EQ(kept(31), (Positions{0})) << "a page that does not fit whole goes";
  EXPECT_EQ(kept(32), (Positions{0, 16}));
  EXPECT_EQ(kept(50), (Positions{0, 16, 48}));
  EXPECT_EQ(kept(64), (Positions{0, 16, 48, 64})) << "a page with one NaN is the worst";
}

TYPED_TEST(WholePages, TheNewestShareIsWholePages) {
  std::vector<double> lengths;  // the older, the better
  for (Index t = 0; t < 139; ++t) lengths.push_back(1 + static_cast<double>(t));
  const Prompt p = prompt_of_lengths(lengths);
  for (const Index newest : {10, 11, 26, 27}) {  // the last page has 11 tokens
    FedCache<typename TestFixture::B> fed(this->be(), p);
    fed.append(0, 139);
    auto method = by_page({.recent_share = static_cast<double>(newest) / 55}, 1);
    method.keep = Keep::tokens(55);
    fed.cache.compress(fed.id, method);
    const auto kept = fed.cache.kept(fed.id, 0, 0);
    EXPECT_EQ(std::binary_search(kept.begin(), kept.end(), 128), newest >= 11) << newest;
    EXPECT_EQ(std::binary_search(kept.begin(), kept.end(), 112), newest >= 27) << newest;
    EXPECT_EQ(kept.size(), newest >= 27 ? 43u : newest >= 11 ? 43u : 48u);
  }
}

TYPED_TEST(WholePages, WhereEverythingFitsEverythingStays) {
  const Prompt p = random_prompt(15, 2, tokens, 2, 1, {});
  for (const SelectHeads heads : {SelectHeads::kv, SelectHeads::layer, SelectHeads::shared})
    for (const Keep keep :
         {Keep::tokens(2 * tokens), Keep::pages(18)}) {  // a head has 9 pages, the last with 11 tokens
      FedCache<typename TestFixture::B> fed(this->be(), p);
      fed.append(0, tokens);
      auto method = by_page({.heads = heads, .represent = 1}, 1);
      method.keep = keep;
      fed.cache.compress(fed.id, method);
      for (Index l = 0; l < 2; ++l)
        for (Index h = 0; h < 2; ++h) EXPECT_EQ(fed.cache.kept(fed.id, l, h).size(), 139u) << print_setting(keep);
    }
}

TYPED_TEST(WholePages, SignaturesAreBySlotWhereAPageHasHoles) {
  // Page 1 has but slots 1, 3 and 5, of which one token is in the upper half of all: nearer to the alternating anchor
  // than page 0, which has none.
  std::vector<double> lengths(48, 3);
  for (Index t = 16; t < 48; ++t) lengths[static_cast<std::size_t>(t)] = t < 32 ? 2 : 1;
  const Prompt p = prompt_of_lengths(lengths);
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 48);
  Plan holes = fed.cache.plan(fed.id, Compressor{KeyNorm{}, Uniform{}, TopK{}, Keep::tokens(40)});
  holes.layers[0].keep[0] = Selection(std::vector<std::uint64_t>{0xffff, 0b101010, 0xffff});
  holes.in_place = true;
  fed.cache.commit(holes);
  auto method = by_page({.represent = 0.5}, 1);
  method.keep = Keep::tokens(32);
  commits_in_place(fed, method);
  Positions wanted{17, 19, 21};
  for (Position t = 32; t < 48; ++t) wanted.push_back(t);
  EXPECT_EQ(fed.cache.kept(fed.id, 0, 0), wanted);
}

TYPED_TEST(WholePages, OnlyPositiveIsOfMeans) {
  std::vector<double> lengths(48, 1);
  auto method = Compressor{SinksAndRecent{.sinks = 0}, Uniform{},
                           TopK{.only_positive = true, .granularity = Granularity::page}, Keep::ratio(1)};
  // Scores of SinksAndRecent are positions: the first page's mean is above 0, though its first token's score is not.
  const Prompt p = prompt_of_lengths(lengths);
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 48);
  fed.cache.compress(fed.id, method);
  EXPECT_EQ(fed.cache.kept(fed.id, 0, 0).size(), 48u);
  const auto short_keys =
      Compressor{KeyNorm{}, Uniform{}, TopK{.only_positive = true, .granularity = Granularity::page}, Keep::ratio(1)};
  fed.cache.compress(fed.id, short_keys);
  EXPECT_EQ(fed.cache.kept(fed.id, 0, 0).size(), 0u) << "minus the length is never above 0";
}

// ---- nothing is copied

TYPED_TEST(WholePages, NoRowMovesEvenWhereEarlierEvictionLeftHoles) {
  const Prompt p = random_prompt(9, 2, tokens, 2, 1, {});
  const auto half = Compressor{KeyNorm{}, Uniform{}, TopK{}, Keep::ratio(0.5)};
  for (const SelectHeads heads : {SelectHeads::kv, SelectHeads::layer, SelectHeads::shared})
    for (const bool holes : {false, true}) {
      FedCache<typename TestFixture::B> fed(this->be(), p);
      fed.append(0, tokens);
      if (holes) {  // heads hold different tokens, in pages of their own
        Plan some = fed.cache.plan(fed.id, half);
        some.in_place = true;
        fed.cache.commit(some);
        ASSERT_NE(fed.cache.kept(fed.id, 0, 0), fed.cache.kept(fed.id, 0, 1));
      }
      std::set<PageId> ids;
      const auto lists = fed.cache.pages(fed.id, 0);
      for (const Entry& e : lists[1].entries) ids.insert(e.page);
      const auto method = by_page({.heads = heads}, 0.3);
      commits_in_place(fed, method);
      const Index budget = even(1, tokens, 0.3)[0];
      const auto after = kept_in(fed, p);
      for (Index l = 0; l < 2; ++l) {
        Index of_layer = 0;
        for (const Positions& kept : after[static_cast<std::size_t>(l)]) of_layer += static_cast<Index>(kept.size());
        EXPECT_LE(of_layer, 2 * budget);
        EXPECT_GE(of_layer, 2 * (budget - 15)) << "less than a page of each head is left unused";
      }
      const auto left = fed.cache.pages(fed.id, 0);
      for (const Entry& e : left[1].entries) EXPECT_TRUE(ids.contains(e.page)) << "no page of the list as it was";
    }
}

TYPED_TEST(WholePages, HeadsThatHoldDifferentTokensChooseAmongTheirOwnPages) {
  const Prompt p = random_prompt(19, 1, 128, 2, 1, {});
  for (const SelectHeads heads : {SelectHeads::kv, SelectHeads::layer}) {
    FedCache<typename TestFixture::B> fed(this->be(), p);
    fed.append(0, 128);
    fed.cache.compress(fed.id, Compressor{KeyNorm{}, Uniform{}, TopK{}, Keep::pages(4)});  // packed without holes
    const auto before = kept_in(fed, p);
    ASSERT_NE(before[0][0], before[0][1]);
    commits_in_place(fed, by_page({.heads = heads}, 0.375));  // 48 tokens: 3 pages
    const auto scores = oracle::key_norm(p.keys[0]);
    for (Index h = 0; h < 2; ++h) {
      // A head's pages are those of its list: its tokens in order, 16 by 16. The mean score of a token that only some
      // heads hold is over all heads, as scorers leave 0 where there is none.
      std::vector<double> own;
      const auto& held = before[0][static_cast<std::size_t>(h)];
      for (const Position t : held) {
        double sum = 0;
        for (Index g = 0; g < 2; ++g) {
          const auto& others = before[0][static_cast<std::size_t>(g)];
          if (std::binary_search(others.begin(), others.end(), t)) sum += scores.at(g, t);
        }
        own.push_back(heads == SelectHeads::kv ? scores.at(h, t) : sum / 2);
      }
      Positions wanted;
      for (const Index t : oracle::whole_pages(own, 16, 48)) wanted.push_back(held[static_cast<std::size_t>(t)]);
      EXPECT_EQ(fed.cache.kept(fed.id, 0, h), wanted) << "head " << h;
    }
  }
}

TYPED_TEST(WholePages, PagesThatOthersShareAreNeitherCopiedNorFreed) {
  const Prompt p = random_prompt(11, 1, 96, 2, 1, {});
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 96);
  const SequenceId other = fed.cache.fork(fed.id);
  const Index before = fed.cache.pool().stats().pages_in_use;
  const auto report = fed.cache.compress(fed.id, by_page({}, 0.5));
  EXPECT_EQ(report.rows_moved, 0);
  EXPECT_EQ(report.pages_freed, 0);
  EXPECT_EQ(fed.cache.pool().stats().pages_in_use, before);
  EXPECT_EQ(fed.cache.kept(fed.id, 0, 0).size(), 48u);
  fed.cache.release(other);
  EXPECT_EQ(fed.cache.pool().stats().pages_in_use, before / 2) << "what only the other still held";
}

TYPED_TEST(WholePages, BudgetsInPagesAndBytesCountPages) {
  const Prompt p = random_prompt(12, 2, tokens, 2, 1, {});  // 9 pages a head, the last of 11 tokens
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, tokens);
  const Index page_bytes = fed.cache.stats(fed.id).page_bytes / (9 * 4);
  for (const bool in_bytes : {false, true})
    for (const Index pages : is_small<TypeParam>()
                                 ? std::vector<Index>{13}
                                 : std::vector<Index>{18, 13, 7, 4}) {  // over both layers, of each head
      FedCache<typename TestFixture::B> again(this->be(), p);
      again.append(0, tokens);
      auto method = by_page({}, 1);
      method.keep = in_bytes ? Keep::bytes(pages * 2 * page_bytes + 100) : Keep::pages(pages);
      commits_in_place(again, method);
      EXPECT_EQ(again.cache.stats(again.id).pages, 2 * pages);
      EXPECT_LE(again.cache.stats(again.id).page_bytes, 2 * pages * page_bytes);
    }
  // Pages with holes count as whole ones: their bytes are.
  Plan some = fed.cache.plan(fed.id, Compressor{KeyNorm{}, Uniform{}, TopK{}, Keep::ratio(0.5)});
  some.in_place = true;
  fed.cache.commit(some);
  auto method = by_page({}, 1);
  method.keep = Keep::pages(10);
  commits_in_place(fed, method);
  EXPECT_EQ(fed.cache.stats(fed.id).pages, 20);
}

TYPED_TEST(WholePages, TheSameKeepTwiceChangesNothing) {
  const Prompt p = random_prompt(13, 1, tokens, 2, 1, {});
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, tokens);
  const auto method = by_page({.represent = 0.25}, 0.6);
  fed.cache.compress(fed.id, method);
  const auto once = kept_in(fed, p);
  fed.cache.compress(fed.id, method);
  EXPECT_EQ(kept_in(fed, p), once);
}

TYPED_TEST(WholePages, TokensAfterTheLastObservationKeepTheirPage) {
  const Prompt p = random_prompt(14, 1, 100, 2, 1, {});
  auto method = snap_kv();
  method.scorer.window = 4, method.selector.granularity = Granularity::page, method.keep = Keep::ratio(0.5);
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.feed(method, 0, 60);
  fed.append(60, 10);
  commits_in_place(fed, method);
  const auto kept = fed.cache.kept(fed.id, 0, 0);
  for (Position t = 48; t < 70; ++t) EXPECT_TRUE(std::binary_search(kept.begin(), kept.end(), t)) << t;
  EXPECT_LE(kept.size(), 35u);
}

TEST(WholePagesOnly, WaitsOnce) {
  auto method = kv_crush();
  method.selector.granularity = Granularity::page;
  waits_at_most_once(method);
}

TEST(WholePagesOnly, WhatDoesNotGoTogetherIsRefused) {
  cpu::Backend be;
  const Prompt p = random_prompt(2, 1, 20, 1, 1, {});
  FedCache<cpu::Backend> fed(be, p);
  fed.append(0, 20);
  const auto said = [&](TopK selector) { return error_of([&] { fed.cache.plan(fed.id, by_page(selector, 0.5)); }); };
  EXPECT_NE(said({.chunk = 4}).find("top_k.chunk = 4 does not go with granularity = page, must be 1"),
            std::string::npos)
      << said({.chunk = 4});
  EXPECT_NE(said({.recover = 3}).find("top_k.recover = 3 takes single tokens"), std::string::npos)
      << said({.recover = 3});
  EXPECT_NE(said({.merge = MergeInto::nearest}).find(".merge writes to pages"), std::string::npos);
  EXPECT_EQ(said({}), "no error");
  const TensorBuffer<cpu::Backend> out(be, oracle::Array3(1, 1, 16), DType::f32);
  const Position at[] = {19};
  const std::string step = error_of([&] {
    fed.cache.decode(0,
                     {{.sequence = fed.id, .queries = fed.queries(0, 19, 1), .positions = at, .out = out.writable()}},
                     by_page({}, 0.5));
  });
  EXPECT_NE(step.find("granularity = page are for what a whole prompt has"), std::string::npos) << step;
}

}  // namespace
}  // namespace kvpare::test

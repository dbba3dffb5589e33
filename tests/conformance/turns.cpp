// Dialogues: images and questions that come turn by turn, onto a cache that has been compressed before, with budgets of their
// own for classes and images.
#include <gtest/gtest.h>

#include <kvpare/runtime/make_compressor.hpp>

#include "oracle/token_groups.hpp"
#include "support/prompt_cases.hpp"
#include "support/scripted_scorer.hpp"
#include "support/tolerance.hpp"

namespace kvpare::test {
namespace {

template <class Rig>
class Turns : public OnRig<Rig> {};
TYPED_TEST_SUITE(Turns, PipelineRigs, RigNames);

TagSpan image(Position begin, Position end, Index number, TokenClass what = TokenClass::image,
              bool is_protected = false) {
  return {.begin = begin, .end = end, .token_class = what, .image = number, .is_protected = is_protected};
}

/// Turns end at these tokens.
struct Dialogue {
  std::vector<TagSpan> tags;  // later ones win
  std::vector<Index> ends;
};

Dialogue random_dialogue(Dice& dice) {
  Dialogue d;
  Position at = static_cast<Position>(dice.within(1, 5));
  d.tags.push_back({.begin = 0, .end = at, .token_class = TokenClass::system, .is_protected = dice.chance(0.5)});
  const auto add = [&](Index tokens, const TagSpan& like) {
    TagSpan span = like;
    span.begin = at, span.end = at += static_cast<Position>(tokens);
    d.tags.push_back(span);
    return span;
  };
  const TagSpan first = add(dice.within(8, 30), {.image = 0});
  d.tags.back().token_class = TokenClass::image;
  if (dice.chance(0.7)) d.tags.push_back(image(first.begin + 2, first.begin + 5, 0, TokenClass::image, true));
  at += static_cast<Position>(dice.below(8));
  for (Index n = dice.below(3); n > 0; --n) add(dice.within(1, 9), {.token_class = TokenClass::image});  // no number
  if (dice.chance(0.5)) d.tags.push_back(image(at - 1, at, -1, TokenClass::image, true));
  if (dice.chance(0.5)) add(dice.within(3, 12), {.token_class = TokenClass::video, .image = 0});  // another's number
  at += static_cast<Position>(dice.within(1, 6));
  d.ends.push_back(at);
  for (Index turn = 1; turn < 3; ++turn) {
    add(dice.within(2, 25), {.token_class = TokenClass::image, .image = turn});
    at += static_cast<Position>(dice.below(5));
    if (dice.chance(0.3)) add(dice.within(1, 6), {.token_class = TokenClass::image, .image = 0});  // more of the first
    if (dice.chance(0.5)) add(dice.within(1, 6), {.token_class = TokenClass::audio});
    at += static_cast<Position>(dice.within(1, 6));
    d.ends.push_back(at);
  }
  return d;
}

/// Positions by the group they are in, "" = none: the textbook's way, position by position.
std::vector<std::string> groups_by_position(const Dialogue& d, const TopK& selector) {
  std::vector<std::string> names;
  std::vector<std::ptrdiff_t> tag_of;
  for (Position p = 0; p < d.ends.back(); ++p) {
    std::ptrdiff_t tag = -1;
    for (std::size_t t = 0; t < d.tags.size(); ++t)
      if (d.tags[t].begin <= p && p < d.tags[t].end) tag = static_cast<std::ptrdiff_t>(t);
    tag_of.push_back(tag);
    const TagSpan* span = tag < 0 ? nullptr : &d.tags[static_cast<std::size_t>(tag)];
    const TokenClass what = span == nullptr ? TokenClass::text : span->token_class;
    std::string name;
    for (int i = 0; i < selector.also.count; ++i)
      if (selector.also.of[i].classes.has(what)) name = message("also ", i);
    if (selector.among.has(what)) {
      name = "among";
      if (selector.each == Each::token_class) name = message("class ", static_cast<int>(what));
      if (selector.each == Each::image && span == nullptr) name = "between spans";
      if (selector.each == Each::image && span != nullptr && span->image >= 0)
        name = message("class ", static_cast<int>(what), " number ", span->image);
      if (selector.each == Each::image && span != nullptr && span->image < 0)
        name = p > 0 && tag_of[static_cast<std::size_t>(p - 1)] == tag ? names.back() : message("span at ", p);
    }
    names.push_back(name);
  }
  return names;
}

/// What a group may keep after so many tokens were given to every layer.
Index total_of_group(const Keep& keep, Index given, Index layers) {
  return keep.unit == Keep::Unit::ratio
             ? oracle::total_tokens(keep.amount, std::vector<Index>(static_cast<std::size_t>(layers), given))
             : static_cast<Index>(keep.amount);
}

Index count_of_group(const Positions& kept, const std::vector<std::string>& groups, const std::string& name) {
  return std::count_if(kept.begin(), kept.end(),
                       [&](Position p) { return groups[static_cast<std::size_t>(p)] == name; });
}

TYPED_TEST(Turns, EveryGroupKeepsWhatTheTextbookKeepsOfIt) {
  Dice dice{2};
  const int rounds = is_small<TypeParam>() ? 8 : 60;
  Index with_many_groups = 0, ragged = 0;
  for (int round = 0; round < rounds; ++round) {
    const Index layers = 1 + dice.below(3), heads = 1 + dice.below(3), page = Index{16} << dice.below(3);
    const Dialogue d = random_dialogue(dice);
    const Index tokens = d.ends.back();
    Prompt p = random_prompt(1, layers, tokens, heads, 1, dice.chance(0.5) ? d.tags : std::vector<TagSpan>{}, 4);
    FedCache<typename TestFixture::B> fed(this->be(), p, page);

    const auto amount = [&] {
      return dice.chance(0.7) ? Keep::ratio(dice.unit()) : Keep::tokens(dice.below(layers * 20));
    };
    Compressor<Scripted, Uniform> method{{dice.at}, {}, {}, amount()};
    TopK& selector = method.selector;
    const ClassSet image_and_audio = ClassSet(TokenClass::image) | TokenClass::audio;
    const ClassSet sets[] = {visual, image_and_audio, ClassSet(TokenClass::image), all_tokens};
    selector.among = sets[dice.below(4)];
    selector.each = static_cast<Each>(dice.below(3));
    selector.heads = static_cast<SelectHeads>(dice.below(3));
    selector.recent_share = dice.chance(0.6) ? 0 : dice.unit();
    selector.floor = dice.unit();
    if (selector.heads != SelectHeads::shared) selector.first = dice.below(4), selector.last = dice.below(4);
    if (!(selector.among == all_tokens) && dice.chance(0.7)) {
      selector.also = {{text, amount()}};
      if (selector.among == visual && dice.chance(0.5))
        selector.also = {{TokenClass::system, amount()}, {text | TokenClass::audio, amount()}};
    }
    const auto groups = groups_by_position(d, selector);
    std::vector<bool> is_protected(static_cast<std::size_t>(tokens), false);
    for (const TagSpan& span : d.tags)
      for (Position t = span.begin; t < span.end; ++t) is_protected[static_cast<std::size_t>(t)] = span.is_protected;
    std::vector<oracle::Array2> scores;
    for (Index l = 0; l < layers; ++l) {
      scores.emplace_back(heads, tokens);
      for (Index h = 0; h < heads; ++h)
        for (Position t = 0; t < tokens; ++t)
          scores.back().at(h, t) = static_cast<double>(Scripted::of(method.scorer.seed, l, h, t));
    }

    oracle::HeldTokens held(static_cast<std::size_t>(layers),
                            std::vector<std::vector<Index>>(static_cast<std::size_t>(heads)));
    Index before = 0;
    for (const TagSpan& span : p.tags.empty() ? d.tags : std::vector<TagSpan>{}) fed.cache.tag(fed.id, span);
    for (const Index end : d.ends) {
      fed.append(before, end - before);
      for (auto& layer : held)
        for (auto& head : layer)
          for (Index t = before; t < end; ++t) head.push_back(t);
      before = end;

      std::vector<std::string> names(groups.begin(), groups.begin() + end);
      std::sort(names.begin(), names.end());
      names.erase(std::unique(names.begin(), names.end()), names.end());
      std::vector<oracle::GroupBudget> budgets;
      for (const std::string& name : names) {
        if (name.empty()) continue;
        Keep keep = method.keep;
        if (name.starts_with("also ")) keep = selector.also.of[std::stoi(name.substr(5))].keep;
        oracle::GroupBudget& group = budgets.emplace_back();
        for (Index t = 0; t < tokens; ++t) group.has.push_back(t < end && groups[static_cast<std::size_t>(t)] == name);
        group.total = total_of_group(keep, std::count(group.has.begin(), group.has.end(), true), layers);
      }
      with_many_groups += budgets.size() > 2;
      const auto wanted = oracle::choose_by_groups(held, scores, is_protected, budgets,
                                                   {.heads = static_cast<oracle::GroupSettings::Heads>(selector.heads),
                                                    .recent_share = selector.recent_share,
                                                    .floor = selector.floor,
                                                    .first = selector.first,
                                                    .last = selector.last});
      const auto report = fed.cache.compress(fed.id, method);
      held = wanted.kept;
      for (Index l = 0; l < layers; ++l) {
        for (Index h = 0; h < heads; ++h)
          ASSERT_EQ(fed.cache.kept(fed.id, l, h),
                    to_positions(held[static_cast<std::size_t>(l)][static_cast<std::size_t>(h)]))
              << "round " << round << ", turn of " << end << ", layer " << l << ", head " << h << ", "
              << print_setting(method.keep) << " among " << print_setting(selector.among) << ", also "
              << print_setting(selector.also) << ", each " << static_cast<int>(selector.each);
        ragged += held[static_cast<std::size_t>(l)][0] != held[static_cast<std::size_t>(l)].back();
      }
      if (!budgets.empty()) {
        EXPECT_EQ(report.layer_budgets, wanted.budgets) << "round " << round;
      }
      if (selector.recent_share == 0) {
        EXPECT_EQ(report.nan_scores, wanted.nan_scores) << "round " << round;
      }
    }
  }
  EXPECT_GT(with_many_groups, rounds / 2);
  EXPECT_GT(ragged, rounds / 2);
}

/// Two groups in one call are the same as one after the other, whatever else the selector does.
TYPED_TEST(Turns, GroupsDoNotKnowOfEachOther) {
  // Numbered images in turn, so that their tokens are far apart and some share a page.
  const Prompt p = random_prompt(3, 2, 110, 2, 2,
                                 {image(3, 30, 0), image(36, 51, 0, TokenClass::video), image(51, 64, 1),
                                  image(70, 96, 1, TokenClass::video), image(80, 83, 1, TokenClass::video, true)});
  const std::vector<TopK> selectors{
      {},
      {.heads = SelectHeads::layer, .first = 2, .last = 1},
      {.heads = SelectHeads::shared, .recent_share = 0.3},
      {.skip_layers = 1, .only_positive = true},
      {.heads = SelectHeads::layer, .chunk = 4},
      {.represent = 0.5},
      {.represent = 0.3, .anchor = Anchor::mean, .signature = Signature::kept},
      {.recover = 3},
      {.merge = MergeInto::nearest},
      {.heads = SelectHeads::layer, .first = 1, .merge = MergeInto::nearest, .ends_absorb = true}};
  for (std::size_t i = 0; i < selectors.size(); ++i)
    for (const auto& [of_images, of_videos] : {std::pair{Keep::ratio(0.4), Keep::ratio(0.4)},
                                               {Keep::ratio(0.25), Keep::tokens(50)},
                                               {Keep::pages(2), Keep::ratio(0.3)},
                                               {Keep::tokens(31), Keep::bytes(16 * 1024)}}) {
      if (is_small<TypeParam>() && (of_images.unit == Keep::Unit::pages || of_images.amount == 31)) continue;
      Compressor<Scripted, Uniform> method{{7}, {}, selectors[i], of_images};
      FedCache<typename TestFixture::B> at_once(this->be(), p), in_turn(this->be(), p);
      at_once.append(0, 110), in_turn.append(0, 110);
      method.selector.among = TokenClass::image;
      const auto first = in_turn.cache.compress(in_turn.id, method);
      method.selector.among = TokenClass::video, method.keep = of_videos;
      const auto second = in_turn.cache.compress(in_turn.id, method);
      method.keep = of_images;
      if (of_images == of_videos)
        method.selector.among = visual, method.selector.each = Each::token_class;
      else
        method.selector.among = TokenClass::image, method.selector.also = {{TokenClass::video, of_videos}};
      const auto both = at_once.cache.compress(at_once.id, method);
      EXPECT_EQ(kept_in(at_once, p), kept_in(in_turn, p)) << "selector " << i << ", " << print_setting(of_images);
      EXPECT_EQ(both.tokens_merged, first.tokens_merged + second.tokens_merged);
      EXPECT_EQ(both.nan_scores, first.nan_scores + second.nan_scores);
      for (std::size_t l = 0; l < 2; ++l)
        EXPECT_EQ(both.layer_budgets[l],
                  first.layer_budgets[l] < 0 ? -1 : first.layer_budgets[l] + second.layer_budgets[l]);
      for (Index l = 0; l < 2; ++l) {
        const TensorBuffer<typename TestFixture::B> a(this->be(), oracle::Array3(1, 4, 16), DType::f32),
            b(this->be(), oracle::Array3(1, 4, 16), DType::f32);
        const Position at[] = {109};
        at_once.cache.attend(
            l, {{.sequence = at_once.id, .queries = at_once.queries(l, 109, 1), .positions = at, .out = a.writable()}});
        in_turn.cache.attend(
            l, {{.sequence = in_turn.id, .queries = in_turn.queries(l, 109, 1), .positions = at, .out = b.writable()}});
        const auto wanted = b.download(), got = a.download();
        for (std::size_t v = 0; v < wanted.values.size(); ++v)
          EXPECT_TRUE(close(got.values[v], wanted.values[v], tolerance(Operation::probability)))
              << "selector " << i << ", layer " << l << ", number " << v;
      }
    }
}

/// A system prompt, a picture and a question; then another picture and a question.
Prompt two_turns(std::uint64_t seed) {
  return random_prompt(seed, 3, 130, 2, 2,
                       {{.begin = 0, .end = 6, .token_class = TokenClass::system},
                        image(6, 46, 0),
                        image(20, 24, 0, TokenClass::image, true),
                        image(66, 110, 1)});
}
constexpr Index first_turn = 60;

TYPED_TEST(Turns, EveryMethodKeepsTheSharesOfAllImages) {
  const std::vector<std::string> names = is_small<TypeParam>()
                                             ? std::vector<std::string>{"air_cache", "ada_kv(window=4)", "h2o"}
                                             : std::vector<std::string>{"air_cache",
                                                                        "random",
                                                                        "streaming_llm",
                                                                        "h2o",
                                                                        "tova",
                                                                        "key_norm",
                                                                        "key_diff",
                                                                        "snap_kv(window=4)",
                                                                        "pyramid_kv(window=4)",
                                                                        "ada_kv(window=4)",
                                                                        "vl_cache",
                                                                        "prefix_kv",
                                                                        "elastic_cache",
                                                                        "kv_crush(window=4)",
                                                                        "chunk_kv(window=4)",
                                                                        "csp",
                                                                        "lag_kv",
                                                                        "expected_attention"};
  const Prompt p = two_turns(5);
  const auto groups = groups_by_position({p.tags, {130}}, {.among = visual, .each = Each::image});
  for (const std::string& name : names) {
    AnyCompressor method = make_compressor(name);
    method.selector.among = visual, method.selector.each = Each::image, method.keep = Keep::ratio(0.3);
    method.selector.also = {{text, Keep::ratio(0.8)}};
    FedCache<typename TestFixture::B> fed(this->be(), p);
    Kept after_first;
    for (const Index end : {first_turn, p.tokens()}) {
      fed.feed(method, end == first_turn ? 0 : first_turn, end, 17);
      fed.cache.compress(fed.id, method);
      const Kept kept = kept_in(fed, p);
      for (const auto& [group, given] :
           {std::pair{std::string("class 1 number 0"), Index{40}}, {"class 1 number 1", end > first_turn ? 44 : 0}}) {
        Index sum = 0;  // over layers, of all heads: heads that share a budget have it together
        for (std::size_t l = 0; l < 3; ++l)
          for (std::size_t h = 0; h < 2; ++h) sum += count_of_group(kept[l][h], groups, group);
        EXPECT_EQ(sum, 2 * total_of_group(method.keep, given, 3)) << name << ", " << group << ", turn of " << end;
      }
      Index texts = 0;
      for (std::size_t l = 0; l < 3; ++l)
        for (std::size_t h = 0; h < 2; ++h)
          for (const Position t : kept[l][h]) texts += t >= 6 && groups[static_cast<std::size_t>(t)].empty();
      EXPECT_EQ(texts, 2 * total_of_group(Keep::ratio(0.8), end == first_turn ? 14 : 40, 3)) << name;
      for (std::size_t l = 0; l < 3; ++l)
        for (std::size_t h = 0; h < 2; ++h) {
          for (Position t = 0; t < 6; ++t) EXPECT_TRUE(std::binary_search(kept[l][h].begin(), kept[l][h].end(), t));
          for (Position t = 20; t < 24; ++t)
            EXPECT_TRUE(std::binary_search(kept[l][h].begin(), kept[l][h].end(), t)) << name << ": protected " << t;
          if (end == first_turn) continue;
          for (const Position t : kept[l][h])
            if (t < first_turn) {
              EXPECT_TRUE(std::binary_search(after_first[l][h].begin(), after_first[l][h].end(), t))
                  << name << ": " << t << " had gone";
            }
        }
      after_first = kept;
    }
    if (method.selector.merge == MergeInto::none) attends_to_what_is_kept(this->be(), fed, p, name);
    const Kept all = kept_in(fed, p);  // nothing is compressed again
    if (!method.scorer.reads().cache_only() && !method.scorer.reads().streams) continue;
    fed.cache.compress(fed.id, method);
    EXPECT_EQ(kept_in(fed, p), all) << name;
  }
}

/// Without budgets of its own the first image pays for the second: what the setting is for.
TYPED_TEST(Turns, OneBudgetForAllImagesIsSharedByScore) {
  const Prompt p = two_turns(6);
  const auto groups = groups_by_position({p.tags, {130}}, {.among = visual, .each = Each::image});
  Index share[2];
  for (const Each each : {Each::none, Each::image}) {
    Compressor<SinksAndRecent, Uniform> newest{{.sinks = 0}, {}, {.among = visual, .each = each}, Keep::ratio(0.3)};
    FedCache<typename TestFixture::B> fed(this->be(), p);
    fed.append(0, 130);
    fed.cache.compress(fed.id, newest);
    share[static_cast<int>(each == Each::image)] =
        count_of_group(fed.cache.kept(fed.id, 0, 0), groups, "class 1 number 0");
  }
  EXPECT_EQ(share[0], 4) << "the protected ones";
  EXPECT_EQ(share[1], 12);
}

TYPED_TEST(Turns, StrengthAndSkewnessAreOfTheGroupsOwnTokens) {
  const Prompt p = random_prompt(9, 3, 100, 2, 2, {image(4, 40, 0), image(50, 90, 1)});
  FedCache<typename TestFixture::B> fed(this->be(), p);
  auto method = air_cache();
  method.selector.each = Each::image, method.keep = Keep::ratio(0.35);
  fed.feed(method, 0, 100);
  std::vector<LayerScores> scores;
  for (Index l = 0; l < 3; ++l) scores.push_back(fed.cache.scores(fed.id, l, method));
  const auto report = fed.cache.compress(fed.id, method);
  std::vector<Index> sums(3, 0);
  for (const auto& span : {std::pair<Position, Position>{4, 40}, {50, 90}}) {
    const Position begin = span.first, end = span.second;  // clang before 16 cannot capture a structured binding
    std::vector<std::vector<double>> importance;
    for (const LayerScores& s : scores) {
      auto& row = importance.emplace_back();
      for (std::size_t i = 0; i < s.positions.size(); ++i)
        if (s.positions[i] >= begin && s.positions[i] < end)
          row.push_back(static_cast<double>((s.values[0][i] + s.values[1][i]) / 2));
    }
    const auto wanted =
        oracle::strength_skewness(importance, oracle::total_tokens(0.35, std::vector<Index>(3, end - begin)));
    for (std::size_t l = 0; l < 3; ++l) {
      const auto kept = fed.cache.kept(fed.id, static_cast<Index>(l), 0);
      EXPECT_EQ(std::count_if(kept.begin(), kept.end(), [&](Position t) { return t >= begin && t < end; }), wanted[l])
          << "image from " << begin << ", layer " << l;
      sums[l] += wanted[l];
    }
    EXPECT_FALSE(wanted[0] == wanted[1] && wanted[1] == wanted[2]) << "the budgets must differ, or this tests nothing";
  }
  EXPECT_EQ(report.layer_budgets, sums);
}

TYPED_TEST(Turns, TokensWithoutAScoreStayInTheirGroup) {
  const Prompt p = random_prompt(10, 2, 90, 2, 1, {image(0, 20, 0), image(30, 60, 1), image(60, 64, 1)});
  auto method = snap_kv();
  method.scorer.window = 2;
  method.selector.among = visual, method.selector.each = Each::image, method.keep = Keep::ratio(0.5);
  method.selector.also = {{text, Keep::tokens(2 * 3)}};
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.feed(method, 0, 50);
  fed.append(50, 40);  // the last 14 of the second image, and all of the text after it, come without a score
  fed.cache.compress(fed.id, method);
  for (const Index l : {0, 1})
    for (const Index h : {0, 1}) {
      const auto kept = fed.cache.kept(fed.id, l, h);
      const auto within = [&](Position begin, Position end) {
        return std::count_if(kept.begin(), kept.end(), [&](Position t) { return t >= begin && t < end; });
      };
      EXPECT_EQ(within(0, 20), 10);
      EXPECT_EQ(within(30, 64), 17);
      EXPECT_EQ(within(50, 64), 14) << "these have no score";
      EXPECT_EQ(within(20, 30), 0) << "the text after the images is more than its budget";
      EXPECT_EQ(within(64, 90), 26);
    }
}

/// An image that nobody has scored yet stays whole, whatever a method does with scores.
TYPED_TEST(Turns, AnImageWithoutScoresStays) {
  const Prompt p = random_prompt(14, 2, 100, 2, 1, {image(2, 30, 0), image(64, 90, 1)});
  for (const char* words : {"snap_kv(window=2, budget=strength_skewness, recent_share=0.2)",
                            "snap_kv(window=2, budget=prefix, represent=0.4)", "ada_kv(window=2, recover=3)",
                            "snap_kv(window=2, heads=layer, chunk=3, only_positive=yes)",
                            "snap_kv(window=2, merge=nearest, first=2, last=2)"}) {
    AnyCompressor method = make_compressor(words);
    method.selector.among = visual, method.selector.each = Each::image, method.keep = Keep::ratio(0.25);
    FedCache<typename TestFixture::B> fed(this->be(), p);
    fed.feed(method, 0, 40);
    fed.append(40, 60);
    fed.cache.compress(fed.id, method);
    Index first = 0;
    for (const auto& layer : kept_in(fed, p))
      for (const Positions& kept : layer) {
        EXPECT_EQ(std::count_if(kept.begin(), kept.end(), [](Position t) { return t >= 64 && t < 90; }), 26) << words;
        first += std::count_if(kept.begin(), kept.end(), [](Position t) { return t >= 2 && t < 30; });
      }
    EXPECT_LE(first, 2 * 14) << words;
    if (!method.selector.only_positive) {
      EXPECT_EQ(first, 2 * 14) << words;
    }
  }
}

/// What absorbs others ascends over all groups of a head.
TYPED_TEST(Turns, MergesOfGroupsAreOneList) {
  const Prompt p = random_prompt(15, 1, 90, 1, 1, {image(0, 20, 0), image(30, 50, 1), image(60, 80, 0)});
  const Compressor<Scripted, Uniform> method{
      {3}, {}, {.among = visual, .merge = MergeInto::nearest, .each = Each::image}, Keep::ratio(0.3)};
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 90);
  const Plan plan = fed.cache.plan(fed.id, method);
  const Merge& merge = plan.layers[0].merges[0];
  ASSERT_GT(merge.into.size(), 6u);
  EXPECT_TRUE(std::is_sorted(merge.into.begin(), merge.into.end()));
  const auto of_second = [](Position t) { return t >= 30 && t < 50; };
  for (std::size_t i = 0; i < merge.into.size(); ++i)
    for (Index j = merge.begin[i]; j < merge.end[i]; ++j)
      EXPECT_EQ(of_second(merge.from[static_cast<std::size_t>(j)]), of_second(merge.into[i]));
  EXPECT_EQ(std::ssize(merge.from), 60 - 18) << "all that goes";
}

/// 1 for tokens of the classes that a scorer is told are up for eviction.
struct IsUp {
  static constexpr std::string_view name = "is_up";
  static constexpr auto fields() { return std::tuple{}; }
  constexpr Reads reads() const { return {}; }
  friend bool operator==(const IsUp&, const IsUp&) = default;
};
template <Backend B>
void score(B& be, const IsUp&, const Observation<B>& seen, Scores out) {
  std::vector<float> scores;
  for (Index i = 0; i < out.heads * out.columns; ++i)
    scores.push_back(
        seen.among.has(static_cast<TokenClass>(seen.columns->classes[static_cast<std::size_t>(i % out.columns)])));
  be.to_backend(out.data, scores.data(), std::ssize(scores) * static_cast<Index>(sizeof(float)));
}

TYPED_TEST(Turns, ScorersKnowAllClassesThatAreUp) {
  const Prompt p = two_turns(16);
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 130);
  const Compressor<IsUp, Uniform> method{
      {}, {}, {.among = visual, .also = {{TokenClass::system, Keep::ratio(0.5)}}}, Keep::ratio(0.5)};
  const LayerScores scores = fed.cache.scores(fed.id, 0, method);
  const auto classes = p.classes();
  for (std::size_t t = 0; t < 130; ++t) EXPECT_EQ(scores.values[0][t], classes[t] == TokenClass::text ? 0 : 1) << t;
}

TYPED_TEST(Turns, PagesAreOfEachImage) {
  const Prompt p = random_prompt(11, 2, 150, 2, 1, {image(0, 60, 0), image(60, 150, 1)});
  const Compressor<KeyNorm, Uniform> method{{}, {}, {.among = visual, .each = Each::image}, Keep::pages(4)};
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 150);
  fed.cache.compress(fed.id, method);
  for (const Index l : {0, 1})
    for (const Index h : {0, 1}) {
      const auto kept = fed.cache.kept(fed.id, l, h);
      EXPECT_EQ(std::lower_bound(kept.begin(), kept.end(), 60) - kept.begin(), 32) << "two pages in each layer";
      EXPECT_EQ(kept.size(), 64u);
    }
  EXPECT_EQ(fed.cache.stats(fed.id).pages, 2 * 2 * 4) << "packed without holes";
}

TYPED_TEST(Turns, SharesHoldAfterForkRestoreAndTruncate) {
  const Prompt p = two_turns(12);
  const auto groups = groups_by_position({p.tags, {130}}, {.among = visual, .each = Each::image});
  const Compressor<KeyNorm, Uniform> method{{}, {}, {.among = visual, .each = Each::image}, Keep::ratio(0.25)};
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, first_turn);
  fed.cache.compress(fed.id, method);
  const Positions first = fed.cache.kept(fed.id, 1, 1);
  const SequenceId original = fed.id, fork = fed.cache.fork(original);
  const auto restored = fed.cache.restore(fed.cache.image(original));
  ASSERT_TRUE(restored);
  Kept wanted;
  for (const SequenceId id : {original, fork, *restored}) {
    fed.id = id;
    fed.append(first_turn, 130 - first_turn);
    fed.cache.compress(id, method);
    const Positions kept = fed.cache.kept(id, 1, 1);
    EXPECT_EQ(count_of_group(kept, groups, "class 1 number 0"), 10);
    EXPECT_EQ(count_of_group(kept, groups, "class 1 number 1"), 11);
    EXPECT_TRUE(
        std::includes(first.begin(), first.end(), kept.begin(), std::lower_bound(kept.begin(), kept.end(), 46)));
    if (id == original) wanted = kept_in(fed, p);
    EXPECT_EQ(kept_in(fed, p), wanted);
  }
  fed.cache.truncate(fork, 86);  // 20 of the second image were given then
  fed.id = fork;
  fed.cache.compress(fork, method);
  EXPECT_EQ(count_of_group(fed.cache.kept(fork, 1, 1), groups, "class 1 number 0"), 10);
  EXPECT_LE(count_of_group(fed.cache.kept(fork, 1, 1), groups, "class 1 number 1"), 5);
}

// ---- what does not depend on the backend

TEST(TurnsOnly, GroupsWaitOnceTogether) {
  auto method = air_cache();
  method.selector.each = Each::image,
  method.selector.also = {{text, Keep::ratio(0.5)}, {TokenClass::system, Keep::pages(1)}};
  waits_at_most_once(method);
  WalledBackend be;
  const Prompt p = two_turns(60);
  FedCache<WalledBackend> fed(be, p);
  fed.feed(method, 0, 130);
  const Index before = be.counts.waits;
  fed.cache.compress(fed.id, method);
  EXPECT_EQ(be.counts.waits - before, 1);
}

TEST(TurnsOnly, WithoutImagesEachImageFindsNothingToDo) {
  cpu::Backend be;
  const Prompt p = random_prompt(1, 2, 40, 2, 1, {});
  FedCache<cpu::Backend> fed(be, p);
  fed.append(0, 40);
  const auto report = fed.cache.compress(
      fed.id, Compressor<KeyNorm, Uniform>{{}, {}, {.among = visual, .each = Each::image}, Keep::ratio(0.25)});
  EXPECT_EQ(report.tokens_after, 2 * 2 * 40);
  EXPECT_EQ(report.layer_budgets, (std::vector<Index>{-1, -1}));
}

TEST(TurnsOnly, WhatCannotSplitABudgetSaysSo) {
  cpu::Backend be;
  const Prompt p = two_turns(1);
  FedCache<cpu::Backend> fed(be, p);
  fed.append(0, 130);
  const Kept before = kept_in(fed, p);
  const auto says = [&](const std::string& words, auto&& call) {
    const std::string said = error_of(call);
    EXPECT_NE(said.find(words), std::string::npos) << said;
    EXPECT_EQ(kept_in(fed, p), before);
  };
  const TensorBuffer<cpu::Backend> out(be, oracle::Array3(1, 4, 16), DType::f32);
  const Position at[] = {129};
  for (const char* words :
       {"key_norm(keep=20t, among=visual, each=image)", "key_norm(keep=20t, among=visual, also=text:5t)"}) {
    const auto method = make_compressor(words);
    EXPECT_FALSE(acts_at_decode(method)) << words;
    says("decode: each and also give groups of tokens budgets of their own at compress only, must be none", [&] {
      fed.cache.decode(
          0, {{.sequence = fed.id, .queries = fed.queries(0, 129, 1), .positions = at, .out = out.writable()}}, method);
    });
  }
  for (const char* words : {"key_norm(keep=64KiB, each=class) + joint(forms=int8)",
                            "key_norm(keep=64KiB, among=visual, also=text:50%) + joint(forms=int8)"})
    says(
        "meets one budget in bytes; each and also, which give groups of tokens budgets of their own, do not go with it",
        [&] { fed.cache.compress(fed.id, make_compressor(words)); });
  Compressor<KeyNorm, Uniform> twice{
      {}, {}, {.among = visual, .also = {{TokenClass::video, Keep::ratio(0.5)}}}, Keep::ratio(0.5)};
  says("top_k.also = video:0.5: video has a budget already, in among = visual",
       [&] { fed.cache.compress(fed.id, twice); });
  twice.selector.also = {{text, Keep::ratio(0.5)}, {text | TokenClass::audio, Keep::tokens(3)}};
  says("text+audio has a budget already", [&] { fed.cache.compress(fed.id, twice); });
  twice.selector.also = {{ClassSet(), Keep::ratio(0.5)}};
  says("top_k.also: an amount for no class", [&] { fed.cache.compress(fed.id, twice); });
  twice.selector.also = {{text, Keep::ratio(1.5)}};
  says("a ratio must be within [0, 1]", [&] { fed.cache.compress(fed.id, twice); });
  says("also: 9 amounts, must be at most 8", [] {
    const ClassKeep one{text, Keep::ratio(1)};
    ClassKeeps{one, one, one, one, one, one, one, one, one};
  });
}

}  // namespace
}  // namespace kvpare::test

// Methods that read features of visual tokens: TopV and VidKV's scores against their textbook versions, and the hook they come
// through.
#include <gtest/gtest.h>

#include <kvpare/pipeline/engine.hpp>
#include <kvpare/runtime/make_compressor.hpp>

#include "oracle/representatives.hpp"
#include "support/features.hpp"
#include "support/prompt_cases.hpp"
#include "support/tolerance.hpp"

namespace kvpare::test {
namespace {

template <class Rig>
class ByFeatures : public OnRig<Rig> {};
TYPED_TEST_SUITE(ByFeatures, PipelineRigs, RigNames);

/// TopV in every layer.
Compressor<Transport, Uniform> everywhere(Transport scorer) {
  return {scorer, {}, TopK{.among = visual, .heads = SelectHeads::layer}, Keep::ratio(0.5)};
}

std::vector<Transport> settings(bool small) {
  std::vector<Transport> all{{},
                             {.plan = TransportPlan::balanced},
                             {.alpha = 0.5, .beta = 0.3, .gamma = 2, .sigma = 1.5, .epsilon = 0.5, .squared = true},
                             {.plan = TransportPlan::balanced, .rounds = 1},
                             {.alpha = 0, .beta = 0},
                             {.gamma = 0}};
  if (small) all.resize(3);
  return all;
}

struct Sizes {
  Index tokens, width;
};

/// Importance is a share of 1 over all tokens: e^(error of a cost / epsilon), and the floats it is summed in.
constexpr Tolerance importance_tolerance{1e-7, 1e-4};

template <Backend B>
void expect_importance(B& be, const FeatureSet& set, const Transport& scorer, DType sources, DType targets,
                       const std::string& what) {
  const Prompt p = random_prompt(1, 2, set.positions.back() + 4, 2, 1, {span(0, set.positions.back() + 1)}, 4);
  FedCache<B> fed(be, p);
  fed.append(0, p.tokens());
  const HeldFeatures<B> held(be, set, sources, targets);
  const auto method = everywhere(scorer);
  fed.cache.observe_features(fed.id, method, held.get());
  const auto wanted = set.importance(scorer);
  for (Index l = 0; l < p.layers(); ++l) {
    const LayerScores got = fed.cache.scores(fed.id, l, method);
    for (const auto& row : got.values)
      for (std::size_t i = 0; i < row.size(); ++i) {
        const auto at = std::lower_bound(set.positions.begin(), set.positions.end(), got.positions[i]);
        const bool has = at != set.positions.end() && *at == got.positions[i];
        EXPECT_TRUE(close(static_cast<double>(row[i]),
                          has ? wanted[static_cast<std::size_t>(at - set.positions.begin())] : 0, importance_tolerance))
            << what << ", layer " << l << ", position " << got.positions[i];
      }
  }
}

TYPED_TEST(ByFeatures, ScoresAreTheTextbooks) {
  const bool small = is_small<TypeParam>();
  Dice dice{5};
  for (const Sizes size : small ? std::vector<Sizes>{{70, 6}} : std::vector<Sizes>{{1, 3}, {2, 1}, {64, 16}, {150, 40}})
    for (const Transport& scorer : settings(small)) {
      Positions positions(static_cast<std::size_t>(size.tokens));
      std::iota(positions.begin(), positions.end(), 3);
      for (std::size_t t = positions.size() / 3; t < positions.size(); ++t) positions[t] += 4;  // two images
      for (const DType type : {DType::f32, DType::f16})
        expect_importance(this->be(), random_features(dice, positions, size.width, type), scorer, type, type,
                          message(size.tokens, " tokens of ", name_of(type), ", width ", size.width, ", ",
                                  choices(static_cast<TransportPlan*>(nullptr)), ' ', static_cast<int>(scorer.plan)));
    }
}

TYPED_TEST(ByFeatures, OfTwoElementTypes) {
  Dice dice{6};
  FeatureSet set = random_features(dice, {0, 1, 2, 3, 4, 5, 6, 9, 10}, 8, DType::bf16, 3);
  expect_importance(this->be(), set, {}, DType::bf16, DType::f32, "bfloat16 and float");
}

TYPED_TEST(ByFeatures, FeaturesThatAreAlikeOrFarFromZero) {
  // Outputs that are the inputs in another order, an offset of a thousand times their differences.
  Dice dice{7};
  Positions positions(40);
  std::iota(positions.begin(), positions.end(), 0);
  FeatureSet set = random_features(dice, positions, 12);
  const auto order = dice.permutation(set.tokens());
  for (Index t = 0; t < set.tokens(); ++t)
    for (Index c = 0; c < 12; ++c) set.sources.at(t, 0, c) = rounded(1000 + set.sources.at(t, 0, c), DType::f32);
  for (Index t = 0; t < set.tokens(); ++t)
    for (Index c = 0; c < 12; ++c) set.targets.at(t, 0, c) = set.sources.at(order[static_cast<std::size_t>(t)], 0, c);
  for (const bool squared : {false, true})
    expect_importance(this->be(), set, {.squared = squared}, DType::f32, DType::f32, "permuted");
  for (double& v : set.sources.values) v = 3;
  for (double& v : set.targets.values) v = 3;
  expect_importance(this->be(), set, {}, DType::f32, DType::f32, "all the same");
  std::fill(set.x.begin(), set.x.end(), 2), std::fill(set.y.begin(), set.y.end(), 9);
  expect_importance(this->be(), set, {}, DType::f32, DType::f32, "in one place");
}

TYPED_TEST(ByFeatures, TopVKeepsTheSameTokensInAllLayersFromTheFourthOn) {
  Dice dice{8};
  const Index layers = is_small<TypeParam>() ? 4 : 6;
  const std::vector<TagSpan> tags{span(5, 35), span(40, 60, TokenClass::video)};
  const Prompt p = random_prompt(2, layers, 70, 2, 2, tags);
  const Positions visuals = visual_positions(p.classes());
  const FeatureSet set = random_features(dice, visuals, 16, DType::f16);
  const HeldFeatures<typename TestFixture::B> held(this->be(), set, DType::f16, DType::f16);
  for (const double ratio : {0.1, 0.5, 0.8}) {
    auto method = top_v();
    method.keep = Keep::ratio(ratio);
    Positions wanted;
    for (const Index t : oracle::with_samples(set.importance(method.scorer), even(1, 50, ratio)[0], 4))
      wanted.push_back(visuals[static_cast<std::size_t>(t)]);
    for (Position t = 0; t < 70; ++t)
      if (!std::binary_search(visuals.begin(), visuals.end(), t)) wanted.push_back(t);
    std::sort(wanted.begin(), wanted.end());

    FedCache<typename TestFixture::B> fed(this->be(), p);
    fed.append(0, 70);
    fed.cache.observe_features(fed.id, method, held.get());
    const Kept before = kept_in(fed, p);
    const Plan plan = fed.cache.plan(fed.id, method);
    EXPECT_EQ(kept_in(fed, p), before);
    const auto report = fed.cache.commit(plan);
    for (Index l = 0; l < layers; ++l)
      for (Index h = 0; h < 2; ++h)
        EXPECT_EQ(fed.cache.kept(fed.id, l, h), l < 3 ? all_rows(p) : wanted) << "layer " << l << ", keep " << ratio;
    EXPECT_EQ(report.nan_scores, 0);
    EXPECT_EQ(report.layer_budgets[2], -1);

    FedCache<typename TestFixture::B> by_name(this->be(), p);  // the method chosen at run time
    by_name.append(0, 70);
    const AnyCompressor any = make_compressor(message("top_v(keep=", ratio, ")"));
    by_name.cache.observe_features(by_name.id, any, held.get());
    by_name.cache.compress(by_name.id, any);
    EXPECT_EQ(kept_in(by_name, p), kept_in(fed, p));
  }
}

TYPED_TEST(ByFeatures, OnLayersWhoseHeadsHoldDifferentTokens) {
  Dice dice{9};
  const Prompt p = random_prompt(3, 2, 60, 2, 1, {span(10, 50)});
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 60);
  fed.cache.compress(fed.id, Compressor{KeyNorm{}, Uniform{}, TopK{.among = visual}, Keep::ratio(0.6)});
  ASSERT_NE(fed.cache.kept(fed.id, 0, 0), fed.cache.kept(fed.id, 0, 1));
  Positions common;  // that some head of either layer holds
  for (Position t = 10; t < 50; ++t) {
    const auto in = [&](Index l) {
      for (Index h = 0; h < 2; ++h)
        if (const auto kept = fed.cache.kept(fed.id, l, h); std::binary_search(kept.begin(), kept.end(), t)) return true;
      return false;
    };
    if (in(0) && in(1)) common.push_back(t);
  }
  const FeatureSet set = random_features(dice, common, 8);
  const HeldFeatures<typename TestFixture::B> held(this->be(), set);
  const auto method = everywhere({});
  fed.cache.observe_features(fed.id, method, held.get());
  const auto wanted = set.importance({});
  for (Index l = 0; l < 2; ++l) {
    const LayerScores got = fed.cache.scores(fed.id, l, method);
    for (Index h = 0; h < 2; ++h) {
      const Positions kept = fed.cache.kept(fed.id, l, h);
      for (std::size_t i = 0; i < got.positions.size(); ++i) {
        const float score = got.values[static_cast<std::size_t>(h)][i];
        const auto at = std::lower_bound(common.begin(), common.end(), got.positions[i]);
        if (!std::binary_search(kept.begin(), kept.end(), got.positions[i]))
          EXPECT_TRUE(std::isnan(score));
        else
          EXPECT_TRUE(close(static_cast<double>(score),
                            at != common.end() && *at == got.positions[i]
                                ? wanted[static_cast<std::size_t>(at - common.begin())]
                                : 0,
                            importance_tolerance));
      }
    }
  }
}

TYPED_TEST(ByFeatures, NaNInASourceIsItsOwnInATargetEverybodys) {
  Dice dice{10};
  const Prompt p = random_prompt(4, 1, 20, 2, 1, {span(0, 20)});
  for (const TransportPlan kind : {TransportPlan::semi_relaxed, TransportPlan::balanced}) {
    const auto method = everywhere({.plan = kind});
    FedCache<typename TestFixture::B> fed(this->be(), p);
    fed.append(0, 20);
    FeatureSet set = random_features(dice, FedCache<typename TestFixture::B>::positions(0, 20), 8);
    set.sources.at(7, 0, 2) = std::numeric_limits<double>::quiet_NaN();
    fed.cache.observe_features(fed.id, method, HeldFeatures<typename TestFixture::B>(this->be(), set).get());
    const auto scores = fed.cache.scores(fed.id, 0, method).values[1];
    for (std::size_t t = 0; t < 20; ++t) EXPECT_EQ(std::isnan(scores[t]), t == 7) << t;
    const Plan plan = fed.cache.plan(fed.id, method);
    EXPECT_GT(plan.nan_scores, 0);
    EXPECT_FALSE(plan.layers[0].keep[0].has(0, 7)) << "NaN ranks last";
    set.targets.at(3, 0, 1) = std::numeric_limits<double>::quiet_NaN();
    fed.cache.observe_features(fed.id, method, HeldFeatures<typename TestFixture::B>(this->be(), set).get());
    const LayerScores all = fed.cache.scores(fed.id, 0, method);
    for (const float score : all.values[0]) EXPECT_TRUE(std::isnan(score));
  }
}

TYPED_TEST(ByFeatures, OnPagesOfTheEngine) {
  using On = typename TestFixture::B;
  constexpr Index layers = 2, tokens = 40, heads = 2, width = 8, page = 16, pages = 3;
  Dice dice{11};
  LayerShape shape;
  shape.q_heads = shape.kv_heads = heads, shape.key_dim = shape.value_dim = width, shape.scale = 1;
  std::vector<Buffer<On, float>> memory;
  std::vector<EngineLayer<float>> engine;
  const std::vector<std::int32_t> table{2, 0, 1};
  for (Index l = 0; l < layers; ++l) {
    for (int side = 0; side < 2; ++side) {
      std::vector<float> rows(static_cast<std::size_t>(pages * page * heads * width));
      for (float& x : rows) x = static_cast<float>(dice.symmetric());
      memory.push_back(upload(this->be(), rows));
    }
    engine.push_back({.shape = shape,
                      .kv = {.keys = nhd(memory[memory.size() - 2].data(), pages, page, heads, width),
                             .values = nhd(memory.back().data(), pages, page, heads, width),
                             .pages = table,
                             .tokens = tokens}});
  }
  const FeatureSet set = random_features(dice, FedCache<On>::positions(4, 30), 8);
  const HeldFeatures<On> held(this->be(), set);
  Tags tags;
  tags.add(span(4, 34));
  EngineSequence<On> sequence(this->be(), tags);
  auto method = everywhere({});
  method.selector.skip_layers = 1;
  const std::span<const EngineLayer<float>> all = engine;
  EXPECT_NE(error_of([&] { sequence.plan(method, all); }).find("layer 1 was not observed; call observe_features first"),
            std::string::npos);
  sequence.observe_features(method, all, held.get());
  const auto report = sequence.commit(sequence.plan(method, all), all);
  EXPECT_EQ(report[0].tokens, tokens);
  Positions wanted;
  for (const Index t : oracle::select_top(set.importance({}), 15)) wanted.push_back(static_cast<Position>(4 + t));
  for (const Position t : {0, 1, 2, 3, 34, 35, 36, 37, 38, 39}) wanted.push_back(t);
  std::sort(wanted.begin(), wanted.end());
  for (const Positions& kept : report[1].positions) EXPECT_EQ(kept, wanted);
  EXPECT_NE(error_of([&] { sequence.observe(0, all[0], method, ConstTensor{}, {}); }).find("reads features"),
            std::string::npos);
}

// ---- by the text's embeddings

/// Its scores in every layer.
Compressor<CrossModal, Uniform> by_text() {
  return {{}, {}, TopK{.among = visual, .heads = SelectHeads::layer}, Keep::ratio(0.5)};
}

/// Sums are in double: what is left is the rounding to a float.
constexpr Tolerance cross_modal_tolerance{1e-6, 1e-6};

template <Backend B>
void expect_cross_modal(B& be, const FeatureSet& set, const Features& features, const std::string& what) {
  const Prompt p = random_prompt(1, 2, set.positions.back() + 4, 2, 1, {span(0, set.positions.back() + 1)}, 4);
  FedCache<B> fed(be, p);
  fed.append(0, p.tokens());
  fed.cache.observe_features(fed.id, by_text(), features);
  const auto wanted = set.importance_to_text();
  for (Index l = 0; l < p.layers(); ++l) {
    const LayerScores got = fed.cache.scores(fed.id, l, by_text());
    for (const auto& row : got.values)
      for (std::size_t i = 0; i < row.size(); ++i) {
        const auto at = std::lower_bound(set.positions.begin(), set.positions.end(), got.positions[i]);
        const bool has = at != set.positions.end() && *at == got.positions[i];
        EXPECT_TRUE(close(static_cast<double>(row[i]),
                          has ? wanted[static_cast<std::size_t>(at - set.positions.begin())] : 0, cross_modal_tolerance))
            << what << ", layer " << l << ", position " << got.positions[i];
      }
  }
}

TYPED_TEST(ByFeatures, CrossModalScoresAreTheTextbooks) {
  using On = typename TestFixture::B;
  Dice dice{15};
  for (const Sizes size : is_small<TypeParam>() ? std::vector<Sizes>{{30, 6}} : std::vector<Sizes>{{1, 3}, {2, 1}, {90, 40}})
    for (const DType type : {DType::f32, DType::f16, DType::bf16}) {
      Positions positions(static_cast<std::size_t>(size.tokens));
      std::iota(positions.begin(), positions.end(), 3);
      FeatureSet set = random_features(dice, positions, size.width, type);
      const std::string what = message(size.tokens, " tokens of ", name_of(type), ", width ", size.width);
      const HeldFeatures<On> held(this->be(), set, type, type);
      Features features = held.get();
      features.targets = {};  // not for these scores
      expect_cross_modal(this->be(), set, features, what);
      set.texts = random_array(dice, 1, 1, size.width, DType::f32);
      const TensorBuffer<On> texts(this->be(), set.texts, DType::f32);
      features.texts = texts.tensor();
      expect_cross_modal(this->be(), set, features, what + ", one text token of floats");
    }
}

/// By hand: texts (1, 2) and (2, -1) sum up to (3, 1), so that (1, 0), (0, 2), (1, 1) score 3, 2, 4.
TYPED_TEST(ByFeatures, CrossModalByHand) {
  using On = typename TestFixture::B;
  const Prompt p = random_prompt(5, 2, 6, 2, 1, {span(1, 4)});
  FeatureSet set;
  set.positions = {1, 2, 3};
  set.x = set.y = set.image = {0, 0, 0};
  set.sources = oracle::Array3(3, 1, 2), set.targets = set.sources, set.texts = oracle::Array3(2, 1, 2);
  set.sources.values = {1, 0, 0, 2, 1, 1}, set.texts.values = {1, 2, 2, -1};
  EXPECT_EQ(set.importance_to_text(), (std::vector<double>{3, 2, 4}));
  const HeldFeatures<On> held(this->be(), set);
  for (const auto& [ratio, kept] : {std::pair{0.34, Positions{0, 3, 4, 5}}, {0.67, Positions{0, 1, 3, 4, 5}}}) {
    auto method = cross_modal();
    method.keep = Keep::ratio(ratio);
    FedCache<On> fed(this->be(), p);
    fed.append(0, 6);
    fed.cache.observe_features(fed.id, method, held.get());
    EXPECT_EQ(fed.cache.scores(fed.id, 1, method).values[0], (std::vector<float>{0, 3, 2, 4, 0, 0}));
    fed.cache.compress(fed.id, method);
    for (const Index l : {0, 1})
      for (const Index h : {0, 1}) EXPECT_EQ(fed.cache.kept(fed.id, l, h), kept) << "layer " << l << ", head " << h;
    FedCache<On> by_name(this->be(), p);
    by_name.append(0, 6);
    const AnyCompressor any = make_compressor(message("cross_modal(keep=", ratio, ")"));
    by_name.cache.observe_features(by_name.id, any, held.get());
    by_name.cache.compress(by_name.id, any);
    EXPECT_EQ(kept_in(by_name, p), kept_in(fed, p));
  }
}

TYPED_TEST(ByFeatures, NaNInAVisualTokenIsItsOwnInATextEverybodys) {
  using On = typename TestFixture::B;
  Dice dice{16};
  const Prompt p = random_prompt(4, 1, 20, 2, 1, {span(0, 20)});
  FedCache<On> fed(this->be(), p);
  fed.append(0, 20);
  FeatureSet set = random_features(dice, FedCache<On>::positions(0, 20), 8);
  set.sources.at(7, 0, 2) = std::numeric_limits<double>::quiet_NaN();
  fed.cache.observe_features(fed.id, by_text(), HeldFeatures<On>(this->be(), set).get());
  const auto scores = fed.cache.scores(fed.id, 0, by_text()).values[1];
  for (std::size_t t = 0; t < 20; ++t) EXPECT_EQ(std::isnan(scores[t]), t == 7) << t;
  EXPECT_FALSE(fed.cache.plan(fed.id, by_text()).layers[0].keep[0].has(0, 7)) << "NaN ranks last";
  set.texts.at(3, 0, 1) = std::numeric_limits<double>::quiet_NaN();
  fed.cache.observe_features(fed.id, by_text(), HeldFeatures<On>(this->be(), set).get());
  const LayerScores all = fed.cache.scores(fed.id, 0, by_text());
  for (const float score : all.values[0]) EXPECT_TRUE(std::isnan(score));
}

// ---- refused

struct Refusals : ::testing::Test {
  cpu::Backend be{{.threads = 1}};
  Prompt p = random_prompt(12, 4, 30, 1, 1, {span(5, 25)});
  FedCache<cpu::Backend> fed{be, p};
  Dice dice{13};
  FeatureSet set = random_features(dice, FedCache<cpu::Backend>::positions(5, 20), 8);
  HeldFeatures<cpu::Backend> held{be, set};

  std::string refusal(const Features& f) {
    return error_of([&] { fed.cache.observe_features(fed.id, top_v(), f); });
  }
  void expect_refused(const Features& f, const std::string& why) {
    EXPECT_NE(refusal(f).find(why), std::string::npos) << refusal(f) << "\nwanted: " << why;
    EXPECT_EQ(fed.cache.stats(fed.id).observation_bytes, 0);
  }
};

TEST_F(Refusals, FeaturesThatDisagree) {
  fed.append(0, 30);
  Features f = held.get();
  const std::vector<std::int32_t> few(19);
  f.x = few;
  expect_refused(f, "observe_features: 19 x coordinates, must be 20, one per position");
  f = held.get(), f.y = few;
  expect_refused(f, "19 y coordinates");
  f = held.get(), f.image = few;
  expect_refused(f, "19 image numbers");
  f = held.get(), f.sources = f.sources.part(0, 19);
  expect_refused(f, "sources are [19, 1, 8], must be [20, 1, 8]");
  f = held.get(), f.targets.width = 7;
  expect_refused(f, "targets are [20, 1, 7], must be [20, 1, 8]");
  f = held.get(), f.targets.heads = 2;
  expect_refused(f, "targets are [20, 2, 8], must be [20, 1, 8]");
  f = held.get(), f.sources.data = nullptr;
  expect_refused(f, "sources: no memory");
  f = held.get(), f.sources.width = f.targets.width = 0;
  expect_refused(f, "features of width 0");
  f = held.get();
  Positions twice = set.positions;
  twice[3] = twice[2];
  f.positions = twice;
  expect_refused(f, "position 7 of token 3 follows 7, positions must ascend");
  twice = set.positions, twice[0] = -1;
  f.positions = twice;
  expect_refused(f, "position -1 of token 0 follows -1");
}

TEST_F(Refusals, TextsThatDisagree) {
  fed.append(0, 30);
  const auto expect = [&](const Features& f, const std::string& why) {
    const std::string got = error_of([&] { fed.cache.observe_features(fed.id, cross_modal(), f); });
    EXPECT_NE(got.find(why), std::string::npos) << got << "\nwanted: " << why;
    EXPECT_EQ(fed.cache.stats(fed.id).observation_bytes, 0);
  };
  Features f = held.get();
  f.texts = {};
  expect(f, "observe_features: texts are [0, 0, 0], must be [text tokens, 1, 8]");
  EXPECT_EQ(refusal(f), "no error") << "top_v reads none";
  FedCache<cpu::Backend> other(be, p);
  other.append(0, 30);
  const auto refused = [&](const Features& features) {
    return error_of([&] { other.cache.observe_features(other.id, cross_modal(), features); });
  };
  f = held.get(), f.texts.width = 7;
  EXPECT_NE(refused(f).find("texts are [7, 1, 7], must be [text tokens, 1, 8]"), std::string::npos) << refused(f);
  f = held.get(), f.texts.heads = 2;
  EXPECT_NE(refused(f).find("texts are [7, 2, 8]"), std::string::npos) << refused(f);
  f = held.get(), f.texts.data = nullptr;
  EXPECT_NE(refused(f), "no error");
  f = held.get(), f.sources.width = 7;
  EXPECT_NE(refused(f).find("texts are [7, 1, 8], must be [text tokens, 1, 7]"), std::string::npos) << refused(f);
  f = held.get(), f.sources = f.sources.part(0, 19);
  EXPECT_NE(refused(f).find("sources are [19, 1, 8], must be [20, 1, 8]"), std::string::npos) << refused(f);
  EXPECT_EQ(other.cache.stats(other.id).observation_bytes, 0);
  f = held.get(), f.targets = {};
  EXPECT_EQ(refused(f), "no error") << "these scores read no targets";
  EXPECT_EQ(error_of([&] { other.cache.compress(other.id, cross_modal()); }), "no error");
}

TEST_F(Refusals, TokensThatALayerDoesNotHoldOrThatAreText) {
  for (const Index l : {0, 1, 2}) fed.append(l, 0, 30);
  expect_refused(held.get(), "token 0 is of position 5, but layer 3 holds no such token (append to all layers first");
  fed.append(3, 0, 20);
  expect_refused(held.get(), "token 15 is of position 20, but layer 3 holds no such token");
  fed.append(3, 20, 10);
  Positions shifted = set.positions;
  for (Position& t : shifted) ++t;
  Features f = held.get();
  f.positions = shifted;
  expect_refused(f, "the token of position 25 is not visual");
  EXPECT_EQ(refusal(held.get()), "no error");
}

TEST_F(Refusals, TheWrongVerb) {
  fed.append(0, 30);
  EXPECT_NE(error_of([&] { fed.cache.compress(fed.id, top_v()); })
                .find("compress: layer 3 was not observed; call observe_features first"),
            std::string::npos);
  EXPECT_NE(error_of([&] { fed.cache.observe_features(fed.id, snap_kv(), held.get()); })
                .find("scorer observation_window reads no features; call observe"),
            std::string::npos);
  EXPECT_NE(error_of([&] { fed.observe(top_v(), 0, 30); })
                .find("observe: scorer transport reads features of visual tokens, not queries; call observe_features"),
            std::string::npos);
  EXPECT_NE(error_of([&] { fed.observe(cross_modal(), 0, 30); }).find("scorer cross_modal reads features"), std::string::npos);
  const AnyCompressor any = make_compressor("top_v");
  EXPECT_NE(error_of([&] { fed.observe(any, 0, 30); }).find("scorer transport reads features"), std::string::npos);
  auto tokens = top_v();
  tokens.keep = Keep::tokens(10), tokens.selector.recover = 0;
  EXPECT_FALSE(acts_at_decode(tokens));
  const TensorBuffer<cpu::Backend> out(be, oracle::Array3(1, 1, 16), DType::f32);
  const Position at[] = {29};
  EXPECT_NE(error_of([&] {
              fed.cache.decode(
                  3, {{.sequence = fed.id, .queries = fed.queries(3, 29, 1), .positions = at, .out = out.writable()}},
                  tokens);
            }).find("decode: transport scores features of a prompt's visual tokens"),
            std::string::npos);
  fed.observe(snap_kv(), 0, 30);
  EXPECT_NE(refusal(held.get()).find("observe_features: layer 3 was observed by another policy"), std::string::npos);
}

TEST_F(Refusals, OfOneSettingAnotherIsNotObserved) {
  fed.append(0, 30);
  fed.cache.observe_features(fed.id, top_v(), held.get());
  auto other = top_v();
  other.scorer.gamma = 1;
  EXPECT_NE(error_of([&] { fed.cache.compress(fed.id, other); }).find("observed by another policy"), std::string::npos);
  EXPECT_EQ(error_of([&] { fed.cache.compress(fed.id, top_v()); }), "no error");
  EXPECT_NE(refusal(held.get()).find("evicted tokens are not handed over again"), std::string::npos);
}

TEST_F(Refusals, NotWhatHasNoVisualTokensOrKeepsThemAll) {
  const Prompt text_only = random_prompt(12, 4, 30, 1, 1, {});
  FedCache<cpu::Backend> other(be, text_only);
  other.cache.observe_features(other.id, top_v(), Features{});  // before anything is appended, and after
  other.append(0, 30);
  other.cache.observe_features(other.id, top_v(), Features{});
  EXPECT_EQ(other.cache.compress(other.id, top_v()).tokens_after, 4 * 30);

  fed.append(0, 30);
  auto all = top_v();
  all.keep = Keep::ratio(1);
  EXPECT_EQ(error_of([&] { fed.cache.compress(fed.id, all); }), "no error") << "what keeps everything needs no scores";
}

TEST(FeatureWaits, None) {
  WalledBackend be;
  Dice dice{14};
  const Prompt p = random_prompt(15, 5, 60, 2, 2, {span(5, 45)});
  FedCache<WalledBackend> fed(be, p);
  fed.append(0, 60);
  const FeatureSet set = random_features(dice, FedCache<WalledBackend>::positions(5, 40), 8);
  const HeldFeatures<WalledBackend> held(be, set);
  const Index before = be.counts.waits;
  fed.cache.observe_features(fed.id, top_v(), held.get());
  EXPECT_EQ(be.counts.waits, before);
  fed.cache.compress(fed.id, top_v());
  EXPECT_EQ(be.counts.waits, before + 1);
}

}  // namespace
}  // namespace kvpare::test

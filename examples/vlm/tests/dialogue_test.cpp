// The engine around the library: chunks, forks, budgets and bytes of real dialogues.
#include <gtest/gtest.h>

#include <memory>
#include <numeric>

#include "../budgets.hpp"
#include "../cpu.hpp"
#include "../evaluate.hpp"
#include "oracle/cross_modal.hpp"
#include "oracle/representatives.hpp"
#include "oracle/transport.hpp"

namespace {

using namespace vlm;
using Cache = vlm::Cache<kvpare::cpu::Backend>;
using Dialogue = vlm::Dialogue<kvpare::cpu::Backend>;

const EvaluationSet& evaluation_set() {
  static const EvaluationSet set = read_evaluation_set(KVPARE_VLM_DATA);
  return set;
}

const Decoder& decoder() {
  static const Decoder loaded(Safetensors::open(KVPARE_VLM_DATA "/vlm.safetensors"));
  return loaded;
}

kvpare::AnyCompressor visual(const char* words) {
  auto compressor = kvpare::make_compressor(words);
  compressor.selector.among = kvpare::visual;
  return compressor;
}

class DialogueTest : public ::testing::Test {
 protected:
  Dialogue begin(const char* policy, const Turn& turn, const Scene& scene = evaluation_set().scenes[2]) {
    return Dialogue(decoder(), cache_, scene.image, turn.prompt, visual(policy));
  }

  const Scene& scene_ = evaluation_set().scenes[2];
  kvpare::cpu::Backend backend_{{.threads = 1}};
  Cache cache_{backend_, attention_shapes(), cache_options(16)};
};

TEST_F(DialogueTest, ForkedFollowUpsAnswerAsIfTheyStoodAlone) {
  Dialogue first = begin("air_cache(keep=0.1)", scene_.first);
  first.answer(4);
  Dialogue same = first.fork(), other = first.fork();
  EXPECT_EQ(same.logits(), first.logits());
  // In turns, so that each writes to pages which the other would see if they were not copied.
  same.read(scene_.same[0].prompt);
  other.read(scene_.other[0].prompt);
  const auto about_same = same.answer(4), about_other = other.answer(4);

  for (const auto& [turn, answer] :
       {std::pair(&scene_.same[0], &about_same), std::pair(&scene_.other[0], &about_other)}) {
    Dialogue alone = begin("air_cache(keep=0.1)", scene_.first);
    alone.answer(4);
    alone.read(turn->prompt);
    EXPECT_EQ(alone.answer(4), *answer);
  }
}

TEST_F(DialogueTest, ReleasedDialoguesGiveAllPagesBack) {
  {
    Dialogue first = begin("snap_kv(keep=0.2)", scene_.first);
    Dialogue second = first.fork();
    second.read(scene_.same[0].prompt);
    second.answer(4);
    EXPECT_GT(cache_.pool().stats().pages_in_use, 0);
  }
  EXPECT_EQ(cache_.pool().stats().pages_in_use, 0);
}

TEST_F(DialogueTest, AFullCacheIsAnErrorThatLeavesNothingBehind) {
  Cache small(backend_, attention_shapes(),
              {.page_tokens = 16, .pool_bytes = 300 << 10});  // a prompt takes about 390 KiB
  ASSERT_GE(small.pool().stats().chunks, 1);
  EXPECT_THROW(Dialogue(decoder(), small, scene_.image, scene_.first.prompt, visual("air_cache")), std::runtime_error);
  EXPECT_EQ(small.pool().stats().pages_in_use, 0);
}

TEST_F(DialogueTest, RefusesWhatIsNoImageOrNoWord) {
  Dialogue dialogue = begin("full", scene_.first);
  const int words[] = {5, static_cast<int>(vocabulary_size)};
  EXPECT_THROW(dialogue.read(words), kvpare::InvalidArgument);
  EXPECT_THROW(decoder().embed_image(std::span(scene_.image).first(100)), kvpare::InvalidArgument);
}

TEST_F(DialogueTest, UniformBudgetsAreThoseOfTheProtocol) {
  // floor(r * 144 * 4 + 0.5) tokens over the layers, the first layers take the remainder.
  const std::pair<const char*, std::vector<Index>> cases[] = {
      {"random(keep=0.5)", {72, 72, 72, 72}}, {"random(keep=0.2)", {29, 29, 29, 28}},
      {"random(keep=0.1)", {15, 15, 14, 14}}, {"h2o(keep=0.05)", {8, 7, 7, 7}},
      {"snap_kv(keep=0.02)", {3, 3, 3, 3}},   {"snap_kv(keep=0.01)", {2, 2, 1, 1}}};
  for (const auto& [policy, wanted] : cases) {
    const Dialogue dialogue = begin(policy, scene_.describe);
    for (Index l = 0; l < layer_count; ++l)
      for (Index h = 0; h < kv_heads; ++h)
        EXPECT_EQ(std::ssize(dialogue.kept_patches(l, h)), wanted[static_cast<std::size_t>(l)])
            << policy << " layer " << l;
  }
}

TEST_F(DialogueTest, LayerBudgetsSpreadTheSameTotal) {
  const Dialogue dialogue = begin("air_cache(keep=0.1)", scene_.describe);
  Index total = 0;
  for (Index l = 0; l < layer_count; ++l) {
    const auto kept = dialogue.kept_patches(l, 0);
    EXPECT_GE(std::ssize(kept), 1);
    EXPECT_EQ(kept, dialogue.kept_patches(l, 1)) << "one choice per layer";
    total += std::ssize(kept);
  }
  EXPECT_EQ(total, 58);
}

TEST_F(DialogueTest, CompressingFreesPages) {
  const Dialogue full = begin("full", scene_.describe);
  const Dialogue small = begin("random(keep=0.1)", scene_.describe);
  // Per layer and kv head: pages of 16 tokens of 2 * 32 floats.
  const Index text = 1 + std::ssize(scene_.describe.prompt);
  const auto bytes = [](Index tokens) { return kvpare::ceil_div(tokens, 16) * 16 * 2 * 32 * 4; };
  EXPECT_EQ(full.cost().bytes_before, layer_count * kv_heads * bytes(text + visual_tokens));
  EXPECT_EQ(full.cost().bytes_after, full.cost().bytes_before);
  EXPECT_EQ(small.cost().bytes_before, full.cost().bytes_before);
  EXPECT_EQ(small.cost().bytes_after, kv_heads * (2 * bytes(text + 15) + 2 * bytes(text + 14)));
}

// ---- features

const Safetensors& weights() {
  static const Safetensors file = Safetensors::open(KVPARE_VLM_DATA "/vlm.safetensors");
  return file;
}

Matrix weight(Index layer, const char* name, Index rows, Index columns) {
  const auto values = weights().floats("layers." + std::to_string(layer) + "." + name,
                                       {static_cast<std::uint64_t>(rows), static_cast<std::uint64_t>(columns)});
  return Eigen::Map<const Matrix>(values.data(), rows, columns);
}

class FeaturesTest : public DialogueTest {
 protected:
  /// Of scene 2's first prompt, in a cache that keeps everything.
  HiddenStates states_of(Index layer) {
    HiddenStates states{.layer = layer};
    const kvpare::SequenceId sequence = cache_.create();
    decoder().forward(cache_, sequence, prompt_, 0, {}, &states);
    cache_.release(sequence);
    return states;
  }

  const Matrix prompt_ = decoder().embed_prompt(scene_.image, scene_.first.prompt);
};

TEST_F(FeaturesTest, HiddenStatesAreThoseOfTheLayer) {
  EXPECT_EQ(states_of(0).entering, prompt_);
  for (Index l = 0; l + 1 < layer_count; ++l) {
    const Matrix m = states_of(l).mlp_input;
    ASSERT_EQ(m.rows(), prompt_.rows());
    // What the MLP makes of its input, taken from what leaves the layer, is what the norm before the MLP was given.
    const Matrix gate = m * weight(l, "w1", hidden_width, model_width).transpose();
    const Matrix up = m * weight(l, "w3", hidden_width, model_width).transpose();
    const Matrix mixed = gate.array() / (1 + (-gate.array()).exp()) * up.array();
    const Matrix before = states_of(l + 1).entering - mixed * weight(l, "w2", model_width, hidden_width).transpose();
    const auto norm = weights().floats("layers." + std::to_string(l) + ".n2", {model_width});
    for (Index t = 0; t < m.rows(); ++t) {
      const float scale = 1 / std::sqrt(before.row(t).squaredNorm() / model_width + 1e-5f);
      for (Index c = 0; c < model_width; ++c)
        ASSERT_NEAR(m(t, c), before(t, c) * scale * norm[static_cast<std::size_t>(c)], 2e-4) << "layer " << l;
    }
  }
}

TEST_F(FeaturesTest, TopVKeepsThePatchesThatTransportChooses) {
  struct Case {
    const char* policy;
    Index layer, budget;
  };
  for (const Case& c :
       {Case{"top_v", 2, 72}, Case{"top_v(keep=0.1, recover=0)", 2, 14}, Case{"top_v(keep=0.2, skip_layers=2)", 1, 29},
        Case{"top_v(keep=0.25, skip_layers=0)", 0, 36}}) {
    SCOPED_TRACE(c.policy);
    const kvpare::AnyCompressor compressor = visual(c.policy);
    ASSERT_EQ(layer_of_features(compressor), c.layer);
    const HiddenStates states = states_of(c.layer);
    kvpare::oracle::Array2 sources(visual_tokens, model_width), targets = sources;
    std::vector<kvpare::oracle::GridPlace> places;
    for (Index p = 0; p < visual_tokens; ++p) {
      places.push_back({.image = 0, .x = p % 12, .y = p / 12});
      for (Index d = 0; d < model_width; ++d)
        sources.at(p, d) = states.entering(1 + p, d), targets.at(p, d) = states.mlp_input(1 + p, d);
    }
    const auto importance =
        kvpare::oracle::semi_relaxed_importance(kvpare::oracle::transport_cost(sources, targets, places, {}), 0.1);
    const Index every = compressor.selector.recover;
    const auto wanted = every > 0 ? kvpare::oracle::with_samples(importance, c.budget, every)
                                  : kvpare::oracle::select_top(importance, c.budget);

    const Dialogue dialogue = begin(c.policy, scene_.first);
    for (Index l = 0; l < layer_count; ++l)
      for (Index h = 0; h < kv_heads; ++h) {
        const auto kept = dialogue.kept_patches(l, h);
        if (l < compressor.selector.skip_layers)
          EXPECT_EQ(std::ssize(kept), visual_tokens) << "layer " << l;
        else
          EXPECT_TRUE(std::equal(kept.begin(), kept.end(), wanted.begin(), wanted.end())) << "layer " << l;
      }
  }
}

TEST_F(FeaturesTest, CrossModalKeepsThePatchesThatTheTextPointsTo) {
  const char* policy = "cross_modal(keep=0.25)";
  ASSERT_EQ(layer_of_features(visual(policy)), 0);
  const HiddenStates states = states_of(0);
  kvpare::oracle::Array2 patches(visual_tokens, model_width), texts(states.entering.rows() - visual_tokens, model_width);
  for (Index d = 0; d < model_width; ++d) {
    for (Index p = 0; p < visual_tokens; ++p) patches.at(p, d) = states.entering(1 + p, d);
    texts.at(0, d) = states.entering(0, d);
    for (Index t = 1; t < texts.rows; ++t) texts.at(t, d) = states.entering(visual_tokens + t, d);
  }
  const auto wanted = kvpare::oracle::select_top(kvpare::oracle::cross_modal_scores(patches, texts), 36);
  const Dialogue dialogue = begin(policy, scene_.first);
  for (Index l = 0; l < layer_count; ++l)
    for (Index h = 0; h < kv_heads; ++h) {
      const auto kept = dialogue.kept_patches(l, h);
      EXPECT_TRUE(std::equal(kept.begin(), kept.end(), wanted.begin(), wanted.end())) << "layer " << l;
    }
}

// ---- precision

TEST_F(DialogueTest, CodedPagesAnswerAndTakeWhatTheirFormatsDo) {
  Cache cache(backend_, attention_shapes(), cache_options(32));
  const auto run = [&](const char* policy) {
    Dialogue dialogue(decoder(), cache, scene_.image, scene_.first.prompt, visual(policy));
    EXPECT_EQ(std::ssize(dialogue.kept_patches(0, 0)), visual_tokens) << policy;
    EXPECT_EQ(dialogue.answer(scene_.first.longest_answer()), scene_.first.answer) << policy;
    return dialogue.cost();
  };
  const Cost full = run("full"), coded = run("in_form(form=int8)"), window = run("kivi(bits=4, residual=32)");
  const Index tokens = 1 + visual_tokens + std::ssize(scene_.first.prompt), pages = kvpare::ceil_div(tokens, 32);
  EXPECT_EQ(full.answer_bytes, layer_count * kv_heads * pages * 2 * 32 * 32 * 4);
  EXPECT_EQ(coded.answer_bytes, layer_count * kv_heads * pages * 2 * 32 * (32 + 2))
      << "codes of a byte, a half per row";
  EXPECT_EQ(coded.answer_tokens, layer_count * kv_heads * tokens);
  // At most 31 keys that wait for a group and 32 values, and a page more of these, are floats.
  EXPECT_LT(window.answer_bytes, layer_count * kv_heads * ((pages - 2) * 1280 + 3 * 32 * 32 * 2 * 4));
  EXPECT_EQ(full.support, kvpare::Support::fused);
  EXPECT_EQ(run("mikv(keep=0.2, low=int4)").support, cache.support(0, 16)) << "the least of those in use";
}

TEST_F(DialogueTest, AnswersOfLaterTurnsComeFromCodesAsWell) {
  Cache cache(backend_, attention_shapes(), cache_options(32));
  Dialogue dialogue(decoder(), cache, scene_.image, scene_.first.prompt, visual("kivi(bits=8, residual=1)"));
  dialogue.answer(scene_.first.longest_answer());
  const Index before = dialogue.cost().answer_bytes;
  for (const Turn& turn : scene_.same) {
    dialogue.read(turn.prompt);
    EXPECT_EQ(dialogue.answer(turn.longest_answer()), turn.answer);
  }
  const Index per_answer = (dialogue.cost().answer_bytes - before) / std::ssize(scene_.same);
  EXPECT_LT(per_answer, before + layer_count * kv_heads * 2 * 32 * 32 * 2 * 4) << "two pages of floats at most on top";
}

TEST_F(DialogueTest, OneBudgetHoldsItsBytes) {
  Cache cache(backend_, attention_shapes(), cache_options(16));
  for (const Index kib : {48, 96}) {
    const std::string policy = "joint(among=all, keep=" + std::to_string(kib) + "KiB)";
    Dialogue dialogue(decoder(), cache, scene_.image, scene_.describe.prompt, kvpare::make_compressor(policy));
    EXPECT_LE(dialogue.cost().bytes_after, kib * 1024);
    EXPECT_GT(dialogue.cost().bytes_after, kib * 1024 * 3 / 4);
  }
}

TEST_F(DialogueTest, AFormThatNoPageHasIsAnErrorThatNamesIt) {
  try {
    begin("in_form(form=int5)", scene_.first);
    FAIL() << "accepted";
  } catch (const kvpare::InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("form int5/int5 is none of this cache's"), std::string::npos)
        << error.what();
  }
  EXPECT_THROW(begin("kivi(bits=4)", scene_.first), kvpare::InvalidArgument) << "groups of 32 in pages of 16";
  EXPECT_EQ(cache_.pool().stats().pages_in_use, 0);
}

TEST(EvaluateTest, DoesNotDependOnThreadsAndCountsEveryAnswer) {
  std::vector<Setting> settings;
  for (const char* policy : {"full", "air_cache(keep=0.05)", "h2o(keep=0.2)"})
    settings.push_back({policy, {}, visual(policy)});
  EvaluateOptions options;
  options.scenes = 3;
  const auto alone = evaluate(decoder(), evaluation_set(), settings, options);
  options.threads = 3;
  const auto together = evaluate(decoder(), evaluation_set(), settings, options);
  for (std::size_t i = 0; i < settings.size(); ++i) {
    EXPECT_EQ(alone[i][Task::desc].answers, 3);
    EXPECT_EQ(alone[i][Task::turn1].answers, 3);
    EXPECT_EQ(alone[i][Task::same].answers, 6);
    EXPECT_EQ(alone[i][Task::other].answers, 12);
    EXPECT_EQ(alone[i].prompts, 6);
    for (std::size_t t = 0; t < task_count; ++t) {
      EXPECT_EQ(alone[i].scores[t].right, together[i].scores[t].right);
      EXPECT_EQ(alone[i].scores[t].right_tokens, together[i].scores[t].right_tokens);
    }
    EXPECT_EQ(alone[i].kept_visual, together[i].kept_visual);
    EXPECT_EQ(alone[i].cost.bytes_after, together[i].cost.bytes_after);
  }
  // Each result is its own setting's: visual tokens over 4 layers, for 2 kv heads and 6 prompts.
  EXPECT_EQ(alone[0].kept_visual, 4 * visual_tokens * kv_heads * 6);
  EXPECT_EQ(alone[1].kept_visual, 29 * kv_heads * 6);
  EXPECT_EQ(alone[2].kept_visual, 115 * kv_heads * 6);
  EXPECT_EQ(alone[0][Task::same].right, 6) << "the full cache answers these";
}

TEST(EvaluateTest, WhatAWorkerThrowsReachesTheCaller) {
  EvaluateOptions options;
  options.scenes = 2, options.threads = 2, options.page_tokens = 17;  // which the cache refuses
  EXPECT_THROW(evaluate(decoder(), evaluation_set(), {{"full", {}, visual("full")}}, options), kvpare::InvalidArgument);
}

TEST(BudgetsTest, AreMeansOfWhatDialoguesKeep) {
  std::vector<Setting> settings;
  for (const char* policy : {"random(keep=0.1)", "ada_kv(keep=0.1, rows=text, pool=1)", "zip_vl(tau=0.7)"})
    settings.push_back({policy, {}, visual(policy)});
  EvaluateOptions options;
  options.scenes = 3, options.threads = 2, options.tasks = {Task::turn1};
  const auto budgets = measure_budgets(decoder(), evaluation_set(), settings, options);
  ASSERT_EQ(budgets.size(), settings.size());
  EXPECT_EQ(budgets[0], (LayerBudgets{{{15, 15}, {15, 15}, {14, 14}, {14, 14}}}));
  EXPECT_NEAR(share_of(budgets[1]), 58.0 / (4 * visual_tokens), 1e-9) << "what heads get of it differs";

  kvpare::cpu::Backend backend{{.threads = 1}};
  Cache cache{backend, attention_shapes(), cache_options(16)};
  for (std::size_t s = 0; s < settings.size(); ++s) {
    LayerBudgets wanted{};
    for (Index i = 0; i < options.scenes; ++i) {
      const Scene& scene = evaluation_set().scenes[static_cast<std::size_t>(i)];
      const Dialogue dialogue(decoder(), cache, scene.image, scene.first.prompt, settings[s].compressor);
      for (std::size_t l = 0; l < layer_count; ++l)
        for (std::size_t h = 0; h < kv_heads; ++h)
          wanted[l][h] +=
              static_cast<double>(dialogue.kept_patches(static_cast<Index>(l), static_cast<Index>(h)).size());
    }
    for (std::size_t l = 0; l < layer_count; ++l)
      for (std::size_t h = 0; h < kv_heads; ++h)
        EXPECT_NEAR(budgets[s][l][h], wanted[l][h] / 3, 1e-9) << settings[s].policy << ", layer " << l;
  }
}

TEST(VerifyTest, NoticesAWrongAnswerAndWrongLogits) {
  EvaluationSet set;
  set.vocabulary = evaluation_set().vocabulary;
  set.scenes = {evaluation_set().scenes[0]};
  set.scenes[0].other[1].reference[0] ^= 1;
  set.scenes[0].describe.logits[7] += 0.5f;
  const Verification found = verify(decoder(), set, 1, 16);
  EXPECT_EQ(found.turns, 8);
  EXPECT_EQ(found.identical, 7);
  EXPECT_EQ(found.differences.size(), 1u);
  EXPECT_NEAR(found.largest_logit_difference, 0.5, 0.01);
}

}  // namespace

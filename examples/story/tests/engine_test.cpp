// The engine on small random models, against the textbook's way through the same file: full cache and evicted ones.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "../evaluate.hpp"
#include "../writer.hpp"
#include "tiny_model.hpp"

namespace {

using namespace story;
using namespace story::tests;

constexpr Shape small{
    .width = 24, .hidden_width = 20, .layers = 3, .q_heads = 6, .kv_heads = 2, .vocabulary = 30, .longest = 120};

std::vector<int> random_tokens(Index count, Index vocabulary, std::uint64_t seed) {
  std::vector<int> tokens;
  for (Index i = 0; i < count; ++i)
    tokens.push_back(static_cast<int>(kvpare::random_bits(seed, i) % static_cast<std::uint64_t>(vocabulary)));
  return tokens;
}

Method method_of(const std::string& words, Index block = 16) {
  return make_method(kvpare::make_compressor(words), block);
}

double largest_difference(const Matrix& logits, const std::vector<std::vector<double>>& wanted) {
  EXPECT_EQ(logits.rows(), std::ssize(wanted));
  double largest = 0;
  for (Index t = 0; t < logits.rows(); ++t)
    for (Index i = 0; i < logits.cols(); ++i)
      largest =
          std::max(largest, std::abs(logits(t, i) - wanted[static_cast<std::size_t>(t)][static_cast<std::size_t>(i)]));
  return largest;
}

constexpr double tolerance = 2e-4;  // of logits of size 10 from float weights through three layers

struct ShapeCase {
  const char* name;
  Shape shape;
  bool own_classifier;
};

class FullCacheTest : public ::testing::TestWithParam<ShapeCase> {};

TEST_P(FullCacheTest, GivesTheTextbooksLogits) {
  const auto& [name, shape, own_classifier] = GetParam();
  const std::string bytes = model_bytes(shape, own_classifier, 7);
  const Decoder decoder(parse_model(bytes, name));
  const std::vector<int> tokens = random_tokens(100, shape.vocabulary, 3);
  const auto wanted = textbook_logits(bytes, tokens, [](Index, Index, Index, Index) { return true; });
  kvpare::cpu::Backend backend({.threads = 1});
  for (const Index part : {1, 7, 100}) {
    Context context(decoder, backend, {}, {.most_tokens = 100});
    Matrix logits(100, shape.vocabulary);
    for (Index at = 0; at < 100; at += part) {
      const Index rows = std::min<Index>(part, 100 - at);
      logits.middleRows(at, rows) = decoder.logits(
          context.read(std::span(tokens).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(rows))));
    }
    EXPECT_LT(largest_difference(logits, wanted), tolerance) << part << " tokens at a time";
    EXPECT_EQ(context.length(), 100);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, FullCacheTest,
    ::testing::Values(
        ShapeCase{"grouped", small, false}, ShapeCase{"own_classifier", small, true},
        ShapeCase{"head_for_head",
                  {.width = 12,
                   .hidden_width = 31,
                   .layers = 2,
                   .q_heads = 2,
                   .kv_heads = 2,
                   .vocabulary = 11,
                   .longest = 120},
                  false},
        ShapeCase{
            "one_kv_head",
            {.width = 40, .hidden_width = 8, .layers = 1, .q_heads = 4, .kv_heads = 1, .vocabulary = 5, .longest = 120},
            true},
        ShapeCase{
            "head_of_two",
            {.width = 8, .hidden_width = 9, .layers = 2, .q_heads = 4, .kv_heads = 2, .vocabulary = 9, .longest = 120},
            false},
        ShapeCase{"wide_head",
                  {.width = 70,
                   .hidden_width = 16,
                   .layers = 1,
                   .q_heads = 1,
                   .kv_heads = 1,
                   .vocabulary = 9,
                   .longest = 120},
                  false}),
    [](const auto& shape) { return std::string(shape.param.name); });

// ---- evicting

class EvictionTest : public ::testing::Test {
 protected:
  /// Which keys each kv head holds when a token is read, [layer][kv head][token], its own not among them.
  using Held = std::vector<std::vector<std::vector<std::vector<Position>>>>;

  void SetUp() override { tokens_ = random_tokens(80, small.vocabulary, 5); }

  /// Reads token by token, and writes down what was there before each.
  Matrix read(Context& context, Held& held) {
    held.assign(static_cast<std::size_t>(small.layers), {});
    for (auto& layer : held) layer.resize(static_cast<std::size_t>(small.kv_heads));
    Matrix logits(std::ssize(tokens_), small.vocabulary);
    for (Index t = 0; t < logits.rows(); ++t) {
      for (Index l = 0; l < small.layers; ++l)
        for (Index h = 0; h < small.kv_heads; ++h)
          held[static_cast<std::size_t>(l)][static_cast<std::size_t>(h)].push_back(context.kept(l, h));
      logits.row(t) = decoder_.logits(context.read(std::span(&tokens_[static_cast<std::size_t>(t)], 1))).row(0);
    }
    return logits;
  }

  std::vector<std::vector<double>> textbook(const Held& held) const {
    return textbook_logits(bytes_, tokens_, [&](Index l, Index h, Index t, Index j) {
      const auto& there = held[static_cast<std::size_t>(l)][static_cast<std::size_t>(h)][static_cast<std::size_t>(t)];
      return j == t || std::binary_search(there.begin(), there.end(), static_cast<Position>(j));
    });
  }

  const std::string bytes_ = model_bytes(small, true, 11);
  const Decoder decoder_{parse_model(bytes_, "model")};
  kvpare::cpu::Backend backend_{{.threads = 1}};
  std::vector<int> tokens_;
};

TEST_F(EvictionTest, LogitsAreThoseOfWhatIsLeft) {
  const auto full = textbook_logits(bytes_, tokens_, [](Index, Index, Index, Index) { return true; });
  for (const char* words :
       {"h2o(keep=36t)", "random(keep=36t)", "streaming_llm(keep=36t)", "tova(keep=36t)", "key_diff(keep=36t)",
        "snap_kv(keep=36t)", "pyramid_kv(keep=36t)", "ada_kv(keep=36t)", "h2o(keep=20%)"}) {
    Context context(decoder_, backend_, method_of(words, 8), {.most_tokens = 80});
    Held held;
    const Matrix logits = read(context, held);
    EXPECT_LT(largest_difference(logits, textbook(held)), tolerance) << words;
    EXPECT_GT(largest_difference(logits, full), 100 * tolerance) << words << " evicts nothing that matters";
  }
}

TEST_F(EvictionTest, BlocksFillUpAndShrinkToTheBudget) {
  Context context(decoder_, backend_, method_of("snap_kv(keep=36t)", 8), {.most_tokens = 80});
  Held held;
  read(context, held);
  for (Index l = 0; l < small.layers; ++l)
    for (Index h = 0; h < small.kv_heads; ++h)
      for (Index t = 0; t < 80; ++t) {
        const Index wanted = t < 8 ? t : std::min<Index>(12, t - t % 8) + t % 8;  // 36 tokens over three layers
        EXPECT_EQ(
            std::ssize(held[static_cast<std::size_t>(l)][static_cast<std::size_t>(h)][static_cast<std::size_t>(t)]),
            wanted)
            << "layer " << l << ", head " << h << ", token " << t;
      }
}

TEST_F(EvictionTest, StreamingLlmKeepsTheFirstAndTheNewest) {
  Context context(decoder_, backend_, method_of("streaming_llm(keep=30t, sinks=3)", 8), {.most_tokens = 80});
  Held held;
  const Matrix logits = read(context, held);
  // Whatever the engine says it holds: the rule alone.
  const Index block = context.method().acts == Acts::each_block ? 8 : 1;
  const auto wanted = textbook_logits(bytes_, tokens_, [&](Index, Index, Index t, Index j) {
    const Index shrunk_at = t - t % block;
    return j < 3 || j >= std::min<Index>(shrunk_at - 7, shrunk_at) || j >= shrunk_at;
  });
  EXPECT_LT(largest_difference(logits, wanted), tolerance);
}

TEST_F(EvictionTest, BlocksOfOneTokenAreEachToken) {
  // Two ways through the library: decode, and observe with compress.
  for (const char* words : {"h2o(keep=36t)", "streaming_llm(keep=36t)", "tova(keep=36t)", "key_norm(keep=36t)",
                            "key_diff(keep=36t)", "random(keep=36t)", "h2o(keep=25%)"}) {
    const auto compressor = kvpare::make_compressor(words);
    const Method each_token = make_method(compressor, 1), each_block = make_method(compressor, 1, AtDecode::each_block);
    EXPECT_EQ(each_token.acts, Acts::each_token) << words;
    EXPECT_EQ(each_block.acts, Acts::each_block) << words;
    Context one(decoder_, backend_, each_token, {.most_tokens = 80}),
        other(decoder_, backend_, each_block, {.most_tokens = 80});
    EXPECT_LT((one.read(tokens_) - other.read(tokens_)).cwiseAbs().maxCoeff(), 1e-4) << words;
    for (Index l = 0; l < small.layers; ++l)
      for (Index h = 0; h < small.kv_heads; ++h)
        EXPECT_EQ(one.kept(l, h), other.kept(l, h)) << words << ", layer " << l << ", head " << h;
  }
}

TEST_F(EvictionTest, HowManyTokensAreGivenAtOnceMakesNoDifference) {
  for (const char* words : {"h2o(keep=36t)", "random(keep=36t)", "snap_kv(keep=36t)"}) {
    Matrix first;
    for (const Index part : {1, 5, 80}) {
      Context context(decoder_, backend_, method_of(words, 8), {.most_tokens = 80});
      Matrix hidden(80, small.width);
      for (Index at = 0; at < 80; at += part)
        hidden.middleRows(at, part) =
            context.read(std::span(tokens_).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(part)));
      if (part == 1)
        first = hidden;
      else
        EXPECT_LT((hidden - first).cwiseAbs().maxCoeff(), 1e-4) << words << ", " << part << " at a time";
    }
  }
}

TEST_F(EvictionTest, UsageCountsWhatQueriesSaw) {
  Context context(decoder_, backend_, method_of("snap_kv(keep=36t)", 8), {.most_tokens = 80});
  Held held;
  read(context, held);
  double seen = 0;
  for (const auto& before : held[0][0]) seen += static_cast<double>(before.size()) + 1;  // all heads hold as many
  EXPECT_DOUBLE_EQ(context.usage().seen, seen);
  EXPECT_EQ(context.usage().tokens, 80);
  EXPECT_EQ(context.usage().evicted + context.stats().live_tokens, 80 * small.layers * small.kv_heads);
  EXPECT_GE(context.usage().peak_page_bytes, context.stats().page_bytes);
  Context all_at_once(decoder_, backend_, method_of("snap_kv(keep=36t)", 8), {.most_tokens = 80});
  all_at_once.read(tokens_);
  EXPECT_DOUBLE_EQ(all_at_once.usage().seen, seen);
}

TEST_F(EvictionTest, TokensOutsideOfTheVocabularyAndTextsTooLongAreRefused) {
  Context context(decoder_, backend_, {}, {.most_tokens = 16});
  const int wrong[] = {0, static_cast<int>(small.vocabulary)};
  EXPECT_THROW(context.read(wrong), kvpare::InvalidArgument);
  EXPECT_EQ(context.length(), 0);
  EXPECT_THROW(context.read(tokens_), std::runtime_error);
}

// ---- precision

TEST_F(EvictionTest, OldTokensChangeTheirFormAndStaySeen) {
  Context context(decoder_, backend_, method_of("in_form(form=int8, residual=16)", 16), {.most_tokens = 80});
  EXPECT_EQ(context.method().acts, Acts::by_age);
  const Matrix hidden = context.read(tokens_);
  EXPECT_EQ(std::ssize(context.kept(0, 0)), 80);
  EXPECT_EQ(context.usage().evicted, 0);
  Context full(decoder_, backend_, {}, {.most_tokens = 80});
  const Matrix wanted = full.read(tokens_);
  EXPECT_EQ((hidden - wanted).topRows(17).cwiseAbs().maxCoeff() < 1e-4f, true) << "nothing is coded until the first block ends";
  EXPECT_LT((hidden - wanted).cwiseAbs().maxCoeff(), 0.05f);
  EXPECT_GT((hidden - wanted).bottomRows(8).cwiseAbs().maxCoeff(), 1e-6f) << "nothing was coded";
  EXPECT_LT(context.usage().bytes, full.usage().bytes);
}

TEST_F(EvictionTest, WhatCodecsHaveLearntIsShared) {
  const Method method = method_of("csr(nonzeros=4, dictionary=n1024)", 16);
  using Keys = kvpare::Unrotated<kvpare::CsrKeys<4, 1024>>;
  using Values = kvpare::CsrValues<4, 1024>;
  const kvpare::LayerShape shape = decoder_.attention_shapes().layers[0];
  const auto zeros = [](Index n) { return std::vector<float>(static_cast<std::size_t>(n), 0.0f); };
  const example::States::Layer atoms{zeros(kvpare::state_floats<Keys>(shape.key_dim)),
                                     zeros(kvpare::state_floats<Values>(shape.value_dim))};
  const example::States states{{Keys::name, Values::name}, std::vector(static_cast<std::size_t>(small.layers), atoms)};
  Context own(decoder_, backend_, method, {.most_tokens = 80});
  EXPECT_THROW(own.read(tokens_), kvpare::InvalidArgument) << "no dictionary";
  Context shared(decoder_, backend_, method, {.most_tokens = 80, .states = {&states, 1}}),
      full(decoder_, backend_, {}, {.most_tokens = 80});
  const Matrix difference = shared.read(tokens_) - full.read(tokens_);
  EXPECT_EQ(shared.stats().state_bytes, 0) << "what is shared counts for none";
  EXPECT_GT(difference.bottomRows(8).cwiseAbs().maxCoeff(), 1e-3f) << "nothing was coded";
}

TEST_F(EvictionTest, WhatMikvWouldEvictStays) {
  Context context(decoder_, backend_, method_of("mikv(keep=36t, low=int4)", 16), {.most_tokens = 80});
  EXPECT_EQ(context.method().acts, Acts::each_token);
  context.read(tokens_);
  for (Index l = 0; l < small.layers; ++l) EXPECT_EQ(std::ssize(context.kept(l, 0)), 80);
  EXPECT_EQ(context.usage().support, kvpare::Support::generic);
}

// ---- measuring

TEST_F(EvictionTest, NatsAreTheTextbooks) {
  const std::vector<std::vector<int>> stories = {tokens_, random_tokens(33, small.vocabulary, 8)};
  const std::vector<Setting> settings = make_settings({"full", "h2o"}, {parse_budget("12t")}, small.layers, 8);
  const std::vector<Result> results = evaluate(decoder_, stories, settings, {.threads = 2});
  double nats = 0;
  for (const std::vector<int>& story : stories) {
    const auto logits = textbook_logits(bytes_, story, [](Index, Index, Index, Index) { return true; });
    for (std::size_t t = 0; t + 1 < story.size(); ++t) {
      double sum = 0;
      for (const double logit : logits[t]) sum += std::exp(logit);
      nats += std::log(sum) - logits[t][static_cast<std::size_t>(story[t + 1])];
    }
  }
  ASSERT_EQ(results.size(), 2u);
  EXPECT_NEAR(results[0].nats, nats, 1e-3);
  EXPECT_EQ(results[0].tokens, 79 + 32);
  EXPECT_EQ(results[0].evicted, 0);
  EXPECT_GT(std::abs(results[1].nats - nats), 1e-2);
  EXPECT_GT(results[1].evicted, 0);
  const std::vector<Result> alone = evaluate(decoder_, stories, settings, {.threads = 1});
  EXPECT_EQ(alone[1].nats, results[1].nats) << "threads change nothing";
}

TEST(SettingsTest, EveryPolicyComesWithEveryBudget) {
  const std::vector<kvpare::Keep> budgets = {parse_budget("16t"), parse_budget("25%")};
  const auto settings = make_settings({"full", "h2o", "h2o(keep=40t)", "air_cache(among=visual)"}, budgets, 5, 8);
  ASSERT_EQ(settings.size(), 6u);
  EXPECT_FALSE(settings[0].budget);
  EXPECT_EQ(settings[0].method.acts, Acts::never);
  EXPECT_EQ(settings[1].method.compressor.keep, kvpare::Keep::tokens(80)) << "16 in each of five layers";
  EXPECT_EQ(settings[2].method.compressor.keep, kvpare::Keep::ratio(0.25));
  EXPECT_FALSE(settings[3].budget);
  EXPECT_EQ(settings[3].method.compressor.keep, kvpare::Keep::tokens(40)) << "as the library counts: over all layers";
  EXPECT_EQ(settings[1].method.compressor.selector.among, kvpare::all_tokens);
  EXPECT_EQ(settings[4].method.compressor.selector.among, kvpare::visual);
  for (const char* wrong : {"", "t", "16p", "1MiB", "1.5", "-1t", "1.5t", "16 t"})
    EXPECT_THROW(parse_budget(wrong), kvpare::InvalidArgument) << wrong;
  EXPECT_THROW(make_settings({"no_such"}, budgets, 5, 8), kvpare::InvalidArgument);
}

// ---- writing

TEST(ChooseTest, FollowsTheLogits) {
  Row logits(4);
  logits << 1, 3, 2, -100;
  EXPECT_EQ(choose(logits, {}, 0), 1);
  constexpr Index draws = 20000;
  for (const double temperature : {0.5, 1.0, 3.0}) {
    std::vector<Index> counts(4, 0);
    for (Position p = 0; p < draws; ++p)
      ++counts[static_cast<std::size_t>(choose(logits, {.temperature = temperature, .seed = 4}, p))];
    double sum = 0;
    for (const float logit : logits) sum += std::exp(logit / temperature);
    for (std::size_t i = 0; i < 4; ++i)
      EXPECT_NEAR(static_cast<double>(counts[i]) / draws, std::exp(logits[static_cast<Index>(i)] / temperature) / sum,
                  0.015)
          << temperature;
  }
  Index different = 0;
  for (Position p = 0; p < 100; ++p)
    different += choose(logits, {.temperature = 1, .seed = 4}, p) != choose(logits, {.temperature = 1, .seed = 5}, p);
  EXPECT_GT(different, 10);
}

TEST_F(EvictionTest, WritingGoesOnWhereItStopped) {
  for (const char* words : {"full", "h2o(keep=36t)"}) {
    const Draft begin{.tokens = {1, 4, 5}, .sampling = {.temperature = 2, .seed = 9}};
    Context one(decoder_, backend_, method_of(words, 8), {.most_tokens = small.longest});
    Draft whole = begin;
    const Index written = write(decoder_, one, whole, 50);
    EXPECT_EQ(std::ssize(whole.tokens), 3 + written);
    EXPECT_TRUE(written == 50 || whole.finished);

    Context other(decoder_, backend_, method_of(words, 8), {.most_tokens = small.longest});
    Draft parts = begin;
    std::vector<int> said;
    for (const Index steps : {0, 1, 20, 29})
      write(decoder_, other, parts, steps, [&](int previous, int token) {
        EXPECT_EQ(previous, parts.tokens.back());
        said.push_back(token);
      });
    EXPECT_EQ(parts.tokens, whole.tokens);
    EXPECT_EQ(said, std::vector<int>(whole.tokens.begin() + 3, whole.tokens.end()));
  }
}

TEST_F(EvictionTest, WritingStopsAtTheLongestSequence) {
  Context context(decoder_, backend_, {}, {.most_tokens = small.longest});
  Draft draft{.tokens = random_tokens(small.longest - 1, small.vocabulary, 2)};
  write(decoder_, context, draft, 100);
  EXPECT_LE(context.length(), small.longest);
  EXPECT_TRUE(draft.finished || std::ssize(draft.tokens) == small.longest + 1) << draft.tokens.size();
}

}  // namespace

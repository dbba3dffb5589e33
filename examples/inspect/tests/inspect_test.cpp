// What an inspection says is what textbook attention over the tokens it lists gives, and what pages really take.
#include "../inspect.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <kvpare/pipeline/kv_cache.hpp>
#include <numeric>
#include <set>

#include "traces.hpp"

namespace {

using namespace inspect;
using example::Trace;
using example::TraceArray;

double value(const TraceArray& array, Index row, Index head, Index channel) {
  const std::size_t at = static_cast<std::size_t>((row * array.heads + head) * array.width + channel);
  return with_type(array.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return static_cast<double>(static_cast<float>(reinterpret_cast<const T*>(array.values.data())[at]));
  });
}

/// Attention of one row over some tokens, all query heads joined.
std::vector<double> attention(const Trace& trace, std::size_t layer, Index row,
                              const std::vector<std::vector<Index>>& kept) {
  const auto& [q, k, v] = trace.layers[layer];
  const double scale = trace.softmax_scale.value_or(1 / std::sqrt(static_cast<float>(k.width)));
  std::vector<double> out;
  for (Index h = 0; h < q.heads; ++h) {
    const Index kv = h / (q.heads / k.heads);
    std::vector<double> sum(static_cast<std::size_t>(v.width), 0.0);
    double weights = 0;
    for (const Index t : kept[static_cast<std::size_t>(kv)]) {
      if (t > row) continue;
      double logit = 0;
      for (Index c = 0; c < k.width; ++c) logit += value(q, row, h, c) * value(k, t, kv, c);
      const double weight = std::exp(scale * logit);
      weights += weight;
      for (Index c = 0; c < v.width; ++c) sum[static_cast<std::size_t>(c)] += weight * value(v, t, kv, c);
    }
    for (const double s : sum) out.push_back(weights > 0 ? s / weights : 0);
  }
  return out;
}

/// The same Difference, from the kept tokens alone.
Difference difference(const Trace& trace, std::size_t layer, Index rows, const std::vector<std::vector<Index>>& kept) {
  std::vector<Index> all(static_cast<std::size_t>(trace.tokens()));
  std::iota(all.begin(), all.end(), 0);
  const std::vector<std::vector<Index>> full(kept.size(), all);
  double error = 0, norm = 0, cosines = 0;
  for (Index row = trace.tokens() - rows; row < trace.tokens(); ++row) {
    const auto a = attention(trace, layer, row, full), b = attention(trace, layer, row, kept);
    double aa = 0, ab = 0, bb = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      aa += a[i] * a[i], ab += a[i] * b[i], bb += b[i] * b[i];
      error += (a[i] - b[i]) * (a[i] - b[i]);
    }
    norm += aa;
    cosines += bb > 0 ? ab / std::sqrt(aa * bb) : 0;  // nothing left that this row sees
  }
  return {std::sqrt(error / norm), cosines / static_cast<double>(rows)};
}

/// Layers of different shapes, positions with gaps, a picture in the middle.
template <class T>
Trace sample(Index tokens) {
  Trace trace = trace_of(tokens);
  for (std::size_t t = 0; t < trace.positions.size(); ++t)
    trace.positions[t] = static_cast<Position>(3 * t + (t > 20 ? 1000 : 0));
  for (Index t = 0; t < tokens; ++t) trace.token_class.push_back(t >= 5 && t < 45 ? 1 : 0);
  trace.softmax_scale = 0.4f;
  add_random_layer<T>(trace, {6, 2, 8, 5}, 1);
  add_random_layer<T>(trace, {4, 4, 16, 8}, 2);
  return trace;
}

TEST(InspectTest, ErrorsAreThoseOfTextbookAttentionOverTheKeptTokens) {
  const Trace trace = sample<float>(90);
  for (const char* policy :
       {"h2o(keep=0.3)", "air_cache(keep=0.2, alpha=0.3)", "ada_kv(keep=0.2)", "random(keep=0.5)"}) {
    const Result result = run(trace, {policy}, {.page_tokens = 16, .rows = 70})[0];
    double error = 0, norm = 0, cosines = 0;
    for (std::size_t l = 0; l < 2; ++l) {
      const Difference wanted = difference(trace, l, 70, result.layers[l].kept);
      EXPECT_GT(wanted.relative_l2, 0.01) << policy;
      EXPECT_NEAR(result.layers[l].difference.relative_l2, wanted.relative_l2, 1e-5) << policy << " layer " << l;
      EXPECT_NEAR(result.layers[l].difference.cosine, wanted.cosine, 1e-5) << policy << " layer " << l;
      double layer_norm = 0;
      std::vector<Index> all(90);
      std::iota(all.begin(), all.end(), 0);
      for (Index row = 20; row < 90; ++row)
        for (const double x :
             attention(trace, l, row, std::vector<std::vector<Index>>(result.layers[l].kept.size(), all)))
          layer_norm += x * x;
      norm += layer_norm, error += wanted.relative_l2 * wanted.relative_l2 * layer_norm, cosines += wanted.cosine / 2;
    }
    EXPECT_NEAR(result.difference.relative_l2, std::sqrt(error / norm), 1e-5) << policy;
    EXPECT_NEAR(result.difference.cosine, cosines, 1e-5) << policy;
  }
}

TEST(InspectTest, KeptAreIndicesOfTokensNotPositions) {
  const Trace trace = sample<float>(90);
  const Result result = run(trace, {"streaming_llm(keep=0.2)"}, {.page_tokens = 16})[0];
  // 18 of 90 tokens: the first four, and the newest.
  std::vector<Index> wanted = {0, 1, 2, 3};
  for (Index t = 76; t < 90; ++t) wanted.push_back(t);
  for (const LayerResult& layer : result.layers) {
    EXPECT_EQ(layer.budget, 18);
    for (const auto& head : layer.kept) EXPECT_EQ(head, wanted);
  }
  EXPECT_EQ(result.tokens_before, 90 * 6);
  EXPECT_EQ(result.tokens_after, 18 * 6);
}

TEST(InspectTest, BytesAreWholePages) {
  const Trace trace = sample<kvpare::half>(90);
  const Result result = run(trace, {"streaming_llm(keep=0.2)"}, {.page_tokens = 16})[0];
  // Per kv head: 90 tokens in 6 pages, 18 tokens in 2. A page: 16 rows of keys, 16 of values, 2 bytes per channel, each
  // part at a multiple of 64 bytes.
  const Index page0 = 16 * 8 * 2 + 192, page1 = 16 * 16 * 2 + 16 * 8 * 2;
  EXPECT_EQ(result.layers[0].page_bytes_before, 2 * 6 * page0);
  EXPECT_EQ(result.layers[0].page_bytes_after, 2 * 2 * page0);
  EXPECT_EQ(result.layers[1].page_bytes_before, 4 * 6 * page1);
  EXPECT_EQ(result.layers[1].page_bytes_after, 4 * 2 * page1);
  EXPECT_EQ(result.before.pages, 2 * 6 * page0 + 4 * 6 * page1);
  EXPECT_EQ(result.after.pages, 2 * 2 * page0 + 4 * 2 * page1);
  EXPECT_EQ(result.bytes_freed, result.before.pages - result.after.pages);
  EXPECT_EQ(result.after.live, 18 * 2 * (2 * (8 + 5) + 4 * (16 + 8)));
  EXPECT_GT(result.after.bookkeeping, 0);
  EXPECT_EQ(result.after.total(),
            result.after.pages + result.after.bookkeeping + result.after.observation + result.after.running);

  const Result observed = run(trace, {"snap_kv"}, {.page_tokens = 16})[0];
  EXPECT_GE(observed.before.observation, static_cast<Index>(90 * 6 * sizeof(float))) << "scores of all tokens wait";
  EXPECT_EQ(observed.after.observation, static_cast<Index>((2 * 8 + 4 * 16) * (2 + kvpare::query_window) * sizeof(float)))
      << "the queries' range and power per kv head and channel, and that of the newest rows, for forms to come";
}

TEST(InspectTest, TheFullCacheDiffersByNothing) {
  const Result result = run(sample<kvpare::bfloat16>(40), {"full"}, {.page_tokens = 32, .rows = 1000})[0];
  for (const LayerResult& layer : result.layers) {
    EXPECT_EQ(layer.budget, -1);
    EXPECT_EQ(layer.difference.relative_l2, 0);
    EXPECT_EQ(layer.difference.cosine, 1);
    EXPECT_EQ(layer.page_bytes_after, layer.page_bytes_before);
    for (const auto& head : layer.kept) EXPECT_EQ(std::ssize(head), 40);
  }
  EXPECT_EQ(result.bytes_freed, 0);
}

TEST(InspectTest, NothingKeptIsAnErrorOfOne) {
  const Result result = run(sample<float>(40), {"random(keep=0)"}, {.page_tokens = 32})[0];
  EXPECT_EQ(result.tokens_after, 0);
  EXPECT_EQ(result.after.pages, 0);
  EXPECT_EQ(result.difference.relative_l2, 1);
  EXPECT_EQ(result.difference.cosine, 0);
}

TEST(InspectTest, PagesHoldTheTracesTypeIfItHasOne) {
  EXPECT_EQ(page_type(sample<kvpare::half>(40)), kvpare::DType::f16);
  EXPECT_EQ(page_type(sample<kvpare::bfloat16>(40)), kvpare::DType::bf16);
  Trace mixed = sample<kvpare::half>(40);
  add_random_layer<kvpare::bfloat16>(mixed, {2, 2, 4, 4}, 3);
  EXPECT_EQ(page_type(mixed), kvpare::DType::f32);
  const Result result = run(mixed, {"h2o(keep=0.5)"}, {.page_tokens = 16, .rows = 8})[0];
  EXPECT_EQ(result.layers[2].page_bytes_before, 2 * 3 * 16 * (4 + 4) * 4);
  for (std::size_t l = 0; l < 3; ++l)
    EXPECT_NEAR(result.layers[l].difference.relative_l2, difference(mixed, l, 8, result.layers[l].kept).relative_l2,
                1e-5);
}

TEST(InspectTest, PoliciesRunEachFromTheStart) {
  const Trace trace = sample<float>(90);
  const Options options{.page_tokens = 16};
  const auto together = run(trace, {"snap_kv(keep=0.1)", "h2o(keep=0.5)", "snap_kv(keep=0.1)"}, options);
  const auto alone = run(trace, {"h2o(keep=0.5)"}, options);
  for (std::size_t l = 0; l < 2; ++l) {
    EXPECT_EQ(together[0].layers[l].kept, together[2].layers[l].kept);
    EXPECT_EQ(together[1].layers[l].kept, alone[0].layers[l].kept);
    EXPECT_EQ(together[1].layers[l].difference.relative_l2, alone[0].layers[l].difference.relative_l2);
  }
  EXPECT_EQ(together[1].policy, "h2o(keep=0.5)");
  EXPECT_EQ(together[1].settings[0].value, "0.5");
}

TEST(InspectTest, TheBestScoresStay) {
  const Trace trace = sample<float>(90);
  EXPECT_TRUE(run(trace, {"tova"}, {.page_tokens = 16})[0].layers[0].scores.empty()) << "not asked for";
  const Result result = run(trace, {"h2o(keep=0.2, recent_share=0)"}, {.page_tokens = 16, .scores = true})[0];
  for (const LayerResult& layer : result.layers) {
    ASSERT_EQ(layer.scores.size(), layer.kept.size());
    for (std::size_t h = 0; h < layer.kept.size(); ++h) {
      ASSERT_EQ(layer.scores[h].size(), 90u);
      const std::set<Index> kept(layer.kept[h].begin(), layer.kept[h].end());
      float least = INFINITY, most = -INFINITY;  // of the kept, of the others
      for (Index t = 0; t < 90; ++t) {
        const float score = layer.scores[h][static_cast<std::size_t>(t)];
        if (kept.count(t) > 0)
          least = std::min(least, score);
        else
          most = std::max(most, score);
      }
      EXPECT_GE(least, most);
    }
  }
}

TEST(InspectTest, LongGapsCloseAPageEarly) {
  Trace trace = trace_of(40);
  for (std::size_t t = 0; t < 40; ++t) trace.positions[t] = static_cast<Position>(t * 30000);
  add_random_layer<float>(trace, {2, 2, 4, 4}, 1);
  add_random_layer<float>(trace, {2, 1, 64, 64}, 2);
  const Result result = run(trace, {"h2o(keep=0.25)"}, {.page_tokens = 64, .rows = 4})[0];
  EXPECT_EQ(result.layers[0].page_bytes_before, 2 * 14 * 64 * 8 * 4) << "three tokens lie within 65536 positions";
  EXPECT_NEAR(
      result.difference.cosine,
      (difference(trace, 0, 4, result.layers[0].kept).cosine + difference(trace, 1, 4, result.layers[1].kept).cosine) /
          2,
      1e-5);
}

TEST(InspectTest, WhatMakesNoSenseIsRefused) {
  const Trace trace = sample<float>(40);
  EXPECT_THROW(run(trace, {"no_such"}, {}), kvpare::InvalidArgument);
  EXPECT_THROW(run(trace, {"h2o", "h2o(keep=2)"}, {}), kvpare::InvalidArgument);
  EXPECT_THROW(run(trace, {"h2o"}, {.page_tokens = 17}), kvpare::InvalidArgument);
  EXPECT_THROW(run(trace, {"h2o"}, {.rows = 0}), kvpare::InvalidArgument);
}

}  // namespace

// Prompts on which whole methods are tried, and what a method keeps of them.
#pragma once

#include <gtest/gtest.h>

#include <kvpare/pipeline/recipes.hpp>

#include "oracle/attend.hpp"
#include "oracle/strength_skewness.hpp"
#include "prompt.hpp"
#include "tolerance.hpp"
#include "walled_backend.hpp"

namespace kvpare::test {

using Positions = std::vector<Position>;
using Kept = std::vector<std::vector<Positions>>;  // [layer][kv head]

// ---- prompts

inline TagSpan span(Position begin, Position end, TokenClass what = TokenClass::image, bool is_protected = false) {
  return {.begin = begin, .end = end, .token_class = what, .is_protected = is_protected};
}

struct Case {
  std::string name;
  std::vector<TagSpan> tags;
  Index tokens = 70, kv_heads = 2, group = 3, page_tokens = 16;
};

/// Where images may stand, and the shapes of the heads.
inline std::vector<Case> cases() {
  return {{"image, then text", {span(0, 40)}},
          {"BOS, image, text", {span(1, 50)}},
          {"text before and after", {span(20, 55)}},
          {"two images", {span(5, 25), span(35, 60, TokenClass::video)}},
          {"two images, text only between and after", {span(0, 20), span(30, 62)}},
          {"the image is last", {span(30, 70)}},
          {"one visual token", {span(11, 12)}},
          {"two visual tokens", {span(11, 13)}},
          {"no image", {}},
          {"one head", {span(3, 60)}, 70, 1, 1},
          {"groups of 5", {span(3, 90)}, 100, 1, 5, 32},
          {"groups of 7", {span(8, 100)}, 129, 3, 7, 64}};
}

/// All of them, or a few on rigs that want small shapes.
template <class Rig>
std::vector<Case> cases_for() {
  const std::vector<Case> all = cases();
  return is_small<Rig>() ? std::vector{all[2], all[3], all[10]} : all;
}

inline oracle::AttentionSettings settings_of(const LayerShape& s) {
  return {.scale = static_cast<double>(s.scale),
          .softcap = static_cast<double>(s.softcap),
          .window = s.window,
          .sink = {s.sink_logits.begin(), s.sink_logits.end()}};
}

inline Positions all_rows(const Prompt& p) {
  Positions rows(static_cast<std::size_t>(p.tokens()));
  std::iota(rows.begin(), rows.end(), 0);
  return rows;
}

inline Positions to_positions(const std::vector<Index>& x) { return {x.begin(), x.end()}; }

/// Budget of every layer when all layers hold the same number of candidates.
inline std::vector<Index> even(Index layers, Index candidates, double ratio) {
  const std::vector<Index> all(static_cast<std::size_t>(layers), candidates);
  return oracle::uniform_budgets(oracle::total_tokens(ratio, all), all);
}

template <Backend B>
Kept kept_in(const FedCache<B>& fed, const Prompt& p) {
  Kept kept;
  for (Index l = 0; l < p.layers(); ++l) {
    auto& heads = kept.emplace_back();
    for (Index h = 0; h < p.shape(l).kv_heads; ++h) heads.push_back(fed.cache.kept(fed.id, l, h));
  }
  return kept;
}

/// What one row, which needs not be in the cache, reads in a layer: [1, q_heads, value_dim].
template <Backend B>
oracle::Array3 attended_by(B& be, FedCache<B>& fed, const Prompt& p, Index layer, Index row) {
  const TensorBuffer<B> out(be, oracle::Array3(1, p.shape(layer).q_heads, p.shape(layer).value_dim), DType::f32);
  const Position at[] = {static_cast<Position>(row)};
  fed.cache.attend(
      layer,
      {{.sequence = fed.id, .queries = fed.queries(layer, row, 1), .positions = at, .out = out.writable()}});
  return out.download();
}

/// Attention of the prompt's last row over what is kept is the textbook's, on the prompt's own keys and values.
template <Backend B>
void attends_to_what_is_kept(B& be, FedCache<B>& fed, const Prompt& p, const std::string& what) {
  const Index last = p.tokens() - 1;
  for (Index l = 0; l < p.layers(); ++l) {
    const auto at = static_cast<std::size_t>(l);
    const auto row_of = [](const oracle::Array3& a, Index token, Index head) {
      const auto begin = a.values.begin() + (token * a.b + head) * a.c;
      return std::vector<double>(begin, begin + a.c);
    };
    const LayerShape& s = p.shape(l);
    oracle::AttendInput in{.queries = oracle::Array3(1, s.q_heads, s.key_dim),
                           .positions = {last},
                           .heads = {},
                           .value_width = s.value_dim,
                           .how = settings_of(s),
                           .sink = {}};
    for (Index h = 0; h < s.q_heads; ++h)
      for (Index c = 0; c < s.key_dim; ++c) in.queries.at(0, h, c) = p.queries[at].at(last, h, c);
    for (Index h = 0; h < s.kv_heads; ++h) {
      auto& head = in.heads.emplace_back();
      for (const Position t : fed.cache.kept(fed.id, l, h))
        head.push_back({t, row_of(p.keys[at], t, h), row_of(p.values[at], t, h)});
    }
    const oracle::Array3 wanted = oracle::attend(in).out, got = attended_by(be, fed, p, l, last);
    for (std::size_t i = 0; i < got.values.size(); ++i)
      EXPECT_TRUE(close(got.values[i], wanted.values[i], tolerance(Operation::attended)))
          << what << ", layer " << l << ", number " << i;
  }
}

/// One shot and in chunks, the survivors are the textbook's: `wanted_kept(prompt, method)`.
template <Backend B, class M>
void keeps_what_the_paper_keeps(B& be, const Prompt& p, const Case& c, const M& method, const Kept& wanted) {
  for (const Index chunk : {c.tokens, Index{23}}) {
    FedCache<B> fed(be, p, c.page_tokens);
    fed.feed(method, 0, c.tokens, chunk);
    const auto report = fed.cache.compress(fed.id, method);
    EXPECT_EQ(kept_in(fed, p), wanted) << c.name << ", " << method.scorer.name << ", keep " << method.keep.amount
                                       << ", chunks of " << chunk;
    EXPECT_EQ(report.nan_scores, 0);
  }
}

template <class M>
void waits_at_most_once(const M& method) {
  WalledBackend be;
  const Prompt p = random_prompt(60, 3, 90, 2, 2, {span(5, 60)});
  FedCache<WalledBackend> fed(be, p);
  const auto waits = [&](auto&& call) {
    const Index before = be.counts.waits;
    call();
    return be.counts.waits - before;
  };
  for (const Index first : {0, 45}) {
    EXPECT_EQ(waits([&] { fed.append(first, 45); }), 0) << method.scorer.name << ": append";
    EXPECT_EQ(waits([&] { fed.observe(method, first, 20, false); }), 0) << method.scorer.name << ": observe";
    EXPECT_EQ(waits([&] { fed.observe(method, first + 20, 25, true); }), 0) << method.scorer.name << ": observe";
    EXPECT_LE(waits([&] { fed.cache.compress(fed.id, method); }), 1) << method.scorer.name << ": compress";
    const TensorBuffer<WalledBackend> out(be, oracle::Array3(1, 4, 16), DType::f32);
    const Position at[] = {static_cast<Position>(first + 45)};
    EXPECT_EQ(waits([&] {
                fed.cache.attend(
                    0,
                    {{.sequence = fed.id, .queries = fed.queries(0, 89, 1), .positions = at, .out = out.writable()}});
              }),
              0);
  }
}

}  // namespace kvpare::test

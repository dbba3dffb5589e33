// A whole compression, step by step: observe every layer, plan, commit.
#pragma once

#include "rig.hpp"
#include "run.hpp"

namespace bench {

/// A prompt: `visual` tokens of one picture, then text; and the queries of its last rows.
template <Element T>
class Prompt {
 public:
  struct Tokens {
    Index visual = 0, text = 0;
    Index all() const { return visual + text; }
  };

  Prompt(const LayerShape& shape, Index layers, Tokens tokens, Index query_rows, std::vector<T> rows, Index threads)
      : filled(shape, layers, std::move(rows), {.threads = threads}),
        queries(shape, query_rows, tokens.all() - query_rows), tokens_(tokens) {
    tag();
  }

  void refill() {
    filled.refill();
    tag();
  }

  template <class C>
  void observe(Index layer, const C& compressor) {
    filled.cache.observe(filled.sequence, layer, compressor, queries.tensor, queries.at, true,
                         lse.empty() ? nullptr : lse.data());
  }

  /// From now on `observe` gets what attention says of the rows; all layers hold the same.
  void know_lse() {
    const LayerShape& shape = filled.shape;
    lse.resize(static_cast<std::size_t>(queries.tensor.rows * shape.q_heads));
    for (Index first = 0; first < queries.tensor.rows; first += 64) {
      const Index rows = std::min<Index>(64, queries.tensor.rows - first);
      kvpare::AttendRequest r;
      r.sequence = filled.sequence, r.queries = queries.tensor.part(first, rows);
      r.positions = std::span(queries.at).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(rows));
      r.out = kvpare::Tensor(queries.result.data(), rows, shape.q_heads, shape.value_dim);
      r.lse = lse.data() + first * shape.q_heads;
      filled.cache.attend(0, {r});
    }
  }

  /// Features of the visual tokens, of a model so wide.
  template <class C>
  void observe_features(const C& compressor, Index width) {
    if (sources_.empty()) {
      sources_ = random_rows<T>(tokens_.visual, 1, width, 3), targets_ = random_rows<T>(tokens_.visual, 1, width, 4);
      image_.assign(static_cast<std::size_t>(tokens_.visual), 0);
      constexpr Index columns = 128;
      for (Index t = 0; t < tokens_.visual; ++t) {
        x_.push_back(static_cast<std::int32_t>(t % columns));
        y_.push_back(static_cast<std::int32_t>(t / columns));
      }
    }
    const auto at = positions(0, tokens_.visual);
    filled.cache.observe_features(filled.sequence, compressor,
                                  {.sources = {sources_.data(), tokens_.visual, 1, width},
                                   .targets = {targets_.data(), tokens_.visual, 1, width},
                                   .positions = at,
                                   .x = x_,
                                   .y = y_,
                                   .image = image_});
  }

  FilledCache<T> filled;
  Queries<T> queries;
  std::vector<float> lse;  // [rows, q_heads], empty = the engine keeps it to itself

 private:
  void tag() {
    if (tokens_.visual > 0)
      filled.cache.tag(
          filled.sequence,
          {.begin = 0, .end = static_cast<Position>(tokens_.visual), .token_class = kvpare::TokenClass::image});
  }

  Tokens tokens_;
  std::vector<T> sources_, targets_;  // as observe_features takes them, made when they are asked for
  std::vector<std::int32_t> x_, y_, image_;
};

/// Compresses the prompt once per step, a fresh copy each. Counters: `us` of the whole, `observe_us` (all layers),
/// `plan_us`, `commit_us`, `ns_per_token` (of the whole, per token and layer), and of_memcpy of the commit alone.
template <Element T, class C>
double compress(benchmark::State& state, Prompt<T>& prompt, const C& compressor, Index threads) {
  constexpr Index model_width = 3584;  // Qwen2.5-VL-7B
  auto& filled = prompt.filled;
  std::vector<double> observing, planning, committing;
  kvpare::CompressReport report;
  double copying = copy_rate(threads);
  const double tokens = static_cast<double>(filled.tokens);
  const double seconds = run(
      state, {.tokens = tokens},
      [&](Index) {
        kvpare::Plan plan;
        observing.push_back(seconds_of([&] {
          if (compressor.scorer.reads().features) prompt.observe_features(compressor, model_width);
          if (compressor.scorer.reads().rows != kvpare::Reads::Rows::none)
            for (Index layer = 0; layer < filled.layers; ++layer) prompt.observe(layer, compressor);
        }));
        planning.push_back(seconds_of([&] { plan = filled.cache.plan(filled.sequence, compressor); }));
        committing.push_back(seconds_of([&] { report = filled.cache.commit(plan); }));
      },
      [&](Index) { prompt.refill(); });
  copying = (copying + copy_rate(threads)) / 2;
  state.counters["observe_us"] = median(observing) * 1e6;
  state.counters["plan_us"] = median(planning) * 1e6;
  state.counters["commit_us"] = median(committing) * 1e6;
  state.counters["ns_per_token"] = seconds * 1e9 / tokens / static_cast<double>(filled.layers);
  const Index row_bytes = filled.token_bytes(filled.shape) / filled.shape.kv_heads;
  state.counters["commit_of_memcpy"] =
      2 * static_cast<double>(report.rows_moved * row_bytes) / median(committing) / copying;
  return seconds;
}

/// Adds a recipe of the library at 1k to 128k tokens of a Llama-3.1-8B shape, the last 256 of them text.
struct RecipeRun {
  Index layers = 8;            // up to 16k; beyond, one is enough to fill more memory than any cache holds
  Index query_rows = 0;        // that the recipe looks at, from the end; 0 = all
  Index most_tokens = 131072;  // where the recipe reads all rows, its time grows with the square
};

template <class C>
bool add_recipe(std::string_view name, const C& compressor, const RecipeRun& recipe) {
  for (Index tokens : {1024, 4096, 16384, 131072}) {
    if (tokens > recipe.most_tokens) continue;
    const Index layers = tokens > 16384 ? 1 : recipe.layers;
    const std::string text =
        label(kvpare::message("compress/", name), DType::f16, llama_8b(), tokens, {{"L", layers}, {"threads", 1}});
    add(text, [=](benchmark::State& state) {
      const LayerShape shape = llama_8b();
      auto& prompt = kept(text, [&] {
        return std::make_unique<Prompt<kvpare::half>>(shape, layers, Prompt<kvpare::half>::Tokens{tokens - 256, 256},
                                                      recipe.query_rows > 0 ? recipe.query_rows : tokens,
                                                      random_rows<kvpare::half>(tokens, shape.kv_heads, shape.key_dim),
                                                      1);
      });
      compress(state, prompt, compressor, 1);
    });
  }
  return true;
}

}  // namespace bench

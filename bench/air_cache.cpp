// The recipe air_cache: on the prompt of a Qwen2.5-VL-7B, with its scorer alone, and beside the prompt's own prefill.
#include "support/compression.hpp"
#include "support/prefill.hpp"

namespace bench {
namespace {

using kvpare::half;

constexpr Index text_tokens = 256;

/// Prompt whose last text row prefers `elite` text tokens, all alike: their keys are the sum of that row's queries.
std::unique_ptr<Prompt<half>> prompt_with_elite(const LayerShape& shape, Index layers, Index tokens, Index elite,
                                                Index threads) {
  std::vector<half> rows = random_rows<half>(tokens, shape.kv_heads, shape.key_dim);
  const Queries<half> queries(shape, text_tokens, tokens - text_tokens);  // the very ones of the prompt
  for (Index e = 0; e < elite; ++e)
    for (Index head = 0; head < shape.kv_heads; ++head)
      for (Index c = 0; c < shape.key_dim; ++c) {
        float sum = 0;
        for (Index member = 0; member < shape.group(); ++member)
          sum += static_cast<float>(
              static_cast<const half*>(queries.tensor.at(text_tokens - 1, head * shape.group() + member))[c]);
        const Index token = tokens - text_tokens + e * text_tokens / elite;
        rows[static_cast<std::size_t>((token * shape.kv_heads + head) * shape.key_dim + c)] = half(sum);
      }
  return std::make_unique<Prompt<half>>(shape, layers, Prompt<half>::Tokens{tokens - text_tokens, text_tokens},
                                        text_tokens, std::move(rows), threads);
}

Prompt<half>& kept_prompt(const LayerShape& shape, Index layers, Index tokens, Index elite, Index threads) {
  return kept(kvpare::message("prompt ", layers, " ", tokens, " ", elite, " ", threads),
              [&] { return prompt_with_elite(shape, layers, tokens, elite, threads); });
}

/// With alpha = 0 all text rows are elite.
auto air_cache_for(Index elite) {
  auto compressor = kvpare::air_cache();
  if (elite == text_tokens) compressor.scorer.alpha = 0;
  return compressor;
}

void end_to_end(benchmark::State& state, Index layers, Index tokens, Index elite, Index threads) {
  const LayerShape shape = qwen_vl_7b();
  auto& prompt = kept_prompt(shape, layers, tokens, elite, threads);
  prompt.refill();
  const double by_attend = prefill_by_attend(prompt) * static_cast<double>(layers);
  const double by_products = prefill_by_products(shape, tokens, threads) * static_cast<double>(layers);
  const double seconds = compress(state, prompt, air_cache_for(elite), threads);
  state.counters["of_prefill_attend"] = seconds / by_attend;
  state.counters["of_prefill_products"] = seconds / by_products;
}

/// The scorer alone, one layer per step.
void score(benchmark::State& state, Index layers, Index tokens, Index elite, Index threads) {
  const LayerShape shape = qwen_vl_7b();
  auto& prompt = kept_prompt(shape, layers, tokens, elite, threads);
  prompt.refill();
  const auto compressor = air_cache_for(elite);
  const double key_bytes = static_cast<double>(tokens * FilledCache<half>::key_bytes(shape));
  const double flops = 2.0 * static_cast<double>(elite * shape.q_heads * tokens * shape.key_dim);
  const ProductShape product{.m = elite >= 64 ? elite : elite * shape.group(), .n = tokens, .k = shape.key_dim};
  run(state,
      {.bytes = key_bytes,
       .tokens = static_cast<double>(tokens),
       .against = {of_read_bw(key_bytes, threads), of_sgemm(flops, product, threads)}},
      [&](Index i) { prompt.observe(i % layers, compressor); });
}

const bool added = [] {
  add_recipe("air_cache", kvpare::air_cache(), {.query_rows = text_tokens});
  for (const auto& [layers, tokens] : {std::pair<Index, Index>{2, 2048}, {28, 8192 + text_tokens}})
    for (Index elite : {1, 8, 256})
      for (Index threads : {1, 2}) {
        const Settings settings = {{"L", layers}, {"elite", elite}, {"threads", threads}};
        add(label("compress/air_cache", DType::f16, qwen_vl_7b(), tokens, settings),
            [=, layers = layers, tokens = tokens](benchmark::State& state) {
              end_to_end(state, layers, tokens, elite, threads);
            });
        add(label("score/elite_window", DType::f16, qwen_vl_7b(), tokens, settings),
            [=, layers = layers, tokens = tokens](benchmark::State& state) {
              score(state, layers, tokens, elite, threads);
            });
      }
  return true;
}();

}  // namespace
}  // namespace bench

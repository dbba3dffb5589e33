// What compressing costs beside the prefill that it follows: every recipe on the layers of a Qwen2.5-VL-7B, 8192 visual tokens
// and 256 of text; and on 768 and 256, so that none can rot.
#include "support/compression.hpp"
#include "support/prefill.hpp"

namespace bench {
namespace {

using kvpare::half;

constexpr Index text_tokens = 256, model_layers = 28;

struct Share {
  Index layers = model_layers;  // or 1, which stands for all
  Index query_rows = 0;         // that the recipe looks at, from the end; 0 = all
  bool lse = false;             // does the engine hand it over?
};

template <class C>
void measure(benchmark::State& state, const C& compressor, const Share& share, Index visual_tokens, Index threads) {
  const Index tokens = visual_tokens + text_tokens;
  const LayerShape shape = qwen_vl_7b();
  const Index rows = share.query_rows > 0 ? share.query_rows : tokens;
  auto& prompt = kept(kvpare::message("share ", share.layers, " ", tokens, " ", rows, " ", threads), [&] {
    return std::make_unique<Prompt<half>>(shape, share.layers, Prompt<half>::Tokens{visual_tokens, text_tokens}, rows,
                                          random_rows<half>(tokens, shape.kv_heads, shape.key_dim), threads);
  });
  prompt.refill();
  if (share.lse) prompt.know_lse();
  const double by_attend = prefill_by_attend(prompt), by_products = prefill_by_products(shape, tokens, threads);
  const double seconds = compress(state, prompt, compressor, threads) / static_cast<double>(share.layers);
  prompt.lse.clear();
  state.counters["model_ms"] = seconds * 1e3 * static_cast<double>(model_layers);
  state.counters["of_prefill_attend"] = seconds / by_attend;
  state.counters["of_prefill_products"] = seconds / by_products;
}

template <class C>
void add_share(std::string_view name, const C& compressor, const Share& share) {
  const auto add_at = [&](Index visual_tokens, Share at, Index threads) {
    add(label(kvpare::message("share/", name), DType::f16, qwen_vl_7b(), visual_tokens + text_tokens,
              {{"L", at.layers}, {"lse", at.lse}, {"threads", threads}}),
        [=](benchmark::State& state) { measure(state, compressor, at, visual_tokens, threads); });
  };
  for (const Index threads : {1, 2}) add_at(8192, share, threads);
  Share small = share;
  small.layers = std::min<Index>(share.layers, 4);
  add_at(768, small, 2);
}

template <class C>
void add_all_rows(std::string_view name, const C& compressor) {
  for (const bool lse : {false, true}) add_share(name, compressor, {.layers = 1, .lse = lse});
}

const bool added = [] {
  constexpr Share nothing{.query_rows = 1}, window{.query_rows = 32}, text{.query_rows = text_tokens};
  auto csp = kvpare::csp();
  csp.scorer.window = window.query_rows;
  auto air_cache = kvpare::air_cache();
  add_share("air_cache", air_cache, text);
  air_cache.scorer.alpha = 0;
  add_share("air_cache_all_text", air_cache, text);
  add_share("streaming_llm", kvpare::streaming_llm(), nothing);
  add_share("tova", kvpare::tova(), nothing);
  add_share("key_norm", kvpare::key_norm(), nothing);
  add_share("key_diff", kvpare::key_diff(), nothing);
  add_share("lag_kv", kvpare::lag_kv(), nothing);
  add_share("pyramid_kv", kvpare::pyramid_kv(), {.query_rows = 8});
  add_share("pare", kvpare::pare(), window);
  add_share("snap_kv", kvpare::snap_kv(), window);
  add_share("ada_kv", kvpare::ada_kv(), window);
  add_share("chunk_kv", kvpare::chunk_kv(), window);
  add_share("kv_crush", kvpare::kv_crush(), window);
  add_share("csp", csp, window);
  add_share("vl_cache", kvpare::vl_cache(), text);
  add_share("zip_vl", kvpare::zip_vl(), {.query_rows = 128});
  add_share("top_v", kvpare::top_v(), nothing);
  add_share("corm", kvpare::corm(), {.query_rows = 256});
  add_share("expected_attention", kvpare::expected_attention(), {.layers = 1});
  add_all_rows("h2o", kvpare::h2o());
  add_all_rows("prefix_kv", kvpare::prefix_kv());
  add_all_rows("elastic_cache", kvpare::elastic_cache());
  add_all_rows("cam", kvpare::cam());
  return true;
}();

}  // namespace
}  // namespace bench

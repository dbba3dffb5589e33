// An engine with its own paged cache: pages of 16 tokens in a block table, [pages, page_size, kv_heads, head_dim].
// SnapKV chooses, the rows are packed in place, and the engine gets the page numbers that it may reuse.
#include <cstdio>
#include <kvpare/kvpare.hpp>
#include <numeric>
#include <vector>

using namespace kvpare;

int main() {
  const Index num_pages = 64, page_size = 16, kv_heads = 2, head_dim = 64, tokens = 500;
  std::vector<half> k_cache(num_pages * page_size * kv_heads * head_dim), v_cache(k_cache.size());
  std::vector<std::int32_t> block_table(32);
  for (Index i = 0; i < 32; ++i) block_table[i] = static_cast<std::int32_t>((i * 37 + 5) % num_pages);
  for (std::size_t i = 0; i < k_cache.size(); ++i)
    k_cache[i] = half(2 * random_unit(1, i) - 1), v_cache[i] = half(random_unit(2, i));

  const EngineLayer<half> layer{
      .shape = {.q_heads = 8, .kv_heads = kv_heads, .key_dim = head_dim, .value_dim = head_dim, .scale = 0.125f},
      .kv = {.keys = nhd(k_cache.data(), num_pages, page_size, kv_heads, head_dim),
             .values = nhd(v_cache.data(), num_pages, page_size, kv_heads, head_dim),
             .pages = block_table,
             .tokens = tokens,
             .scope = Scope::same_tokens}};

  cpu::Backend backend;
  EngineSequence sequence(backend);
  const auto method = make_compressor("snap_kv(keep=128t, window=16)");
  std::vector<half> queries(16 * 8 * head_dim);  // of the prompt's last 16 tokens
  for (std::size_t i = 0; i < queries.size(); ++i) queries[i] = half(4 * random_unit(3, i) - 2);
  std::vector<Position> rows(16);
  std::iota(rows.begin(), rows.end(), static_cast<Position>(tokens - 16));

  sequence.observe(0, layer, method, {queries.data(), 16, 8, head_dim}, rows);
  const Plan plan = sequence.plan<half>(method, {{layer}});
  const std::vector<EngineLayerReport> done = sequence.commit<half>(plan, {{layer}});
  std::printf("%td tokens stay; the newest kept position is %d; %zu pages are free again, the first is number %d\n",
              done[0].tokens, done[0].positions[0].back(), done[0].freed_pages.size(), done[0].freed_pages.front());
}

// An engine's own pages on the GPU: AirCache chooses which visual tokens stay, the rows are packed in place, and a decode step
// attends to what is left. Everything is queued on the engine's stream; `plan` waits once, for the choice.
#include <cstdio>
#include <kvpare/cuda.cuh>
#include <numeric>
#include <vector>

using namespace kvpare;

/// Stands in for the engine: pseudo-random numbers within [-size, size].
struct Noise {
  half* to;
  float size;
  std::uint64_t seed;
  KVPARE_HD void operator()(Index i) const { to[i] = half(size * (2 * random_unit(seed, i) - 1)); }
};

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("no CUDA device: nothing to show");
    return 77;
  }
  cudaStream_t stream;
  cudaStreamCreate(&stream);
  cuda::Backend backend({.stream = stream});

  // The engine's pages: NHD, 16 tokens each, anywhere in its memory; a block table says where.
  const Index num_pages = 128, page_size = 16, q_heads = 16, kv_heads = 4, head_dim = 128, tokens = 1200;
  const Buffer<cuda::Backend, half> k_cache(backend, num_pages * page_size * kv_heads * head_dim);
  const Buffer<cuda::Backend, half> v_cache(backend, k_cache.size());
  const Buffer<cuda::Backend, half> q(backend, tokens * q_heads * head_dim), out(backend, q_heads * head_dim);
  backend.each(k_cache.size(), Noise{k_cache.data(), 1.5f, 1});
  backend.each(v_cache.size(), Noise{v_cache.data(), 1, 2});
  backend.each(q.size(), Noise{q.data(), 2, 3});
  std::vector<std::int32_t> block_table(75);
  for (Index i = 0; i < 75; ++i) block_table[i] = static_cast<std::int32_t>(i * 37 % num_pages);

  EngineLayer<half> layer{
      .shape = {.q_heads = q_heads, .kv_heads = kv_heads, .key_dim = head_dim, .value_dim = head_dim, .scale = 0.0884f},
      .kv = {.keys = nhd(k_cache.data(), num_pages, page_size, kv_heads, head_dim),
             .values = nhd(v_cache.data(), num_pages, page_size, kv_heads, head_dim),
             .pages = block_table,
             .tokens = tokens,
             .scope = Scope::same_tokens}};
  Tags tags;
  tags.add({.begin = 8, .end = 1160, .token_class = TokenClass::image});  // of 1200 tokens, 1152 are an image
  EngineSequence sequence(backend, tags);

  const auto method = make_compressor("air_cache(keep=0.1)");
  std::vector<Position> rows(40);  // the text after the image looks at it
  std::iota(rows.begin(), rows.end(), 1160);
  sequence.observe(0, layer, method, {q.data() + 1160 * q_heads * head_dim, 40, q_heads, head_dim}, rows);
  const Plan plan = sequence.plan<half>(method, {{layer}});
  const std::vector<EngineLayerReport> done = sequence.commit<half>(plan, {{layer}});
  std::printf("%td of %td tokens stay, %zu of %zu pages are the engine's again\n", done[0].tokens, tokens,
              done[0].freed_pages.size(), block_table.size());

  // Decode: the next token's queries, straight on the engine's pages.
  block_table.resize(block_table.size() - done[0].freed_pages.size());
  layer.kv.pages = block_table, layer.kv.tokens = done[0].tokens, layer.kv.positions = done[0].positions[0];
  const Position now[] = {static_cast<Position>(tokens)};
  sequence.attend(0, layer, {q.data(), 1, q_heads, head_dim}, now, {out.data(), 1, q_heads, head_dim});
  std::vector<half> host;
  backend.wait(out.to_host(host));
  std::printf("attention of the next token, first channel: %.4f\n", static_cast<float>(host[0]));
}

// A prompt with an image goes into the cache, AirCache keeps a tenth of the image, and a decode step reads what is left.
#include <cstdio>
#include <kvpare/kvpare.hpp>
#include <numeric>
#include <vector>

using namespace kvpare;

int main() {
  cpu::Backend backend;
  const LayerShape layer{.q_heads = 8, .kv_heads = 2, .key_dim = 64, .value_dim = 64, .scale = 0.125f};
  KvCache<cpu::Backend, Formats<Pair<Raw<half>, Raw<half>>>> cache(backend, {{layer, layer}},
                                                                   {.page_tokens = 16, .pool_bytes = 8 << 20});
  const auto method = make_compressor("air_cache(keep=0.1, alpha=0.9)");

  const Index tokens = 640;  // one token, an image of 576, a question of 63
  const SequenceId sequence = cache.create();
  cache.tag(sequence, {.begin = 1, .end = 577, .token_class = TokenClass::image});
  std::vector<Position> positions(tokens);
  std::iota(positions.begin(), positions.end(), 0);
  std::vector<float> keys(tokens * 2 * 64), values(keys.size()), queries(tokens * 8 * 64), out(8 * 64);
  for (Index l = 0; l < cache.layers(); ++l) {  // your engine computes these
    for (std::size_t i = 0; i < keys.size(); ++i)
      keys[i] = 4 * random_unit(1, l, i) - 2, values[i] = random_unit(2, l, i);
    for (std::size_t i = 0; i < queries.size(); ++i) queries[i] = 4 * random_unit(3, l, i) - 2;
    if (cache.append(sequence, l, {keys.data(), tokens, 2, 64}, {values.data(), tokens, 2, 64}, positions) !=
        Outcome::done)
      return 1;
    cache.observe(sequence, l, method, {queries.data(), tokens, 8, 64}, positions);
  }

  const CompressReport r = cache.compress(sequence, method);
  std::printf("tokens x heads %td -> %td, pages %td -> %td, %td bytes back in the pool\n", r.tokens_before,
              r.tokens_after, r.pages_before, r.pages_after, r.bytes_freed);

  const Position now[] = {static_cast<Position>(tokens)};  // decode: the next token's queries, straight on the pages
  cache.attend(
      0,
      {{.sequence = sequence, .queries = {queries.data(), 1, 8, 64}, .positions = now, .out = {out.data(), 1, 8, 64}}});
  std::printf("attention of the next token, first channel: %.3f\n", out[0]);
}

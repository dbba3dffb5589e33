// decode: a step of one layer under a fixed budget, eviction included, beside plain attention over as many tokens.
#include "support/rig.hpp"
#include "support/run.hpp"

namespace bench {
namespace {

constexpr Index warm_up = 640;  // steps per layer, until the lists have as many holes as they ever will

/// A sequence that has been decoding under its budget for a while, and one that is as long but has no holes.
struct Steady {
  Steady(const LayerShape& shape, Index tokens, Index threads, const kvpare::AnyCompressor& per_layer)
      : filled(shape, std::max<Index>(8, FilledCache<kvpare::half>::enough_layers(shape, tokens) / 4),
               random_rows<kvpare::half>(tokens, shape.kv_heads, shape.key_dim), {.threads = threads, .room = 2 * tokens}),
        method(per_layer), next(static_cast<std::size_t>(filled.layers), tokens),
        fresh(random_rows<kvpare::half>(64, shape.kv_heads, shape.key_dim)), queries(shape, 64, 0) {
    method.keep = kvpare::Keep::tokens(tokens * filled.layers);
    auto& cache = filled.cache;
    dense = cache.create();  // pages of its own
    const auto rows = random_rows<kvpare::half>(tokens, shape.kv_heads, shape.key_dim);
    const kvpare::ConstTensor source(rows.data(), tokens, shape.kv_heads, shape.key_dim);
    for (Index layer = 0; layer < filled.layers; ++layer)
      kvpare::require(cache.append(dense, layer, source, source, positions(0, tokens)) == kvpare::Outcome::done,
                      "bench: the pool is full");
    const Queries<kvpare::half> last(shape, 8, tokens - 8);
    for (Index layer = 0; layer < filled.layers; ++layer)
      cache.observe(filled.sequence, layer, method, last.tensor, last.at);
    for (Index i = 0; i < warm_up * filled.layers; ++i) {
      append(i);
      step(i);
    }
  }

  void append(Index i) {
    const Index layer = i % filled.layers, row = i / filled.layers % 64;
    const kvpare::ConstTensor source(fresh.data() + row * filled.shape.kv_heads * filled.shape.key_dim, 1,
                                     filled.shape.kv_heads, filled.shape.key_dim);
    const Position at[] = {static_cast<Position>(next[static_cast<std::size_t>(layer)]++)};
    kvpare::require(filled.cache.append(filled.sequence, layer, source, source, at) == kvpare::Outcome::done,
                    "bench: the pool is full");
  }
  kvpare::AttendRequest request(Index i, SequenceId sequence, std::span<const Position> at) {
    return {.sequence = sequence,
            .queries = queries.tensor.part(i / filled.layers % 64, 1),
            .positions = at,
            .out = queries.out.part(0, 1)};
  }
  kvpare::EvictReport step(Index i) {
    const Index layer = i % filled.layers;
    const Position at[] = {static_cast<Position>(next[static_cast<std::size_t>(layer)] - 1)};
    return filled.cache.decode(layer, {request(i, filled.sequence, at)}, method);
  }
  void plain(Index i) {
    const Position at[] = {static_cast<Position>(filled.tokens)};
    filled.cache.attend(i % filled.layers, {request(i, dense, at)});
  }

  FilledCache<kvpare::half> filled;
  kvpare::AnyCompressor method;
  std::vector<Index> next;  // [layer] position
  std::vector<kvpare::half> fresh;
  Queries<kvpare::half> queries;
  SequenceId dense = 0;
};

void decode(benchmark::State& state, const std::string& method, Index tokens, Index threads) {
  const LayerShape shape = llama_8b();
  auto& rig = kept(kvpare::message("decode ", method, " ", tokens, " ", threads), [&] {
    return std::make_unique<Steady>(shape, tokens, threads, kvpare::make_compressor(method));
  });
  std::vector<double> plain;
  kvpare::EvictReport all;
  Index steps = 0;
  static Index at = 0;  // goes on where the last round ended
  const double seconds = run(
      state, {.tokens = static_cast<double>(tokens)},
      [&](Index) {
        const kvpare::EvictReport r = rig.step(at++);
        all.evicted += r.evicted, all.rows_moved += r.rows_moved, ++steps;
      },
      [&](Index) {
        plain.push_back(seconds_of([&] { rig.plain(at + rig.filled.layers / 2); }));
        rig.append(at);
      });
  state.counters["of_plain_attend"] = seconds / median(plain);
  state.counters["rows_moved_per_evicted"] =
      static_cast<double>(all.rows_moved) / static_cast<double>(std::max<Index>(1, all.evicted));
  state.counters["pages_per_list"] = static_cast<double>(rig.filled.cache.stats(rig.filled.sequence).pages) /
                                     static_cast<double>(rig.filled.layers * shape.kv_heads);
}

const bool added = [] {
  for (const char* method : {"h2o", "streaming_llm", "tova"})
    for (Index tokens : {512, 2048})
      for (Index threads : {1, 2})
        add(label(kvpare::message("decode/", method), DType::f16, llama_8b(), tokens, {{"threads", threads}}),
            [=](benchmark::State& state) { decode(state, method, tokens, threads); });
  return true;
}();

}  // namespace
}  // namespace bench

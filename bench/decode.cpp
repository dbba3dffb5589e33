// decode: a step of one layer under a fixed budget, eviction included, beside plain attention over as many tokens.
#include "support/rig.hpp"
#include "support/run.hpp"

namespace bench {
namespace {

constexpr Index warm_up = 640;  // steps per layer, until the lists have as many holes as they ever will

/// A sequence that has been decoding under its budget for a while, and two that are as long but have no holes: one whose
/// pages were taken at once, so that those of a head follow each other in memory, and one that took them as it grew, page
/// by page for all heads in turn, as the first has to.
struct Steady {
  Steady(const LayerShape& shape, Index tokens, Index threads, const kvpare::AnyCompressor& per_layer)
      : filled(shape, std::max<Index>(8, FilledCache<kvpare::half>::enough_layers(shape, tokens) / 4),
               random_rows<kvpare::half>(tokens, shape.kv_heads, shape.key_dim),
               {.threads = threads, .room = 3 * tokens}),
        method(per_layer), next(static_cast<std::size_t>(filled.layers), tokens),
        fresh(random_rows<kvpare::half>(64, shape.kv_heads, shape.key_dim)), queries(shape, 64, 0) {
    method.keep = kvpare::Keep::tokens(tokens * filled.layers);
    auto& cache = filled.cache;
    const auto rows = random_rows<kvpare::half>(tokens, shape.kv_heads, shape.key_dim);
    const kvpare::ConstTensor source(rows.data(), tokens, shape.kv_heads, shape.key_dim);
    for (const auto& [sequence, chunk] : {std::pair{&at_once, tokens}, {&grown, Index{64}}}) {
      *sequence = cache.create();
      for (Index layer = 0; layer < filled.layers; ++layer)
        for (Index first = 0; first < tokens; first += chunk)
          kvpare::require(cache.append(*sequence, layer, source.part(first, chunk), source.part(first, chunk),
                                       positions(first, chunk)) == kvpare::Outcome::done,
                          "bench: the pool is full");
    }
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
  double plain(Index i, SequenceId sequence) {
    const Position at[] = {static_cast<Position>(filled.tokens)};
    return seconds_of([&] { filled.cache.attend(i % filled.layers, {request(i, sequence, at)}); });
  }

  FilledCache<kvpare::half> filled;
  kvpare::AnyCompressor method;
  std::vector<Index> next;  // [layer] position
  std::vector<kvpare::half> fresh;
  Queries<kvpare::half> queries;
  SequenceId at_once = 0, grown = 0;
};

void decode(benchmark::State& state, const std::string& method, Index tokens, Index threads) {
  const LayerShape shape = llama_8b();
  auto& rig = kept(kvpare::message("decode ", method, " ", tokens, " ", threads),
                   [&] { return std::make_unique<Steady>(shape, tokens, threads, kvpare::make_compressor(method)); });
  std::vector<double> at_once, grown;
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
        at_once.push_back(rig.plain(at + rig.filled.layers / 3, rig.at_once));
        grown.push_back(rig.plain(at + 2 * rig.filled.layers / 3, rig.grown));
        rig.append(at);
      });
  state.counters["of_attend"] = seconds / median(grown);
  state.counters["of_attend_at_once"] = seconds / median(at_once);
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

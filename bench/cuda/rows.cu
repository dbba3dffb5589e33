// The verbs that move rows as they are: compact, append.
//
//   compact   rows that move, keys and values, read and written: 1024 bytes per half token of a kv head (head_dim 128)
//   append    rows of halves read, 512 bytes per new token of a kv head, and the bytes of their form written; a batch in
//             one call of the verb, or sequence by sequence through the cache (append_steps)
#include "attend.cuh"

namespace bench {
namespace {

// ---- compact

/// The moves of all layers, after a random share of the tokens stayed, each head its own. Moving the same rows again
/// writes what nobody reads.
template <class... P>
void compact(benchmark::State& state, const LayerShape& shape, Index layers, Index tokens, double keep) {
  Device device;
  FilledCache<P...> filled(device, shape, {tokens}, {}, layers);
  std::vector<kvpare::CompactedList> compacted;
  compacted.reserve(static_cast<std::size_t>(layers * shape.kv_heads));
  std::vector<kvpare::CompactList> lists;
  double rows = 0;
  std::vector<std::vector<kvpare::HeadPages>> pages;
  for (Index l = 0; l < layers; ++l) pages.push_back(filled.cache.pages(filled.sequences[0], l));
  for (const auto& layer : pages)
    for (const kvpare::HeadPages& list : layer) {
      kvpare::Selection stay(static_cast<Index>(list.entries.size()));
      for (Index token = 0; token < tokens; ++token)
        if (kvpare::random_unit(4, compacted.size(), token) < keep)
          stay.insert(token / page_tokens, token % page_tokens);
      compacted.push_back(kvpare::compact_list(list, stay.words(), [](kvpare::PageId) { return true; }));
      lists.push_back({list.formats, compacted.back().moves, shape.key_dim, shape.value_dim, page_tokens});
      for (const kvpare::Move& move : compacted.back().moves) rows += move.count;
    }
  using Coded = typename FilledCache<P...>::Coded;
  measure(state, device, {2 * rows * token_bytes<Coded>(shape), rows}, 1,
          [&](Index) { device.backend.compact(lists); });
}

template <class... P>
void add_compact(std::string_view form) {
  for (const Index percent : {10, 50, 70})
    add(kvpare::message(label("compact", form, llama_8b(), 1, 8192), "/L:32/keep%:", percent),
        [=](benchmark::State& state) {
          compact<P...>(state, llama_8b(), 32, 8192, static_cast<double>(percent) / 100);
        });
}

// ---- append

/// A new token of every sequence in one call of the verb.
template <class P>
void append_batch(benchmark::State& state, const LayerShape& shape, Index batch) {
  Device device;
  FilledCache<P> filled(device, shape, std::vector<Index>(static_cast<std::size_t>(batch), page_tokens), {}, 32);
  const auto keys = random_array<kvpare::half>(device, batch * shape.kv_heads * shape.key_dim, 5);
  const auto values = random_array<kvpare::half>(device, batch * shape.kv_heads * shape.value_dim, 6);
  std::vector<std::vector<kvpare::WriteRun>> runs(static_cast<std::size_t>(filled.layers));
  std::vector<std::vector<kvpare::HeadPages>> formats;
  for (Index l = 0; l < filled.layers; ++l)
    for (Index b = 0; b < batch; ++b) {
      auto lists = filled.cache.pages(filled.sequences[static_cast<std::size_t>(b)], l);
      for (std::size_t h = 0; h < lists.size(); ++h) {
        kvpare::WriteRun run;
        run.head = static_cast<Index>(h), run.row = b, run.page = lists[h].entries.back().page;
        run.slot = static_cast<std::uint16_t>(b % page_tokens), run.count = 1;
        runs[static_cast<std::size_t>(l)].push_back(run);
      }
      if (b == 0) formats.push_back(std::move(lists));
    }
  const double rows = static_cast<double>(batch * shape.kv_heads);
  measure(state, device, {rows * (token_bytes<Half>(shape) + token_bytes<P>(shape)), static_cast<double>(batch)},
          filled.layers, [&](Index i) {
            const std::size_t l = static_cast<std::size_t>(i % filled.layers);
            device.backend.append({.keys = {keys.data(), batch, shape.kv_heads, shape.key_dim},
                                   .values = {values.data(), batch, shape.kv_heads, shape.value_dim},
                                   .formats = formats[l][0].formats,
                                   .runs = runs[l],
                                   .page_tokens = page_tokens});
          });
}

/// The same through the cache, sequence by sequence; every step is at the next position.
template <class P>
void append_steps(benchmark::State& state, const LayerShape& shape, Index batch) {
  Device device;
  FilledCache<P> filled(device, shape, std::vector<Index>(static_cast<std::size_t>(batch), page_tokens), {}, 4, 4096);
  const auto keys = random_array<kvpare::half>(device, batch * shape.kv_heads * shape.key_dim, 5);
  const auto values = random_array<kvpare::half>(device, batch * shape.kv_heads * shape.value_dim, 6);
  std::vector<Position> next(static_cast<std::size_t>(filled.layers), static_cast<Position>(page_tokens));
  const double rows = static_cast<double>(batch * shape.kv_heads);
  measure(state, device, {rows * (token_bytes<Half>(shape) + token_bytes<P>(shape)), static_cast<double>(batch)},
          filled.layers, [&](Index i) {
            const Index layer = i % filled.layers;
            const Position at[] = {next[static_cast<std::size_t>(layer)]++};
            for (Index b = 0; b < batch; ++b)
              kvpare::require(
                  filled.cache.append(
                      filled.sequences[static_cast<std::size_t>(b)], layer,
                      {keys.data() + b * shape.kv_heads * shape.key_dim, 1, shape.kv_heads, shape.key_dim},
                      {values.data() + b * shape.kv_heads * shape.value_dim, 1, shape.kv_heads, shape.value_dim},
                      at) == kvpare::Outcome::done,
                  "bench: the pool is full");
          });
}

template <class P>
void add_append(std::string_view form) {
  add(label("append", form, llama_8b(), 64, 1),
      [](benchmark::State& state) { append_batch<P>(state, llama_8b(), 64); });
  add(label("append_steps", form, llama_8b(), 64, 1),
      [](benchmark::State& state) { append_steps<P>(state, llama_8b(), 64); });
}

using Int8 = Both<kvpare::Int8>;
using Int4 = Both<kvpare::Int4>;

const bool added = [] {
  add_compact<Half>("half");
  add_compact<Half, Int4>("int4");
  add_append<Half>("half");
  add_append<Int8>("int8");
  add_append<Int4>("int4");
  return true;
}();

}  // namespace
}  // namespace bench

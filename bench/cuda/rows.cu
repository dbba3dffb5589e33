// The verbs that move rows: compact, encode, append.
//
//   compact   rows that move, keys and values, read and written: 1024 bytes per half token of a kv head (head_dim 128)
//   encode    rows read as halves, 512 bytes, and the bytes of their new form written
//   append    the same per new token, whether a batch in one call or sequence by sequence through the cache
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

// ---- encode

/// All full pages of a layer from halves into a form: pages of one sequence are read, those of its twin written.
template <class C>
void encode(benchmark::State& state, const LayerShape& shape, Index tokens) {
  Device device;
  FilledCache<Half, C> filled(device, shape, {tokens}, {}, 4, tokens);
  const SequenceId coded = filled.sequences[0], plain = filled.cache.create();
  std::vector<std::vector<kvpare::HeadPages>> to, from;
  for (Index l = 0; l < filled.layers; ++l) {
    filled.append(plain, l, tokens);
    to.push_back(filled.cache.pages(coded, l)), from.push_back(filled.cache.pages(plain, l));
  }
  struct Head {
    std::vector<kvpare::EncodePage> pages;
    std::vector<kvpare::EncodePiece> pieces;
  };
  std::vector<std::vector<Head>> heads(to.size());
  std::vector<std::vector<kvpare::EncodeList>> lists(to.size());
  for (std::size_t l = 0; l < to.size(); ++l) {
    heads[l].resize(to[l].size());
    for (std::size_t h = 0; h < to[l].size(); ++h) {
      Head& head = heads[l][h];
      for (std::size_t e = 0; e < to[l][h].entries.size(); ++e) {
        const kvpare::Entry &target = to[l][h].entries[e], &source = from[l][h].entries[e];
        head.pages.push_back({target.page, target.format, target.state, static_cast<Index>(head.pieces.size()), 1});
        head.pieces.push_back({source.page, source.format, source.state, 0, 0, page_tokens});
      }
      lists[l].push_back(
          {to[l][h].formats, to[l][h].states, head.pages, head.pieces, shape.key_dim, shape.value_dim, page_tokens});
    }
  }
  const double rows = static_cast<double>(tokens * shape.kv_heads);
  measure(state, device, {rows * (token_bytes<Half>(shape) + token_bytes<C>(shape)), static_cast<double>(tokens)},
          filled.layers, [&](Index i) { device.backend.encode(lists[static_cast<std::size_t>(i % filled.layers)]); });
}

template <class C>
void add_encode(std::string_view form) {
  add(label("encode", form, llama_8b(), 1, 32768),
      [](benchmark::State& state) { encode<C>(state, llama_8b(), 32768); });
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
  add_encode<Both<kvpare::Fp8E4M3>>("fp8_e4m3");
  add_encode<Int8>("int8");
  add_encode<Int4>("int4");
  add_encode<Both<kvpare::Symmetric<4, 32>>>("int4_g32");
  add_encode<Both<kvpare::NvFp4<>>>("nvfp4");
  add_encode<Both<kvpare::Int2>>("int2");
  add_encode<kvpare::Pair<kvpare::KiviKeys<2>, kvpare::KiviValues<2>>>("kivi2");
  add_encode<Both<kvpare::Ternary<>>>("ternary");
  add_encode<Both<kvpare::Int1>>("int1");
  add_append<Half>("half");
  add_append<Int8>("int8");
  add_append<Int4>("int4");
  return true;
}();

}  // namespace
}  // namespace bench

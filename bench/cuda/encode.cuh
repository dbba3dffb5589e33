// encode: full pages of halves into a coded form. Added per form by encode_*.cu.
//
// Counted are rows read, 512 bytes per token of a kv head (head_dim 128), and the bytes of their new form, written.
#pragma once

#include "attend.cuh"

namespace bench {

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
bool add_encode(std::string_view form) {
  return add(label("encode", form, llama_8b(), 1, 32768),
             [](benchmark::State& state) { encode<C>(state, llama_8b(), 32768); });
}

}  // namespace bench

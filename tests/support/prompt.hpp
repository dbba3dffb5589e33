// A prompt as an engine holds it, dense and in full, and the way it reaches a cache: append, observe, chunk by chunk.
#pragma once

#include <kvpare/pipeline/kv_cache.hpp>
#include <vector>

#include "inputs.hpp"

namespace kvpare::test {

struct Prompt {
  Model model;
  std::vector<TagSpan> tags;
  std::vector<oracle::Array3> queries, keys, values;  // per layer [tokens, heads, width]

  Index tokens() const { return keys.front().a; }
  Index layers() const { return static_cast<Index>(model.layers.size()); }
  const LayerShape& shape(Index layer) const { return model.layers[static_cast<std::size_t>(layer)]; }

  /// Classes of the tokens, as the tags say.
  std::vector<TokenClass> classes() const {
    std::vector<TokenClass> out(static_cast<std::size_t>(tokens()), TokenClass::text);
    for (const TagSpan& s : tags)
      for (Position p = s.begin; p < s.end && p < tokens(); ++p) out[static_cast<std::size_t>(p)] = s.token_class;
    return out;
  }
};

/// Random queries and keys that attend unevenly, so that scores lie apart.
inline Prompt random_prompt(std::uint64_t seed, Index layers, Index tokens, Index kv_heads, Index group,
                            std::vector<TagSpan> tags, Index width = 16) {
  Dice dice{seed};
  Prompt p;
  p.tags = std::move(tags);
  for (Index l = 0; l < layers; ++l) {
    LayerShape shape;
    shape.kv_heads = kv_heads, shape.q_heads = kv_heads * group, shape.key_dim = width, shape.value_dim = width;
    shape.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(width)));
    p.model.layers.push_back(shape);
    p.queries.push_back(random_array(dice, tokens, shape.q_heads, width, DType::f32, 2 + static_cast<double>(l)));
    p.keys.push_back(random_array(dice, tokens, kv_heads, width, DType::f32, 1.5));
    p.values.push_back(random_array(dice, tokens, kv_heads, width, DType::f32));
  }
  return p;
}

/// A prompt of one layer and one head whose attention rows are given: `rows[r][j]` is proportional to what token r
/// gives token j (0 for nothing). Keys are one-hot, so q_r · k_j = ln rows[r][j].
inline Prompt prompt_of_rows(const std::vector<std::vector<double>>& rows, std::vector<TagSpan> tags = {}) {
  const Index tokens = static_cast<Index>(rows.size());
  Prompt p;
  p.tags = std::move(tags);
  LayerShape shape;
  shape.kv_heads = shape.q_heads = 1, shape.key_dim = tokens, shape.value_dim = 1, shape.scale = 1;
  p.model.layers.push_back(shape);
  p.queries.emplace_back(tokens, 1, tokens), p.keys.emplace_back(tokens, 1, tokens),
      p.values.emplace_back(tokens, 1, 1);
  for (Index t = 0; t < tokens; ++t) {
    p.keys[0].at(t, 0, t) = 1;
    for (Index j = 0; j < static_cast<Index>(rows[static_cast<std::size_t>(t)].size()); ++j) {
      const double x = rows[static_cast<std::size_t>(t)][static_cast<std::size_t>(j)];
      p.queries[0].at(t, 0, j) = x > 0 ? static_cast<double>(static_cast<float>(std::log(x))) : -80;
    }
  }
  return p;
}

/// One sequence of a cache that is fed from a prompt. Pages hold floats, so nothing is rounded.
template <Backend B>
class FedCache {
 public:
  using Cache = KvCache<B, Formats<Pair<Raw<float>, Raw<float>>>>;

  FedCache(B& be, const Prompt& prompt, Index page_tokens = 16, Index pool_bytes = Index{1} << 20)
      : be_(be), prompt_(prompt), cache(be, prompt.model, {.page_tokens = page_tokens, .pool_bytes = pool_bytes}),
        id(cache.create()) {
    for (const TagSpan& s : prompt.tags) cache.tag(id, s);
    for (Index l = 0; l < prompt.layers(); ++l) {
      queries_.emplace_back(be, prompt.queries[static_cast<std::size_t>(l)], DType::f32);
      keys_.emplace_back(be, prompt.keys[static_cast<std::size_t>(l)], DType::f32);
      values_.emplace_back(be, prompt.values[static_cast<std::size_t>(l)], DType::f32);
    }
  }

  static std::vector<Position> positions(Index first, Index count) {
    std::vector<Position> p(static_cast<std::size_t>(count));
    std::iota(p.begin(), p.end(), static_cast<Position>(first));
    return p;
  }

  void append(Index first, Index count) {
    for (Index l = 0; l < prompt_.layers(); ++l) append(l, first, count);
  }
  void append(Index layer, Index first, Index count) {
    const auto at = static_cast<std::size_t>(layer);
    const auto done = cache.append(id, layer, keys_[at].tensor().part(first, count),
                                   values_[at].tensor().part(first, count), positions(first, count));
    require(done == Outcome::done, "test: the pool is too small");
  }

  template <class C>
  void observe(const C& compressor, Index first, Index count, bool final = true) {
    for (Index l = 0; l < prompt_.layers(); ++l) {
      const float* lse = lse_.empty() ? nullptr : lse_[static_cast<std::size_t>(l)].data();
      cache.observe(id, l, compressor, queries_[static_cast<std::size_t>(l)].tensor().part(first, count),
                    positions(first, count), final, lse == nullptr ? lse : lse + first * prompt_.shape(l).q_heads);
    }
  }

  /// From now on `observe` gets these: per layer [tokens, q_heads].
  void give_lse(const std::vector<std::vector<float>>& of_layers) {
    lse_.clear();
    for (const auto& lse : of_layers) lse_.push_back(upload(be_, lse));
  }

  /// What `attend` says of every token's row, as an engine has it after prefill: per layer [tokens, q_heads].
  std::vector<std::vector<float>> attended_lse() {
    std::vector<std::vector<float>> of_layers;
    for (Index l = 0; l < prompt_.layers(); ++l) {
      const LayerShape& shape = prompt_.shape(l);
      const Buffer<B, float> lse(be_, prompt_.tokens() * shape.q_heads);
      for (Index first = 0; first < prompt_.tokens(); first += 64) {
        const Index rows = std::min<Index>(64, prompt_.tokens() - first);
        const TensorBuffer<B> out(be_, oracle::Array3(rows, shape.q_heads, shape.value_dim), DType::f32);
        const std::vector<Position> at = positions(first, rows);
        cache.attend(l, {{.sequence = id,
                          .queries = queries(l, first, rows),
                          .positions = at,
                          .out = out.writable(),
                          .lse = lse.data() + first * shape.q_heads}});
      }
      of_layers.push_back(download(be_, lse));
    }
    return of_layers;
  }

  /// Prefill of tokens [first, end) in chunks: append, observe.
  template <class C>
  void feed(const C& compressor, Index first, Index end, Index chunk = 0) {
    if (chunk == 0) chunk = end - first;
    for (Index at = first; at < end; at += chunk) {
      const Index count = std::min(chunk, end - at);
      append(at, count);
      observe(compressor, at, count, at + count == end);
    }
  }

  ConstTensor queries(Index layer, Index first, Index count) const {
    return queries_[static_cast<std::size_t>(layer)].tensor().part(first, count);
  }

  /// Scores that a scorer gives one layer, by [kv head][position]; NaN where the head holds no such token. `rows` are
  /// the positions it is shown, ascending.
  template <class S>
  std::vector<std::vector<double>> scores(Index layer, const S& scorer, ClassSet among,
                                          const std::vector<Position>& rows) {
    const auto lists = cache.pages(id, layer);
    const Columns columns = columns_of(lists, cache.tags(id));
    const auto live = columns.live_in_any();
    Observation<B> seen;
    seen.layer = layer, seen.shape = &prompt_.shape(layer), seen.heads = lists, seen.columns = &columns,
    seen.among = among;
    oracle::Array3 chosen(static_cast<Index>(rows.size()), prompt_.shape(layer).q_heads, prompt_.shape(layer).key_dim);
    std::vector<std::int32_t> own;
    for (Index r = 0; r < chosen.a; ++r) {
      const Position p = rows[static_cast<std::size_t>(r)];
      for (Index h = 0; h < chosen.b; ++h)
        for (Index c = 0; c < chosen.c; ++c)
          chosen.at(r, h, c) = prompt_.queries[static_cast<std::size_t>(layer)].at(p, h, c);
      for (Index c = 0; c < columns.count; ++c)
        if (columns.has(live, c) && columns.positions[static_cast<std::size_t>(c)] == p)
          own.push_back(static_cast<std::int32_t>(c));
    }
    require(own.size() == rows.size(), "test: a row's own token is not held");
    const TensorBuffer<B> queries(be_, chosen, DType::f32);
    seen.queries = queries.tensor(), seen.row_positions = rows, seen.row_columns = own;
    const Index heads = prompt_.shape(layer).kv_heads;
    const auto memory = upload(be_, std::vector<float>(static_cast<std::size_t>(heads * columns.count), 0.0f));
    score(be_, scorer, seen, Scores{memory.data(), heads, columns.count});
    const auto floats = download(be_, memory);
    std::vector<std::vector<double>> out;
    for (Index h = 0; h < heads; ++h) {
      auto& row =
          out.emplace_back(static_cast<std::size_t>(prompt_.tokens()), std::numeric_limits<double>::quiet_NaN());
      for (Index c = 0; c < columns.count; ++c)
        if (columns.has(columns.live_in(h), c))
          row[static_cast<std::size_t>(columns.positions[static_cast<std::size_t>(c)])] =
              static_cast<double>(floats[static_cast<std::size_t>(h * columns.count + c)]);
    }
    return out;
  }

 private:
  B& be_;
  const Prompt& prompt_;

 public:
  Cache cache;
  SequenceId id;

 private:
  std::vector<TensorBuffer<B>> queries_, keys_, values_;
  std::vector<Buffer<B, float>> lse_;
};

}  // namespace kvpare::test

// A cache whose rows depend on layer, head and position alone: sequences that are given the same positions are given
// the same rows, in this cache or another.
#pragma once

#include <kvpare/pipeline/kv_cache.hpp>
#include <kvpare/runtime/make_compressor.hpp>
#include <kvpare/runtime/snapshot.hpp>
#include <numeric>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "inputs.hpp"

namespace kvpare::test {

using Positions = std::vector<Position>;

inline Positions range(Index first, Index count) {
  Positions p(static_cast<std::size_t>(count));
  std::iota(p.begin(), p.end(), static_cast<Position>(first));
  return p;
}

template <Backend B, class F>
class ScriptedCache {
 public:
  using Cache = KvCache<B, F>;

  ScriptedCache(B& backend, const Model& model, CacheOptions options) : be(backend), cache(backend, model, options) {}

  B& be;
  Cache cache;

  const LayerShape& shape(Index layer) const { return cache.model().layers[static_cast<std::size_t>(layer)]; }

  /// [positions, heads, width] within [-size, size].
  TensorBuffer<B> rows(std::uint64_t what, Index layer, const Positions& positions, Index heads, Index width,
                       double size) {
    oracle::Array3 x(std::ssize(positions), heads, width);
    for (Index r = 0; r < x.a; ++r)
      for (Index i = 0; i < heads * width; ++i)
        x.values[static_cast<std::size_t>(r * heads * width + i)] =
            size * (2 * static_cast<double>(random_unit(what, positions[static_cast<std::size_t>(r)], i, layer)) - 1);
    return TensorBuffer<B>(be, x, DType::f32);
  }
  TensorBuffer<B> queries(Index layer, const Positions& at) {
    return rows(1, layer, at, shape(layer).q_heads, shape(layer).key_dim, 3);
  }

  void append(SequenceId id, Index layer, const Positions& at) {
    const LayerShape& s = shape(layer);
    const TensorBuffer<B> k = rows(2, layer, at, s.kv_heads, s.key_dim, 1.5),
                          v = rows(3, layer, at, s.kv_heads, s.value_dim, 1);
    require(cache.append(id, layer, k.tensor(), v.tensor(), at) == Outcome::done, "test: the pool is too small");
  }
  void append(SequenceId id, const Positions& at) {
    for (Index l = 0; l < cache.layers(); ++l) append(id, l, at);
  }

  template <class C>
  void observe(SequenceId id, const C& method, const Positions& at) {
    for (Index l = 0; l < cache.layers(); ++l) {
      const TensorBuffer<B> q = queries(l, at);
      cache.observe(id, l, method, q.tensor(), at);
    }
  }

  /// One step of all layers, its tokens appended before. Output rows of all layers, byte for byte.
  template <class C>
  std::string decode(SequenceId id, const C& method, const Positions& at) {
    append(id, at);
    std::string outputs;
    for (Index l = 0; l < cache.layers(); ++l) {
      const LayerShape& s = shape(l);
      const TensorBuffer<B> q = queries(l, at),
                            out(be, oracle::Array3(q.tensor().rows, s.q_heads, s.value_dim), DType::f32);
      cache.decode(l, {{.sequence = id, .queries = q.tensor(), .positions = at, .out = out.writable()}}, method);
      add_bytes(outputs, out.raw());
    }
    return outputs;
  }

  /// Steps at positions [first, end), one row each; the last one's outputs.
  template <class C>
  std::string decode_steps(SequenceId id, const C& method, Index first, Index end) {
    std::string outputs;
    for (Index p = first; p < end; ++p) outputs = decode(id, method, range(p, 1));
    return outputs;
  }

  /// Attention of rows at these positions in all layers, outputs and lse byte for byte.
  std::string attend(SequenceId id, const Positions& at) {
    std::string outputs;
    for (Index l = 0; l < cache.layers(); ++l) {
      const LayerShape& s = shape(l);
      const TensorBuffer<B> q = queries(l, at),
                            out(be, oracle::Array3(q.tensor().rows, s.q_heads, s.value_dim), DType::f32);
      const Buffer<B, float> lse(be, q.tensor().rows * s.q_heads);
      cache.attend(
          l, {{.sequence = id, .queries = q.tensor(), .positions = at, .out = out.writable(), .lse = lse.data()}});
      add_bytes(outputs, out.raw());
      const std::vector<float> host = download(be, lse);
      outputs.append(reinterpret_cast<const char*>(host.data()), host.size() * sizeof(float));
    }
    return outputs;
  }

  /// Last position ever given to any layer, -1 = none.
  Index last(SequenceId id) {
    Index last = -1;
    for (const auto& layer : cache.image(id).layers)
      if (!layer.given.empty()) last = std::max<Index>(last, layer.given.back().second - 1);
    return last;
  }

  std::vector<Positions> kept(SequenceId id) {
    std::vector<Positions> all;
    for (Index l = 0; l < cache.layers(); ++l)
      for (Index h = 0; h < shape(l).kv_heads; ++h) all.push_back(cache.kept(id, l, h));
    return all;
  }

  std::string saved(SequenceId id) const {
    std::ostringstream out;
    save(out, cache, id);
    return out.str();
  }
  std::optional<SequenceId> loaded(const std::string& bytes) {
    std::istringstream in(bytes);
    return load(in, cache);
  }

 private:
  static void add_bytes(std::string& to, const std::vector<std::byte>& bytes) {
    to.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }
};

}  // namespace kvpare::test

// What benchmarks run on: models, names, random rows, and a cache that is full of them.
#pragma once

#include <functional>
#include <initializer_list>
#include <memory>
#include <numeric>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <benchmark/benchmark.h>
#include <kvpare/kvpare.hpp>

#include "shapes.hpp"
#include "yardstick.hpp"

namespace bench {

using kvpare::DType;
using kvpare::Element;
using kvpare::Position;
using kvpare::SequenceId;

using Settings = std::initializer_list<std::pair<std::string_view, Index>>;

/// "attend/cpu/half/Q:32/H:8/D:128/N:4096/threads:1"
inline std::string label(std::string_view verb, DType type, const LayerShape& shape, Index tokens, Settings settings) {
  std::string text = kvpare::message(verb, "/cpu/", kvpare::name_of(type), "/Q:", shape.q_heads, "/H:", shape.kv_heads,
                                     "/D:", shape.key_dim, "/N:", tokens);
  for (const auto& [name, value] : settings) text += kvpare::message("/", name, ":", value);
  return text;
}

template <class F>
void add(const std::string& name, F&& body) {
  benchmark::RegisterBenchmark(name.c_str(), std::forward<F>(body));
}

/// About normally distributed: the sum of four uniform numbers, mean 0, deviation 1.
template <Element T>
std::vector<T> random_rows(Index rows, Index heads, Index width, std::uint64_t seed = 1) {
  std::vector<T> values(static_cast<std::size_t>(rows * heads * width));
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::uint64_t bits = kvpare::random_bits(seed, i);
    Index sum = -2 * 65535;
    for (int part = 0; part < 4; ++part) sum += static_cast<Index>(bits >> 16 * part & 0xffff);
    values[i] = T(static_cast<float>(sum) * (1.7320508f / 65536));
  }
  return values;
}

inline std::vector<Position> positions(Index first, Index count) {
  std::vector<Position> at(static_cast<std::size_t>(count));
  std::iota(at.begin(), at.end(), static_cast<Position>(first));
  return at;
}

/// Two pools of threads under one backend, so that one cache serves to compare them.
class Threads {
 public:
  explicit Threads(Index many) : many_(many) {}
  void use_one() { now_ = &one_; }
  void use_all() { now_ = &many_; }
  kvpare::cpu::Options options() {
    return {.parallel = [this](Index tasks, const std::function<void(Index)>& body) { (*now_)(tasks, body); }};
  }

 private:
  kvpare::cpu::ThreadPool one_{1}, many_;
  kvpare::cpu::ThreadPool* now_ = &many_;
};

/// One long sequence in layers of raw pages. Every layer holds the same rows; so do keys and values.
template <Element T>
class FilledCache {
 public:
  using Cache = kvpare::KvCache<kvpare::cpu::Backend, kvpare::Formats<kvpare::Pair<kvpare::Raw<T>, kvpare::Raw<T>>>>;

  struct Options {
    Index page_tokens = 64, threads = 1;
    Index room = 0;  // tokens for which each layer has more pages than it fills
  };

  FilledCache(const LayerShape& layer, Index layer_count, std::vector<T> rows, Options options)
      : shape(layer), layers(layer_count), tokens(static_cast<Index>(rows.size()) / (layer.kv_heads * layer.key_dim)),
        threads(options.threads), backend(threads.options()),
        cache(backend, {std::vector<LayerShape>(static_cast<std::size_t>(layers), shape)},
              {.page_tokens = options.page_tokens, .pool_bytes = pool_bytes(options)}),
        rows_(std::move(rows)) {
    refill();
  }

  static Index token_bytes(const LayerShape& layer) {
    return layer.kv_heads * (layer.key_dim + layer.value_dim) * static_cast<Index>(sizeof(T));
  }
  static Index key_bytes(const LayerShape& layer) {
    return layer.kv_heads * layer.key_dim * static_cast<Index>(sizeof(T));
  }

  /// As many layers as the rotation takes.
  static Index enough_layers(const LayerShape& layer, Index tokens) {
    return std::max<Index>(2, kvpare::ceil_div(rotation_bytes(), tokens * token_bytes(layer)));
  }

  /// A fresh sequence in place of the old one, appended in chunks as a long prompt is.
  void refill() {
    if (sequence != 0) cache.release(sequence);
    sequence = cache.create();
    constexpr Index chunk = 512;
    for (Index layer = 0; layer < layers; ++layer)
      for (Index first = 0; first < tokens; first += chunk) {
        const Index count = std::min(chunk, tokens - first);
        const kvpare::ConstTensor source(rows_.data() + first * shape.kv_heads * shape.key_dim, count, shape.kv_heads,
                                         shape.key_dim);
        const auto at = positions(first, count);
        kvpare::require(cache.append(sequence, layer, source, source, at) == kvpare::Outcome::done,
                        "bench: the pool is full");
      }
  }

  const LayerShape shape;
  const Index layers, tokens;
  Threads threads;
  kvpare::cpu::Backend backend;
  Cache cache;
  SequenceId sequence = 0;

 private:
  Index pool_bytes(const Options& options) const {
    const Index pages = kvpare::ceil_div(tokens + options.room, options.page_tokens) + (options.room > 0);
    return layers * pages * options.page_tokens * token_bytes(shape);
  }

  std::vector<T> rows_;
};

/// The query rows of one decode step and where its result goes.
template <Element T>
struct Queries {
  Queries(const LayerShape& shape, Index row_count, Index first_position)
      : at(positions(first_position, row_count)), rows(random_rows<T>(row_count, shape.q_heads, shape.key_dim, 2)),
        result(static_cast<std::size_t>(row_count * shape.q_heads * shape.value_dim)),
        tensor(rows.data(), row_count, shape.q_heads, shape.key_dim),
        out(result.data(), row_count, shape.q_heads, shape.value_dim) {}

  kvpare::AttendRequest of(SequenceId sequence) const {
    return {.sequence = sequence, .queries = tensor, .positions = at, .out = out};
  }

  std::vector<Position> at;
  std::vector<T> rows, result;
  kvpare::ConstTensor tensor;
  kvpare::Tensor out;
};

/// The one thing that `kept` holds.
struct Kept {
  std::string key;
  std::shared_ptr<void> thing;
};
inline Kept& the_kept() {
  static Kept kept;
  return kept;
}

/// Google Benchmark calls a benchmark several times in a row: what `make` returned (a unique_ptr) is kept for as long
/// as the key is the same, one thing at a time.
template <class Make>
auto& kept(const std::string& key, const Make& make) {
  using Thing = typename decltype(make())::element_type;
  Kept& held = the_kept();
  if (held.key != key) {
    held = {};  // its memory first
    held = {key, make()};
  }
  return *static_cast<Thing*>(held.thing.get());
}

/// A filled cache of enough layers, kept.
template <Element T>
FilledCache<T>& filled(const LayerShape& shape, Index tokens, typename FilledCache<T>::Options options = {}) {
  return kept(
      kvpare::message("filled ",
                      label("", kvpare::dtype_of<T>(), shape, tokens,
                            {{"page", options.page_tokens}, {"threads", options.threads}, {"room", options.room}})),
      [&] {
        return std::make_unique<FilledCache<T>>(shape, FilledCache<T>::enough_layers(shape, tokens),
                                                random_rows<T>(tokens, shape.kv_heads, shape.key_dim), options);
      });
}

}  // namespace bench

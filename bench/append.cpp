// append: new tokens of one layer, all kv heads, into half pages.
#include "support/rig.hpp"
#include "support/run.hpp"

namespace bench {
namespace {

/// Layers take turns; when the pool is full, the new tokens are forgotten.
template <Element From>
void append(benchmark::State& state, const LayerShape& shape, Index tokens, Index rows) {
  auto& rig = filled<kvpare::half>(shape, tokens, {.threads = 1, .room = tokens});
  const std::vector<From> values = random_rows<From>(rows, shape.kv_heads, shape.key_dim);
  const kvpare::ConstTensor source(values.data(), rows, shape.kv_heads, shape.key_dim);
  std::vector<Position> at;
  const auto prepare = [&](Index i) {
    const Index round = i / rig.layers % (tokens / rows);
    if (i % rig.layers == 0 && round == 0) rig.cache.truncate(rig.sequence, static_cast<Position>(tokens));
    at = positions(tokens + round * rows, rows);
  };
  const double elements = static_cast<double>(rows * shape.kv_heads * (shape.key_dim + shape.value_dim));
  const double bytes = elements * static_cast<double>(sizeof(From) + sizeof(kvpare::half));  // read and written
  run(
      state, {.bytes = bytes, .tokens = static_cast<double>(rows), .against = {of_memcpy(bytes, 1)}},
      [&](Index i) {
        kvpare::require(rig.cache.append(rig.sequence, i % rig.layers, source, source, at) == kvpare::Outcome::done,
                        "bench: pool full");
      },
      prepare);
}

template <Element From>
void add_append(Index rows) {
  const Index tokens = 2048;  // in each layer before
  add(kvpare::message(label("append", DType::f16, llama_8b(), tokens, {{"rows", rows}}),
                      "/from:", kvpare::name_of(kvpare::dtype_of<From>()), "/threads:1"),
      [=](benchmark::State& state) { append<From>(state, llama_8b(), tokens, rows); });
}

const bool added = [] {
  for (Index rows : {1, 512}) {
    add_append<kvpare::half>(rows);
    add_append<float>(rows);
  }
  return true;
}();

}  // namespace
}  // namespace bench

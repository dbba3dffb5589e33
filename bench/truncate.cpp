// truncate: the newer half of a sequence is forgotten, in all layers.
#include "support/rig.hpp"
#include "support/run.hpp"

namespace bench {
namespace {

void truncate(benchmark::State& state, const LayerShape& shape, Index tokens) {
  auto& rig = filled<kvpare::half>(shape, tokens);
  SequenceId copy = 0;
  const auto release = [&] {
    if (copy != 0) rig.cache.release(copy);
  };
  const double seconds = run(
      state, {}, [&](Index) { rig.cache.truncate(copy, static_cast<Position>(tokens / 2)); },
      [&](Index) {
        release();
        copy = rig.cache.fork(rig.sequence);
      });
  release();
  const Index pages = rig.layers * shape.kv_heads * tokens / 2 / rig.cache.page_tokens();
  state.counters["ns_per_page"] = seconds * 1e9 / static_cast<double>(pages);
}

const bool added = [] {
  for (Index tokens : {1024, 4096})
    add(label("truncate", DType::f16, llama_8b(), tokens, {{"threads", 1}}),
        [=](benchmark::State& state) { truncate(state, llama_8b(), tokens); });
  return true;
}();

}  // namespace
}  // namespace bench

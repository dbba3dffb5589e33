// fork: a second sequence that shares all pages of the first.
#include "support/rig.hpp"
#include "support/run.hpp"

namespace bench {
namespace {

void fork(benchmark::State& state, const LayerShape& shape, Index tokens) {
  auto& rig = filled<kvpare::half>(shape, tokens);
  SequenceId copy = 0;
  const auto release = [&](Index) {
    if (copy != 0) rig.cache.release(copy);
  };
  const double seconds = run(
      state, {}, [&](Index) { copy = rig.cache.fork(rig.sequence); }, release);
  release(0);
  const Index pages = rig.layers * shape.kv_heads * kvpare::ceil_div(tokens, rig.cache.page_tokens());
  state.counters["ns_per_page"] = seconds * 1e9 / static_cast<double>(pages);
}

const bool added = [] {
  for (Index tokens : {1024, 4096})
    add(label("fork", DType::f16, llama_8b(), tokens, {{"threads", 1}}),
        [=](benchmark::State& state) { fork(state, llama_8b(), tokens); });
  return true;
}();

}  // namespace
}  // namespace bench

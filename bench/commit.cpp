// commit: a random share of all tokens stays, each head its own; the survivors are packed in place.
#include "support/rig.hpp"
#include "support/run.hpp"

namespace bench {
namespace {

void commit(benchmark::State& state, const LayerShape& shape, Index tokens, double keep, Index threads) {
  auto& rig = filled<kvpare::half>(shape, tokens, {.threads = threads});
  auto compressor = kvpare::random_choice();
  compressor.keep = kvpare::Keep::ratio(keep);
  kvpare::Plan plan;
  const auto prepare = [&](Index) {
    rig.refill();
    plan = rig.cache.plan(rig.sequence, compressor);
  };
  prepare(0);
  const kvpare::CompressReport report = rig.cache.commit(plan);  // every time the same
  const double bytes =
      2.0 * static_cast<double>(report.rows_moved * rig.token_bytes(shape) / shape.kv_heads);  // read and written
  run(
      state, {.bytes = bytes, .tokens = static_cast<double>(rig.tokens), .against = {of_memcpy(bytes, threads)}},
      [&](Index) { rig.cache.commit(plan); }, prepare);
  rig.refill();  // for whoever comes next
}

const bool added = [] {
  for (Index tokens : {1024, 8448})
    for (Index percent : {10, 50, 70})
      for (Index threads : {1, 2})
        add(label("commit", DType::f16, qwen_vl_7b(), tokens, {{"keep%", percent}, {"threads", threads}}),
            [=](benchmark::State& state) {
              commit(state, qwen_vl_7b(), tokens, static_cast<double>(percent) / 100, threads);
            });
  return true;
}();

}  // namespace
}  // namespace bench

// statistics: minimum, maximum, sum and sum of squares of the keys of one layer, per channel or per slot.
#include "support/rig.hpp"
#include "support/run.hpp"

namespace bench {
namespace {

void statistics(benchmark::State& state, const LayerShape& shape, Index tokens, bool per_slot, Index threads) {
  auto& rig = filled<kvpare::half>(shape, tokens, {.threads = threads});
  const Index n = per_slot ? tokens : shape.key_dim;
  std::vector<float> out(static_cast<std::size_t>(4 * shape.kv_heads * n));
  std::vector<std::vector<kvpare::StatisticsRow>> lists;
  for (Index layer = 0; layer < rig.layers; ++layer) {
    auto& of_layer = lists.emplace_back();
    for (const kvpare::HeadPages& list : rig.cache.pages(rig.sequence, layer)) {
      float* at = out.data() + 4 * n * static_cast<Index>(of_layer.size());
      of_layer.push_back({.pages = list,
                          .width = shape.key_dim,
                          .per_slot = per_slot,
                          .min = at,
                          .max = at + n,
                          .sum = at + 2 * n,
                          .sum_squares = at + 3 * n});
    }
  }
  const double bytes = static_cast<double>(tokens * rig.key_bytes(shape));
  run(state, {.bytes = bytes, .tokens = static_cast<double>(tokens), .against = {of_read_bw(bytes, threads)}},
      [&](Index i) { rig.backend.statistics(lists[static_cast<std::size_t>(i % rig.layers)]); });
}

const bool added = [] {
  for (Index tokens : {1024, 4096})
    for (bool per_slot : {false, true})
      for (Index threads : {1, 2})
        add(label(per_slot ? "statistics/per_slot" : "statistics/per_channel", DType::f16, llama_8b(), tokens,
                  {{"threads", threads}}),
            [=](benchmark::State& state) { statistics(state, llama_8b(), tokens, per_slot, threads); });
  return true;
}();

}  // namespace
}  // namespace bench

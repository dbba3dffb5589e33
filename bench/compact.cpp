// compact: the moves of one layer after a random share of its tokens stayed, each head its own. The verb alone, without
// the bookkeeping around it (see commit).
#include "support/rig.hpp"
#include "support/run.hpp"

namespace bench {
namespace {

/// Moving the same rows again and again writes what nobody reads.
void compact(benchmark::State& state, const LayerShape& shape, Index tokens, double keep, Index threads) {
  auto& rig = filled<kvpare::half>(shape, tokens, {.threads = threads});
  std::vector<std::vector<kvpare::CompactedList>> compacted(static_cast<std::size_t>(rig.layers));
  std::vector<std::vector<kvpare::CompactList>> lists(compacted.size());
  Index rows_moved = 0;
  for (Index layer = 0; layer < rig.layers; ++layer)
    for (const kvpare::HeadPages& list : rig.cache.pages(rig.sequence, layer)) {
      auto& of_layer = compacted[static_cast<std::size_t>(layer)];
      kvpare::Selection stay(static_cast<Index>(list.entries.size()));
      for (Index token = 0; token < tokens; ++token)
        if (kvpare::random_unit(4, layer, of_layer.size(), token) < keep)
          stay.insert(token / list.page_tokens, token % list.page_tokens);
      of_layer.push_back(kvpare::compact_list(list, stay.words(), [](kvpare::PageId) { return true; }));
      lists[static_cast<std::size_t>(layer)].push_back(
          {list.formats, of_layer.back().moves, shape.key_dim, shape.value_dim});
      for (const kvpare::Move& move : of_layer.back().moves) rows_moved += move.count;
    }
  const double rows = static_cast<double>(rows_moved) / static_cast<double>(rig.layers);  // of a layer, over its heads
  const double bytes = 2 * rows * static_cast<double>(rig.token_bytes(shape) / shape.kv_heads);  // read and written
  run(state, {.bytes = bytes, .tokens = rows, .against = {of_memcpy(bytes, threads)}},
      [&](Index i) { rig.backend.compact(lists[static_cast<std::size_t>(i % rig.layers)]); });
}

const bool added = [] {
  for (Index tokens : {1024, 8448})
    for (Index percent : {10, 50, 70})
      for (Index threads : {1, 2})
        add(label("compact", DType::f16, qwen_vl_7b(), tokens, {{"keep%", percent}, {"threads", threads}}),
            [=](benchmark::State& state) {
              compact(state, qwen_vl_7b(), tokens, static_cast<double>(percent) / 100, threads);
            });
  return true;
}();

}  // namespace
}  // namespace bench

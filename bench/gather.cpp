// gather: keys of one layer as dense floats, all of them or every tenth.
#include "support/rig.hpp"
#include "support/run.hpp"

namespace bench {
namespace {

void gather(benchmark::State& state, const LayerShape& shape, Index tokens, Index every, Index threads) {
  auto& rig = filled<kvpare::half>(shape, tokens, {.threads = threads});
  std::vector<std::uint64_t> mask(static_cast<std::size_t>(tokens / 64), 0);
  for (Index t = 0; t < tokens; t += every) mask[static_cast<std::size_t>(t / 64)] |= std::uint64_t{1} << t % 64;
  const Index rows = kvpare::ceil_div(tokens, every), row_floats = rows * shape.key_dim;
  std::vector<float> out(static_cast<std::size_t>(rig.layers * shape.kv_heads * row_floats));

  std::vector<std::vector<kvpare::GatherRow>> lists;
  for (Index layer = 0; layer < rig.layers; ++layer) {
    auto& of_layer = lists.emplace_back();
    for (const kvpare::HeadPages& list : rig.cache.pages(rig.sequence, layer)) {
      const Index at = layer * shape.kv_heads + static_cast<Index>(of_layer.size());
      of_layer.push_back(
          {.pages = list, .mask = mask.data(), .width = shape.key_dim, .out = out.data() + at * row_floats});
    }
  }
  const double bytes = static_cast<double>(shape.kv_heads * row_floats) * (sizeof(kvpare::half) + sizeof(float));
  run(state, {.bytes = bytes, .tokens = static_cast<double>(rows), .against = {of_memcpy(bytes, threads)}},
      [&](Index i) { rig.backend.gather(lists[static_cast<std::size_t>(i % rig.layers)]); });
}

const bool added = [] {
  for (Index tokens : {1024, 4096})
    for (Index every : {1, 10})
      for (Index threads : {1, 2})
        add(label("gather", DType::f16, llama_8b(), tokens, {{"every", every}, {"threads", threads}}),
            [=](benchmark::State& state) { gather(state, llama_8b(), tokens, every, threads); });
  return true;
}();

}  // namespace
}  // namespace bench

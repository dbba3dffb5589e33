// attention_mass: what text rows at the end of a picture's prompt attend to, one layer.
#include "support/rig.hpp"
#include "support/run.hpp"

namespace bench {
namespace {

/// The verb for the last `rows` rows, with memory for its arguments.
class LastRows {
 public:
  LastRows(const FilledCache<kvpare::half>& rig, Index rows)
      : queries_(rig.shape, rows, rig.tokens - rows), out_(static_cast<std::size_t>(rig.shape.kv_heads * rig.tokens)) {
    for (Index layer = 0; layer < rig.layers; ++layer) lists_.push_back(rig.cache.pages(rig.sequence, layer));
    arguments_.shape = &rig.shape;
    arguments_.columns = rig.tokens;
    arguments_.queries = queries_.tensor;
    arguments_.row_positions = queries_.at.data();
    arguments_.out = out_.data();
  }

  const kvpare::MassArguments<>& of(Index layer) {
    arguments_.keys = lists_[static_cast<std::size_t>(layer)];
    return arguments_;
  }

 private:
  Queries<kvpare::half> queries_;
  std::vector<float> out_;
  std::vector<std::vector<kvpare::HeadPages>> lists_;
  kvpare::MassArguments<> arguments_;
};

void last_rows(benchmark::State& state, const LayerShape& shape, Index tokens, Index rows, Index threads) {
  auto& rig = filled<kvpare::half>(shape, tokens, {.threads = threads});
  LastRows verb(rig, rows);
  const double key_bytes = static_cast<double>(tokens * rig.key_bytes(shape));
  const double flops =
      2.0 * static_cast<double>(rows * shape.q_heads * tokens * shape.key_dim);  // one product of Q and K
  // Eigen is at its best with many rows of one head, or with few rows of all heads of a group together.
  const ProductShape product{.m = rows >= 64 ? rows : rows * shape.group(), .n = tokens, .k = shape.key_dim};
  run(state,
      {.bytes = key_bytes,
       .tokens = static_cast<double>(tokens),
       .against = {of_read_bw(key_bytes, threads), of_sgemm(flops, product, threads)}},
      [&](Index i) { rig.backend.attention_mass(verb.of(i % rig.layers)); });
}

const bool added = [] {
  for (Index tokens : {2048, 8448})
    for (Index rows : {1, 2, 4, 8, 32, 256})
      for (Index threads : {1, 2})
        add(label("attention_mass", DType::f16, qwen_vl_7b(), tokens, {{"rows", rows}, {"threads", threads}}),
            [=](benchmark::State& state) { last_rows(state, qwen_vl_7b(), tokens, rows, threads); });
  return true;
}();

}  // namespace
}  // namespace bench

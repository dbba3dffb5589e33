// attention_mass: how much the last rows of a prompt attend to every key, one layer. Keys are counted once, 256 bytes
// per token of a kv head; where lse is not given the verb reads them twice. Products: 2 · rows · Q · N · D, as `flops`;
// an mma of 16 x 8 x 16 does 4096.
#include "attend.cuh"

namespace bench {
namespace {

enum class Lse { given, computed };

void last_rows(benchmark::State& state, const LayerShape& shape, Index tokens, Index rows, Lse lse) {
  Device device;
  FilledCache<Half> filled(device, shape, {tokens});
  const auto queries = random_array<kvpare::half>(device, rows * shape.q_heads * shape.key_dim, 3);
  std::vector<Position> at(static_cast<std::size_t>(rows));
  std::iota(at.begin(), at.end(), static_cast<Position>(tokens - rows));
  const DeviceArray<Position> positions(device.backend, at);
  const DeviceArray<float> sums(device.backend,
                                std::vector<float>(static_cast<std::size_t>(rows * shape.q_heads), 12.0f));
  const DeviceArray<float> out(device.backend, std::vector<float>(static_cast<std::size_t>(shape.kv_heads * tokens)));
  std::vector<std::vector<kvpare::HeadPages>> lists;
  for (Index l = 0; l < filled.layers; ++l) lists.push_back(filled.cache.pages(filled.sequences[0], l));
  kvpare::MassArguments<> arguments;
  arguments.shape = &shape;
  arguments.columns = tokens;
  arguments.queries = kvpare::ConstTensor(queries.data(), rows, shape.q_heads, shape.key_dim);
  arguments.row_positions = positions.data();
  arguments.out = out.data();
  if (lse == Lse::given) arguments.lse = sums.data();
  const double n = static_cast<double>(tokens), heads = static_cast<double>(shape.kv_heads);
  const double seconds = measure(state, device, {n * heads * 256, n}, filled.layers, [&](Index i) {
    arguments.keys = lists[static_cast<std::size_t>(i % filled.layers)];
    device.backend.attention_mass(arguments);
  });
  state.counters["flops"] =
      2 * static_cast<double>(rows * shape.q_heads * shape.key_dim) * n / (rows == tokens ? 2 : 1) / seconds;
}

void add_rows(const LayerShape& shape, Index tokens, Index rows, Lse lse) {
  add(kvpare::message(label("attention_mass", lse == Lse::given ? "lse_given" : "lse_computed", shape, 1, tokens),
                      "/rows:", rows),
      [=](benchmark::State& state) { last_rows(state, shape, tokens, rows, lse); });
}

const bool added = [] {
  for (const Lse lse : {Lse::given, Lse::computed}) {
    add_rows(llama_8b(), 32768, 32, lse);
    add_rows(qwen_vl_7b(), 32768, 32, lse);
    add_rows(qwen_vl_7b(), 8192, 256, lse);
    add_rows(llama_8b(), 8192, 8192, lse);
  }
  return true;
}();

}  // namespace
}  // namespace bench

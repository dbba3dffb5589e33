#include "ratios.hpp"

#include <kvpare/kvpare.hpp>
#include <ostream>
#include <stdexcept>

namespace tune {

std::vector<double> layer_ratios(const example::Trace& trace, double keep) {
  const kvpare::Model model = trace.model();
  kvpare::cpu::Backend backend;
  kvpare::Index bytes = 0;
  for (const kvpare::LayerShape& s : model.layers)
    bytes += (kvpare::round_up(trace.tokens(), 64) + 64) * s.kv_heads * (s.key_dim + s.value_dim) * 4;
  kvpare::KvCache<kvpare::cpu::Backend, kvpare::Formats<kvpare::Pair<kvpare::Raw<float>, kvpare::Raw<float>>>> cache(
      backend, model, {.pool_bytes = bytes + bytes / 8 + (1 << 20)});
  const auto id = cache.create();
  auto method = kvpare::prefix_kv();
  method.keep = kvpare::Keep::ratio(keep);
  for (kvpare::Index l = 0; l < cache.layers(); ++l) {
    const example::TraceLayer& layer = trace.layers[static_cast<std::size_t>(l)];
    if (cache.append(id, l, layer.keys.tensor(), layer.values.tensor(), trace.positions) != kvpare::Outcome::done)
      throw std::runtime_error("the cache is full at layer " + std::to_string(l));
    cache.observe(id, l, method, layer.queries.tensor(), trace.positions);
  }
  const kvpare::Plan plan = cache.plan(id, method);
  std::vector<double> ratios;
  for (const kvpare::LayerPlan& layer : plan.layers)
    ratios.push_back(layer.touched ? static_cast<double>(layer.budget) / static_cast<double>(trace.tokens()) : 1.0);
  return ratios;
}

void write_ratios(std::ostream& out, const kvpare::Ratios& ratios, double keep, std::size_t prompts) {
  out << "# Keep ratio of each layer, the mean over " << prompts << (prompts == 1 ? " prompt.\n" : " prompts.\n")
      << "prefix_kv(keep=" << kvpare::print_setting(keep)
      << ", budget=layer_ratios, ratios=" << kvpare::print_setting(ratios) << ")\n";
}

}  // namespace tune

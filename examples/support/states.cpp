#include "states.hpp"

namespace example {
namespace {

constexpr const char* kind = "kvpare states";

std::string name_of(std::size_t layer, const char* side) { return "layers." + std::to_string(layer) + "." + side; }

}  // namespace

void write_states(const std::string& path, const States& states) {
  SafetensorsWriter file;
  file.metadata["format"] = kind;
  file.metadata["form"] = print_setting(states.form);
  for (std::size_t l = 0; l < states.layers.size(); ++l)
    for (const auto& [side, floats] : {std::pair{"keys", &states.layers[l].keys}, std::pair{"values", &states.layers[l].values}})
      if (!floats->empty()) file.add(name_of(l, side), {floats->size()}, std::span<const float>(*floats));
  file.write(path);
}

States read_states(const std::string& path) {
  const Safetensors file = Safetensors::open(path);
  const auto text = [&](const char* name) {
    const auto at = file.metadata().find(name);
    expect(at != file.metadata().end(), path, "no text '", name, "'; states are what kvpare_tune --learn writes");
    return at->second;
  };
  expect(text("format") == kind, path, "format is '", text("format"), "', must be '", kind, "'");
  States states;
  expect(kvpare::parse_setting(text("form"), states.form), path, "form is '", text("form"), "', must be codecs, as in int4/int2");
  std::size_t found = 0;
  for (std::size_t before = 1; before > 0;) {
    before = 0;
    States::Layer layer;
    for (const auto& [side, floats] : {std::pair{"keys", &layer.keys}, std::pair{"values", &layer.values}}) {
      const auto at = file.arrays().find(name_of(states.layers.size(), side));
      if (at == file.arrays().end()) continue;
      *floats = file.floats(at->first, at->second.shape), ++before;
    }
    found += before;
    if (before > 0) states.layers.push_back(std::move(layer));
  }
  expect(!states.layers.empty(), path, "no layers.0.keys and no layers.0.values");
  expect(found == file.arrays().size(), path, file.arrays().size() - found, " arrays beside layers.0 to layers.",
         states.layers.size() - 1, ", each with keys, values or both");
  return states;
}

}  // namespace example

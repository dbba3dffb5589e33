// snapshot: a sequence into a string of bytes and back, every layer of it.
#include <sstream>

#include "support/rig.hpp"
#include "support/run.hpp"

namespace bench {
namespace {

/// A stream over a string that lies there already, so that what is timed is the snapshot and not the string's growth.
struct Bytes : std::streambuf {
  explicit Bytes(std::string& s) {
    setg(s.data(), s.data(), s.data() + s.size());
    setp(s.data(), s.data() + s.size());
  }
};

constexpr Index layers = 4;

struct Snapshot {
  Snapshot(const LayerShape& shape, Index tokens, double keep)
      : filled(shape, layers, random_rows<kvpare::half>(tokens, shape.kv_heads, shape.key_dim), {.room = tokens}) {
    if (keep < 1) {
      auto method = kvpare::random_choice();
      method.keep = kvpare::Keep::ratio(keep);
      filled.cache.compress(filled.sequence, method);
    }
    std::ostringstream out;
    kvpare::save(out, filled.cache, filled.sequence);
    bytes = out.str();
  }
  FilledCache<kvpare::half> filled;
  std::string bytes;
};

Snapshot& snapshot(const LayerShape& shape, Index tokens, double keep) {
  return kept(kvpare::message("snapshot ", tokens, " ", keep),
              [&] { return std::make_unique<Snapshot>(shape, tokens, keep); });
}

/// Bytes of a snapshot, read once and written once.
Cost cost_of(const Snapshot& rig, Index tokens) {
  const double bytes = 2 * static_cast<double>(rig.bytes.size());
  return {.bytes = bytes, .tokens = static_cast<double>(tokens), .against = {of_memcpy(bytes, 1)}};
}

void save(benchmark::State& state, const LayerShape& shape, Index tokens, double keep) {
  Snapshot& rig = snapshot(shape, tokens, keep);
  run(state, cost_of(rig, tokens), [&](Index) {
    Bytes buffer(rig.bytes);
    std::ostream out(&buffer);
    kvpare::save(out, rig.filled.cache, rig.filled.sequence);
  });
}

void load(benchmark::State& state, const LayerShape& shape, Index tokens, double keep) {
  Snapshot& rig = snapshot(shape, tokens, keep);
  std::optional<SequenceId> copy;
  const auto release = [&](Index) {
    if (copy) rig.filled.cache.release(*copy);
    copy.reset();
  };
  run(
      state, cost_of(rig, tokens),
      [&](Index) {
        Bytes buffer(rig.bytes);
        std::istream in(&buffer);
        copy = kvpare::load(in, rig.filled.cache);
        kvpare::require(copy.has_value(), "bench: the pool is full");
      },
      release);
  release(0);
}

const bool added = [] {
  for (Index tokens : {1024, 4096})
    for (Index percent : {100, 30}) {
      const double keep = static_cast<double>(percent) / 100;
      const LayerShape shape = llama_8b();
      const auto name = [&](const char* verb) {
        return label(verb, DType::f16, shape, tokens, {{"L", layers}, {"keep%", percent}, {"threads", 1}});
      };
      add(name("snapshot/save"), [=](benchmark::State& state) { save(state, shape, tokens, keep); });
      add(name("snapshot/load"), [=](benchmark::State& state) { load(state, shape, tokens, keep); });
    }
  return true;
}();

}  // namespace
}  // namespace bench

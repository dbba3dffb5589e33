// A scorer whose scores are known exactly.
#pragma once

#include <kvpare/core/random.hpp>
#include <kvpare/policy/contracts.hpp>
#include <limits>

namespace kvpare::test {

/// Small whole scores, many ties, NaN here and there.
struct Scripted {
  static constexpr std::string_view name = "scripted";
  static constexpr auto fields() { return std::tuple{}; }
  std::uint64_t seed = 1;
  constexpr Reads reads() const { return {}; }
  friend bool operator==(const Scripted&, const Scripted&) = default;

  KVPARE_HD static float of(std::uint64_t seed, Index layer, Index head, Position p) {
    const std::uint64_t bits = random_bits(seed, layer, head, p);
    return bits % 11 == 0 ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(bits / 16 % 5);
  }
};

struct WriteScripted {
  std::uint64_t seed;
  Index layer;
  const Position* positions;
  Scores out;
  KVPARE_HD void operator()(Index i) const {
    out.data[i] = Scripted::of(seed, layer, i / out.columns, positions[i % out.columns]);
  }
};

template <Backend B>
void score(B& be, const Scripted& policy, const Observation<B>& seen, Scores out) {
  const Buffer<B, Position> positions(be, seen.columns->positions);
  be.each(out.heads * out.columns, WriteScripted{policy.seed, seen.layer, positions.data(), out});
}

}  // namespace kvpare::test

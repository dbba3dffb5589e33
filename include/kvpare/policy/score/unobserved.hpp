// Scores that look at nothing but the place of a token: the yardsticks every other policy has to beat.
#pragma once

#include <string_view>
#include <tuple>

#include "../../core/random.hpp"
#include "../contracts.hpp"

namespace kvpare {

/// A seeded coin for every (layer, kv head, position): the same on every backend and in every run.
///
/// Formula  score[h, j] = uniform [0, 1) from splitmix64(seed, layer, h, position)
/// Cost     O(columns); reads nothing
struct Random {
  static constexpr std::string_view name = "random";
  std::int64_t seed = 0;

  static constexpr auto fields() {
    return std::tuple{Field<Random, std::int64_t>{"seed", &Random::seed, 0, std::int64_t{1} << 53, "of the coin"}};
  }
  constexpr Reads reads() const { return {}; }
  friend bool operator==(const Random&, const Random&) = default;
};

/// The first tokens of the sequence, then the newest.
///
/// Formula  score = position;  the first `sinks` live tokens rank above all, the very first highest
/// Cost     O(columns); reads nothing. Positions above 2^24 are ranked by their upper bits
/// Source   StreamingLLM (Xiao et al. 2023, arXiv 2309.17453), section 3.2. Ours: kept keys keep their own positions; the
///          published code stores keys before RoPE and numbers them anew, which keys that come rotated do not allow.
struct SinksAndRecent {
  static constexpr std::string_view name = "sinks_and_recent";
  Index sinks = 4;  // tokens kept from the start

  static constexpr auto fields() {
    return std::tuple{
        Field<SinksAndRecent, Index>{"sinks", &SinksAndRecent::sinks, 0, 1 << 20, "tokens kept from the start"}};
  }
  constexpr Reads reads() const { return {}; }
  friend bool operator==(const SinksAndRecent&, const SinksAndRecent&) = default;
};

namespace detail {

struct CoinScore {
  std::uint64_t seed;
  Index layer;
  const Position* positions;
  Scores out;
  KVPARE_HD void operator()(Index i) const {
    out.data[i] = random_unit(seed, layer, i / out.columns, positions[i % out.columns]);
  }
};

struct PlaceScore {
  const Position* positions;
  Position last_sink;  // positions up to this one are sinks
  Scores out;
  KVPARE_HD void operator()(Index i) const {
    const Position p = positions[i % out.columns];
    out.data[i] = p <= last_sink ? 0x1p60f - 0x1p36f * static_cast<float>(p) : static_cast<float>(p);
  }
};

}  // namespace detail

template <Backend B>
void score(B& be, const Random& policy, const Observation<B>& seen, Scores out) {
  const Buffer<B, Position> positions(be, seen.columns->positions);
  be.each(out.heads * out.columns,
          detail::CoinScore{static_cast<std::uint64_t>(policy.seed), seen.layer, positions.data(), out});
}

template <Backend B>
void score(B& be, const SinksAndRecent& policy, const Observation<B>& seen, Scores out) {
  const Columns& columns = *seen.columns;
  const auto live = columns.live_in_any();
  Position last_sink = -1;
  Index left = policy.sinks;
  for (Index c = 0; c < columns.count && left > 0; ++c)
    if (columns.has(live, c)) last_sink = columns.positions[static_cast<std::size_t>(c)], --left;
  const Buffer<B, Position> positions(be, columns.positions);
  be.each(out.heads * out.columns, detail::PlaceScore{positions.data(), last_sink, out});
}

}  // namespace kvpare

// Keys stored before their rotation.
#include "kvpare/codec/unrotated.hpp"

#include <limits>

#include "kvpare/codec/group.hpp"
#include "kvpare/codec/kv_quant.hpp"
#include "kvpare/codec/raw.hpp"
#include "oracle/kv_quant.hpp"
#include "support/codec_tiles.hpp"

namespace kvpare::test {
namespace {

std::vector<float> state_of(Index width, const Rope& rope) {
  std::vector<float> state(static_cast<std::size_t>(Rotation::state_floats(width)));
  Rotation::write_state(width, rope.view(), state.data());
  return state;
}

struct Case {
  Index width, rotary;
  double base;
  RopePairing pairing;
};
constexpr Case cases[] = {{128, 128, 10000, RopePairing::halves},
                          {128, 128, 500000, RopePairing::interleaved},
                          {80, 32, 10000, RopePairing::halves},
                          {96, 64, 10000, RopePairing::interleaved}};
constexpr Position places[] = {0, 1, 63, 64, 4097, 131071, 1 << 20};

TEST(Unrotated, RawRowsComeBackAsTheyAre) {
  using C = Unrotated<Raw<float>>;
  for (const Case& at : cases) {
    const auto state = state_of(at.width, rope_of_base(at.rotary, at.base, at.pairing));
    const auto rows = gaussians(3, 7 * at.width);
    std::vector<std::byte> tile(static_cast<std::size_t>(C::tile_bytes({16, at.width})));
    std::vector<float> row(static_cast<std::size_t>(at.width));
    C::encode({16, at.width}, rows.data(), 2, 7, {places, nullptr}, state.data(), tile.data());
    for (Index t = 0; t < 7; ++t) {
      C::decode({16, at.width}, tile.data(), 2 + t, places[t], state.data(), row.data());
      for (Index c = 0; c < at.width; ++c)
        EXPECT_NEAR(row[static_cast<std::size_t>(c)], rows[static_cast<std::size_t>(t * at.width + c)], 1e-6)
            << places[t];
    }
  }
}

TEST(Unrotated, WhatIsStoredIsTheOraclesRowBeforeItsRotation) {
  using C = Unrotated<Raw<float>>;
  for (const Case& at : cases) {
    const Rope rope = rope_of_base(at.rotary, at.base, at.pairing);
    const auto state = state_of(at.width, rope);
    const auto before = gaussians(4, 7 * at.width);
    std::vector<float> rows;
    for (Index t = 0; t < 7; ++t)
      for (const double x : oracle::rotated({before.begin() + t * at.width, before.begin() + (t + 1) * at.width},
                                            rope.inverse_frequencies, at.pairing == RopePairing::interleaved,
                                            static_cast<double>(places[t])))
        rows.push_back(static_cast<float>(x));
    std::vector<std::byte> tile(static_cast<std::size_t>(C::tile_bytes({16, at.width})));
    std::vector<float> row(static_cast<std::size_t>(at.width));
    C::encode({16, at.width}, rows.data(), 0, 7, {places, nullptr}, state.data(), tile.data());
    for (Index t = 0; t < 7; ++t) {
      Raw<float>::decode({16, at.width}, tile.data(), t, nullptr, row.data());
      for (Index c = 0; c < at.width; ++c)
        EXPECT_NEAR(row[static_cast<std::size_t>(c)], before[static_cast<std::size_t>(t * at.width + c)], 1e-6)
            << places[t];
    }
  }
}

TEST(Unrotated, WithoutRotationOrPositionsRowsAreCodedAsTheyAre) {
  using C = Unrotated<Raw<float>>;
  const auto rows = gaussians(5, 64);
  std::vector<float> nobodys(static_cast<std::size_t>(C::state_floats(64)), 3.0f), row(64);
  Rotation::write_state(64, {}, nobodys.data());
  Rope sections = rope_of_base(64);
  sections.axes = axes_of_sections(8, 12, 12);
  auto axes = state_of(64, sections);
  const auto plain = state_of(64, rope_of_base(64));
  std::vector<std::byte> tile(static_cast<std::size_t>(C::tile_bytes({16, 64})));
  const Position far = 1000;
  const auto stored = [&](const Position* p, const float* state) {
    C::encode({16, 64}, rows.data(), 0, 1, {p, nullptr}, state, tile.data());
    Raw<float>::decode({16, 64}, tile.data(), 0, nullptr, row.data());
    return row;
  };
  EXPECT_EQ(stored(&far, nullptr), rows);
  EXPECT_EQ(stored(&far, nobodys.data()), rows);
  EXPECT_EQ(stored(&far, axes.data()), rows);
  EXPECT_EQ(stored(nullptr, plain.data()), rows);
  EXPECT_NE(stored(&far, plain.data()), rows);
}

/// Keeps what it was given as its state.
struct Curious : Raw<float> {
  static constexpr std::string_view name = "curious";
  static constexpr Index state_floats(Index width) { return 5 * width; }
  static void make_state(Index width, const Measured& m, float* state) {
    for (Index c = 0; c < width; ++c) {
      state[c] = m.min[c], state[width + c] = m.max[c], state[2 * width + c] = m.rows[c];
      state[3 * width + c] = m.query_peak[c], state[4 * width + c] = m.query_squares[c];
    }
  }
  static void encode(TileShape t, const float* rows, Index first, Index count, const float*, std::byte* tile) {
    Raw<float>::encode(t, rows, first, count, nullptr, tile);
  }
};

TEST(Unrotated, StatesAreMadeOfRowsBeforeTheirRotation) {
  using C = Unrotated<Curious>;
  const Rope rope = rope_of_base(4, 100);
  const std::vector<float> before = {1, 2, 3, 4, -5, 6, -7, 8};
  std::vector<float> rows;
  const Position positions[] = {7, 90};
  for (int t = 0; t < 2; ++t)
    for (const double x : oracle::rotated({before.begin() + 4 * t, before.begin() + 4 * t + 4},
                                          rope.inverse_frequencies, false, positions[t]))
      rows.push_back(static_cast<float>(x));
  const float peak[] = {3, 1, 4, 1}, squares[] = {2, 1, 4, 3}, nothing[4] = {};
  Measured m;
  m.rows = rows.data(), m.positions = positions, m.tokens = 2, m.rope = rope.view(), m.min = m.max = nothing;
  m.query_peak = peak, m.query_squares = squares;
  std::vector<float> state(static_cast<std::size_t>(C::state_floats(4)));
  C::make_state(4, m, state.data());
  const float want[] = {-5, 2, -7, 4, 1, 6, 3, 8, 1, 2, 3, 4, 5, std::sqrt(2.0f), 5, std::sqrt(2.0f), 3, 2, 3, 2};
  const float* theirs = C::inner_state(4, state.data());
  for (int i = 0; i < 20; ++i) EXPECT_NEAR(theirs[i], want[i], 1e-5) << i;
}

TEST(Unrotated, TilesOfCodecsThatCodeThemWhole) {
  using C = Unrotated<KiviKeys<4, 16>>;
  static_assert(!C::rows_move && C::reads_facts && C::reads_positions && C::host_only && C::needs_rope);
  const auto state = state_of(64, rope_of_base(64));
  const auto rows = gaussians(8, 16 * 64);
  std::vector<Position> positions;
  for (int t = 0; t < 16; ++t) positions.push_back(100 + 3 * t);
  std::vector<std::byte> tile(static_cast<std::size_t>(C::tile_bytes({16, 64})));
  C::encode({16, 64}, rows.data(), 0, 16, {positions.data(), nullptr}, state.data(), tile.data());
  std::vector<float> row(64);
  for (Index t = 0; t < 16; ++t) {
    C::decode({16, 64}, tile.data(), t, positions[static_cast<std::size_t>(t)], state.data(), row.data());
    for (Index c = 0; c < 64; ++c)
      EXPECT_NEAR(row[static_cast<std::size_t>(c)], rows[static_cast<std::size_t>(t * 64 + c)], 0.4f);
  }
}

TEST(Unrotated, AnyStateAndAnyPosition) {
  using C = Unrotated<Raw<float>>;
  const auto rows = gaussians(9, 64);
  std::vector<std::byte> tile(static_cast<std::size_t>(C::tile_bytes({16, 64})));
  std::vector<float> row(64);
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    std::vector<float> state(static_cast<std::size_t>(C::state_floats(64)));
    for (std::size_t i = 0; i < state.size(); ++i)
      state[i] = std::bit_cast<float>(static_cast<std::uint32_t>(random_bits(seed, i)));
    constexpr float counts[] = {
        0, 32, 33, -1, 1e30f, std::numeric_limits<float>::quiet_NaN(), 31.5f, std::numeric_limits<float>::infinity()};
    state[0] = counts[seed % 8];
    const Position p = static_cast<Position>(random_bits(seed, 999));
    C::encode({16, 64}, rows.data(), 0, 1, {&p, nullptr}, state.data(), tile.data());
    C::decode({16, 64}, tile.data(), 0, p, state.data(), row.data());
    for (const float x : row) EXPECT_TRUE(std::isfinite(x));
  }
}

}  // namespace
}  // namespace kvpare::test

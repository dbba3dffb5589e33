// Keys as they were before their rotary embedding: turned back before they are coded, turned again when they are read.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <vector>

#include "../core/rope.hpp"
#include "../core/text.hpp"
#include "codec.hpp"
#include "packing.hpp"
#include "rounding.hpp"

namespace kvpare {

/// A rotation, as states hold it and as rows are turned by it.
///
/// State   [2 + width], floats: pairs | 1 for interleaved | high halves of the inverse frequencies [width / 2] | low halves
///         [width / 2]. The two halves of a frequency, added as doubles, are within 2^-48 of it. A number of pairs that cannot
///         be one is none; a frequency that is no number, or beyond 2^64, counts as 0
/// Phases  each frequency as a share of a whole turn, in units of 2^-64: a position times it, modulo 2^64, is what is left of
///         the angle without its whole turns. At position 2^20 no angle is off by more than 2^-26
struct Rotation {
  static constexpr Index most_pairs = detail::max_coded_width / 2;
  static constexpr Index state_floats(Index width) { return 2 + width / 2 * 2; }

  Index pairs = 0;
  RopePairing pairing = RopePairing::halves;
  std::uint64_t phases[most_pairs] = {};

  Rotation() = default;
  Rotation(Index width, const float* state) {
    if (state == nullptr || !(state[0] >= 1) || !(state[0] <= static_cast<float>(width / 2))) return;
    pairs = static_cast<Index>(state[0]);
    if (state[1] == 1) pairing = RopePairing::interleaved;
    for (Index i = 0; i < pairs; ++i)
      phases[i] = phase(static_cast<double>(state[2 + i]) + static_cast<double>(state[2 + width / 2 + i]));
  }
  static void write_state(Index width, const RopeView& rope, float* state) {
    std::fill_n(state, state_floats(width), 0.0f);
    if (rope.pairs < 1 || rope.pairs > width / 2 || rope.axes != nullptr) return;
    state[0] = static_cast<float>(rope.pairs);
    state[1] = rope.pairing == RopePairing::interleaved ? 1.0f : 0.0f;
    for (Index i = 0; i < rope.pairs; ++i) {
      const double f = rope.inverse_frequencies[i];
      state[2 + i] = static_cast<float>(f);
      state[2 + width / 2 + i] = static_cast<float>(f - static_cast<double>(state[2 + i]));
    }
  }

  Index first_of(Index pair) const { return pairing == RopePairing::halves ? pair : 2 * pair; }
  Index second_of(Index pair) const { return first_of(pair) + (pairing == RopePairing::halves ? pairs : 1); }

  /// Turns a row by its position, or back by it.
  void turn(float* row, Position position) const { turn(row, position, 1); }
  void turn_back(float* row, Position position) const { turn(row, position, -1); }

 private:
  static std::uint64_t phase(double frequency) {
    constexpr double turns_per_radian = 0.15915494309189533577;
    if (!(std::abs(frequency) <= 0x1p64)) return 0;
    double turns = frequency * turns_per_radian;
    turns -= std::floor(turns);
    return turns < 1 ? static_cast<std::uint64_t>(turns * 0x1p64) : 0;  // below 2^64: turns is at most 1 - 2^-53
  }
  /// (-1)^k / (2k + first)!, the series of sine (first 1) and cosine (0): within a quarter turn the rest is below 2^-53.
  template <int first>
  static constexpr std::array<double, 12> series = [] {
    std::array<double, 12> all{};
    double term = 1;
    for (int k = 0; k < 12; ++k) {
      all[static_cast<std::size_t>(k)] = term;
      term /= -static_cast<double>((2 * k + 1 + first) * (2 * k + 2 + first));
    }
    return all;
  }();
  void turn(float* row, Position position, double direction) const {
    double cosines[most_pairs], sines[most_pairs];
    const auto p = static_cast<std::uint64_t>(static_cast<std::int64_t>(position));
    for (Index i = 0; i < pairs; ++i) {
      const double half = static_cast<double>(static_cast<std::int64_t>(p * phases[i])) * (0x1p-64 * std::numbers::pi);
      const double y = half * half;
      double c = series<0>[11], s = series<1>[11];
      for (std::size_t k = 11; k-- > 0;) c = c * y + series<0>[k], s = s * y + series<1>[k];
      s *= half;
      cosines[i] = 1 - 2 * s * s, sines[i] = 2 * s * c * direction;
    }
    for (Index i = 0; i < pairs; ++i) {
      float &first = row[first_of(i)], &second = row[second_of(i)];
      const double x = static_cast<double>(first), y = static_cast<double>(second);
      first = static_cast<float>(x * cosines[i] - y * sines[i]);
      second = static_cast<float>(x * sines[i] + y * cosines[i]);
    }
  }
};

/// Keys before RoPE. Given and given back are rotated keys; what Inner codes is not rotated.
///
/// Value     x' = R(p) y', y' what Inner makes of R(-p) x, p the token's position; angles and turning in double
/// Bytes     Inner's
/// Error     Inner's: a rotation keeps lengths; and 2^-23 of a pair's length for turning there and back
/// Position  facts.positions; without them, and without a rotation, rows are coded as they are
/// State     own: the rotation (see Rotation), from Measured::rope; then Inner's, made of rows turned back. The ranges
///           and squares it sees are those of the turned rows; a query's peak in a pair is the length of both peaks, its
///           squares the pair's mean; layer ranges are the head's own, as other heads' rows are not at hand.
///           Null, no rope or one with axes (M-RoPE: a position of three numbers): no rotation
/// NaN       counts as 0, infinities as ±2^126: before the rotation, which would spread them over a pair
/// Source    Hooper et al. 2024, "KVQuant", arXiv 2401.18079, section 3.2
template <Codec InnerCodec>
struct Unrotated {
 private:
  static constexpr ShortText text = [] { return ShortText("unrotated_") << InnerCodec::name; }();

 public:
  using Inner = InnerCodec;
  static constexpr std::string_view name = text.view();
  static constexpr bool rows_move = Inner::rows_move, host_only = true;
  static constexpr bool reads_facts = true, reads_positions = true, state_reads_rows = true;
  static constexpr bool needs_rope = true, ranges_of_all = kvpare::ranges_of_all<Inner>();
  static constexpr bool needs_query_peak = kvpare::needs_query_peak<Inner>();
  static constexpr bool needs_query_window = kvpare::needs_query_window<Inner>();
  static constexpr bool state_of_layer = kvpare::state_of_layer<Inner>(), needs_state = kvpare::needs_state<Inner>();
  static constexpr bool reads_attention = kvpare::reads_attention<Inner>();

  static constexpr bool fits(TileShape t) {
    return t.width >= 1 && t.width <= detail::max_coded_width && (rows_move || t.tokens <= 64) && Inner::fits(t);
  }
  static constexpr Index tile_bytes(TileShape t) { return Inner::tile_bytes(t); }
  static constexpr Index own_state_floats(Index width) { return Rotation::state_floats(width); }
  static constexpr Index state_floats(Index width) {
    return own_state_floats(width) + kvpare::state_floats<Inner>(width);
  }
  /// Inner's, to which Measured::given goes on as it is: the rotation is made.
  static constexpr Index given_floats(Index width) { return kvpare::given_floats<Inner>(width); }
  static const float* inner_state(Index width, const float* state) {
    return state != nullptr && kvpare::state_floats<Inner>(width) > 0 ? state + own_state_floats(width) : nullptr;
  }

  static void encode(TileShape t, const float* rows, Index first, Index count, const TokenFacts& facts,
                     const float* state, std::byte* tile) {
    constexpr Index at_once = rows_move ? 1 : 64;
    float turned[at_once * detail::max_coded_width];
    const Rotation rotation(t.width, state);
    for (Index r = 0; r < count; r += at_once) {
      const Index n = std::min(at_once, count - r);
      for (Index i = 0; i < n; ++i)
        turn_back(t.width, rotation, rows + (r + i) * t.width, facts.positions != nullptr ? facts.positions[r + i] : 0,
                  turned + i * t.width);
      encode_rows<Inner>(t, turned, first + r, n, facts.from(r), inner_state(t.width, state), tile);
    }
  }
  static void decode(TileShape t, const std::byte* tile, Index slot, Position position, const float* state,
                     float* row) {
    decode_row<Inner>(t, tile, slot, position, inner_state(t.width, state), row);
    Rotation(t.width, state).turn(row, position);
  }

  static void make_state(Index width, const Measured& m,
                         float* state) requires(kvpare::state_floats<Inner>(1) == 0 || MakesState<Inner>) {
    Rotation::write_state(width, m.rope, state);
    if constexpr (MakesState<Inner>) {
      const auto w = static_cast<std::size_t>(width);
      const Rotation rotation(width, state);
      Measured turned = m;
      std::vector<float> rows, low, high, squares, peak, query_squares;
      if (m.rows != nullptr && m.positions != nullptr && rotation.pairs > 0) {
        rows.resize(static_cast<std::size_t>(m.tokens) * w);
        low.assign(w, INFINITY), high.assign(w, -INFINITY), squares.assign(w, 0.0f);
        for (Index r = 0; r < m.tokens; ++r) {
          float* row = rows.data() + r * width;
          turn_back(width, rotation, m.rows + r * width, m.positions[r], row);
          for (std::size_t c = 0; c < w; ++c) {
            low[c] = std::min(low[c], row[c]), high[c] = std::max(high[c], row[c]);
            squares[c] += row[c] * row[c];
          }
        }
        turned.rows = rows.data(), turned.min = low.data(), turned.max = high.data();
        turned.layer_min = low.data(), turned.layer_max = high.data(), turned.sum_squares = squares.data();
      }
      const auto over_pairs = [&](const float*& from, std::vector<float>& to, auto both) {
        if (from == nullptr || rotation.pairs == 0) return;
        to.assign(from, from + width);
        for (Index i = 0; i < rotation.pairs; ++i) {
          const auto a = static_cast<std::size_t>(rotation.first_of(i));
          const auto b = static_cast<std::size_t>(rotation.second_of(i));
          to[a] = to[b] = both(to[a], to[b]);
        }
        from = to.data();
      };
      over_pairs(turned.query_peak, peak, [](float a, float b) { return std::hypot(a, b); });
      over_pairs(turned.query_squares, query_squares, [](float a, float b) { return (a + b) / 2; });
      Inner::make_state(width, turned, state + own_state_floats(width));
    }
  }

  static void turn_back(Index width, const Rotation& rotation, const float* row, Position position, float* to) {
    for (Index c = 0; c < width; ++c) to[c] = detail::as_coded(row[c]);
    rotation.turn_back(to, position);
  }
};

}  // namespace kvpare

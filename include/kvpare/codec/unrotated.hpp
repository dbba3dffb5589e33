// Keys as they were before their rotary embedding: turned back before they are coded, turned again when they are read.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../core/rope.hpp"
#include "../core/text.hpp"
#include "codec.hpp"
#include "packing.hpp"
#include "rounding.hpp"

namespace kvpare {

/// A rotation as floats of a state, [2 + width]: pairs | 1 for interleaved | high halves of the inverse frequencies
/// [width / 2] | low halves [width / 2]. The two halves of a frequency, added as doubles, are within 2^-48 of it: at
/// position 2^20 no angle is off by more than 2^-28.
struct RotationState {
  static constexpr Index floats(Index width) { return 2 + width / 2 * 2; }

  const double* inverse_frequencies = nullptr;
  Index pairs = 0;
  RopePairing pairing = RopePairing::halves;

  /// Null, and whatever cannot be a number of pairs: no rotation. `memory` holds the frequencies, [width / 2].
  static RotationState of(Index width, const float* state, double* memory) {
    RotationState r;
    if (state == nullptr || !(state[0] >= 1) || !(state[0] <= static_cast<float>(width / 2))) return r;
    r.pairs = static_cast<Index>(state[0]);
    r.pairing = state[1] == 1 ? RopePairing::interleaved : RopePairing::halves;
    for (Index i = 0; i < r.pairs; ++i) {
      const double f = static_cast<double>(state[2 + i]) + static_cast<double>(state[2 + width / 2 + i]);
      memory[i] = std::abs(f) <= 0x1p64 ? f : 0.0;  // NaN too
    }
    r.inverse_frequencies = memory;
    return r;
  }
  RopeView view() const { return {inverse_frequencies, nullptr, pairs, pairing}; }

  static void write(Index width, const RopeView& rope, float* state) {
    std::fill_n(state, floats(width), 0.0f);
    if (rope.pairs < 1 || rope.pairs > width / 2 || rope.axes != nullptr) return;
    state[0] = static_cast<float>(rope.pairs);
    state[1] = rope.pairing == RopePairing::interleaved ? 1.0f : 0.0f;
    for (Index i = 0; i < rope.pairs; ++i) {
      const double f = rope.inverse_frequencies[i];
      state[2 + i] = static_cast<float>(f);
      state[2 + width / 2 + i] = static_cast<float>(f - static_cast<double>(state[2 + i]));
    }
  }
};

/// Keys before RoPE. Given and given back are rotated keys; what Inner codes is not rotated.
///
/// Value     x' = R(p) y', y' what Inner makes of R(-p) x, p the token's position; angles in double
/// Bytes     Inner's
/// Error     Inner's: a rotation keeps lengths; and 2^-23 of a pair's length for turning there and back
/// Position  facts.positions; without them, and without a rotation, rows are coded as they are
/// State     own: the rotation (see RotationState), from Measured::rope; then Inner's, made of rows turned back. The ranges
///           and squares it sees are those of the turned rows; a query's peak in a pair is the length of both peaks, its
///           squares the pair's mean; layer ranges are the head's own, as other heads' rows are not at hand.
///           Null, no rope or one with axes (M-RoPE: a position of three numbers): no rotation
/// NaN       counts as 0, infinities as ±2^126: before the rotation, which would spread them over a pair
/// Source    Hooper et al. 2024, "KVQuant", arXiv 2401.18079, section 3.2
template <Codec InnerCodec>
struct Unrotated {
 private:
  static constexpr ShortText text = [] { return ShortText("unrotated_") << InnerCodec::name; }();
  static constexpr Index most_pairs = detail::max_coded_width / 2;

 public:
  using Inner = InnerCodec;
  static constexpr std::string_view name = text.view();
  static constexpr bool rows_move = Inner::rows_move, host_only = true;
  static constexpr bool reads_facts = true, reads_positions = true, state_reads_rows = true;
  static constexpr bool needs_rope = true, ranges_of_all = kvpare::ranges_of_all<Inner>();
  static constexpr bool needs_query_peak = kvpare::needs_query_peak<Inner>();
  static constexpr bool needs_query_window = kvpare::needs_query_window<Inner>();

  static constexpr bool fits(TileShape t) {
    return t.width >= 1 && t.width <= detail::max_coded_width && (rows_move || t.tokens <= 64) && Inner::fits(t);
  }
  static constexpr Index tile_bytes(TileShape t) { return Inner::tile_bytes(t); }
  static constexpr Index own_state_floats(Index width) { return RotationState::floats(width); }
  static constexpr Index state_floats(Index width) {
    return own_state_floats(width) + kvpare::state_floats<Inner>(width);
  }
  static const float* inner_state(Index width, const float* state) {
    return state != nullptr && kvpare::state_floats<Inner>(width) > 0 ? state + own_state_floats(width) : nullptr;
  }

  static void encode(TileShape t, const float* rows, Index first, Index count, const TokenFacts& facts,
                     const float* state, std::byte* tile) {
    constexpr Index at_once = rows_move ? 1 : 64;
    float turned[at_once * detail::max_coded_width];
    double memory[most_pairs];
    const RopeView rope = RotationState::of(t.width, state, memory).view();
    for (Index r = 0; r < count; r += at_once) {
      const Index n = std::min(at_once, count - r);
      for (Index i = 0; i < n; ++i)
        turn_back(t.width, rope, rows + (r + i) * t.width, facts.positions != nullptr ? facts.positions[r + i] : 0,
                  turned + i * t.width);
      encode_rows<Inner>(t, turned, first + r, n, facts.from(r), inner_state(t.width, state), tile);
    }
  }
  static void decode(TileShape t, const std::byte* tile, Index slot, Position position, const float* state, float* row) {
    double memory[most_pairs];
    decode_row<Inner>(t, tile, slot, position, inner_state(t.width, state), row);
    RotationState::of(t.width, state, memory).view().rotate(row, position);
  }

  static void make_state(Index width, const Measured& m, float* state)
      requires(kvpare::state_floats<Inner>(1) == 0 || MakesState<Inner>) {
    RotationState::write(width, m.rope, state);
    if constexpr (MakesState<Inner>) {
      const auto w = static_cast<std::size_t>(width);
      double memory[most_pairs];
      const RopeView rope = RotationState::of(width, state, memory).view();
      Measured turned = m;
      std::vector<float> rows, low, high, squares, peak, query_squares;
      if (m.rows != nullptr && m.positions != nullptr && rope.pairs > 0) {
        rows.resize(static_cast<std::size_t>(m.tokens) * w);
        low.assign(w, INFINITY), high.assign(w, -INFINITY), squares.assign(w, 0.0f);
        for (Index r = 0; r < m.tokens; ++r) {
          float* row = rows.data() + r * width;
          turn_back(width, rope, m.rows + r * width, m.positions[r], row);
          for (std::size_t c = 0; c < w; ++c) {
            low[c] = std::min(low[c], row[c]), high[c] = std::max(high[c], row[c]);
            squares[c] += row[c] * row[c];
          }
        }
        turned.rows = rows.data(), turned.min = low.data(), turned.max = high.data();
        turned.layer_min = low.data(), turned.layer_max = high.data(), turned.sum_squares = squares.data();
      }
      const auto over_pairs = [&](const float*& from, std::vector<float>& to, auto both) {
        if (from == nullptr || rope.pairs == 0) return;
        to.assign(from, from + width);
        for (Index i = 0; i < rope.pairs; ++i) {
          const auto a = static_cast<std::size_t>(rope.first_of(i)), b = static_cast<std::size_t>(rope.second_of(i));
          to[a] = to[b] = both(to[a], to[b]);
        }
        from = to.data();
      };
      over_pairs(turned.query_peak, peak, [](float a, float b) { return std::hypot(a, b); });
      over_pairs(turned.query_squares, query_squares, [](float a, float b) { return (a + b) / 2; });
      Inner::make_state(width, turned, state + own_state_floats(width));
    }
  }

  static void turn_back(Index width, const RopeView& rope, const float* row, Position position, float* to) {
    for (Index c = 0; c < width; ++c) to[c] = detail::as_coded(row[c]);
    rope.unrotate(to, position);
  }
};

}  // namespace kvpare

// Rotary position embedding: what turned a layer's queries and keys, so that they can be turned back.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "config.hpp"
#include "error.hpp"

namespace kvpare {

/// Which two channels turn together, of `n` pairs: i and i + n (Llama as Hugging Face has it, Qwen), or 2i and 2i + 1 (GPT-J,
/// Llama as released).
enum class RopePairing : std::uint8_t { halves, interleaved };

/// Where a token stands for its rotation: one number, or with M-RoPE time, height and width.
struct RotaryPosition {
  Position along[3] = {};
  constexpr KVPARE_HD RotaryPosition(Position p) : along{p, p, p} {}
  constexpr KVPARE_HD RotaryPosition(Position time, Position height, Position width) : along{time, height, width} {}
};

/// A Rope as functors take it: pointers into memory that whoever uses it can follow, on the host or on a backend.
struct RopeView {
  const double* inverse_frequencies = nullptr;  // [pairs]
  const std::uint8_t* axes = nullptr;           // [pairs], or null: all turn by the first number
  Index pairs = 0;
  RopePairing pairing = RopePairing::halves;

  constexpr KVPARE_HD Index rotary_dim() const { return 2 * pairs; }
  constexpr KVPARE_HD Index first_of(Index pair) const { return pairing == RopePairing::halves ? pair : 2 * pair; }
  constexpr KVPARE_HD Index second_of(Index pair) const { return first_of(pair) + partner_distance(); }
  /// The pair of a channel below rotary_dim, and is it the second of the two?
  constexpr KVPARE_HD Index pair_of(Index channel) const {
    return pairing == RopePairing::halves ? channel % pairs : channel / 2;
  }
  constexpr KVPARE_HD bool is_second(Index channel) const { return channel != first_of(pair_of(channel)); }

  KVPARE_HD double angle(Index pair, RotaryPosition at) const {
    return static_cast<double>(at.along[axes == nullptr ? 0 : axes[pair]]) * inverse_frequencies[pair];
  }

  /// Turns one row in place.
  template <class T>
  KVPARE_HD void rotate(T* row, RotaryPosition at) const {
    turn(row, at, 1);
  }
  /// Turns a row back that was turned for this position.
  template <class T>
  KVPARE_HD void unrotate(T* row, RotaryPosition at) const {
    turn(row, at, -1);
  }

  /// One channel of what rotate would make of a row.
  template <class T>
  KVPARE_HD double rotated_channel(const T* row, Index channel, RotaryPosition at) const {
    if (channel >= rotary_dim()) return static_cast<double>(row[channel]);
    const Index pair = pair_of(channel);
    const double x = static_cast<double>(row[first_of(pair)]), y = static_cast<double>(row[second_of(pair)]);
    const double a = angle(pair, at);
    return is_second(channel) ? x * std::sin(a) + y * std::cos(a) : x * std::cos(a) - y * std::sin(a);
  }

 private:
  constexpr KVPARE_HD Index partner_distance() const { return pairing == RopePairing::halves ? pairs : 1; }

  template <class T>
  KVPARE_HD void turn(T* row, RotaryPosition at, double direction) const {
    static_assert(std::is_floating_point_v<T>);
    for (Index pair = 0; pair < pairs; ++pair) {
      const double a = angle(pair, at), cosine = std::cos(a), sine = direction * std::sin(a);
      T &first = row[first_of(pair)], &second = row[second_of(pair)];
      const double x = static_cast<double>(first), y = static_cast<double>(second);
      first = static_cast<T>(x * cosine - y * sine);
      second = static_cast<T>(x * sine + y * cosine);
    }
  }
};
static_assert(std::is_trivially_copyable_v<RopeView>);

/// The rotation of a layer's queries and keys.
///
/// Formula  pair i at position p turns by a = p * inverse_frequencies[i]:  (x, y) -> (x cos a - y sin a, x sin a + y cos a).
///          Channels from 2 * pairs on do not turn (partial rotary)
/// M-RoPE   axes[i] says which of a token's three numbers turns pair i (time 0, height 1, width 2); empty = plain, all by the
///          first. A cache knows one number per token, its logical position, so that what it does with a Rope of its own
///          accord is refused where there are axes. No part of a snapshot: attention does not ask for it
/// Angles   in double. An engine that rounds them to float is off by up to p * 2^-24 of a radian in its fastest pair
/// Factors  that an engine puts on cosine and sine (YaRN) cancel wherever rows are turned back and forth, so none is here
/// Source   RoFormer (Su et al. 2021, arXiv 2104.09864), section 3.2; M-RoPE: Qwen2-VL (arXiv 2409.12191)
struct Rope {
  std::vector<double> inverse_frequencies =
      {};  // one per pair; a scaled RoPE (NTK, YaRN, Llama 3) is other numbers here
  RopePairing pairing = RopePairing::halves;
  std::vector<std::uint8_t> axes = {};

  Index pairs() const { return static_cast<Index>(inverse_frequencies.size()); }
  RopeView view() const { return {inverse_frequencies.data(), axes.empty() ? nullptr : axes.data(), pairs(), pairing}; }
  friend bool operator==(const Rope&, const Rope&) = default;
};

/// The usual rotation of `rotary_dim` channels: inverse frequency i is base^(-2 i / rotary_dim).
inline Rope rope_of_base(Index rotary_dim, double base = 10000, RopePairing pairing = RopePairing::halves) {
  require(rotary_dim >= 2 && rotary_dim % 2 == 0 && rotary_dim <= 4096, "rope: rotary_dim = ", rotary_dim,
          ", must be even and within [2, 4096]");
  require(base > 1 && base <= std::numeric_limits<double>::max(), "rope: base = ", base,
          ", must be finite and above 1 (usually 10000 or more)");
  Rope rope{.pairing = pairing};
  for (Index i = 0; i < rotary_dim / 2; ++i)
    rope.inverse_frequencies.push_back(std::pow(base, -2 * static_cast<double>(i) / static_cast<double>(rotary_dim)));
  return rope;
}

/// Axes of pairs in sections, as Qwen2-VL has them ({16, 24, 24} of 64 pairs): so many by time, height, width.
inline std::vector<std::uint8_t> axes_of_sections(Index time, Index height, Index width) {
  std::vector<std::uint8_t> axes;
  for (const auto& [axis, count] : {std::pair{0, time}, std::pair{1, height}, std::pair{2, width}}) {
    require(count >= 0 && count <= 2048, "rope: section ", axis, " has ", count, " pairs, must be within [0, 2048]");
    axes.insert(axes.end(), static_cast<std::size_t>(count), static_cast<std::uint8_t>(axis));
  }
  return axes;
}

/// Throws unless a rope goes with keys of this width; `layer` only names it in the message.
inline void check(const Rope& rope, Index key_dim, Index layer) {
  require(rope.pairs() >= 1 && 2 * rope.pairs() <= key_dim, "layer ", layer, ": rope turns ", rope.pairs(),
          " pairs of channels, must be within [1, ", key_dim / 2, "] for key_dim = ", key_dim);
  for (Index i = 0; i < rope.pairs(); ++i) {
    const double f = rope.inverse_frequencies[static_cast<std::size_t>(i)];
    require(f >= 0 && f <= std::numeric_limits<double>::max(), "layer ", layer, ": rope: inverse frequency ", i, " = ",
            f, ", must be finite and not negative");
  }
  require(rope.axes.empty() || static_cast<Index>(rope.axes.size()) == rope.pairs(), "layer ", layer,
          ": rope has axes for ", rope.axes.size(), " pairs, must be none or one per pair (", rope.pairs(), ")");
  for (std::size_t i = 0; i < rope.axes.size(); ++i)
    require(rope.axes[i] < 3, "layer ", layer, ": rope: axis ", i, " = ", static_cast<int>(rope.axes[i]),
            ", must be 0 (time), 1 (height) or 2 (width)");
}

}  // namespace kvpare

// Two codecs side by side: the first channels of a head by one, the others by another.
#pragma once

#include "folded.hpp"

namespace kvpare {

/// The first `percent` of the channels, rounded down; one more where the rest would be odd.
template <int percent>
struct FirstPercent {
  static_assert(percent >= 0 && percent <= 100, "percent of the channels");
  static constexpr void name(ShortText& to) { to << Index{percent}; }
  static constexpr KVPARE_HD Index first(Index width) {
    const Index n = width * percent / 100;
    return (width - n) % 2 == 0 ? n : n + 1;
  }
};

/// The first Cut::first(width) channels by A, the others by B.
///
/// Layout  rows that do not move: the tile of A | the tile of B. Rows that move: row by row, A's | B's.
/// Bytes   tile_bytes({T, W}) = A's of {T, n} + B's of {T, W - n}, n = Cut::first(W); no padding between
/// Fits    0 < n < W, and both parts fit
/// Error, NaN  those of A and of B
/// State   A's, then B's
///
/// | expression                  | gives                                    |
/// |-----------------------------|------------------------------------------|
/// | `Cut::first(width)`         | channels of A                            |
/// | `Cut::name(ShortText&)`     | adds what the cut is called              |
template <Codec A, Codec B, class Cut>
struct Split {
  static_assert(A::rows_move == B::rows_move, "rows of both parts move, or of neither");
  static_assert(!reads_facts<A>() && !reads_facts<B>(), "parts know rows, and nothing else of a token");
  static_assert(!needs_state<A>() && !needs_state<B>(), "a part that is nothing without a state of its own would be nothing");
  using First = A;
  using Second = B;

 private:
  static constexpr ShortText text = [] {
    ShortText t("split");
    Cut::name(t);
    return t << "_" << A::name << "_" << B::name;
  }();

 public:
  static constexpr std::string_view name = text.view();
  static constexpr bool rows_move = A::rows_move;
  static constexpr bool host_only = !rows_move || kvpare::host_only<A>() || kvpare::host_only<B>();
  static constexpr KVPARE_HD Index first_width(Index width) { return Cut::first(width); }
  static constexpr KVPARE_HD TileShape first(TileShape t) { return {t.tokens, first_width(t.width)}; }
  static constexpr KVPARE_HD TileShape second(TileShape t) { return {t.tokens, t.width - first_width(t.width)}; }
  static constexpr KVPARE_HD bool fits(TileShape t) {
    if (t.width < 2 || t.width > detail::max_coded_width || t.tokens < 1) return false;
    if (!rows_move && t.tokens > 64) return false;
    const Index n = first_width(t.width);
    return n > 0 && n < t.width && A::fits(first(t)) && B::fits(second(t));
  }
  static constexpr KVPARE_HD Index tile_bytes(TileShape t) {
    return A::tile_bytes(first(t)) + B::tile_bytes(second(t));
  }

  static constexpr KVPARE_HD Index state_floats(Index width) {
    return kvpare::state_floats<A>(first_width(width)) + kvpare::state_floats<B>(width - first_width(width));
  }
  static constexpr KVPARE_HD const float* first_state(Index width, const float* state) {
    return kvpare::state_floats<A>(first_width(width)) > 0 ? state : nullptr;
  }
  static constexpr KVPARE_HD const float* second_state(Index width, const float* state) {
    if (state == nullptr || kvpare::state_floats<B>(width - first_width(width)) == 0) return nullptr;
    return state + kvpare::state_floats<A>(first_width(width));
  }

  static KVPARE_HD void encode(TileShape t, const float* rows, Index first_slot, Index count, const float* state,
                               std::byte* tile) requires(rows_move) {
    const TileShape a{1, first_width(t.width)}, b{1, t.width - a.width};
    std::byte* row = tile + first_slot * row_bytes(t.width);
    for (Index r = 0; r < count; ++r, rows += t.width, row += row_bytes(t.width)) {
      A::encode(a, rows, 0, 1, first_state(t.width, state), row);
      B::encode(b, rows + a.width, 0, 1, second_state(t.width, state), row + A::tile_bytes(a));
    }
  }
  /// Either part wants its rows one after the other: up to 64 of them on the stack, 256 KiB at the widest.
  static void encode(TileShape t, const float* rows, Index first_slot, Index count, const float* state,
                     std::byte* tile) requires(!rows_move) {
    float part[64 * detail::max_coded_width];
    part[0] = 0;  // or g++ 12 takes it for uninitialised: it does not see that there are rows
    const Index n = first_width(t.width);
    gather(rows, t.width, 0, n, count, part);
    A::encode(first(t), part, first_slot, count, first_state(t.width, state), tile);
    gather(rows, t.width, n, t.width - n, count, part);
    B::encode(second(t), part, first_slot, count, second_state(t.width, state), tile + A::tile_bytes(first(t)));
  }
  static KVPARE_HD void decode(TileShape t, const std::byte* tile, Index slot, const float* state, float* row) {
    const Index n = first_width(t.width);
    if constexpr (rows_move) {
      const TileShape a{1, n}, b{1, t.width - n};
      const std::byte* at = tile + slot * row_bytes(t.width);
      A::decode(a, at, 0, first_state(t.width, state), row);
      B::decode(b, at + A::tile_bytes(a), 0, second_state(t.width, state), row + n);
    } else {
      A::decode(first(t), tile, slot, first_state(t.width, state), row);
      B::decode(second(t), tile + A::tile_bytes(first(t)), slot, second_state(t.width, state), row + n);
    }
  }

  /// Channels [from, from + n) of `count` rows, one row after the other.
  static KVPARE_HD void gather(const float* rows, Index width, Index from, Index n, Index count, float* to) {
    for (Index r = 0; r < count; ++r)
      for (Index c = 0; c < n; ++c) to[r * n + c] = rows[r * width + from + c];
  }

 private:
  static constexpr KVPARE_HD Index row_bytes(Index width) { return tile_bytes({1, width}); }
};

/// Two codecs side by side, which a backend may run side by side as well.
template <class C>
concept SplitCodec = Codec<C> && Codec<typename C::First> && Codec<typename C::Second> && requires(Index width) {
  { C::first_width(width) } -> std::same_as<Index>;
};

static_assert(SplitCodec<Split<Int4, Int2, FirstPercent<50>>>);

}  // namespace kvpare

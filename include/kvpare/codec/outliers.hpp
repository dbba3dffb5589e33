// A few numbers of every token beside its codes: those that would stretch the range of all others.
#pragma once

#include <cmath>
#include <vector>

#include "../core/text.hpp"
#include "codec.hpp"
#include "packing.hpp"
#include "rounding.hpp"

namespace kvpare {

/// A codec that says itself which numbers lie outside: `pick(width, state, row, per_side, channels)` writes at most
/// 2 * per_side different channels and gives their count. It codes the row as it is, what it picked included.
template <class C>
concept PicksOutliers = Codec<C> &&
    requires(Index width, const float* state, const float* row, std::uint16_t* channels) {
  { C::pick(width, state, row, width, channels) } -> std::same_as<Index>;
};

/// A codec with a list of numbers beside it: `per_side` at either end of a token's numbers.
///
/// Value     x' = Inner's, plus the delta of each listed channel
/// Picked    what Inner picks; else the per_side lowest and highest of the token (of equal numbers the lower channels are
///           low, the higher ones high). Inner does not see those: in their place it codes the nearest number that is left
/// Layout    per row:  Inner's row | deltas [2 per_side], halves | channels [2 per_side], bytes; 16 bits for width > 256
/// Bytes     tile_bytes({T, W}) = Inner's + T * 2 per_side * 3 (4 for W > 256)
/// Unused    slots have delta 0 and channel 0. A channel beyond the width, which is never written, counts for nothing
/// Error     of what is listed: 2^-11 of its delta (2^-25 where that is subnormal), beyond ±65504 what is left over
/// NaN       counts as 0, infinities as ±2^126
/// State     Inner's. Where that is made of rows, those show NaN in place of what is picked here
/// Source    Hooper et al. 2024, "KVQuant", arXiv 2401.18079, section 3.4 ("dense-and-sparse"): 16-bit values and indices there
template <Codec InnerCodec, Index per_side>
struct Outliers {
  static_assert(per_side >= 1 && per_side <= 32, "1 to 32 numbers per side");
  static_assert(!reads_facts<InnerCodec>() && !reads_positions<InnerCodec>(), "a rotation goes around the list");
  static_assert(InnerCodec::rows_move, "a token's list goes where its codes go");
  static_assert(!needs_state<InnerCodec>(), "what is nothing without a state of its own cannot stand beside a list");
  static_assert(!FoldedCodec<InnerCodec>, "transforms go around the list: deltas are told in the space of the codes");

 private:
  static constexpr ShortText text = [] { return ShortText("outliers") << per_side << "_" << InnerCodec::name; }();
  static constexpr bool inner_picks = PicksOutliers<InnerCodec>;

 public:
  using Inner = InnerCodec;
  static constexpr std::string_view name = text.view();
  static constexpr bool rows_move = true;
  static constexpr bool host_only = kvpare::host_only<InnerCodec>();
  static constexpr Index slots = 2 * per_side;

  static constexpr KVPARE_HD Index channel_bytes(Index width) { return width <= 256 ? 1 : 2; }
  static constexpr KVPARE_HD Index list_bytes(Index width) { return slots * (2 + channel_bytes(width)); }
  static constexpr KVPARE_HD bool fits(TileShape t) {
    return slots < t.width && t.width <= detail::max_coded_width && Inner::fits({1, t.width}) && Inner::fits(t);
  }
  static constexpr KVPARE_HD Index row_bytes(Index width) { return Inner::tile_bytes({1, width}) + list_bytes(width); }
  static constexpr KVPARE_HD Index tile_bytes(TileShape t) { return t.tokens * row_bytes(t.width); }
  static constexpr KVPARE_HD Index state_floats(Index width) { return kvpare::state_floats<Inner>(width); }

  static KVPARE_HD void encode(TileShape t, const float* rows, Index first, Index count, const float* state,
                               std::byte* tile) {
    float seen[detail::max_coded_width], decoded[detail::max_coded_width];
    std::uint16_t channels[slots] = {};
    const Index inner = Inner::tile_bytes({1, t.width});
    for (Index r = 0; r < count; ++r, rows += t.width) {
      std::byte* bytes = tile + (first + r) * row_bytes(t.width);
      const Index listed = split(t.width, state, rows, seen, channels);
      Inner::encode({1, t.width}, seen, 0, 1, state, bytes);
      Inner::decode({1, t.width}, bytes, 0, state, decoded);
      for (Index k = 0; k < slots; ++k) {
        const Index c = k < listed ? channels[k] : 0;
        const std::uint16_t delta = k < listed ? delta_of(rows[c], decoded[c]) : std::uint16_t{0};
        detail::put_bytes(bytes + inner + 2 * k, delta, 2);
        detail::put_bytes(bytes + inner + 2 * slots + k * channel_bytes(t.width), static_cast<std::uint32_t>(c),
                          channel_bytes(t.width));
      }
    }
  }
  static KVPARE_HD void decode(TileShape t, const std::byte* tile, Index slot, const float* state, float* row) {
    const std::byte* bytes = tile + slot * row_bytes(t.width);
    const std::byte* list = bytes + Inner::tile_bytes({1, t.width});
    Inner::decode({1, t.width}, bytes, 0, state, row);
    for (Index k = 0; k < slots; ++k) {
      const auto c =
          static_cast<Index>(detail::get_bytes(list + 2 * slots + k * channel_bytes(t.width), channel_bytes(t.width)));
      if (c < t.width) row[c] += detail::half_to_float(static_cast<std::uint16_t>(detail::get_bytes(list + 2 * k, 2)));
    }
  }

  /// What Inner codes of a row, NaN and infinities gone, and the channels that are listed: their count.
  static KVPARE_HD Index split(Index width, const float* state, const float* row, float* seen,
                               std::uint16_t* channels) {
    for (Index c = 0; c < width; ++c) seen[c] = detail::as_coded(row[c]);
    if constexpr (inner_picks) {
      return Inner::pick(width, state, seen, per_side, channels);
    } else {
      float low = 0, high = 0;
      pick_ends(width, seen, channels, low, high);
      for (Index k = 0; k < per_side; ++k) seen[channels[k]] = low, seen[channels[per_side + k]] = high;
      return slots;
    }
  }
  static KVPARE_HD std::uint16_t delta_of(float x, float decoded) {
    return detail::saturated_half(detail::as_coded(detail::as_coded(x) - decoded));
  }

  /// Inner's, of rows without what is listed.
  static void make_state(Index width, const Measured& measured, float* state) requires(MakesState<Inner>) {
    if (inner_picks || measured.rows == nullptr) return Inner::make_state(width, measured, state);
    const auto w = static_cast<std::size_t>(width);
    std::vector<float> rows(measured.rows, measured.rows + measured.tokens * width), low(w, INFINITY),
        high(w, -INFINITY), seen(w);
    std::uint16_t channels[slots];
    for (Index r = 0; r < measured.tokens; ++r) {
      float* row = rows.data() + r * width;
      const Index listed = split(width, nullptr, row, seen.data(), channels);
      for (Index k = 0; k < listed; ++k) row[channels[k]] = NAN;
      for (std::size_t c = 0; c < w; ++c)
        low[c] = row[c] < low[c] ? row[c] : low[c], high[c] = row[c] > high[c] ? row[c] : high[c];
    }
    Measured without = measured;
    without.rows = rows.data(), without.min = low.data(), without.max = high.data();
    Inner::make_state(width, without, state);
  }
  static constexpr bool state_reads_rows = MakesState<Inner>, ranges_of_all = kvpare::ranges_of_all<Inner>();
  static constexpr bool needs_query_peak = kvpare::needs_query_peak<Inner>();
  static constexpr bool needs_query_window = kvpare::needs_query_window<Inner>();

 private:
  /// The first and last per_side numbers, by size and then by channel, and what is left next to them.
  static KVPARE_HD void pick_ends(Index width, const float* x, std::uint16_t* channels, float& low, float& high) {
    std::uint16_t lows[per_side + 1] = {}, highs[per_side + 1] = {};
    for (Index c = 0; c < width; ++c) {
      const Index have = c < per_side + 1 ? c : per_side + 1;
      Index at = have;
      while (at > 0 && x[c] < x[lows[at - 1]]) --at;
      insert(lows, have, at, c);
      at = have;
      while (at > 0 && x[c] >= x[highs[at - 1]]) --at;
      insert(highs, have, at, c);
    }
    for (Index k = 0; k < per_side; ++k) channels[k] = lows[k], channels[per_side + k] = highs[k];
    low = x[lows[per_side]], high = x[highs[per_side]];
  }
  static KVPARE_HD void insert(std::uint16_t* list, Index have, Index at, Index channel) {
    for (Index k = have < per_side ? have : per_side; k > at; --k) list[k] = list[k - 1];
    if (at <= per_side) list[at] = static_cast<std::uint16_t>(channel);
  }
};

}  // namespace kvpare

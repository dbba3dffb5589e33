// The formats of a cache as a table, so that the cache itself is compiled once, whatever it lists.
#pragma once

#include <algorithm>
#include <array>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "../codec/raw.hpp"
#include "../codec/round_trip.hpp"
#include "../policy/observation.hpp"

namespace kvpare {

namespace detail {

/// One head per call. Pointers of `first` are those of head 0.
template <class C>
struct MakeState {
  Measured first;
  const Index* row_starts;  // [heads + 1] in `first.rows`
  Index width, stride;      // stride: floats of a head's block
  float* state;             // of head 0
  KVPARE_HD void operator()(Index head) const {
    Measured m = first;
    const auto move = [&](const float*& p) {
      if (p != nullptr) p += head * width;
    };
    move(m.min), move(m.max), move(m.sum_squares), move(m.query_peak), move(m.query_squares);
    const Index start = row_starts[head];
    m.tokens = row_starts[head + 1] - start;
    if (m.rows != nullptr) m.rows += start * width, m.positions += start;
    C::make_state(width, m, state + head * stride);
  }
};

}  // namespace detail

/// A codec on one side: what codec/codec.hpp asks of it, as values.
template <Backend B>
struct SideFormat {
  std::string_view name;
  bool raw = false, rows_move = true;
  DType type = DType::f32;  // of raw rows
  bool reads_attention = false;
  bool needs_query_peak = false, needs_query_window = false, needs_rope = false, needs_state = false;
  bool makes_state = false, ranges_of_all = false, state_reads_rows = false, state_of_layer = false;
  bool (*fits)(TileShape shape) = nullptr;
  Index (*tile_bytes)(TileShape shape) = nullptr;
  Index (*row_bytes)(Index width) = nullptr;             // of raw rows, else null
  const void* (*codec)(B& be, TileShape shape) = nullptr;  // the backend's handle; null where rows are raw
  Index (*state_floats)(Index width) = nullptr;
  Index (*given_floats)(Index width) = nullptr;  // the caller's part of a state whose rest is made
  void (*make_state)(B& be, Index states, const Measured& first, const Index* row_starts, Index width, Index stride,
                     float* state) = nullptr;  // null where the codec makes none, or none here
  std::vector<float> (*round_trip)(const std::vector<float>& rows, Index width, Index page_tokens,
                                   const RoundTripFacts& facts) = nullptr;
};

/// A page format of a cache.
template <Backend B>
struct PageFormat {
  SideFormat<B> keys, values;
  const void* (*pair)(B& be, TileShape keys, TileShape values) = nullptr;

  const SideFormat<B>& of(Side side) const { return side == Side::keys ? keys : values; }
  bool reads_attention() const { return keys.reads_attention || values.reads_attention; }
  /// As Pair.
  bool fits(Index tokens, Index key_dim, Index value_dim) const {
    return keys.fits({tokens, key_dim}) && values.fits({tokens, value_dim});
  }
  Index page_bytes(Index tokens, Index key_dim, Index value_dim) const {
    return round_up(keys.tile_bytes({tokens, key_dim}), 64) + round_up(values.tile_bytes({tokens, value_dim}), 64);
  }
};

namespace detail {

template <Backend B, Codec C, Side side>
constexpr SideFormat<B> side_format() {
  SideFormat<B> of;
  of.name = C::name, of.raw = is_raw<C>, of.rows_move = C::rows_move;
  of.reads_attention = kvpare::reads_attention<C>();
  of.needs_query_peak = kvpare::needs_query_peak<C>(), of.needs_query_window = kvpare::needs_query_window<C>();
  of.needs_rope = kvpare::needs_rope<C>(), of.needs_state = kvpare::needs_state<C>();
  of.makes_state = MakesState<C>, of.ranges_of_all = kvpare::ranges_of_all<C>();
  of.state_reads_rows = kvpare::state_reads_rows<C>(), of.state_of_layer = kvpare::state_of_layer<C>();
  of.fits = [](TileShape shape) { return C::fits(shape); };
  of.tile_bytes = [](TileShape shape) { return C::tile_bytes(shape); };
  of.state_floats = [](Index width) { return kvpare::state_floats<C>(width); };
  of.given_floats = [](Index width) { return kvpare::given_floats<C>(width); };
  static_assert(kvpare::given_floats<C>(64) == 0 || kvpare::state_of_layer<C>(),
                "a state that is given in part is one for all heads of a layer: state_of_layer");
  if constexpr (is_raw<C>) {
    of.type = C::dtype;
    of.row_bytes = [](Index width) { return C::row_bytes(width); };
  } else {
    of.codec = [](B& be, TileShape shape) -> const void* { return be.template codec<C, side>(shape); };
  }
  if constexpr (MakesState<C> && (is_on_host<B>() || !host_only<C>()))  // a device refuses the others
    of.make_state = [](B& be, Index states, const Measured& first, const Index* row_starts, Index width, Index stride,
                       float* state) { be.each(states, MakeState<C>{first, row_starts, width, stride, state}); };
  of.round_trip = kvpare::round_trip<C>;
  return of;
}

template <Backend B, Codec K, Codec V>
constexpr PageFormat<B> page_format(Pair<K, V>) {
  return {side_format<B, K, Side::keys>(), side_format<B, V, Side::values>(),
          [](B& be, TileShape keys, TileShape values) -> const void* {
            return be.template pair<Pair<K, V>>(keys, values);
          }};
}

template <Backend B, class FormatList>
inline constexpr auto page_formats = [] {
  std::array<PageFormat<B>, FormatList::count> formats;
  FormatList::for_each([&](int format, auto pair) { formats[static_cast<std::size_t>(format)] = page_format<B>(pair); });
  return formats;
}();

/// "half/half, int4_g32/int4_g32".
template <Backend B>
std::string names_of(std::span<const PageFormat<B>> formats) {
  std::string names;
  for (const PageFormat<B>& format : formats) {
    names += names.empty() ? "" : ", ";
    names += format.keys.name;
    names += '/';
    names += format.values.name;
  }
  return names;
}

}  // namespace detail
}  // namespace kvpare

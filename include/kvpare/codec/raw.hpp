// Raw rows: the codec that keeps every bit, and the pairs and lists from which a cache is built.
#pragma once

#include <cstring>
#include <string>
#include <string_view>

#include "../core/dtype.hpp"
#include "codec.hpp"

namespace kvpare {

/// Rows as the engine gives them, one element type, converted once at append (round to nearest even).
///
/// Layout  tile of tokens × width: row t at t * row_bytes(width), channels in order, no padding
/// Bytes   tile_bytes({tokens, width}) = tokens * width * sizeof(T), exact
/// Error   0 when the engine's type is T; else that of the conversion
/// Life    rows are independent: they may be written one by one and moved between pages without a second rounding
template <Element T>
struct Raw {
  static constexpr std::string_view name = name_of(dtype_of<T>());
  static constexpr DType dtype = dtype_of<T>();
  static constexpr bool rows_move = true;
  static constexpr KVPARE_HD Index row_bytes(Index width) { return width * static_cast<Index>(sizeof(T)); }
  static constexpr KVPARE_HD bool fits(TileShape) { return true; }
  static constexpr KVPARE_HD Index tile_bytes(TileShape s) { return s.tokens * row_bytes(s.width); }
  static KVPARE_HD void encode(TileShape s, const float* rows, Index first, Index count, const float*,
                               std::byte* tile) {
    for (Index i = 0; i < count * s.width; ++i) {
      const T x(rows[i]);
      std::memcpy(tile + (first * s.width + i) * Index(sizeof(T)), &x, sizeof(T));
    }
  }
  static KVPARE_HD void decode(TileShape s, const std::byte* tile, Index slot, const float*, float* row) {
    for (Index c = 0; c < s.width; ++c) {
      T x;
      std::memcpy(&x, tile + (slot * s.width + c) * Index(sizeof(T)), sizeof(T));
      row[c] = static_cast<float>(x);
    }
  }
};

/// Rows that lie as the engine gave them, which verbs read without decoding.
template <class C>
inline constexpr bool is_raw = false;
template <Element T>
inline constexpr bool is_raw<Raw<T>> = true;

/// One page format: how a page stores its keys, and how its values; the two choose independently.
template <Codec K, Codec V>
struct Pair {
  using Key = K;
  using Value = V;
  static constexpr KVPARE_HD bool fits(Index tokens, Index key_dim, Index value_dim) {
    return K::fits({tokens, key_dim}) && V::fits({tokens, value_dim});
  }
  /// Keys first, then values, each tile 64-byte aligned.
  static constexpr KVPARE_HD Index key_bytes(Index tokens, Index key_dim) {
    return round_up(K::tile_bytes({tokens, key_dim}), 64);
  }
  static constexpr KVPARE_HD Index page_bytes(Index tokens, Index key_dim, Index value_dim) {
    return key_bytes(tokens, key_dim) + round_up(V::tile_bytes({tokens, value_dim}), 64);
  }
};

/// The closed list of page formats a cache is built for; a page's format is an index into it. The first one is what
/// `append` writes.
template <class... Pairs>
struct Formats {
  static_assert(sizeof...(Pairs) >= 1,
                "a cache needs at least one page format, e.g. Formats<Pair<Raw<half>, Raw<half>>>");
  static constexpr int count = sizeof...(Pairs);

  /// Calls `f(format, Pair{})` for each.
  template <class F>
  static constexpr void for_each(F&& f) {
    int format = 0;
    (f(format++, Pairs{}), ...);
  }
};

namespace detail {

/// "half/half, int4_g32/int4_g32": the formats of a cache.
template <class FormatList>
std::string format_names() {
  std::string names;
  FormatList::for_each([&](int, auto pair) {
    names += names.empty() ? "" : ", ";
    names += decltype(pair)::Key::name;
    names += '/';
    names += decltype(pair)::Value::name;
  });
  return names;
}

}  // namespace detail

}  // namespace kvpare

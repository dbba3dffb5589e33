// Pages that belong to the engine, as it lays them out. Borrowed: nothing here copies or frees.
#pragma once

#include <span>
#include <vector>

#include "../core/error.hpp"
#include "../core/view.hpp"
#include "pages.hpp"

namespace kvpare {

/// What the heads of one layer must have in common because they live in the same pages.
enum class Scope : std::uint8_t {
  same_tokens,  // all heads keep the same tokens
  same_count,   // all heads keep the same number of tokens, each its own
};

/// Keys or values in the order [pages, page_size, kv_heads, width] ("NHD").
template <class T>
constexpr View<T, 4> nhd(T* base, Index pages, Index page_size, Index kv_heads, Index width) {
  return dense(base, pages, page_size, kv_heads, width);
}

/// Keys or values stored as [pages, kv_heads, page_size, width] ("HND"); the logical order stays that of `nhd`.
template <class T>
constexpr View<T, 4> hnd(T* base, Index pages, Index page_size, Index kv_heads, Index width) {
  return {base, {pages, page_size, kv_heads, width}, {kv_heads * page_size * width, width, page_size * width, 1}};
}

/// One layer of one sequence in the engine's own pages.
template <class T>
struct EnginePages {
  View<T, 4> keys, values;                   // logical order [pages, page_size, kv_heads, width]
  std::span<const std::int32_t> pages;       // block table (host memory): logical page -> physical page
  Index tokens = 0;                          // live tokens; the last page may be part-filled
  std::span<const Position> positions = {};  // ascending, one per token; empty: 0, 1, 2, …
  Scope scope = Scope::same_tokens;
  Index frozen = 0;  // leading tokens that other sequences share: they stay, and so do their pages
};
static_assert(std::is_trivially_copyable_v<EnginePages<const half>>);

namespace detail {

inline constexpr Index most_page_tokens = 64;

template <class T>
void check(const EnginePages<T>& kv, Index layer) {
  for (int d = 0; d < 3; ++d)
    require(kv.keys.shape[d] == kv.values.shape[d], "engine layer ", layer, ": keys have shape[", d,
            "] = ", kv.keys.shape[d], ", values ", kv.values.shape[d]);
  require(kv.keys.stride[3] == 1 && kv.values.stride[3] == 1, "engine layer ", layer, ": channel strides are ",
          kv.keys.stride[3], " and ", kv.values.stride[3], ", must be 1");
  const Index page_size = kv.keys.shape[1];
  require(page_size >= 1 && page_size <= most_page_tokens, "engine layer ", layer, ": page_size = ", page_size,
          ", must be within [1, ", most_page_tokens, "]");
  require(0 <= kv.tokens && kv.tokens <= static_cast<Index>(kv.pages.size()) * page_size, "engine layer ", layer, ": ",
          kv.tokens, " tokens, but its ", kv.pages.size(), " pages hold ",
          static_cast<Index>(kv.pages.size()) * page_size);
  require(0 <= kv.frozen && kv.frozen <= kv.tokens, "engine layer ", layer, ": frozen = ", kv.frozen,
          ", must be within [0, tokens = ", kv.tokens, "]");
  require(kv.positions.empty() || static_cast<Index>(kv.positions.size()) == kv.tokens, "engine layer ", layer, ": ",
          kv.positions.size(), " positions, must be none or one per token (", kv.tokens, ")");
  for (std::size_t i = 1; i < kv.positions.size(); ++i)
    require(kv.positions[i - 1] < kv.positions[i], "engine layer ", layer, ": position ", kv.positions[i], " follows ",
            kv.positions[i - 1], ", positions must ascend");
  for (std::size_t i = 0; i * static_cast<std::size_t>(page_size) < static_cast<std::size_t>(kv.tokens); ++i)
    require(0 <= kv.pages[i] && kv.pages[i] < kv.keys.shape[0], "engine layer ", layer, ": block table names page ",
            kv.pages[i], ", must be within [0, ", kv.keys.shape[0], ")");
}

}  // namespace detail

/// An engine's layer seen as our lists: entries shared by all heads, one geometry per head.
struct EngineLists {
  std::vector<Entry> entries;
  std::vector<std::uint16_t> offsets;
  std::vector<PageGeometry> geometry;  // per kv head
  Index page_tokens = 0;

  HeadPages head(Index h) const {
    return {entries, offsets.data(), std::span(geometry).subspan(static_cast<std::size_t>(h), 1), page_tokens};
  }
};

/// Cost: the block table. Throws InvalidArgument when the view contradicts itself. Positions inside one page must
/// span less than 65536.
template <class T>
EngineLists lists_of(const EnginePages<T>& kv, Index layer = 0) {
  using Bare = std::remove_const_t<T>;
  detail::check(kv, layer);
  EngineLists lists;
  lists.page_tokens = kv.keys.shape[1];
  const Index page = lists.page_tokens, size = static_cast<Index>(sizeof(T));
  for (Index h = 0; h < kv.keys.shape[2]; ++h) {
    PageGeometry g;
    g.keys = reinterpret_cast<std::byte*>(const_cast<Bare*>(kv.keys.data)) + h * kv.keys.stride[2] * size;
    g.values = reinterpret_cast<std::byte*>(const_cast<Bare*>(kv.values.data)) + h * kv.values.stride[2] * size;
    g.key_page_bytes = kv.keys.stride[0] * size, g.value_page_bytes = kv.values.stride[0] * size;
    g.key_row_bytes = kv.keys.stride[1] * size, g.value_row_bytes = kv.values.stride[1] * size;
    g.key_type = g.value_type = dtype_of<Bare>();
    lists.geometry.push_back(g);
  }
  for (Index begin = 0, i = 0; begin < kv.tokens; begin += page, ++i) {
    Entry e;
    e.page = static_cast<PageId>(kv.pages[static_cast<std::size_t>(i)]);
    e.used = static_cast<std::uint16_t>(std::min(page, kv.tokens - begin));
    e.live = low_bits(e.used);
    const auto at = [&](Index t) {
      return kv.positions.empty() ? static_cast<Position>(t) : kv.positions[static_cast<std::size_t>(t)];
    };
    e.first = at(begin), e.last = at(begin + e.used - 1);
    if (e.last - e.first != e.used - 1) {
      require(e.last - e.first < 65536, "engine layer ", layer, ": page ", i, " spans positions ", e.first, " to ",
              e.last, ", must span less than 65536");
      e.offsets = static_cast<std::uint32_t>(static_cast<Index>(lists.offsets.size()) / page) + 1;
      for (Index t = 0; t < page; ++t)
        lists.offsets.push_back(static_cast<std::uint16_t>(t < e.used ? at(begin + t) - e.first : 0));
    }
    lists.entries.push_back(e);
  }
  return lists;
}

}  // namespace kvpare

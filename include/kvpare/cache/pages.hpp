// Pages, entries and lists: how one head of one layer finds its tokens. Bookkeeping on the host; K and V are only
// addressed here, never read.
//
//   list of a head:  [entry][entry][entry]…            one entry per page, in ascending order of position
//   slot             entry * page_tokens + offset      what scores, masks and running state are indexed by
//   live mask        bit `offset` of the entry's word  cleared = evicted; the payload stays untouched
#pragma once

#include <bit>
#include <span>

#include "../core/config.hpp"
#include "../core/dtype.hpp"

namespace kvpare {

/// One page as one sequence sees it. The page may be shared with other sequences; the entry never is.
struct Entry {
  PageId page = 0;           // as its owner numbers it: a pool page or an engine's block
  std::uint16_t format = 0;  // index into the cache's list of formats
  std::uint16_t used = 0;    // slots written, counted from 0
  std::uint64_t live = 0;    // bit s: slot s holds a token that was not evicted
  Position first = 0;        // position of slot 0
  Position last = 0;         // position of slot used - 1; positions ascend with the slot
  std::uint32_t offsets = 0;  // 0: positions are first, first + 1, …; else 1 + the block of 16-bit offsets from `first`
  std::uint32_t reserved = 0;
  friend bool operator==(const Entry&, const Entry&) = default;
};
static_assert(sizeof(Entry) == 32 && std::is_trivially_copyable_v<Entry>);

/// The low `n` bits, n within [0, 64].
constexpr KVPARE_HD std::uint64_t low_bits(Index n) {
  return n >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << n) - 1;
}

/// Where the rows of one head lie, for one format: row t of page p is at keys + p * key_page_bytes + t * key_row_bytes.
/// Serves pool pages, an engine's pages and plain dense arrays alike. Backend memory: only verbs may follow it.
struct PageGeometry {
  std::byte* keys = nullptr;
  std::byte* values = nullptr;
  Index key_page_bytes = 0, value_page_bytes = 0;
  Index key_row_bytes = 0, value_row_bytes = 0;
  DType key_type = DType::f32, value_type = DType::f32;
  bool rows_move = true;  // rows may be copied to another page of the same format

  KVPARE_HD std::byte* key_row(PageId page, Index slot) const {
    return keys + static_cast<Index>(page) * key_page_bytes + slot * key_row_bytes;
  }
  KVPARE_HD std::byte* value_row(PageId page, Index slot) const {
    return values + static_cast<Index>(page) * value_page_bytes + slot * value_row_bytes;
  }
};

/// The list of one head: what every verb that reads keys or values takes.
struct HeadPages {
  std::span<const Entry> entries;
  const std::uint16_t* offsets = nullptr;  // blocks of page_tokens offsets, see Entry::offsets
  std::span<const PageGeometry> formats;   // by Entry::format
  Index page_tokens = 64;

  Index slots() const { return static_cast<Index>(entries.size()) * page_tokens; }
  Index live_tokens() const {
    Index n = 0;
    for (const Entry& e : entries) n += std::popcount(e.live);
    return n;
  }
  Position position(const Entry& e, Index slot) const {
    return e.offsets == 0 ? e.first + static_cast<Position>(slot)
                          : e.first + static_cast<Position>(offsets[(e.offsets - 1) * page_tokens + slot]);
  }
};

/// Calls `f(bit)` for every set bit, ascending.
template <class F>
constexpr void for_each_bit(std::uint64_t word, F&& f) {
  for (; word != 0; word &= word - 1) f(static_cast<Index>(std::countr_zero(word)));
}

}  // namespace kvpare

// Pages, entries and lists: how one head of one layer finds its tokens. Bookkeeping on the host; K and V are only
// addressed here, never read.
//
//   list of a head:  [entry][entry][entry]…            one entry per page; those of the form that is appended in
//                                                      ascending order of position, others may interleave in position
//   slot             entry * page_tokens + offset      what scores, masks and running state are indexed by
//   live mask        bit `offset` of the entry's word  cleared = evicted; the payload stays untouched
#pragma once

#include <atomic>
#include <bit>
#include <memory>
#include <span>
#include <vector>

#include "../core/bits.hpp"
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
  std::uint32_t state = 0;    // 0: none; else 1 + the index of the codec state its tiles were coded with
  friend bool operator==(const Entry&, const Entry&) = default;
};
static_assert(sizeof(Entry) == 32 && std::is_trivially_copyable_v<Entry>);

/// The low `n` bits, n within [0, 64].
constexpr KVPARE_HD std::uint64_t low_bits(Index n) {
  return n >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << n) - 1;
}

/// One more token in an entry that has room, at a position beyond its last and less than 65536 beyond its first. `offsets`
/// gets a block when positions stop being consecutive; blocks stand in the order in which they were needed.
inline void put_token(Entry& e, Position p, Index page_tokens, std::vector<std::uint16_t>& offsets) {
  const auto block = [&] { return offsets.begin() + static_cast<std::ptrdiff_t>((e.offsets - 1) * page_tokens); };
  if (e.offsets == 0 && p != e.first + static_cast<Position>(e.used)) {
    offsets.resize(offsets.size() + static_cast<std::size_t>(page_tokens), 0);
    e.offsets = static_cast<std::uint32_t>(static_cast<Index>(offsets.size()) / page_tokens);
    for (Index t = 0; t < e.used; ++t) block()[t] = static_cast<std::uint16_t>(t);
  }
  if (e.offsets != 0) block()[e.used] = static_cast<std::uint16_t>(p - e.first);
  e.live |= std::uint64_t{1} << e.used;
  e.last = p;
  ++e.used;
}

/// Where the rows of one head lie, for one format: row t of page p is at keys + p * key_page_bytes + t * key_row_bytes.
/// Serves pool pages, an engine's pages and plain dense arrays alike. Backend memory: only verbs may follow it.
///
/// A side with a codec has no rows of its own: its tile is at key_row(page, 0), its row_bytes are 0, and what the handle
/// means is the backend's business (see `codec` in backend/backend.hpp).
struct PageGeometry {
  std::byte* keys = nullptr;
  std::byte* values = nullptr;
  Index key_page_bytes = 0, value_page_bytes = 0;
  Index key_row_bytes = 0, value_row_bytes = 0;
  DType key_type = DType::f32, value_type = DType::f32;
  bool rows_move = true;  // rows may be copied to another page of the same format
  bool keys_move = true, values_move = true;  // the same of one side
  const void *key_codec = nullptr, *value_codec = nullptr;  // null: rows of key_type, value_type as they are
  const void* pair = nullptr;                               // see `pair` in backend/backend.hpp
  Index key_tile_bytes = 0, value_tile_bytes = 0;           // of pool pages: a tile without the padding behind it

  KVPARE_HD std::byte* key_row(PageId page, Index slot) const {
    return keys + static_cast<Index>(page) * key_page_bytes + slot * key_row_bytes;
  }
  KVPARE_HD std::byte* value_row(PageId page, Index slot) const {
    return values + static_cast<Index>(page) * value_page_bytes + slot * value_row_bytes;
  }
};

/// What the tokens of one head coded with one format have in common, see codec/codec.hpp. Null: the neutral state.
struct CodecState {
  const float *keys = nullptr, *values = nullptr;  // [backend]
};

/// Tells a backend that keeps copies of lists in its own memory whether a copy is still right.
class ListVersion {
 public:
  ListVersion() : id_(std::make_shared<std::uint64_t>(next())), content_(*id_) {}
  ListVersion(const ListVersion&) : ListVersion() {}  // a copy is a list of its own
  ListVersion& operator=(const ListVersion&) {
    changed();
    return *this;
  }
  ListVersion(ListVersion&&) = default;
  ListVersion& operator=(ListVersion&&) = default;

  void changed() { content_ = next(); }
  /// One number per list, for as long as it lives; expired once the list is gone.
  const std::shared_ptr<std::uint64_t>& id() const { return id_; }
  /// Another number after every change; no two lists ever have the same.
  std::uint64_t content() const { return content_; }

 private:
  static std::uint64_t next() {
    static std::atomic<std::uint64_t> count{0};
    return ++count;
  }
  std::shared_ptr<std::uint64_t> id_;
  std::uint64_t content_ = 0;
};

/// The list of one head: what every verb that reads keys or values takes.
struct HeadPages {
  std::span<const Entry> entries;
  const std::uint16_t* offsets = nullptr;  // blocks of page_tokens offsets, see Entry::offsets
  std::span<const PageGeometry> formats;   // by Entry::format
  Index page_tokens = 64;
  std::span<const CodecState> states = {};  // by Entry::state - 1
  const ListVersion* version = nullptr;     // of entries and offsets; null: nobody keeps count

  KVPARE_HD CodecState state_of(const Entry& e) const { return e.state == 0 ? CodecState{} : states[e.state - 1]; }
  /// Do positions ascend from entry to entry? They need not where formats interleave.
  KVPARE_HD bool ascends() const {
    for (std::size_t e = 1; e < entries.size(); ++e)
      if (entries[e].first <= entries[e - 1].last) return false;
    return true;
  }
  KVPARE_HD Index slots() const { return static_cast<Index>(entries.size()) * page_tokens; }
  KVPARE_HD Index live_tokens() const {
    Index n = 0;
    for (const Entry& e : entries) n += count_bits(e.live);
    return n;
  }
  KVPARE_HD Position position(const Entry& e, Index slot) const {
    return e.offsets == 0 ? e.first + static_cast<Position>(slot)
                          : e.first + static_cast<Position>(offsets[(e.offsets - 1) * page_tokens + slot]);
  }
};

/// Calls `f(bit)` for every set bit, ascending.
template <class F>
constexpr void for_each_bit(std::uint64_t word, F&& f) {
  for (; word != 0; word &= word - 1) f(static_cast<Index>(lowest_bit(word)));
}

}  // namespace kvpare

// Pages of several byte sizes from one byte budget: the pool numbers backend memory and never reads or writes it.
//
//   budget   [chunk][chunk][chunk]…[tail]     equal chunks; the tail is too short for one and stays unused
//   chunk    [page][page][page]…[waste]       cut to one page size at a time, uncut while in the common store
//   page id  (byte offset in the budget) / 64, so the address is base + 64 * id without a look-up
//
// Every operation on a page takes constant time: the chunks of a size that have room form a list that ascends by fill,
// and a fill changes by one page at a time, so a chunk never moves further than past those as full as itself.
#pragma once

#include <algorithm>
#include <limits>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "../core/config.hpp"
#include "../core/error.hpp"

namespace kvpare {

/// What a pool holds, everything at one instant. Pages count with their rounded size, see PagePool::page_bytes.
struct PoolStats {
  Index budget_bytes = 0;  // as given: chunks * chunk_bytes + tail_bytes
  Index tail_bytes = 0;    // end of the budget that is no whole chunk; never used
  Index chunk_bytes = 0;
  Index chunks = 0;
  Index chunks_in_use = 0;            // cut to some page size
  Index chunks_reserved = 0;          // in the common store, only for allocations that may use the reserve
  Index pages_in_use = 0;             // a shared page counts once
  Index bytes_in_use = 0;             // of those pages
  Index chunk_bytes_in_use = 0;       // chunks_in_use * chunk_bytes: what other sizes cannot have now
  Index peak_bytes_in_use = 0;        // largest so far
  Index peak_chunk_bytes_in_use = 0;  // largest so far
  Index refusals = 0;                 // calls of allocate that gave false
  Index bookkeeping_bytes = 0;        // host memory of the pool itself; constant
  friend bool operator==(const PoolStats&, const PoolStats&) = default;
};

/// Hands out pages of a few byte sizes from one budget of memory that the caller owns.
///
/// Order    A page comes from the fullest chunk of its size that has room, so that the others empty out; of equally
///          full ones, from the one that came to this fill last. Within a chunk: the page given back last, else the
///          lowest one not used since the chunk was cut. A chunk is cut when no chunk of the size has room: the one
///          that came back to the common store last, else the lowest. A chunk whose last page is given back returns to
///          the store at once. Equal calls in equal order give equal ids.
/// Sharing  A page has a count of references: 1 when allocated, up by `retain`, down by `release`; at 0 it goes back.
/// Reserve  `reserve(format, n)` keeps n chunks of the common store for that format's allocations with Reserve::use,
///          so that pages can change their format in a full pool. See there.
/// Streams  The pool knows nothing of queued work: release a page when nothing queued reads or writes it any more, or
///          when whatever gets it next is ordered behind that work.
/// Cost     O(1) per page, O(formats) when a chunk returns. No host memory is allocated after the constructor, messages
///          of errors aside. Bookkeeping is 24 bytes per chunk, 4 per page of the smallest size that the budget could
///          hold, 4 per fill of each size.
/// Threads  Any function from any thread: one mutex, held for the length of a call.
/// Throws   InvalidArgument where said; nothing has changed then.
///
/// Neither copied nor moved: ids mean something in one pool only.
class PagePool {
 public:
  /// May an allocation take chunks that are reserved for its format?
  enum class Reserve : bool { leave, use };

  /// Never the id of a page.
  static constexpr PageId no_page = std::numeric_limits<PageId>::max();

  /// Unit of ids, of page sizes and of alignment.
  static constexpr Index unit_bytes = 64;

  /// Largest budget: 2^32 units, 256 GiB. Of exactly that much the last chunk stays in the tail, see no_page.
  static constexpr Index max_budget_bytes = unit_bytes << 32;

  /// `base`: 64-byte aligned memory of any backend, at least `budget_bytes` long, which must outlive the pages.
  /// `page_bytes[f]`: size of a page of format f, rounded up to a multiple of 64. Formats of the same rounded size
  /// share their chunks.
  ///
  /// Throws for a null or misaligned base, no formats, sizes below 1, a budget below one chunk or
  /// above max_budget_bytes, and sizes so far apart that a chunk would hold 2^31 pages.
  PagePool(std::byte* base, Index budget_bytes, std::span<const Index> page_bytes)
      : base_(base), budget_bytes_(budget_bytes), chunk_bytes_(chunk_bytes_for(page_bytes)) {
    require(base != nullptr, "page pool: base is null, must be memory of ", budget_bytes, " bytes");
    const auto address = reinterpret_cast<std::uintptr_t>(base);
    require(address % unit_bytes == 0, "page pool: base is ", address % unit_bytes,
            " bytes past a multiple of 64, must be aligned to 64");
    require(budget_bytes >= chunk_bytes_ && budget_bytes <= max_budget_bytes,
            "page pool: budget_bytes = ", budget_bytes, ", must be within [", chunk_bytes_, " (one chunk), ",
            max_budget_bytes, "]");

    chunk_units_ = static_cast<std::uint32_t>(std::min<Index>(chunk_bytes_ / unit_bytes, no_page));
    chunk_count_ = std::min(budget_bytes / chunk_bytes_, Index{no_page} * unit_bytes / chunk_bytes_);
    require(chunk_count_ > 0, "page pool: budget_bytes = ", budget_bytes, ", one chunk of ", chunk_bytes_,
            " bytes takes all ids, must be smaller pages");

    for (const Index bytes : page_bytes) {
      const Index pages = chunk_bytes_ / rounded(bytes);
      require(pages < in_use_bit, "page pool: a chunk of ", chunk_bytes_, " bytes would hold ", pages, " pages of ",
              rounded(bytes), " bytes, must be below 2^31; the sizes are too far apart");
      Index size = 0;
      while (size < std::ssize(sizes_) && sizes_[size].bytes != rounded(bytes)) ++size;
      if (size == std::ssize(sizes_)) {
        sizes_.push_back({.bytes = rounded(bytes),
                          .units = static_cast<std::uint32_t>(rounded(bytes) / unit_bytes),
                          .pages = static_cast<std::uint32_t>(pages),
                          .first = std::vector<std::uint32_t>(static_cast<std::size_t>(pages), none)});
      }
      formats_.push_back({.size = static_cast<std::uint32_t>(size)});
      slots_per_chunk_ = std::max(slots_per_chunk_, pages);
    }

    chunks_.resize(static_cast<std::size_t>(chunk_count_));
    slots_.resize(static_cast<std::size_t>(chunk_count_ * slots_per_chunk_));
    for (Index c = chunk_count_ - 1; c >= 0; --c) push_store(static_cast<std::uint32_t>(c));
  }

  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  /// The smallest chunk, a multiple of 64 bytes, of which every size listed wastes at most 3 % after its last page.
  /// Sizes are rounded up to multiples of 64 first (that rounding is not part of the 3 %). At most 34 times the largest
  /// size.
  ///
  /// Throws for an empty list and for sizes outside of [1, max_budget_bytes].
  static Index chunk_bytes_for(std::span<const Index> page_bytes) {
    require(!page_bytes.empty(), "page pool: page_bytes is empty, must list at least one format");
    Index chunk = 0;
    for (std::size_t f = 0; f < page_bytes.size(); ++f) {
      require(page_bytes[f] >= 1 && page_bytes[f] <= max_budget_bytes, "page pool: page_bytes[", f,
              "] = ", page_bytes[f], ", must be within [1, ", max_budget_bytes, "]");
      chunk = std::max(chunk, rounded(page_bytes[f]));
    }
    // A chunk that wastes too much of one size goes on doing so until the next whole page of that size fits.
    for (std::size_t fitting = 0, f = 0; fitting < page_bytes.size(); f = (f + 1) % page_bytes.size()) {
      const Index page = rounded(page_bytes[f]);
      const bool fits = chunk % page * 100 <= chunk * 3;
      if (!fits) chunk = round_up(chunk, page);
      fitting = fits ? fitting + 1 : 1;
    }
    return chunk;
  }

  /// Fills `out` with pages of one reference each, or leaves it alone and gives false when there are not that many: all
  /// or nothing. A refusal is an ordinary result; it is counted and changes nothing else. An empty `out` gives true.
  /// Throws for a format out of range.
  [[nodiscard]] bool allocate(int format, std::span<PageId> out, Reserve reserve = Reserve::leave) {
    check(format, "allocate");
    const std::lock_guard lock(mutex_);
    if (std::cmp_greater(out.size(), room_for(format, reserve))) {
      ++refusals_;
      return false;
    }
    for (PageId& id : out) id = take_page(format);
    pages_in_use_ += std::ssize(out);
    bytes_in_use_ += std::ssize(out) * size_of(format).bytes;
    peak_bytes_in_use_ = std::max(peak_bytes_in_use_, bytes_in_use_);
    peak_chunks_in_use_ = std::max(peak_chunks_in_use_, chunk_count_ - stored_);
    return true;
  }

  /// One more reference to every page listed; a page listed twice gets two.
  /// Throws for a page that is not in use and for one that would get 2^31 references.
  void retain(std::span<const PageId> pages) {
    const std::lock_guard lock(mutex_);
    for (std::size_t i = 0; i < pages.size(); ++i) {
      const Index slot = find(pages[i]);
      if (slot != nowhere && slots_[slot] != most_references) [[likely]] {
        ++slots_[slot];
        continue;
      }
      for (std::size_t done = 0; done < i; ++done) --slots_[find(pages[done])];
      if (slot == nowhere) not_in_use("retain", pages[i]);
      fail(message("page pool: retain: page ", pages[i], " has 2^31 - 1 references, the most there can be"));
    }
  }
  void retain(PageId page) { retain(std::span(&page, 1)); }

  /// One reference less to every page listed; a page listed twice loses two. Gives how many went back to the pool.
  /// Throws for a page that is not in use, also when it is one only because of an earlier place in the list. (A page
  /// released once too often *after* it was handed out anew is the new owner's: no pool can tell.)
  Index release(std::span<const PageId> pages) {
    const std::lock_guard lock(mutex_);
    for (std::size_t i = 0; i < pages.size(); ++i) {
      const Index slot = find(pages[i]);
      if (slot != nowhere && slots_[slot] != in_use_bit) [[likely]] {
        --slots_[slot];
        continue;
      }
      for (std::size_t done = 0; done < i; ++done) ++slots_[find(pages[done])];
      not_in_use("release", pages[i]);
    }
    Index returned = 0;
    for (const PageId page : pages) {
      const Index slot = find(page);  // nowhere: returned by an earlier place in the list
      if (slot == nowhere || slots_[slot] != in_use_bit) continue;
      give_page(page);
      ++returned;
    }
    return returned;
  }
  /// True when the page went back to the pool.
  bool release(PageId page) { return release(std::span(&page, 1)) == 1; }

  /// References to a page; 0 for whatever is not a page in use.
  Index references(PageId page) const {
    const std::lock_guard lock(mutex_);
    const Index slot = find(page);
    return slot == nowhere ? 0 : static_cast<Index>(slots_[slot] & ~in_use_bit);
  }

  /// Where a page begins: base + 64 * id. Arithmetic only, nothing is checked; never needs the mutex.
  std::byte* address(PageId page) const { return base_ + static_cast<Index>(page) * unit_bytes; }

  /// Size of a page of this format: what the constructor got, rounded up to a multiple of 64.
  /// Throws for a format out of range, as all functions that take one.
  Index page_bytes(int format) const {
    check(format, "page_bytes");
    return size_of(format).bytes;
  }

  int formats() const { return static_cast<int>(formats_.size()); }

  /// Pages of this format that `allocate` would give right now.
  Index available(int format, Reserve reserve = Reserve::leave) const {
    check(format, "available");
    const std::lock_guard lock(mutex_);
    return room_for(format, reserve);
  }

  /// Keeps `chunks` chunks of the common store for allocations of this format with Reserve::use, replacing what was
  /// asked before; 0, as at first, keeps none. Other allocations, of this format and others, go on as if the pool were
  /// that much smaller. False, and nothing changed, when the common store has fewer chunks that no other format
  /// reserves.
  ///
  /// An allocation with Reserve::use takes room in cut chunks first, then chunks that nobody reserves, then those of
  /// its format. The reserve gets back what was taken from it before anyone else gets a chunk: from the next chunks
  /// that return to the common store, lowest format first. A chunk once taken is like any other: the room that is left
  /// in it is for all allocations of its size.
  ///
  /// So a commit that changes formats in a full pool asks with Reserve::use, and as its old pages come back as whole
  /// chunks the reserve is filled for the next one.
  /// Throws for a format out of range and for a negative count.
  [[nodiscard]] bool reserve(int format, Index chunks) {
    check(format, "reserve");
    require(chunks >= 0, "page pool: reserve: chunks = ", chunks, ", must be at least 0");
    const std::lock_guard lock(mutex_);
    Format& f = formats_[static_cast<std::size_t>(format)];
    if (chunks > stored_ - reserved_ + f.reserved) return false;
    reserved_ += chunks - f.reserved;
    f.wanted = f.reserved = chunks;
    return true;
  }

  PoolStats stats() const {
    const std::lock_guard lock(mutex_);
    return {.budget_bytes = budget_bytes_,
            .tail_bytes = budget_bytes_ - chunk_count_ * chunk_bytes_,
            .chunk_bytes = chunk_bytes_,
            .chunks = chunk_count_,
            .chunks_in_use = chunk_count_ - stored_,
            .chunks_reserved = reserved_,
            .pages_in_use = pages_in_use_,
            .bytes_in_use = bytes_in_use_,
            .chunk_bytes_in_use = (chunk_count_ - stored_) * chunk_bytes_,
            .peak_bytes_in_use = peak_bytes_in_use_,
            .peak_chunk_bytes_in_use = peak_chunks_in_use_ * chunk_bytes_,
            .refusals = refusals_,
            .bookkeeping_bytes = bookkeeping_bytes()};
  }

 private:
  static constexpr std::uint32_t none = std::numeric_limits<std::uint32_t>::max();

  static constexpr Index nowhere = -1;

  // The slot of a page in use is in_use_bit + references; that of a page given back is the page of its chunk that was
  // given back before it, or end_of_returned.
  static constexpr std::uint32_t in_use_bit = std::uint32_t{1} << 31;
  static constexpr std::uint32_t end_of_returned = in_use_bit - 1;
  static constexpr std::uint32_t most_references = none;

  struct Chunk {
    std::uint32_t size = none;                 // index into sizes_; none while in the common store
    std::uint32_t used = 0;                    // pages in use
    std::uint32_t touched = 0;                 // pages used since the chunk was cut are [0, touched)
    std::uint32_t returned = end_of_returned;  // the page given back last; a list through the slots
    std::uint32_t less = none;                 // neighbours in the list of its size, or (more) in the store
    std::uint32_t more = none;
  };

  struct Size {
    Index bytes = 0;
    std::uint32_t units = 0;
    std::uint32_t pages = 0;           // per chunk
    Index room = 0;                    // free pages in chunks cut to this size
    std::uint32_t fullest = none;      // end of the list of chunks that have room, ascending by fill
    std::vector<std::uint32_t> first;  // [fill]: first chunk of the list that is so full, or none
  };

  struct Format {
    std::uint32_t size = 0;  // index into sizes_
    Index wanted = 0;        // chunks that `reserve` asked for
    Index reserved = 0;      // of those, how many are in the store
  };

  static Index rounded(Index bytes) { return round_up(bytes, unit_bytes); }

  void check(int format, const char* where) const {
    require(format >= 0 && format < formats(), "page pool: ", where, ": format = ", format, ", must be within [0, ",
            formats() - 1, "]");
  }

  [[noreturn]] static void not_in_use(const char* where, PageId page) {
    fail(message("page pool: ", where, ": page ", page, " is not in use, must be allocated and not yet released"));
  }

  const Size& size_of(int format) const { return sizes_[formats_[static_cast<std::size_t>(format)].size]; }

  Index slot_of(std::uint32_t c, std::uint32_t page) const { return static_cast<Index>(c) * slots_per_chunk_ + page; }

  // The slot of a page in use, or nowhere.
  Index find(PageId page) const {
    const std::uint32_t c = page / chunk_units_;
    if (c >= chunks_.size() || chunks_[c].size == none) return nowhere;
    const std::uint32_t offset = page % chunk_units_;
    const std::uint32_t units = sizes_[chunks_[c].size].units;
    if (offset % units != 0 || offset / units >= chunks_[c].touched) return nowhere;
    const Index slot = slot_of(c, offset / units);
    return (slots_[slot] & in_use_bit) != 0 ? slot : nowhere;
  }

  Index room_for(int format, Reserve reserve) const {
    const Index chunks =
        stored_ - reserved_ + (reserve == Reserve::use ? formats_[static_cast<std::size_t>(format)].reserved : 0);
    return size_of(format).room + chunks * size_of(format).pages;
  }

  // There is room: `room_for` said so.
  PageId take_page(int format) {
    Format& f = formats_[static_cast<std::size_t>(format)];
    Size& size = sizes_[f.size];
    if (size.fullest == none) cut(f);
    const std::uint32_t c = size.fullest;
    Chunk& from = chunks_[c];

    // As the last of the list it stays the last when it gets fuller.
    if (size.first[from.used] == c) size.first[from.used] = none;
    ++from.used;
    if (from.used == size.pages)
      unlink(size, from);
    else
      size.first[from.used] = c;

    --size.room;
    const std::uint32_t page = from.returned != end_of_returned ? from.returned : from.touched++;
    std::uint32_t& slot = slots_[slot_of(c, page)];
    if (page == from.returned) from.returned = slot;
    slot = in_use_bit + 1;
    return c * chunk_units_ + page * size.units;
  }

  // The last reference is gone.
  void give_page(PageId id) {
    const std::uint32_t c = id / chunk_units_;
    Chunk& to = chunks_[c];
    Size& size = sizes_[to.size];
    const std::uint32_t page = id % chunk_units_ / size.units;
    slots_[slot_of(c, page)] = std::exchange(to.returned, page);
    ++size.room;
    --pages_in_use_;
    bytes_in_use_ -= size.bytes;

    // Move it in front of the chunks that were as full as it was; it is then the last of those as full as it is now.
    if (to.used == size.pages) {
      insert(size, c, none);
    } else if (const std::uint32_t front = size.first[to.used]; front != c) {
      unlink(size, to);
      insert(size, c, front);
    } else {
      const bool alone = to.more == none || chunks_[to.more].used != to.used;
      size.first[to.used] = alone ? none : to.more;
    }
    --to.used;
    if (to.used == 0) {
      unlink(size, to);
      size.room -= size.pages;
      to = Chunk{};
      push_store(c);
      refill_reserve();
    } else if (size.first[to.used] == none) {
      size.first[to.used] = c;
    }
  }

  // Takes a chunk from the common store for a format of which no chunk has room.
  void cut(Format& format) {
    if (stored_ == reserved_) {
      --format.reserved;
      --reserved_;
    }
    const std::uint32_t c = store_;
    store_ = chunks_[c].more;
    --stored_;
    Size& size = sizes_[format.size];
    chunks_[c] = Chunk{.size = format.size};
    size.room += size.pages;
    size.fullest = c;
  }

  void push_store(std::uint32_t c) {
    chunks_[c].more = store_;
    store_ = c;
    ++stored_;
  }

  // A chunk came back to the store: the lowest format that lacks one gets it.
  void refill_reserve() {
    for (Format& f : formats_) {
      if (f.reserved == f.wanted) continue;
      ++f.reserved;
      ++reserved_;
      return;
    }
  }

  // In front of `more`, or at the end where that is none.
  void insert(Size& size, std::uint32_t c, std::uint32_t more) {
    Chunk& in = chunks_[c];
    in.more = more;
    in.less = more == none ? size.fullest : chunks_[more].less;
    if (in.less != none) chunks_[in.less].more = c;
    (more == none ? size.fullest : chunks_[more].less) = c;
  }

  void unlink(Size& size, Chunk& out) {
    if (out.less != none) chunks_[out.less].more = out.more;
    (out.more == none ? size.fullest : chunks_[out.more].less) = out.less;
    out.less = out.more = none;
  }

  Index bookkeeping_bytes() const {
    std::size_t bytes = sizeof(*this) + sizeof(Chunk) * chunks_.capacity() + sizeof(std::uint32_t) * slots_.capacity() +
                        sizeof(Size) * sizes_.capacity() + sizeof(Format) * formats_.capacity();
    for (const Size& size : sizes_) bytes += sizeof(std::uint32_t) * size.first.capacity();
    return static_cast<Index>(bytes);
  }

  std::byte* base_;
  Index budget_bytes_;
  Index chunk_bytes_;
  std::uint32_t chunk_units_ = 0;
  Index chunk_count_ = 0;
  Index slots_per_chunk_ = 0;

  std::vector<Size> sizes_;
  std::vector<Format> formats_;
  std::vector<Chunk> chunks_;
  std::vector<std::uint32_t> slots_;  // [chunk][page]

  std::uint32_t store_ = none;  // the common store: a list through Chunk::more
  Index stored_ = 0;            // its length
  Index reserved_ = 0;          // of those, for Reserve::use only

  Index pages_in_use_ = 0;
  Index bytes_in_use_ = 0;
  Index peak_bytes_in_use_ = 0;
  Index peak_chunks_in_use_ = 0;
  Index refusals_ = 0;

  mutable std::mutex mutex_;
};

}  // namespace kvpare

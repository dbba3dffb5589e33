// How a list looks after evictions: which rows move where, which pages go back. Pure bookkeeping, decided before any
// row is touched.
#pragma once

#include <algorithm>
#include <bit>
#include <span>
#include <vector>

#include "pages.hpp"

namespace kvpare {

/// `count` rows, K and V, from one page to another of the same format.
struct Move {
  PageId from = 0, to = 0;
  std::uint16_t format = 0;
  std::uint8_t from_slot = 0, to_slot = 0, count = 0;
};

/// A list after eviction.
struct CompactedList {
  std::vector<Entry> entries;
  std::vector<std::uint16_t> offsets;
  std::vector<Move> moves;      // in order: a move never writes what a later one reads
  std::vector<Entry> released;  // as they were: the list no longer needs their pages
};

/// Which pages give their rows to others: those that are sparse, all, or none.
enum class Joining : std::uint8_t { sparse, dense, none };

namespace detail {

/// Is a page worth packing: does less than 3/4 of its slots live?
constexpr bool is_sparse(std::uint64_t live, Index page_tokens) { return std::popcount(live) * 4 < page_tokens * 3; }

/// Most pages a list of `live` tokens may use after compaction, before everything movable is joined: 4/3 of the dense
/// number, and one.
constexpr Index most_pages(Index live, Index page_tokens) { return ceil_div(live * 4, 3 * page_tokens) + 1; }

/// The same between decode steps, where every step reads the list and a hole costs nearly as much as a row: one page and
/// 1/16 more than the dense number. A packed list gets there by at least a page and 1/16 of itself in evicted tokens, so
/// that packing moves at most 16 rows for each of them.
constexpr Index most_pages_at_decode(Index live, Index page_tokens) {
  return std::min(most_pages(live, page_tokens), ceil_div(live, page_tokens) + 1 + live / (16 * page_tokens));
}

class ListBuilder {
 public:
  ListBuilder(const HeadPages& list, CompactedList& out) : list_(list), out_(out) {}

  /// The entry stays where it is with fewer live bits.
  void keep(const Entry& e, std::uint64_t live) {
    Entry kept = e;
    kept.live = live;
    if (e.offsets != 0) {
      const std::uint16_t* block = list_.offsets + (e.offsets - 1) * list_.page_tokens;
      kept.offsets = new_block();
      std::copy(block, block + list_.page_tokens, out_.offsets.end() - list_.page_tokens);
    }
    out_.entries.push_back(kept);
  }

  /// Packs the surviving rows of consecutive private entries of one format and state, ascending, into the first of their pages.
  void pack(std::span<const Entry> run, std::span<const std::uint64_t> live) {
    std::size_t to = 0;  // destination page: run[to]
    bool open = false;
    for (std::size_t from = 0; from < run.size(); ++from)
      for (std::uint64_t left = live[from]; left != 0;) {
        const Index slot = std::countr_zero(left);
        const Index length = std::countr_one(left >> slot);
        const Position position = list_.position(run[from], slot);
        if (open && (out_.entries.back().used == list_.page_tokens || position - out_.entries.back().first > 65535)) {
          open = false;
          ++to;
        }
        if (!open) {
          Entry fresh;
          fresh.page = run[to].page, fresh.format = run[to].format, fresh.state = run[to].state, fresh.first = position;
          out_.entries.push_back(fresh);
          open = true;
        }
        Entry& target = out_.entries.back();
        Index count = std::min(length, list_.page_tokens - target.used);
        while (list_.position(run[from], slot + count - 1) - target.first > 65535) --count;
        if (run[from].page != target.page || slot != target.used)
          out_.moves.push_back({run[from].page, target.page, target.format, static_cast<std::uint8_t>(slot),
                                static_cast<std::uint8_t>(target.used), static_cast<std::uint8_t>(count)});
        for (Index t = 0; t < count; ++t)
          put_token(target, list_.position(run[from], slot + t), list_.page_tokens, out_.offsets);
        left &= ~(low_bits(count) << slot);
      }
    for (std::size_t unused = open ? to + 1 : to; unused < run.size(); ++unused) out_.released.push_back(run[unused]);
  }

 private:
  std::uint32_t new_block() {
    out_.offsets.resize(out_.offsets.size() + static_cast<std::size_t>(list_.page_tokens), 0);
    return static_cast<std::uint32_t>(static_cast<Index>(out_.offsets.size()) / list_.page_tokens);
  }

  const HeadPages& list_;
  CompactedList& out_;
};

}  // namespace detail

/// Applies a selection to a list. Order is kept.
///
/// Entries whose page is shared, or whose format does not move rows, only lose bits. Of the others, those with less than
/// 3/4 of their slots live are packed together with their neighbours, in place and ascending: the first of their pages
/// take the survivors, the rest go back, so no page is needed and the result does not depend on free memory. When that
/// leaves more than 4/3 of the dense number of pages (and one), all movable entries are packed. Joining::dense always packs
/// all, Joining::none moves nothing.
///
/// A page holds positions that span less than 65536.   Cost: entries + live runs.
template <class IsPrivate>
CompactedList compact_list(const HeadPages& list, std::span<const std::uint64_t> keep, const IsPrivate& is_private,
                           Joining joining = Joining::sparse) {
  std::vector<Entry> entries, emptied;  // emptied pages part no neighbours, whoever holds them
  std::vector<std::uint64_t> live;
  Index tokens = 0;
  for (std::size_t e = 0; e < list.entries.size(); ++e) {
    const std::uint64_t left = list.entries[e].live & keep[e];
    tokens += std::popcount(left);
    (left != 0 ? entries : emptied).push_back(list.entries[e]);
    if (left != 0) live.push_back(left);
  }

  const auto build = [&](Joining how) {
    CompactedList out;
    out.released = emptied;
    detail::ListBuilder builder(list, out);
    const auto packs = [&](std::size_t e) {
      const Entry& entry = entries[e];
      return how != Joining::none && list.formats[entry.format].rows_move &&
             (how == Joining::dense || detail::is_sparse(live[e], list.page_tokens)) && is_private(entry.page);
    };
    for (std::size_t e = 0; e < live.size();) {
      if (!packs(e)) {
        builder.keep(entries[e], live[e]);
        ++e;
        continue;
      }
      std::size_t end = e + 1;
      while (end < live.size() && entries[end].format == entries[e].format && entries[end].state == entries[e].state &&
             entries[end].first > entries[end - 1].last && packs(end))  // pages of one form may interleave
        ++end;
      builder.pack(std::span<const Entry>(entries).subspan(e, end - e), std::span(live).subspan(e, end - e));
      e = end;
    }
    return out;
  };
  CompactedList out = build(joining);
  if (joining == Joining::sparse &&
      static_cast<Index>(out.entries.size()) > detail::most_pages(tokens, list.page_tokens))
    out = build(Joining::dense);
  return out;
}

}  // namespace kvpare

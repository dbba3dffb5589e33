// The tokens of one layer lined up over its heads, so that policies can compare heads.
#pragma once

#include <algorithm>
#include <limits>
#include <span>
#include <vector>

#include "pages.hpp"
#include "selection.hpp"
#include "tags.hpp"

namespace kvpare {

namespace detail {

KVPARE_HD inline bool has_column(const std::uint64_t* bitmap, Index column, Index word_tokens) {
  return bitmap[column / word_tokens] >> (column % word_tokens) & 1u;
}

}  // namespace detail

/// Columns of a layer. While all heads hold the same tokens in the same slots, ascending (*aligned*), a column is a slot; else it
/// is the rank of a token among all that any head holds, by position. Bitmaps of columns have `word_tokens` bits a word.
/// Columns that stand for no token (unused or dead slots) are in no bitmap.
struct Columns {
  Index count = 0, word_tokens = 64;
  bool aligned = true;
  std::vector<Position> positions;                 // [count] ascending among live ones
  std::vector<std::uint8_t> classes;               // [count] TokenClass
  std::vector<std::uint64_t> is_protected;         // bitmap
  std::vector<std::vector<std::uint64_t>> live;    // bitmap per kv head; one for all when aligned
  std::vector<std::vector<std::int32_t>> of_slot;  // per kv head, slot -> column; empty when aligned

  Index words() const { return ceil_div(count, word_tokens); }
  std::span<const std::uint64_t> live_in(Index head) const {
    return live[aligned ? 0 : static_cast<std::size_t>(head)];
  }
  bool has(std::span<const std::uint64_t> bitmap, Index column) const {
    return detail::has_column(bitmap.data(), column, word_tokens);
  }

  /// Columns live in any head.
  std::vector<std::uint64_t> live_in_any() const {
    std::vector<std::uint64_t> any = live[0];
    for (std::size_t h = 1; h < live.size(); ++h)
      for (std::size_t w = 0; w < any.size(); ++w) any[w] |= live[h][w];
    return any;
  }

  /// Columns of these classes.
  std::vector<std::uint64_t> of_class(ClassSet classes_wanted) const {
    std::vector<std::uint64_t> bitmap(static_cast<std::size_t>(words()), 0);
    for (Index c = 0; c < count; ++c)
      if (classes_wanted.has(static_cast<TokenClass>(classes[static_cast<std::size_t>(c)])))
        bitmap[static_cast<std::size_t>(c / word_tokens)] |= std::uint64_t{1} << (c % word_tokens);
    return bitmap;
  }

  /// Columns of tokens at these positions.
  std::vector<std::uint64_t> at(const PositionSpans& spans) const {
    std::vector<std::uint64_t> bitmap(static_cast<std::size_t>(words()), 0);
    auto from = positions.begin();
    for (const auto& span : spans) {
      from = std::lower_bound(from, positions.end(), span.first);
      for (; from != positions.end() && *from < span.second; ++from) {
        const Index c = from - positions.begin();
        bitmap[static_cast<std::size_t>(c / word_tokens)] |= std::uint64_t{1} << (c % word_tokens);
      }
    }
    return bitmap;
  }

  std::vector<std::uint64_t> from_slots(const HeadPages& list, Index head, std::span<const std::uint64_t> words) const;

  /// A bitmap of columns as a bitmap of slots of one head.
  std::vector<std::uint64_t> to_slots(const HeadPages& list, Index head, std::span<const std::uint64_t> bitmap) const {
    if (aligned) return {bitmap.begin(), bitmap.end()};
    std::vector<std::uint64_t> words(list.entries.size(), 0);
    for (std::size_t e = 0; e < list.entries.size(); ++e)
      for_each_bit(list.entries[e].live, [&](Index s) {
        const Index column = of_slot[static_cast<std::size_t>(head)]
                                    [e * static_cast<std::size_t>(list.page_tokens) + static_cast<std::size_t>(s)];
        if (has(bitmap, column)) words[e] |= std::uint64_t{1} << s;
      });
    return words;
  }
};

/// A bitmap of slots of one head as a bitmap of columns; the inverse of to_slots.
inline std::vector<std::uint64_t> Columns::from_slots(const HeadPages& list, Index head,
                                                      std::span<const std::uint64_t> words) const {
  if (aligned) return {words.begin(), words.end()};
  std::vector<std::uint64_t> bitmap(static_cast<std::size_t>(this->words()), 0);
  for (std::size_t e = 0; e < list.entries.size(); ++e)
    for_each_bit(words[e] & list.entries[e].live, [&](Index s) {
      const Index column = of_slot[static_cast<std::size_t>(head)]
                                  [e * static_cast<std::size_t>(list.page_tokens) + static_cast<std::size_t>(s)];
      bitmap[static_cast<std::size_t>(column / word_tokens)] |= std::uint64_t{1} << (column % word_tokens);
    });
  return bitmap;
}

namespace detail {

inline bool same_tokens(const HeadPages& a, const HeadPages& b) {
  if (a.entries.data() == b.entries.data() && a.entries.size() == b.entries.size()) return true;
  if (a.entries.size() != b.entries.size()) return false;
  for (std::size_t e = 0; e < a.entries.size(); ++e) {
    const Entry &x = a.entries[e], &y = b.entries[e];
    if (x.live != y.live || x.used != y.used || x.first != y.first || (x.offsets == 0) != (y.offsets == 0))
      return false;
    if (x.offsets != 0 &&
        !std::equal(a.offsets + (x.offsets - 1) * a.page_tokens, a.offsets + (x.offsets - 1) * a.page_tokens + x.used,
                    b.offsets + (y.offsets - 1) * b.page_tokens))
      return false;
  }
  return true;
}

}  // namespace detail

/// Lines up the heads of a layer. Cost: the number of slots.
inline Columns columns_of(std::span<const HeadPages> heads, const Tags& tags) {
  Columns c;
  c.word_tokens = heads[0].page_tokens;
  c.aligned = heads[0].ascends() && std::all_of(heads.begin() + 1, heads.end(), [&](const HeadPages& h) {
                return detail::same_tokens(heads[0], h);
              });
  if (c.aligned) {
    const HeadPages& list = heads[0];
    // What the open page has room for is no column yet: a token that comes there later must not find a score.
    c.count = list.slots() - (list.entries.empty() ? 0 : list.page_tokens - list.entries.back().used);
    c.positions.resize(static_cast<std::size_t>(c.count));
    c.live.resize(1);
    std::size_t at = 0;
    for (const Entry& e : list.entries) {
      c.live[0].push_back(e.live);
      for (Index s = 0; s < list.page_tokens && at < c.positions.size(); ++s)
        c.positions[at++] = s < e.used ? list.position(e, s) : e.last;
    }
  } else {
    std::vector<std::vector<Position>> held;
    for (const HeadPages& list : heads) {
      held.push_back(positions_of(list, Selection::live(list.entries)));
      c.positions.insert(c.positions.end(), held.back().begin(), held.back().end());
    }
    std::sort(c.positions.begin(), c.positions.end());
    c.positions.erase(std::unique(c.positions.begin(), c.positions.end()), c.positions.end());
    c.count = static_cast<Index>(c.positions.size());
    for (const HeadPages& list : heads) {
      auto& map = c.of_slot.emplace_back(static_cast<std::size_t>(list.slots()), 0);
      auto& live = c.live.emplace_back(static_cast<std::size_t>(c.words()), 0);
      std::int32_t column = 0;
      for (std::size_t e = 0; e < list.entries.size(); ++e)
        for_each_bit(list.entries[e].live, [&](Index s) {
          const Position p = list.position(list.entries[e], s);
          if (c.positions[static_cast<std::size_t>(column)] > p)  // pages whose positions interleave
            column = static_cast<std::int32_t>(std::lower_bound(c.positions.begin(), c.positions.end(), p) -
                                               c.positions.begin());
          while (c.positions[static_cast<std::size_t>(column)] < p) ++column;
          map[e * static_cast<std::size_t>(list.page_tokens) + static_cast<std::size_t>(s)] = column;
          live[static_cast<std::size_t>(column / c.word_tokens)] |= std::uint64_t{1} << (column % c.word_tokens);
        });
    }
  }
  c.classes.assign(static_cast<std::size_t>(c.count), static_cast<std::uint8_t>(TokenClass::text));
  c.is_protected.assign(static_cast<std::size_t>(c.words()), 0);
  for (const TagSpan& span : tags.spans()) {
    const auto begin = std::lower_bound(c.positions.begin(), c.positions.end(), span.begin);
    const auto end = std::lower_bound(begin, c.positions.end(), span.end);
    for (Index i = begin - c.positions.begin(); i < end - c.positions.begin(); ++i) {
      c.classes[static_cast<std::size_t>(i)] = static_cast<std::uint8_t>(span.token_class);
      if (span.is_protected)
        c.is_protected[static_cast<std::size_t>(i / c.word_tokens)] |= std::uint64_t{1} << (i % c.word_tokens);
    }
  }
  return c;
}

}  // namespace kvpare

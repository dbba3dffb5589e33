// How a list looks after tokens have changed their form: which rows are coded anew into which pages, which pages go back.
// Pure bookkeeping, decided before any row is touched.
#pragma once

#include <algorithm>
#include <bit>
#include <span>
#include <utility>
#include <vector>

#include "pages.hpp"

namespace kvpare {

/// `count` rows for a page that `encode` writes: where they are now, and in which slots they go.
struct EncodePiece {
  PageId page = 0;
  std::uint16_t format = 0;
  std::uint32_t state = 0;  // as Entry::state, of the page they come from
  std::uint8_t slot = 0, to_slot = 0, count = 0;
};

/// A page that `encode` writes, from pieces [first_piece, first_piece + pieces) of its list, ascending in `to_slot`; a page that
/// is converted whole has gaps where tokens were evicted.
struct EncodePage {
  PageId page = 0;
  std::uint16_t format = 0;
  std::uint32_t state = 0;
  Index first_piece = 0, pieces = 0;
  Index entry = 0;  // of the list as it will be
};

/// Tokens of one list that are to change their form.
struct FormChange {
  std::uint16_t format = 0;
  std::uint32_t state = 0;           // as Entry::state
  std::vector<std::uint64_t> words;  // per entry

  FormChange(std::uint16_t f, std::uint32_t s, std::vector<std::uint64_t> w)
      : format(f), state(s), words(std::move(w)) {}
};

/// A list after some tokens have changed their form.
struct ReformedList {
  std::vector<Entry> entries;
  std::vector<std::uint16_t> offsets;
  std::vector<std::size_t> fresh;     // entries that need a page, by index; filled in by `place`
  std::vector<EncodePage> pages;      // what is written; those of `fresh` first, in its order
  std::vector<EncodePiece> pieces;
  std::vector<Position> positions;    // [pages, page_tokens] of the slots of `pages`; behind the last token, its own
  std::vector<Entry> released;        // as they were: the list no longer needs their pages
  std::vector<std::int32_t> source;   // slot -> slot of the list before, -1 = none
  Index changed = 0;                  // tokens that have the new form

  /// Gives the n-th fresh entry its page.
  void place(std::size_t n, PageId page) { entries[fresh[n]].page = pages[n].page = page; }
};

namespace detail {

class Reformer {
 public:
  Reformer(const HeadPages& list, int append_format) : list_(list), append_format_(append_format) {
    for (const Entry& e : list.entries) {
      const Index at = std::ssize(old_);
      old_.push_back({.entry = e, .live = e.live});
      (e.format == append_format ? tail_ : body_).push_back({.old = at});
    }
  }

  template <class IsPrivate>
  void carry_out(const FormChange& change, const IsPrivate& is_private) {
    const bool rows_move = list_.formats[change.format].rows_move;
    std::vector<Token> scattered;
    for (Index at = 0; at < std::ssize(old_); ++at) {
      Old& old = old_[static_cast<std::size_t>(at)];
      const std::uint64_t word = change.words[static_cast<std::size_t>(at)] & old.live;
      if (word == 0 || old.becomes >= 0 || (old.entry.format == change.format && old.entry.state == change.state)) continue;
      const bool in_place = shares_fixed_side(old.entry, change);
      if (word == low_bits(list_.page_tokens) || (in_place && word == old.entry.live)) {
        old.becomes = change.format, old.state = change.state;  // a whole page: it keeps its place and its slots
        out_.changed += std::popcount(word);
        continue;
      }
      if (in_place) continue;  // until all tokens of the page change: they would be rounded twice
      for_each_bit(word, [&](Index slot) { scattered.push_back({list_.position(old.entry, slot), at, slot}); });
    }
    const auto by_position = [](const Token& a, const Token& b) { return a.position < b.position; };
    std::sort(scattered.begin(), scattered.end(), by_position);

    std::size_t next = 0;
    if (rows_move && !scattered.empty()) {
      next = fill_open_page(change, scattered, is_private);
      if (next == 0) {
        const std::size_t mine = scattered.size();
        rewrite_open_page(change, scattered, is_private);
        out_.changed -= static_cast<Index>(scattered.size() - mine);  // these have the form already
        std::sort(scattered.begin(), scattered.end(), by_position);
      }
    }
    while (next < scattered.size()) {
      const std::size_t count = reach(scattered, next, scattered[next].position, list_.page_tokens);
      if (!rows_move && static_cast<Index>(count) < list_.page_tokens) {
        next += count;  // a page that cannot take more rows later would waste what is missing
        continue;
      }
      New fresh{.format = change.format, .state = change.state};
      take(scattered, next, count, fresh.tokens);
      next += count;
      gathered_.push_back(std::move(fresh));
    }
  }

  ReformedList finish() {
    // The form that is appended stands last; pages that were converted whole keep their place.
    std::vector<Place> order;
    std::vector<Place> tail;
    for (const std::vector<Place>* part : {&body_, &tail_})
      for (const Place& p : *part)
        (old_[static_cast<std::size_t>(p.old)].form() != append_format_ ? order : tail).push_back(p);
    std::stable_sort(order.begin(), order.end(), [](const Place& a, const Place& b) { return a.old < b.old; });
    for (Index g = 0; g < std::ssize(gathered_); ++g) order.push_back({.gathered = g});
    order.insert(order.end(), tail.begin(), tail.end());

    std::vector<EncodePage> extended;
    for (const Place& p : order) {
      if (p.old < 0) {
        add_gathered(gathered_[static_cast<std::size_t>(p.gathered)]);
        continue;
      }
      Old& old = old_[static_cast<std::size_t>(p.old)];
      if (old.becomes >= 0)
        convert(p.old, old);
      else if (old.live == 0 && old.added.empty())
        out_.released.push_back(old.entry);
      else
        keep(p.old, old, extended);
    }
    out_.pages.insert(out_.pages.end(), extended.begin(), extended.end());
    const HeadPages changed{.entries = out_.entries, .offsets = out_.offsets.data(), .formats = list_.formats,
                            .page_tokens = list_.page_tokens};
    for (const EncodePage& page : out_.pages) {
      const Entry& e = out_.entries[static_cast<std::size_t>(page.entry)];
      for (Index slot = 0; slot < list_.page_tokens; ++slot)
        out_.positions.push_back(slot < e.used ? changed.position(e, slot) : e.last);
    }
    return std::move(out_);
  }

 private:
  struct Token {
    Position position;
    Index entry, slot;
  };
  struct Old {
    Entry entry;
    std::uint64_t live;         // that stay
    int becomes = -1;           // format of the whole page, -1 = none
    std::uint32_t state = 0;
    std::vector<Token> added = {};  // rows that come into its open slots
    int form() const { return becomes >= 0 ? becomes : entry.format; }
  };
  struct New {
    std::uint16_t format;
    std::uint32_t state;
    std::vector<Token> tokens = {};
  };
  struct Place {
    Index old = -1, gathered = -1;
  };

  /// Does a side of the page stay coded as it is, in a form whose rows cannot leave their tile?
  bool shares_fixed_side(const Entry& e, const FormChange& change) const {
    const PageGeometry &from = list_.formats[e.format], &to = list_.formats[change.format];
    const auto state = [&](std::uint32_t index) { return index == 0 ? CodecState{} : list_.states[index - 1]; };
    const CodecState now = state(e.state), then = state(change.state);
    return (!from.keys_move && from.key_codec == to.key_codec && now.keys == then.keys) ||
           (!from.values_move && from.value_codec == to.value_codec && now.values == then.values);
  }

  /// How many tokens from `at` on go into a page that begins at `first` and has room for `room`.
  static std::size_t reach(const std::vector<Token>& tokens, std::size_t at, Position first, Index room) {
    std::size_t count = 0;
    while (at + count < tokens.size() && static_cast<Index>(count) < room &&
           tokens[at + count].position - first <= 65535)
      ++count;
    return count;
  }

  void take(const std::vector<Token>& tokens, std::size_t at, std::size_t count, std::vector<Token>& into) {
    for (std::size_t i = at; i < at + count; ++i) {
      old_[static_cast<std::size_t>(tokens[i].entry)].live &= ~(std::uint64_t{1} << tokens[i].slot);
      into.push_back(tokens[i]);
    }
    out_.changed += static_cast<Index>(count);
  }

  template <class IsPrivate>
  std::size_t fill_open_page(const FormChange& change, const std::vector<Token>& tokens, const IsPrivate& is_private) {
    Old* old = open_page(change, is_private);
    if (old == nullptr || old->entry.last >= tokens[0].position) return 0;
    const std::size_t count = reach(tokens, 0, old->entry.first, list_.page_tokens - old->entry.used);
    take(tokens, 0, count, old->added);
    return count;
  }

  /// The last page of a form, if rows can be added.
  template <class IsPrivate>
  Old* open_page(const FormChange& change, const IsPrivate& is_private) {
    for (std::size_t at = old_.size(); at-- > 0;) {
      Old& old = old_[at];
      if (old.entry.format != change.format || old.entry.state != change.state) continue;
      const bool open = old.entry.used > 0 && old.entry.used < list_.page_tokens && old.becomes < 0 && old.added.empty();
      return open && is_private(old.entry.page) ? &old : nullptr;
    }
    return nullptr;
  }

  /// Where tokens come between those of the open page, all of them go into a new one; else every lot would open its own.
  template <class IsPrivate>
  void rewrite_open_page(const FormChange& change, std::vector<Token>& tokens, const IsPrivate& is_private) {
    const Old* old = open_page(change, is_private);
    if (old == nullptr || old->entry.last < tokens[0].position) return;
    const Index at = old - old_.data();
    for_each_bit(old->live, [&](Index slot) { tokens.push_back({list_.position(old->entry, slot), at, slot}); });
  }

  std::uint32_t copy_block(const Entry& e) {
    if (e.offsets == 0) return 0;
    const std::uint16_t* block = list_.offsets + (e.offsets - 1) * list_.page_tokens;
    out_.offsets.insert(out_.offsets.end(), block, block + list_.page_tokens);
    return static_cast<std::uint32_t>(static_cast<Index>(out_.offsets.size()) / list_.page_tokens);
  }

  void add_source(Index old, std::uint64_t word) {
    const std::size_t base = out_.source.size();
    out_.source.resize(base + static_cast<std::size_t>(list_.page_tokens), -1);
    for_each_bit(word, [&](Index slot) {
      out_.source[base + static_cast<std::size_t>(slot)] = static_cast<std::int32_t>(old * list_.page_tokens + slot);
    });
  }

  /// The piece that a token goes on with, or a new one.
  void add_piece(EncodePage& page, const Token& t, Index to_slot) {
    const Entry& from = old_[static_cast<std::size_t>(t.entry)].entry;
    if (page.pieces > 0) {
      EncodePiece& last = out_.pieces.back();
      if (last.page == from.page && last.slot + last.count == t.slot) {
        ++last.count;
        return;
      }
    }
    out_.pieces.push_back({from.page, from.format, from.state, static_cast<std::uint8_t>(t.slot),
                           static_cast<std::uint8_t>(to_slot), 1});
    ++page.pieces;
  }

  EncodePage begin_page(const Entry& e) const {
    return {e.page, e.format, e.state, std::ssize(out_.pieces), 0, std::ssize(out_.entries)};
  }

  void keep(Index at, const Old& old, std::vector<EncodePage>& extended) {
    Entry e = old.entry;
    e.live = old.live;
    e.offsets = copy_block(e);
    add_source(at, e.live);
    if (!old.added.empty()) {
      EncodePage page = begin_page(e);
      for (const Token& t : old.added) {
        out_.source[out_.source.size() - static_cast<std::size_t>(list_.page_tokens) + e.used] =
            static_cast<std::int32_t>(t.entry * list_.page_tokens + t.slot);
        add_piece(page, t, e.used);
        put_token(e, t.position, list_.page_tokens, out_.offsets);
      }
      extended.push_back(page);
    }
    out_.entries.push_back(e);
  }

  void convert(Index at, const Old& old) {
    Entry e = old.entry;
    e.format = static_cast<std::uint16_t>(old.becomes), e.state = old.state;
    e.offsets = copy_block(e);
    add_source(at, e.live);
    EncodePage page = begin_page(e);
    for (std::uint64_t left = old.entry.live; left != 0; ++page.pieces) {
      const Index slot = std::countr_zero(left), count = std::countr_one(left >> slot);
      out_.pieces.push_back({old.entry.page, old.entry.format, old.entry.state, static_cast<std::uint8_t>(slot),
                             static_cast<std::uint8_t>(slot), static_cast<std::uint8_t>(count)});
      left &= ~(low_bits(count) << slot);
    }
    out_.fresh.push_back(out_.entries.size());
    out_.pages.push_back(page);
    out_.entries.push_back(e);
    out_.released.push_back(old.entry);
  }

  void add_gathered(const New& fresh) {
    Entry e;
    e.format = fresh.format, e.state = fresh.state, e.first = fresh.tokens[0].position;
    add_source(0, 0);
    EncodePage page = begin_page(e);
    for (const Token& t : fresh.tokens) {
      out_.source[out_.source.size() - static_cast<std::size_t>(list_.page_tokens) + e.used] =
          static_cast<std::int32_t>(t.entry * list_.page_tokens + t.slot);
      add_piece(page, t, e.used);
      put_token(e, t.position, list_.page_tokens, out_.offsets);
    }
    out_.fresh.push_back(out_.entries.size());
    out_.pages.push_back(page);
    out_.entries.push_back(e);
  }

  const HeadPages& list_;
  int append_format_;
  std::vector<Old> old_;
  std::vector<Place> body_, tail_;
  std::vector<New> gathered_;
  ReformedList out_;
};

}  // namespace detail

/// Carries out changes of form, in order. A page whose live tokens all change together, and which is full, is converted
/// whole: it keeps its slots and its place in the list. So is one that is not full, where one of its sides stays coded in a
/// form whose rows do not move; its tokens change all or none, since they would be rounded twice elsewhere. Other tokens are
/// gathered, ascending, into pages of the new form: first into the open page of that form, if this sequence alone holds it
/// and they come after its own; where they come between, they and its own go into new pages. Forms whose rows do not move
/// take whole pages only; what is over stays as it is.
///
/// Pages of the append form stand last, so that appending goes on behind them. Nothing that others share is written.
/// Cost: entries + tokens that are gathered (sorted by position).
template <class IsPrivate>
ReformedList reform_list(const HeadPages& list, std::span<const FormChange> changes, int append_format,
                         const IsPrivate& is_private) {
  detail::Reformer reformer(list, append_format);
  for (const FormChange& change : changes) reformer.carry_out(change, is_private);
  return reformer.finish();
}

}  // namespace kvpare

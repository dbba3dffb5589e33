// reform_list, worked by hand and by carrying out what it asks for on an array of tokens.
#include <gtest/gtest.h>

#include <kvpare/cache/reform.hpp>
#include <kvpare/core/random.hpp>
#include <map>
#include <set>
#include <vector>

namespace kvpare {
namespace {

constexpr Index page_tokens = 16;
constexpr std::uint64_t all = low_bits(page_tokens);

/// Forms: what is appended, two whose rows move, keys in tiles, keys and values in tiles.
enum : std::uint16_t { raw, rows_a, rows_b, tile_keys, tiles };

/// A list whose rows are their positions, so that a row that went astray is seen.
struct List {
  std::vector<Entry> entries;
  std::vector<std::uint16_t> offsets;
  std::vector<PageGeometry> formats = std::vector<PageGeometry>(5);
  std::set<PageId> shared;
  std::map<PageId, std::vector<Position>> rows;

  List() {
    static const int codec[4] = {};  // only their addresses matter
    const auto set = [&](int f, const void* keys, bool keys_move, const void* values, bool values_move) {
      PageGeometry& g = formats[static_cast<std::size_t>(f)];
      g.key_codec = keys, g.value_codec = values, g.keys_move = keys_move, g.values_move = values_move;
      g.rows_move = keys_move && values_move;
    };
    set(rows_a, &codec[0], true, &codec[0], true), set(rows_b, &codec[1], true, &codec[1], true);
    set(tile_keys, &codec[2], false, nullptr, true), set(tiles, &codec[2], false, &codec[3], false);
  }

  List& add(std::uint16_t format, const std::vector<Position>& positions, std::uint64_t live = ~std::uint64_t{0}) {
    Entry e;
    e.page = 100 + static_cast<PageId>(entries.size()), e.format = format, e.first = positions.front();
    for (const Position p : positions) put_token(e, p, page_tokens, offsets);
    e.live &= live;
    entries.push_back(e);
    rows[e.page] = positions;
    rows[e.page].resize(page_tokens, -1);
    return *this;
  }
  List& add(std::uint16_t format, Position first, Index count, std::uint64_t live = ~std::uint64_t{0}) {
    std::vector<Position> positions;
    for (Index t = 0; t < count; ++t) positions.push_back(first + static_cast<Position>(t));
    return add(format, positions, live);
  }

  HeadPages pages() const { return {entries, offsets.data(), formats, page_tokens}; }

  /// Tokens at these positions take a form; the list is then as it says. Checks all that must hold of any result.
  ReformedList change(std::uint16_t format, const std::set<Position>& positions) {
    std::vector<std::uint64_t> words;
    std::set<Position> held;
    std::map<Position, int> was;
    for (const Entry& e : entries) {
      std::uint64_t& word = words.emplace_back(0);
      for_each_bit(e.live, [&](Index s) {
        const Position p = pages().position(e, s);
        held.insert(p), was[p] = e.format;
        if (positions.contains(p)) word |= std::uint64_t{1} << s;
      });
    }
    const FormChange wanted(format, 0, words);
    ReformedList out = reform_list(pages(), std::span(&wanted, 1), raw, [&](PageId p) { return !shared.contains(p); });
    for (std::size_t n = 0; n < out.fresh.size(); ++n) out.place(n, next_page++);

    // Nothing reads what another writes: all reads come first.
    const std::map<PageId, std::vector<Position>> before = rows;
    std::set<PageId> old_pages;
    for (const Entry& e : entries) old_pages.insert(e.page);
    for (const EncodePage& page : out.pages) {
      EXPECT_FALSE(shared.contains(page.page)) << "a shared page is written";
      rows[page.page].resize(page_tokens, -1);
      Index end = 0;
      for (Index i = page.first_piece; i < page.first_piece + page.pieces; ++i) {
        const EncodePiece& piece = out.pieces[static_cast<std::size_t>(i)];
        EXPECT_GE(piece.to_slot, end) << "pieces ascend";
        end = piece.to_slot + piece.count;
        EXPECT_NE(piece.page, page.page);
        for (int t = 0; t < piece.count; ++t)
          rows[page.page][static_cast<std::size_t>(piece.to_slot + t)] =
              before.at(piece.page)[static_cast<std::size_t>(piece.slot + t)];
      }
    }
    const HeadPages after{out.entries, out.offsets.data(), formats, page_tokens};
    std::set<Position> says;
    std::set<PageId> in_use;
    std::set<std::uint32_t> blocks;
    Index changed = 0;
    for (std::size_t at = 0; at < out.entries.size(); ++at) {
      const Entry& e = out.entries[at];
      EXPECT_TRUE(in_use.insert(e.page).second);
      EXPECT_NE(e.live, 0u);
      EXPECT_TRUE(e.offsets == 0 || blocks.insert(e.offsets).second);
      EXPECT_EQ(e.first, after.position(e, 0));
      EXPECT_EQ(e.last, after.position(e, e.used - 1));
      for (Index s = 1; s < e.used; ++s) EXPECT_GT(after.position(e, s), after.position(e, s - 1));
      for_each_bit(e.live, [&](Index s) {
        const Position p = after.position(e, s);
        EXPECT_TRUE(says.insert(p).second) << "position " << p << " twice";
        EXPECT_EQ(rows[e.page][static_cast<std::size_t>(s)], p) << "a row went astray";
        EXPECT_TRUE(e.format == was[p] || (positions.contains(p) && e.format == format));
        changed += e.format != was[p];
        const std::int32_t from = out.source[at * page_tokens + static_cast<std::size_t>(s)];
        EXPECT_EQ(
            from < 0 ? -1 : pages().position(entries[static_cast<std::size_t>(from) / page_tokens], from % page_tokens),
            p);
      });
    }
    EXPECT_EQ(says, held);
    EXPECT_EQ(out.changed, changed);
    for (const Entry& e : out.released) EXPECT_FALSE(in_use.contains(e.page)) << "released and in use";
    for (const PageId p : old_pages)
      EXPECT_TRUE(in_use.contains(p) ||
                  std::any_of(out.released.begin(), out.released.end(), [&](const Entry& e) { return e.page == p; }));
    entries = out.entries, offsets = out.offsets;
    return out;
  }
  PageId next_page = 1000;

  Index pages_of(int format) const {
    return std::count_if(entries.begin(), entries.end(), [&](const Entry& e) { return e.format == format; });
  }
};

std::set<Position> span_of(Position begin, Position end) {
  std::set<Position> s;
  for (; begin < end; ++begin) s.insert(begin);
  return s;
}

TEST(Reform, WholePagesKeepTheirPlaceAndTheirSlots) {
  List list;
  const ReformedList out = list.add(raw, 0, 16).add(raw, 16, 16).add(raw, 32, 3).change(tiles, span_of(0, 35));
  EXPECT_EQ(out.changed, 32);
  EXPECT_EQ(list.pages_of(tiles), 2);
  EXPECT_EQ(list.pages_of(raw), 1);
}

TEST(Reform, LotsBetweenOlderOnesShareTheOpenPage) {
  List list;
  list.add(raw, 0, 16).add(raw, 16, 16).add(raw, 32, 16);
  list.change(rows_a, {5, 20, 40});
  list.change(rows_a, {3, 21, 33});
  list.change(rows_a, {41, 42});
  EXPECT_EQ(list.pages_of(rows_a), 1);
  for (Position p = 6; p < 16; ++p) list.change(rows_a, {p});
  EXPECT_EQ(list.pages_of(rows_a), 2) << "eighteen tokens";
}

TEST(Reform, ASharedOpenPageIsLeftAlone) {
  List list;
  list.add(rows_a, {5, 20, 40}).add(raw, 41, 16).shared = {100};
  list.change(rows_a, {43});
  list.change(rows_a, {45});
  EXPECT_EQ(list.pages_of(rows_a), 2);
}

TEST(Reform, WhatTruncationEmptiedTakesNoTokens) {
  List list;
  list.add(rows_a, {5, 20, 40}).add(raw, 41, 16);
  list.entries[0].used = 0, list.entries[0].live = 0;  // as after truncate(0), then an append
  list.change(rows_a, {43});
  EXPECT_EQ(list.entries[0].first, 43);
  list = List().add(rows_a, {5, 20, 40}).add(raw, 6, 10);
  list.entries[0].used = 1, list.entries[0].live = 1, list.entries[0].last = 5;  // truncate(6)
  list.change(rows_a, {7});
  EXPECT_EQ(list.pages_of(rows_a), 1);
}

TEST(Reform, TilesWithHolesChangeWholeOrWait) {
  // Keys stay as they are coded: the tokens left of a page change together, in their slots.
  List list;
  list.add(tile_keys, 0, 16, 0xbffe).add(tile_keys, 16, 16).add(raw, 32, 4);
  EXPECT_EQ(list.change(tiles, span_of(0, 10)).changed, 0);
  EXPECT_EQ(list.change(tiles, span_of(4, 28)).changed, 0) << "enough for a page, but coded elsewhere already";
  const ReformedList out = list.change(tiles, span_of(0, 20));
  EXPECT_EQ(out.changed, 14);
  EXPECT_EQ(list.entries[0].format, tiles);
  EXPECT_EQ(list.entries[0].live, 0xbffeu);
  EXPECT_EQ(list.entries[0].used, 16);
  // A form with other keys codes them anew, where they come to stand.
  EXPECT_EQ(list.change(rows_a, span_of(0, 20)).changed, 18);
  EXPECT_EQ(list.pages_of(rows_a), 2);
}

TEST(Reform, AnyChangesKeepEveryToken) {
  for (std::uint64_t seed = 1; seed <= 300; ++seed) {
    std::uint64_t at = 0;
    const auto below = [&](Index n) {
      return static_cast<Index>(random_bits(seed, at++) % static_cast<std::uint64_t>(n));
    };
    List list;
    Position next = 0;
    for (Index p = below(6) + 1; p > 0; --p) {
      std::vector<Position> positions;
      for (Index t = p == 1 ? below(16) + 1 : 16; t > 0; --t)
        positions.push_back(next += static_cast<Position>(below(8) == 0 ? below(4000) + 1 : 1));
      next += below(3) == 0 ? 40000 : 0;  // a page spans less than 65536
      std::uint64_t live = below(2) == 0 ? all : random_bits(seed, at++);
      if ((live & low_bits(std::ssize(positions))) == 0) live = all;
      list.add(raw, positions, live);
      if (below(5) == 0) list.shared.insert(list.entries.back().page);
    }
    for (int step = 0; step < 6 && !::testing::Test::HasFailure(); ++step) {
      std::set<Position> some;
      const Index share = below(4) + 1;
      for (const Entry& e : list.entries)
        for_each_bit(e.live, [&](Index s) {
          if (below(share) == 0) some.insert(list.pages().position(e, s));
        });
      list.change(static_cast<std::uint16_t>(below(4) + 1), some);
    }
    ASSERT_FALSE(::testing::Test::HasFailure()) << "seed " << seed;
  }
}

}  // namespace
}  // namespace kvpare

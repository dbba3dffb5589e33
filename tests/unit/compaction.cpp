// compact_list, worked by hand and by carrying out its moves on an array of tokens.
#include <gtest/gtest.h>

#include <kvpare/cache/compaction.hpp>
#include <kvpare/core/random.hpp>
#include <map>
#include <set>
#include <vector>

namespace kvpare {
namespace {

constexpr Index page_tokens = 16;

/// A list whose rows are their positions, so that a row moved wrongly is seen.
struct List {
  std::vector<Entry> entries;
  std::vector<std::uint16_t> offsets;
  std::vector<PageGeometry> formats = std::vector<PageGeometry>(3);
  std::set<PageId> shared;
  std::map<PageId, std::vector<Position>> rows;

  List() { formats[2].rows_move = false; }

  /// A page with these positions, ids counting from 100.
  List& add(const std::vector<Position>& positions, std::uint64_t live = ~std::uint64_t{0}, std::uint16_t format = 0) {
    Entry e;
    e.page = 100 + static_cast<PageId>(entries.size()), e.format = format, e.used = static_cast<std::uint16_t>(positions.size());
    e.live = live & low_bits(e.used), e.first = positions.front(), e.last = positions.back();
    if (e.last - e.first != e.used - 1) {
      offsets.resize(offsets.size() + page_tokens, 0);
      e.offsets = static_cast<std::uint32_t>(offsets.size() / page_tokens);
      for (std::size_t t = 0; t < positions.size(); ++t)
        offsets[(e.offsets - 1) * page_tokens + t] = static_cast<std::uint16_t>(positions[t] - e.first);
    }
    entries.push_back(e);
    rows[e.page] = positions;
    rows[e.page].resize(page_tokens, -1);
    return *this;
  }
  List& add(Position first, Index count, std::uint64_t live = ~std::uint64_t{0}, std::uint16_t format = 0) {
    std::vector<Position> positions;
    for (Index t = 0; t < count; ++t) positions.push_back(first + static_cast<Position>(t));
    return add(positions, live, format);
  }

  HeadPages pages() const { return {entries, offsets.data(), formats, page_tokens}; }

  /// Compacts, carries the moves out row by row in order, and checks all that must hold of any result.
  CompactedList compact(const std::vector<std::uint64_t>& keep) {
    const CompactedList out = compact_list(pages(), keep, [&](PageId p) { return !shared.contains(p); });
    std::vector<Position> wanted;
    for (std::size_t e = 0; e < entries.size(); ++e)
      for_each_bit(entries[e].live & keep[e], [&](Index s) { wanted.push_back(pages().position(entries[e], s)); });

    for (const Move& m : out.moves) {
      EXPECT_FALSE(shared.contains(m.to) || shared.contains(m.from)) << "rows of shared pages stay";
      EXPECT_TRUE(formats[m.format].rows_move);
      for (int t = 0; t < m.count; ++t) rows[m.to][static_cast<std::size_t>(m.to_slot + t)] = rows[m.from][static_cast<std::size_t>(m.from_slot + t)];
    }
    const HeadPages after{out.entries, out.offsets.data(), formats, page_tokens};
    std::vector<Position> says, holds;
    std::set<PageId> in_use;
    for (const Entry& e : out.entries) {
      EXPECT_TRUE(in_use.insert(e.page).second);
      EXPECT_NE(e.live, 0u);
      EXPECT_EQ(e.live & ~low_bits(e.used), 0u);
      EXPECT_EQ(e.first, after.position(e, 0));
      EXPECT_EQ(e.last, after.position(e, e.used - 1));
      for_each_bit(e.live, [&](Index s) {
        says.push_back(after.position(e, s));
        holds.push_back(rows[e.page][static_cast<std::size_t>(s)]);
      });
    }
    EXPECT_EQ(says, wanted);
    EXPECT_EQ(holds, wanted) << "a row was overwritten or went astray";
    for (const Entry& e : out.released) EXPECT_TRUE(in_use.insert(e.page).second) << "released and in use";
    EXPECT_EQ(in_use.size(), entries.size()) << "every page is in use or released";
    return out;
  }
};

std::vector<PageId> pages_of(const std::vector<Entry>& entries) {
  std::vector<PageId> ids;
  for (const Entry& e : entries) ids.push_back(e.page);
  return ids;
}

using Ids = std::vector<PageId>;
constexpr std::uint64_t all = ~std::uint64_t{0};

TEST(Compaction, NothingEvictedNothingMoves) {
  const CompactedList out = List().add(0, 16).add(16, 16).add(32, 5).compact({all, all, all});
  EXPECT_TRUE(out.moves.empty() && out.released.empty());
  EXPECT_EQ(pages_of(out.entries), (Ids{100, 101, 102}));
}

TEST(Compaction, EmptyPagesGoBack) {
  const CompactedList out = List().add(0, 16).add(16, 16).add(32, 16).compact({0, all, 0});
  EXPECT_TRUE(out.moves.empty());
  EXPECT_EQ(pages_of(out.entries), Ids{101});
  EXPECT_EQ(pages_of(out.released), (Ids{100, 102}));
  const CompactedList second = List().add(0, 16).add(16, 16).compact({0, 0x00ff});
  EXPECT_TRUE(second.moves.empty()) << "an emptied page is no reason to move the rows of the next";
  EXPECT_TRUE(List().add(0, 16).compact({0}).entries.empty());
  EXPECT_TRUE(List().compact({}).entries.empty());
}

TEST(Compaction, PagesWhosePositionsInterleaveAreNotJoined) {
  // Tokens that changed their form lot by lot: the second page begins within the first.
  const CompactedList out = List()
                                .add({0, 9, 20, 31}, all, 1)
                                .add({3, 12, 25}, all, 1)
                                .add({40, 41, 42, 43}, all, 1)
                                .compact({0xb, all, 0x5});
  EXPECT_EQ(pages_of(out.entries), (Ids{100, 101}));
  EXPECT_EQ(pages_of(out.released), Ids{102});
  EXPECT_EQ(out.entries[0].first, 0);
  EXPECT_EQ(out.entries[1].first, 3);
}

TEST(Compaction, SparseNeighboursAreJoinedInTheFirstOfTheirPages) {
  const CompactedList out = List().add(0, 16).add(16, 16).add(32, 16).compact({0x00ff, 0xf00f, 0x8001});
  EXPECT_EQ(pages_of(out.entries), (Ids{100, 101}));  // 8 + 8 rows, and 2
  EXPECT_EQ(out.entries[0].live, 0xffffu);
  EXPECT_EQ(out.entries[1].live, 0b11u);
  EXPECT_EQ(pages_of(out.released), Ids{102});
  ASSERT_EQ(out.moves.size(), 4u);  // whole runs: slots 0-3 and 12-15 of page 101, 0 and 15 of 102
  EXPECT_EQ(out.moves[1].from, 101u);
  EXPECT_EQ(out.moves[1].from_slot, 12);
  EXPECT_EQ(out.moves[1].to, 100u);
  EXPECT_EQ(out.moves[1].to_slot, 12);
  EXPECT_EQ(out.moves[1].count, 4);
}

TEST(Compaction, DensePagesStayInPlaceAndPartSparseRuns) {
  const CompactedList out = List().add(0, 16).add(16, 16).add(32, 16).compact({0x000f, 0x0fff, 0x000f});  // 4, 12 of 16 and 4
  EXPECT_TRUE(out.moves.empty()) << "12 of 16 are 3/4: dense";
  EXPECT_EQ(pages_of(out.entries), (Ids{100, 101, 102}));
  EXPECT_EQ(out.entries[1].used, 16);
  EXPECT_EQ(out.entries[1].live, 0x0fffu);
}

TEST(Compaction, BelowThreeQuartersIsSparseThoughThePagesWouldBeFewEnough) {
  const CompactedList out = List().add(0, 16).add(16, 16).compact({0x07ff, 0x000f});  // 11 and 4 of 16
  EXPECT_EQ(pages_of(out.entries), Ids{100});
}

TEST(Compaction, WhenTooManyPagesAreLeftDenseOnesArePackedToo) {
  List list;
  std::vector<std::uint64_t> keep;
  for (Position e = 0; e < 12; ++e) list.add(16 * e, 16), keep.push_back(e % 2 == 0 ? 0x0fff : 0x0001);
  const CompactedList out = list.compact(keep);  // 78 tokens; in place they would take 12 pages, 8 are allowed
  EXPECT_EQ(out.entries.size(), 5u);
}

TEST(Compaction, SharedPagesOnlyLoseBits) {
  List list;
  list.add(0, 16).add(16, 16).add(32, 16).add(48, 16);
  list.shared = {101, 103};
  const CompactedList out = list.compact({0x0001, 0x0001, 0x0001, 0});
  EXPECT_TRUE(out.moves.empty());
  EXPECT_EQ(pages_of(out.entries), (Ids{100, 101, 102}));
  EXPECT_EQ(out.entries[1].used, 16);
  EXPECT_EQ(pages_of(out.released), Ids{103}) << "an empty one is let go";
}

TEST(Compaction, WithoutJoiningEveryPageStaysInPlace) {
  List list;
  list.add(0, 16, 0x0001).add(16, 16, 0x8001).add(32, 16).add(48, 16).add(64, 3);
  const CompactedList out = compact_list(list.pages(), std::vector<std::uint64_t>{1, 0xffff, 0xffff, 0, 7},
                                         [](PageId) { return true; }, Joining::none);
  EXPECT_TRUE(out.moves.empty());
  EXPECT_EQ(pages_of(out.entries), (Ids{100, 101, 102, 104})) << "sparse as they are";
  EXPECT_EQ(out.entries[1].live, 0x8001u);
  EXPECT_EQ(pages_of(out.released), Ids{103});
}

TEST(Compaction, EmptiedPagesPartNoNeighbours) {
  List list;
  list.add(0, 16).add(16, 16).add(32, 16);
  list.shared = {101};
  EXPECT_EQ(pages_of(list.compact({0x000f, 0, 0x000f}).entries), Ids{100});
}

TEST(Compaction, FormatsAreNotMixedAndSomeDoNotMove) {
  const CompactedList out = List().add(0, 16).add(16, 16).add(32, 16, all, 1).add(48, 16, all, 1).add(64, 16, all, 2).add(80, 16, all, 2)
                                .compact({1, 1, 1, 1, 1, 1});
  EXPECT_EQ(pages_of(out.entries), (Ids{100, 102, 104, 105}));
  EXPECT_EQ(out.entries[1].format, 1);
  EXPECT_EQ(out.entries[1].live, 0b11u);
  EXPECT_EQ(out.released[1].format, 1) << "released pages say what they were";
}

TEST(Compaction, PositionsAreSpeltOutWhereTheyHaveGaps) {
  const CompactedList out = List().add(0, 16).add(16, 16).compact({0x000f, 0x0003});
  ASSERT_EQ(out.entries.size(), 1u);
  EXPECT_EQ(out.entries[0].offsets, 1u);
  EXPECT_EQ(std::vector(out.offsets.begin(), out.offsets.begin() + 6), (std::vector<std::uint16_t>{0, 1, 2, 3, 16, 17}));
  EXPECT_TRUE(List().add(0, 16).add(16, 16).compact({0xff00, 0x000f}).offsets.empty()) << "8 to 19 are consecutive";
}

TEST(Compaction, BlocksOfOffsetsFollowTheirEntries) {
  List list;
  list.add({0, 2, 4, 6}).add(10, 16).add({30, 40}).add({50, 60, 70});
  list.shared = {100, 102, 103};
  const CompactedList out = list.compact({all, all, 0, all});
  ASSERT_EQ(out.entries.size(), 3u);
  EXPECT_EQ(out.entries[0].offsets, 1u);
  EXPECT_EQ(out.entries[1].offsets, 0u);
  EXPECT_EQ(out.entries[2].offsets, 2u);
  EXPECT_EQ(out.offsets.size(), 2u * page_tokens);
}

TEST(Compaction, APageSpansLessThan65536Positions) {
  EXPECT_EQ(List().add({0, 1}).add({65535, 65536}).compact({all, all}).entries.size(), 2u);
  EXPECT_EQ(List().add({0, 1}).add({65535}).compact({all, all}).entries.size(), 1u);
  const CompactedList out = List().add({5, 6}).add({65540, 65541, 65542}).compact({all, all});
  ASSERT_EQ(out.entries.size(), 2u);
  EXPECT_EQ(out.entries[0].last, 65540) << "a run is cut where the span ends";
  EXPECT_EQ(out.entries[1].first, 65541);
}

/// Any list, evictions, shared pages and formats; then again with nothing evicted: nothing changes more.
TEST(Compaction, MovesNeverOverwriteRowsThatAreStillToBeRead) {
  for (std::uint64_t seed = 0; seed < 3000; ++seed) {
    std::uint64_t at = 0;
    const auto below = [&](std::uint64_t n) { return random_bits(seed, at++) % n; };
    List list;
    std::vector<std::uint64_t> keep;
    Position next = 0;
    const std::uint64_t gap = below(3) == 0 ? 9000 : below(2) == 0 ? 1 : 4, thinning = below(4);
    for (std::uint64_t pages = 1 + below(12); pages-- > 0;) {
      std::vector<Position> positions;
      for (std::uint64_t count = below(3) == 0 ? 1 + below(page_tokens) : page_tokens; positions.size() < count;) {
        next += static_cast<Position>(1 + below(gap));
        if (!positions.empty() && next - positions[0] > 65535) break;
        positions.push_back(next);
      }
      std::uint64_t live = below(2) == 0 ? all : random_bits(seed, at++) | 1;
      list.add(positions, live | 1, static_cast<std::uint16_t>(below(8) == 0 ? 1 + below(2) : 0));
      if (below(6) == 0) list.shared.insert(list.entries.back().page);
      std::uint64_t stays = all;
      for (std::uint64_t i = 0; i < thinning; ++i) stays &= random_bits(seed, at++);
      keep.push_back(below(8) == 0 ? 0 : stays);
    }
    const CompactedList out = list.compact(keep);
    if (HasFailure()) FAIL() << "seed " << seed;

    List again;
    again.entries = out.entries, again.offsets = out.offsets, again.shared = list.shared, again.rows = list.rows;
    const CompactedList same = again.compact(std::vector<std::uint64_t>(out.entries.size(), all));
    ASSERT_TRUE(same.moves.empty() && same.released.empty()) << "seed " << seed;
    ASSERT_EQ(same.entries, out.entries) << "seed " << seed;
  }
}

}  // namespace
}  // namespace kvpare

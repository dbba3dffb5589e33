// Selection: sets of slots, worked by hand.
#include <gtest/gtest.h>

#include <kvpare/cache/selection.hpp>
#include <vector>

namespace kvpare {
namespace {

using Words = std::vector<std::uint64_t>;

TEST(Selection, UnionIntersectionAndDifferenceWorkOnWords) {
  const Selection a(Words{0b1100, 0, ~std::uint64_t{0}}), b(Words{0b1010, 0b1, std::uint64_t{1} << 63});
  Selection u = a, i = a, d = a;
  u |= b, i &= b, d -= b;
  EXPECT_EQ(u, Selection(Words{0b1110, 0b1, ~std::uint64_t{0}}));
  EXPECT_EQ(i, Selection(Words{0b1000, 0, std::uint64_t{1} << 63}));
  EXPECT_EQ(d, Selection(Words{0b0100, 0, ~(std::uint64_t{1} << 63)}));
  EXPECT_EQ(u.count(), i.count() + d.count() + 2);  // slot 1 of entry 0 and slot 0 of entry 1 are b's alone
}

TEST(Selection, InsertingTwiceIsInsertingOnce) {
  Selection s(2);
  EXPECT_EQ(s.entries(), 2);
  EXPECT_EQ(s.count(), 0);
  for (int twice = 0; twice < 2; ++twice) s.insert(1, 63), s.insert(0, 0);
  EXPECT_EQ(s.count(), 2);
  EXPECT_TRUE(s.has(1, 63) && s.has(0, 0) && !s.has(0, 63) && !s.has(1, 0));
  EXPECT_EQ(s.word(1), std::uint64_t{1} << 63);
}

TEST(Selection, NoEntriesAreASelectionToo) {
  EXPECT_EQ(Selection().entries(), 0);
  EXPECT_EQ(Selection().count(), 0);
  EXPECT_EQ(Selection::live({}), Selection());
}

TEST(Selection, LiveAndPositionsFollowTheList) {
  Entry consecutive, spread;
  consecutive.used = 4, consecutive.live = 0b1011, consecutive.first = 7, consecutive.last = 10;
  spread.used = 3, spread.live = 0b110, spread.first = 20, spread.last = 20 + 65535, spread.offsets = 2;
  const std::vector<Entry> entries{consecutive, spread};
  std::vector<std::uint16_t> offsets(32, 0xdead);
  offsets[16] = 0, offsets[17] = 9, offsets[18] = 65535;  // the second block
  const HeadPages list{entries, offsets.data(), {}, 16};
  EXPECT_EQ(list.slots(), 32);
  EXPECT_EQ(list.live_tokens(), 5);
  const Selection live = Selection::live(entries);
  EXPECT_EQ(live, Selection(Words{0b1011, 0b110}));
  EXPECT_EQ(positions_of(list, live), (std::vector<Position>{7, 8, 10, 29, 20 + 65535}));
  EXPECT_EQ(positions_of(list, Selection(Words{0b1000, 0b10})), (std::vector<Position>{10, 29}));
}

TEST(Bits, LowBitsCoverBothEnds) {
  EXPECT_EQ(low_bits(0), 0u);
  EXPECT_EQ(low_bits(1), 1u);
  EXPECT_EQ(low_bits(63), ~std::uint64_t{0} >> 1);
  EXPECT_EQ(low_bits(64), ~std::uint64_t{0});
}

}  // namespace
}  // namespace kvpare

// Columns: the tokens of a layer lined up over its heads, aligned and ragged, worked by hand.
#include <gtest/gtest.h>

#include <kvpare/cache/columns.hpp>
#include <vector>

namespace kvpare {
namespace {

using Words = std::vector<std::uint64_t>;
constexpr Index page_tokens = 16;

Entry entry(Position first, std::uint16_t used, std::uint64_t live) {
  Entry e;
  e.used = used, e.live = live, e.first = first, e.last = first + used - 1;
  return e;
}

HeadPages list(const std::vector<Entry>& entries) { return {entries, nullptr, {}, page_tokens}; }

TEST(Columns, OfAlignedHeadsAreSlots) {
  const std::vector<Entry> entries{entry(10, 4, 0b1101), entry(20, 3, 0b111)};
  const std::vector<HeadPages> heads{list(entries), list(entries)};
  const Columns c = columns_of(heads, {});
  EXPECT_TRUE(c.aligned);
  EXPECT_EQ(c.count, 16 + 3) << "no columns for what the last page has room for";
  EXPECT_EQ(c.words(), 2);
  EXPECT_EQ(c.live, std::vector<Words>{(Words{0b1101, 0b111})});
  EXPECT_EQ(c.positions[0], 10);
  EXPECT_EQ(c.positions[3], 13);
  EXPECT_EQ(c.positions[4], 13) << "unused slots repeat the last position: they ascend";
  EXPECT_EQ(c.positions[15], 13);
  EXPECT_EQ(c.positions[16], 20);
  EXPECT_EQ(c.positions[18], 22);
  EXPECT_EQ(c.to_slots(heads[1], 1, Words{0b100, 0b10}), (Words{0b100, 0b10}));
}

TEST(Columns, EqualHeadsInDifferentMemoryAreAligned) {
  std::vector<Entry> one{entry(0, 16, 0xffff)}, other = one;
  other[0].page = 7;
  EXPECT_TRUE(columns_of(std::vector{list(one), list(other)}, {}).aligned);
  other[0].live = 0xfffe;
  EXPECT_FALSE(columns_of(std::vector{list(one), list(other)}, {}).aligned);
  other = {entry(1, 16, 0xffff)};
  EXPECT_FALSE(columns_of(std::vector{list(one), list(other)}, {}).aligned);
  other = {entry(0, 16, 0xffff), entry(16, 1, 1)};
  EXPECT_FALSE(columns_of(std::vector{list(one), list(other)}, {}).aligned);
}

TEST(Columns, HeadsAlignedButForTheirOffsetsAreNot) {
  std::vector<Entry> entries{entry(0, 3, 0b111)};
  entries[0].last = 9, entries[0].offsets = 1;
  const std::vector<std::uint16_t> one{0, 1, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, same = one;
  std::vector<std::uint16_t> other = one;
  other[1] = 2;
  HeadPages a = list(entries), b = a;
  a.offsets = one.data(), b.offsets = same.data();
  const std::vector<Entry> copy = entries;
  b.entries = copy;
  EXPECT_TRUE(columns_of(std::vector{a, b}, {}).aligned);
  b.offsets = other.data();
  const Columns c = columns_of(std::vector{a, b}, {});
  EXPECT_FALSE(c.aligned);
  EXPECT_EQ(c.positions, (std::vector<Position>{0, 1, 2, 9}));
}

TEST(Columns, OfRaggedHeadsAreRanksOfPositions) {
  const std::vector<Entry> one{entry(10, 4, 0b1101)}, other{entry(11, 2, 0b11), entry(30, 2, 0b10)}, nothing;
  const std::vector<HeadPages> heads{list(one), list(other), list(nothing)};
  const Columns c = columns_of(heads, {});
  EXPECT_FALSE(c.aligned);
  EXPECT_EQ(c.positions, (std::vector<Position>{10, 11, 12, 13, 31}));
  EXPECT_EQ(c.live, (std::vector<Words>{{0b01101}, {0b10110}, {0}}));
  EXPECT_EQ(c.live_in_any(), Words{0b11111});
  EXPECT_EQ(c.of_slot[0][0], 0);
  EXPECT_EQ(c.of_slot[0][2], 2);
  EXPECT_EQ(c.of_slot[0][3], 3);
  EXPECT_EQ(c.of_slot[1][0], 1);
  EXPECT_EQ(c.of_slot[1][16 + 1], 4);
  EXPECT_EQ(c.to_slots(heads[0], 0, Words{0b11100}), Words{0b1100});
  EXPECT_EQ(c.to_slots(heads[1], 1, Words{0b11100}), (Words{0b10, 0b10}));
  EXPECT_TRUE(c.to_slots(heads[2], 2, Words{0b11111}).empty());
}

TEST(Columns, RaggedOnesMayTakeMoreWordsThanEntries) {
  std::vector<Entry> one, other;
  for (Position p = 0; p < 4; ++p) (p % 2 == 0 ? one : other).push_back(entry(16 * p, 16, 0xffff));
  const std::vector<HeadPages> heads{list(one), list(other)};
  const Columns c = columns_of(heads, {});
  EXPECT_EQ(c.count, 64);
  EXPECT_EQ(c.words(), 4);
  EXPECT_EQ(c.live_in(1)[1], 0xffffu);
  EXPECT_EQ(c.of_slot[1][17], 49);
}

TEST(Columns, CarryClassAndProtectionOfTheirPositions) {
  Tags tags;
  tags.add({.begin = 11, .end = 13, .token_class = TokenClass::image});
  tags.add({.begin = 21, .end = 40, .token_class = TokenClass::audio, .is_protected = true});
  const std::vector<Entry> entries{entry(10, 4, 0b1101), entry(20, 3, 0b111)};
  const Columns c = columns_of(std::vector{list(entries)}, tags);
  EXPECT_EQ(c.of_class(visual)[0] & c.live[0][0], 0b0100u);
  EXPECT_EQ(c.of_class(text)[0] & c.live[0][0], 0b1001u);
  EXPECT_EQ(c.of_class(TokenClass::audio)[1], 0b110u);
  EXPECT_EQ(c.is_protected[1], 0b110u);
  EXPECT_EQ(c.is_protected[0], 0u);
}

TEST(Columns, AreFoundByPosition) {
  const std::vector<Entry> entries{entry(10, 4, 0b1101), entry(20, 3, 0b111)};
  const Columns c = columns_of(std::vector{list(entries)}, {});
  EXPECT_EQ(c.at({{0, 11}, {12, 13}, {21, 50}}), (Words{0b0101, 0b110}));
  EXPECT_EQ(c.at({{14, 20}, {23, 30}}), (Words{0, 0}));
  EXPECT_EQ(c.at({}), (Words{0, 0}));
}

TEST(Columns, OfAnEmptyLayerAreNone) {
  const std::vector<Entry> nothing;
  const Columns c = columns_of(std::vector{list(nothing), list(nothing)}, {});
  EXPECT_TRUE(c.aligned);
  EXPECT_EQ(c.count, 0);
  EXPECT_EQ(c.words(), 0);
}

}  // namespace
}  // namespace kvpare

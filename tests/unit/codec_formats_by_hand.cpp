// Rows of ggml's block formats against bytes worked out by hand from the documented layout: scale first, then what the
// type adds, byte j of the codes holding elements j and j + 16. Each block is chosen so that its arithmetic can be done
// in one's head; the comment beside it does it.
#include <gtest/gtest.h>

#include <functional>

#include "oracle/ggml_rows.hpp"

namespace kvpare {
namespace {

using oracle::Bytes;
using oracle::Ggml;
using Row = std::vector<float>;

Bytes coded(Ggml type, const Row& x) { return oracle::ggml_row(type, x); }
std::vector<double> decoded(Ggml type, const Bytes& bytes) { return oracle::ggml_values(type, bytes); }

/// Numbers by element.
Row block_of(const std::function<float(int)>& x) {
  Row row;
  for (int i = 0; i < 32; ++i) row.push_back(x(i));
  return row;
}
Row with(Row row, const std::vector<std::pair<std::size_t, float>>& changes) {
  for (const auto& [i, x] : changes) row.at(i) = x;
  return row;
}
Bytes joined(const std::vector<Bytes>& parts) {
  Bytes all;
  for (const Bytes& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}
Bytes repeated(std::uint8_t byte, std::size_t count) { return Bytes(count, byte); }

void expect_values(Ggml type, const Bytes& bytes, const Row& want) {
  const std::vector<double> got = decoded(type, bytes);
  ASSERT_EQ(got.size(), want.size());
  for (std::size_t i = 0; i < got.size(); ++i) EXPECT_EQ(got[i], static_cast<double>(want[i])) << "at " << i;
}

// Codes 0 … 15 in the first half, 15 … 0 in the second: byte j = j | (15 - j) << 4.
const Bytes crossing{0xf0, 0xe1, 0xd2, 0xc3, 0xb4, 0xa5, 0x96, 0x87, 0x78, 0x69, 0x5a, 0x4b, 0x3c, 0x2d, 0x1e, 0x0f};
int crossing_code(int i) { return i < 16 ? i : 31 - i; }

// 5-bit codes 0, 16, 1, 17, 2 …: element i has i / 2, and the fifth bit where i is odd. Byte j = j / 2 | (8 + j / 2) <<
// 4.
const Bytes odd_high_bits{0xaa, 0xaa, 0xaa, 0xaa};
const Bytes pairs{0x80, 0x80, 0x91, 0x91, 0xa2, 0xa2, 0xb3, 0xb3, 0xc4, 0xc4, 0xd5, 0xd5, 0xe6, 0xe6, 0xf7, 0xf7};
int pair_code(int i) { return i / 2 + (i % 2 == 1 ? 16 : 0); }

// ---- q8_0: d, 32 signed bytes -------------------------------------------------------------------------------------

TEST(Q8_0ByHand, WholeNumbersAreTheirOwnCodes) {
  // amax = 127: d = 1 = 0x3c00; -127 = 0x81
  const Row x = with(block_of([](int i) { return static_cast<float>(i); }), {{0, -127.0f}, {31, -2.0f}});
  const Bytes want = joined({{0x00, 0x3c, 0x81},
                             {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
                             {16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 0xfe}});
  EXPECT_EQ(coded(Ggml::q8_0, x), want);
  expect_values(Ggml::q8_0, want, x);
}

TEST(Q8_0ByHand, HalvesGoAwayFromZero) {
  const Row x = with(Row(32, 0.0f), {{0, 127.0f}, {1, 2.5f}, {2, -2.5f}, {3, .5f}, {4, -.5f}, {5, .4f}});
  EXPECT_EQ(coded(Ggml::q8_0, x), joined({{0x00, 0x3c, 0x7f, 3, 0xfd, 1, 0xff}, repeated(0, 27)}));
}

TEST(Q8_0ByHand, TheScaleDividesBeforeItIsRounded) {
  // d = 1 + 2^-11 lies between the halves 1 and 1 + 2^-10 and becomes 1; 1.5 / (1 + 2^-11) = 1.4993 gives 1, 1.5 / 1
  // gave 2
  const Bytes row = coded(Ggml::q8_0, with(Row(32, 0.0f), {{0, 127 * (1 + 0x1p-11f)}, {1, 1.5f}, {2, -1.5f}}));
  EXPECT_EQ(row, joined({{0x00, 0x3c, 0x7f, 1, 0xff}, repeated(0, 29)}));
}

TEST(Q8_0ByHand, BytesThatNoEncoderWrites) {
  // d = 0.5 = 0x3800; 0x80 = -128
  const Bytes row = joined({{0x00, 0x38, 0x80, 0x7f}, repeated(1, 30)});
  expect_values(Ggml::q8_0, row, with(Row(32, .5f), {{0, -64.0f}, {1, 63.5f}}));
}

// ---- q4_0: d, 16 bytes --------------------------------------------------------------------------------------------

TEST(Q4_0ByHand, LowNibblesAreTheFirstHalf) {
  // the extreme is -8: d = 1, q = x + 8
  const Row x = block_of([](int i) { return static_cast<float>(crossing_code(i) - 8); });
  const Bytes want = joined({{0x00, 0x3c}, crossing});
  EXPECT_EQ(coded(Ggml::q4_0, x), want);
  expect_values(Ggml::q4_0, want, x);
}

TEST(Q4_0ByHand, TheExtremeWithItsSign) {
  // 8 comes first: d = -1 = 0xbc00, q = trunc(8.5 - x); 8 -> 0, 0 -> 8, -7 -> 15, and -8 -> 16, held at 15, which is -7
  const Bytes positive = joined({{0x00, 0xbc, 0x80, 0x8f, 0x8f}, repeated(0x88, 13)});
  EXPECT_EQ(coded(Ggml::q4_0, with(Row(32, 0.0f), {{0, 8.0f}, {1, -7.0f}, {2, -8.0f}})), positive);
  expect_values(Ggml::q4_0, positive, with(Row(32, 0.0f), {{0, 8.0f}, {1, -7.0f}, {2, -7.0f}}));
  // -8 comes first: d = 1; 8 -> 16, held at 15, which is 7
  const Bytes negative = joined({{0x00, 0x3c, 0x80, 0x8f}, repeated(0x88, 14)});
  EXPECT_EQ(coded(Ggml::q4_0, with(Row(32, 0.0f), {{0, -8.0f}, {1, 8.0f}})), negative);
}

TEST(Q4_0ByHand, HalvesAreTruncatedAfterTheShift) {
  // d = 1: 0.5 + 8.5 = 9, -0.5 + 8.5 = 8, -1.5 + 8.5 = 7, 0.49 + 8.5 = 8.99 -> 8
  const Row x = with(Row(32, 0.0f), {{0, -8.0f}, {16, .5f}, {1, -.5f}, {17, -1.5f}, {2, .49f}});
  EXPECT_EQ(coded(Ggml::q4_0, x), joined({{0x00, 0x3c, 0x90, 0x78, 0x88}, repeated(0x88, 13)}));
}

TEST(Q4_0ByHand, ZerosHaveANegativeScale) {
  // d = 0 / -8 = -0 = 0x8000, 1 / d = 0, q = trunc(8.5) = 8
  const Bytes want = joined({{0x00, 0x80}, repeated(0x88, 16)});
  EXPECT_EQ(coded(Ggml::q4_0, Row(32, 0.0f)), want);
  expect_values(Ggml::q4_0, want, Row(32, 0.0f));
}

// ---- q4_1: d, m, 16 bytes -----------------------------------------------------------------------------------------

TEST(Q4_1ByHand, MinimumAndScale) {
  // -8 … 7: d = 15 / 15 = 1, m = -8 = 0xc800
  const Row x = block_of([](int i) { return static_cast<float>(crossing_code(i) - 8); });
  const Bytes want = joined({{0x00, 0x3c, 0x00, 0xc8}, crossing});
  EXPECT_EQ(coded(Ggml::q4_1, x), want);
  expect_values(Ggml::q4_1, want, x);
}

TEST(Q4_1ByHand, HalvesUpAndEqualNumbers) {
  // 0 … 15: d = 1, m = 0; 0.5 -> 1, 1.5 -> 2, 1.49 -> 1
  const Row x = with(Row(32, 0.0f), {{0, 15.0f}, {1, .5f}, {17, 1.5f}, {2, 1.49f}});
  EXPECT_EQ(coded(Ggml::q4_1, x), joined({{0x00, 0x3c, 0x00, 0x00, 0x0f, 0x21, 0x01}, repeated(0, 13)}));
  // all 3: d = 0, m = 3 = 0x4200, q = trunc(0.5) = 0
  const Bytes flat = joined({{0x00, 0x00, 0x00, 0x42}, repeated(0, 16)});
  EXPECT_EQ(coded(Ggml::q4_1, Row(32, 3.0f)), flat);
  expect_values(Ggml::q4_1, flat, Row(32, 3.0f));
}

// ---- q5_0: d, qh, 16 bytes ----------------------------------------------------------------------------------------

TEST(Q5_0ByHand, FifthBitsBeforeTheNibbles) {
  // the extreme is -16: d = 1, q = x + 16
  const Row x = block_of([](int i) { return static_cast<float>(pair_code(i) - 16); });
  const Bytes want = joined({{0x00, 0x3c}, odd_high_bits, pairs});
  EXPECT_EQ(coded(Ggml::q5_0, x), want);
  expect_values(Ggml::q5_0, want, x);
  // codes 0 … 31 in order: bits 16 … 31 of qh, little-endian; byte j = j | j << 4
  Bytes twice;
  for (int j = 0; j < 16; ++j) twice.push_back(static_cast<std::uint8_t>(17 * j));
  EXPECT_EQ(coded(Ggml::q5_0, block_of([](int i) { return static_cast<float>(i - 16); })),
            joined({{0x00, 0x3c, 0x00, 0x00, 0xff, 0xff}, twice}));
}

TEST(Q5_0ByHand, HeldAtThirtyOneAndZeros) {
  // 16 comes first: d = -1; 16 -> 0, -16 -> 32, held at 31 = 1 and 0xf; the rest 16 = 1 and 0x0. qh: all but bit 0
  const Bytes want = joined({{0x00, 0xbc, 0xfe, 0xff, 0xff, 0xff, 0x00, 0x0f}, repeated(0, 14)});
  EXPECT_EQ(coded(Ggml::q5_0, with(Row(32, 0.0f), {{0, 16.0f}, {1, -16.0f}})), want);
  expect_values(Ggml::q5_0, want, with(Row(32, 0.0f), {{0, 16.0f}, {1, -15.0f}}));
  EXPECT_EQ(coded(Ggml::q5_0, Row(32, 0.0f)), joined({{0x00, 0x80, 0xff, 0xff, 0xff, 0xff}, repeated(0, 16)}));
}

// ---- q5_1: d, m, qh, 16 bytes -------------------------------------------------------------------------------------

TEST(Q5_1ByHand, MinimumThenFifthBits) {
  // -0.5 … 30.5: d = 31 / 31 = 1, m = -0.5 = 0xb800
  const Row x = block_of([](int i) { return static_cast<float>(pair_code(i)) - .5f; });
  const Bytes want = joined({{0x00, 0x3c, 0x00, 0xb8}, odd_high_bits, pairs});
  EXPECT_EQ(coded(Ggml::q5_1, x), want);
  expect_values(Ggml::q5_1, want, x);
  const Bytes flat = joined({{0x00, 0x00, 0x00, 0x42}, repeated(0, 20)});
  EXPECT_EQ(coded(Ggml::q5_1, Row(32, 3.0f)), flat);
}

// ---- iq4_nl: d, 16 bytes ------------------------------------------------------------------------------------------

TEST(Iq4NlByHand, LevelsAreTheirOwnCodes) {
  // v = -127: x / d0 = x; the refit of exact codes is 1
  const std::vector<float> levels{-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  const Row x = block_of([&](int i) { return levels.at(static_cast<std::size_t>(crossing_code(i))); });
  const Bytes want = joined({{0x00, 0x3c}, crossing});
  EXPECT_EQ(coded(Ggml::iq4_nl, x), want);
  expect_values(Ggml::iq4_nl, want, x);
}

TEST(Iq4NlByHand, APositiveExtremeTurnsTheScale) {
  // v = 127: d0 = -1, 127 / d0 = -127 is code 0; zeros are nearest to level 1, code 8. d = 127^2 · -127 · 127 / 127^4 =
  // -1
  const Bytes want = joined({{0x00, 0xbc, 0x80}, repeated(0x88, 15)});
  EXPECT_EQ(coded(Ggml::iq4_nl, with(Row(32, 0.0f), {{0, 127.0f}})), want);
  expect_values(Ggml::iq4_nl, want, with(Row(32, -1.0f), {{0, 127.0f}}));
}

TEST(Iq4NlByHand, TiesGoUpAndTheScaleIsRefitted) {
  // d0 = 1. -115.5 lies between -127 and -104, 7 between 1 and 13: the upper ones, codes 1 and 9.
  // d = (127^4 + 115.5^2 · 104 · 115.5 + 49 · 13 · 7) / (127^4 + 115.5^2 · 104^2 + 49 · 13^2)
  //   = 420392183 / 404441066 = 1.03944; in steps of 2^-10 above 1: 40.39, so 0x3c00 + 40
  const Row x = with(Row(32, 0.0f), {{0, -127.0f}, {1, -115.5f}, {2, 7.0f}});
  EXPECT_EQ(coded(Ggml::iq4_nl, x), joined({{0x28, 0x3c, 0x80, 0x81, 0x89}, repeated(0x88, 13)}));
}

// ---- all ----------------------------------------------------------------------------------------------------------

TEST(GgmlByHand, BlocksFollowEachOther) {
  for (const Ggml type : oracle::all_ggml) {
    const Row first(32, 3.0f), second = block_of([](int i) { return static_cast<float>(i) - 20; });
    Row both = first;
    both.insert(both.end(), second.begin(), second.end());
    EXPECT_EQ(coded(type, both), joined({coded(type, first), coded(type, second)}));
    const std::vector<std::size_t> bytes{34, 18, 20, 22, 24, 18};
    EXPECT_EQ(coded(type, both).size(), 2 * bytes.at(static_cast<std::size_t>(type)));
  }
}

TEST(GgmlByHand, ScalesOfAnySize) {
  // subnormal scale: 127 · 2^-24 / 127 = 2^-24 = 0x0001; the smallest step that half precision has
  const auto one = [](float x) { return coded(Ggml::q8_0, with(Row(32, 0.0f), {{0, x}})); };
  EXPECT_EQ(one(127 * 0x1p-24f), joined({{0x01, 0x00, 0x7f}, repeated(0, 31)}));
  // below it the scale is lost though the code is there: 2^-26 -> 0
  const Bytes lost = joined({{0x00, 0x00, 0x7f}, repeated(0, 31)});
  EXPECT_EQ(one(127 * 0x1p-26f), lost);
  expect_values(Ggml::q8_0, lost, Row(32, 0.0f));
  // above 65504 it is infinite: 127 · 2^16 -> 0x7c00
  EXPECT_EQ(one(127 * 0x1p16f), joined({{0x00, 0x7c, 0x7f}, repeated(0, 31)}));
}

// ---- MXFP4: e, 16 bytes -------------------------------------------------------------------------------------------

TEST(Mxfp4ByHand, LevelsTiesAndSaturation) {
  const auto bytes = [](const std::vector<double>& x, oracle::Ties ties) {
    return oracle::mxfp4_bytes(oracle::mxfp4_block(x, ties));
  };
  std::vector<double> x{0, .5, 1, 1.5, 2, 3, 4, 6, 0, -.5, -1, -1.5, -2, -3, -4, -6};
  x.resize(32, 6.0);
  // amax = 6: e = 2 - 2 + 127; codes 0 … 7 and, with the sign's bit, 9 … 15
  const Bytes want{0x7f, 0x70, 0x71, 0x72, 0x73, 0x74, 0x75, 0x76, 0x77,
                   0x70, 0x79, 0x7a, 0x7b, 0x7c, 0x7d, 0x7e, 0x7f};
  EXPECT_EQ(bytes(x, oracle::Ties::even), want);
  EXPECT_EQ(bytes(x, oracle::Ties::first), want);
  EXPECT_EQ(oracle::mxfp4_values(want), x);
  // 7.9 saturates at 6; 0.75 and 3.5 are ties; 2^-3 the scale of amax = 0.5 … 0.999
  std::vector<double> ties(32, 0.0);
  ties[0] = 7.9, ties[1] = .75, ties[17] = 3.5;
  EXPECT_EQ(bytes(ties, oracle::Ties::even), joined({{0x7f, 0x07, 0x62}, repeated(0, 14)}));
  EXPECT_EQ(bytes(ties, oracle::Ties::first), joined({{0x7f, 0x07, 0x51}, repeated(0, 14)}));
  EXPECT_EQ(bytes(std::vector<double>(32, .75), oracle::Ties::even), joined({{0x7c}, repeated(0x77, 16)}));
}

}  // namespace
}  // namespace kvpare

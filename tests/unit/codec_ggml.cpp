// ggml's block formats: worked bytes, a textbook of its encoders, rows in and out.
#include "kvpare/codec/ggml.hpp"

#include <gtest/gtest.h>

#include <limits>

#include "support/codec_tiles.hpp"

namespace kvpare {
namespace {

using test::GuardedTile;

std::vector<float> ramp() {
  std::vector<float> x;
  for (int i = 0; i < 32; ++i) x.push_back(static_cast<float>(i - 16) / 8);
  return x;
}

template <class C>
std::vector<int> ggml_bytes(const std::vector<float>& row) {
  const auto width = static_cast<Index>(row.size());
  GuardedTile<C> tile({1, width});
  tile.encode(row);
  std::vector<std::byte> out(static_cast<std::size_t>(ggml_row_bytes<C>(width)) + 2, std::byte{0x77});
  to_ggml<C>(width, tile.tile(), out.data() + 1);
  EXPECT_EQ(out.front(), std::byte{0x77});
  EXPECT_EQ(out.back(), std::byte{0x77});
  std::vector<int> bytes;
  for (std::size_t i = 1; i + 1 < out.size(); ++i) bytes.push_back(std::to_integer<int>(out[i]));
  return bytes;
}
template <class C>
std::vector<float> decoded(const std::vector<float>& row) {
  GuardedTile<C> tile({1, static_cast<Index>(row.size())});
  tile.encode(row);
  return tile.decode(0);
}
int word(const std::vector<int>& bytes, std::size_t at) { return bytes[at] | bytes[at + 1] << 8; }
std::vector<int> tail(const std::vector<int>& bytes, std::size_t n) {
  return {bytes.end() - static_cast<long>(n), bytes.end()};
}

static_assert(ggml_row_bytes<Q8_0>(128) == 136 && ggml_row_bytes<Q5_1>(128) == 96 && ggml_row_bytes<Q5_0>(128) == 88);
static_assert(ggml_row_bytes<Q4_1>(128) == 80 && ggml_row_bytes<Q4_0>(128) == 72 && ggml_row_bytes<Iq4Nl>(128) == 72);
static_assert(ggml_row_bytes<NvFp4<>>(128) == 72 && ggml_row_bytes<MxFp4<>>(128) == 68);
static_assert(ggml_row_bytes<Q2_0>(128) == 36 && ggml_row_bytes<Q1_0>(128) == 18);
static_assert(!ggml_fits<Q8_0>(8) && !ggml_fits<Q8_0>(80) && ggml_fits<Q8_0>(96),
              "heads narrower than a block are out");
static_assert(!ggml_fits<NvFp4<>>(80) && NvFp4<>::fits({1, 80}),
              "our rows of nvfp4 may end between two blocks of ggml");
static_assert(detail::GgmlBlock<Q5_1>::bytes == 24 && detail::GgmlBlock<NvFp4<>>::bytes == 36 &&
              detail::GgmlBlock<MxFp4<>>::bytes == 17 && detail::GgmlBlock<Q1_0>::bytes == 18);

TEST(Ggml, RampQ8_0) {
  const auto bytes = ggml_bytes<Q8_0>(ramp());
  EXPECT_EQ(word(bytes, 0), 0x2408);
  const auto q = [&](std::size_t i) { return static_cast<int>(static_cast<std::int8_t>(bytes[2 + i])); };
  EXPECT_EQ((std::vector<int>{q(0), q(1), q(2), q(3), q(30), q(31)}),
            (std::vector<int>{-127, -119, -111, -103, 111, 119}));
  EXPECT_FLOAT_EQ(decoded<Q8_0>(ramp())[0], -1.9998779f);
  EXPECT_FLOAT_EQ(decoded<Q8_0>(ramp())[31], 1.8739014f);
}
TEST(Ggml, RampQ4_0) {
  const auto bytes = ggml_bytes<Q4_0>(ramp());
  EXPECT_EQ(word(bytes, 0), 0x3400);
  EXPECT_EQ(tail(bytes, 16), (std::vector<int>{0x80, 0x91, 0x91, 0xa2, 0xa2, 0xb3, 0xb3, 0xc4, 0xc4, 0xd5, 0xd5, 0xe6,
                                               0xe6, 0xf7, 0xf7, 0xf8}));
  EXPECT_EQ(decoded<Q4_0>(ramp())[0], -2);
  EXPECT_EQ(decoded<Q4_0>(ramp())[31], 1.75f);
}
TEST(Ggml, RampQ4_1) {
  const auto bytes = ggml_bytes<Q4_1>(ramp());
  EXPECT_EQ(word(bytes, 0), 0x3422);
  EXPECT_EQ(word(bytes, 2), 0xc000);
  EXPECT_EQ(bytes[4], 0x80);
  EXPECT_EQ(bytes[19], 0xf7);
}
TEST(Ggml, RampQ5) {
  const auto q5_0 = ggml_bytes<Q5_0>(ramp());
  EXPECT_EQ(word(q5_0, 0), 0x3000);
  EXPECT_EQ(word(q5_0, 2), 0);
  EXPECT_EQ(word(q5_0, 4), 0xffff);
  EXPECT_EQ(q5_0[6], 0x00);
  const auto q5_1 = ggml_bytes<Q5_1>(ramp());
  EXPECT_EQ(word(q5_1, 0), 0x3000);
  EXPECT_EQ(word(q5_1, 2), 0xc000);
  for (int j = 0; j < 16; ++j) {
    EXPECT_EQ(q5_0[static_cast<std::size_t>(6 + j)], j | j << 4);
    EXPECT_EQ(q5_1[static_cast<std::size_t>(8 + j)], j | j << 4);
  }
  EXPECT_EQ(decoded<Q5_1>(ramp()), ramp());
  EXPECT_EQ(decoded<Q5_0>(ramp()), ramp());
}
TEST(Ggml, RampIq4Nl) {
  std::uint8_t codes[32];
  const auto x = ramp();
  const GroupBits bits = Iq4Nl::quantize(x.data(), 1, 32, nullptr, codes, 1);
  EXPECT_EQ(std::vector<int>(codes, codes + 32),
            (std::vector<int>{0, 0, 1, 1,  1,  2,  2,  3,  3,  4,  4,  5,  5,  6,  7,  7,
                              8, 9, 9, 10, 11, 11, 12, 12, 13, 13, 14, 14, 14, 15, 15, 15}));
  EXPECT_EQ(bits.scale, 0x23fau);
  EXPECT_NEAR(decoded<Iq4Nl>(x)[0], -1.9785614f, 2e-7f);
  EXPECT_NEAR(decoded<Iq4Nl>(x)[31], 1.7604523f, 2e-7f);
  const auto bytes = ggml_bytes<Iq4Nl>(x);
  EXPECT_EQ(word(bytes, 0), 0x23fa);
  EXPECT_EQ(bytes[2], 0x80);
  EXPECT_EQ(bytes[17], 0xf7);
}
TEST(Ggml, MxFp4Block) {
  std::vector<float> row(32, 0.0f);
  row[0] = 0.3f, row[1] = -1, row[2] = 2.2f, row[3] = 7, row[16] = 4;
  const auto bytes = ggml_bytes<MxFp4<Ties::down>>(row);
  EXPECT_EQ(std::vector<int>(bytes.begin(), bytes.begin() + 5), (std::vector<int>{127, 0x61, 10, 4, 7}));
}
TEST(Ggml, NvFp4Block) {
  std::vector<float> row(64, 0.0f);
  row[0] = 6, row[8] = -3, row[17] = 12, row[63] = -1.5f;  // scales 1, 2, 0, 0.25
  const auto bytes = ggml_bytes<NvFp4<Ties::down>>(row);
  std::vector<int> want(36, 0);
  want[0] = 0x38, want[1] = 0x40, want[3] = 0x28;
  want[4 + 0] = 0x7 | 0xd << 4, want[4 + 8 + 1] = 0x7, want[4 + 24 + 7] = 0xf << 4;
  EXPECT_EQ(bytes, want);
}
TEST(Ggml, FewBits) {
  std::vector<float> row(64, 0.0f);
  row[0] = 2, row[1] = -2, row[2] = 1, row[3] = -0.9f, row[5] = -1;
  const auto two = ggml_bytes<Q2_0>(row);
  EXPECT_EQ(word(two, 0), 0x4000);
  EXPECT_EQ(two[2], 2 | 0 << 2 | 2 << 4 | 1 << 6);
  EXPECT_EQ(two[3], 1 | 0 << 2 | 1 << 4 | 1 << 6);
  std::vector<float> signs(128, 1.0f);
  signs[1] = -3, signs[9] = -1, signs[10] = 0;
  const auto one = ggml_bytes<Q1_0>(signs);
  EXPECT_EQ(word(one, 0), half((125.0f + 4) / 128).bits);
  EXPECT_EQ(one[2], 0xfd);
  EXPECT_EQ(one[3], 0xfd);
  EXPECT_EQ(one[4], 0xff);
}

// ---- a textbook: ggml's reference encoders, as blocks --------------------------------------------------------------

void put_half(std::vector<int>& to, float x) { to.push_back(half(x).bits & 255), to.push_back(half(x).bits >> 8); }
std::vector<int> textbook_0(const float* x, int bits) {  // q4_0, q5_0
  float amax = 0, max = 0;
  for (int j = 0; j < 32; ++j)
    if (amax < std::fabs(x[j])) amax = std::fabs(x[j]), max = x[j];
  const int mid = 1 << (bits - 1);
  const float d = max / static_cast<float>(-mid), id = d != 0 ? 1 / d : 0;
  std::vector<int> block;
  put_half(block, d);
  int q[32];
  for (int j = 0; j < 32; ++j)
    q[j] = std::min(2 * mid - 1, static_cast<int>(x[j] * id + (static_cast<float>(mid) + 0.5f)));
  if (bits == 5)
    for (int k = 0; k < 4; ++k) {
      int byte = 0;
      for (int i = 0; i < 8; ++i) byte |= (q[8 * k + i] >> 4) << i;
      block.push_back(byte);
    }
  for (int j = 0; j < 16; ++j) block.push_back((q[j] & 15) | (q[j + 16] & 15) << 4);
  return block;
}
std::vector<int> textbook_1(const float* x, int bits) {  // q4_1, q5_1
  float low = x[0], high = x[0];
  for (int j = 1; j < 32; ++j) low = std::min(low, x[j]), high = std::max(high, x[j]);
  const int top = (1 << bits) - 1;
  const float d = (high - low) / static_cast<float>(top), id = d != 0 ? 1 / d : 0;
  std::vector<int> block;
  put_half(block, d), put_half(block, low);
  int q[32];
  for (int j = 0; j < 32; ++j) q[j] = std::min(top, static_cast<int>((x[j] - low) * id + 0.5f));
  if (bits == 5)
    for (int k = 0; k < 4; ++k) {
      int byte = 0;
      for (int i = 0; i < 8; ++i) byte |= (q[8 * k + i] >> 4) << i;
      block.push_back(byte);
    }
  for (int j = 0; j < 16; ++j) block.push_back((q[j] & 15) | (q[j + 16] & 15) << 4);
  return block;
}
std::vector<int> textbook_q8_0(const float* x) {
  float amax = 0;
  for (int j = 0; j < 32; ++j) amax = std::max(amax, std::fabs(x[j]));
  const float d = amax / 127, id = d != 0 ? 1 / d : 0;
  std::vector<int> block;
  put_half(block, d);
  for (int j = 0; j < 32; ++j) block.push_back(static_cast<int>(std::round(x[j] * id)) & 255);
  return block;
}
std::vector<int> textbook_mxfp4(const float* x) {
  float amax = 0;
  for (int j = 0; j < 32; ++j) amax = std::max(amax, std::fabs(x[j]));
  const int e = amax > 0 ? static_cast<int>(std::floor(std::log2(amax))) - 2 + 127 : 0;
  const float d = std::ldexp(1.0f, e - 128);  // half of the scale, for twice the values
  const float values[] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  const auto best = [&](float v) {
    int index = 0;
    for (int i = 1; i < 16; ++i)
      if (std::fabs(values[i] * d - v) < std::fabs(values[index] * d - v)) index = i;
    return index;
  };
  std::vector<int> block = {e};
  for (int j = 0; j < 16; ++j) block.push_back(best(x[j]) | best(x[j + 16]) << 4);
  return block;
}
template <class C, class Textbook>
void expect_textbook(Textbook textbook) {
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    auto x = test::gaussians(seed, 64);
    for (float& v : x) {
      if (seed % 4 == 1) v = std::round(v * 4) / 4;  // many ties
      if (seed % 4 == 2) v *= 1e-6f;                 // scales that are subnormal halves
      if (seed % 4 == 3) v = v * 0.1f + 100;
    }
    std::vector<int> want = textbook(x.data());
    const std::vector<int> second = textbook(x.data() + 32);
    want.insert(want.end(), second.begin(), second.end());
    ASSERT_EQ(ggml_bytes<C>(x), want) << C::name << " seed " << seed;
  }
}
TEST(Ggml, EncodersAreGgmlsToTheBit) {
  expect_textbook<Q8_0>(textbook_q8_0);
  expect_textbook<Q4_0>([](const float* x) { return textbook_0(x, 4); });
  expect_textbook<Q5_0>([](const float* x) { return textbook_0(x, 5); });
  expect_textbook<Q4_1>([](const float* x) { return textbook_1(x, 4); });
  expect_textbook<Q5_1>([](const float* x) { return textbook_1(x, 5); });
  expect_textbook<MxFp4<Ties::down>>(textbook_mxfp4);
}

TEST(Ggml, TiesGoWhereGgmlSendsThem) {
  std::vector<float> x(32, 0.0f);
  const float eight[] = {127, 0.5f, 1.5f, 2.5f, -0.5f, -2.5f};
  std::copy(std::begin(eight), std::end(eight), x.begin());
  const auto bytes = ggml_bytes<Q8_0>(x);
  EXPECT_EQ(std::vector<int>(bytes.begin() + 2, bytes.begin() + 9), (std::vector<int>{127, 1, 2, 3, 255, 253, 0}));
  // d0 = 1: midway between -10 and 1, -22 and -10, 89 and 113.
  std::vector<float> y(32, 1.0f);
  y[0] = -127, y[1] = -4.5f, y[2] = -16, y[3] = 101, y[4] = 113, y[5] = 120, y[6] = -126;
  std::uint8_t codes[32];
  Iq4Nl::quantize(y.data(), 1, 32, nullptr, codes, 1);
  EXPECT_EQ(std::vector<int>(codes, codes + 8), (std::vector<int>{0, 8, 7, 15, 15, 15, 0, 8}));
}

// ---- laws -----------------------------------------------------------------------------------------------------------

template <class C>
class GgmlCodecs : public ::testing::Test {};
using All = ::testing::Types<Q8_0, Q5_1, Q5_0, Q4_1, Q4_0, Iq4Nl, Q2_0, Q1_0, MxFp4<Ties::even>, MxFp4<Ties::down>,
                             NvFp4<Ties::even>, NvFp4<Ties::down>>;
TYPED_TEST_SUITE(GgmlCodecs, All);

TYPED_TEST(GgmlCodecs, AnyBytesGoOutAndComeBack) {
  using C = TypeParam;
  for (const Index width : {Index{128}, Index{256}}) {
    const auto n = static_cast<std::size_t>(ggml_row_bytes<C>(width));
    EXPECT_EQ(n, static_cast<std::size_t>(width / ggml_block<C> * detail::GgmlBlock<C>::bytes));
    for (std::uint64_t seed = 0; seed < 20; ++seed) {
      std::vector<std::byte> ggml(n), ours(n + 2, std::byte{0x33}), back(n + 2, std::byte{0x44});
      for (std::size_t i = 0; i < n; ++i) ggml[i] = static_cast<std::byte>(random_bits(seed, i) & 255);
      from_ggml<C>(width, ggml.data(), ours.data() + 1);
      to_ggml<C>(width, ours.data() + 1, back.data() + 1);
      EXPECT_TRUE(std::equal(ggml.begin(), ggml.end(), back.begin() + 1)) << C::name;
      EXPECT_TRUE(ours.front() == std::byte{0x33} && ours.back() == std::byte{0x33});
      EXPECT_TRUE(back.front() == std::byte{0x44} && back.back() == std::byte{0x44});
    }
  }
}

TYPED_TEST(GgmlCodecs, RowsMoveAndAnythingDecodes) {
  using C = TypeParam;
  test::expect_rows_move<C>({16, 256});
  test::expect_strides_do_not_matter<C>(C::form.group);
  test::expect_decodes_anything<C>({16, 256}, {2.0f});
}

TYPED_TEST(GgmlCodecs, NumbersThatHurt) {
  using C = TypeParam;
  const float inf = std::numeric_limits<float>::infinity(), nan_value = std::numeric_limits<float>::quiet_NaN();
  const auto calm = test::gaussians(3, 256);
  const auto before = decoded<C>(calm);
  for (const float bad : {nan_value, inf, -inf, std::numeric_limits<float>::max(), 1e-45f, 1e20f}) {
    auto rows = calm;
    rows[140] = bad;
    const auto y = decoded<C>(rows);
    for (std::size_t c = 0; c < 256; ++c) {
      ASSERT_TRUE(std::isfinite(y[c])) << C::name << ' ' << bad;
      if (static_cast<Index>(c) / C::form.group != 140 / C::form.group) {
        ASSERT_EQ(y[c], before[c]) << C::name;
      }
    }
  }
  EXPECT_EQ(decoded<C>(std::vector<float>(256, 0.0f)), std::vector<float>(256, 0.0f));
  for (const float tiny : {1e-45f, 1e-40f, 1e-38f, 1e-30f})
    for (const float y : decoded<C>(std::vector<float>(256, tiny))) EXPECT_LE(std::abs(y), 1.4f * tiny) << C::name;
}

TEST(Ggml, ErrorsOfTheOnesWithTheirOwnRules) {
  const auto x = test::gaussians(8, 64 * 100);
  for (Index b = 0; b < 100; ++b) {
    const std::vector<float> row(x.begin() + b * 64, x.begin() + (b + 1) * 64);
    float amax = 0;
    for (const float v : row) amax = std::max(amax, std::abs(v));
    const auto two = decoded<Q2_0>(row);
    for (std::size_t c = 0; c < 64; ++c) ASSERT_LE(std::abs(two[c] - row[c]), amax * 0.501f);
    const auto nl = decoded<Iq4Nl>(row);
    double error = 0, signal = 0;
    for (std::size_t c = 0; c < 64; ++c) {
      ASSERT_LE(std::abs(nl[c] - row[c]), amax * 0.13f);
      error += std::pow(static_cast<double>(nl[c] - row[c]), 2), signal += std::pow(static_cast<double>(row[c]), 2);
    }
    ASSERT_LT(error / signal, 0.012);
  }
}

}  // namespace
}  // namespace kvpare

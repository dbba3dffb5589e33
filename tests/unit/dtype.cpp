// Element types: every half and bfloat16, and the rounding of what lies between them. Views and tensors of them.
#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cmath>
#include <kvpare/core/view.hpp>
#include <limits>
#include <string>
#include <vector>

namespace kvpare {
namespace {

static_assert(sizeof(half) == 2 && sizeof(bfloat16) == 2 && std::is_trivially_copyable_v<half> && std::is_trivially_copyable_v<bfloat16>);
static_assert(Element<float> && Element<half> && Element<bfloat16> && !Element<double> && !Element<int>);
static_assert(dtype_of<float>() == DType::f32 && dtype_of<half>() == DType::f16 && dtype_of<bfloat16>() == DType::bf16);
static_assert(size_of(DType::f32) == 4 && size_of(DType::f16) == 2 && size_of(DType::bf16) == 2);
static_assert(static_cast<float>(half(1.5f)) == 1.5f && static_cast<float>(bfloat16(-2.0f)) == -2.0f, "usable in constant expressions");

/// IEEE binary16 as its definition reads.
double value_of_half(std::uint16_t bits) {
  const int sign = bits >> 15 ? -1 : 1, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return fraction == 0 ? sign * std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  return exponent == 0 ? sign * std::ldexp(fraction, -24) : sign * std::ldexp(1024 + fraction, exponent - 25);
}

TEST(Half, EveryOneIsRead) {
  for (std::uint32_t b = 0; b < 1 << 16; ++b) {
    const double wanted = value_of_half(static_cast<std::uint16_t>(b));
    const float got = detail::half_to_float(static_cast<std::uint16_t>(b));
    if (std::isnan(wanted)) {
      ASSERT_TRUE(std::isnan(got)) << b;
    } else {
      ASSERT_EQ(static_cast<double>(got), wanted) << b;
    }
    ASSERT_EQ(std::signbit(got), b >> 15 == 1) << b;
  }
}

TEST(Half, EveryOneSurvivesTheWayThere) {
  for (std::uint32_t b = 0; b < 1 << 16; ++b) {
    const std::uint16_t again = half(detail::half_to_float(static_cast<std::uint16_t>(b))).bits;
    if ((b & 0x7fff) > 0x7c00) {
      ASSERT_GT(again & 0x7fff, 0x7c00) << b;  // a NaN stays one; which one does not matter
    } else {
      ASSERT_EQ(again, b);
    }
  }
}

/// Between any two neighbours: below the middle down, above it up, in the middle to the even one.
TEST(Half, RoundsToNearestEven) {
  for (std::uint32_t b = 0; b < 0x7c00; ++b) {
    const float low = detail::half_to_float(static_cast<std::uint16_t>(b));
    const float high = b == 0x7bff ? 65536.0f : detail::half_to_float(static_cast<std::uint16_t>(b + 1));  // 65536 stands for infinity
    const float middle = low + (high - low) / 2;
    for (const std::uint32_t sign : {0u, 0x8000u}) {
      const float s = sign ? -1.0f : 1.0f;
      ASSERT_EQ(half(s * std::nextafter(middle, low)).bits, sign | b);
      ASSERT_EQ(half(s * std::nextafter(middle, high)).bits, sign | (b + 1));
      ASSERT_EQ(half(s * middle).bits, sign | (b + (b & 1)));
    }
  }
}

TEST(Half, EndsOfTheRange) {
  EXPECT_EQ(half(0.0f).bits, 0x0000);
  EXPECT_EQ(half(-0.0f).bits, 0x8000);
  EXPECT_EQ(half(65504.0f).bits, 0x7bff);
  EXPECT_EQ(half(65519.99f).bits, 0x7bff);
  EXPECT_EQ(half(65520.0f).bits, 0x7c00);
  EXPECT_EQ(half(-1e30f).bits, 0xfc00);
  EXPECT_EQ(half(0x1p-24f).bits, 0x0001);
  EXPECT_EQ(half(0x1p-25f).bits, 0x0000);  // the middle; 0 is even
  EXPECT_EQ(half(std::nextafter(0x1p-25f, 1.0f)).bits, 0x0001);
  EXPECT_EQ(half(std::numeric_limits<float>::denorm_min()).bits, 0x0000);
  EXPECT_EQ(half(-std::numeric_limits<float>::infinity()).bits, 0xfc00);
  EXPECT_GT(half(std::numeric_limits<float>::quiet_NaN()).bits & 0x7fff, 0x7c00);
  EXPECT_GT(half(std::bit_cast<float>(0x7f800001u)).bits & 0x7fff, 0x7c00) << "a NaN whose upper bits are zero";
}

TEST(Bfloat16, EveryOneIsReadAndSurvives) {
  for (std::uint32_t b = 0; b < 1 << 16; ++b) {
    const float x = detail::bfloat16_to_float(static_cast<std::uint16_t>(b));
    ASSERT_EQ(std::bit_cast<std::uint32_t>(x), b << 16);
    const std::uint16_t again = bfloat16(x).bits;
    if (std::isnan(x)) {
      ASSERT_TRUE(std::isnan(detail::bfloat16_to_float(again))) << b;
    } else {
      ASSERT_EQ(again, b);
    }
  }
}

TEST(Bfloat16, RoundsToNearestEven) {
  for (std::uint32_t b = 0; b < 0x7f80; ++b)
    for (const std::uint32_t sign : {0u, 0x8000u}) {
      const std::uint32_t low = (sign | b) << 16;
      ASSERT_EQ(bfloat16(std::bit_cast<float>(low | 0x7fff)).bits, sign | b);
      ASSERT_EQ(bfloat16(std::bit_cast<float>(low | 0x8000)).bits, sign | (b + (b & 1)));
      ASSERT_EQ(bfloat16(std::bit_cast<float>(low | 0x8001)).bits, sign | (b + 1));
    }
  EXPECT_TRUE(std::isnan(static_cast<float>(bfloat16(std::bit_cast<float>(0x7f800001u))))) << "a NaN whose upper bits are zero";
}

TEST(DTypes, TheSwitchNamesTheType) {
  EXPECT_EQ(with_type(DType::f32, [](auto* t) { return dtype_of<std::remove_pointer_t<decltype(t)>>(); }), DType::f32);
  EXPECT_EQ(with_type(DType::f16, [](auto* t) { return dtype_of<std::remove_pointer_t<decltype(t)>>(); }), DType::f16);
  EXPECT_EQ(with_type(DType::bf16, [](auto* t) { return dtype_of<std::remove_pointer_t<decltype(t)>>(); }), DType::bf16);
  EXPECT_EQ(name_of(DType::f32), "float");
  EXPECT_EQ(name_of(DType::f16), "half");
  EXPECT_EQ(name_of(DType::bf16), "bfloat16");
}

TEST(Views, DenseOnesAreRowMajor) {
  std::array<int, 24> x{};
  const auto v = dense(x.data(), 2, 3, 4);
  EXPECT_EQ(&v(0, 0, 0), &x[0]);
  EXPECT_EQ(&v(1, 2, 3), &x[23]);
  EXPECT_EQ(&v(1, 0, 2), &x[14]);
}

TEST(Tensors, AddressRowsAndHeadsOfAnyStride) {
  std::vector<half> x(1000);
  const View<half, 3> strided{x.data(), {5, 3, 8}, {100, 20, 1}};
  const Tensor t = strided;
  EXPECT_EQ(t.dtype, DType::f16);
  EXPECT_EQ(t.at(4, 2), &x[440]);
  const ConstTensor part = ConstTensor(t).part(2, 3);
  EXPECT_EQ(part.rows, 3);
  EXPECT_EQ(part.at(2, 2), &x[440]);
  EXPECT_EQ(Tensor(x.data(), 2, 3, 4).at(1, 2), &x[20]);
}

TEST(Tensors, WidthsAreContiguous) {
  float x[8];
  try {
    const Tensor t = View<float, 3>{x, {1, 1, 4}, {8, 8, 2}};
    FAIL() << t.width;
  } catch (const InvalidArgument& e) {
    EXPECT_STREQ(e.what(), "tensor: the last stride is 2, must be 1");
  }
  const Tensor single = View<float, 3>{x, {4, 1, 1}, {2, 2, 2}};  // one channel has no stride
  EXPECT_EQ(single.at(3, 0), &x[6]);
}

}  // namespace
}  // namespace kvpare

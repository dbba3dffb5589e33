// Floats of 8 and 4 bits: every code, every tie, worked examples, bytes and bounds.
#include <gtest/gtest.h>

#include <limits>

#include "kvpare/codec/block_float.hpp"
#include "kvpare/codec/fp8.hpp"
#include "support/codec_tiles.hpp"

namespace kvpare {
namespace {

using detail::E2M1, detail::E4M3, detail::E5M2;
using test::GuardedTile;

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float nan_value = std::numeric_limits<float>::quiet_NaN();

static_assert(E4M3::magnitude(0x7e) == 448 && E4M3::magnitude(0x08) == 0x1p-6f && E4M3::magnitude(1) == 0x1p-9f);
static_assert(E5M2::magnitude(0x7b) == 57344 && E5M2::magnitude(0x04) == 0x1p-14f && E5M2::magnitude(1) == 0x1p-16f);
static_assert(E2M1::magnitude(7) == 6 && E2M1::magnitude(1) == 0.5f && E2M1::magnitude(5) == 3);
static_assert(E5M2::value(0x7c) == inf && E5M2::value(0xfc) == -inf);
static_assert(Fp8E4M3::tile_bytes({64, 128}) == 64 * 128);
static_assert(MxFp4<>::tile_bytes({1, 128}) == 68 && NvFp4<>::tile_bytes({1, 128}) == 72);
static_assert(MxFp4<>::fits({64, 96}) && !MxFp4<>::fits({64, 80}) && NvFp4<>::fits({64, 80}) &&
              !NvFp4<>::fits({64, 8}));
static_assert(Fp8E4M3::fits({64, 7}));

TEST(SmallFloats, WorkedExamples) {
  const auto e4m3 = [](float x) { return static_cast<int>(E4M3::nearest(x)); };
  const auto e5m2 = [](float x) { return static_cast<int>(E5M2::nearest(x)); };
  EXPECT_EQ(e4m3(1), 0x38);
  EXPECT_EQ(e4m3(0.3f), 0x2a);
  EXPECT_EQ(e4m3(-3.3f), 0xc5);
  EXPECT_EQ(e4m3(500), 0x7e);
  EXPECT_EQ(e4m3(0.001f), 0x01);
  EXPECT_EQ(e4m3(0.017f), 0x09);
  EXPECT_EQ(e5m2(1), 0x3c);
  EXPECT_EQ(e5m2(0.3f), 0x35);
  EXPECT_EQ(e5m2(-3.3f), 0xc3);
  EXPECT_EQ(e5m2(60000), 0x7b);
  EXPECT_EQ(E4M3::values[0x2a], 0.3125f);
  EXPECT_EQ(E4M3::values[0xc5], -3.25f);
  EXPECT_EQ(E5M2::values[0xc3], -3.5f);
  EXPECT_TRUE(std::isnan(E4M3::values[0x7f]) && std::isnan(E4M3::values[0xff]) && std::isnan(E5M2::values[0x7d]));
}

/// The textbook: of the two codes around x the nearer one, of two equally near the even one.
template <class F>
void expect_nearest_everywhere() {
  for (unsigned c = 0; c < F::sign; ++c) {
    if (!std::isfinite(F::values[c])) continue;
    EXPECT_EQ(F::nearest(F::values[c]), c);
    EXPECT_EQ(F::nearest(-F::values[c]), c | F::sign);
    if (c + 1 == F::sign || !std::isfinite(F::values[c + 1])) continue;
    const float middle = (F::values[c] + F::values[c + 1]) / 2;  // exact
    EXPECT_EQ(F::nearest(middle), c % 2 == 0 ? c : c + 1);
    EXPECT_EQ(F::nearest(std::nextafter(middle, 0.0f)), c);
    EXPECT_EQ(F::nearest(std::nextafter(middle, inf)), c + 1);
  }
  EXPECT_EQ(F::nearest(nan_value), 0);
  EXPECT_EQ(F::values[F::nearest(inf)], -F::values[F::nearest(-inf)]);
  EXPECT_EQ(F::nearest(inf), F::nearest(std::numeric_limits<float>::max()));
  EXPECT_TRUE(std::isfinite(F::values[F::nearest(inf)]));
  EXPECT_EQ(F::nearest(std::numeric_limits<float>::denorm_min()), 0);
}
TEST(SmallFloats, EveryCodeAndEveryTie) {
  expect_nearest_everywhere<E4M3>();
  expect_nearest_everywhere<E5M2>();
  expect_nearest_everywhere<E2M1>();
}

template <class C>
class Fp8Codecs : public ::testing::Test {};
using BothFp8 = ::testing::Types<Fp8E4M3, Fp8E5M2>;
TYPED_TEST_SUITE(Fp8Codecs, BothFp8);

TYPED_TEST(Fp8Codecs, BoundBytesAndScale) {
  using C = TypeParam;
  constexpr bool four = std::is_same_v<C, Fp8E4M3>;
  for (const float scale : {1.0f, 0.013f, 250.0f}) {
    const TileShape shape{16, 80};
    auto rows = test::outliers(5, 16, 80);
    for (float& x : rows) x *= scale * 3;
    GuardedTile<C> tile(shape);
    tile.encode(rows, 0, &scale);
    for (Index t = 0; t < 16; ++t)
      for (Index c = 0; c < 80; ++c) {
        const float x = rows[static_cast<std::size_t>(t * 80 + c)];
        const float y = tile.decode(t, &scale)[static_cast<std::size_t>(c)];
        const float relative = std::abs(x) * (four ? 0x1p-4f : 0x1p-3f), step = scale * (four ? 0x1p-10f : 0x1p-17f);
        ASSERT_LE(std::abs(x - y), std::max(relative, step) * 1.00001f);
        ASSERT_EQ(tile.bytes()[static_cast<std::size_t>(t * 80 + c)],
                  (four ? E4M3::nearest(x * (1 / scale)) : E5M2::nearest(x * (1 / scale))));
      }
  }
  const float one = 1;
  GuardedTile<C> with({4, 8}), without({4, 8});
  with.encode(test::gaussians(1, 32), 0, &one), without.encode(test::gaussians(1, 32));
  EXPECT_EQ(with.bytes(), without.bytes());
  EXPECT_EQ(fp8_scale<C>(C::largest * 3), 3.0f);
  for (const float useless : {0.0f, nan_value, inf, -1.0f, 1e-44f}) EXPECT_EQ(fp8_scale<C>(useless), 1.0f);
  test::expect_rows_move<C>({32, 72}, &one);
  test::expect_strides_do_not_matter<C>(20, &one);
  test::expect_decodes_anything<C>({16, 24}, {0.5f});
}

TYPED_TEST(Fp8Codecs, NumbersThatHurt) {
  using C = TypeParam;
  GuardedTile<C> tile({1, 8});
  tile.encode({nan_value, inf, -inf, 1e30f, -1e30f, 0, -0.0f, 1e-40f});
  EXPECT_EQ(tile.decode(0), (std::vector<float>{0, C::largest, -C::largest, C::largest, -C::largest, 0, 0, 0}));
}

TEST(MxFp4, WorkedExample) {
  std::vector<float> row(32, 0.0f);
  row[0] = 0.3f, row[1] = -1, row[2] = 2.2f, row[3] = 7;
  GuardedTile<MxFp4<>> tile({1, 32});
  tile.encode(row);
  EXPECT_EQ(tile.bytes()[16], 127);
  EXPECT_EQ(tile.bytes()[0], 1 | 10 << 4);
  EXPECT_EQ(tile.bytes()[1], 4 | 7 << 4);
  const auto y = tile.decode(0);
  EXPECT_EQ(std::vector<float>(y.begin(), y.begin() + 5), (std::vector<float>{0.5f, -1, 2, 6, 0}));
}

TEST(MxFp4, TiesAreAParameter) {
  std::vector<float> row(32, 0.0f);
  const float ties[] = {4, 0.75f, 1.75f, 3.5f, 2.5f, 5, 0.25f, 1.25f, -0.75f, -3.5f};
  std::copy(std::begin(ties), std::end(ties), row.begin());
  GuardedTile<MxFp4<Ties::even>> even({1, 32});
  GuardedTile<MxFp4<Ties::down>> down({1, 32});
  even.encode(row), down.encode(row);
  const auto e = even.decode(0), d = down.decode(0);
  EXPECT_EQ(std::vector<float>(e.begin(), e.begin() + 10), (std::vector<float>{4, 1, 2, 4, 2, 4, 0, 1, -1, -4}));
  EXPECT_EQ(std::vector<float>(d.begin(), d.begin() + 10),
            (std::vector<float>{4, 0.5f, 1.5f, 3, 2, 4, 0, 1, -0.5f, -3}));
}

TEST(NvFp4, WorkedExample) {
  const float g = nvfp4_global(NvFp4Global::flashinfer, 10);
  EXPECT_FLOAT_EQ(1 / g, 44.8f);
  std::vector<float> row(16, 0.0f);
  const float x[] = {0.1f, -0.2f, 0.7f, 1.5f, -3, 0, 0.05f, 2};
  std::copy(std::begin(x), std::end(x), row.begin());
  GuardedTile<NvFp4<>> tile({1, 16});
  tile.encode(row, 0, &g);
  EXPECT_EQ(tile.bytes(), (std::vector<int>{0x90, 0x53, 0x0f, 0x60, 0, 0, 0, 0, 0x5b}));
  const float want[] = {0, -0.245536f, 0.736607f, 1.473214f, -2.946429f, 0, 0, 1.964286f};
  for (std::size_t c = 0; c < 8; ++c) EXPECT_NEAR(tile.decode(0, &g)[c], want[c], 1e-6f);

  const float standard = nvfp4_global(NvFp4Global::standard, 10);
  EXPECT_FLOAT_EQ(1 / standard, 268.8f);
  tile.encode(row, 0, &standard);
  EXPECT_EQ(tile.bytes()[8], 0x70);
  EXPECT_NEAR(NvFp4<>::scale_of({0x70, 0}, &standard), 0.4761905f, 1e-7f);
  EXPECT_EQ(nvfp4_global(NvFp4Global::none, 10), 1);
  for (const float useless : {0.0f, nan_value, inf}) EXPECT_EQ(nvfp4_global(NvFp4Global::standard, useless), 1.0f);
}

TEST(NvFp4, ScalesOfGgmlRoundHalfUp) {
  const auto code = [](float x) { return static_cast<int>(detail::ggml_ue4m3(x)); };
  EXPECT_EQ(code(1.0f), 0x38);
  EXPECT_EQ(code(1.0625f), 0x39);  // ties to even would be 0x38
  EXPECT_EQ(code(1.06f), 0x38);
  EXPECT_EQ(code(1.95f), 0x40);   // carries into the exponent
  EXPECT_EQ(code(255.0f), 0x7e);  // would be 256
  EXPECT_EQ(code(239.0f), 0x77);
  EXPECT_EQ(code(256.0f), 0x7e);
  EXPECT_EQ(code(1e9f), 0x7e);
  EXPECT_EQ(code(0x1p-9f), 1);
  EXPECT_EQ(code(0x1p-10f), 1);
  EXPECT_EQ(code(0.0009f), 0);
  EXPECT_EQ(code(0.0155f), 7);  // 7.9 subnormal steps, but not the least normal number
  EXPECT_EQ(code(-1.0f), 0);
  EXPECT_EQ(code(nan_value), 0);
}

template <class C>
class BlockFloats : public ::testing::Test {};
using AllBlockFloats = ::testing::Types<MxFp4<Ties::even>, MxFp4<Ties::down>, NvFp4<Ties::even>, NvFp4<Ties::down>>;
TYPED_TEST_SUITE(BlockFloats, AllBlockFloats);

TYPED_TEST(BlockFloats, BoundOfEachBlock) {
  using C = TypeParam;
  constexpr Index block = C::form.group;
  const float g = block == 32 ? 1.0f : 0.05f;
  const float* state = block == 32 ? nullptr : &g;
  for (const bool outliers : {false, true}) {
    const TileShape shape{16, 96};
    const auto rows = outliers ? test::outliers(5, 16, 96) : test::gaussians(6, 16 * 96);
    GuardedTile<C> tile(shape);
    tile.encode(rows, 0, state);
    for (Index t = 0; t < 16; ++t) {
      const auto y = tile.decode(t, state);
      for (Index b = 0; b < 96 / block; ++b) {
        const auto x = rows.begin() + t * 96 + b * block;
        float amax = 0;
        for (Index i = 0; i < block; ++i) amax = std::max(amax, std::abs(x[i]));
        for (Index i = 0; i < block; ++i)
          ASSERT_LE(std::abs(x[i] - y[static_cast<std::size_t>(b * block + i)]),
                    block == 32 ? amax / 4 : amax / 6 * (1 + 0x1p-4f) * 1.0001f)
              << C::name;
      }
    }
  }
  test::expect_rows_move<C>({16, 64}, state);
  test::expect_strides_do_not_matter<C>(C::form.group, state);
  test::expect_decodes_anything<C>({16, 64}, {0.25f});
}

TYPED_TEST(BlockFloats, NumbersThatHurt) {
  using C = TypeParam;
  GuardedTile<C> tile({2, 64});
  tile.encode(std::vector<float>(128, 0.0f));
  EXPECT_EQ(tile.decode(0), std::vector<float>(64, 0.0f));
  EXPECT_EQ(tile.bytes(), std::vector<int>(tile.size(), 0));
  const auto calm = test::gaussians(3, 128);
  tile.encode(calm);
  const auto before = tile.decode(0), other = tile.decode(1);
  for (const float bad : {nan_value, inf, -inf, std::numeric_limits<float>::max(), 1e-45f}) {
    auto rows = calm;
    rows[40] = bad;
    tile.encode(rows);
    const auto y = tile.decode(0);
    for (std::size_t c = 0; c < 64; ++c) {
      ASSERT_TRUE(std::isfinite(y[c])) << C::name << ' ' << bad;
      if (static_cast<Index>(c) / C::form.group != 40 / C::form.group) {
        ASSERT_EQ(y[c], before[c]) << C::name;
      }
    }
    EXPECT_EQ(tile.decode(1), other);
    if (std::isnan(bad)) {
      rows[40] = 0;
      GuardedTile<C> zero({2, 64});
      zero.encode(rows);
      EXPECT_EQ(zero.bytes(), tile.bytes());
    }
  }
  std::vector<float> tiny(128);
  for (std::size_t i = 0; i < 128; ++i) tiny[i] = i % 2 == 0 ? 1e-40f : -3e-42f;
  tile.encode(tiny);
  for (const float y : tile.decode(0)) EXPECT_LE(std::abs(y), 1.5e-40f);
}

TYPED_TEST(BlockFloats, ValuesOfTheFormatAreExact) {
  using C = TypeParam;
  std::vector<float> row(64);
  for (std::size_t i = 0; i < 64; ++i) row[i] = E2M1::values[i % 16] * 0.25f;
  GuardedTile<C> tile({1, 64});
  tile.encode(row);
  EXPECT_EQ(tile.decode(0), row);
}

}  // namespace
}  // namespace kvpare

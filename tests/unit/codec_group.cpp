// The family of group quantisers: examples worked by hand, bytes, bounds, and numbers that hurt.
#include "kvpare/codec/group.hpp"

#include <gtest/gtest.h>

#include <limits>

#include "support/codec_tiles.hpp"

namespace kvpare {
namespace {

using test::GuardedTile;

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float nan_value = std::numeric_limits<float>::quiet_NaN();

template <class C>
std::vector<int> codes_of(const std::vector<float>& x, GroupBits* bits = nullptr) {
  std::vector<std::uint8_t> codes(x.size());
  const GroupBits b = C::quantize(x.data(), 1, static_cast<Index>(x.size()), nullptr, codes.data(), 1);
  if (bits) *bits = b;
  return {codes.begin(), codes.end()};
}
half half_of(std::uint32_t bits) {
  half h;
  h.bits = static_cast<std::uint16_t>(bits);
  return h;
}
template <class C>
std::vector<float> round_trip(const std::vector<float>& x) {
  std::vector<std::uint8_t> codes(x.size());
  const GroupBits b = C::quantize(x.data(), 1, static_cast<Index>(x.size()), nullptr, codes.data(), 1);
  std::vector<float> y;
  for (const auto c : codes) y.push_back(C::scale_of(b, nullptr) * C::level(c) + C::zero_of(b, nullptr));
  return y;
}

// ---- names and sizes ------------------------------------------------------------------------------------------------

static_assert(Int8::name == "int8" && Int4::name == "int4" && Int1::name == "int1");
static_assert(Symmetric<4, 32>::name == "int4_g32");
static_assert(Affine<2>::name == "int2_min" && Mlx<4>::name == "int4_g64_min");
static_assert(KiviKeys<2>::name == "int2_channel_g32_min" && KiviKeys<4, 0>::name == "int4_channel_min");
static_assert(MikvGroup<3>::name == "int3_p2_min" && KvTunerToken<8>::name == "int8_zero");
static_assert(Group<GroupSpec{.bits = 4,
                              .fit = Fit::extreme,
                              .group = 32,
                              .scale = ScaleType::f32,
                              .ties = Ties::up,
                              .from = CodesFrom::exact,
                              .packing = Packing::halves}>::name == "int4_g32_extreme_f32_up_exact_halves");

static_assert(Int8::tile_bytes({64, 128}) == 64 * (128 + 2));
static_assert(Symmetric<4, 32>::tile_bytes({64, 128}) == 64 * (64 + 8));
static_assert(KiviValues<2>::tile_bytes({64, 128}) == 64 * 48, "KIVI-2 at D 128: 48 bytes per token");
static_assert(KiviKeys<2>::tile_bytes({64, 128}) == 64 * 48);
static_assert(Affine<2, 64>::tile_bytes({1, 128}) == 40);
static_assert(Affine<3>::tile_bytes({1, 128}) == 52, "the values of vLLM's 3 bits");
static_assert(MikvGroup<2>::tile_bytes({1, 128}) * 8 == 128 * 2.5, "MiKV: N + 0.5 bits");
static_assert(KvTunerToken<4>::tile_bytes({1, 128}) * 8 == 128 * 4.25, "KVTuner: b + 32 / D bits");
static_assert(Group<GroupSpec{.bits = 8, .fit = Fit::min_max, .scale = ScaleType::f32}>::tile_bytes({2, 16}) ==
              2 * (16 + 8));
static_assert(Int1::tile_bytes({1, 128}) == 18);

static_assert(!Int1::fits({64, 4}) && Int1::fits({64, 8}) && !Int3::fits({64, 20}) && Int3::fits({64, 24}));
static_assert(!Symmetric<4, 32>::fits({64, 8}) && !Symmetric<4, 32>::fits({64, 80}) &&
              Symmetric<4, 32>::fits({64, 96}));
static_assert(KiviKeys<2, 32>::fits({32, 7}) && !KiviKeys<2, 32>::fits({16, 128}) && KiviKeys<2, 0>::fits({16, 128}));
static_assert(!MikvGroup<4>::fits({64, 9}) && MikvGroup<4>::fits({64, 8}) && !Int8::fits({64, 1025}));
static_assert(Int8::rows_move && !KiviKeys<2>::rows_move);

// ---- worked examples ------------------------------------------------------------------------------------------------

TEST(Group, Int8SymmetricOfTheNumberFormats) {
  EXPECT_EQ(codes_of<Int8>({0.5f, -1.27f, 0.01f, 1.0f}), (std::vector<int>{128 + 50, 128 - 127, 128 + 1, 128 + 100}));
  GroupBits bits;
  codes_of<Int8>({0.5f, -1.27f, 0.01f, 1.0f}, &bits);
  EXPECT_EQ(bits.scale, half(0.01f).bits);
}

TEST(Group, KiviKeys) {
  using C = KiviKeys<2, 4>;
  GuardedTile<C> tile({4, 2});
  tile.encode({0, 1, 1, -1, 2, 0.5f, 3, 2});
  const auto one = half(1.0f).bits, zero = half(0.0f).bits, minus = half(-1.0f).bits;
  EXPECT_EQ(tile.bytes(), (std::vector<int>{0xe4, 0xe2, one & 255, one >> 8, one & 255, one >> 8, zero & 255, zero >> 8,
                                            minus & 255, minus >> 8}));
  EXPECT_EQ(tile.decode(0), (std::vector<float>{0, 1}));
  EXPECT_EQ(tile.decode(1), (std::vector<float>{1, -1}));
  EXPECT_EQ(tile.decode(2), (std::vector<float>{2, 1}));  // 0.5 is midway: ties to even
  EXPECT_EQ(tile.decode(3), (std::vector<float>{3, 2}));
  const float scores[] = {-1, 3, 3, 4};
  for (Index t = 0; t < 4; ++t) EXPECT_EQ(2 * tile.decode(t)[0] - tile.decode(t)[1], scores[t]);
}

TEST(Group, KiviValues) {
  using C = KiviValues<2, 4>;
  GuardedTile<C> tile({1, 4});
  tile.encode({0.1f, -0.3f, 0.9f, 0.3001f});
  EXPECT_EQ(tile.bytes()[0], 0xb1);
  EXPECT_EQ(tile.bytes()[1] | tile.bytes()[2] << 8, half(0.4f).bits);
  EXPECT_EQ(tile.bytes()[3] | tile.bytes()[4] << 8, half(-0.3f).bits);
  const float want[] = {0.1f, -0.3f, 0.9f, 0.5f};
  for (std::size_t c = 0; c < 4; ++c) EXPECT_NEAR(tile.decode(0)[c], want[c], 5e-4f);
}

TEST(Group, MikvWithoutAndWithBalancer) {
  using C = Group<GroupSpec{.bits = 2, .fit = Fit::min_max, .scale = ScaleType::f32}>;
  EXPECT_EQ(codes_of<C>({0.2f, 1, 0.4f, -4}), (std::vector<int>{3, 3, 3, 0}));
  EXPECT_EQ(codes_of<C>({-0.4f, 0.5f, 0.5f, 3}), (std::vector<int>{0, 1, 1, 3}));
  const float q[] = {1, 0.5f, 8, 0.5f}, b[] = {1.5811388f, 0.7071068f, 4, 0.5f};
  const auto score = [&](std::vector<float> k, bool balanced) {
    for (std::size_t c = 0; c < 4; ++c) k[c] *= balanced ? b[c] : 1;
    const auto coded = round_trip<C>(k);
    float sum = 0;
    for (std::size_t c = 0; c < 4; ++c) sum += q[c] / (balanced ? b[c] : 1) * coded[c];
    return sum;
  };
  EXPECT_NEAR(score({0.2f, 1, 0.4f, -4}, false), 7.5f, 1e-5f);
  EXPECT_NEAR(score({-0.4f, 0.5f, 0.5f, 3}, false), 7.3333333f, 1e-5f);
  EXPECT_NEAR(score({0.2f, 1, 0.4f, -4}, true), 1.735825f, 2e-6f);
  EXPECT_NEAR(score({-0.4f, 0.5f, 0.5f, 3}, true), 4.895777f, 2e-6f);
}

TEST(Group, KvTunerVanilla) {
  GroupBits bits;
  const auto codes = codes_of<KvTunerToken<4>>({-1, 0.2f, 0.5f, 1}, &bits);
  EXPECT_EQ(codes, (std::vector<int>{0, 10, 12, 15}));  // -8, 2, 4, 7, and 8
  EXPECT_EQ(bits.scale, half(0.1333333f).bits);
  EXPECT_EQ(bits.zero, 0u);
  const auto decoded = round_trip<KvTunerToken<4>>({-1, 0.2f, 0.5f, 1});
  const float want[] = {-1.0666667f, 0.2666667f, 0.5333333f, 0.9333333f};
  for (std::size_t c = 0; c < 4; ++c) EXPECT_NEAR(decoded[c], want[c], 4e-4f);
}

TEST(Group, ZipCacheValuesPerToken) {
  using C4 = Group<GroupSpec{.bits = 4, .fit = Fit::min_max, .scale = ScaleType::f32}>;
  using C2 = Group<GroupSpec{.bits = 2, .fit = Fit::min_max, .scale = ScaleType::f32, .packing = Packing::halves}>;
  const float c[] = {2, 0.3162278f, 1, 0.4472136f};
  const auto normalised = [&](std::vector<float> v) {
    for (std::size_t i = 0; i < 4; ++i) v[i] /= c[i];
    return v;
  };
  const auto check = [&](auto codec, std::vector<float> v, std::vector<int> codes, std::vector<float> want) {
    using C = decltype(codec);
    EXPECT_EQ(codes_of<C>(normalised(v)), codes);
    const auto decoded = round_trip<C>(normalised(v));
    for (std::size_t i = 0; i < 4; ++i) EXPECT_NEAR(decoded[i] * c[i], want[i], 2e-6f);
  };
  check(C4{}, {4, 0.1f, 1, -0.2f}, {15, 5, 9, 0}, {4, 0.116538f, 1.021115f, -0.2f});
  check(C2{}, {-2, 0.05f, 0.25f, 0.16f}, {0, 3, 3, 3}, {-2, 0.113137f, 0.357771f, 0.16f});
  check(C2{}, {1, -0.09f, -0.5f, 0.04f}, {3, 1, 0, 2}, {1, -0.052705f, -0.5f, 0.074536f});
}

TEST(Group, OneBitOfVidkv) {
  GroupBits bits;
  EXPECT_EQ(codes_of<Int1>({0.9f, -0.1f, 0.4f, -1.2f}, &bits), (std::vector<int>{1, 0, 1, 0}));
  EXPECT_EQ(bits.scale, half(0.65f).bits);
  float sum = 0;
  const float x[] = {0.9f, -0.1f, 0.4f, -1.2f};
  const auto y = round_trip<Int1>({0.9f, -0.1f, 0.4f, -1.2f});
  for (std::size_t c = 0; c < 4; ++c) sum += (x[c] - y[c]) * (x[c] - y[c]);
  EXPECT_NEAR(sum, 0.73f, 1e-3f);
}

// ---- bytes ----------------------------------------------------------------------------------------------------------

TEST(Group, RowsAreCodesThenScalesThenZeros) {
  using C = Affine<3, 4>;  // 8 channels: three bytes of codes, two scales, two minima
  GuardedTile<C> tile({2, 8});
  tile.encode({0, 1, 2, 3, 4, 5, 6, 7, 7, 6, 5, 4, 3, 2, 1, 0});
  // Second row: groups 7 6 5 4 and 3 2 1 0, scale 3/7 each. With the half 0.42847: 3 -> 7, 2 -> 4.67 -> 5, 1 -> 2.33 -> 2.
  const int s = half(3.0f / 7).bits, low = s & 255, high = s >> 8;
  const unsigned up = 0u | 2u << 3 | 5u << 6 | 7u << 9, down = 7u | 5u << 3 | 2u << 6;
  const unsigned first = up | up << 12, second = down | down << 12;
  const auto byte = [](unsigned word, int k) { return static_cast<int>(word >> 8 * k & 255); };
  EXPECT_EQ(
      tile.bytes(),
      (std::vector<int>{byte(first, 0),  byte(first, 1),  byte(first, 2),  low, high, low, high, 0,    0,    0x00, 0x44,
                        byte(second, 0), byte(second, 1), byte(second, 2), low, high, low, high, 0x00, 0x44, 0,    0}));
}

TEST(Group, HalvesPutDistantNeighboursIntoOneByte) {
  using C = Group<GroupSpec{.bits = 4, .fit = Fit::min_max, .group = 8, .packing = Packing::halves}>;
  GuardedTile<C> tile({1, 16});
  tile.encode({0, 1, 2, 3, 4, 5, 6, 15, 15, 14, 13, 12, 11, 10, 9, 0});
  const std::vector<int> all = tile.bytes();
  EXPECT_EQ(std::vector<int>(all.begin(), all.begin() + 8),
            (std::vector<int>{0x40, 0x51, 0x62, 0xf3, 0xbf, 0xae, 0x9d, 0x0c}));
  EXPECT_EQ(tile.decode(0), (std::vector<float>{0, 1, 2, 3, 4, 5, 6, 15, 15, 14, 13, 12, 11, 10, 9, 0}));
  using C2 =
      Group<GroupSpec{.bits = 2, .fit = Fit::min_max, .along = Along::tokens, .group = 8, .packing = Packing::halves}>;
  GuardedTile<C2> keys({8, 1});
  keys.encode({0, 1, 2, 3, 3, 2, 1, 0});
  EXPECT_EQ(keys.bytes()[0], 0 | 2 << 2 | 3 << 4 | 1 << 6);
  EXPECT_EQ(keys.bytes()[1], 1 | 3 << 2 | 2 << 4 | 0 << 6);
  for (Index t = 0; t < 8; ++t) EXPECT_EQ(keys.decode(t)[0], static_cast<float>(t < 4 ? t : 7 - t));
}

TEST(Group, QuantizeAndPackIsEncode) {
  using C = Affine<4, 16>;
  const auto rows = test::gaussians(3, 2 * 64);
  GuardedTile<C> tile({2, 64});
  tile.encode(rows);
  for (Index t = 0; t < 2; ++t)
    for (Index g = 0; g < 4; ++g) {
      std::uint8_t codes[32] = {};
      const GroupBits bits =
          C::quantize(rows.data() + t * 64 + g * 16, 1, 16, nullptr, codes, 2);  // every second place
      for (Index i = 0; i < 16; ++i) {
        const float want = C::scale_of(bits, nullptr) * C::level(codes[2 * i]) + C::zero_of(bits, nullptr);
        EXPECT_EQ(tile.decode(t)[static_cast<std::size_t>(g * 16 + i)], want);
      }
    }
}

// ---- bounds ---------------------------------------------------------------------------------------------------------

template <class C>
class GroupFamily : public ::testing::Test {};
using Family = ::testing::Types<
    Int8, Int4, Int3, Int2, Int1, Symmetric<8, 32>, Symmetric<4, 32>, Symmetric<5, 16>, Symmetric<2, 32>,
    Symmetric<1, 64>, Affine<8>, Affine<5, 32>, Affine<4, 32>, Affine<3>, Affine<2, 32>, Affine<1, 32>, MikvGroup<4>,
    MikvGroup<3>, MikvGroup<2>, KvTunerToken<8>, KvTunerToken<4>, KvTunerToken<2, 32>, KiviKeys<8>, KiviKeys<4>,
    KiviKeys<2>, KiviKeys<2, 0>, KiviKeys<3, 16>, Group<GroupSpec{.bits = 4, .along = Along::tokens, .group = 16}>,
    Group<GroupSpec{.bits = 1, .fit = Fit::mean, .along = Along::tokens, .group = 32}>,
    Group<GroupSpec{.bits = 4, .fit = Fit::extreme, .group = 32, .ties = Ties::up, .from = CodesFrom::exact}>,
    Group<GroupSpec{.bits = 4, .fit = Fit::extreme, .ties = Ties::away, .packing = Packing::halves}>,
    Group<GroupSpec{.bits = 8, .scale = ScaleType::f32, .ties = Ties::away}>,
    Group<GroupSpec{.bits = 2, .fit = Fit::min_max, .along = Along::tokens, .group = 32, .scale = ScaleType::f32}>,
    Group<GroupSpec{.bits = 4, .fit = Fit::integer, .along = Along::tokens, .scale = ScaleType::f32}>,
    Group<GroupSpec{.bits = 4, .fit = Fit::min_max, .ties = Ties::up}>>;
TYPED_TEST_SUITE(GroupFamily, Family);

/// What the type promises for a group of numbers.
template <class C>
float bound(const std::vector<float>& group, float scale) {
  float low = group[0], high = group[0];
  for (const float x : group) low = std::min(low, x), high = std::max(high, x);
  const float amax = std::max(std::abs(low), std::abs(high));
  if (C::spec.fit == Fit::mean) return amax;
  const float stored = C::spec.scale == ScaleType::f16 ? 0x1p-11f * (std::abs(low) + (high - low)) +
                                                             0x1p-25f * static_cast<float>(1 << C::spec.bits)
                                                       : 0.0f;
  const float ends = C::spec.fit == Fit::extreme ? 1.0f : 0.5f;
  return std::abs(scale) * ends * 1.00001f + stored + amax * 1e-6f;
}

template <class C>
void expect_bound(TileShape shape, const std::vector<float>& rows) {
  GuardedTile<C> tile(shape);
  tile.encode(rows);
  const Index group = C::form.group_of(shape);
  const bool channels = C::spec.along == Along::channels;
  const Index count = static_cast<Index>(rows.size()) / shape.width;
  std::vector<std::vector<float>> decoded;
  for (Index t = 0; t < count; ++t) decoded.push_back(tile.decode(t));
  for (Index a = 0; a < (channels ? count : shape.width); ++a)
    for (Index start = 0; start < (channels ? shape.width : count); start += group) {
      std::vector<float> x, y;
      for (Index i = start; i < std::min(start + group, channels ? shape.width : count); ++i) {
        const Index t = channels ? a : i, c = channels ? i : a;
        x.push_back(rows[static_cast<std::size_t>(t * shape.width + c)]);
        y.push_back(decoded[static_cast<std::size_t>(t)][static_cast<std::size_t>(c)]);
      }
      std::vector<std::uint8_t> codes(x.size());
      const GroupBits bits = C::quantize(x.data(), 1, static_cast<Index>(x.size()), nullptr, codes.data(), 1);
      for (std::size_t i = 0; i < x.size(); ++i) {
        ASSERT_LE(std::abs(x[i] - y[i]), bound<C>(x, C::scale_of(bits, nullptr)))
            << C::name << ' ' << x[i] << ' ' << y[i];
        ASSERT_LT(codes[i], C::form.codes());
      }
    }
}

TYPED_TEST(GroupFamily, ErrorIsHalfAScale) {
  using C = TypeParam;
  for (const TileShape shape : {TileShape{32, 64}, TileShape{64, 128}, TileShape{32, 96}, TileShape{64, 256}}) {
    if (!C::fits(shape)) continue;
    expect_bound<C>(shape, test::gaussians(1, shape.tokens * shape.width));
    expect_bound<C>(shape, test::outliers(2, shape.tokens, shape.width));
    auto shifted = test::gaussians(3, shape.tokens * shape.width);
    for (float& x : shifted) x = x * 0.01f - 30;
    expect_bound<C>(shape, shifted);
    for (float& x : shifted) x *= 1e-7f;
    expect_bound<C>(shape, shifted);
    expect_bound<C>(shape, test::gaussians(4, 3 * shape.width));  // a tile that is not full
  }
}

TYPED_TEST(GroupFamily, IsAGroupCodecOfUniqueBytes) {
  using C = TypeParam;
  static_assert(GroupCodec<C>);
  test::expect_strides_do_not_matter<C>(32);
  if constexpr (C::rows_move) test::expect_rows_move<C>({32, 128});
  test::expect_decodes_anything<C>({32, 64});
  test::expect_decodes_anything<C>({64, 192});
}

TYPED_TEST(GroupFamily, ZeroIsZero) {
  using C = TypeParam;
  GuardedTile<C> tile({32, 64});
  tile.encode(std::vector<float>(32 * 64, 0.0f));
  for (Index t = 0; t < 32; ++t) EXPECT_EQ(tile.decode(t), std::vector<float>(64, 0.0f)) << C::name;
  tile.encode(std::vector<float>(32 * 64, -0.0f));
  for (Index t = 0; t < 32; ++t) EXPECT_EQ(tile.decode(t), std::vector<float>(64, 0.0f)) << C::name;
}

TYPED_TEST(GroupFamily, NumbersThatHurt) {
  using C = TypeParam;
  const float denormal = std::numeric_limits<float>::denorm_min(), huge = std::numeric_limits<float>::max();
  const TileShape shape{32, 64};
  const auto calm = test::gaussians(9, 32 * 64);
  GuardedTile<C> reference(shape);
  reference.encode(calm);
  for (const float bad : {nan_value, -nan_value, inf, -inf, huge, -huge, 65504.0f, 1e6f, -1e6f, 0x1p126f}) {
    auto rows = calm;
    rows[5 * 64 + 37] = bad;
    GuardedTile<C> tile(shape);
    tile.encode(rows);
    for (Index t = 0; t < 32; ++t) {
      const auto row = tile.decode(t), before = reference.decode(t);
      for (Index c = 0; c < 64; ++c) {
        const auto i = static_cast<std::size_t>(c);
        ASSERT_TRUE(std::isfinite(row[i])) << C::name << ' ' << bad;
        const Index group = C::form.group_of(shape);
        const bool same_group =
            C::spec.along == Along::channels ? t == 5 && c / group == 37 / group : c == 37 && t / group == 5 / group;
        if (!same_group) {
          ASSERT_EQ(row[i], before[i]) << C::name << ": another group noticed " << bad;
        }
      }
    }
    const float x = tile.decode(5)[37];
    if (bad >= 65504.0f) {
      EXPECT_GE(x, C::spec.fit == Fit::mean ? 900.0f : 65000.0f) << C::name << ' ' << bad;
    }
    if (bad <= -1e6f) {
      EXPECT_LE(x, C::spec.fit == Fit::mean ? -900.0f : -65000.0f) << C::name << ' ' << bad;
    }
  }
  // NaN is 0, to the bit.
  auto with_nan = calm, with_zero = calm;
  with_nan[70] = nan_value, with_zero[70] = 0;
  GuardedTile<C> a(shape), b(shape);
  a.encode(with_nan), b.encode(with_zero);
  EXPECT_EQ(a.bytes(), b.bytes()) << C::name;
  // Denormals end as 0 or themselves, and divide by nothing.
  for (const float tiny : {denormal, 1e-40f, std::numeric_limits<float>::min(), 1e-30f}) {
    std::vector<float> rows(32 * 64);
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = i % 3 == 0 ? -tiny : tiny * static_cast<float>(i % 5);
    a.encode(rows);
    for (Index t = 0; t < 32; ++t)
      for (const float x : a.decode(t)) ASSERT_LE(std::abs(x), 6 * tiny) << C::name;
  }
  // All of them at once.
  std::vector<float> rows(32 * 64);
  const float all[] = {nan_value, inf, -inf, huge, -huge, denormal, 1.0f};
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = all[random_bits(1, i) % 7];
  a.encode(rows);
  for (Index t = 0; t < 32; ++t)
    for (const float x : a.decode(t)) ASSERT_TRUE(std::isfinite(x)) << C::name;
}

TYPED_TEST(GroupFamily, ConstantGroups) {
  using C = TypeParam;
  for (const float x : {1.5f, -3.0f, 1000.0f, 0.25f}) {  // representable halves
    GuardedTile<C> tile({32, 64});
    tile.encode(std::vector<float>(32 * 64, x));
    const float tolerance = C::spec.fit == Fit::min_max   ? 0.0f
                            : C::spec.fit == Fit::integer ? std::abs(x) * 0x1p-14f
                            : C::spec.fit == Fit::extreme && x > 0
                                ? std::abs(x) / static_cast<float>(1 << (C::spec.bits - 1))
                                : std::abs(x) * 0x1p-10f;
    for (Index t = 0; t < 32; ++t)
      for (const float y : tile.decode(t)) ASSERT_NEAR(y, x, tolerance) << C::name;
  }
}

TYPED_TEST(GroupFamily, EmptySlotsTakeNoPart) {
  using C = TypeParam;
  const auto rows = test::gaussians(11, 5 * 64);
  GuardedTile<C> dirty({32, 64}), clean({32, 64});
  for (std::size_t i = 0; i < dirty.size(); ++i) dirty.tile()[i] = std::byte{0x5a}, clean.tile()[i] = std::byte{0};
  dirty.encode(rows), clean.encode(rows);
  for (Index t = 0; t < 5; ++t) EXPECT_EQ(dirty.decode(t), clean.decode(t));
  if (!C::rows_move) {
    EXPECT_EQ(dirty.bytes(), clean.bytes()) << C::name << ": the whole tile is written";
  }
}

// ---- a textbook: the formulas, one number at a time ------------------------------------------------------------------

float as_half(float x) { return static_cast<float>(half(x)); }

TEST(Group, IsTheTextbookAtEveryLength) {
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    const auto n = static_cast<Index>(1 + seed % 70);
    auto x = test::gaussians(seed, n);
    for (float& v : x) {
      if (seed % 3 == 1) v = std::round(v * 8) / 8;  // many ties, zeros of both signs
      if (seed % 3 == 2) v = v * 3 + 40;
    }
    float low = x[0], high = x[0], amax = 0;
    for (const float v : x) low = std::min(low, v), high = std::max(high, v), amax = std::max(amax, std::abs(v));
    GroupBits bits;
    {
      const auto codes = codes_of<Int8>(x, &bits);
      const float scale = as_half(amax / 127), inverse = scale != 0 ? 1 / scale : 0;
      ASSERT_EQ(bits.scale, half(amax / 127).bits);
      for (std::size_t i = 0; i < x.size(); ++i)
        ASSERT_EQ(codes[i], 128 + std::clamp(static_cast<int>(std::nearbyint(x[i] * inverse)), -127, 127));
    }
    {
      const auto codes = codes_of<Affine<3>>(x, &bits);
      const float scale = as_half((high - low) / 7), zero = as_half(low), inverse = scale != 0 ? 1 / scale : 0;
      ASSERT_EQ(bits.scale, half((high - low) / 7).bits);
      ASSERT_EQ(static_cast<float>(half_of(bits.zero)), zero);
      for (std::size_t i = 0; i < x.size(); ++i)
        ASSERT_EQ(codes[i], std::clamp(static_cast<int>(std::nearbyint((x[i] - zero) * inverse)), 0, 7));
    }
    {
      const auto codes = codes_of<KvTunerToken<4>>(x, &bits);
      const float scale = as_half(std::max(std::max(high - low, 1e-5f) / 15, amax * 0x1p-14f)), inverse = 1 / scale;
      const int zero = static_cast<int>(std::nearbyint(low * inverse)) + 8;
      ASSERT_EQ(bits.scale, half(scale).bits);
      ASSERT_EQ(static_cast<std::int16_t>(bits.zero), zero);
      for (std::size_t i = 0; i < x.size(); ++i) {
        const float c = x[i] * inverse - static_cast<float>(zero);
        ASSERT_EQ(codes[i], 8 + std::clamp(static_cast<int>(std::nearbyint(c)), -8, 7));
      }
    }
  }
}

TEST(Group, RoundingCatchesWhatIsFarOut) {
  using detail::round_even_int;
  for (const float v : {0.0f, -0.0f, 0.5f, 1.5f, -0.5f, -2.5f, 4194302.5f, -4194303.5f, 1e-40f})
    EXPECT_EQ(round_even_int(v), static_cast<int>(std::nearbyint(v))) << v;
  for (const float v : {5e6f, 1.25e7f, 12582912.0f, 1.3e7f, 2e7f, 2.6e7f, 1e10f, 1e20f, 3e38f, inf}) {
    EXPECT_GT(round_even_int(v), 4000000) << v;
    EXPECT_LT(round_even_int(-v), -4000000) << v;
  }
}

TEST(Group, MinimaOfZeroHaveNoSign) {
  GroupBits bits;
  codes_of<Affine<4>>({1, -0.0f, 0.0f}, &bits);
  EXPECT_EQ(bits.zero, 0u);
  codes_of<Affine<4>>({-0.0f, -0.0f, -0.0f}, &bits);
  EXPECT_EQ(bits.zero, 0u);
}

TEST(Group, CodesOfEmptySlotsAreZero) {
  GuardedTile<KiviKeys<8>> tile({64, 4});
  tile.encode(test::gaussians(12, 37 * 4));  // a full group, then one of five tokens
  const auto bytes = tile.bytes();
  for (std::size_t c = 0; c < 4; ++c)
    for (std::size_t i = 5; i < 32; ++i) ASSERT_EQ(bytes[4 * 32 + c * 32 + i], 0);
  tile.encode(test::gaussians(12, 5 * 4));  // the second group has no token: no scale and no minimum either
  const auto few = tile.bytes();
  for (std::size_t i = 4 * 32; i < 8 * 32; ++i) ASSERT_EQ(few[i], 0);
  for (std::size_t c = 4; c < 8; ++c)
    for (const std::size_t plane : {std::size_t{256}, std::size_t{256 + 16}})
      ASSERT_EQ(few[plane + 2 * c] | few[plane + 2 * c + 1], 0);
}

TEST(Group, ScalesWithoutAnInverseAreZero) {
  using Even = Group<GroupSpec{.bits = 4, .scale = ScaleType::f32}>;
  using Low = Group<GroupSpec{.bits = 4, .fit = Fit::min_max, .scale = ScaleType::f32}>;
  GroupBits bits;
  EXPECT_EQ(codes_of<Even>({1e-40f, 0, -2e-40f}, &bits), (std::vector<int>{8, 8, 8}));
  EXPECT_EQ(bits.scale, 0u);
  EXPECT_EQ(codes_of<Low>({1e-40f, 0, -2e-40f}, &bits), (std::vector<int>{0, 0, 0}));
  EXPECT_EQ(bits.scale, 0u);
  EXPECT_EQ(Low::zero_of(bits), -2e-40f);
  const float least = detail::least_scale;
  EXPECT_EQ(codes_of<Even>({7 * least, -7 * least, 0}, &bits), (std::vector<int>{15, 1, 8}));
  EXPECT_EQ(Even::scale_of(bits), least);
}

// ---- ties -----------------------------------------------------------------------------------------------------------

TEST(Group, TiesAreAParameter) {
  constexpr GroupSpec even{.bits = 4, .fit = Fit::min_max};
  constexpr GroupSpec away{.bits = 4, .fit = Fit::min_max, .ties = Ties::away};
  constexpr GroupSpec up{.bits = 4, .fit = Fit::min_max, .ties = Ties::up};
  const std::vector<float> x = {0, 15, 0.5f, 1.5f, 2.5f, 14.5f, 2.4999998f};
  EXPECT_EQ(codes_of<Group<even>>(x), (std::vector<int>{0, 15, 0, 2, 2, 14, 2}));
  EXPECT_EQ(codes_of<Group<away>>(x), (std::vector<int>{0, 15, 1, 2, 3, 15, 2}));
  EXPECT_EQ(codes_of<Group<up>>(x), (std::vector<int>{0, 15, 1, 2, 3, 15, 2}));
  const std::vector<float> y = {-7, 7, -0.5f, 0.5f, -1.5f, 2.5f, -2.5f};
  EXPECT_EQ(codes_of<Symmetric<4>>(y), (std::vector<int>{1, 15, 8, 8, 6, 10, 6}));
  EXPECT_EQ((codes_of<Group<GroupSpec{.bits = 4, .ties = Ties::away}>>(y)), (std::vector<int>{1, 15, 7, 9, 6, 11, 5}));
  EXPECT_EQ((codes_of<Group<GroupSpec{.bits = 4, .ties = Ties::up}>>(y)), (std::vector<int>{1, 15, 8, 9, 7, 11, 6}));
  // The sum of `up` is a float: 0.49999997 + 0.5 is 1.
  const std::vector<float> z = {0, 15, 0.49999997f};
  EXPECT_EQ(codes_of<Group<away>>(z)[2], 0);
  EXPECT_EQ(codes_of<Group<up>>(z)[2], 1);
}

TEST(Group, CodesComeFromWhatIsStored) {
  // 1000 / 127 = 7.87402 is the half 7.875: 791.378 is 100.505 of those and 100.493 of these.
  const std::vector<float> x = {1000, 791.378f, -791.378f, 0};
  EXPECT_EQ(codes_of<Int8>(x), (std::vector<int>{255, 228, 28, 128}));
  EXPECT_EQ((codes_of<Group<GroupSpec{.from = CodesFrom::exact}>>(x)), (std::vector<int>{255, 229, 27, 128}));
}

}  // namespace
}  // namespace kvpare

// Three levels: VidKV's example, base-3 bytes, the rules for threshold and scale.
#include "kvpare/codec/ternary.hpp"

#include <gtest/gtest.h>

#include <limits>

#include "support/codec_tiles.hpp"

namespace kvpare {
namespace {

using test::GuardedTile;
using Mean = Ternary<TernaryFit::mean>;
using Largest = Ternary<TernaryFit::amax>;

static_assert(Ternary<>::name == "ternary" && Largest::name == "ternary_amax");
static_assert(Ternary<TernaryFit::mean, Along::tokens, 32, 50>::name == "ternary_channel_g32_mean_gamma50");
static_assert(Ternary<>::tile_bytes({64, 128}) == 64 * 28 && Ternary<>::tile_bytes({1, 8}) == 4);
static_assert(Ternary<TernaryFit::nonzero, Along::channels, 32>::tile_bytes({1, 128}) == 26 + 8);
static_assert(Ternary<TernaryFit::nonzero, Along::tokens, 32>::tile_bytes({64, 128}) == 2 * 128 * 9);
static_assert(Ternary<>::fits({16, 7}) && !Ternary<TernaryFit::mean, Along::tokens, 32>::fits({16, 8}));

template <class C>
std::vector<int> codes_of(const std::vector<float>& x, float* scale = nullptr) {
  std::vector<std::uint8_t> codes(x.size());
  const GroupBits bits = C::quantize(x.data(), 1, static_cast<Index>(x.size()), nullptr, codes.data(), 1);
  if (scale) *scale = C::scale_of(bits);
  return {codes.begin(), codes.end()};
}
template <class C>
float squared_error(const std::vector<float>& x) {
  GuardedTile<C> tile({1, static_cast<Index>(x.size())});
  tile.encode(x);
  float sum = 0;
  for (std::size_t c = 0; c < x.size(); ++c) sum += (tile.decode(0)[c] - x[c]) * (tile.decode(0)[c] - x[c]);
  return sum;
}

TEST(Ternary, VidkvWorkedExample) {
  const std::vector<float> x = {0.9f, -0.1f, 0.4f, -1.2f};
  float scale = 0;
  EXPECT_EQ(codes_of<Ternary<>>(x, &scale), (std::vector<int>{2, 1, 1, 0}));
  EXPECT_EQ(scale, static_cast<float>(half(1.05f)));
  EXPECT_EQ(codes_of<Mean>(x, &scale), (std::vector<int>{2, 1, 1, 0}));
  EXPECT_EQ(scale, static_cast<float>(half(0.65f)));
  EXPECT_EQ((codes_of<Ternary<TernaryFit::nonzero, Along::channels, 0, 50>>(x)), (std::vector<int>{2, 1, 2, 0}));
  EXPECT_NEAR(squared_error<Mean>(x), 0.535f, 1e-3f);
  EXPECT_NEAR(squared_error<Ternary<>>(x), 0.215f, 1e-3f);
  // Two bits to a code, as the release stores them.
  const std::uint8_t codes[] = {2, 1, 1, 0};
  std::byte byte{};
  detail::pack_codes<2>(codes, 4, &byte);
  EXPECT_EQ(byte, std::byte{0x16});
}

TEST(Ternary, FiveToAByte) {
  GuardedTile<Largest> tile({1, 7});
  tile.encode({-1, 0, 1, 1, -1, 1, 0.2f});
  EXPECT_EQ(tile.bytes(), (std::vector<int>{0 + 3 * 1 + 9 * 2 + 27 * 2 + 81 * 0, 2 + 3 * 1, 0x00, 0x3c}));
  EXPECT_EQ(tile.decode(0), (std::vector<float>{-1, 0, 1, 1, -1, 1, 0}));
  for (int byte = 0; byte < 243; ++byte) {  // every byte that is written, there and back
    const auto in = static_cast<std::byte>(byte);
    std::uint8_t codes[5];
    std::byte out{};
    detail::unpack_ternary(&in, 5, codes);
    detail::pack_ternary(codes, 5, &out);
    EXPECT_EQ(in, out);
  }
  for (int byte = 243; byte < 256; ++byte) {
    const auto in = static_cast<std::byte>(byte);
    for (Index i = 0; i < 5; ++i) EXPECT_LT(detail::ternary_at(&in, i), 3);
  }
}

TEST(Ternary, ThresholdsAtTheEdge) {
  // mean 1, γ 0.5 with gamma 50: exactly the threshold is 0. amax: exactly half is not.
  EXPECT_EQ((codes_of<Ternary<TernaryFit::mean, Along::channels, 0, 50>>({2, 0.5f, -0.5f, 1})),
            (std::vector<int>{2, 1, 1, 2}));
  EXPECT_EQ(codes_of<Largest>({2, 1, -1, 0.99f}), (std::vector<int>{2, 2, 0, 1}));
}

template <class C>
class TernaryCodecs : public ::testing::Test {};
using All = ::testing::Types<Ternary<>, Mean, Largest, Ternary<TernaryFit::nonzero, Along::channels, 32>,
                             Ternary<TernaryFit::nonzero, Along::tokens, 32>, Ternary<TernaryFit::mean, Along::tokens>,
                             Ternary<TernaryFit::amax, Along::tokens, 16>>;
TYPED_TEST_SUITE(TernaryCodecs, All);

TYPED_TEST(TernaryCodecs, Laws) {
  using C = TypeParam;
  if constexpr (C::rows_move) test::expect_rows_move<C>({16, 96});
  test::expect_decodes_anything<C>({32, 96});
  test::expect_strides_do_not_matter<C>(32);
  GuardedTile<C> tile({32, 64});
  tile.encode(std::vector<float>(32 * 64, 0.0f));
  for (Index t = 0; t < 32; ++t) EXPECT_EQ(tile.decode(t), std::vector<float>(64, 0.0f));
  std::vector<float> exact(32 * 64);  // -s, 0, s decode exactly, under every rule with a threshold below s
  for (std::size_t i = 0; i < exact.size(); ++i)
    exact[i] = 1.5f * static_cast<float>(static_cast<int>(i * 7 / 3 % 3) - 1);
  tile.encode(exact);
  if (C::name.find("mean") == std::string_view::npos) {
    for (Index t = 0; t < 32; ++t)
      EXPECT_EQ(tile.decode(t), std::vector<float>(exact.begin() + t * 64, exact.begin() + (t + 1) * 64)) << C::name;
  }
}

TYPED_TEST(TernaryCodecs, NumbersThatHurt) {
  using C = TypeParam;
  const float inf = std::numeric_limits<float>::infinity(), nan_value = std::numeric_limits<float>::quiet_NaN();
  const auto calm = test::gaussians(5, 32 * 64);
  GuardedTile<C> before({32, 64}), tile({32, 64}), zero({32, 64});
  before.encode(calm);
  for (const float bad : {nan_value, inf, -inf, 1e30f, 1e-45f}) {
    auto rows = calm, with_zero = calm;
    rows[5 * 64 + 37] = bad, with_zero[5 * 64 + 37] = 0;
    tile.encode(rows), zero.encode(with_zero);
    if (std::isnan(bad)) {
      EXPECT_EQ(tile.bytes(), zero.bytes());
    }
    const Index group = C::form.group_of({32, 64});
    for (Index t = 0; t < 32; ++t)
      for (Index c = 0; c < 64; ++c) {
        const float y = tile.decode(t)[static_cast<std::size_t>(c)];
        ASSERT_TRUE(std::isfinite(y));
        const bool same =
            C::form.along == Along::channels ? t == 5 && c / group == 37 / group : c == 37 && t / group == 5 / group;
        if (!same) {
          ASSERT_EQ(y, before.decode(t)[static_cast<std::size_t>(c)]);
        }
      }
  }
}

TEST(Ternary, NonzeroMeanIsTheBestScaleForItsCodes) {
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    const auto x = test::gaussians(seed, 64);
    EXPECT_LE(squared_error<Ternary<>>(x), squared_error<Mean>(x) * 1.001f);
  }
}

TEST(Ternary, ErrorIsBounded) {
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    const auto x = test::outliers(seed, 1, 64);
    float amax = 0, mean = 0;
    for (const float v : x) amax = std::max(amax, std::abs(v)), mean += std::abs(v) / 64;
    const auto check = [&](auto codec, auto bound) {
      GuardedTile<decltype(codec)> tile({1, 64});
      tile.encode(x);
      float scale = 0;
      codes_of<decltype(codec)>(x, &scale);
      for (std::size_t c = 0; c < 64; ++c) ASSERT_LE(std::abs(tile.decode(0)[c] - x[c]), bound(scale) * 1.001f);
    };
    check(Largest{}, [&](float scale) { return scale / 2; });
    check(Ternary<>{}, [&](float scale) { return std::max({0.7f * mean, amax - scale, scale - 0.7f * mean}); });
    check(Mean{}, [&](float scale) { return std::max({0.7f * mean, amax - scale, scale - 0.7f * mean}); });
  }
}

}  // namespace
}  // namespace kvpare

// Names of codecs: one each, and made of what settings and file formats can hold.
#include <gtest/gtest.h>

#include <set>

#include "kvpare/codec/fp8.hpp"
#include "kvpare/codec/ggml.hpp"
#include "kvpare/codec/kv_quant.hpp"
#include "kvpare/codec/raw.hpp"
#include "kvpare/codec/ternary.hpp"
#include "kvpare/codec/turbo_quant.hpp"

namespace kvpare {
namespace {

/// Every member of a family that differs in one thing from the first, and every codec beside the families.
template <class... Cs>
std::vector<std::string_view> names() {
  static_assert((Codec<Cs> && ...));
  return {Cs::name...};
}
template <GroupSpec... specs>
std::vector<std::string_view> names_of_groups() {
  return names<Group<specs>...>();
}

TEST(CodecNames, AreUniqueAndPlain) {
  using S = GroupSpec;
  auto all = names_of_groups<
      S{.bits = 8}, S{.bits = 5}, S{.bits = 4}, S{.bits = 3}, S{.bits = 2}, S{.bits = 1, .fit = Fit::mean},
      S{.bits = 1, .fit = Fit::min_max}, S{.bits = 4, .fit = Fit::extreme}, S{.bits = 4, .fit = Fit::min_max},
      S{.bits = 4, .fit = Fit::integer}, S{.bits = 4, .along = Along::tokens}, S{.bits = 4, .group = 32},
      S{.bits = 4, .group = 64}, S{.bits = 4, .parts = 2}, S{.bits = 4, .scale = ScaleType::f32},
      S{.bits = 4, .ties = Ties::away}, S{.bits = 4, .ties = Ties::up}, S{.bits = 4, .ties = Ties::down},
      S{.bits = 4, .from = CodesFrom::exact}, S{.bits = 4, .packing = Packing::halves}, KiviKeys<2>::spec,
      KiviValues<2>::spec>();
  const auto rest =
      names<Raw<float>, Raw<half>, Raw<bfloat16>, Fp8E4M3, Fp8E5M2, MxFp4<Ties::even>, MxFp4<Ties::down>,
            NvFp4<Ties::even>, NvFp4<Ties::down>, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0, Iq4Nl, Q2_0, Q1_0, Fixed<4>, Fixed<2>,
            ChannelAffine<Fixed<4>>, ChannelScaled<Fixed<4>>, Balanced<Fixed<4>>, Rotated<Int4>, Rotated<Int4, 1>,
            Rotated<Int4, 12>, Rotated<Rotated<Int4>>, Ternary<>, Ternary<TernaryFit::mean>, Ternary<TernaryFit::amax>,
            Ternary<TernaryFit::nonzero, Along::tokens>, Ternary<TernaryFit::nonzero, Along::channels, 32>,
            Ternary<TernaryFit::nonzero, Along::channels, 0, 50>, Lloyd<4>, Lloyd<4, true>, Lloyd<3>, LloydSketch<4>,
            LloydSketch<4, HadamardSketch<2>>, TurboQuant<4>, TurboProduct<4>,
            NuqCodes<4>, NuqCodes<3>, NuqRange<4>, Outliers<Int4, 1>, Outliers<Int4, 2>, KvQuantValues<4>, KvQuantKeys<4>,
            KvQuantKeys<4, 2>, KvQuantRotatedKeys<4>, Unrotated<Int4>>();
  all.insert(all.end(), rest.begin(), rest.end());
  std::set<std::string_view> seen;
  for (const std::string_view name : all) {
    EXPECT_TRUE(seen.insert(name).second) << name << " twice";
    EXPECT_EQ(name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_"), std::string_view::npos) << name;
  }
  EXPECT_EQ((Balanced<Rotated<TurboQuant<4, true, (std::uint64_t{1} << 62) - 1>>>::name),
            "balanced_hadamard_hadamard4611686018427387903_lloyd4_nc");
}

}  // namespace
}  // namespace kvpare

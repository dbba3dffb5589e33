// Attention on integer codes, and what integer queries cost.
#include <kvpare/codec/group.hpp>

#include "support/coded_tiles.hpp"

namespace kvpare::cpu {
namespace {

template <Codec C>
class CpuTiles : public ::testing::Test {};

using Codecs = ::testing::Types<Symmetric<8, 32>, Symmetric<8>, Affine<8, 32>, Symmetric<4, 32>, Affine<4, 32>,
                                Symmetric<3, 32>, Affine<2, 32>, Symmetric<2>, Affine<1, 32>, Symmetric<1>,
                                KvTunerToken<4>, KiviKeys<2>, KiviKeys<4>, KiviKeys<8>, KiviKeys<3, 0>, MikvGroup<4>,
                                Group<GroupSpec{.bits = 4, .fit = Fit::min_max, .group = 16, .scale = ScaleType::f32}>>;
TYPED_TEST_SUITE(CpuTiles, Codecs);

TYPED_TEST(CpuTiles, ScoresAreThoseOfDecodedKeys) { check_keys<TypeParam>(); }
TYPED_TEST(CpuTiles, SumsAreThoseOfDecodedValues) { check_values<TypeParam>(); }

/// Root mean square of what scores of decoded keys, and scores of codes, are off by.
struct ScoreErrors {
  double own = 0, all = 0;
};
template <Codec C>
ScoreErrors score_errors(Isa isa) {
  const TileShape shape{64, 128};
  const TileOps* ops = tile_ops<C>(Side::keys, shape, 16);
  const Kernels& k = kernels(isa);
  ScoreErrors errors;
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    std::vector<float> keys(64 * 128), q(4 * 128), out(4 * 64), row(128);
    for (Index i = 0; i < 64 * 128; ++i)  // four channels far out, as keys of language models have them
      keys[static_cast<std::size_t>(i)] = normal(100 + seed, i) * (i % 128 % 37 == 5 ? 20.0f : 1.0f);
    for (Index i = 0; i < 4 * 128; ++i) q[static_cast<std::size_t>(i)] = normal(200 + seed, i);
    TileMemory tile(C::tile_bytes(shape)), prepared(ops->query_bytes(4, 128));
    ops->encode(k, shape, keys.data(), 0, 64, {}, nullptr, tile.data());
    ops->prepare_query(k, q.data(), 128, 4, 128, nullptr, prepared.data());
    const Slots all = slot_lists(64, 1)[0];
    ops->score(k, prepared.data(), 4, {tile.data(), shape, nullptr, all.list.data(), 64, true}, {}, out.data(), 64);
    for (Index t = 0; t < 64; ++t) {
      ops->decode(k, shape, tile.data(), t, 0, nullptr, row.data());
      for (Index i = 0; i < 4; ++i) {
        double exact = 0, decoded = 0;
        for (Index c = 0; c < 128; ++c) {
          const auto x = static_cast<double>(q[static_cast<std::size_t>(i * 128 + c)]);
          exact += x * static_cast<double>(keys[static_cast<std::size_t>(t * 128 + c)]);
          decoded += x * static_cast<double>(row[static_cast<std::size_t>(c)]);
        }
        errors.own += std::pow(decoded - exact, 2);
        errors.all += std::pow(static_cast<double>(out[static_cast<std::size_t>(i * 64 + t)]) - exact, 2);
      }
    }
  }
  return {std::sqrt(errors.own), std::sqrt(errors.all)};
}

TYPED_TEST(CpuTiles, IntegerQueriesAddAtMostTwoPercentToTheError) {
  for (const Isa isa : sets_of_this_machine()) {
    const ScoreErrors errors = score_errors<TypeParam>(isa);
    EXPECT_LE(errors.all, errors.own * 1.02) << TypeParam::name << " " << name_of(isa);
  }
}

}  // namespace
}  // namespace kvpare::cpu

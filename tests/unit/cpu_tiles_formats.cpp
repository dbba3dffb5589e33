// Attention on codes of other engines' formats, on small floats, and through transforms.
#include <kvpare/codec/block_float.hpp>
#include <kvpare/codec/folded.hpp>
#include <kvpare/codec/fp8.hpp>
#include <kvpare/codec/ggml.hpp>
#include <kvpare/codec/ternary.hpp>
#include <kvpare/codec/turbo_quant.hpp>

#include "support/coded_tiles.hpp"

namespace kvpare::cpu {
namespace {

template <Codec C>
class CpuFormatTiles : public ::testing::Test {};

using Codecs = ::testing::Types<Q4_0, Q5_0, Q5_1, Iq4Nl, Q2_0, Fp8E4M3, Fp8E5M2, MxFp4<>, NvFp4<>, Ternary<>,
                                Ternary<TernaryFit::amax, Along::channels, 32>,
                                Ternary<TernaryFit::nonzero, Along::tokens, 16>>;
TYPED_TEST_SUITE(CpuFormatTiles, Codecs);

TYPED_TEST(CpuFormatTiles, ScoresAreThoseOfDecodedKeys) { check_keys<TypeParam>(); }
TYPED_TEST(CpuFormatTiles, SumsAreThoseOfDecodedValues) { check_values<TypeParam>(); }

/// Keys and values of a codec that is folded, through the loops of what it folds.
template <Codec C>
void check_folded(Isa isa, const float* state) {
  const TileShape shape{64, 128};
  const Index rows = 5;
  const Kernels& k = kernels(isa);
  std::vector<float> x(64 * 128), q(5 * 128), out(5 * 64), p(5 * 64), acc(5 * 128), sums(5), alpha(5, 0.0f), row(128);
  for (Index i = 0; i < 64 * 128; ++i) x[static_cast<std::size_t>(i)] = normal(1, i) + 0.25f;
  for (Index i = 0; i < 5 * 128; ++i) q[static_cast<std::size_t>(i)] = normal(2, i);
  for (Index i = 0; i < 5 * 64; ++i)
    p[static_cast<std::size_t>(i)] = random_unit(3, i),
    sums[static_cast<std::size_t>(i / 64)] += p[static_cast<std::size_t>(i)];
  const Slots all = slot_lists(64, 1)[0];
  const TileOps* keys = tile_ops<C>(Side::keys, shape, 16);
  const TileOps* values = tile_ops<C>(Side::values, shape, 16);
  ASSERT_EQ(keys->support, Support::fused);
  ASSERT_TRUE(keys->folds);
  TileMemory key(keys->tile_bytes(shape)), value(values->tile_bytes(shape)), prepared(keys->query_bytes(rows, 128));
  keys->encode(k, shape, x.data(), 0, 64, {}, state, key.data());
  values->encode(k, shape, x.data(), 0, 64, {}, state, value.data());
  keys->prepare_query(k, q.data(), 128, rows, 128, state, prepared.data());
  keys->score(k, prepared.data(), rows, {key.data(), shape, state, all.list.data(), 64, true}, {}, out.data(), 64);
  values->accumulate(k, p.data(), 64, alpha.data(), rows, {value.data(), shape, state, all.list.data(), 64, true}, {},
                     acc.data(), 128);
  values->finish_output(rows, 128, state, sums.data(), acc.data(), 128);
  ASSERT_TRUE(key.intact() && value.intact() && prepared.intact());
  std::vector<double> want(5 * 128, 0.0);
  for (Index t = 0; t < 64; ++t) {
    keys->decode(k, shape, key.data(), t, 0, state, row.data());
    for (Index i = 0; i < rows; ++i) {
      double sum = 0;
      for (Index c = 0; c < 128; ++c) {
        sum += static_cast<double>(q[static_cast<std::size_t>(i * 128 + c)]) *
               static_cast<double>(row[static_cast<std::size_t>(c)]);
        want[static_cast<std::size_t>(i * 128 + c)] += static_cast<double>(p[static_cast<std::size_t>(i * 64 + t)]) *
                                                       static_cast<double>(row[static_cast<std::size_t>(c)]);
      }
      ASSERT_NEAR(static_cast<double>(out[static_cast<std::size_t>(i * 64 + t)]), sum, 0.6)
          << C::name << " " << name_of(isa);
    }
  }
  for (std::size_t i = 0; i < want.size(); ++i)
    // Centroids are bytes: off by 1/254 of the largest, 0.0108 deviations, always the same way where rows have a mean; the
    // probabilities sum to 32.
    ASSERT_NEAR(static_cast<double>(acc[i]), want[i], 0.0108 * 32) << C::name << " " << name_of(isa);
}

TEST(CpuFoldedTiles, AreTheLoopsOfWhatTheyFold) {
  for (const Isa isa : sets_of_this_machine()) {
    check_folded<TurboQuant<4>>(isa, nullptr);
    check_folded<MikvKeys<4>>(isa, nullptr);
    std::vector<float> state(static_cast<std::size_t>(state_floats<MikvKeys<4>>(128)));
    for (std::size_t i = 0; i < state.size(); ++i) state[i] = 0.5f + random_unit(7, static_cast<Index>(i));
    check_folded<MikvKeys<4>>(isa, state.data());
  }
}

/// A byte is some five codes whatever it holds, and every five has a byte: written one by one over what lies there.
TEST(CpuTernaryTiles, EveryByteIsFiveCodes) {
  for (int first = 0; first < 256; ++first)
    for (int number = 0; number < 243; ++number) {
      auto byte = static_cast<std::byte>(first);
      for (int step = 0, rest = number; step < 5; ++step, rest /= 3) {
        ASSERT_LT(fused::ternary_bytes.code(byte, step), 3);
        byte = fused::ternary_bytes.with_code(byte, step, static_cast<std::uint8_t>(rest % 3));
      }
      for (int step = 0, rest = number; step < 5; ++step, rest /= 3)
        ASSERT_EQ(fused::ternary_bytes.code(byte, step), rest % 3) << first << " " << number;
    }
}

/// Rows to other slots, up and down, all of a byte's other codes staying as they are.
TEST(CpuTernaryTiles, RowsMove) {
  const TileShape shape{32, 80};
  for (const Isa isa : sets_of_this_machine())
    for (const Side side : {Side::keys, Side::values}) {
      const TileOps* ops = tile_ops<Ternary<>>(side, shape, 16);
      const Kernels& k = kernels(isa);
      std::vector<float> x(32 * 80), want(80), got(80);
      for (Index i = 0; i < 32 * 80; ++i) x[static_cast<std::size_t>(i)] = normal(1, i);
      for (const Index from : {3, 9}) {
        const Index to = 12 - from, count = 15;
        TileMemory tile(ops->tile_bytes(shape)), moved(ops->tile_bytes(shape));
        ops->encode(k, shape, x.data(), 0, 32, {}, nullptr, tile.data());
        std::copy_n(tile.data(), ops->tile_bytes(shape), moved.data());
        ops->move_rows(k, shape, moved.data(), from, moved.data(), to, count);
        ASSERT_TRUE(moved.intact());
        for (Index t = 0; t < 32; ++t) {
          const bool is_moved = t >= to && t < to + count;
          ops->decode(k, shape, tile.data(), is_moved ? t - to + from : t, 0, nullptr, want.data());
          ops->decode(k, shape, moved.data(), t, 0, nullptr, got.data());
          ASSERT_EQ(want, got) << name_of(isa) << " slot " << t;
        }
      }
    }
}

TEST(CpuTileSupport, SaysWhatRunsOnCodes) {
  const auto support = [](const TileOps* ops) { return ops == nullptr ? Support::unsupported : ops->support; };
  EXPECT_EQ(support(tile_ops<Q4_0>(Side::keys, {64, 128}, 16)), Support::fused);
  EXPECT_EQ(support(tile_ops<Q4_0>(Side::keys, {64, 80}, 16)), Support::unsupported);
  for (const Index tokens : {16, 32, 64})
    for (Index width = 16; width <= 256; width += 16)
      for (const Side side : {Side::keys, Side::values}) {
        EXPECT_EQ(support(tile_ops<Ternary<>>(side, {tokens, width}, 16)), Support::fused);
        EXPECT_EQ(support(tile_ops<Ternary<TernaryFit::mean, Along::tokens>>(side, {tokens, width}, 16)), Support::fused);
      }
  EXPECT_EQ(support(tile_ops<Ternary<>>(Side::values, {64, 72}, 16)), Support::generic);
  EXPECT_EQ(support(tile_ops<Fp8E4M3>(Side::values, {64, 80}, 16)), Support::generic);
  EXPECT_EQ(support(tile_ops<Fp8E4M3>(Side::values, {64, 96}, 16)), Support::fused);
}

}  // namespace
}  // namespace kvpare::cpu

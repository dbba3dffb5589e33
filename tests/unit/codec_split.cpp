// Two codecs side by side: bytes, states and attention are those of the parts.
#include "kvpare/codec/split.hpp"

#include <gtest/gtest.h>

#include "kvpare/codec/block_float.hpp"
#include "kvpare/codec/fp8.hpp"
#include "kvpare/codec/raw.hpp"
#include "kvpare/codec/rotation.hpp"
#include "support/codec_tiles.hpp"
#include "support/coded_tiles.hpp"

namespace kvpare {
namespace {

using test::GuardedTile;
using Signs = Group<GroupSpec{.bits = 1, .fit = Fit::mean, .along = Along::tokens, .group = 32}>;
using Rows = Split<Int4, Int8, FirstPercent<25>>;
using Tiles = Split<KiviKeys<2>, Signs, FirstPercent<50>>;

static_assert(Rows::name == "split25_int4_int8");
static_assert(Tiles::name == "split50_int2_channel_g32_min_int1_channel_g32");
static_assert(FirstPercent<50>::first(128) == 64 && FirstPercent<75>::first(80) == 60);
static_assert(FirstPercent<25>::first(10) == 2 && FirstPercent<50>::first(10) == 6, "what is left is even");
static_assert(Rows::rows_move && !Tiles::rows_move && !Rows::host_only && Tiles::host_only);
static_assert(Rows::tile_bytes({16, 64}) == 16 * (8 + 2 + 48 + 2));
static_assert(Tiles::tile_bytes({64, 128}) == 64 * 64 / 4 + 2 * 64 * 4 + 64 * 64 / 8 + 2 * 64 * 2);
static_assert(Tiles::fits({32, 8}) && !Tiles::fits({16, 8}) && !Tiles::fits({32, 1}) && !Rows::fits({16, 7}));
static_assert(state_floats<Split<Fp8E4M3, NvFp4<>, FirstPercent<50>>>(64) == 2);
static_assert(state_floats<Split<Int4, NvFp4<>, FirstPercent<50>>>(64) == 1 && state_floats<Rows>(64) == 0);

/// Channels [from, from + n) of every row.
std::vector<float> channels(const std::vector<float>& rows, Index width, Index from, Index n) {
  std::vector<float> part;
  for (std::size_t t = 0; t < rows.size() / static_cast<std::size_t>(width); ++t)
    for (Index c = from; c < from + n; ++c)
      part.push_back(rows[t * static_cast<std::size_t>(width) + static_cast<std::size_t>(c)]);
  return part;
}

template <class C>
void expect_parts(TileShape shape, const std::vector<float>& state = {}) {
  using A = typename C::First;
  using B = typename C::Second;
  const Index n = C::first_width(shape.width);
  const auto rows = test::outliers(9, shape.tokens, shape.width);
  const float* given = state.empty() ? nullptr : state.data();
  const float* to_a = state_floats<A>(n) > 0 ? given : nullptr;
  const float* to_b = state_floats<B>(shape.width - n) > 0 && given != nullptr ? given + state_floats<A>(n) : nullptr;
  GuardedTile<C> both(shape);
  GuardedTile<A> a({shape.tokens, n});
  GuardedTile<B> b({shape.tokens, shape.width - n});
  both.encode(rows, 0, given);
  a.encode(channels(rows, shape.width, 0, n), 0, to_a),
      b.encode(channels(rows, shape.width, n, shape.width - n), 0, to_b);
  for (Index t = 0; t < shape.tokens; ++t) {
    auto want = a.decode(t, to_a);
    const auto rest = b.decode(t, to_b);
    want.insert(want.end(), rest.begin(), rest.end());
    EXPECT_EQ(both.decode(t, given), want) << C::name;
  }
  std::vector<int> bytes;
  const auto put = [&](const std::vector<int>& from, Index first, Index count) {
    bytes.insert(bytes.end(), from.begin() + first, from.begin() + first + count);
  };
  if (C::rows_move) {
    const Index row_a = A::tile_bytes({1, n}), row_b = B::tile_bytes({1, shape.width - n});
    for (Index t = 0; t < shape.tokens; ++t) put(a.bytes(), t * row_a, row_a), put(b.bytes(), t * row_b, row_b);
  } else {
    put(a.bytes(), 0, std::ssize(a.bytes())), put(b.bytes(), 0, std::ssize(b.bytes()));
  }
  EXPECT_EQ(both.bytes(), bytes) << C::name;
  if constexpr (C::rows_move) test::expect_rows_move<C>(shape, given);
  test::expect_decodes_anything<C>(shape, state);
}

TEST(Split, IsItsPartsSideBySide) {
  expect_parts<Rows>({16, 64}), expect_parts<Tiles>({32, 48}), expect_parts<Tiles>({64, 128});
  expect_parts<Split<Raw<half>, Int4, FirstPercent<50>>>({16, 10});
  expect_parts<Split<Fp8E4M3, NvFp4<>, FirstPercent<50>>>({16, 64}, {0.25f, 0.5f});
  expect_parts<Split<Int4, NvFp4<>, FirstPercent<50>>>({16, 64}, {0.5f});
  expect_parts<Split<KiviKeys<4>, Tiles, FirstPercent<25>>>({32, 64});
}

TEST(Split, AFewTokensOfATileThatDoesNotMove) {
  const auto rows = test::gaussians(4, 64 * 48);
  GuardedTile<Tiles> some({64, 48}), all({64, 48});
  some.encode({rows.begin(), rows.begin() + 5 * 48});
  std::fill(all.memory.begin() + 64, all.memory.end() - 64, std::byte{0});
  all.encode({rows.begin(), rows.begin() + 5 * 48});
  EXPECT_EQ(some.bytes(), all.bytes()) << "empty slots are written as well";
}

// ---- attention ------------------------------------------------------------------------------------------------------

template <Codec C>
void check_tiles(TileShape shape, const float* state = nullptr) {
  for (const cpu::Isa isa : cpu::sets_of_this_machine()) {
    if (!::testing::Test::HasFatalFailure()) cpu::check<C>(Side::keys, shape, isa, 16, {1, 7}, 1.0 / 127, state);
    if (!::testing::Test::HasFatalFailure()) cpu::check<C>(Side::values, shape, isa, 16, {1, 7}, 1.0 / 32767, state);
  }
  if (!::testing::Test::HasFatalFailure())
    cpu::check<C>(Side::values, shape, cpu::chosen_isa(), 8, {5}, 1.0 / 255, state);
}
template <Codec C>
Support support(Side side, TileShape shape) {
  return cpu::tile_ops<C>(side, shape, 16)->support;
}

TEST(SplitTiles, ScoresAndSumsAreThoseOfDecodedRows) {
  check_tiles<Tiles>({64, 128});
  check_tiles<Tiles>({32, 48});  // neither part has loops
  check_tiles<Split<KiviKeys<2>, Signs, FirstPercent<75>>>({32, 128});
  check_tiles<Split<Symmetric<4, 32>, Affine<8, 32>, FirstPercent<50>>>({64, 128});
  check_tiles<Split<Rotated<Int8>, Int8, FirstPercent<50>>>({16, 64});
  check_tiles<Split<KiviKeys<4>, Tiles, FirstPercent<25>>>({32, 128});
  const float state[] = {0.25f, 0.5f};
  check_tiles<Split<Fp8E4M3, NvFp4<>, FirstPercent<50>>>({16, 64}, state);
}

TEST(SplitTiles, FusedWhereBothPartsAre) {
  EXPECT_EQ(support<Tiles>(Side::keys, {64, 128}), Support::fused);
  EXPECT_EQ(support<Tiles>(Side::values, {64, 128}), Support::fused);
  EXPECT_EQ(support<Tiles>(Side::keys, {64, 96}), Support::generic) << "48 channels of 1 bit";
}

TEST(SplitTiles, RowsMove) {
  using C = Split<Symmetric<4, 32>, Affine<8, 32>, FirstPercent<50>>;
  const TileShape shape{16, 64};
  const cpu::TileOps* ops = cpu::tile_ops<C>(Side::keys, shape, 16);
  const cpu::Kernels& k = cpu::kernels(cpu::chosen_isa());
  const auto rows = test::gaussians(8, 16 * 64);
  cpu::TileMemory from(C::tile_bytes(shape)), to(C::tile_bytes(shape));
  ops->encode(k, shape, rows.data(), 0, 16, {}, nullptr, from.data());
  ops->move_rows(k, shape, from.data(), 3, to.data(), 9, 5);
  std::vector<float> want(64), got(64);
  for (Index t = 0; t < 5; ++t) {
    ops->decode(k, shape, from.data(), 3 + t, 0, nullptr, want.data());
    ops->decode(k, shape, to.data(), 9 + t, 0, nullptr, got.data());
    EXPECT_EQ(want, got);
  }
  EXPECT_TRUE(to.intact());
}

}  // namespace
}  // namespace kvpare

// Attention on pages of mixed bits, on every instruction set of this machine, against decoded rows in double.
#include <kvpare/codec/qaq.hpp>

#include "support/coded_tiles.hpp"

namespace kvpare::cpu {
namespace {

// Rows of different ranges, so that a page has blocks of different bits; a few numbers far out.
std::vector<float> uneven(TileShape shape) {
  std::vector<float> rows(static_cast<std::size_t>(shape.tokens * shape.width));
  for (Index i = 0; i < shape.tokens * shape.width; ++i) {
    const Index t = i / shape.width, c = i % shape.width;
    rows[static_cast<std::size_t>(i)] =
        normal(1, i) * std::exp2(2.5f * normal(7, t)) * (c == t % shape.width || c == 5 ? 9.0f : 1.0f);
  }
  return rows;
}

template <class C>
void check_qaq(Side side, TileShape shape, Isa isa, int probability_bits, Index count, const std::vector<float>& states,
               const std::vector<Index>& row_counts) {
  const float* state = states.empty() ? nullptr : states.data();
  SCOPED_TRACE(std::string(C::name) + " " + std::string(name_of(isa)) + " tokens " + std::to_string(shape.tokens) +
               " width " + std::to_string(shape.width) + " count " + std::to_string(count) + " p " +
               std::to_string(probability_bits));
  const TileOps* ops = tile_ops<C>(side, shape, probability_bits);
  ASSERT_NE(ops, nullptr);
  ASSERT_EQ(ops->support, Support::fused);
  ASSERT_FALSE(ops->rows_move);
  const Kernels& k = kernels(isa);
  const auto x = uneven(shape);
  std::vector<float> attention;
  for (Index t = 0; t < count; ++t) attention.push_back(t % 9 == 4 ? nan : std::exp2(-9 * random_unit(4, t)));
  const TokenFacts facts{nullptr, attention.data()};

  const Index bytes = C::tile_bytes(shape);
  ASSERT_EQ(ops->tile_bytes(shape), bytes);
  TileMemory tile(bytes), canonical(bytes), back(bytes), other(bytes, std::byte{0x33});
  ops->encode(k, shape, x.data(), 0, count, facts, state, tile.data());
  C::encode(shape, x.data(), 0, count, facts, state, canonical.data());
  ops->to_canonical(k, shape, tile.data(), back.data());
  ASSERT_EQ(std::memcmp(canonical.data(), back.data(), static_cast<std::size_t>(bytes)), 0);
  ops->from_canonical(k, shape, back.data(), other.data());
  ASSERT_EQ(std::memcmp(other.data(), tile.data(), static_cast<std::size_t>(bytes)), 0);
  std::vector<std::vector<float>> decoded;
  std::vector<double> ranges;
  for (Index t = 0; t < shape.tokens; ++t) {
    std::vector<float> want(static_cast<std::size_t>(shape.width)), got(want);
    C::decode(shape, canonical.data(), t, state, want.data());
    ops->decode(k, shape, tile.data(), t, 0, state, got.data());
    ASSERT_EQ(want, got);
    const auto [low, high] = std::minmax_element(want.begin(), want.end());
    ranges.push_back(static_cast<double>(*high - *low));
    decoded.push_back(want);
  }
  ASSERT_TRUE(tile.intact() && canonical.intact() && back.intact() && other.intact());

  for (const Slots& slots : slot_lists(count, 5)) {
    if (slots.list.empty()) continue;
    const TileRows listed{tile.data(),   shape,  state, slots.list.data(), static_cast<int>(slots.list.size()),
                          slots.gapless, nullptr};
    const Index n = listed.count;
    std::vector<std::vector<float>> rows_read;
    for (const std::uint8_t slot : slots.list) rows_read.push_back(decoded[slot]);
    const auto of_score = [&](Index t) {
      const double range = ranges[slots.list[static_cast<std::size_t>(t)]];
      double size = static_cast<double>(shape.width) * range * range;
      for (const float y : rows_read[static_cast<std::size_t>(t)])
        size += static_cast<double>(y) * static_cast<double>(y);
      return 4.0 / 127 * std::sqrt(size);
    };
    // The largest p * scale is the largest integer: each is off by half of one, over codes up to 2^bits.
    const auto of_sum = [&](const float* p) {
      double largest = 0;
      for (Index t = 0; t < n; ++t)
        largest = std::max(largest, static_cast<double>(p[t]) * ranges[slots.list[static_cast<std::size_t>(t)]]);
      return largest * 4 * (probability_bits == 16 ? 1.0 / 32767 : 1.0 / 255);
    };
    for (const Index rows : row_counts)
      if (side == Side::keys)
        expect_scores(ops, k, listed, rows, rows_read, of_score);
      else
        expect_sums(ops, k, listed, rows, rows_read, of_sum);
    ASSERT_TRUE(tile.intact());
  }
}

template <class C>
void check_all(Side side) {
  for (const int probability_bits : {16, 8})
    for (const Isa isa : sets_of_this_machine())
      for (const Index tokens : {16, 32, 64})
        for (const Index width : {64, 80, 96, 128, 256}) {
          const TileShape shape{tokens, width};
          if ((side == Side::keys && probability_bits == 8) || (tokens != 64 && width != 64)) continue;
          const std::vector<Index> rows = width == 128 && tokens == 64 ? std::vector<Index>{1, 2, 4, 7, 30}
                                                                       : std::vector<Index>{width == 96 ? 7 : 3};
          for (const Index count : {tokens, tokens - 7}) {
            check_qaq<C>(side, shape, isa, probability_bits, count, {}, rows);
            if (side == Side::keys)
              check_qaq<C>(side, shape, isa, probability_bits, count, {2.0f, 0, 8}, rows);  // some blocks of 0 bits
            else
              check_qaq<C>(side, shape, isa, probability_bits, count, {0.3f, 0, 8}, rows);
            if (width == 128)
              check_qaq<C>(side, shape, isa, probability_bits, count, {1e9f, 0, 8}, rows);  // all of them
            if (::testing::Test::HasFatalFailure()) return;
          }
        }
}

TEST(CpuTilesQaq, ScoresAreThoseOfDecodedKeys) {
  check_all<Qaq<1, QaqSide::keys>>(Side::keys);
  check_all<Qaq<2, QaqSide::keys, 0>>(Side::keys);
  check_all<Qaq<3, QaqSide::keys, 1, QaqRule::reference_code>>(Side::keys);
  check_all<Qaq<4, QaqSide::keys, 2>>(Side::keys);
}
TEST(CpuTilesQaq, SumsAreThoseOfDecodedValues) {
  check_all<Qaq<1, QaqSide::values, 0>>(Side::values);
  check_all<Qaq<2, QaqSide::values>>(Side::values);
  check_all<Qaq<3, QaqSide::values, 1, QaqRule::reference_code>>(Side::values);
  check_all<Qaq<4, QaqSide::values, 2>>(Side::values);
}

TEST(CpuTilesQaq, KeysAsValuesAreDecodedRowByRow) {
  EXPECT_EQ((tile_ops<Qaq<2, QaqSide::keys>>(Side::values, {64, 128}, 16)->support), Support::generic);
  EXPECT_EQ((tile_ops<Qaq<2, QaqSide::values>>(Side::keys, {64, 128}, 16)->support), Support::generic);
  EXPECT_EQ((tile_ops<Qaq<2, QaqSide::values>>(Side::values, {64, 24}, 16)), nullptr);
}

// Bytes that nobody encoded: no access outside of the tile.
template <class C>
void run_on_anything(Side side) {
  const TileShape shape{64, 96};
  for (const Isa isa : sets_of_this_machine()) {
    const TileOps* ops = tile_ops<C>(side, shape, 16);
    const Kernels& k = kernels(isa);
    const Slots all = slot_lists(64, 5)[0];
    std::vector<float> numbers(3 * 96, 0.5f), out(3 * 96, 0.0f), row(96);
    TileMemory prepared(ops->query_bytes(3, 96));
    ops->prepare_query(k, numbers.data(), 96, 3, 96, nullptr, prepared.data());
    for (std::uint64_t seed = 0; seed < 8; ++seed) {
      TileMemory tile(C::tile_bytes(shape)), canonical(C::tile_bytes(shape));
      for (Index i = 0; i < C::tile_bytes(shape); ++i)
        tile.data()[i] = seed == 0 ? std::byte{0xff}
                                   : static_cast<std::byte>(random_bits(seed, static_cast<std::uint64_t>(i)) & 0xff);
      for (Index b = 0; b < 4 && seed > 1; ++b)
        tile.data()[C::tile_bytes(shape) - 4 + b] =
            static_cast<std::byte>(random_bits(seed, 7 + static_cast<std::uint64_t>(b)) & 7);
      const TileRows listed{tile.data(), shape, nullptr, all.list.data(), 64, true, nullptr};
      if (side == Side::keys)
        ops->score(k, prepared.data(), 3, listed, {}, out.data(), 64);
      else
        ops->accumulate(k, numbers.data(), 64, nullptr, 3, listed, {}, out.data(), 96);
      for (Index t = 0; t < 64; ++t) ops->decode(k, shape, tile.data(), t, 0, nullptr, row.data());
      ops->to_canonical(k, shape, tile.data(), canonical.data());
      ops->from_canonical(k, shape, canonical.data(), tile.data());
      EXPECT_TRUE(tile.intact() && canonical.intact());
    }
  }
}
TEST(CpuTilesQaq, AnyBytes) {
  run_on_anything<Qaq<3, QaqSide::keys>>(Side::keys);
  run_on_anything<Qaq<2, QaqSide::values, 2>>(Side::values);
}

}  // namespace
}  // namespace kvpare::cpu

// Attention on lists beside codes, on codebooks that a state says, and on keys that turn: against decoded rows.
#include <kvpare/codec/kv_quant.hpp>
#include <kvpare/codec/sparse.hpp>

#include "support/coded_tiles.hpp"

namespace kvpare::cpu {
namespace {

/// What a codec is tried with.
struct Inputs {
  TileShape shape;
  std::vector<float> rows, state;
  std::vector<Position> positions;
};

enum class Places { consecutive, gaps, far };

template <class C>
Inputs inputs_of(TileShape shape, Places places, bool learned) {
  Inputs in{.shape = shape, .rows = {}, .state = {}, .positions = {}};
  for (Index i = 0; i < shape.tokens * shape.width; ++i)
    in.rows.push_back(normal(1, i) * (i % shape.width % 37 == 5 ? 10.0f : 1.0f));
  for (Index t = 0; t < shape.tokens; ++t) {
    const auto p = static_cast<Position>(t);
    in.positions.push_back(places == Places::consecutive ? p + 77
                           : places == Places::gaps      ? 2 * p + p % 3
                                                         : p + (1 << 20));
  }
  if (learned) {
    const Rope rope =
        rope_of_base(shape.width / 2, 10000, shape.width == 64 ? RopePairing::interleaved : RopePairing::halves);
    in.state.resize(static_cast<std::size_t>(state_floats<C>(shape.width)));
    Measured m;
    m.rows = in.rows.data(), m.positions = in.positions.data(), m.tokens = shape.tokens, m.rope = rope.view();
    if constexpr (MakesState<C>) C::make_state(shape.width, m, in.state.data());
  }
  return in;
}

template <Codec C>
void check_turned(Side side, const Inputs& in, Isa isa, Index rows, double bound, Support wanted = Support::fused) {
  const TileShape shape = in.shape;
  SCOPED_TRACE(std::string(C::name) + (side == Side::keys ? " keys " : " values ") + std::string(name_of(isa)) +
               " tokens " + std::to_string(shape.tokens) + " width " + std::to_string(shape.width));
  const TileOps* ops = tile_ops<C>(side, shape, 16);
  ASSERT_NE(ops, nullptr);
  ASSERT_EQ(ops->support, wanted);
  const Kernels& k = kernels(isa);
  const float* state = in.state.empty() ? nullptr : in.state.data();
  const auto w = static_cast<std::size_t>(shape.width);
  const Index bytes = C::tile_bytes(shape);
  for (const Slots& slots : slot_lists(shape.tokens, 5)) {
    TileMemory tile(bytes), canonical(bytes), back(bytes), other(bytes), moved(bytes);
    for (const std::uint8_t s : slots.list) {
      const TokenFacts facts{in.positions.data() + s, nullptr};
      ops->encode(k, shape, in.rows.data() + s * shape.width, s, 1, facts, state, tile.data());
      encode_rows<C>(shape, in.rows.data() + s * shape.width, s, 1, facts, state, canonical.data());
    }
    ASSERT_TRUE(tile.intact());
    ops->to_canonical(k, shape, tile.data(), back.data());
    ASSERT_TRUE(back.intact());
    if (slots.list.size() == static_cast<std::size_t>(shape.tokens)) {
      ASSERT_EQ(std::memcmp(canonical.data(), back.data(), static_cast<std::size_t>(bytes)), 0);
    }
    ops->from_canonical(k, shape, back.data(), other.data());
    ASSERT_EQ(std::memcmp(other.data(), tile.data(), static_cast<std::size_t>(bytes)), 0);
    ASSERT_TRUE(other.intact());

    std::vector<Position> positions;
    std::vector<std::vector<float>> decoded;
    std::vector<float> row(w), got(w);
    for (const std::uint8_t s : slots.list) {
      positions.push_back(in.positions[s]);
      decode_row<C>(shape, canonical.data(), s, in.positions[s], state, row.data());
      ops->decode(k, shape, tile.data(), s, in.positions[s], state, got.data());
      for (std::size_t c = 0; c < w; ++c) ASSERT_NEAR(row[c], got[c], 1e-5 * (1 + std::abs(row[c])));
      decoded.push_back(row);
    }
    const std::uint8_t last = slots.list.back();
    ops->move_rows(k, shape, tile.data(), last, moved.data(), 1, 1);
    ops->decode(k, shape, moved.data(), 1, in.positions[last], state, got.data());
    ops->decode(k, shape, tile.data(), last, in.positions[last], state, row.data());
    ASSERT_EQ(got, row);
    ASSERT_TRUE(moved.intact());

    const Index n = static_cast<Index>(slots.list.size());
    const TileRows listed{tile.data(),
                          shape,
                          state,
                          slots.list.data(),
                          static_cast<int>(n),
                          slots.gapless,
                          ops->reads_positions ? positions.data() : nullptr};
    const auto of_score = [&](Index t) {
      double size = 0, peak = 0;
      for (const float v : decoded[static_cast<std::size_t>(t)]) {
        const double x = static_cast<double>(v);
        size += x * x, peak = std::max(peak, std::abs(x));
      }
      return bound * 4 * std::sqrt(size + static_cast<double>(w) * peak * peak);
    };
    const auto of_sum = [&](const float* p) {
      double largest = 0;
      for (const std::vector<float>& of_slot : decoded)
        for (const float v : of_slot) largest = std::max(largest, std::abs(static_cast<double>(v)));
      return bound * largest * static_cast<double>(*std::max_element(p, p + n)) * std::sqrt(static_cast<double>(n));
    };
    if (side == Side::keys)
      expect_scores(ops, k, listed, rows, decoded, of_score);
    else
      expect_sums(ops, k, listed, rows, decoded, of_sum);
    ASSERT_TRUE(tile.intact());
  }
}

/// Turned keys are floats; codes meet integer queries of 8 bits; levels that a state says are integers of 8 bits.
constexpr double of_floats = 2e-6, of_integers = 1.0 / 127;

template <Codec C>
void check_all(Side side, double bound, std::vector<TileShape> shapes) {
  for (const Isa isa : sets_of_this_machine())
    for (const TileShape shape : shapes)
      for (const bool learned : {true, false})
        for (const Places places : {Places::consecutive, Places::gaps, Places::far}) {
          if (!reads_positions<C>() && places != Places::consecutive) continue;
          if (!testing::Test::HasFatalFailure())
            check_turned<C>(side, inputs_of<C>(shape, places, learned), isa, shape.width == 128 ? 11 : 4, bound);
        }
}

TEST(CpuTilesKvQuant, KeysBeforeRotation) {
  check_all<KvQuantKeys<4>>(Side::keys, of_floats, {{64, 128}, {32, 64}});
  check_all<KvQuantKeys<3>>(Side::keys, of_floats, {{64, 128}, {16, 64}});
  check_all<KvQuantKeys<2, 2>>(Side::keys, of_floats, {{64, 256}});
  check_all<Unrotated<Symmetric<4, 32>>>(Side::keys, of_floats, {{64, 128}});
  check_all<Unrotated<Affine<2, 32>>>(Side::keys, of_floats, {{64, 96}});
}
/// Atoms add up before they turn; 37 channels are no whole vectors.
TEST(CpuTilesKvQuant, SparseKeysBeforeRotation) {
  check_all<Unrotated<Sparse<4, 1, 0, 48>>>(Side::keys, of_floats, {{64, 128}, {32, 64}, {16, 37}});
  check_all<Unrotated<Sparse<2, 2, 0, 48>>>(Side::keys, of_floats, {{64, 256}});
}
/// A transform's gains and shifts come between sum and turn. Its state stands before the atoms.
TEST(CpuTilesKvQuant, SparseKeysOfStretchedChannels) {
  using Atoms = Sparse<4, 1, 0, 48>;
  Inputs in = inputs_of<Unrotated<Atoms>>({64, 128}, Places::gaps, true);
  std::vector<float> ranges;
  for (Index c = 0; c < 128; ++c) ranges.push_back(0.5f + 0.01f * static_cast<float>(c % 50));
  for (Index c = 0; c < 128; ++c) ranges.push_back(0.1f * static_cast<float>(c % 7 - 3));
  in.state.insert(in.state.begin() + Unrotated<Atoms>::own_state_floats(128), ranges.begin(), ranges.end());
  for (const Isa isa : sets_of_this_machine())
    check_turned<Unrotated<ChannelAffine<Atoms>>>(Side::keys, in, isa, 4, of_floats);
}
TEST(CpuTilesKvQuant, KeysAfterRotation) {
  check_all<KvQuantRotatedKeys<4>>(Side::keys, of_integers, {{64, 128}, {32, 64}});
  check_all<KvQuantRotatedKeys<3, 2>>(Side::keys, of_integers, {{64, 128}});
  check_all<KvQuantRotatedKeys<2>>(Side::keys, of_integers, {{16, 96}});
  check_all<Outliers<Symmetric<4, 32>, 2>>(Side::keys, of_integers, {{64, 128}});
}
TEST(CpuTilesKvQuant, Values) {
  check_all<KvQuantValues<4>>(Side::values, of_integers, {{64, 128}, {32, 64}});
  check_all<KvQuantValues<3, 3>>(Side::values, of_integers, {{64, 128}});
  check_all<KvQuantValues<2>>(Side::values, of_integers, {{64, 96}});
  check_all<Outliers<Symmetric<4, 32>, 1>>(Side::values, of_integers, {{64, 96}, {64, 256}});
}
TEST(CpuTilesKvQuant, OthersDecodeTheirRows) {
  for (const Isa isa : sets_of_this_machine()) {
    const auto whole = inputs_of<Unrotated<Symmetric<8>>>({16, 64}, Places::gaps, true);
    check_turned<Unrotated<Symmetric<8>>>(Side::keys, whole, isa, 3, of_floats, Support::generic);
    const auto wide = inputs_of<KvQuantValues<4, 2>>({16, 512}, Places::consecutive, true);
    check_turned<KvQuantValues<4, 2>>(Side::values, wide, isa, 3, of_integers, Support::generic);
    check_turned<KvQuantKeys<4, 2>>(Side::keys, inputs_of<KvQuantKeys<4, 2>>({16, 512}, Places::gaps, true), isa, 3,
                                    of_floats, Support::generic);
    using Atoms = Unrotated<Sparse<2, 1, 0, 48>>;
    check_turned<Atoms>(Side::keys, inputs_of<Atoms>({16, 512}, Places::gaps, true), isa, 3, of_floats, Support::generic);
  }
}

}  // namespace
}  // namespace kvpare::cpu

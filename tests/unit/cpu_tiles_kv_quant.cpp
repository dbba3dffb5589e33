// Attention on lists beside codes, on codebooks that a state says, and on keys that turn: against decoded rows.
#include <kvpare/codec/kv_quant.hpp>

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
  const TileOps* ops = tile_ops<C>(side, shape, isa, 16);
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
    ops->to_canonical(shape, tile.data(), back.data());
    ASSERT_TRUE(back.intact());
    if (slots.list.size() == static_cast<std::size_t>(shape.tokens)) {
      ASSERT_EQ(std::memcmp(canonical.data(), back.data(), static_cast<std::size_t>(bytes)), 0);
    }
    ops->from_canonical(shape, back.data(), other.data());
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
    ops->move_rows(shape, tile.data(), last, moved.data(), 1, 1);
    ops->decode(k, shape, moved.data(), 1, in.positions[last], state, got.data());
    ops->decode(k, shape, tile.data(), last, in.positions[last], state, row.data());
    ASSERT_EQ(got, row);
    ASSERT_TRUE(moved.intact());

    const Index n = static_cast<Index>(slots.list.size());
    TileRows listed{tile.data(),
                    shape,
                    state,
                    slots.list.data(),
                    static_cast<int>(n),
                    slots.gapless,
                    ops->reads_positions ? positions.data() : nullptr};
    if (side == Side::keys) {
      const Index stride = shape.width + 3, out_stride = 67;
      std::vector<float> q(static_cast<std::size_t>(rows * stride), nan),
          out(static_cast<std::size_t>(rows * out_stride), nan);
      for (Index i = 0; i < rows; ++i)
        for (Index c = 0; c < shape.width; ++c) q[static_cast<std::size_t>(i * stride + c)] = normal(2, i * stride + c);
      TileMemory prepared(ops->query_bytes(rows, shape.width));
      ops->prepare_query(k, q.data(), stride, rows, shape.width, state, prepared.data());
      ASSERT_TRUE(prepared.intact());
      ops->score(k, prepared.data(), rows, listed, {tile.data(), bytes}, out.data(), out_stride);
      ASSERT_TRUE(prepared.intact());
      for (Index i = 0; i < rows; ++i)
        for (Index t = 0; t < out_stride; ++t) {
          const float score = out[static_cast<std::size_t>(i * out_stride + t)];
          if (t >= n) {
            ASSERT_TRUE(std::isnan(score));
            continue;
          }
          double sum = 0, size = 0, peak = 0;
          for (std::size_t c = 0; c < w; ++c) {
            const double x = decoded[static_cast<std::size_t>(t)][c];
            const double y = static_cast<double>(q[static_cast<std::size_t>(i * stride) + c]);
            sum += x * y, size += x * x, peak = std::max(peak, std::abs(x));
          }
          ASSERT_NEAR(static_cast<double>(score), sum,
                      bound * 4 * std::sqrt(size + static_cast<double>(w) * peak * peak) + 1e-5)
              << "row " << i << " slot " << int{slots.list[static_cast<std::size_t>(t)]};
        }
    } else {
      const Index acc_stride = round_up(shape.width, 16);
      std::vector<float> p(static_cast<std::size_t>(rows * 64), nan),
          acc(static_cast<std::size_t>(rows * acc_stride), nan);
      std::vector<float> alpha(static_cast<std::size_t>(rows));
      for (Index i = 0; i < rows; ++i) {
        alpha[static_cast<std::size_t>(i)] = i % 2 == 0 ? 0.0f : 0.25f;
        for (Index t = 0; t < n; ++t)
          p[static_cast<std::size_t>(i * 64 + t)] = std::pow(random_unit(3, i * 64 + t), 4.0f);
        for (Index c = 0; c < shape.width && i % 2 != 0; ++c)
          acc[static_cast<std::size_t>(i * acc_stride + c)] = normal(4, i * 300 + c);
      }
      const std::vector<float> before = acc;
      ops->accumulate(k, p.data(), 64, alpha.data(), rows, listed, {tile.data(), bytes}, acc.data(), acc_stride);
      std::vector<float> total(static_cast<std::size_t>(rows), 0.0f);
      ops->finish_output(rows, shape.width, state, total.data(), acc.data(), acc_stride);
      for (Index i = 0; i < rows; ++i)
        for (std::size_t c = 0; c < w; ++c) {
          const float a = alpha[static_cast<std::size_t>(i)];
          const auto at = static_cast<std::size_t>(i * acc_stride) + c;
          double sum = a == 0 ? 0.0 : static_cast<double>(a) * static_cast<double>(before[at]), largest = 0;
          for (Index t = 0; t < n; ++t) {
            sum += static_cast<double>(decoded[static_cast<std::size_t>(t)][c]) *
                   static_cast<double>(p[static_cast<std::size_t>(i * 64 + t)]);
            for (const float v : decoded[static_cast<std::size_t>(t)])
              largest = std::max(largest, std::abs(static_cast<double>(v)));
          }
          ASSERT_NEAR(static_cast<double>(acc[at]), sum, bound * largest * std::sqrt(static_cast<double>(n)) + 1e-5)
              << "row " << i << " channel " << c;
        }
    }
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
  }
}

}  // namespace
}  // namespace kvpare::cpu

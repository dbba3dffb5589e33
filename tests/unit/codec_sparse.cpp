// Sparse codes: matching pursuit by hand and against the oracle, tiles on every instruction set, attention over long lists.
#include "kvpare/codec/sparse.hpp"

#include <gtest/gtest.h>

#include <kvpare/codec/raw.hpp>
#include <kvpare/codec/rotation.hpp>
#include <kvpare/kvpare.hpp>

#include "oracle/attend.hpp"
#include "oracle/csr.hpp"
#include "support/codec_tiles.hpp"
#include "support/coded_tiles.hpp"
#include "support/inputs.hpp"

namespace kvpare {
namespace {

using cpu::TileMemory;
using cpu::TileOps;
using test::GuardedTile;

template <int s, int chunks>
constexpr double bits_of_128 = 8.0 * static_cast<double>(Sparse<s, chunks>::tile_bytes({64, 128})) / (64.0 * 128.0);
static_assert(bits_of_128<4, 1> == 1 && bits_of_128<2, 2> == 1 && bits_of_128<6, 1> == 1.5 && bits_of_128<8, 1> == 2 &&
              bits_of_128<16, 1> == 4);
static_assert(CsrKeys<4>::name == "sparse4_n8192" && CsrValues<16, 1024, 64>::name == "sparse8_c2_n1024_online64");
static_assert(CsrKeys<4>::state_floats(128) * 4 == 2 << 20, "2 MiB per dictionary");
static_assert(CsrValues<4>::state_floats(128) * 4 == 1 << 20);
static_assert(!CsrValues<4>::fits({64, 127}) && CsrValues<4>::fits({16, 126}));

/// Rows of floats as a state: halves, two to a float.
std::vector<float> state_of(const std::vector<float>& atoms) {
  std::vector<float> state((atoms.size() + 1) / 2);
  auto* bytes = reinterpret_cast<std::byte*>(state.data());
  for (std::size_t i = 0; i < atoms.size(); ++i) {
    const half h(atoms[i]);
    std::memcpy(bytes + 2 * i, &h, 2);
  }
  return state;
}
/// Random atoms of length 1, as halves say them.
std::vector<float> unit_atoms(std::uint64_t seed, Index count, Index width) {
  std::vector<float> atoms = test::gaussians(seed, count * width);
  for (Index n = 0; n < count; ++n) {
    float* atom = atoms.data() + n * width;
    double square = 0;
    for (Index i = 0; i < width; ++i) square += double{atom[i]} * double{atom[i]};
    for (Index i = 0; i < width; ++i)
      atom[i] = static_cast<float>(half(static_cast<float>(static_cast<double>(atom[i]) / std::sqrt(square))));
  }
  return atoms;
}

struct Pairs {
  std::vector<Index> atoms;
  std::vector<float> coefficients;
};
template <class C>
Pairs pairs_of(const std::byte* row) {
  Pairs pairs;
  for (Index i = 0; i < C::pairs; ++i)
    pairs.atoms.push_back(C::index(row, i)), pairs.coefficients.push_back(C::coefficient(row, i));
  return pairs;
}

TEST(Sparse, WorkedExample) {
  const auto state = state_of({1, 0, 0, 1, 0.6f, 0.8f, 0.8f, -0.6f});
  GuardedTile<Sparse<1, 1, 4>> one({1, 2});
  one.encode({2, 1}, 0, state.data());
  EXPECT_EQ((pairs_of<Sparse<1, 1, 4>>(one.tile()).atoms), std::vector<Index>{0}) << "the lowest of a tie";
  EXPECT_EQ(one.decode(0, state.data()), (std::vector<float>{2, 0}));

  GuardedTile<Sparse<2, 1, 4>> two({1, 2});
  two.encode({2, 1}, 0, state.data());
  const Pairs pairs = pairs_of<Sparse<2, 1, 4>>(two.tile());
  EXPECT_EQ(pairs.atoms, (std::vector<Index>{0, 1}));
  EXPECT_EQ(pairs.coefficients, (std::vector<float>{2, 1}));
  EXPECT_EQ(two.decode(0, state.data()), (std::vector<float>{2, 1}));
  EXPECT_EQ(two.bytes(), (std::vector<int>{0, 0, 1, 0, 0, 0x40, 0, 0x3c})) << "indices, then coefficients";
}

template <class C>
oracle::Array2 atoms_of(const std::vector<float>& atoms, Index width) {
  oracle::Array2 all(C::atom_count, width / C::chunk_count);
  all.values.assign(atoms.begin(), atoms.end());
  return all;
}
double as_half(double c) { return static_cast<double>(static_cast<float>(half(static_cast<float>(c)))); }

template <class C>
void expect_the_oracles_choices(Index width) {
  const auto atoms = unit_atoms(11, C::atom_count, width / C::chunk_count);
  const auto state = state_of(atoms);
  const oracle::Array2 dictionary = atoms_of<C>(atoms, width);
  const auto rows = test::outliers(12, 40, width);
  GuardedTile<C> tile({64, width});
  tile.encode(rows, 3, state.data());
  const Index chunk_width = width / C::chunk_count;
  for (Index t = 0; t < 40; ++t) {
    const Pairs pairs = pairs_of<C>(tile.tile() + (t + 3) * C::row_bytes);
    const auto decoded = tile.decode(t + 3, state.data());
    for (Index chunk = 0; chunk < C::chunk_count; ++chunk) {
      const auto from = rows.begin() + t * width + chunk * chunk_width;
      const auto want = oracle::csr_encode(dictionary, {from, from + chunk_width}, C::atoms_per_chunk, as_half);
      for (Index g = 0; g < C::atoms_per_chunk; ++g) {
        const auto i = static_cast<std::size_t>(chunk * C::atoms_per_chunk + g);
        ASSERT_EQ(pairs.atoms[i], want[static_cast<std::size_t>(g)].atom) << "row " << t << " pair " << i;
        ASSERT_EQ(static_cast<double>(pairs.coefficients[i]), want[static_cast<std::size_t>(g)].coefficient);
      }
      const auto back = oracle::csr_decode(dictionary, want);
      for (Index c = 0; c < chunk_width; ++c)
        ASSERT_NEAR(static_cast<double>(decoded[static_cast<std::size_t>(chunk * chunk_width + c)]),
                    back[static_cast<std::size_t>(c)], 1e-4);
    }
  }
  const double bits = 8.0 * static_cast<double>(C::tile_bytes({64, width})) / static_cast<double>(64 * width);
  EXPECT_EQ(bits, oracle::csr_bits(C::atoms_per_chunk, C::chunk_count, width));
}
TEST(Sparse, ChoosesWhatTheOracleChooses) {
  expect_the_oracles_choices<Sparse<4, 1, 200>>(32);
  expect_the_oracles_choices<Sparse<3, 2, 100, 37>>(48);
  expect_the_oracles_choices<Sparse<1, 4, 30>>(64);
  expect_the_oracles_choices<Sparse<16, 1, 64>>(24);
}

TEST(Sparse, AnAtomMayComeTwice) {
  const auto state = state_of({1, 0, 0, 1});
  GuardedTile<Sparse<2, 1, 2>> tile({1, 2});
  tile.encode({0.1f, 0}, 0, state.data());
  const Pairs pairs = pairs_of<Sparse<2, 1, 2>>(tile.tile());
  EXPECT_EQ(pairs.atoms, (std::vector<Index>{0, 0})) << "what the half of the first coefficient lost";
  EXPECT_NEAR(tile.decode(0, state.data())[0], 0.1f, 1e-7f);
}

TEST(Sparse, SpecialNumbers) {
  constexpr float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  using C = Sparse<2, 1, 4>;
  const auto state = state_of({nan, 0, inf, 0, 1, 0, 0, 1});
  GuardedTile<C> tile({4, 2});
  tile.encode({0, 0, nan, 3, -inf, 0, 1e38f, 1e38f}, 0, state.data());
  for (Index t = 0; t < 4; ++t)
    for (const Index n : pairs_of<C>(tile.tile() + t * C::row_bytes).atoms)
      EXPECT_GE(n, 2) << "atoms that are not finite are not chosen, row " << t;
  EXPECT_EQ(tile.decode(0, state.data()), (std::vector<float>{0, 0}));
  EXPECT_EQ(tile.decode(1, state.data()), (std::vector<float>{0, 3}));
  EXPECT_EQ(tile.decode(2, state.data()), (std::vector<float>{-2 * 65504.0f, 0}));
  EXPECT_EQ(tile.decode(3, state.data())[0], 65504.0f * 2);

  tile.encode({1, 2, 3, 4, 5, 6, 7, 8});
  for (Index t = 0; t < 4; ++t) EXPECT_EQ(tile.decode(t), (std::vector<float>{0, 0})) << "no dictionary";

  GuardedTile<Sparse<1, 1, 3>> last({1, 1});
  const std::uint16_t pair[] = {65535, half(2.0f).bits};
  std::memcpy(last.tile(), pair, 4);
  EXPECT_EQ(last.decode(0, state_of({1, 2, 3}).data()), std::vector<float>{6})
      << "indices beyond the last mean the last";
}

TEST(Sparse, AnyBytesDecodeAndRowsMove) {
  using C = Sparse<3, 2, 90, 10>;
  std::vector<float> state(static_cast<std::size_t>(C::state_floats(40)));
  for (std::size_t i = 0; i < state.size(); ++i)
    state[i] = std::bit_cast<float>(static_cast<std::uint32_t>(random_bits(4, i)));
  test::expect_decodes_anything<C>({16, 40}, state);
  const auto good = state_of(unit_atoms(5, 100, 20));
  test::expect_rows_move<C>({32, 40}, good.data());
}

// ---- tiles of the CPU ----------------------------------------------------------------------------------------------

/// Rows that are hard to choose for: zeros, NaN, atoms themselves, sums of two with the same weight, huge and tiny ones.
std::vector<float> hard_rows(const std::vector<float>& atoms, Index count, Index rows, Index width) {
  auto x = test::gaussians(21, rows * width);
  const Index m = static_cast<Index>(atoms.size()) / count;
  for (Index r = 0; r < rows; ++r)
    for (Index c = 0; c < width; ++c) {
      float& v = x[static_cast<std::size_t>(r * width + c)];
      const auto atom = [&](Index n) { return atoms[static_cast<std::size_t>(n % count * m + c % m)]; };
      switch (r % 8) {
        case 1:
          v = 0;
          break;
        case 2:
          v = c == 3 ? std::numeric_limits<float>::quiet_NaN() : v;
          break;
        case 3:
          v = -2 * atom(r);
          break;
        case 4:
          v = atom(r) + atom(r + 7);
          break;
        case 5:
          v *= 1e30f;
          break;
        case 6:
          v *= 1e-30f;
          break;
        default:
          break;
      }
    }
  return x;
}

template <class C>
void expect_bytes_of_the_codec(Index width) {
  const TileShape shape{64, width};
  auto atoms = unit_atoms(31, C::atom_count, width / C::chunk_count);
  const Index m = width / C::chunk_count, twin = C::atom_count - 2;
  std::copy_n(atoms.begin() + 5 * m, m, atoms.begin() + twin * m);  // a tie wherever it counts
  std::fill_n(atoms.begin() + 9 * m, m, std::numeric_limits<float>::quiet_NaN());
  const auto state = state_of(atoms);
  std::fill_n(atoms.begin() + 9 * m, m, 0.0f);
  const auto rows = hard_rows(atoms, C::atom_count, 64, width);
  GuardedTile<C> want(shape);
  want.encode(rows, 0, state.data());
  for (const cpu::Isa isa : cpu::sets_of_this_machine()) {
    const TileOps* ops = cpu::tile_ops<C>(Side::keys, shape, 16);
    ASSERT_EQ(ops->support, Support::fused);
    for (const Index at_once : {1, 3, 7, 50, 64}) {
      TileMemory tile(ops->tile_bytes(shape));
      for (Index t = 0; t < 64; t += at_once)
        ops->encode(cpu::kernels(isa), shape, rows.data() + t * width, t, std::min(at_once, 64 - t), {}, state.data(),
                    tile.data());
      ASSERT_TRUE(tile.intact());
      ASSERT_EQ(std::memcmp(tile.data(), want.tile(), want.size()), 0) << name_of(isa) << " " << at_once << " rows";
      std::vector<float> row(static_cast<std::size_t>(width));
      for (Index t = 0; t < 64; ++t) {
        ops->decode(cpu::kernels(isa), shape, tile.data(), t, 0, state.data(), row.data());
        ASSERT_EQ(row, want.decode(t, state.data())) << name_of(isa) << " slot " << t;
      }
    }
  }
}
TEST(SparseTiles, BytesAreTheCodecsOnEverySet) {
  expect_bytes_of_the_codec<Sparse<4, 1, 200>>(64);
  expect_bytes_of_the_codec<Sparse<2, 2, 130, 70>>(128);
  expect_bytes_of_the_codec<Sparse<3, 1, 17>>(21);
}

/// Scores, and sums over several pages, of `rows` query rows: both loops of a codec against decoded rows.
template <class C>
void expect_attention_of_decoded_rows(const TileOps& ops, cpu::Isa isa, const std::vector<float>& state, Index rows,
                                      Index width) {
  using cpu::normal;
  SCOPED_TRACE(message(C::name, " ", name_of(isa), " rows ", rows));
  const cpu::Kernels& k = cpu::kernels(isa);
  const TileShape shape{64, width};
  const auto x = test::gaussians(41, 64 * width);
  TileMemory tile(ops.tile_bytes(shape));
  ops.encode(k, shape, x.data(), 0, 64, {}, state.data(), tile.data());
  std::vector<float> decoded(static_cast<std::size_t>(64 * width));
  for (Index t = 0; t < 64; ++t) ops.decode(k, shape, tile.data(), t, 0, state.data(), decoded.data() + t * width);

  const Index stride = width + 3, acc_stride = round_up(width, 16);
  std::vector<float> q(static_cast<std::size_t>(rows * stride), cpu::nan);
  for (Index i = 0; i < rows; ++i)
    for (Index c = 0; c < width; ++c) q[static_cast<std::size_t>(i * stride + c)] = normal(2, i * stride + c);
  TileMemory prepared(ops.query_bytes(rows, width));
  ops.prepare_query(k, q.data(), stride, rows, width, state.data(), prepared.data());
  const Index sum_bytes = ops.sums_bytes != nullptr ? ops.sums_bytes(rows, width) : 64;
  TileMemory sums(sum_bytes);
  std::vector<float> acc(static_cast<std::size_t>(rows * acc_stride), 0.0f);
  std::vector<double> want(acc.size(), 0.0);
  std::vector<double> size(static_cast<std::size_t>(rows), 0.0);
  if (ops.sums_bytes != nullptr) ops.start_sums(rows, width, sums.data());
  // Pages whose alphas shrink the sums far below what a float can be scaled back from, and one that ends what was before.
  const float alphas[] = {0, 1, 0.5f, 0x1p-50f, 0x1p-50f, 0x1p-50f, 1, 0, 0.25f};
  Index page = 0;
  for (const float alpha : alphas) {
    const auto slots = cpu::slot_lists(64, static_cast<std::uint64_t>(page))[static_cast<std::size_t>(page % 4)];
    const int n = static_cast<int>(slots.list.size());
    const cpu::TileRows listed{tile.data(), shape, state.data(), slots.list.data(), n, slots.gapless, nullptr};
    std::vector<float> out(static_cast<std::size_t>(rows * 67), cpu::nan), p(out.size(), cpu::nan), a;
    ops.score(k, prepared.data(), rows, listed, {tile.data(), ops.tile_bytes(shape)}, out.data(), 67);
    for (Index i = 0; i < rows; ++i) {
      a.push_back(i % 3 == 2 ? 1.0f : alpha);
      size[static_cast<std::size_t>(i)] = size[static_cast<std::size_t>(i)] * static_cast<double>(a.back());
      for (Index c = 0; c < width; ++c)
        want[static_cast<std::size_t>(i * acc_stride + c)] *= static_cast<double>(a.back());
      for (int t = 0; t < n; ++t) {
        p[static_cast<std::size_t>(i * 67 + t)] = random_unit(3, page * 999 + i * 64 + t);
        const double share = static_cast<double>(p[static_cast<std::size_t>(i * 67 + t)]);
        double dot = 0;
        for (Index c = 0; c < width; ++c) {
          const double y = static_cast<double>(
              decoded[static_cast<std::size_t>(slots.list[static_cast<std::size_t>(t)] * width + c)]);
          dot += y * static_cast<double>(q[static_cast<std::size_t>(i * stride + c)]);
          want[static_cast<std::size_t>(i * acc_stride + c)] += share * y;
        }
        size[static_cast<std::size_t>(i)] += share * 4;
        ASSERT_NEAR(static_cast<double>(out[static_cast<std::size_t>(i * 67 + t)]), dot, 1e-4) << "page " << page;
      }
      for (int t = n; t < 67; ++t) ASSERT_TRUE(std::isnan(out[static_cast<std::size_t>(i * 67 + t)]));
    }
    const float* alpha_of = page == 1 ? nullptr : a.data();
    if (ops.sums_bytes != nullptr)
      ops.add_to_sums(k, p.data(), 67, alpha_of, rows, listed, {}, sums.data());
    else
      ops.accumulate(k, p.data(), 67, alpha_of, rows, listed, {}, acc.data(), acc_stride);
    ++page;
  }
  if (ops.sums_bytes != nullptr) ops.finish_sums(k, rows, width, state.data(), sums.data(), acc.data(), acc_stride);
  for (Index i = 0; i < rows; ++i)
    for (Index c = 0; c < width; ++c)
      ASSERT_NEAR(static_cast<double>(acc[static_cast<std::size_t>(i * acc_stride + c)]),
                  want[static_cast<std::size_t>(i * acc_stride + c)], 1e-6 * size[static_cast<std::size_t>(i)])
          << "row " << i << " channel " << c;
  ASSERT_TRUE(prepared.intact() && sums.intact() && tile.intact());
}

template <class C>
void expect_attention_on_every_set(Index width) {
  auto atoms = unit_atoms(51, C::atom_count, width / C::chunk_count);
  std::fill_n(atoms.begin(), width / C::chunk_count, cpu::nan);  // no token has this atom
  const auto state = state_of(atoms);
  for (const cpu::Isa isa : cpu::sets_of_this_machine())
    for (const Index rows : {1, 3, 4, 5, 9}) {
      const TileOps* ops = cpu::tile_ops<C>(Side::values, {64, width}, 16);
      ASSERT_NE(ops->of_short, nullptr);
      expect_attention_of_decoded_rows<C>(*ops, isa, state, rows, width);
      expect_attention_of_decoded_rows<C>(*ops->of_short, isa, state, rows, width);
    }
}
TEST(SparseTiles, AttentionIsThatOfDecodedRows) {
  expect_attention_on_every_set<Sparse<4, 1, 200>>(64);
  expect_attention_on_every_set<Sparse<2, 2, 130, 70>>(128);
  expect_attention_on_every_set<Sparse<3, 1, 17>>(21);
}

TEST(SparseTiles, WithoutADictionaryAllIsZero) {
  using C = Sparse<2, 1, 64>;
  const TileShape shape{16, 16};
  const cpu::Kernels& k = cpu::kernels(cpu::chosen_isa());
  const TileOps* all = cpu::tile_ops<C>(Side::keys, shape, 16);
  const auto slots = cpu::slot_lists(16, 1)[0];
  for (const TileOps* ops : {all, all->of_short}) {
    TileMemory tile(ops->tile_bytes(shape)), prepared(ops->query_bytes(2, 16)), sums(all->sums_bytes(2, 16));
    const auto x = test::gaussians(1, 16 * 16);
    ops->encode(k, shape, x.data(), 0, 16, {}, nullptr, tile.data());
    ops->prepare_query(k, x.data(), 16, 2, 16, nullptr, prepared.data());
    std::vector<float> out(32, 1.0f), acc(32, 1.0f), p(32, 0.5f);
    const cpu::TileRows listed{tile.data(), shape, nullptr, slots.list.data(), 16, true, nullptr};
    ops->score(k, prepared.data(), 2, listed, {}, out.data(), 16);
    if (ops == all) {
      ops->start_sums(2, 16, sums.data());
      ops->add_to_sums(k, p.data(), 16, nullptr, 2, listed, {}, sums.data());
      ops->finish_sums(k, 2, 16, nullptr, sums.data(), acc.data(), 16);
    } else {
      const float none[] = {0, 0};
      ops->accumulate(k, p.data(), 16, none, 2, listed, {}, acc.data(), 16);
    }
    EXPECT_EQ(out, std::vector<float>(32, 0.0f));
    EXPECT_EQ(acc, std::vector<float>(32, 0.0f));
  }
}

// ---- through the cache ---------------------------------------------------------------------------------------------

using Half = Raw<half>;
using Keys = Sparse<3, 1, 256>;
using Values = Sparse<2, 2, 256>;
using Listed = Formats<Pair<Half, Half>, Pair<Keys, Values>, Pair<Rotated<Keys>, Rotated<Values>>,
                       Pair<Sparse<3, 1, 0, 48>, Sparse<2, 2, 0, 48>>>;

struct Scene {
  static constexpr Index kv_heads = 2, width = 32;
  Index group, tokens;
  cpu::Backend be;
  KvCache<cpu::Backend, Listed> cache;
  SequenceId id;
  test::Dice dice{3};

  static LayerShape shape(Index group, Index window) {
    return {.q_heads = kv_heads * group,
            .kv_heads = kv_heads,
            .key_dim = width,
            .value_dim = width,
            .scale = 0.25f,
            .window = window};
  }
  Scene(Index group_, Index tokens_, Index window, Index threads)
      : group(group_), tokens(tokens_), be({.threads = threads}),
        cache(be, Model{{shape(group_, window)}}, {.page_tokens = 16, .pool_bytes = Index{8} << 20}),
        id(cache.create()) {
    const auto keys = test::gaussians(1, tokens * kv_heads * width),
               values = test::gaussians(2, tokens * kv_heads * width);
    std::vector<Position> positions(static_cast<std::size_t>(tokens));
    for (std::size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<Position>(i);
    require(cache.append(id, 0, ConstTensor(keys.data(), tokens, kv_heads, width),
                         ConstTensor(values.data(), tokens, kv_heads, width), positions) == Outcome::done,
            "the pool is full");
    for (const int format : {1, 2}) {
      const auto of_keys = state_of(unit_atoms(61, 256, width)), of_values = state_of(unit_atoms(62, 256, width / 2));
      cache.set_state(id, 0, format, of_keys, of_values);
    }
  }
  oracle::CachedHead read(Index head) {
    const HeadPages list = cache.pages(id, 0)[static_cast<std::size_t>(head)];
    std::vector<float> keys(static_cast<std::size_t>(list.live_tokens() * width)), values(keys.size());
    const GatherRow rows[] = {{list, Side::keys, nullptr, width, keys.data()},
                              {list, Side::values, nullptr, width, values.data()}};
    be.gather(rows);
    oracle::CachedHead tokens_of;
    for (const Entry& e : list.entries)
      for_each_bit(e.live, [&](Index slot) {
        const auto at = static_cast<std::ptrdiff_t>(tokens_of.size()) * width;
        tokens_of.push_back({list.position(e, slot),
                             {keys.begin() + at, keys.begin() + at + width},
                             {values.begin() + at, values.begin() + at + width}});
      });
    return tokens_of;
  }
  /// Query rows at these positions.
  std::vector<float> attend(const std::vector<Index>& positions, std::vector<double>* want = nullptr,
                            Index window = 0) {
    oracle::AttendInput in;
    in.queries = test::random_array(dice, static_cast<Index>(positions.size()), kv_heads * group, width, DType::f32);
    in.positions = positions, in.value_width = width, in.how.scale = 0.25, in.how.window = window;
    const test::TensorBuffer<cpu::Backend> q(be, in.queries, DType::f32);
    const test::TensorBuffer<cpu::Backend> out(be, oracle::Array3(in.queries.a, kv_heads * group, width), DType::f32);
    cache.attend(0, {{.sequence = id,
                      .queries = q.tensor(),
                      .positions = std::vector<Position>(positions.begin(), positions.end()),
                      .out = out.writable()}});
    if (want != nullptr) {
      for (Index h = 0; h < kv_heads; ++h) in.heads.push_back(read(h));
      *want = oracle::attend(in).out.values;
    }
    const auto got = out.download().values;
    return {got.begin(), got.end()};
  }
};

TEST(SparseAttention, IsThatOfWhatIsReadBack) {
  struct Case {
    Index group, tokens, window;
    std::vector<Index> positions;
  };
  const Case cases[] = {{4, 25, 0, {24}},                              // too short for the dictionary:
                        {4, 300, 0, {299}},                            // one stretch
                        {3, 300, 40, {299, 120, 200}},                 // rows that see different tokens
                        {4, 5000, 0, {4999, 3000}},                    // several stretches
                        {7, 300, 0, {299, 298, 297, 296, 295, 294}}};  // more rows than weights are kept for
  for (const Case& c : cases)
    for (const int format : {1, 2}) {
      Scene scene(c.group, c.tokens, c.window, 2);
      scene.cache.set_aging(scene.id, 0, {.format = format, .keep_raw_keys = 5, .keep_raw_values = 5});
      scene.cache.age(scene.id);
      Index coded = 0;
      const HeadPages list = scene.cache.pages(scene.id, 0)[0];
      for (const Entry& e : list.entries) coded += e.format == format ? std::popcount(e.live) : 0;
      EXPECT_GE(coded, c.tokens - 32);
      std::vector<double> want;
      const auto got = scene.attend(c.positions, &want, c.window);
      for (std::size_t i = 0; i < got.size(); ++i)
        ASSERT_NEAR(static_cast<double>(got[i]), want[i], 2e-4)
            << "format " << format << " tokens " << c.tokens << " group " << c.group << " number " << i;
      EXPECT_EQ(scene.cache.support(0, format), Support::fused);
    }
}

TEST(SparseStates, AreSharedByHeadsLayersAndSequences) {
  const LayerShape shape = Scene::shape(2, 0);
  cpu::Backend be;
  KvCache<cpu::Backend, Listed> cache(be, Model{{shape, shape, shape}}, {.page_tokens = 16, .pool_bytes = 1 << 20});
  const auto keys = state_of(unit_atoms(61, 256, 32)), values = state_of(unit_atoms(62, 256, 16));
  const SequenceId before = cache.create();
  cache.share_state(0, 1, 1, keys, values);
  cache.share_state(2, 2, 1, keys, values);
  const SequenceId a = cache.create(), b = cache.create();
  EXPECT_EQ(cache.shared_state_bytes(), 2 * static_cast<Index>(keys.size() + values.size()) * 4);
  EXPECT_EQ(cache.stats(a).state_bytes, 0);
  EXPECT_THROW(cache.share_state(0, 3, 1, keys, values), InvalidArgument);
  EXPECT_THROW(cache.share_state(1, 0, 1, keys, values), InvalidArgument);
  EXPECT_THROW(cache.share_state(0, 0, 1, values, values), InvalidArgument);

  const auto rows = test::gaussians(5, 64 * 2 * 32);
  std::vector<Position> positions(64);
  for (std::size_t i = 0; i < 64; ++i) positions[i] = static_cast<Position>(i);
  const ConstTensor given(rows.data(), 64, 2, 32);
  for (const SequenceId id : {before, a, b})
    for (Index l = 0; l < 3; ++l) {
      ASSERT_EQ(cache.append(id, l, given, given, positions), Outcome::done);
      cache.set_aging(id, l, {.format = 1});
    }
  EXPECT_THROW(cache.age(before), InvalidArgument) << "no dictionary";
  cache.age(a), cache.age(b);
  const float* first = cache.pages(a, 0)[0].states[0].keys;
  for (const SequenceId id : {a, b})
    for (Index l = 0; l < 2; ++l)
      for (const HeadPages& list : cache.pages(id, l)) EXPECT_EQ(list.state_of(list.entries[0]).keys, first);
  EXPECT_NE(cache.pages(a, 2)[0].states[0].keys, first);
  EXPECT_EQ(std::vector<float>(first, first + keys.size()), keys);
  const float* of_values = cache.pages(a, 0)[1].states[0].values;
  EXPECT_EQ(std::vector<float>(of_values, of_values + values.size()), values);

  const SequenceId back = cache.restore(cache.image(a)).value();
  EXPECT_EQ(cache.stats(back).state_bytes, cache.shared_state_bytes() / 2 * 3) << "for itself";
  const auto decoded = [&](SequenceId id) {
    const HeadPages list = cache.pages(id, 1)[1];
    std::vector<float> x(64 * 32);
    const GatherRow row[] = {{list, Side::values, nullptr, 32, x.data()}};
    be.gather(row);
    return x;
  };
  EXPECT_EQ(decoded(back), decoded(a));

  const auto newer = state_of(unit_atoms(63, 256, 32));
  const SequenceImage empty = cache.image(before);
  cache.share_state(2, 2, 1, newer, values);
  for (const SequenceId id : {cache.create(), cache.restore(empty).value()})
    EXPECT_EQ(std::vector<float>(cache.pages(id, 2)[0].states.back().keys, cache.pages(id, 2)[0].states.back().keys + newer.size()),
              newer)
        << "the newest";
}

TEST(SparseStates, GivenAtomsAreThoseBeforeRotation) {
  using C = Unrotated<Sparse<2, 1, 4, 3>>;
  const auto given = state_of(unit_atoms(7, 4, 32));
  const auto rows = test::gaussians(8, 6 * 32);
  const Position positions[] = {0, 1, 2, 3, 4, 5};
  const Rope rope = rope_of_base(16, 10000, RopePairing::halves);
  std::vector<float> state(static_cast<std::size_t>(C::state_floats(32)));
  Measured m;
  m.rows = rows.data(), m.positions = positions, m.tokens = 6, m.rope = rope.view(), m.given = given.data();
  C::make_state(32, m, state.data());
  EXPECT_EQ(std::memcmp(state.data() + C::own_state_floats(32), given.data(), given.size() * 4), 0);
}

/// A dictionary made of the prompt: its newest vectors, and those that these are worst at.
TEST(SparseStates, OnlineAtomsAreThePromptsOwn) {
  using C = Sparse<1, 1, 0, 6>;
  static_assert(C::name == "sparse1_online6" && MakesState<C> && !MakesState<Sparse<1, 1, 2>>);
  std::vector<float> rows;
  std::vector<Position> positions;
  for (int t = 0; t < 6; ++t) {  // two heads, head by head; the newest of both are 5 and 5
    const float angle = 0.2f * static_cast<float>(t);
    rows.insert(rows.end(), {3 * std::cos(angle), 3 * std::sin(angle)});
    positions.push_back(static_cast<Position>(t));
  }
  for (int t = 0; t < 6; ++t)
    rows.insert(rows.end(), {0, t == 4 ? 0.0f : -2.0f}), positions.push_back(static_cast<Position>(t));
  Measured measured;
  measured.rows = rows.data(), measured.positions = positions.data(), measured.tokens = 12;
  std::vector<float> state(static_cast<std::size_t>(C::state_floats(2)));
  C::make_state(2, measured, state.data());
  const Dictionary d = C::dictionary(2, state.data());
  const auto atom = [&](Index n) { return std::pair{d.element(d.atom(n), 0), d.element(d.atom(n), 1)}; };
  EXPECT_NEAR(atom(0).first, std::cos(1.0f), 1e-3f);
  EXPECT_NEAR(atom(0).second, std::sin(1.0f), 1e-3f);
  EXPECT_EQ(atom(1), (std::pair{0.0f, -1.0f})) << "the other head's newest";
  EXPECT_EQ(atom(2), (std::pair{1.0f, 0.0f})) << "cos 1 of it lies along atom 0";
  EXPECT_NEAR(atom(3).second, std::sin(0.2f), 1e-3f) << "cos 0.8 of it";
  for (Index n = 0; n < 6; ++n) EXPECT_NEAR(std::hypot(atom(n).first, atom(n).second), 1, 1e-3f) << n;

  Scene scene(2, 200, 0, 1);
  scene.cache.set_aging(scene.id, 0, {.format = 3});
  scene.cache.age(scene.id);
  std::vector<double> want;
  const auto got = scene.attend({199}, &want);
  for (std::size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(static_cast<double>(got[i]), want[i], 2e-4);
  double error = 0, size = 0;
  const auto keys = test::gaussians(1, 200 * 2 * 32);
  const auto read = scene.read(1);
  for (const auto& token : read)
    for (std::size_t c = 0; c < 32; ++c) {
      const double x = static_cast<double>(keys[static_cast<std::size_t>((token.position * 2 + 1) * 32) + c]);
      error += (x - token.key[c]) * (x - token.key[c]), size += x * x;
    }
  EXPECT_LT(error, 0.7 * size);
  for (std::size_t c = 0; c < 32; ++c)
    EXPECT_NEAR(read.back().key[c], static_cast<double>(keys[static_cast<std::size_t>((199 * 2 + 1) * 32) + c]), 0.05)
        << "the newest is an atom";
}

/// Shared atoms, and a sequence's own behind them: made as soon as its tokens take the form.
TEST(SparseStates, OwnAtomsFollowSharedOnes) {
  using K = Sparse<3, 1, 64, 21>;  // an odd number of halves
  using V = Sparse<2, 2, 64, 21>;
  using Both = Formats<Pair<Half, Half>, Pair<K, V>>;
  static_assert(K::given_floats(32) == 64 * 16 && K::state_floats(32) == 85 * 16);
  const LayerShape shape = Scene::shape(2, 0);
  cpu::Backend be;
  KvCache<cpu::Backend, Both> cache(be, Model{{shape}}, {.page_tokens = 16, .pool_bytes = 1 << 20});
  const auto keys = state_of(unit_atoms(61, 64, 32)), values = state_of(unit_atoms(62, 64, 16));
  const SequenceId before = cache.create();
  const auto whole = state_of(unit_atoms(61, 85, 32));
  EXPECT_THROW(cache.share_state(0, 0, 1, whole, values), InvalidArgument) << "own atoms are made";
  cache.share_state(0, 0, 1, keys, values);
  const SequenceId a = cache.create(), b = cache.create();
  EXPECT_EQ(cache.shared_state_bytes(), static_cast<Index>(keys.size() + values.size()) * 4);

  std::vector<Position> positions(64);
  for (std::size_t i = 0; i < 64; ++i) positions[i] = static_cast<Position>(i);
  const auto append = [&](SequenceId id, std::uint64_t seed) {
    const auto rows = test::gaussians(seed, 64 * 2 * 32);
    const ConstTensor given(rows.data(), 64, 2, 32);
    ASSERT_EQ(cache.append(id, 0, given, given, positions), Outcome::done);
    cache.set_aging(id, 0, {.format = 1});
  };
  append(before, 5), append(a, 5), append(b, 6);
  EXPECT_THROW(cache.age(before), InvalidArgument) << "no dictionary";
  EXPECT_THROW(cache.compress(before, make_compressor("random(keep=0.5)")), InvalidArgument);
  EXPECT_EQ(cache.stats(before).live_tokens, 2 * 64) << "and none is evicted";
  const SequenceImage not_yet = cache.image(a);
  EXPECT_EQ(cache.stats(a).state_bytes, 0);
  cache.age(a), cache.age(b);
  const Index state_bytes = (K::state_floats(32) + V::state_floats(32)) * 4;
  EXPECT_EQ(cache.stats(a).state_bytes, state_bytes) << "with a copy of what is shared";

  const auto state = [&](SequenceId id) {
    const HeadPages list = cache.pages(id, 0)[0];
    const float* k = list.state_of(list.entries[0]).keys;
    return std::vector<float>(k, k + K::state_floats(32));
  };
  for (const SequenceId id : {a, b}) EXPECT_EQ(std::memcmp(state(id).data(), keys.data(), keys.size() * 4), 0);
  EXPECT_NE(state(a), state(b));
  const auto rows = test::gaussians(5, 64 * 2 * 32);
  double product = 0, square = 0;
  const auto made = state(a);
  const Dictionary of_a = K::dictionary(32, made.data());
  for (Index c = 0; c < 32; ++c) {
    const double x = static_cast<double>(rows[static_cast<std::size_t>(63 * 2 * 32 + c)]);
    product += x * static_cast<double>(of_a.element(of_a.atom(64), c)), square += x * x;
  }
  EXPECT_NEAR(product, std::sqrt(square), 1e-2) << "the first of its own is the newest token of head 0";

  const SequenceId back = cache.restore(not_yet).value();
  EXPECT_EQ(cache.stats(back).state_bytes, static_cast<Index>(keys.size() + values.size()) * 4);
  cache.age(back);
  EXPECT_EQ(state(back), state(a)) << "made after the way through an image";
  const SequenceId later = cache.restore(cache.image(a)).value();
  EXPECT_EQ(state(later), state(a));
  SequenceImage wrong = cache.image(a);
  ASSERT_EQ(wrong.layers[0].states.size(), 2u);
  wrong.layers[0].heads[0].pages[0].state = 1;
  EXPECT_THROW(cache.restore(wrong), InvalidArgument) << "pages are coded with the caller's part alone";
}

TEST(SparseAttention, DoesNotDependOnThreads) {
  std::vector<float> first;
  for (const Index threads : {1, 2, 3}) {
    Scene scene(4, 5000, 0, threads);
    scene.cache.set_aging(scene.id, 0, {.format = 1});
    scene.cache.age(scene.id);
    const auto out = scene.attend({4999});
    if (threads == 1) first = out;
    EXPECT_EQ(out, first);
  }
}

}  // namespace
}  // namespace kvpare

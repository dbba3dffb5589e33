// Forms that are no plain group quantisation, in a cache: beside other forms in every head, after eviction, in forks and
// snapshots. Attention and its mass are those of the rows that `gather` reads, and these are near what was appended.
#include <gtest/gtest.h>

#include <kvpare/codec/kv_quant.hpp>
#include <kvpare/codec/qaq.hpp>
#include <kvpare/codec/sparse.hpp>
#include <kvpare/codec/thin.hpp>
#include <kvpare/codec/unrotated.hpp>
#include <kvpare/codec/vid_kv.hpp>
#include <kvpare/kvpare.hpp>
#include <sstream>

#include "oracle/attend.hpp"
#include "support/inputs.hpp"
#include "support/rigs.hpp"
#include "support/tolerance.hpp"

namespace kvpare::test {
namespace {

using Half = Raw<half>;
using Dictionary = Pair<Unrotated<CsrKeys<8, 0, 64>>, CsrValues<8, 0, 64>>;
using Listed = Formats<Pair<Half, Half>, Pair<Symmetric<4, 16>, Symmetric<4, 16>>,        // beside the others
                       Pair<Thin<Half, 40>, Half>,                                         //
                       Pair<Thin<Symmetric<4, 16>, 50, 16>, Symmetric<4, 32>>,             //
                       Pair<Thin<KiviKeys<4, 32>, 50, 16>, KiviValues<4, 32>>,             //
                       Pair<VidKvKeys<50>, VidKvValues<>>,                                 //
                       Pair<VidKvKeys<75>, VidKvProtectedValues<>>,                        //
                       Pair<VidKvKeys<50, 32, OneBit::literal>, VidKvValues<>>,            //
                       Pair<VidKvKeys<25>, VidKvValues<>>,                                 //
                       Pair<Qaq<4, QaqSide::keys>, Qaq<4, QaqSide::values>>,               //
                       Pair<Qaq<2, QaqSide::keys>, Qaq<2, QaqSide::values>>,               //
                       Pair<KvQuantKeys<4>, KvQuantValues<4>>,                             //
                       Pair<KvQuantKeys<2>, KvQuantValues<2>>,                             //
                       Pair<KvQuantRotatedKeys<3>, KvQuantValues<3>>,                      //
                       Dictionary,                                                         //
                       Pair<CsrKeys<8, 0, 64>, Symmetric<4, 32>>,                          //
                       Pair<VidKvKeys<75>, VidKvValues<>>>;
constexpr int beside = 1, first_odd = 2;

/// How far rows may be from what was appended, as a share of their length: of keys, of values.
struct Bound {
  double keys, values;
};
constexpr Bound bounds[Listed::count] = {
    {1e-3, 1e-3}, {0.12, 0.12}, {0.66, 1e-3}, {0.75, 0.12}, {0.75, 0.12}, {0.6, 0.65}, {0.5, 0.45},  {0.85, 0.65},
    {0.6, 0.65},  {0.15, 0.15}, {0.55, 0.55}, {0.2, 0.2},  {0.6, 0.6},  {0.35, 0.35}, {0.8, 0.8},  {0.8, 0.12}, {0.5, 0.65}};

/// A layer of two kv heads whose keys are turned, 300 tokens. Every third page takes `form`, every third is coded as `beside`.
template <class B>
struct Scene {
  B& be;
  Index width, page;
  Dice dice{11};
  LayerShape shape{.q_heads = 8, .kv_heads = 2, .key_dim = width, .value_dim = width,
                   .scale = static_cast<float>(1 / std::sqrt(static_cast<double>(width))), .rope = rope_of_base(width)};
  KvCache<B, Listed> cache{be, Model{{shape}}, {.page_tokens = page, .pool_bytes = Index{8} << 20}};
  SequenceId id = cache.create();
  oracle::Array3 keys, values;
  static constexpr Index tokens = 300;

  Scene(B& backend, Index w, Index p) : be(backend), width(w), page(p) {
    keys = random_array(dice, tokens, 2, width, DType::f16, 1.5), values = random_array(dice, tokens, 2, width, DType::f16);
    std::vector<Position> positions(static_cast<std::size_t>(tokens));
    std::iota(positions.begin(), positions.end(), 1000);
    EXPECT_EQ(cache.append(id, 0, TensorBuffer<B>(be, keys, DType::f16).tensor(),
                           TensorBuffer<B>(be, values, DType::f16).tensor(), positions),
              Outcome::done);
    const oracle::Array3 q = random_array(dice, tokens, 8, width, DType::f16, 2);
    cache.observe(id, 0, recent_maximum(), TensorBuffer<B>(be, q, DType::f16).tensor(), positions);
  }
  Plan empty(SequenceId s) const {
    Plan plan;
    plan.sequence = s, plan.epoch = cache.epoch(s);
    plan.layers.resize(1);
    return plan;
  }
  void take(int form) {
    Plan plan = empty(id);
    for (const auto& [format, turn] : {std::pair{form, 0}, std::pair{beside, 1}}) {
      Tier tier{.format = format};
      for (const HeadPages& list : cache.pages(id, 0)) {
        Selection& s = tier.tokens.emplace_back(static_cast<Index>(list.entries.size()));
        for (Index e = turn; e < s.entries(); e += 3) s.word(e) = list.entries[static_cast<std::size_t>(e)].live;
      }
      plan.layers[0].tiers.push_back(std::move(tier));
    }
    const CompressReport report = cache.commit(plan);
    EXPECT_GE(report.tokens_changed, 2 * page);
  }
  void evict(SequenceId s, Index every) {
    Plan plan = empty(s);
    plan.layers[0].touched = true;
    for (const HeadPages& list : cache.pages(s, 0)) {
      const Index head = std::ssize(plan.layers[0].keep);
      Selection& keep = plan.layers[0].keep.emplace_back(static_cast<Index>(list.entries.size()));
      for (std::size_t e = 0; e < list.entries.size(); ++e)
        for_each_bit(list.entries[e].live, [&](Index slot) {
          if ((list.position(list.entries[e], slot) + head) % every != 1) keep.insert(static_cast<Index>(e), slot);
        });
    }
    (void)cache.commit(plan);
  }

  std::vector<oracle::CachedHead> read(SequenceId s) const {
    std::vector<oracle::CachedHead> heads;
    for (const HeadPages& list : cache.pages(s, 0)) {
      const Index n = list.live_tokens();
      const Buffer<B, float> k(be, n * width), v(be, n * width);
      const GatherRow rows[] = {{list, Side::keys, nullptr, width, k.data()},
                                {list, Side::values, nullptr, width, v.data()}};
      be.gather(rows);
      const std::vector<float> key = download(be, k), value = download(be, v);
      oracle::CachedHead& head = heads.emplace_back();
      for (const Entry& e : list.entries)
        for_each_bit(e.live, [&](Index slot) {
          const auto at = static_cast<std::ptrdiff_t>(head.size());
          head.push_back({list.position(e, slot),
                          {key.begin() + at * width, key.begin() + (at + 1) * width},
                          {value.begin() + at * width, value.begin() + (at + 1) * width}});
        });
    }
    return heads;
  }

  /// Lengths of what rows of a form are off by, over the lengths of the rows.
  std::pair<double, double> error(SequenceId s, int form) const {
    double off[2] = {0, 0}, all[2] = {0, 0};
    const auto heads = read(s);
    const auto lists = cache.pages(s, 0);
    for (std::size_t h = 0; h < heads.size(); ++h) {
      std::size_t t = 0;
      for (const Entry& e : lists[h].entries)
        for_each_bit(e.live, [&](Index) {
          const oracle::CachedToken& token = heads[h][t++];
          if (e.format != form) return;
          for (Index c = 0; c < width; ++c) {
            const double k = keys.at(token.position - 1000, static_cast<Index>(h), c),
                         v = values.at(token.position - 1000, static_cast<Index>(h), c);
            off[0] += std::pow(oracle::item(token.key, c) - k, 2), all[0] += k * k;
            off[1] += std::pow(oracle::item(token.value, c) - v, 2), all[1] += v * v;
          }
        });
    }
    return {std::sqrt(off[0] / all[0]), std::sqrt(off[1] / all[1])};
  }

  struct Attended {
    oracle::Array3 out;
    std::vector<float> lse;
  };
  Attended attend(SequenceId s, const oracle::Array3& queries, const std::vector<Position>& at) {
    const TensorBuffer<B> q(be, queries, DType::f32),
        out(be, oracle::Array3(queries.a, shape.q_heads, width), DType::f32);
    const Buffer<B, float> lse(be, queries.a * shape.q_heads);
    cache.attend(0, {{.sequence = s, .queries = q.tensor(), .positions = at, .out = out.writable(), .lse = lse.data()}});
    return {out.download(), download(be, lse)};
  }
  void expect_attends(SequenceId s, int form, const char* when) {
    oracle::AttendInput in;
    in.queries = random_array(dice, 3, shape.q_heads, width, DType::f32, 2);
    in.positions = {1299, 1200, 1310};
    in.heads = read(s), in.value_width = width, in.how = {.scale = static_cast<double>(shape.scale)};
    const oracle::AttendResult wanted = oracle::attend(in);
    const Attended got = attend(s, in.queries, {1299, 1200, 1310});
    for (std::size_t i = 0; i < got.out.values.size(); ++i)
      ASSERT_TRUE(close(got.out.values[i], wanted.out.values[i], {6e-3, 0})) << when << ", form " << form << ", out " << i;
    for (std::size_t i = 0; i < got.lse.size(); ++i)
      ASSERT_TRUE(close(got.lse[i], wanted.lse.values[i], {1e-2, 0})) << when << ", form " << form << ", lse " << i;
  }
};

template <class B>
void goes_with_everything(B& be, Index width, Index page) {
  Listed::for_each([&](int form, auto pair) {
    if (form < first_odd || ::testing::Test::HasFatalFailure()) return;
    Scene<B> s(be, width, page);
    if (s.cache.support(0, form) == Support::unsupported) return;
    SCOPED_TRACE(message("form ", form, ": ", decltype(pair)::Key::name, "/", decltype(pair)::Value::name, ", width ", width,
                         ", pages of ", page));
    s.take(form);
    const auto [keys, values] = s.error(s.id, form);
    EXPECT_LE(keys, bounds[form].keys);
    EXPECT_LE(values, bounds[form].values);
    ASSERT_NO_FATAL_FAILURE(s.expect_attends(s.id, form, "coded"));

    // A snapshot reads the same to the last bit.
    std::stringstream bytes;
    save(bytes, s.cache, s.id);
    const std::optional<SequenceId> copy = load(bytes, s.cache);
    ASSERT_TRUE(copy);
    const oracle::Array3 q = random_array(s.dice, 1, s.shape.q_heads, width, DType::f32, 2);
    EXPECT_EQ(s.attend(*copy, q, {1299}).out.values, s.attend(s.id, q, {1299}).out.values);
    s.cache.release(*copy);

    // A fork evicts; the other one does not see it. Then pages are private again, and rows move.
    const SequenceId fork = s.cache.fork(s.id);
    const auto before = s.read(s.id);
    s.evict(fork, 3);
    ASSERT_NO_FATAL_FAILURE(s.expect_attends(fork, form, "evicted in a fork"));
    const auto after = s.read(s.id);
    for (std::size_t h = 0; h < before.size(); ++h)
      for (std::size_t t = 0; t < before[h].size(); ++t) ASSERT_EQ(before[h][t].key, after[h][t].key);
    s.cache.release(fork);
    s.evict(s.id, 2);
    ASSERT_NO_FATAL_FAILURE(s.expect_attends(s.id, form, "evicted"));
    const auto [keys_left, values_left] = s.error(s.id, form);
    EXPECT_LE(keys_left, 1.1 * bounds[form].keys);
    EXPECT_LE(values_left, 1.1 * bounds[form].values);
  });
}

TEST(OddForms, GoWithEverythingOnEveryInstructionSet) {
  for (const cpu::Isa isa : cpu::all_isas) {
    if (!cpu::supports(isa)) continue;
    cpu::Backend be({.threads = 1, .isa = isa});
    for (const auto& [width, page] : {std::pair{64, 64}, std::pair{128, 32}}) goes_with_everything(be, width, page);
    if (HasFailure()) FAIL() << name_of(isa);
  }
}
TEST(OddForms, TakeWidthsThatHaveNoLoops) {
  cpu::Backend be({.threads = 1});
  goes_with_everything(be, 16, 32);
  goes_with_everything(be, 80, 64);
}
TEST(OddForms, TouchBackendMemoryInVerbsAlone) {
  WalledBackend be;
  goes_with_everything(be, 64, 64);
}

/// By name, as methods: every precision finds its forms, and what is coded is attended to.
TEST(OddForms, PrecisionsTakeThem) {
  cpu::Backend be({.threads = 1});
  for (const char* words :
       {"think", "think(keys=half, values=half)", "think(percent=50, align=16, keys=int4_g16, values=int4_g32)", "vid_kv",
        "vid_kv(one_bit_decode=literal)", "vid_kv(percent=75)", "random(keep=0.4) + vid_kv(percent=75, protect=yes)",
        "qaq(capacity=4)", "qaq(capacity=2, sigma_s=0.05, sigma_x=0.05, recode=yes)", "kv_quant(bits=4)", "kv_quant(bits=2)",
        "kv_quant(bits=3, before_rope=no)", "csr(nonzeros=8, dictionary=online64)"}) {
    SCOPED_TRACE(words);
    Scene<cpu::Backend> s(be, 64, 32);
    const AnyCompressor method = make_compressor(words);
    const CompressReport report = s.cache.compress(s.id, method);
    EXPECT_GT(report.tokens_changed, 100);
    EXPECT_LT(report.page_bytes_after, report.page_bytes_before);
    ASSERT_NO_FATAL_FAILURE(s.expect_attends(s.id, -1, words));
  }
}

TEST(OddForms, SayWhatTheyMiss) {
  cpu::Backend be({.threads = 1});
  KvCache<cpu::Backend, Listed> cache(
      be, Model{{{.q_heads = 1, .kv_heads = 1, .key_dim = 64, .value_dim = 64, .scale = 1}}},
      {.page_tokens = 32, .pool_bytes = 1 << 20});
  const SequenceId id = cache.create();
  std::vector<half> rows(64 * 64, half(1.0f));
  std::vector<Position> positions(64);
  std::iota(positions.begin(), positions.end(), 0);
  const ConstTensor t(rows.data(), 64, 1, 64);
  ASSERT_EQ(cache.append(id, 0, t, t, positions), Outcome::done);
  const auto error = [&](const char* words) {
    try {
      cache.compress(id, make_compressor(words));
    } catch (const InvalidArgument& e) {
      return std::string(e.what());
    }
    return std::string("no error");
  };
  EXPECT_NE(error("kv_quant(bits=4)").find("has no rope"), std::string::npos) << error("kv_quant(bits=4)");
  EXPECT_NE(error("think").find("no queries were observed"), std::string::npos) << error("think");
  EXPECT_NE(error("think(percent=70)").find("form thin70_half/half is none of this cache's"), std::string::npos);
  EXPECT_EQ(error("kv_quant(bits=3, before_rope=no)"), "no error");
}

}  // namespace
}  // namespace kvpare::test

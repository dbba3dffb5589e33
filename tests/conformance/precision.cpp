// Precision policies against the papers, step by step: which tokens are in which form, and what is read of them.
#include <gtest/gtest.h>

#include <kvpare/codec/folded.hpp>
#include <kvpare/codec/group.hpp>
#include <kvpare/pipeline/kv_cache.hpp>
#include <kvpare/pipeline/recipes.hpp>
#include <kvpare/policy/precision/kv_tuner.hpp>
#include <kvpare/policy/precision/recipes.hpp>

#include "oracle/mixed_cache.hpp"
#include "support/inputs.hpp"
#include "support/tolerance.hpp"

namespace kvpare::test {
namespace {

using oracle::Array2;
using oracle::Array3;

/// One layer that is given tokens as an engine would; keys and values are exact in their raw form.
template <class Be, class Listed>
struct Layers {
  Be& be;
  Dice dice;
  Model model;
  KvCache<Be, Listed> cache;
  SequenceId id = cache.create();
  std::vector<Array3> last_keys, last_values;  // [layer] of the last append
  Index tokens = 0;

  Layers(Be& backend, Index layers, Index kv_heads, Index group, Index width, Index page, std::uint64_t seed)
      : be(backend), dice{seed}, model(model_of(layers, kv_heads, group, width)),
        cache(be, model, {.page_tokens = page, .pool_bytes = Index{4} << 20}),
        last_keys(static_cast<std::size_t>(layers)), last_values(static_cast<std::size_t>(layers)) {}

  static Model model_of(Index layers, Index kv_heads, Index group, Index width) {
    const LayerShape shape{.q_heads = kv_heads * group,
                           .kv_heads = kv_heads,
                           .key_dim = width,
                           .value_dim = width,
                           .scale = static_cast<float>(1 / std::sqrt(static_cast<double>(width)))};
    return {std::vector<LayerShape>(static_cast<std::size_t>(layers), shape)};
  }
  const LayerShape& shape() const { return model.layers[0]; }
  Array3 queries(Index rows) { return random_array(dice, rows, shape().q_heads, shape().key_dim, DType::f16, 2); }

  void append(Index count, const std::function<void(Index layer, Array3& keys)>& change = {}) {
    std::vector<Position> positions(static_cast<std::size_t>(count));
    std::iota(positions.begin(), positions.end(), static_cast<Position>(tokens));
    for (Index l = 0; l < cache.layers(); ++l) {
      Array3& keys = last_keys[static_cast<std::size_t>(l)] =
          random_array(dice, count, shape().kv_heads, shape().key_dim, DType::f16, 1.5);
      Array3& values = last_values[static_cast<std::size_t>(l)] =
          random_array(dice, count, shape().kv_heads, shape().value_dim, DType::f16);
      if (change) change(l, keys);
      ASSERT_EQ(cache.append(id, l, TensorBuffer<Be>(be, keys, DType::f16).tensor(),
                             TensorBuffer<Be>(be, values, DType::f16).tensor(), positions),
                Outcome::done);
    }
    tokens += count;
  }

  struct Token {
    int format;
    std::vector<double> key, value;
  };
  std::map<Position, Token> read(Index layer, Index head) {
    const HeadPages list = cache.pages(id, layer)[static_cast<std::size_t>(head)];
    const Index n = list.live_tokens(), width = shape().key_dim;
    const Buffer<Be, float> k(be, n * width), v(be, n * width);
    const GatherRow rows[] = {{list, Side::keys, nullptr, width, k.data()},
                              {list, Side::values, nullptr, width, v.data()}};
    be.gather(rows);
    const std::vector<float> key = download(be, k), value = download(be, v);
    std::map<Position, Token> tokens_read;
    std::ptrdiff_t at = 0;
    for (const Entry& e : list.entries)
      for_each_bit(e.live, [&](Index slot) {
        tokens_read[list.position(e, slot)] = {
            e.format, {key.begin() + at, key.begin() + at + width}, {value.begin() + at, value.begin() + at + width}};
        at += width;
      });
    return tokens_read;
  }
};

/// Rows agree but for numbers that lie at a tie between two codes.
void expect_codes(const std::vector<double>& got, const std::vector<double>& wanted, double tolerance, Index& numbers,
                  Index& apart) {
  ASSERT_EQ(got.size(), wanted.size());
  for (std::size_t i = 0; i < got.size(); ++i) ++numbers, apart += !(std::abs(got[i] - wanted[i]) <= tolerance);
}

template <class Rig>
class Precisions : public OnRig<Rig> {};
TYPED_TEST_SUITE(Precisions, PipelineRigs, RigNames);

using Half = Raw<half>;

template <class Be, Index group>
void follows_kivi(Be& be, Index page, Index residual, Index prompt, Index steps) {
  using Listed =
      Formats<Pair<Half, Half>, Pair<KiviKeys<2, group>, Half>, Pair<KiviKeys<2, group>, KiviValues<2, group>>>;
  Layers<Be, Listed> s(be, 1, 2, 2, 64, page, static_cast<std::uint64_t>(page + residual));
  const auto method =
      Compressor{Random{}, Uniform{}, TopK{}, Keep::ratio(1), Kivi{.bits = 2, .group = group, .residual = residual}};
  std::vector<oracle::MixedHead> heads(2);
  oracle::KiviSettings how;
  const Index lot = std::max(residual / page * page, page);  // keys wait for whole pages
  how.keys = {0, residual % page == 0 ? residual : lot}, how.values = {residual, page};
  how.code_key_lot = oracle::kivi_keys(group, {.bits = 2}),
  how.code_value_lot = oracle::kivi_values(group, {.bits = 2});
  const auto note = [&] {
    std::vector<Index> positions;
    for (Index t = s.tokens - s.last_keys[0].a; t < s.tokens; ++t) positions.push_back(t);
    oracle::append_rows(heads, positions, s.last_keys[0], s.last_values[0]);
  };
  Index numbers = 0, apart = 0;
  const auto verify = [&] {
    for (Index h = 0; h < 2; ++h) {
      const auto got = s.read(0, h);
      ASSERT_EQ(static_cast<Index>(got.size()), s.tokens);
      for (Index t = 0; t < s.tokens; ++t) {
        const oracle::MixedToken& wanted = oracle::item(heads, h).at(t);
        const auto& token = got.at(static_cast<Position>(t));
        ASSERT_EQ(token.format, wanted.key_tier + wanted.value_tier)
            << "position " << t << " of " << s.tokens << ", page " << page << ", residual " << residual;
        expect_codes(token.key, wanted.read.key, 2e-3, numbers, apart);
        expect_codes(token.value, wanted.read.value, 2e-3, numbers, apart);
      }
    }
  };
  s.append(prompt), note();
  ASSERT_NO_FATAL_FAILURE(verify());  // a prompt is attended to as it is
  s.cache.compress(s.id, method);
  for (oracle::MixedHead& head : heads) oracle::flush_tails(head, how);
  ASSERT_NO_FATAL_FAILURE(verify());
  for (Index step = 0; step < steps; ++step) {
    for (oracle::MixedHead& head : heads) oracle::flush_tails(head, how);  // after the last step's attention
    s.append(1), note();
    if (step % 7 == 0 || step > steps - 3) {
      ASSERT_NO_FATAL_FAILURE(verify());
    }
  }
  EXPECT_LE(apart * 2000, numbers) << "ties are rare";
}

TYPED_TEST(Precisions, KiviCodesWhatThePaperSays) {
  follows_kivi<typename TestFixture::B, 32>(this->be(), 32, 128, 300, 150);
  follows_kivi<typename TestFixture::B, 32>(this->be(), 64, 64, 200, 140);
  follows_kivi<typename TestFixture::B, 16>(this->be(), 16, 32, 47, 70);
  follows_kivi<typename TestFixture::B, 32>(this->be(), 64, 32, 130, 70);  // keys wait for a page
}

TYPED_TEST(Precisions, MikvDemotesWhatThePaperDoes) {
  using Be = typename TestFixture::B;
  using Listed = Formats<Pair<Half, Half>, Pair<MikvKeys<2>, MikvGroup<2>>>;
  const Index prompt = 160, keep = 32;
  Layers<Be, Listed> s(this->be(), 1, 2, 3, 32, 16, 21);
  const auto method = Compressor{AccumulatedAttention{}, Uniform{}, TopK{.recent_share = 0.5}, Keep::tokens(keep),
                                 Mikv{.low = Form("int2"), .high = {}, .block = 1}};
  oracle::MikvSettings settings;
  settings.ratio = static_cast<double>(keep) / static_cast<double>(prompt), settings.count_follows_length = false;
  oracle::MikvLayer wanted(settings, {.scale = static_cast<double>(s.shape().scale)}, 2);
  Index numbers = 0, apart = 0;
  const auto verify = [&](Index step) {
    for (Index h = 0; h < 2; ++h) {
      const auto got = s.read(0, h);
      ASSERT_EQ(static_cast<Index>(got.size()), s.tokens);
      for (Index t = 0; t < s.tokens; ++t) {
        const oracle::MixedToken& token = wanted.head(h).at(t);
        const auto& read = got.at(static_cast<Position>(t));
        ASSERT_EQ(read.format == 0, token.key_tier == 0) << "step " << step << " head " << h << " position " << t;
        expect_codes(read.key, token.read.key, 4e-3, numbers, apart);
        expect_codes(read.value, token.read.value, 4e-3, numbers, apart);
      }
    }
  };
  s.append(prompt);
  std::vector<Position> positions(static_cast<std::size_t>(prompt));
  std::iota(positions.begin(), positions.end(), 0);
  const Array3 rows = s.queries(prompt);
  (void)wanted.prefill(rows, s.last_keys[0], s.last_values[0]);
  s.cache.observe(s.id, 0, method, TensorBuffer<Be>(s.be, rows, DType::f32).tensor(), positions);
  const CompressReport report = s.cache.compress(s.id, method);
  EXPECT_EQ(report.tokens_changed, 2 * (prompt - keep));
  EXPECT_EQ(report.tokens_after, 2 * prompt);

  // The balancer is that of the prompt, all of it.
  const HeadPages list = s.cache.pages(s.id, 0)[1];
  const auto coded =
      std::find_if(list.entries.begin(), list.entries.end(), [](const Entry& e) { return e.format == 1; });
  ASSERT_NE(coded, list.entries.end());
  std::vector<float> factors(32);
  s.be.wait(s.be.to_host(factors.data(), list.state_of(*coded).keys, 32 * 4));
  for (Index c = 0; c < 32; ++c)
    EXPECT_NEAR(factors[static_cast<std::size_t>(c)], wanted.factors().at(1, c), 1e-3 * wanted.factors().at(1, c)) << c;

  ASSERT_NO_FATAL_FAILURE(verify(-1));
  for (Index step = 0; step < 40; ++step) {
    s.append(1);
    const Array3 row = s.queries(1);
    const Position at = static_cast<Position>(s.tokens - 1);
    (void)wanted.step({at}, row, s.last_keys[0], s.last_values[0]);
    const TensorBuffer<Be> q(s.be, row, DType::f32), out(s.be, Array3(1, s.shape().q_heads, 32), DType::f32);
    const EvictReport r = s.cache.decode(
        0, {{.sequence = s.id, .queries = q.tensor(), .positions = std::span(&at, 1), .out = out.writable()}}, method);
    EXPECT_EQ(r.demoted, 2);
    EXPECT_EQ(r.evicted, 0);
    ASSERT_NO_FATAL_FAILURE(verify(step));
  }
  EXPECT_LE(apart * 500, numbers) << "ties are rare";
  // Lots of one token share pages: no more than twice the dense number.
  EXPECT_LE(s.cache.stats(s.id).heads[0][0].pages, 2 * (s.tokens / 16 + 2));
}

TYPED_TEST(Precisions, ZipCacheCodesTiersWithRangesOfTheirOwn) {
  using Be = typename TestFixture::B;
  using Listed = Formats<Pair<Half, Half>, Pair<ZipVlKeys<4>, ZipVlValues<4>>, Pair<ZipVlKeys<2>, ZipVlValues<2>>>;
  Layers<Be, Listed> s(this->be(), 1, 2, 2, 32, 16, 33);
  const auto method =
      Compressor{KeyNorm{}, Uniform{}, TopK{}, Keep::tokens(64), ZipCache{.high = 4, .low = 2, .residual = 1}};
  s.append(200);
  const CompressReport report = s.cache.compress(s.id, method);
  EXPECT_EQ(report.tokens_changed, 2 * 200);
  Index numbers = 0, apart = 0;
  for (Index h = 0; h < 2; ++h) {
    const auto got = s.read(0, h);
    Array2 all_values(200, 32);
    for (Index t = 0; t < 200; ++t)
      for (Index c = 0; c < 32; ++c) all_values.at(t, c) = s.last_values[0].at(t, h, c);
    const std::vector<double> factors = oracle::channel_factors(all_values);
    for (const int format : {1, 2}) {
      std::vector<Position> members;
      for (const auto& [p, token] : got)
        if (token.format == format) members.push_back(p);
      ASSERT_EQ(std::ssize(members), format == 1 ? 64 : 136);
      Array2 keys(std::ssize(members), 32), values(std::ssize(members), 32);
      for (Index i = 0; i < keys.rows; ++i)
        for (Index c = 0; c < 32; ++c) {
          keys.at(i, c) = s.last_keys[0].at(members[static_cast<std::size_t>(i)], h, c);
          values.at(i, c) = s.last_values[0].at(members[static_cast<std::size_t>(i)], h, c);
        }
      const oracle::QuantiserSettings how{.bits = format == 1 ? 4 : 2, .scale = oracle::Stored::f32};
      const Array2 k = oracle::zipcache_keys(keys, how).decoded,
                   v = oracle::zipcache_values(values, factors, {.bits = how.bits}).decoded;
      for (Index i = 0; i < keys.rows; ++i) {
        const auto& token = got.at(members[static_cast<std::size_t>(i)]);
        expect_codes(token.key, k.row(i), 2e-3, numbers, apart);
        expect_codes(token.value, v.row(i), 2e-3, numbers, apart);
      }
    }
  }
  EXPECT_LE(apart * 500, numbers) << "ties are rare";
}

KvTuner tuned(TunedPreset preset) {
  KvTuner t;
  t.preset = preset;
  return t;
}

TEST(KvTunerPresets, AllParseAndAverageToTheirNames) {
  std::string_view names = choices(static_cast<TunedPreset*>(nullptr));
  Index count = 0;
  for (int i = 0;; ++i) {
    const auto bar = names.find('|');
    const std::string name(names.substr(0, bar));
    if (i > 0) {
      ++count;
      const auto preset = static_cast<TunedPreset>(i);
      LayerBits bits;
      ASSERT_TRUE(parse_setting(published_bits(preset).bits, bits)) << name;
      EXPECT_EQ(std::ssize(bits.layers), name.starts_with("qwen25_7b")   ? 28
                                         : name.starts_with("qwen25_3b") ? 36
                                                                         : 32)
          << name;
      const auto tail = name.find(name.find("_kivi_") != std::string::npos ? "_kivi_" : "_token_");
      std::string mean = name.substr(name.find('_', tail + 1) + 1);
      std::replace(mean.begin(), mean.end(), '_', '.');
      EXPECT_NEAR(bits.mean(), std::stod(mean), 6e-4) << name;
      const auto wanted = oracle::bit_table(std::string(published_bits(preset).bits));
      EXPECT_NEAR(oracle::mean_bits(wanted), bits.mean(), 1e-12) << name;
      const Precision p = tuned(preset).precision(std::ssize(bits.layers));
      EXPECT_EQ(p.layers.size(), bits.layers.size());
      EXPECT_EQ(p.keep_raw_values, published_bits(preset).mode == TunedMode::kivi ? 32 : 0);
      EXPECT_THROW((void)tuned(preset).precision(std::ssize(bits.layers) + 1), InvalidArgument) << name;
    }
    if (bar == std::string_view::npos) break;
    names.remove_prefix(bar + 1);
  }
  EXPECT_EQ(count, 10);
  EXPECT_THROW((void)KvTuner{}.precision(3), InvalidArgument);
}

using Two = Formats<Pair<Half, Half>, Pair<Int8, Int8>, Pair<Int4, Int4>>;

TYPED_TEST(Precisions, LayersTakeTheirOwnForms) {
  using Be = typename TestFixture::B;
  using Listed =
      Formats<Pair<Half, Half>, Pair<KvTunerToken<8>, KvTunerToken<4>>, Pair<KvTunerToken<4>, KvTunerToken<2>>>;
  Layers<Be, Listed> s(this->be(), 2, 1, 2, 32, 16, 41);
  auto method = Compressor{Random{}, Uniform{}, TopK{}, Keep::ratio(1),
                           KvTuner{.mode = TunedMode::token, .bits = {{{8, 4}, {4, 2}}}}};
  s.append(50);
  s.cache.compress(s.id, method);
  for (Index l = 0; l < 2; ++l)
    for (const auto& [p, token] : s.read(l, 0)) ASSERT_EQ(token.format, l + 1) << p;
  method.precision.bits.layers.push_back({2, 2});
  EXPECT_THROW((void)s.cache.plan(s.id, method), InvalidArgument);
  method.precision.bits.layers = {{8, 4}, {2, 2}};
  EXPECT_THROW((void)s.cache.plan(s.id, method), InvalidArgument) << "a form that the cache does not list";
}

TYPED_TEST(Precisions, InFormSparesClassesSinksLayersAndNewest) {
  Layers<typename TestFixture::B, Two> s(this->be(), 4, 2, 2, 32, 16, 43);
  s.cache.tag(s.id, {.begin = 10, .end = 60, .token_class = TokenClass::image});
  const auto method = [](InForm form) { return Compressor{Random{}, Uniform{}, TopK{}, Keep::ratio(1), form}; };
  s.append(100);
  s.cache.compress(
      s.id,
      method({.form = Form("int4"), .residual = 5, .only = visual, .sinks = 20, .first_layers = 1, .last_layers = 2}));
  for (Index l = 0; l < 4; ++l)
    for (Index h = 0; h < 2; ++h)
      for (const auto& [p, token] : s.read(l, h))
        ASSERT_EQ(token.format, l == 1 && p >= 20 && p < 55 ? 2 : 0) << "layer " << l << " position " << p;
  s.append(1);  // the rule goes on, of its own class only
  for (const auto& [p, token] : s.read(1, 0)) ASSERT_EQ(token.format, p >= 20 && p < 55 ? 2 : 0);
  s.cache.compress(s.id, method({.form = Form("int8"), .residual = 10}));
  for (Index l = 0; l < 4; ++l)
    for (const auto& [p, token] : s.read(l, 1))
      ASSERT_EQ(token.format, l == 1 && p >= 20 && p < 55 ? 2 : p < 91 ? 1 : 0) << "layer " << l << " position " << p;
}

TYPED_TEST(Precisions, GuardedLayersTakeTheOtherFormAndTheReportSaysWhy) {
  Layers<typename TestFixture::B, Two> s(this->be(), 3, 2, 2, 32, 16, 47);
  s.append(60, [](Index layer, Array3& keys) {
    for (Index t = 0; t < keys.a && layer > 0; ++t)
      for (Index h = 0; h < keys.b; ++h)
        for (Index c = 0; c < keys.c; ++c) {
          if (layer == 1 && h == 1 && c == 7) keys.at(t, h, c) *= 20;
          if (layer == 2) keys.at(t, h, c) = h == 0 && c == 3 ? 1 : 0;  // a median of nothing
        }
  });
  const auto method = Compressor{Random{}, Uniform{}, TopK{}, Keep::ratio(1),
                                 InForm{.form = Form("int4"), .guard = 10, .guarded = Form("int8")}};
  const CompressReport report = s.cache.compress(s.id, method);
  ASSERT_EQ(report.notes.size(), 2u);
  EXPECT_NE(report.notes[0].find("layer 1: key channel 7 of head 1"), std::string::npos) << report.notes[0];
  EXPECT_NE(report.notes[1].find("layer 2: key channel 3 of head 0"), std::string::npos) << report.notes[1];
  for (Index l = 0; l < 3; ++l)
    for (const auto& [p, token] : s.read(l, 0))
      ASSERT_EQ(token.format, l == 0 ? 2 : 1) << "layer " << l << " position " << p;
}

}  // namespace
}  // namespace kvpare::test

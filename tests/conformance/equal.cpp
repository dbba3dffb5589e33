// The same prompt, method by method, on a backend and on the CPU's plain kernels: the same tokens stay, in the same forms,
// and attention reads the same. Some tokens are each other's copies, so that ties are decided as well.
#include <gtest/gtest.h>

#include <kvpare/backend/cpu/backend.hpp>
#include <kvpare/codec/fp8.hpp>
#include <kvpare/codec/ggml.hpp>
#include <kvpare/codec/group.hpp>
#include <kvpare/codec/ternary.hpp>
#include <kvpare/codec/turbo_quant.hpp>
#include <kvpare/runtime/make_compressor.hpp>
#include <map>

#include "support/features.hpp"
#include "support/prompt.hpp"
#include "support/tolerance.hpp"

namespace kvpare::test {
namespace {

using Half = Raw<half>;
template <class C>
using Both = Pair<C, C>;
using Listed = Formats<Both<Half>, Pair<KiviKeys<2, 16>, Half>, Pair<KiviKeys<2, 16>, KiviValues<2, 16>>,
                       Pair<MikvKeys<4>, MikvGroup<4>>, Pair<ZipVlKeys<4>, ZipVlValues<4>>,
                       Pair<ZipVlKeys<2>, ZipVlValues<2>>, Pair<KvTunerToken<8>, KvTunerToken<4>>, Both<Int8>,
                       Both<Int4>, Both<Fp8E4M3>, Both<Q8_0>, Both<Ternary<>>, Both<TurboQuant<4>>, Both<TurboQuant<3>>>;

constexpr Index page_tokens = 16, tokens = 200, chunk = 120, steps = 3, width = 64;

Prompt prompt_with_copies() {
  Prompt p = random_prompt(5, 2, tokens + steps, 2, 2,
                           {{.begin = 10, .end = 150, .token_class = TokenClass::image}}, width);
  for (Index l = 0; l < p.layers(); ++l)
    for (Index t = 20; t < 140; t += 5)  // keys and values of t and t + 2 are the same
      for (Index h = 0; h < 2; ++h)
        for (Index c = 0; c < width; ++c) {
          p.keys[static_cast<std::size_t>(l)].at(t + 2, h, c) = p.keys[static_cast<std::size_t>(l)].at(t, h, c);
          p.values[static_cast<std::size_t>(l)].at(t + 2, h, c) = p.values[static_cast<std::size_t>(l)].at(t, h, c);
        }
  return p;
}

/// What one backend makes of the prompt: per layer and kv head the tokens by position with their form, and what the rows
/// that follow the prompt read.
struct Made {
  std::vector<std::map<Position, int>> forms;
  std::vector<double> attended, lse;
  Index pages = 0, freed = 0;
};

template <Backend B>
Made make(B& be, const Prompt& p, const AnyCompressor& method) {
  KvCache<B, Listed> cache(be, p.model, {.page_tokens = page_tokens, .pool_bytes = Index{4} << 20});
  const SequenceId id = cache.create();
  for (const TagSpan& span : p.tags) cache.tag(id, span);
  std::vector<TensorBuffer<B>> queries, keys, values;
  for (std::size_t l = 0; l < p.keys.size(); ++l) {
    queries.emplace_back(be, p.queries[l], DType::f32);
    keys.emplace_back(be, p.keys[l], DType::f32);
    values.emplace_back(be, p.values[l], DType::f32);
  }
  std::vector<Position> positions(static_cast<std::size_t>(tokens + steps));
  std::iota(positions.begin(), positions.end(), 0);
  const auto append = [&](std::size_t l, Index first, Index count) {
    ASSERT_EQ(cache.append(id, static_cast<Index>(l), keys[l].tensor().part(first, count),
                           values[l].tensor().part(first, count),
                           std::span(positions).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count))),
              Outcome::done);
  };
  for (Index first = 0; first < tokens; first += chunk)
    for (std::size_t l = 0; l < p.keys.size(); ++l) {
      const Index count = std::min(chunk, tokens - first);
      append(l, first, count);
      if (method.scorer.reads().features) continue;
      cache.observe(id, static_cast<Index>(l), method, queries[l].tensor().part(first, count),
                    std::span(positions).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count)),
                    first + count == tokens);
    }
  if (method.scorer.reads().features) {  // the same on every backend
    Dice dice{6};
    std::vector<Position> visuals = visual_positions(p.classes());
    const FeatureSet features = random_features(dice, visuals, width, DType::f16, 12);
    cache.observe_features(id, method, HeldFeatures<B>(be, features, DType::f16, DType::f16).get());
  }
  const CompressReport report = cache.compress(id, method);
  Made made;
  made.pages = report.pages_after, made.freed = report.bytes_freed;
  for (std::size_t l = 0; l < p.keys.size(); ++l) {
    append(l, tokens, steps);
    for (const HeadPages& list : cache.pages(id, static_cast<Index>(l))) {
      auto& of_head = made.forms.emplace_back();
      for (const Entry& e : list.entries)
        for_each_bit(e.live, [&](Index slot) { of_head[list.position(e, slot)] = e.format; });
    }
    const TensorBuffer<B> out(be, oracle::Array3(steps, p.shape(0).q_heads, width), DType::f32);
    const Buffer<B, float> lse(be, steps * p.shape(0).q_heads);
    cache.attend(static_cast<Index>(l), {{.sequence = id,
                                          .queries = queries[l].tensor().part(tokens, steps),
                                          .positions = std::span(positions).subspan(static_cast<std::size_t>(tokens)),
                                          .out = out.writable(),
                                          .lse = lse.data()}});
    const auto read = out.download();
    made.attended.insert(made.attended.end(), read.values.begin(), read.values.end());
    for (const float x : download(be, lse)) made.lse.push_back(static_cast<double>(x));
  }
  return made;
}

/// The CPU's answer, made once for all backends that are compared with it.
const Made& plain(const Prompt& p, const std::string& text) {
  static std::map<std::string, Made> known;
  const auto at = known.find(text);
  if (at != known.end()) return at->second;
  static cpu::Backend be({.threads = 1, .isa = cpu::Isa::plain});
  return known.emplace(text, make(be, p, make_compressor(text))).first->second;
}

/// `apart`: how far attention may be from the CPU's. Codes are read with q in 8 or 16 bits on the CPU, with q in f16 on a
/// device: half of a step of the coarsest codes.
template <Backend B>
void expect_equal(B& be, const std::string& text, double apart) {
  static const Prompt p = prompt_with_copies();
  const Made &wanted = plain(p, text), got = make(be, p, make_compressor(text));
  ASSERT_EQ(got.forms.size(), wanted.forms.size()) << text;
  for (std::size_t h = 0; h < wanted.forms.size(); ++h)
    EXPECT_EQ(got.forms[h], wanted.forms[h]) << text << ", layer " << h / 2 << ", head " << h % 2;
  EXPECT_EQ(got.pages, wanted.pages) << text;
  EXPECT_EQ(got.freed, wanted.freed) << text;
  for (std::size_t i = 0; i < wanted.attended.size(); ++i)
    ASSERT_NEAR(got.attended[i], wanted.attended[i], apart) << text << ", number " << i;
  for (std::size_t i = 0; i < wanted.lse.size(); ++i)
    ASSERT_NEAR(got.lse[i], wanted.lse[i], 5 * apart) << text << ", row " << i;
}

template <class Rig>
class EqualToTheCpu : public OnRig<Rig> {};
TYPED_TEST_SUITE(EqualToTheCpu, PipelineRigs, RigNames);

TYPED_TEST(EqualToTheCpu, EveryMethodKeepsTheSameTokens) {
  const auto keeps = is_small<TypeParam>() ? std::vector{"0.3"} : std::vector{"0.15", "0.5"};
  for (const Recipe& recipe : known_recipes()) {
    const std::string name(recipe.name);
    if (!recipe.has_settings)
      expect_equal(this->be(), name, 1e-4);
    else
      for (const char* keep : keeps)
        expect_equal(this->be(), message(name, "(keep=", keep, ", skip_layers=0)"), 1e-4);
  }
}

TYPED_TEST(EqualToTheCpu, EveryPrecisionGivesTheSameForms) {
  const std::string all[] = {"kivi(bits=2, group=16, residual=32)",
                             "air_cache(keep=0.3) + kivi(bits=2, group=16, residual=32)",
                             "mikv(keep=0.3, low=int4)",
                             "zip_cache(keep=0.4)",
                             "kv_crush(keep=0.5, granularity=page)",
                             "ada_kv(keep=0.5, granularity=page) + kivi(bits=2, group=16, residual=32)",
                             "mikv(keep=0.5, low=int4, granularity=page)",
                             "kvtuner(mode=token, bits=8/4 8/4)",
                             "joint(keep=40KiB)",
                             "joint(keep=24KiB)"};
  for (const std::string& text : all) expect_equal(this->be(), text, 0.02);
}

TYPED_TEST(EqualToTheCpu, EveryCodecReadsTheSame) {
  for (const char* form : {"half", "int8", "int4", "fp8_e4m3", "q8_0", "ternary", "hadamard_lloyd4", "hadamard_lloyd3"})
    expect_equal(this->be(), message("in_form(form=", form, ")"), 0.02);
}

}  // namespace
}  // namespace kvpare::test

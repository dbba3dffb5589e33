// The search step by step against worked examples, and the measures on data whose answer is known.
#include "../dictionary.hpp"
#include "../learn.hpp"
#include "../ratios.hpp"
#include "../search.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <kvpare/codec/kv_quant.hpp>
#include <kvpare/codec/sparse.hpp>
#include <kvpare/codec/unrotated.hpp>
#include <kvpare/core/random.hpp>
#include <kvpare/runtime/make_compressor.hpp>
#include <sstream>

namespace tune {
namespace {

Choice choice(Index keys, Index values, double e_o) { return {{keys, values}, e_o, 0}; }

// The example of the KVTuner specification.
std::vector<Choice> nine_pairs() {
  return {choice(8, 8, .01), choice(8, 4, .03), choice(4, 8, .05), choice(8, 2, .12), choice(2, 8, .50),
          choice(4, 4, .06), choice(4, 2, .15), choice(2, 4, .51), choice(2, 2, .55)};
}

/// Vectors that are two of twelve hidden atoms each: the dictionary that is found codes them nearly without rest.
TEST(Dictionary, FindsWhatVectorsAreMadeOf) {
  constexpr Index width = 16, hidden = 12, count = 600;
  const auto signed_unit = [](std::uint64_t seed, Index i) { return 2 * kvpare::random_unit(seed, i) - 1; };
  std::vector<float> atoms(hidden * width), vectors(count * width, 0.0f);
  for (std::size_t i = 0; i < atoms.size(); ++i) atoms[i] = signed_unit(1, static_cast<Index>(i));
  for (Index v = 0; v < count; ++v)
    for (const Index n : {v % hidden, (v * 5 + v / hidden + 1) % hidden})
      for (Index c = 0; c < width; ++c)
        vectors[static_cast<std::size_t>(v * width + c)] +=
            signed_unit(2, v * hidden + n) * atoms[static_cast<std::size_t>(n * width + c)];
  const DictionaryRules rules{.atoms = 24, .nonzeros = 3, .rounds = 15};
  const Dictionary learnt = learn_dictionary(vectors, width, rules);
  ASSERT_EQ(learnt.errors.size(), 15u);
  EXPECT_LT(*std::min_element(learnt.errors.begin(), learnt.errors.end()), 0.05);
  EXPECT_LT(learnt.errors.back(), learnt.errors.front());
  for (Index n = 0; n < rules.atoms; ++n) {
    double square = 0;
    for (Index c = 0; c < width; ++c) {
      const float x = learnt.atoms[static_cast<std::size_t>(n * width + c)];
      square += static_cast<double>(x) * static_cast<double>(x);
      EXPECT_EQ(x, static_cast<float>(kvpare::half(x))) << "exact as a half";
    }
    EXPECT_NEAR(square, 1, 5e-3);
  }
  EXPECT_EQ(learn_dictionary(vectors, width, rules).atoms, learnt.atoms) << "the same again";
  EXPECT_THROW(learn_dictionary({}, width, rules), kvpare::InvalidArgument);
  EXPECT_THROW(learn_dictionary(vectors, 7, rules), kvpare::InvalidArgument);
}

TEST(Search, ParetoKeepsWhatNothingBeats) {
  const auto left = pareto(nine_pairs());
  EXPECT_EQ(left, (std::vector<Choice>{choice(2, 2, .55), choice(4, 2, .15), choice(4, 4, .06), choice(8, 4, .03),
                                       choice(8, 8, .01)}));
}

TEST(Search, LayersWithTheSamePairsAndSimilarErrorsChooseTogether) {
  auto near = pareto(nine_pairs()), far = near, other = near;
  for (Choice& c : near) c.e_o *= 1.1;
  for (Choice& c : far) c.e_o *= 3;
  other.erase(other.begin() + 1);
  const auto groups = group_layers({pareto(nine_pairs()), far, near, other}, 0.2);
  EXPECT_EQ(groups, (std::vector<std::vector<Index>>{{0, 2}, {1}, {3}}));
}

TEST(Search, TheFrontIsThatOfAllCombinations) {
  const std::vector<std::vector<Choice>> layers{
      {choice(2, 2, .9), choice(4, 2, .5), choice(4, 4, .1)},
      {choice(2, 2, .2), choice(4, 4, .15)},
      {choice(2, 2, .2), choice(4, 4, .15)},
  };
  const std::vector<std::vector<Index>> groups{{0}, {1, 2}};
  const auto found = front(layers, groups);
  // By hand: (bits summed, error) of all six: (12, 1.3) (14, .9) (16, .5) (20, 1.2) (22, .8) (24, .4).
  ASSERT_EQ(found.size(), 4u);
  EXPECT_NEAR(found[2].error, .5, 1e-12);
  EXPECT_NEAR(found[2].mean_bits, 16.0 / 6, 1e-12);
  EXPECT_EQ(kvpare::print_setting(found[2].bits), "4/4 2/2 2/2");
  EXPECT_NEAR(found[3].error, .4, 1e-12);
  EXPECT_EQ(&choose(found, 3), &found[2]);
  EXPECT_THROW(choose(found, 1), kvpare::InvalidArgument);
}

TEST(Search, MeanBitsOfTheSpecification) {
  kvpare::LayerBits bits;
  ASSERT_TRUE(kvpare::parse_setting("4/4 4/2 4/2", bits));
  EXPECT_NEAR(bits.mean(), 3.3333333, 1e-6);
  ASSERT_TRUE(kvpare::parse_setting("2/2 4/2 4/2", bits));
  EXPECT_NEAR(bits.mean(), 2.6666667, 1e-6);
}

TEST(Search, TheResultIsAPolicyThatTheRuntimeReads) {
  const auto surviving = std::vector{pareto(nine_pairs()), pareto(nine_pairs())};
  const auto all = front(surviving, {{0}, {1}});
  std::stringstream file;
  write_result(file, choose(all, 4), all, kvpare::TunedMode::kivi, {{0}, {1}});
  const kvpare::AnyCompressor read = kvpare::read_compressor(file);
  const kvpare::Precision precision = kvpare::precision_of(read, 2);
  ASSERT_EQ(precision.layers.size(), 2u);
  EXPECT_EQ(precision.layers[0], kvpare::Kivi::form(4, 4, 32));
}

TEST(Search, MoreBitsNeverSurviveWithMoreError) {
  const std::vector<std::vector<HeadData>> layers{{normal_data(96, 32, 2, 8, 0, 3), normal_data(96, 32, 2, 8, 1, 4)},
                                                  {normal_data(96, 32, 2, 8, 2, 5)}};
  for (const auto mode : {kvpare::TunedMode::kivi, kvpare::TunedMode::token}) {
    const auto all = sensitivities(layers, mode, {8, 4, 2}, 32, 32);
    for (const auto& choices : all) {
      ASSERT_EQ(choices.size(), 9u);
      const auto left = pareto(choices);
      EXPECT_EQ(left.back().bits, (kvpare::LayerBits::Pair{8, 8}));
      EXPECT_LT(left.back().e_o, 0.1);
      for (std::size_t i = 1; i < left.size(); ++i) EXPECT_LT(left[i].e_o, left[i - 1].e_o);
    }
  }
}

TEST(Trial, NothingCodedIsNoDifference) {
  const Trial trial(normal_data(40, 16, 2, 4, 0, 1));
  const Difference d = trial.compare(trial.data().keys, trial.data().values);
  EXPECT_EQ(d.relative, 0);
  EXPECT_EQ(d.e_o, 0);
  EXPECT_NEAR(d.cosine, 1, 1e-6);
  EXPECT_TRUE(std::isinf(d.key_snr));
}

TEST(Trial, ValuesScaledByOneTenthMoreAreOffByATenth) {
  const Trial trial(normal_data(40, 16, 2, 4, 0, 1));
  std::vector<float> values = trial.data().values;
  for (float& v : values) v *= 1.1f;
  const Difference d = trial.compare(trial.data().keys, values);
  EXPECT_NEAR(d.relative, 0.1, 1e-5);
  EXPECT_NEAR(d.e_o, 0.1, 1e-4);
  EXPECT_NEAR(d.value_snr, 20, 1e-3);
  EXPECT_NEAR(d.cosine, 1, 1e-6);
  EXPECT_EQ(d.e_a, 0);
}

TEST(Trial, OutlierChannelsAreWhereTheyShouldBe) {
  const HeadData head = normal_data(200, 128, 1, 1, 4, 9);
  int large = 0;
  for (Index c = 0; c < 128; ++c) {
    double square = 0;
    for (Index t = 0; t < 200; ++t) {
      const double k = static_cast<double>(head.keys[static_cast<std::size_t>(t * 128 + c)]);
      square += k * k / 200;
    }
    large += square > 100;
  }
  EXPECT_EQ(large, 4);
}

TEST(Codecs, EveryOneIsNearWhatItCodes) {
  const HeadData head = normal_data(128, 128, 1, 64, 0, 2);  // rows enough for balancers to find all channels alike
  for (const CodecEntry& codec : known_codecs(32)) {
    ASSERT_TRUE(codec.fits({64, 128})) << codec.name;
    const auto coded = codec.round_trip(head.keys, 128, 64, head.facts(kvpare::Side::keys));
    const Trial trial(head);
    const double snr = trial.compare(coded, head.values).key_snr;
    EXPECT_GT(snr, 2) << codec.name;                        // one bit at least
    EXPECT_LT(snr, 6.1 * codec.bits({64, 128}) + 6) << codec.name;  // and no more than its bits allow
  }
  EXPECT_THROW(find_codec("int5000", 32), kvpare::InvalidArgument);
}

TEST(Codecs, FormsOfTwo) {
  const HeadData head = normal_data(1024, 128, 1, 64, 0, 2);  // more tokens than a dictionary made of them has atoms
  const std::vector<FormEntry> forms = known_forms(32);
  ASSERT_GT(forms.size(), known_codecs(32).size() + 20);
  const Trial trial(head);
  for (std::size_t f = known_codecs(32).size(); f < forms.size(); ++f) {
    const FormEntry& form = forms[f];
    SCOPED_TRACE(form.name());
    ASSERT_TRUE(form.fits({64, 128}, {64, 128}));
    const Difference d =
        trial.compare(form.keys.round_trip(head.keys, 128, 64, head.facts(kvpare::Side::keys)),
                      form.values.round_trip(head.values, 128, 64, head.facts(kvpare::Side::values)));
    EXPECT_GT(d.key_snr, 0.4);  // a few atoms, and channels that are gone, are worth little on noise
    EXPECT_GT(d.value_snr, 0.4);
    EXPECT_LT(d.value_snr, 6.1 * form.values.bits({64, 128}) + 7);
  }
}

/// Two layers of one head: in the first all keys are alike, in the second every row looks at the first token.
example::Trace trace_of_two_layers(Index tokens) {
  example::Trace trace;
  for (Index t = 0; t < tokens; ++t) trace.positions.push_back(static_cast<kvpare::Position>(t));
  std::vector<float> ones(static_cast<std::size_t>(tokens * 4), 1.0f), first(ones.size(), 0.0f);
  first[0] = 100;
  for (const auto& keys : {ones, first})
    trace.append(static_cast<Index>(trace.layers.size()), kvpare::ConstTensor(ones.data(), tokens, 1, 4),
                 kvpare::ConstTensor(keys.data(), tokens, 1, 4), kvpare::ConstTensor(ones.data(), tokens, 1, 4));
  return trace;
}

/// Two layers of two heads of 16 channels, keys turned by RoPE.
example::Trace normal_trace(Index tokens, std::uint64_t seed) {
  example::Trace trace;
  trace.metadata = {{"rope_theta", "10000"}, {"rope_pairing", "halves"}};
  for (Index t = 0; t < tokens; ++t) trace.positions.push_back(static_cast<kvpare::Position>(t));
  for (Index l = 0; l < 2; ++l) {
    const HeadData rows = normal_data(tokens, 32, 1, 1, l, seed + static_cast<std::uint64_t>(l));
    const kvpare::ConstTensor keys(rows.keys.data(), tokens, 2, 16), values(rows.values.data(), tokens, 2, 16);
    trace.append(l, keys, keys, values);
  }
  return trace;
}

TEST(Learn, RangesAndCodebooksOfEveryHead) {
  using Keys = kvpare::KvQuantKeys<3>;
  const std::vector<example::Trace> traces = {normal_trace(300, 1), normal_trace(200, 5)};
  const Learnt learnt = learn_states("kv_quant(bits=3)", traces, {});
  ASSERT_EQ(learnt.states.layers.size(), 2u);
  EXPECT_EQ(learnt.states.form, kvpare::Form(Keys::name, kvpare::KvQuantValues<3>::name));
  const Index floats = kvpare::state_floats<Keys>(16);
  for (std::size_t l = 0; l < 2; ++l) {
    const std::vector<float>& keys = learnt.states.layers[l].keys;
    ASSERT_EQ(std::ssize(keys), 2 * floats);
    EXPECT_NE(std::memcmp(keys.data(), keys.data() + floats, static_cast<std::size_t>(floats) * 4), 0) << "one per head";
    const float range = keys[static_cast<std::size_t>(Keys::own_state_floats(16) + 3)];
    EXPECT_GT(range, 1.5f) << "of 499 normal numbers all but one percent";
    EXPECT_LT(range, 4.5f);
    EXPECT_GT(learnt.key_snr[l], 10);
    EXPECT_GT(learnt.value_snr[l], 10);
    EXPECT_LT(learnt.value_snr[l], 25);
  }
  EXPECT_NE(learnt.states.layers[0], learnt.states.layers[1]);
  // More prompts are more rows: the states are those of all together.
  EXPECT_NE(learn_states("kv_quant(bits=3)", {traces[0]}, {}).states, learnt.states);
}

TEST(Learn, AtomsThatLayersShare) {
  using Keys = kvpare::Unrotated<kvpare::CsrKeys<4, 1024>>;
  const Learnt learnt = learn_states("csr(nonzeros=4, dictionary=n1024)", {normal_trace(40, 1)}, {.share = 2, .rounds = 3});
  ASSERT_EQ(learnt.states.layers.size(), 2u);
  EXPECT_EQ(learnt.states.layers[0], learnt.states.layers[1]);
  const std::vector<float>& keys = learnt.states.layers[0].keys;
  ASSERT_EQ(std::ssize(keys), kvpare::state_floats<Keys>(16));
  const kvpare::Rotation rotation(16, keys.data());
  EXPECT_EQ(rotation.pairs, 8);
  const kvpare::Dictionary d = Keys::Inner::dictionary(16, Keys::inner_state(16, keys.data()));
  for (Index n : {0, 5, 159}) {  // 160 vectors, each an atom
    double square = 0;
    for (Index c = 0; c < 16; ++c) square += std::pow(static_cast<double>(d.element(d.atom(n), c)), 2);
    EXPECT_NEAR(square, 1, 5e-3) << n;
  }
  const Learnt in_part = learn_states("csr(nonzeros=4, dictionary=n1024_online256)", {normal_trace(40, 1)}, {.share = 2, .rounds = 3});
  EXPECT_EQ(std::ssize(in_part.states.layers[0].keys), 1024 * 16 / 2) << "the rest is made of the prompt";
  EXPECT_EQ(std::memcmp(in_part.states.layers[0].keys.data(), Keys::inner_state(16, keys.data()), 1024 * 16 * 2), 0);
}

TEST(Learn, RefusesWhatItCannotLearn) {
  const std::vector<example::Trace> traces = {normal_trace(40, 1)};
  EXPECT_THROW(learn_states("kv_quant", {}, {}), kvpare::InvalidArgument);
  EXPECT_THROW(learn_states("kivi(bits=4)", traces, {}), kvpare::InvalidArgument) << "nothing to learn";
  EXPECT_THROW(learn_states("think", traces, {}), kvpare::InvalidArgument) << "of queries";
  EXPECT_THROW(learn_states("csr(nonzeros=6, dictionary=n77)", traces, {}), kvpare::InvalidArgument) << "not listed";
  EXPECT_THROW(learn_states("kv_quant", traces, {.share = 2}), kvpare::InvalidArgument) << "every head has its own";
  example::Trace unknown = traces[0];
  unknown.metadata.clear();
  EXPECT_THROW(learn_states("kv_quant", {unknown}, {}), kvpare::InvalidArgument) << "no rope";
  EXPECT_THROW(learn_states("kv_quant", {traces[0], unknown}, {}), kvpare::InvalidArgument) << "two models";
}

TEST(Ratios, LayersThatLookAtFewTokensKeepFew) {
  const auto ratios = layer_ratios(trace_of_two_layers(100), 0.3);
  ASSERT_EQ(ratios.size(), 2u);
  EXPECT_NEAR(ratios[0] + ratios[1], 0.6, 1e-9) << "the mean is what was asked for";
  EXPECT_GT(ratios[0], 0.55);
  EXPECT_LT(ratios[1], 0.05);
}

TEST(Ratios, TheResultIsAPolicyThatTheRuntimeReads) {
  std::stringstream file;
  const auto ratios = kvpare::Ratios::mean_of(std::vector<std::vector<double>>{{0.5, 0.25}, {0.5, 0.75}});
  write_ratios(file, ratios, 0.5, 2);
  const kvpare::AnyCompressor read = kvpare::read_compressor(file);
  const auto* table = std::get_if<kvpare::LayerRatios>(&read.budget.held);
  ASSERT_NE(table, nullptr);
  EXPECT_EQ(table->ratios, ratios);
  EXPECT_EQ(read.keep, kvpare::Keep::ratio(0.5));
}

}  // namespace
}  // namespace tune

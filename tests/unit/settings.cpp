// Methods by name and text settings: what is understood, what is refused and in which words, and that printing is
// exact.
#include <gtest/gtest.h>

#include <kvpare/runtime/make_compressor.hpp>

#include <locale>
#include <set>
#include <sstream>

#include "support/inputs.hpp"

namespace kvpare::test {
namespace {

AnyCompressor made(const std::string& words) { return make_compressor(words); }

void expect_refused(const std::string& words, const std::string& said) {
  const std::string got = error_of([&] { made(words); });
  EXPECT_NE(got.find(said), std::string::npos) << "'" << words << "' gave: " << got;
}

/// `name(key=value, …)` with all settings of a method.
std::string text_of(std::string_view name, const AnyCompressor& method) {
  std::string text(name);
  const char* separator = "(";
  for (const SettingText& s : settings_of(method)) text += separator + s.name + "=" + s.value, separator = ", ";
  return text + ")";
}

template <class S>
const S& scorer_of(const AnyCompressor& m) {
  return std::get<S>(m.scorer.held);
}

// ---- understood

TEST(Settings, ANameAloneIsTheRecipe) {
  for (const Recipe& r : known_recipes()) {
    EXPECT_EQ(made(std::string(r.name)), r.compressor) << r.name;
    EXPECT_EQ(made("  " + std::string(r.name) + " ( ) "), r.compressor) << r.name;
  }
}

TEST(Settings, EveryPartCanBeSet) {
  const auto air =
      made("air_cache(keep=0.25, alpha=0.8, use=strength, least=3, among=image+audio, heads=kv, recent_share=0.5)");
  EXPECT_EQ(scorer_of<EliteWindow>(air).alpha, 0.8);
  EXPECT_EQ(std::get<StrengthSkewness>(air.budget.held), (StrengthSkewness{.use = BudgetUse::strength, .least = 3}));
  EXPECT_EQ(
      air.selector,
      (TopK{.among = ClassSet(TokenClass::image) | TokenClass::audio, .heads = SelectHeads::kv, .recent_share = 0.5}));
  EXPECT_EQ(air.keep, Keep::ratio(0.25));

  const auto csp = made("csp(cross=0.25, n=0, window_share=0.3, window=9, estimate=yes)");
  EXPECT_EQ(scorer_of<CrossSelf>(csp),
            (CrossSelf{.cross = 0.25, .n = 0, .window_share = 0.3, .window = 9, .estimate = true}));
  EXPECT_EQ(scorer_of<LagKv>(made("lag_kv(sinks=0, lag=32, across=yes)")),
            (LagKv{.sinks = 0, .lag = 32, .across = true}));
  EXPECT_EQ(scorer_of<ExpectedAttention>(
                made("expected_attention(sinks=1, window=64, covariance=no, value_norm=no, epsilon=0.01, future=512)")),
            (ExpectedAttention{.sinks = 1,
                               .window = 64,
                               .covariance = false,
                               .value_norm = false,
                               .epsilon = 0.01,
                               .future = 512}));
  EXPECT_EQ(made("cam(merge_into=8, merge_seed=3)").selector,
            (TopK{.recent_share = 0.5, .merge = MergeInto::values, .merge_into = 8, .merge_seed = 3}));
  EXPECT_EQ(made("elastic_cache(merge_keys=unrotated)").selector.merge_keys, MergeKeys::unrotated);
  const auto snap = made("snap_kv( window = 7 ,pool=3,\tpooling=max,rows=text,\n keep = 512t )");
  EXPECT_EQ(scorer_of<ObservationWindow>(snap),
            (ObservationWindow{.window = 7, .pool = 3, .pooling = Pooling::max, .rows = text}));
  EXPECT_EQ(snap.keep, Keep::tokens(512));
  EXPECT_EQ(made("kv_crush(granularity=page, anchor=mean)").selector,
            (TopK{.heads = SelectHeads::layer,
                  .granularity = Granularity::page,
                  .represent = 0.25,
                  .anchor = Anchor::mean}));
  EXPECT_EQ(scorer_of<Random>(made("random(seed=9007199254740992)")).seed, Index{1} << 53);
  EXPECT_EQ(scorer_of<SinksAndRecent>(made("streaming_llm(sinks=0)")).sinks, 0);
}

TEST(Settings, ABudgetBringsItsOwnSettings) {
  EXPECT_EQ(std::get<StrengthSkewness>(made("h2o(least=2, budget=strength_skewness)").budget.held).least, 2);
  EXPECT_EQ(made("air_cache(budget=uniform)").budget, AnyBudget(Uniform{}));
  expect_refused("air_cache(budget=uniform, least=2)", "unknown setting 'least'");
}

TEST(Settings, ABudgetAgreesWithItsScorer) {
  const auto window = [](const char* words) { return std::get<Pyramid>(made(words).budget.held).window; };
  EXPECT_EQ(window("snap_kv(budget=pyramid)"), 32);
  EXPECT_EQ(window("snap_kv(budget=pyramid, window=9)"), 9);
  EXPECT_EQ(window("snap_kv(window=9, budget=pyramid)"), 9);
  EXPECT_EQ(window("h2o(budget=pyramid)"), Pyramid{}.window);
}

TEST(Settings, TheReferenceIsSetInEveryPartThatHasOne) {
  const auto vl = made("vl_cache(mode=reference)");
  EXPECT_EQ(std::get<Density>(vl.budget.held).mode, Mode::reference);
  EXPECT_EQ(vl.selector.mode, Mode::reference);
  EXPECT_EQ(made(text_of("vl_cache", vl)), vl);
  EXPECT_EQ(std::get<Density>(made("vl_cache").budget.held).mode, Mode::paper);
  EXPECT_EQ(std::get<Pyramid>(made("pyramid_kv(mode=reference)").budget.held).mode, Mode::reference);
  EXPECT_EQ(std::get<Prefix>(made("prefix_kv(mode=reference)").budget.held).mode, Mode::reference);
  EXPECT_EQ(std::get<Pyramid>(made("snap_kv(mode=reference, budget=pyramid)").budget.held).mode, Mode::reference);
  for (const char* words :
       {"ada_kv(mode=reference)", "kv_crush(mode=reference)", "h2o(represent=0.25, mode=reference)"})
    EXPECT_EQ(made(words).selector.mode, Mode::reference) << words;
  EXPECT_EQ(scorer_of<CrossSelf>(made("csp(mode=reference)")).mode, Mode::reference);
  EXPECT_EQ(made("snap_kv(mode=paper)"), made("snap_kv"));
  // Where it would change nothing it is refused.
  for (const char* words : {"snap_kv(mode=reference)", "top_v(mode=reference)", "air_cache(mode=reference)",
                            "pyramid_kv(budget=uniform, mode=reference)", "ada_kv(heads=kv, mode=reference)",
                            "kv_crush(represent=0, mode=reference)"})
    expect_refused(words, "mode = reference: with these settings no published code goes another way, must be paper");
  expect_refused("vl_cache(mode=published)", "vl_cache: mode = 'published', must be one of: paper|reference");
  expect_refused("pyramid_kv(schedule=published)", "pyramid_kv: unknown setting 'schedule'");
}

TEST(Settings, AmountsToKeep) {
  const std::pair<const char*, Keep> amounts[] = {
      {"0.1", Keep::ratio(0.1)},     {"10%", Keep::ratio(0.1)},       {"0", Keep::ratio(0)},
      {"1", Keep::ratio(1)},         {"100%", Keep::ratio(1)},        {"512t", Keep::tokens(512)},
      {"0t", Keep::tokens(0)},       {"32p", Keep::pages(32)},        {"4096B", Keep::bytes(4096)},
      {"64KiB", Keep::bytes(65536)}, {"0.5MiB", Keep::bytes(524288)}, {"2GiB", Keep::bytes(Index{2} << 30)},
      {"1e-3", Keep::ratio(0.001)}};
  for (const auto& [words, keep] : amounts) EXPECT_EQ(made(message("snap_kv(keep=", words, ")")).keep, keep) << words;
}

// ---- refused, in words that name what was got and what is wanted

TEST(Settings, APrecisionAloneGoesWithItsMethodAndTakesItsSettings) {
  const auto mikv = made("mikv(keep=0.3, low=int4, recent_share=0.25, block=1)");
  EXPECT_EQ(mikv.keep, Keep::ratio(0.3));
  EXPECT_EQ(mikv.selector.recent_share, 0.25);
  EXPECT_EQ(mikv.scorer, made("h2o").scorer);
  EXPECT_EQ(precision_of(mikv, 3).rest, Form("balanced_int4_p2_min", "int4_p2_min"));
  EXPECT_EQ(precision_of(mikv, 3).block, 1);
  EXPECT_EQ(made("kivi").keep, Keep::ratio(1));
  for (const PrecisionRecipe& p : known_precisions()) EXPECT_EQ(made(std::string(p.name)).precision, p.precision) << p.name;
}

TEST(Settings, APrecisionJoinsAnyMethod) {
  for (const char* words : {"air_cache(keep=0.1) + kivi(bits=4, group=16, residual=64)",
                            "kivi(residual=64,group=16,bits=4)+air_cache( keep=10% )"}) {
    const auto both = made(words);
    EXPECT_EQ(both.keep, Keep::ratio(0.1));
    EXPECT_EQ(both.scorer, made("air_cache").scorer);
    const Precision p = precision_of(both, 2);
    EXPECT_EQ(p.kept, Form("int4_channel_g16_min", "int4_g16_min"));
    EXPECT_EQ(p.flush_keys, 64);
    EXPECT_EQ(p.keep_raw_values, 64);
  }
  const auto form = made("h2o + in_form(form=q8_0/q4_0, only=image+video, sinks=4, first_layers=1, guard=10)");
  const Precision p = precision_of(form, 2);
  EXPECT_EQ(p.kept, Form("q8_0", "q4_0"));
  EXPECT_EQ(p.only, visual);
  EXPECT_EQ(p.guarded, Form("int8"));
}

TEST(Settings, PublishedBitsAreWhatTheyAreCalled) {
  std::string_view list = choices(static_cast<TunedPreset*>(nullptr));
  list.remove_prefix(5);  // none|
  for (int i = 1; !list.empty(); ++i) {
    const std::string name(list.substr(0, list.find('|')));
    list.remove_prefix(std::min(list.size(), name.size() + 1));
    const auto method = made("kvtuner(preset=" + name + ")");
    const Index layers = name.starts_with("qwen25_7b") ? 28 : name.starts_with("qwen25_3b") ? 36 : 32;
    EXPECT_EQ(static_cast<Index>(precision_of(method, layers).layers.size()), layers) << name;
    EXPECT_NE(error_of([&] { precision_of(method, layers + 1); }).find("the model has"), std::string::npos);
    LayerBits bits;
    ASSERT_TRUE(parse_setting(published_bits(static_cast<TunedPreset>(i)).bits, bits));
    const std::string digits = name.substr(name.find_first_of("0123456789", name.find("kivi") != std::string::npos
                                                                                ? name.find("kivi")
                                                                                : name.find("token")));
    std::string mean = digits;
    mean[mean.find('_')] = '.';
    EXPECT_NEAR(bits.mean(), std::stod(mean), 5.1e-4) << name;
  }
}

TEST(Settings, OfTransport) {
  const auto m =
      made("top_v(alpha=2, beta=0.5, gamma=0.25, sigma=3, epsilon=0.2, plan=balanced, rounds=5, squared=yes)");
  EXPECT_EQ(scorer_of<Transport>(m), (Transport{.alpha = 2,
                                                .beta = 0.5,
                                                .gamma = 0.25,
                                                .sigma = 3,
                                                .epsilon = 0.2,
                                                .plan = TransportPlan::balanced,
                                                .rounds = 5,
                                                .squared = true}));
  EXPECT_EQ(m.selector, (TopK{.among = visual, .heads = SelectHeads::layer, .skip_layers = 3, .recover = 4}));
  EXPECT_EQ(made(text_of("top_v", m)), m);
  expect_refused("top_v(epsilon=0)", "top_v: epsilon = 0, must be within [0.0001, 10000]");
  expect_refused("top_v(plan=relaxed)", "top_v: plan = 'relaxed', must be one of: semi_relaxed|balanced");
  expect_refused("top_v(rounds=0)", "top_v: rounds = 0, must be within [1, 1000]");
}

TEST(Settings, OfScorersMadeForAPrecision) {
  const auto recent = made("recent_maximum(rows=3, every=8, keep=0.5)");
  EXPECT_EQ(scorer_of<RecentMaximum>(recent), (RecentMaximum{.rows = 3, .every = 8}));
  EXPECT_EQ(made("recent_maximum").keep, Keep::ratio(1));
  EXPECT_EQ(made(text_of("recent_maximum", recent)), recent);
  EXPECT_EQ(made("recent_maximum(rows=16, every=16)"), made("recent_maximum(every=16, rows=16)"));
  expect_refused("recent_maximum(rows=0)", "recent_maximum: rows = 0, must be within [1, 64]");
  expect_refused("recent_maximum(rows=65)", "recent_maximum: rows = 65, must be within [1, 64]");
  expect_refused("recent_maximum(every=4)", "recent_maximum.every = 4, must be at least rows = 5");
  expect_refused("recent_maximum(rows=17)", "recent_maximum.every = 16, must be at least rows = 17");
  const auto texts = made("cross_modal(keep=0.1)");
  EXPECT_EQ(texts.scorer, AnyScorer(CrossModal{}));
  EXPECT_EQ(texts.selector.among, visual);
  EXPECT_EQ(texts.keep, Keep::ratio(0.1));
  expect_refused("cross_modal(rows=3)", "cross_modal: unknown setting 'rows'");
}

TEST(Settings, OfThink) {
  Precision p = precision_of(made("think"), 4);
  EXPECT_EQ(p.said, "think");
  EXPECT_EQ(p.kept, Form("thin40_as_appended", "as_appended"));
  EXPECT_EQ(p.keep_raw_keys, 32);
  EXPECT_EQ(p.flush_keys, 1);
  const auto method = made("snap_kv(keep=0.3) + think(percent=60, align=8, keys=int4_g32, values=fp8_e4m3, recent=16, flush=4)");
  EXPECT_EQ(method.scorer, made("snap_kv").scorer);
  p = precision_of(method, 4);
  EXPECT_EQ(p.kept, Form("thin60a8_int4_g32", "fp8_e4m3"));
  EXPECT_EQ(p.keep_raw_keys, 16);
  EXPECT_EQ(p.keep_raw_values, 16);
  EXPECT_EQ(p.flush_keys, 4);
  EXPECT_EQ(p.flush_values, 4);
  expect_refused("think(percent=0)", "think: percent = 0, must be within [1, 90]");
  expect_refused("think(percent=91)", "think: percent = 91, must be within [1, 90]");
  expect_refused("think(align=0)", "think: align = 0, must be within [1, 64]");
  expect_refused("think(flush=0)", "think: flush = 0, must be within [1, 1048576]");
  for (const char* name : {"", "a/b", "half half", "int4+int8", "int4:"})
    expect_refused(message("think(keys=", name, ")"), message("think: keys = '", name, "', must be one of: the name of a codec"));
  expect_refused("think(values=)", "think: values = ''");
}

TEST(Settings, OfVidKv) {
  Precision p = precision_of(made("vid_kv"), 4);
  EXPECT_EQ(p.said, "vid_kv");
  EXPECT_EQ(p.kept, Form("vid_kv50_g32", "ternary_channel_g32"));
  EXPECT_TRUE(p.rest.as_appended());
  EXPECT_EQ(p.flush_keys, 128);
  EXPECT_EQ(p.flush_values, 128);
  p = precision_of(made("vid_kv(percent=25, group=0, gamma=50, residual=64, one_bit_decode=literal, ternary_scale=group_mean)"),
                   4);
  EXPECT_EQ(p.kept, Form("vid_kv25_literal", "ternary_channel_mean_gamma50"));
  EXPECT_EQ(p.flush_keys, 64);
  p = precision_of(made("cross_modal(keep=0.2) + vid_kv(protect=yes)"), 4);
  EXPECT_EQ(p.kept, Form("vid_kv50_g32", "int2_channel_g32_min"));
  EXPECT_EQ(p.rest, Form("vid_kv50_g32", "ternary_channel_g32"));
  EXPECT_EQ(p.block, 128);
  for (const char* percent : {"25", "50", "75"})
    EXPECT_EQ(error_of([&] { made(message("vid_kv(percent=", percent, ")")); }), "no error");
  expect_refused("vid_kv(percent=60)", "vid_kv.percent = 60, must be 75, 50 or 25");
  expect_refused("vid_kv(percent=76)", "vid_kv: percent = 76, must be within [25, 75]");
  expect_refused("vid_kv(group=65)", "vid_kv: group = 65, must be within [0, 64]");
  expect_refused("vid_kv(gamma=201)", "vid_kv: gamma = 201, must be within [0, 200]");
  expect_refused("vid_kv(one_bit_decode=paper)", "one_bit_decode = 'paper', must be one of: symmetric|literal");
  expect_refused("vid_kv(ternary_scale=mean)", "ternary_scale = 'mean', must be one of: nonzero_mean|group_mean");
  expect_refused("vid_kv(protect=perhaps)", "vid_kv: protect = 'perhaps'");
}

TEST(Settings, OfQaq) {
  const auto alone = made("qaq(keep=0.5, rows=3, capacity=4, max_bits=8)");
  EXPECT_EQ(scorer_of<RecentMaximum>(alone).rows, 3);
  EXPECT_EQ(alone.keep, Keep::ratio(0.5));
  Precision p = precision_of(alone, 4);
  EXPECT_EQ(p.said, "qaq");
  EXPECT_EQ(p.kept, Form("qaq4_keys", "qaq4_values"));
  EXPECT_EQ(p.numbers, (std::vector<float>{0, 0, 0, 0, 8}));
  EXPECT_EQ(p.keep_raw_keys, 16);
  EXPECT_EQ(p.keep_raw_values, 16);
  EXPECT_FALSE(p.recode);
  EXPECT_TRUE(precision_of(made("qaq(recode=yes)"), 4).recode);
  p = precision_of(made("h2o + qaq(sigma_s=0.25, sigma_x=0.5, query_norm=300, min_bits=1, max_bits=4, "
                        "bits_rule=reference_code, residual=0, sinks=4)"),
                   4);
  EXPECT_EQ(p.kept, Form("qaq3_keys_code", "qaq3_values_code"));
  EXPECT_EQ(p.numbers, (std::vector<float>{0.25f, 0.5f, 300, 1, 4}));
  EXPECT_EQ(p.sinks, 4);
  EXPECT_EQ(p.keep_raw_keys, 0);
  expect_refused("qaq(sigma_s=1)", "qaq: sigma_s = 1, sigma_x = 0, must be given both or neither");
  expect_refused("qaq(sigma_x=1)", "qaq: sigma_s = 0, sigma_x = 1, must be given both or neither");
  expect_refused("qaq(min_bits=5, max_bits=4)", "qaq.min_bits = 5, must be at most max_bits = 4");
  expect_refused("qaq(capacity=5)", "qaq.capacity = 5, must be at most max_bits = 4");
  expect_refused("qaq(min_bits=9)", "qaq: min_bits = 9, must be within [0, 8]");
  expect_refused("qaq(capacity=0)", "qaq: capacity = 0, must be within [1, 8]");
  expect_refused("qaq(capacity=9)", "qaq: capacity = 9, must be within [1, 8]");
  expect_refused("qaq(sigma_s=-1, sigma_x=1)", "qaq: sigma_s = -1, must be within");
  expect_refused("qaq(sigma_s=nan, sigma_x=1)", "qaq: sigma_s = nan, must be within");
  expect_refused("qaq(bits_rule=code)", "qaq: bits_rule = 'code', must be one of: paper|reference_code");
  expect_refused("qaq(every=4)", "recent_maximum.every = 4, must be at least rows = 5");
}

TEST(Settings, OfCsr) {
  Precision p = precision_of(made("csr"), 4);
  EXPECT_EQ(p.said, "csr");
  EXPECT_EQ(p.kept, Form("unrotated_sparse8_n8192", "sparse4_c2_n8192"));
  EXPECT_EQ(p.keep_raw_keys, 0);
  p = precision_of(made("csr(nonzeros=4, dictionary=n1024, before_rope=no, residual=32)"), 4);
  EXPECT_EQ(p.kept, Form("sparse4_n1024", "sparse2_c2_n1024"));
  EXPECT_EQ(p.keep_raw_keys, 32);
  EXPECT_EQ(p.keep_raw_values, 32);
  expect_refused("csr(nonzeros=5)", "csr.nonzeros = 5, must be even: each half of a value has half as many");
  expect_refused("csr(nonzeros=34)", "csr: nonzeros = 34, must be within [2, 32]");
  expect_refused("csr(nonzeros=1)", "csr: nonzeros = 1, must be within [2, 32]");
  expect_refused("csr(dictionary=n/8)", "csr: dictionary = 'n/8'");
}

TEST(Settings, OfKvQuant) {
  Precision p = precision_of(made("kv_quant"), 4);
  EXPECT_EQ(p.said, "kv_quant");
  EXPECT_EQ(p.kept, Form("unrotated_kv_quant_outliers1_nuq3", "outliers1_nuq3_range"));
  EXPECT_EQ(p.sinks, 1);
  p = precision_of(made("h2o + kv_quant(bits=2, before_rope=no, outliers=2, sinks=4, residual=8)"), 4);
  EXPECT_EQ(p.kept, Form("kv_quant_outliers2_nuq2", "outliers2_nuq2_range"));
  EXPECT_EQ(p.sinks, 4);
  EXPECT_EQ(p.keep_raw_values, 8);
  expect_refused("kv_quant(bits=1)", "kv_quant: bits = 1, must be within [2, 4]");
  expect_refused("kv_quant(bits=5)", "kv_quant: bits = 5, must be within [2, 4]");
  expect_refused("kv_quant(outliers=0)", "kv_quant: outliers = 0, must be within [1, 8]");
  expect_refused("kv_quant(before_rope=later)", "kv_quant: before_rope = 'later'");
}

TEST(Settings, NamesOfCodecs) {
  CodecName name;
  for (const char* word : {"half", "int4_g32_min", "a-b.c", "n8192"}) {
    EXPECT_TRUE(parse_setting(word, name)) << word;
    EXPECT_EQ(print_setting(name), word);
  }
  for (const char* word : {"", "a b", "a/b", "a+b", "a(b)", "\xff", "as,appended"}) {
    const CodecName before = name;
    EXPECT_FALSE(parse_setting(word, name)) << word;
    EXPECT_EQ(name, before) << word;
  }
}

TEST(Settings, PrecisionsThatMakeNoSense) {
  expect_refused("kivi(bots=2)", "kivi: unknown setting 'bots'; known: bits group residual sinks");
  expect_refused("kivi + mikv", "kivi and mikv are both precisions");
  expect_refused("h2o + tova", "h2o and tova both evict");
  expect_refused("h2o + kivi + tova", "3 methods");
  expect_refused("h2o + mikv(keep=0.1)", "mikv: unknown setting 'keep'; known: low high block");
  expect_refused("mikv(kep=0.1)", "mikv: unknown setting 'kep'; known: keep budget among");
  expect_refused("h2o + nothing_known", "no policy named 'nothing_known'; known: full random");
  expect_refused("in_form(form=a/b/c)", "in_form: form = 'a/b/c', must be one of: a codec");
  expect_refused("joint(forms=int8+)", "joint: forms = 'int8+'");
  expect_refused("joint(evict=perhaps)", "joint: evict = 'perhaps'");
  expect_refused("joint(trust=1.5)", "joint: trust = 1.5");
  expect_refused("kvtuner(bits=9/4)", "kvtuner: bits = '9/4'");
  EXPECT_NE(error_of([] { precision_of(made("kvtuner"), 4); }).find("give a preset or bits, got none"),
            std::string::npos);
  expect_refused("full(keep=1) + kivi", "full: has no settings");
}

TEST(Settings, PrecisionsPrintWhatTheyParse) {
  for (const char* words : {"in_form(form=int4_g32/fp8_e4m3, residual=7, only=text+image, sinks=2, guard=3.5)", "mikv",
                            "kivi(bits=3)", "zip_cache(high=8, low=4)", "joint(forms=int8+int4/int2, evict=no, trust=0.25)",
                            "kvtuner(bits=8/4 2/2, mode=token)", "kvtuner(preset=qwen25_7b_token_4_0)",
                            "think(percent=60, align=8, keys=int4_g32, values=q8_0)",
                            "vid_kv(percent=75, group=0, gamma=50, one_bit_decode=literal, ternary_scale=group_mean, protect=yes)",
                            "qaq(sigma_s=0.1, sigma_x=0.3, query_norm=300.5, bits_rule=reference_code, capacity=2)",
                            "csr(nonzeros=6, dictionary=n512, before_rope=no)", "kv_quant(bits=4, outliers=2, sinks=0)"}) {
    const auto method = made(words);
    std::string text(method.precision.held_name());
    const char* separator = "(";
    for (const SettingText& s : settings_of(method.precision)) text += separator + s.name + "=" + s.value, separator = ", ";
    EXPECT_EQ(made(text + ")").precision, method.precision) << text;
  }
}

TEST(Settings, AFileIsTextWithComments) {
  std::istringstream in("# found by a search\n\n  kvtuner(mode=token,\n bits=8/4 2/2)\n# the end\n");
  EXPECT_EQ(read_compressor(in), made("kvtuner(mode=token, bits=8/4 2/2)"));
  std::istringstream empty("# nothing\n");
  EXPECT_THROW(read_compressor(empty), InvalidArgument);
}

TEST(Settings, UnknownNames) {
  expect_refused("h20",
                 "no policy named 'h20'; known: full random streaming_llm h2o tova key_norm key_diff snap_kv "
                 "pyramid_kv ada_kv vl_cache prefix_kv elastic_cache recent_maximum cam fixed_point corm kv_crush chunk_kv zip_vl air_cache "
                 "csp lag_kv expected_attention top_v cross_modal pare in_form kivi mikv zip_cache kvtuner think vid_kv qaq csr "
                 "kv_quant joint");
  expect_refused("", "no policy named ''");
  expect_refused("(keep=1)", "no policy named ''");
  expect_refused("air_cache(beta=1)",
                 "air_cache: unknown setting 'beta'; known: keep budget alpha use least layer_floor among heads recent_share");
  expect_refused("air_cache(=1)", "unknown setting ''");
  expect_refused("snap_kv(alpha=0.5)", "unknown setting 'alpha'");
  expect_refused("full(keep=0.5)", "full: has no settings, got 'keep'");
  expect_refused("h2o(budget=cube)", "h2o: budget = 'cube', must be one of: uniform|pyramid|strength_skewness|density|prefix|layer_ratios|as_compressed");
}

TEST(Settings, Ranges) {
  expect_refused("h2o(granularity=block)", "h2o: granularity = 'block', must be one of: token|page");
  expect_refused("chunk_kv(granularity=page)",
                 "top_k.chunk = 10 does not go with granularity = page, must be 1");
  expect_refused("air_cache(alpha=1.5)", "air_cache: alpha = 1.5, must be within [0, 1]");
  expect_refused("air_cache(alpha=-0.1)", "must be within [0, 1]");
  expect_refused("air_cache(alpha=nan)", "must be within [0, 1]");
  expect_refused("air_cache(alpha=inf)", "must be within [0, 1]");
  expect_refused("air_cache(alpha=1e999)", "must be a number within [0, 1]");
  expect_refused("air_cache(alpha=)", "alpha = '', must be a number within [0, 1]");
  expect_refused("air_cache(alpha=0.5x)", "alpha = '0.5x', must be a number within [0, 1]");
  expect_refused("air_cache(least=-1)", "least = -1, must be within [0, 1048576]");
  expect_refused("cam(merge_into=0)", "cam: merge_into = 0, must be within [1, 4096]");
  expect_refused("cam(merge=mean)", "cam: merge = 'mean', must be one of: none|nearest|values");
  expect_refused("elastic_cache(merge_keys=before)", "merge_keys = 'before', must be one of: rotated|unrotated");
  expect_refused("expected_attention(future=-1)", "expected_attention: future = -1, must be within [0, 1048576]");
  expect_refused("snap_kv(window=0)", "snap_kv: window = 0, must be within [1, 1048576]");
  expect_refused("snap_kv(window=1.5)", "window = '1.5', must be a number");
  expect_refused("snap_kv(window=99999999999999999999)", "must be a number within");
  expect_refused("snap_kv(pool=4)", "observation_window.pool = 4, must be odd");
  expect_refused("snap_kv(pooling=median)", "pooling = 'median', must be one of: avg|max");
  expect_refused("air_cache(among=visuals)", "among = 'visuals', must be one of: all, visual, text");
  expect_refused("air_cache(among=image+)", "must be one of");
  expect_refused("random(seed=9007199254740993)", "must be within [0, 9007199254740992]");
}

TEST(Settings, AmountsThatMakeNoSense) {
  for (const char* words : {"", "x", "-1", "-5t", "nan", "10 %", "5tt", "1TiB", "0x10", "1e999"})
    expect_refused(
        message("h2o(keep=", words, ")"),
        message("h2o: keep = '", words, "', must be a ratio (0.1, 10%), tokens (512t), pages (32p) or bytes (8MiB)"));
  for (const char* words : {"1.5", "101%", "inf"})
    expect_refused(message("h2o(keep=", words, ")"), "a ratio must be within [0, 1]");
  for (const char* words : {"1.5t", "1e30B", "infp"})
    expect_refused(message("h2o(keep=", words, ")"), "must be a whole number");
}

TEST(Settings, BudgetsOfTheirOwn) {
  const auto m = made("air_cache(keep=10%, each=image, also=text:50%+system+audio:512t)");
  EXPECT_EQ(m.keep, Keep::ratio(0.1));
  EXPECT_EQ(m.selector.each, Each::image);
  EXPECT_EQ(m.selector.also,
            (ClassKeeps{{text, Keep::ratio(0.5)}, {ClassSet(TokenClass::system) | TokenClass::audio, Keep::tokens(512)}}));
  EXPECT_EQ(print_setting(m.selector.also), "text:0.5+audio+system:512t");
  EXPECT_EQ(made(text_of("air_cache", m)), m);
  EXPECT_EQ(made("key_norm(each=class, also=none)").selector, (TopK{.each = Each::token_class}));
  EXPECT_EQ(made("air_cache(also=text:0)+kivi").selector.also, (ClassKeeps{{text, Keep::ratio(0)}}));
  EXPECT_NE(made("air_cache(also=text:1)"), made("air_cache(also=text:2t)"));
  EXPECT_NE(made("air_cache(also=text:1)"), made("air_cache"));
  expect_refused("air_cache(each=picture)", "air_cache: each = 'picture', must be one of: none|class|image");
  for (const char* words : {"", "text", "text:", ":50%", "text:50%+", "+text:50%", "text:50%+none", "none+text:1", "text:50%:1",
                            "text:50%+words:1", "text:x", "text: 1",
                            "text:1t+text:1t+text:1t+text:1t+text:1t+text:1t+text:1t+text:1t+text:1t"})
    expect_refused(message("air_cache(also=", words, ")"),
                   message("air_cache: also = '", words,
                           "', must be one of: none, or classes and amounts, at most 8: text:50%+system+audio:512t"));
  expect_refused("h2o(also=text:50%)", "top_k.also = text:0.5: text has a budget already, in among = all");
  expect_refused("air_cache(also=text:50%+system+text:1t)", "text+system has a budget already");
  expect_refused("air_cache(also=text:150%)", "keep = 1.5, a ratio must be within [0, 1]");
  expect_refused("air_cache(also=text:1.5t)", "must be a whole number");
}

TEST(Settings, TextThatIsNoList) {
  expect_refused("h2o(keep=1", "h2o: settings must end with ')', got 'h2o(keep=1'");
  expect_refused("h2o(", "settings must end with ')'");
  expect_refused("h2o()x", "settings must end with ')'");
  expect_refused("h2o(keep)", "h2o: 'keep' is no setting, must be key=value");
  expect_refused("h2o(,)", "'' is no setting");
  expect_refused("h2o(keep=1,)", "'' is no setting");
  expect_refused("h2o(keep=1,,heads=kv)", "'' is no setting");
  expect_refused("h2o(keep=1, keep=0.5)", "h2o: keep is set twice");
  expect_refused("h2o(budget=uniform, budget=uniform)", "budget is set twice");
  expect_refused(std::string("h2o\0", 4), "no policy named");
}

// ---- settings made in code are checked as well, before any work

TEST(Settings, OfParts) {
  const auto refused = [](const auto& method) { return error_of([&] { check(method); }); };
  EXPECT_EQ(refused(air_cache()), "no error");
  EXPECT_EQ(refused(Compressor{EliteWindow{.alpha = 2}, Uniform{}}), "elite_window.alpha = 2, must be within [0, 1]");
  EXPECT_EQ(refused(Compressor{ObservationWindow{.window = 0}, Uniform{}}),
            "observation_window.window = 0, must be within [1, 1048576]");
  EXPECT_EQ(refused(Compressor{ObservationWindow{.pool = 2}, Uniform{}}), "observation_window.pool = 2, must be odd");
  EXPECT_EQ(refused(Compressor{Random{}, StrengthSkewness{.least = -1}}),
            "strength_skewness.least = -1, must be within [0, 1048576]");
  EXPECT_EQ(refused(Compressor{Random{}, Uniform{}, TopK{.recent_share = 1.5}}),
            "top_k.recent_share = 1.5, must be within [0, 1]");
  EXPECT_EQ(refused(AnyCompressor{EliteWindow{.alpha = -1}, Uniform{}, {}, {}}),
            "elite_window.alpha = -1, must be within [0, 1]");
}

// ---- printed

TEST(Settings, PrintWhatTheyParse) {
  Dice dice{1};
  const char* scorers[] = {"random", "streaming_llm", "h2o", "snap_kv", "air_cache"};
  for (int round = 0; round < 1000; ++round) {
    const std::string name = scorers[dice.below(5)];
    AnyCompressor m = made(name);
    if (dice.chance(0.5))
      m.budget = StrengthSkewness{.use = static_cast<BudgetUse>(dice.below(3)), .least = dice.below(1 << 20)};
    const ClassSet sets[] = {all_tokens, visual, text, ClassSet(TokenClass::audio) | TokenClass::system,
                             ClassSet(TokenClass::image)};
    m.selector = {.among = sets[dice.below(5)],
                  .heads = static_cast<SelectHeads>(dice.below(2)),
                  .recent_share = dice.unit() / 3,
                  .each = static_cast<Each>(dice.below(3))};
    const Keep amounts[] = {Keep::ratio(dice.unit() / 7), Keep::ratio(1e-300 * dice.unit()),
                            Keep::tokens(dice.below(Index{1} << 53)), Keep::pages(dice.below(1 << 20)),
                            Keep::bytes(dice.below(Index{1} << 50))};
    m.keep = amounts[dice.below(5)];
    if (m.selector.among == visual && dice.chance(0.5)) m.selector.also = {{text, amounts[dice.below(5)]}};
    if (m.selector.among == visual && dice.chance(0.3))
      m.selector.also = {{sets[3], amounts[dice.below(5)]}, {text, amounts[dice.below(5)]}};
    if (auto* s = std::get_if<EliteWindow>(&m.scorer.held)) s->alpha = dice.unit() / 3;
    if (auto* s = std::get_if<Random>(&m.scorer.held)) s->seed = dice.below(Index{1} << 53);
    if (auto* s = std::get_if<SinksAndRecent>(&m.scorer.held)) s->sinks = dice.below(1 << 20);
    if (auto* s = std::get_if<ObservationWindow>(&m.scorer.held))
      *s = {.window = 1 + dice.below(1 << 20),
            .pool = 1 + 2 * dice.below(31),
            .pooling = static_cast<Pooling>(dice.below(2)),
            .rows = sets[dice.below(5)]};
    const std::string text = text_of(name, m);
    ASSERT_EQ(error_of([&] { made(text); }), "no error") << text;
    EXPECT_EQ(made(text), m) << text;
  }
}

TEST(Settings, PrintTheSameInEveryLocale) {
  struct Commas : std::numpunct<char> {
    char do_decimal_point() const override { return ','; }
    char do_thousands_sep() const override { return '.'; }
    std::string do_grouping() const override { return "\3"; }
  };
  const std::locale before = std::locale::global(std::locale(std::locale::classic(), new Commas));
  const AnyCompressor m = made("snap_kv(window=123456, recent_share=0.25, keep=1234567t)");
  const std::string text = text_of("snap_kv", m);
  const std::string said = error_of([] { made("snap_kv(window=9999999)"); });
  std::locale::global(before);
  EXPECT_NE(text.find("keep=1234567t"), std::string::npos) << text;
  EXPECT_NE(text.find("recent_share=0.25"), std::string::npos) << text;
  EXPECT_NE(said.find("[1, 1048576]"), std::string::npos) << said;
}

TEST(Settings, SayWhatIsAllowedAndMeant) {
  for (const Recipe& r : known_recipes()) {
    std::set<std::string> names;
    for (const SettingText& s : settings_of(r.compressor)) {
      EXPECT_TRUE(names.insert(s.name).second) << r.name << ": two settings named " << s.name;
      EXPECT_FALSE(s.allowed.empty()) << s.name;
      EXPECT_FALSE(s.help.empty()) << s.name;
      EXPECT_FALSE(s.value.empty()) << s.name;
    }
    EXPECT_EQ(settings_of(r.compressor).front().name, "keep");
    EXPECT_FALSE(r.summary.empty());
  }
}

// ---- hostile text

TEST(Settings, RandomTextIsUnderstoodOrRefusedAndNothingElse) {
  Dice dice{2};
  const std::string pieces[] = {"air_cache",
                                "snap_kv",
                                "h2o",
                                "random",
                                "full",
                                "streaming_llm",
                                "(",
                                ")",
                                "=",
                                ",",
                                " ",
                                "keep",
                                "alpha",
                                "budget",
                                "among",
                                "seed",
                                "pool",
                                "window",
                                "heads",
                                "use",
                                "least",
                                "visual",
                                "kv",
                                "layer",
                                "uniform",
                                "strength_skewness",
                                "+",
                                "%",
                                "t",
                                "p",
                                "B",
                                "MiB",
                                "0",
                                "1",
                                "0.1",
                                "-",
                                "1e308",
                                "1e-320",
                                "nan",
                                "inf",
                                "\0",
                                "\xff",
                                "9223372036854775808",
                                "(((",
                                "))",
                                "recent_share",
                                "\n",
                                "0x1p3",
                                "18446744073709551616"};
  Index understood = 0;
  for (int round = 0; round < 30000; ++round) {
    std::string text;
    if (round % 4 == 0) {  // any bytes
      for (Index i = dice.below(40); i > 0; --i) text += static_cast<char>(dice.below(256));
    } else if (round % 4 == 1) {  // a good text, damaged
      text = text_of("snap_kv", known_recipes()[4].compressor);
      for (Index i = dice.below(4); i > 0; --i)
        text[static_cast<std::size_t>(dice.below(static_cast<Index>(text.size())))] =
            static_cast<char>(dice.below(256));
    } else {  // our words in any order
      for (Index i = dice.below(16); i > 0; --i) text += pieces[dice.below(std::size(pieces))];
    }
    try {
      const AnyCompressor m = make_compressor(text);
      check(m);
      ++understood;
    } catch (const InvalidArgument& e) {
      ASSERT_FALSE(std::string(e.what()).empty());
    }
  }
  EXPECT_GT(understood, 300) << "some of it must be understood, or this tests nothing";
}

}  // namespace
}  // namespace kvpare::test

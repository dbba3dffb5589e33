// Recipes are what their papers say, as parts put together; and a choice made at run time is the same method.
#include <gtest/gtest.h>

#include <kvpare/runtime/make_compressor.hpp>
#include <type_traits>

#include "support/prompt.hpp"

namespace kvpare::test {
namespace {

TEST(Recipes, AreTheirParts) {
  EXPECT_EQ(air_cache(), (Compressor{EliteWindow{.alpha = 0.9}, StrengthSkewness{.use = BudgetUse::both, .least = 1},
                                     TopK{.among = visual, .heads = SelectHeads::layer}, Keep::ratio(0.1)}));
  EXPECT_EQ(snap_kv(), (Compressor{ObservationWindow{.window = 32, .pool = 5, .pooling = Pooling::avg}, Uniform{},
                                   TopK{}, Keep::ratio(0.2)}));
  EXPECT_EQ(h2o(), (Compressor{AccumulatedAttention{}, Uniform{}, TopK{.recent_share = 0.5}, Keep::ratio(0.2)}));
  EXPECT_EQ(cam(), (Compressor{AccumulatedAttention{}, Uniform{},
                               TopK{.recent_share = 0.5, .merge = MergeInto::values, .merge_into = 32, .merge_seed = 0},
                               Keep::ratio(0.2)}));
  EXPECT_EQ(streaming_llm(), (Compressor{SinksAndRecent{.sinks = 4}, Uniform{}, TopK{}, Keep::ratio(0.2)}));
  EXPECT_EQ(csp(), (Compressor{CrossSelf{.cross = 0.5, .n = 1, .window_share = 0.1, .window = 0}, Uniform{},
                               TopK{.recent_share = 0.5}, Keep::ratio(0.2)}));
  EXPECT_EQ(lag_kv(),
            (Compressor{LagKv{.sinks = 4, .lag = 128, .across = false}, Uniform{}, TopK{}, Keep::ratio(0.2)}));
  EXPECT_EQ(
      expected_attention(),
      (Compressor{ExpectedAttention{.sinks = 4, .window = 0, .covariance = true, .value_norm = true, .epsilon = 0, .future = 0},
                  Uniform{}, TopK{}, Keep::ratio(0.2)}));
  EXPECT_EQ(top_v(), (Compressor{Transport{.alpha = 1, .beta = 1, .gamma = 0.5, .sigma = 10, .epsilon = 0.1}, Uniform{},
                                 TopK{.among = visual, .heads = SelectHeads::layer, .skip_layers = 3, .recover = 4},
                                 Keep::ratio(0.5)}));
  EXPECT_EQ(recent_maximum(), (Compressor{RecentMaximum{.rows = 5, .every = 16}, Uniform{}, TopK{}, Keep::ratio(1)}));
  EXPECT_EQ(cross_modal(), (Compressor{CrossModal{}, Uniform{}, TopK{.among = visual}, Keep::ratio(0.2)}));
  EXPECT_EQ(pare(),
            (Compressor{ObservationWindow{.window = 32, .pool = 3, .pooling = Pooling::max, .rows = text, .values = 1},
                        StrengthSkewness{.use = BudgetUse::both, .layer_floor = 0.5},
                        TopK{.heads = SelectHeads::shared, .floor = 0}, Keep::ratio(0.2)}));
  EXPECT_EQ(make_compressor(), make_compressor("pare"));
  EXPECT_EQ(full().keep, Keep::ratio(1));
}

TEST(Recipes, ReadWhatTheyNeedAndNoMore) {
  EXPECT_EQ(EliteWindow{}.reads(), (Reads{.rows = Reads::Rows::all, .of = ClassSet(~visual.bits)}))
      << "every text row: elite ones may be anywhere";
  EXPECT_EQ(ObservationWindow{.window = 7}.reads(), (Reads{.rows = Reads::Rows::last, .count = 7}));
  EXPECT_EQ(AccumulatedAttention{}.reads(), (Reads{.rows = Reads::Rows::all, .streams = true, .attention = true}));
  EXPECT_EQ(CrossSelf{}.reads(), (Reads{.rows = Reads::Rows::all}))
      << "a share of the rows: of how many is known at the end";
  EXPECT_EQ(CrossSelf{.window = 9}.reads(), (Reads{.rows = Reads::Rows::last, .count = 9}));
  EXPECT_EQ(ExpectedAttention{}.reads(), (Reads{.rows = Reads::Rows::all}));
  EXPECT_EQ(ExpectedAttention{.window = 9}.reads(), (Reads{.rows = Reads::Rows::last, .count = 9}));
  EXPECT_EQ(LagKv{}.reads(), Reads{});
  EXPECT_EQ(Transport{}.reads(), Reads{.features = true});
  EXPECT_FALSE(Transport{}.reads().cache_only());
  EXPECT_EQ(CrossModal{}.reads(), (Reads{.features = true, .texts = true}));
  EXPECT_FALSE(CrossModal{}.reads().cache_only());
  EXPECT_EQ(RecentMaximum{}.reads(), (Reads{.rows = Reads::Rows::all, .streams = true, .attention = true}));
  EXPECT_TRUE(Random{}.reads().cache_only());
  EXPECT_EQ(Random{}.reads(), Reads{});
  EXPECT_EQ(SinksAndRecent{}.reads(), Reads{});
}

// Policies are plain values: no allocation hides in them, and two of the same settings are the same.
static_assert(std::is_trivially_copyable_v<EliteWindow> && std::is_trivially_copyable_v<ObservationWindow> &&
              std::is_trivially_copyable_v<StrengthSkewness> && std::is_trivially_copyable_v<TopK> &&
              std::is_trivially_copyable_v<Keep>);
static_assert(Scorer<EliteWindow, cpu::Backend> && Scorer<ObservationWindow, cpu::Backend> &&
              Scorer<AccumulatedAttention, cpu::Backend> && Scorer<Random, cpu::Backend> &&
              Scorer<SinksAndRecent, cpu::Backend> && Scorer<CrossSelf, cpu::Backend> && Scorer<LagKv, cpu::Backend> &&
              Scorer<ExpectedAttention, cpu::Backend> && Scorer<RecentMaximum, cpu::Backend> &&
              Scorer<CrossModal, cpu::Backend> && Scorer<AnyScorer, cpu::Backend>);
static_assert(TakesSteps<RecentMaximum, cpu::Backend> && TakesSteps<RecentMaximum, WalledBackend> &&
              !TakesSteps<CrossModal, cpu::Backend>);
static_assert(Scorer<EliteWindow, WalledBackend> && Scorer<ObservationWindow, WalledBackend> &&
              Scorer<AccumulatedAttention, WalledBackend> && Scorer<Random, WalledBackend> &&
              Scorer<SinksAndRecent, WalledBackend> && Scorer<CrossSelf, WalledBackend> &&
              Scorer<LagKv, WalledBackend> && Scorer<ExpectedAttention, WalledBackend> &&
              Scorer<RecentMaximum, WalledBackend> && Scorer<CrossModal, WalledBackend> &&
              Scorer<AnyScorer, WalledBackend>);

template <class Rig>
class RecipesByName : public OnRig<Rig> {};
TYPED_TEST_SUITE(RecipesByName, PipelineRigs, RigNames);

template <Backend B, class M>
auto kept_with(B& be, const Prompt& p, const M& method) {
  FedCache<B> fed(be, p);
  fed.feed(method, 0, p.tokens(), 40);
  const auto report = fed.cache.compress(fed.id, method);
  std::vector<std::vector<Position>> kept;
  for (Index l = 0; l < p.layers(); ++l)
    for (Index h = 0; h < p.shape(l).kv_heads; ++h) kept.push_back(fed.cache.kept(fed.id, l, h));
  return std::pair{kept, report.layer_budgets};
}

TYPED_TEST(RecipesByName, AreTheSameMethods) {
  const Prompt p = random_prompt(1, 2, 100, 2, 2, {{.begin = 5, .end = 70, .token_class = TokenClass::image}});
  EXPECT_EQ(kept_with(this->be(), p, make_compressor("full")), kept_with(this->be(), p, full()));
  EXPECT_EQ(kept_with(this->be(), p, make_compressor("random")), kept_with(this->be(), p, random_choice()));
  EXPECT_EQ(kept_with(this->be(), p, make_compressor("streaming_llm")), kept_with(this->be(), p, streaming_llm()));
  EXPECT_EQ(kept_with(this->be(), p, make_compressor("h2o")), kept_with(this->be(), p, h2o()));
  EXPECT_EQ(kept_with(this->be(), p, make_compressor("snap_kv")), kept_with(this->be(), p, snap_kv()));
  EXPECT_EQ(kept_with(this->be(), p, make_compressor("air_cache")), kept_with(this->be(), p, air_cache()));
  EXPECT_EQ(kept_with(this->be(), p, make_compressor("lag_kv")), kept_with(this->be(), p, lag_kv()));
  EXPECT_EQ(kept_with(this->be(), p, make_compressor("expected_attention")),
            kept_with(this->be(), p, expected_attention()));
  EXPECT_EQ(kept_with(this->be(), p, make_compressor("pare")), kept_with(this->be(), p, pare()));
  EXPECT_EQ(kept_with(this->be(), p, make_compressor("csp")), kept_with(this->be(), p, csp()));
  auto recent = recent_maximum();
  recent.keep = Keep::ratio(0.3);
  EXPECT_EQ(kept_with(this->be(), p, make_compressor("recent_maximum(keep=0.3)")), kept_with(this->be(), p, recent));
}

TYPED_TEST(RecipesByName, SettingsChangeWhatIsKept) {
  Prompt p = random_prompt(2, 2, 100, 2, 2, {{.begin = 5, .end = 70, .token_class = TokenClass::image}});
  for (LayerShape& layer : p.model.layers) layer.rope = rope_of_base(layer.key_dim);
  const auto kept = [&](const char* words) { return kept_with(this->be(), p, make_compressor(words)).first; };
  for (const auto& [one, other] : {std::pair{"random", "random(seed=1)"},
                                   {"streaming_llm", "streaming_llm(sinks=1)"},
                                   {"h2o", "h2o(recent_share=0)"},
                                   {"snap_kv(window=4)", "snap_kv(window=5)"},
                                   {"snap_kv(window=4)", "snap_kv(window=4,pool=1)"},
                                   {"snap_kv(window=4)", "snap_kv(window=4,pooling=max)"},
                                   {"snap_kv(window=4)", "snap_kv(window=4,heads=layer)"},
                                   {"snap_kv(window=4)", "snap_kv(window=4,values=2)"},
                                   {"pare(among=visual)", "pare(among=visual,layer_floor=0)"},
                                   {"snap_kv(window=4)", "snap_kv(window=4,among=visual)"},
                                   {"snap_kv(window=40)", "snap_kv(window=40,rows=image)"},
                                   {"snap_kv(window=4)", "snap_kv(window=4,granularity=page)"},
                                   {"h2o(keep=0.7)", "h2o(keep=0.7,granularity=page)"},
                                   {"kv_crush(window=4,keep=0.6,represent=0,granularity=page)",
                                    "kv_crush(window=4,keep=0.6,represent=0.7,granularity=page)"},
                                   {"csp", "csp(cross=0)"},
                                   {"csp", "csp(cross=1)"},
                                   {"csp", "csp(n=1000)"},
                                   {"csp", "csp(window_share=0.5)"},
                                   {"csp", "csp(window=3)"},
                                   {"csp(window=40)", "csp(window=40,estimate=yes)"},
                                   {"lag_kv", "lag_kv(sinks=1)"},
                                   {"lag_kv(keep=0.6)", "lag_kv(keep=0.6,lag=8)"},
                                   {"lag_kv(keep=0.6,lag=8)", "lag_kv(keep=0.6,lag=8,across=yes)"},
                                   {"expected_attention(sinks=0)", "expected_attention(sinks=9)"},
                                   {"expected_attention", "expected_attention(window=5)"},
                                   {"expected_attention", "expected_attention(covariance=no)"},
                                   {"expected_attention", "expected_attention(value_norm=no)"},
                                   {"expected_attention", "expected_attention(epsilon=1)"},
                                   {"expected_attention", "expected_attention(future=512)"},
                                   {"expected_attention(future=512)", "expected_attention(future=8)"},
                                   {"recent_maximum(keep=0.3)", "recent_maximum(keep=0.3,rows=2)"},
                                   {"air_cache", "air_cache(alpha=0.1)"},
                                   {"air_cache", "air_cache(heads=kv)"},
                                   {"air_cache", "air_cache(budget=uniform)"},
                                   {"air_cache", "air_cache(keep=20%)"}})
    EXPECT_NE(kept(one), kept(other)) << one << " and " << other;
}

}  // namespace
}  // namespace kvpare::test

// Scorers, budgets and whole recipes against the papers' textbook versions, on the CPU and behind the wall.
#include <gtest/gtest.h>

#include <functional>
#include <kvpare/pipeline/recipes.hpp>
#include <numeric>

#include "oracle/accumulated_attention.hpp"
#include "oracle/ada_kv.hpp"
#include "oracle/attention_mass.hpp"
#include "oracle/csp.hpp"
#include "oracle/elite_window.hpp"
#include "oracle/expected_attention.hpp"
#include "oracle/key_diff.hpp"
#include "oracle/key_norm.hpp"
#include "oracle/lag_kv.hpp"
#include "oracle/last_row.hpp"
#include "oracle/observation_window.hpp"
#include "oracle/pyramid.hpp"
#include "oracle/streaming.hpp"
#include "oracle/strength_skewness.hpp"
#include "support/prompt_cases.hpp"
#include "support/scripted_scorer.hpp"
#include "support/tolerance.hpp"

namespace kvpare::test {
namespace {

using test::settings_of;
oracle::ObservationWindowSettings settings_of(const ObservationWindow& w) {
  return {.window = w.window,
          .kernel = w.pool,
          .pooling = w.pooling == Pooling::avg ? oracle::Pooling::average : oracle::Pooling::max};
}

std::vector<oracle::TokenKind> kinds_of(const Prompt& p) {
  std::vector<oracle::TokenKind> kinds;
  for (const TokenClass c : p.classes())
    kinds.push_back(visual.has(c) ? oracle::TokenKind::visual : oracle::TokenKind::text);
  return kinds;
}

Positions text_rows(const Prompt& p) {
  Positions rows;
  const auto kinds = kinds_of(p);
  for (std::size_t t = 0; t < kinds.size(); ++t)
    if (kinds[t] == oracle::TokenKind::text) rows.push_back(static_cast<Position>(t));
  return rows;
}

// ---- scores

template <class Rig>
class Policies : public OnRig<Rig> {};
TYPED_TEST_SUITE(Policies, PipelineRigs, RigNames);

TYPED_TEST(Policies, EliteWindowScores) {
  for (const Case& c : cases())
    for (const double alpha : {0.0, 0.5, 0.9, 1.0})
      for (const bool modern : {false, true}) {
        Prompt p = random_prompt(7, 2, c.tokens, c.kv_heads, c.group, c.tags);
        if (modern) p.model.layers[1].softcap = 3, p.model.layers[1].window = 30;
        FedCache<typename TestFixture::B> fed(this->be(), p, c.page_tokens);
        fed.append(0, c.tokens);
        for (const Index layer : {0, 1}) {
          const LayerShape& shape = p.shape(layer);
          const auto at = static_cast<std::size_t>(layer);
          const auto wanted =
              oracle::elite_window(p.queries[at], p.keys[at], kinds_of(p), static_cast<double>(shape.scale),
                                   {.alpha = alpha, .window = shape.window}, static_cast<double>(shape.softcap));
          const auto per_head = oracle::mean_per_kv_head(wanted.importance, c.kv_heads);
          const auto got = fed.scores(layer, EliteWindow{.alpha = alpha}, visual, text_rows(p));
          for (Index h = 0; h < c.kv_heads; ++h)
            for (std::size_t i = 0; i < wanted.visual.size(); ++i)
              ASSERT_TRUE(close(got[static_cast<std::size_t>(h)][static_cast<std::size_t>(wanted.visual[i])],
                                per_head.at(h, static_cast<Index>(i)), tolerance(Operation::mass)))
                  << c.name << ", alpha " << alpha << ", layer " << layer << ", head " << h << ", visual token "
                  << wanted.visual[i];
        }
      }
}

TYPED_TEST(Policies, ObservationWindowScores) {
  for (const Case& c : cases())
    for (const Index window : {1, 8, 200})
      for (const auto& [pool, pooling] : {std::pair{Index{1}, Pooling::avg}, {5, Pooling::avg}, {7, Pooling::max}}) {
        const Prompt p = random_prompt(8, 1, c.tokens, c.kv_heads, c.group, c.tags);
        FedCache<typename TestFixture::B> fed(this->be(), p, c.page_tokens);
        fed.append(0, c.tokens);
        Positions rows = all_rows(p);
        const Index used = std::min(window, c.tokens);
        rows.erase(rows.begin(), rows.end() - used);
        const auto wanted = oracle::observation_window(
            p.queries[0], p.keys[0], settings_of(p.shape(0)),
            {.window = window,
             .kernel = pool,
             .pooling = pooling == Pooling::avg ? oracle::Pooling::average : oracle::Pooling::max});
        const auto got =
            fed.scores(0, ObservationWindow{.window = window, .pool = pool, .pooling = pooling}, all_tokens, rows);
        for (Index h = 0; h < c.kv_heads; ++h) {
          const auto& row = got[static_cast<std::size_t>(h)];
          double best = 0;
          for (Index t = 0; t < c.tokens - used; ++t) {
            ASSERT_TRUE(close(row[static_cast<std::size_t>(t)], wanted.at(h, t), tolerance(Operation::mass)))
                << c.name << ", window " << window << ", token " << t;
            best = std::max(best, row[static_cast<std::size_t>(t)]);
          }
          for (Index t = c.tokens - used; t < c.tokens; ++t) {
            EXPECT_GT(row[static_cast<std::size_t>(t)], best) << "the window ranks first, the newest highest";
            best = row[static_cast<std::size_t>(t)];
          }
        }
      }
}

/// Long values count more, among the candidates alone; the window's own tokens stay in front.
TYPED_TEST(Policies, ObservationWindowScoresByValues) {
  for (const Case& c : cases_for<TypeParam>())
    for (const double values : {0.5, 2.0}) {
      const Prompt p = random_prompt(80, 1, c.tokens, c.kv_heads, c.group, c.tags);
      FedCache<typename TestFixture::B> fed(this->be(), p, c.page_tokens);
      fed.append(0, c.tokens);
      const ObservationWindow window{.window = 6, .pool = 3, .pooling = Pooling::max, .values = values};
      Positions rows = all_rows(p);
      rows.erase(rows.begin(), rows.end() - 6);
      const auto wanted = oracle::raised_by_values(
          oracle::observation_window(p.queries[0], p.keys[0], settings_of(p.shape(0)), settings_of(window)),
          p.values[0], values);
      const auto got = fed.scores(0, window, all_tokens, rows);
      for (Index h = 0; h < c.kv_heads; ++h) {
        for (Index t = 0; t < c.tokens - 6; ++t)
          ASSERT_TRUE(close(got[static_cast<std::size_t>(h)][static_cast<std::size_t>(t)], wanted.at(h, t),
                            tolerance(Operation::mass)))
              << c.name << ", values " << values << ", head " << h << ", token " << t;
        for (Index t = c.tokens - 6; t < c.tokens; ++t)
          EXPECT_EQ(got[static_cast<std::size_t>(h)][static_cast<std::size_t>(t)],
                    static_cast<double>(score_of_rank(12 + t - c.tokens + 6)));
      }
    }
}

/// The newest rank first however long the values of others are, and as a rule, not as attention: budgets do not see them.
TYPED_TEST(Policies, RanksOfTheWindowAreNoAttention) {
  constexpr Index tokens = 70, window = 6;
  Prompt p = random_prompt(82, 2, tokens, 2, 2, {});
  for (Index h = 0; h < 2; ++h) p.values[0].at(20, h, 0) = 1e6;
  const Compressor method{ObservationWindow{.window = window, .pool = 1, .values = 2}, StrengthSkewness{}, TopK{},
                          Keep::ratio(0.3)};
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.feed(method, 0, tokens);
  const auto report = fed.cache.compress(fed.id, method);
  std::vector<double> strength, skewness;
  for (std::size_t l = 0; l < 2; ++l) {
    const auto votes = oracle::raised_by_values(
        oracle::observation_window(p.queries[l], p.keys[l], settings_of(p.shape(static_cast<Index>(l))),
                                   settings_of(method.scorer)),
        p.values[l], 2);
    const std::vector<double> mean = oracle::mean_of_layer(votes);
    strength.push_back(std::accumulate(mean.begin(), mean.end(), 0.0));
    skewness.push_back(oracle::adjusted_skewness(mean));
  }
  EXPECT_EQ(report.layer_budgets, oracle::strength_skewness_budgets(strength, skewness, {tokens, tokens}, 42));
  EXPECT_NE(report.layer_budgets[0], report.layer_budgets[1]);
  for (Index l = 0; l < 2; ++l)
    for (Index h = 0; h < 2; ++h) {
      const Positions kept = fed.cache.kept(fed.id, l, h);
      for (Position newest = tokens - window; newest < tokens; ++newest)
        EXPECT_TRUE(std::binary_search(kept.begin(), kept.end(), newest)) << "layer " << l << ", position " << newest;
    }
}

TYPED_TEST(Policies, ValuesAllAsLongChangeNothing) {
  Prompt p = random_prompt(81, 1, 40, 1, 2, {});
  for (Index t = 0; t < 40; ++t)
    for (Index c = 0; c < 16; ++c) p.values[0].at(t, 0, c) = c == t % 16 ? 2 : 0;
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 40);
  const Positions rows = {37, 38, 39};
  EXPECT_EQ(fed.scores(0, ObservationWindow{.window = 3, .values = 3}, all_tokens, rows),
            fed.scores(0, ObservationWindow{.window = 3}, all_tokens, rows));
}

TYPED_TEST(Policies, AccumulatedAttentionScores) {
  for (const Case& c : cases()) {
    const Prompt p = random_prompt(9, 1, c.tokens, c.kv_heads, c.group, c.tags);
    FedCache<typename TestFixture::B> fed(this->be(), p, c.page_tokens);
    fed.append(0, c.tokens);
    const auto wanted = oracle::mean_per_kv_head(
        oracle::accumulated_attention(p.queries[0], p.keys[0], settings_of(p.shape(0))), c.kv_heads);
    const auto got = fed.scores(0, AccumulatedAttention{}, all_tokens, all_rows(p));
    for (Index h = 0; h < c.kv_heads; ++h)
      for (Index t = 0; t < c.tokens; ++t)
        ASSERT_TRUE(close(got[static_cast<std::size_t>(h)][static_cast<std::size_t>(t)], wanted.at(h, t),
                          tolerance(Operation::mass)))
            << c.name << ", token " << t;
  }
}

TYPED_TEST(Policies, LastRowAndKeyScores) {
  for (const Case& c : cases()) {
    const Prompt p = random_prompt(12, 1, c.tokens, c.kv_heads, c.group, c.tags);
    FedCache<typename TestFixture::B> fed(this->be(), p, c.page_tokens);
    fed.append(0, c.tokens);
    const auto expect_scores = [&](const auto& scorer, const Positions& rows, const oracle::Array2& wanted,
                                   Tolerance t) {
      const auto got = fed.scores(0, scorer, all_tokens, rows);
      for (Index h = 0; h < c.kv_heads; ++h)
        for (Index j = 0; j < c.tokens; ++j)
          ASSERT_TRUE(close(got[static_cast<std::size_t>(h)][static_cast<std::size_t>(j)], wanted.at(h, j), t))
              << c.name << ", " << scorer.name << ", head " << h << ", token " << j;
    };
    expect_scores(LastRow{}, {static_cast<Position>(c.tokens - 1)},
                  oracle::last_row(p.queries[0], p.keys[0], settings_of(p.shape(0))),
                  tolerance(Operation::probability));
    expect_scores(KeyNorm{}, {}, oracle::key_norm(p.keys[0]), tolerance(Operation::product));
    expect_scores(KeyDiff{}, {}, oracle::key_diff(p.keys[0]), tolerance(Operation::product));
  }
}

/// Softcap, sliding window and sinks are the layer's: what is observed of a prompt has them too.
TYPED_TEST(Policies, ScoresAreOfTheLayersOwnAttention) {
  Prompt p = random_prompt(13, 1, 90, 2, 3, {});
  LayerShape& shape = p.model.layers[0];
  shape.softcap = 4, shape.window = 35, shape.sink_logits = {0.5f, -1, 2, 3, -2, 1};
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 90);
  const auto how = settings_of(shape);
  const auto expect_scores = [&](const auto& scorer, const Positions& rows, const oracle::Array2& wanted) {
    const auto got = fed.scores(0, scorer, all_tokens, rows);
    for (Index h = 0; h < 2; ++h)
      for (Index j = 0; j < wanted.columns; ++j)
        ASSERT_TRUE(close(got[static_cast<std::size_t>(h)][static_cast<std::size_t>(j)], wanted.at(h, j),
                          tolerance(Operation::mass)))
            << scorer.name << ", head " << h << ", token " << j;
  };
  expect_scores(LastRow{}, {89}, oracle::last_row(p.queries[0], p.keys[0], how));
  expect_scores(AccumulatedAttention{}, all_rows(p),
                oracle::mean_per_kv_head(oracle::accumulated_attention(p.queries[0], p.keys[0], how), 2));
  const ObservationWindow window{.window = 4};
  expect_scores(window, {86, 87, 88, 89},
                oracle::observation_window(p.queries[0], p.keys[0], how, settings_of(window)));
}

std::vector<int> modalities_of(const Prompt& p) {
  std::vector<int> of_tokens;
  for (const TokenClass c : p.classes())
    of_tokens.push_back(c == TokenClass::system  ? static_cast<int>(TokenClass::text)
                        : c == TokenClass::video ? static_cast<int>(TokenClass::image)
                                                 : static_cast<int>(c));
  return of_tokens;
}

Index window_of(const CrossSelf& s, Index rows) {
  return std::clamp<Index>(
      s.window > 0 ? s.window : static_cast<Index>(s.window_share * static_cast<double>(rows) + 1e-9), 1, rows);
}

/// Per kv head, from which budget on a token stays. Protected tokens and the window's are in no list. `nudge`: each
/// token's own parts are larger by so much than the others know.
oracle::Array2 cross_self(const Prompt& p, Index layer, const CrossSelf& s, double nudge = 0) {
  const auto at = static_cast<std::size_t>(layer);
  const auto modality = modalities_of(p);
  const Index window = window_of(s, p.tokens());
  const auto parts = oracle::cross_self_parts(p.queries[at], p.keys[at], modality, settings_of(p.shape(layer)),
                                              {.cross = s.cross, .n = s.n, .window = window});
  std::vector<bool> ranked(static_cast<std::size_t>(p.tokens()), true);
  for (Index t = p.tokens() - window; t < p.tokens(); ++t) ranked[static_cast<std::size_t>(t)] = false;
  for (const TagSpan& tag : p.tags)
    for (Position t = tag.begin; tag.is_protected && t < tag.end; ++t) ranked[static_cast<std::size_t>(t)] = false;
  double c = s.cross;
  if (s.estimate) {
    double apart = 0, pairs = 0;
    for (Index r = p.tokens() - window; r < p.tokens(); ++r)
      for (Index t = 0; t < p.tokens(); ++t)
        if (ranked[static_cast<std::size_t>(t)])
          pairs += 1, apart += oracle::item(modality, r) != oracle::item(modality, t) ? 1 : 0;
    c = pairs > 0 ? apart / pairs : 0;
  }
  oracle::Array2 order(parts.self.rows, parts.self.columns);
  for (Index h = 0; h < order.rows; ++h) {
    std::vector<double> self = parts.self.row(h), cross = parts.cross.row(h);
    for (Index t = 0; t < order.columns; ++t) {
      double &a = oracle::item(self, t), &b = oracle::item(cross, t);
      const double own_self = a, own_cross = b;
      a *= 1 + nudge, b *= 1 + nudge;
      order.at(h, t) = oracle::kept_from(self, cross, ranked, c, t);
      a = own_self, b = own_cross;
    }
  }
  return order;
}

TYPED_TEST(Policies, CrossSelfScores) {
  std::vector<Case> all = cases_for<TypeParam>();
  all.push_back(
      {"protected tokens", {span(5, 20), span(20, 30, TokenClass::image, true), span(40, 50, TokenClass::text, true)}});
  all.push_back({"four modalities",
                 {span(3, 20), span(20, 30, TokenClass::audio), span(30, 44, TokenClass::video),
                  span(44, 50, TokenClass::system), span(50, 66, TokenClass(7))}});
  const std::vector<CrossSelf> settings{{},
                                        {.cross = 0, .window = 6},
                                        {.cross = 1, .window = 3},
                                        {.cross = 0.3, .n = 0, .window = 1},
                                        {.cross = 0.9, .n = 20, .window_share = 1},
                                        {.window_share = 0},
                                        {.window_share = 0.4, .estimate = true},
                                        {.window = 500}};
  std::uint64_t seed = 20;
  for (const Case& c : all)
    for (const CrossSelf& s : settings)
      for (const bool modern : {false, true}) {
        Prompt p = random_prompt(++seed, 1, c.tokens, c.kv_heads, c.group, c.tags);
        LayerShape& shape = p.model.layers[0];
        if (modern) {
          shape.softcap = 3, shape.window = 40;
          for (Index h = 0; h < shape.q_heads; ++h) shape.sink_logits.push_back(0.5f * static_cast<float>(h % 5) - 1);
        }
        FedCache<typename TestFixture::B> fed(this->be(), p, c.page_tokens);
        fed.append(0, c.tokens);
        const double rounding = tolerance(Operation::mass).relative;  // that much may be the other way round
        const auto wanted = cross_self(p, 0, s), best = cross_self(p, 0, s, rounding),
                   least = cross_self(p, 0, s, -rounding);
        Positions rows = all_rows(p);
        if (s.window > 0) rows.erase(rows.begin(), rows.end() - window_of(s, c.tokens));
        const auto got = fed.scores(0, s, all_tokens, rows);
        for (Index h = 0; h < c.kv_heads; ++h) {
          double worst = 0;
          for (Index t = 0; t < c.tokens; ++t)
            if (wanted.at(h, t) < oracle::infinity) worst = std::max(worst, wanted.at(h, t));
          for (Index t = 0; t < c.tokens; ++t) {
            const double score = got[static_cast<std::size_t>(h)][static_cast<std::size_t>(t)];
            if (wanted.at(h, t) == oracle::infinity)
              ASSERT_LT(score, -worst) << c.name << ", token " << t << " has no place";
            else
              ASSERT_TRUE(-score > best.at(h, t) * (1 - 1e-6) && -score < least.at(h, t) * (1 + 1e-6))
                  << c.name << ", cross " << s.cross << ", window " << window_of(s, c.tokens) << ", head " << h
                  << ", token " << t << ": got " << score << ", wanted " << -wanted.at(h, t);
          }
        }
      }
}

oracle::LagKvSettings settings_of(const LagKv& s) { return {.sinks = s.sinks, .lag = s.lag, .across = s.across}; }

TYPED_TEST(Policies, LagKvScores) {
  const std::vector<LagKv> settings{{},
                                    {.sinks = 0, .lag = 1},
                                    {.lag = 8},
                                    {.lag = 8, .across = true},
                                    {.sinks = 0, .lag = 35},  // two whole partitions of 70
                                    {.sinks = 1, .lag = 35},  // one token short of them
                                    {.sinks = 1000, .lag = 16, .across = true}};
  std::uint64_t seed = 400;
  for (const Case& c : cases_for<TypeParam>())
    for (const LagKv& s : settings)
      for (const Index value_width : {16, 1, 7}) {
        Prompt p = random_prompt(++seed, 1, c.tokens, c.kv_heads, c.group, c.tags);
        if (value_width != 16) {
          Dice dice{seed};
          p.model.layers[0].value_dim = value_width;
          p.values[0] = random_array(dice, c.tokens, c.kv_heads, value_width, DType::f32);
        }
        for (Index t = 0; t < c.tokens; ++t) p.keys[0].at(t, 0, 3) = 2;  // the same all over
        FedCache<typename TestFixture::B> fed(this->be(), p, c.page_tokens);
        fed.append(0, c.tokens);
        const auto wanted = oracle::lag_kv(p.keys[0], p.values[0], settings_of(s));
        const auto got = fed.scores(0, s, all_tokens, {});
        for (Index h = 0; h < c.kv_heads; ++h)
          for (Index t = 0; t < c.tokens; ++t)
            ASSERT_TRUE(
                close(got[static_cast<std::size_t>(h)][static_cast<std::size_t>(t)], wanted.at(h, t), {0, 1e-6}))
                << c.name << ", lag " << s.lag << ", head " << h << ", token " << t;
      }
}

TYPED_TEST(Policies, LagKvOfANaN) {
  Prompt p = random_prompt(16, 1, 41, 1, 1, {});
  p.values[0].at(17, 0, 2) = std::numeric_limits<double>::quiet_NaN();  // in the third of five partitions
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 41);
  for (const bool across : {false, true}) {
    const auto scores = fed.scores(0, LagKv{.sinks = 1, .lag = 8, .across = across}, all_tokens, {})[0];
    for (std::size_t t = 0; t < 41; ++t) EXPECT_EQ(std::isnan(scores[t]), t >= 9 && t < 25) << "token " << t;
  }
}

TYPED_TEST(Policies, LagKvOfTokensAllAlike) {
  Prompt p = random_prompt(17, 1, 20, 1, 1, {});
  p.keys[0] = oracle::Array3(20, 1, 16, 1.5), p.values[0] = oracle::Array3(20, 1, 16, -2);
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 20);
  const auto scores = fed.scores(0, LagKv{.sinks = 0, .lag = 4}, all_tokens, {})[0];
  for (std::size_t t = 0; t < 16; ++t)
    EXPECT_EQ(scores[t], static_cast<double>(3 - t % 4) / 4) << "the lower ranks higher, token " << t;
}

/// Rows `tokens` of one head.
std::vector<std::vector<double>> rows_of(const oracle::Array3& x, const Positions& tokens, Index head) {
  std::vector<std::vector<double>> rows;
  for (const Position t : tokens) {
    rows.emplace_back();
    for (Index d = 0; d < x.c; ++d) rows.back().push_back(x.at(t, head, d));
  }
  return rows;
}

/// Scores by kv head and position of what a head holds, seen by these rows; the first tokens of all are sinks.
std::vector<double> expected_of_head(const Prompt& p, Index layer, Index head, const ExpectedAttention& s,
                                     const Positions& rows, const Positions& held, Position last_sink) {
  const auto at = static_cast<std::size_t>(layer);
  Positions used, others;
  for (const Position r : rows)
    if (r > last_sink) used.push_back(r);
  for (const Position t : held)
    if (t > last_sink) others.push_back(t);
  const LayerShape& shape = p.shape(layer);
  std::vector<std::vector<std::vector<double>>> queries;
  for (Index q = head * shape.group(); q < (head + 1) * shape.group(); ++q)
    queries.push_back(rows_of(p.queries[at], used.empty() ? rows : used, q));
  oracle::ExpectedAttentionSettings settings{.scale = static_cast<double>(shape.scale),
                                             .covariance = s.covariance,
                                             .value_norm = s.value_norm,
                                             .epsilon = s.epsilon,
                                             .future = s.future,
                                             .next = held.back() + 1};
  if (shape.rope) settings.rope = {shape.rope->inverse_frequencies, shape.rope->pairing == RopePairing::interleaved};
  const Positions& seen = used.empty() ? rows : used;
  settings.row_positions.assign(seen.begin(), seen.end());
  const auto scores = oracle::expected_attention_of_head(queries, rows_of(p.keys[at], others, head),
                                                         rows_of(p.values[at], others, head), settings);
  std::vector<double> all(static_cast<std::size_t>(p.tokens()), std::numeric_limits<double>::quiet_NaN());
  for (const Position t : held)
    all[static_cast<std::size_t>(t)] = scores.empty() ? 1 : *std::max_element(scores.begin(), scores.end()) + 1;
  for (std::size_t i = 0; i < others.size(); ++i) all[static_cast<std::size_t>(others[i])] = scores[i];
  return all;
}

TYPED_TEST(Policies, ExpectedAttentionScores) {
  const std::vector<ExpectedAttention> settings{{},
                                                {.sinks = 0, .window = 1},
                                                {.window = 20, .value_norm = false},
                                                {.covariance = false, .epsilon = 0.02},
                                                {.sinks = 1000},
                                                {.future = 1},
                                                {.sinks = 2, .window = 20, .value_norm = false, .future = 512},
                                                {.covariance = false, .future = 30}};
  std::uint64_t seed = 600;
  for (const Case& c : cases_for<TypeParam>())
    for (const ExpectedAttention& s : settings) {
      Prompt p = random_prompt(++seed, 1, c.tokens, c.kv_heads, c.group, c.tags);
      p.model.layers[0].value_dim = 7;
      Dice dice{seed};
      p.values[0] = random_array(dice, c.tokens, c.kv_heads, 7, DType::f32);
      for (double& q : p.queries[0].values) q += 0.25;  // a mean worth the name
      const bool whole = seed % 2 == 0;                 // or some channels that do not turn
      p.model.layers[0].rope = rope_of_base(whole ? p.shape(0).key_dim : p.shape(0).key_dim / 2, 50,
                                            whole ? RopePairing::halves : RopePairing::interleaved);
      FedCache<typename TestFixture::B> fed(this->be(), p, c.page_tokens);
      fed.append(0, c.tokens);
      Positions rows = all_rows(p);
      if (s.window > 0) rows.erase(rows.begin(), rows.end() - s.window);
      const auto got = fed.scores(0, s, all_tokens, rows);
      for (Index h = 0; h < c.kv_heads; ++h) {
        const auto wanted = expected_of_head(p, 0, h, s, rows, all_rows(p), static_cast<Position>(s.sinks - 1));
        for (Index t = 0; t < c.tokens; ++t)
          ASSERT_TRUE(close(got[static_cast<std::size_t>(h)][static_cast<std::size_t>(t)], oracle::item(wanted, t),
                            tolerance(Operation::mass)))
              << c.name << ", window " << s.window << ", head " << h << ", token " << t;
      }
    }
}

/// A query that is the same before RoPE wherever it stands has no spread, and is expected to come as it is turned next.
TYPED_TEST(Policies, ExpectedAttentionOfATurningQuery) {
  Prompt p = random_prompt(19, 1, 30, 1, 1, {}, 8);
  p.model.layers[0].rope = rope_of_base(8, 20);
  const RopeView rope = p.model.layers[0].rope->view();
  const std::vector<double> fixed{1, -0.5, 2, 0.25, -1, 0.5, 0.75, 1.5};
  const auto at_position = [&](Index t) {
    std::vector<double> turned = fixed;
    rope.rotate(turned.data(), static_cast<Position>(t));
    return turned;
  };
  for (Index t = 0; t < 30; ++t)
    for (Index c = 0; c < 8; ++c)
      p.queries[0].at(t, 0, c) = rounded(at_position(t)[static_cast<std::size_t>(c)], DType::f32);
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 30);
  const auto got =
      fed.scores(0, ExpectedAttention{.sinks = 0, .value_norm = false, .future = 1}, all_tokens, all_rows(p));
  std::vector<double> logits;
  for (const auto& key : rows_of(p.keys[0], all_rows(p), 0))
    logits.push_back(static_cast<double>(p.shape(0).scale) *
                     std::inner_product(key.begin(), key.end(), at_position(30).begin(), 0.0));
  const auto wanted = oracle::softmax(logits);
  for (std::size_t t = 0; t < 30; ++t)
    EXPECT_TRUE(close(got[0][t], wanted[t], tolerance(Operation::mass))) << "token " << t;
}

TYPED_TEST(Policies, ExpectedAttentionOfTheFutureNeedsARope) {
  Prompt p = random_prompt(20, 2, 30, 1, 1, {});
  p.model.layers[0].rope = rope_of_base(16);
  auto method = expected_attention();
  method.scorer.future = 512;
  const auto refusal = [&] {
    FedCache<typename TestFixture::B> fed(this->be(), p);
    fed.append(0, 30);
    const Index before = fed.cache.stats(fed.id).observation_bytes;
    const std::string said =
        error_of([&] { fed.cache.observe(fed.id, 1, method, fed.queries(1, 0, 10), fed.positions(0, 10), false); });
    EXPECT_EQ(fed.cache.stats(fed.id).observation_bytes == before, said != "no error");
    return said;
  };
  EXPECT_EQ(refusal(), "expected_attention: future = 512: layer 1 has no rope, it must be said in LayerShape::rope");
  p.model.layers[1].rope = p.model.layers[0].rope;
  EXPECT_EQ(refusal(), "no error");
  p.model.layers[1].rope->axes = axes_of_sections(2, 3, 3);
  EXPECT_NE(refusal().find("the rope of layer 1 turns by three numbers of a token (axes)"), std::string::npos);
}

/// Exponents of some hundred, where exp alone is infinite; numbers that are none.
TYPED_TEST(Policies, ExpectedAttentionOfLargeKeysAndOfANaN) {
  Prompt p = random_prompt(18, 1, 40, 2, 2, {});
  for (double& k : p.keys[0].values) k *= 20;
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 40);
  const auto scores = fed.scores(0, ExpectedAttention{}, all_tokens, all_rows(p));
  for (const auto& row : scores)
    for (const double x : row) EXPECT_TRUE(std::isfinite(x));

  Prompt odd = random_prompt(18, 1, 40, 2, 2, {});
  odd.keys[0].at(20, 0, 3) = odd.values[0].at(30, 1, 0) = std::numeric_limits<double>::quiet_NaN();
  FedCache<typename TestFixture::B> with_odd(this->be(), odd);
  with_odd.append(0, 40);
  const auto some = with_odd.scores(0, ExpectedAttention{}, all_tokens, all_rows(odd));
  for (std::size_t t = 0; t < 40; ++t) {
    EXPECT_EQ(std::isnan(some[0][t]), t == 20) << "token " << t;
    EXPECT_EQ(std::isnan(some[1][t]), t == 30) << "token " << t;
  }
  odd.queries[0].at(9, 3, 5) = std::numeric_limits<double>::quiet_NaN();
  for (const bool covariance : {false, true}) {
    const auto none = with_odd.scores(0, ExpectedAttention{.covariance = covariance}, all_tokens, all_rows(odd));
    for (std::size_t t = 4; t < 40; ++t) EXPECT_TRUE(std::isnan(none[1][t])) << "token " << t;
  }
}

/// Once heads hold different tokens, each has an anchor of its own, and scores are of what is held.
TYPED_TEST(Policies, KeyScoresOfHeadsThatDiffer) {
  const Prompt p = random_prompt(14, 1, 100, 3, 1, {});
  for (const Index page : {16, 64}) {
    FedCache<typename TestFixture::B> fed(this->be(), p, page);
    fed.append(0, 100);
    auto coin = random_choice();
    coin.keep = Keep::tokens(37);
    fed.cache.compress(fed.id, coin);
    Positions any;  // what any head holds: rows to look at
    for (const Index h : {0, 1, 2}) {
      const Positions kept = fed.cache.kept(fed.id, 0, h);
      any.insert(any.end(), kept.begin(), kept.end());
    }
    std::sort(any.begin(), any.end());
    any.erase(std::unique(any.begin(), any.end()), any.end());
    const auto expected = fed.scores(0, ExpectedAttention{}, all_tokens, any);
    const auto norms = fed.scores(0, KeyNorm{}, all_tokens, {}), diffs = fed.scores(0, KeyDiff{}, all_tokens, {}),
               lags = fed.scores(0, LagKv{.lag = 8}, all_tokens, {});
    for (Index h = 0; h < 3; ++h) {
      const auto at = static_cast<std::size_t>(h);
      const Positions held = fed.cache.kept(fed.id, 0, h);
      ASSERT_EQ(held.size(), 37u);
      std::vector<std::vector<double>> keys, values;
      for (const Position t : held) {
        keys.emplace_back(), values.emplace_back();
        for (Index d = 0; d < p.keys[0].c; ++d) keys.back().push_back(p.keys[0].at(t, h, d));
        for (Index d = 0; d < p.values[0].c; ++d) values.back().push_back(p.values[0].at(t, h, d));
      }
      const auto lag = oracle::lag_kv_of_head(keys, values, {.lag = 8});
      const auto expect = expected_of_head(p, 0, h, {}, any, held, any[3]);
      const auto wanted = oracle::key_diff_of_head(keys);
      const auto norm = oracle::key_norm(p.keys[0]).row(h);
      for (std::size_t i = 0; i < held.size(); ++i) {
        const auto t = static_cast<std::size_t>(held[i]);
        EXPECT_TRUE(close(diffs[at][t], wanted[i], tolerance(Operation::product))) << "head " << h << " token " << t;
        EXPECT_TRUE(close(norms[at][t], norm[t], tolerance(Operation::product))) << "head " << h << " token " << t;
        EXPECT_TRUE(close(lags[at][t], lag[i], {0, 1e-6})) << "head " << h << " token " << t;
        EXPECT_TRUE(close(expected[at][t], expect[t], tolerance(Operation::mass))) << "head " << h << " token " << t;
      }
    }
  }
}

TYPED_TEST(Policies, KeysWithoutLengthAndWithoutMeaning) {
  Prompt p = random_prompt(15, 1, 40, 2, 1, {});
  for (Index d = 0; d < p.keys[0].c; ++d) {
    p.keys[0].at(7, 0, d) = 0;
    for (Index t = 0; t < 40; ++t) p.keys[0].at(t, 1, d) = (t % 2 == 0 ? 1 : -1) * (d == 3 ? 2.0 : 0.0);  // no mean
  }
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 40);
  const auto norms = fed.scores(0, KeyNorm{}, all_tokens, {}), diffs = fed.scores(0, KeyDiff{}, all_tokens, {});
  EXPECT_EQ(norms[0][7], 0);
  EXPECT_EQ(diffs[0][7], 0);
  for (std::size_t t = 0; t < 40; ++t) {
    EXPECT_EQ(norms[1][t], -2) << t;
    EXPECT_EQ(diffs[1][t], 0) << "an anchor without length, token " << t;
  }
  p.keys[0].at(11, 0, 2) = std::numeric_limits<double>::quiet_NaN();
  FedCache<typename TestFixture::B> odd(this->be(), p);
  odd.append(0, 40);
  EXPECT_TRUE(std::isnan(odd.scores(0, KeyNorm{}, all_tokens, {})[0][11]));
  auto shortest = key_norm();
  shortest.keep = Keep::tokens(39);
  EXPECT_EQ(odd.cache.compress(odd.id, shortest).nan_scores, 1);
  const auto kept = odd.cache.kept(odd.id, 0, 0);
  EXPECT_FALSE(std::binary_search(kept.begin(), kept.end(), 11)) << "NaN ranks last";
}

TYPED_TEST(Policies, UnobservedScores) {
  const Prompt p = random_prompt(10, 2, 50, 2, 1, {});
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 50);
  const auto coin = fed.scores(1, Random{.seed = 5}, all_tokens, {}),
             same = fed.scores(1, Random{.seed = 5}, all_tokens, {}),
             other_seed = fed.scores(1, Random{.seed = 6}, all_tokens, {}),
             other_layer = fed.scores(0, Random{.seed = 5}, all_tokens, {});
  EXPECT_EQ(coin, same);
  EXPECT_NE(coin, other_seed);
  EXPECT_NE(coin, other_layer);
  EXPECT_NE(coin[0], coin[1]);
  double mean = 0;
  for (std::size_t t = 0; t < 50; ++t) {
    EXPECT_EQ(coin[1][t], static_cast<double>(random_unit(5, 1, 1, static_cast<Position>(t))));
    mean += coin[1][t] / 50;
  }
  EXPECT_NEAR(mean, 0.5, 0.2);
  const auto place = fed.scores(0, SinksAndRecent{.sinks = 3}, all_tokens, {})[0];
  for (std::size_t t = 4; t < 50; ++t) EXPECT_GT(place[t], place[t - 1]);
  EXPECT_GT(place[0], place[1]);
  EXPECT_GT(place[1], place[2]);
  EXPECT_GT(place[2], place[49]);
}

TYPED_TEST(Policies, ScoresFollowTokensNotPages) {
  const std::vector<TagSpan> tags{span(10, 45)};
  const Prompt p = random_prompt(11, 1, 80, 2, 2, tags);
  std::vector<std::vector<std::vector<double>>> first;
  for (const Index page : {16, 32, 64}) {
    FedCache<typename TestFixture::B> fed(this->be(), p, page);
    fed.append(0, 80);
    const std::vector<std::vector<std::vector<double>>> now{
        fed.scores(0, EliteWindow{}, visual, text_rows(p)),
        fed.scores(0, AccumulatedAttention{}, all_tokens, all_rows(p)),
        fed.scores(0, ObservationWindow{.window = 10}, all_tokens, {70, 71, 72, 73, 74, 75, 76, 77, 78, 79})};
    if (first.empty()) first = now;
    for (std::size_t s = 0; s < now.size(); ++s)
      for (std::size_t h = 0; h < 2; ++h)
        for (std::size_t t = 0; t < 80; ++t)
          EXPECT_TRUE(close(now[s][h][t], first[s][h][t], tolerance(Operation::mass))) << s << " " << page;
  }
}

// ---- whole recipes

Kept wanted_kept(const Prompt& p, const Compressor<SinksAndRecent, Uniform>& m) {
  Kept kept;
  const auto budget = even(p.layers(), p.tokens(), m.keep.amount);
  for (const Index k : budget)
    kept.emplace_back(static_cast<std::size_t>(p.shape(0).kv_heads),
                      to_positions(oracle::streaming_keep(p.tokens(), std::min(k, m.scorer.sinks),
                                                          std::max<Index>(0, k - m.scorer.sinks))));
  return kept;
}

/// Even budgets; every head keeps its newest share and the best of the older ones by `scores_of(layer)`, [kv head][token].
template <class M, class F>
Kept kept_by_head(const Prompt& p, const M& m, const F& scores_of) {
  Kept kept;
  const auto budget = even(p.layers(), p.tokens(), m.keep.amount);
  for (Index l = 0; l < p.layers(); ++l) {
    auto& heads = kept.emplace_back();
    const Index k = oracle::item(budget, l),
                recent = static_cast<Index>(m.selector.recent_share * static_cast<double>(k) + 1e-9);
    for (const std::vector<double>& scores : scores_of(l))
      heads.push_back(to_positions(oracle::heavy_and_recent(scores, k - recent, recent)));
  }
  return kept;
}

std::vector<std::vector<double>> rows_of(const oracle::Array2& scores) {
  std::vector<std::vector<double>> rows;
  for (Index h = 0; h < scores.rows; ++h) rows.push_back(scores.row(h));
  return rows;
}

Kept wanted_kept(const Prompt& p, const Compressor<Random, Uniform>& m) {
  return kept_by_head(p, m, [&](Index l) {
    std::vector<std::vector<double>> scores(static_cast<std::size_t>(p.shape(l).kv_heads));
    for (std::size_t h = 0; h < scores.size(); ++h)
      for (Position t = 0; t < p.tokens(); ++t)
        scores[h].push_back(
            static_cast<double>(random_unit(static_cast<std::uint64_t>(m.scorer.seed), l, static_cast<Index>(h), t)));
    return scores;
  });
}

Kept wanted_kept(const Prompt& p, const Compressor<AccumulatedAttention, Uniform>& m) {
  return kept_by_head(p, m, [&](Index l) {
    const auto at = static_cast<std::size_t>(l);
    return rows_of(oracle::mean_per_kv_head(
        oracle::accumulated_attention(p.queries[at], p.keys[at], settings_of(p.shape(l))), p.shape(l).kv_heads));
  });
}

Kept wanted_kept(const Prompt& p, const Compressor<LastRow, Uniform>& m) {
  return kept_by_head(p, m, [&](Index l) {
    const auto at = static_cast<std::size_t>(l);
    return std::vector(static_cast<std::size_t>(p.shape(l).kv_heads),
                       oracle::last_row_of_layer(p.queries[at], p.keys[at], settings_of(p.shape(l))));
  });
}

template <class S>
  requires(std::same_as<S, KeyNorm> || std::same_as<S, KeyDiff> || std::same_as<S, LagKv>)
Kept wanted_kept(const Prompt& p, const Compressor<S, Uniform>& m) {
  return kept_by_head(p, m, [&](Index l) {
    const auto at = static_cast<std::size_t>(l);
    if constexpr (std::same_as<S, LagKv>)
      return rows_of(oracle::lag_kv(p.keys[at], p.values[at], settings_of(m.scorer)));
    else
      return rows_of(std::same_as<S, KeyNorm> ? oracle::key_norm(p.keys[at]) : oracle::key_diff(p.keys[at]));
  });
}

Kept wanted_kept(const Prompt& p, const Compressor<CrossSelf, Uniform>& m) {
  if (m.scorer.mode == Mode::reference) {
    // The newest are as many in every layer; of the others those that are in a list at the rest of the budget.
    const auto budgets = even(p.layers(), p.tokens(), m.keep.amount);
    const Index total = std::accumulate(budgets.begin(), budgets.end(), Index{0}), n = p.tokens();
    const Index newest = std::clamp<Index>(
        static_cast<Index>(m.selector.recent_share * static_cast<double>(total) / static_cast<double>(p.layers())), 1,
        n);
    std::vector<bool> older(static_cast<std::size_t>(n), true);
    std::fill(older.end() - newest, older.end(), false);
    Kept kept;
    for (Index l = 0; l < p.layers(); ++l) {
      auto& heads = kept.emplace_back();
      const Index k = std::max<Index>(0, oracle::item(budgets, l) - newest);
      const oracle::Array2 from = cross_self(p, l, m.scorer);
      const auto at = static_cast<std::size_t>(l);
      const auto parts = oracle::cross_self_parts(p.queries[at], p.keys[at], modalities_of(p), settings_of(p.shape(l)),
                                                  {.n = m.scorer.n, .window = newest});
      for (Index h = 0; h < from.rows; ++h) {
        std::vector<Index> chosen;
        if (window_of(m.scorer, n) == newest) {  // the two lists as the code has them
          auto self = parts.self.row(h), cross = parts.cross.row(h);
          self.resize(static_cast<std::size_t>(n - newest)), cross.resize(static_cast<std::size_t>(n - newest));
          chosen = oracle::cross_self_union(self, cross, k, m.scorer.cross);
        } else {
          auto before = from.row(h);
          Index within = 0;
          for (Index t = 0; t < n - newest; ++t) within += oracle::item(before, t) <= static_cast<double>(k) + 1e-6;
          for (double& x : before) x = -x;
          chosen = oracle::select_top(before, std::min(k, within), older);
        }
        for (Index t = n - newest; t < n; ++t) chosen.push_back(t);
        heads.push_back(to_positions(chosen));
      }
    }
    return kept;
  }
  return kept_by_head(p, m, [&](Index l) {
    auto scores = rows_of(cross_self(p, l, m.scorer));  // places: the lowest is best
    for (auto& row : scores)
      for (double& x : row) x = -x;
    return scores;
  });
}

Kept wanted_kept(const Prompt& p, const Compressor<ExpectedAttention, Uniform>& m) {
  return kept_by_head(p, m, [&](Index l) {
    std::vector<std::vector<double>> scores;
    for (Index h = 0; h < p.shape(l).kv_heads; ++h)
      scores.push_back(
          expected_of_head(p, l, h, m.scorer, all_rows(p), all_rows(p), static_cast<Position>(m.scorer.sinks - 1)));
    return scores;
  });
}

/// Survivors by the window's votes, from the budgets of all layers and heads. A budget below the window keeps the newest
/// of it.
Kept kept_by_window(const Prompt& p, const ObservationWindow& scorer,
                    const std::function<std::vector<Index>(Index, const oracle::Array2&)>& budgets_of) {
  Kept kept;
  for (Index l = 0; l < p.layers(); ++l) {
    auto& heads = kept.emplace_back();
    const auto at = static_cast<std::size_t>(l);
    const auto scores =
        oracle::observation_window(p.queries[at], p.keys[at], settings_of(p.shape(l)), settings_of(scorer));
    const auto budgets = budgets_of(l, scores);
    for (Index h = 0; h < scores.rows; ++h) {
      const Index k = oracle::item(budgets, h);
      heads.push_back(to_positions(k < scorer.window
                                       ? oracle::streaming_keep(p.tokens(), 0, k)
                                       : oracle::observation_window_keep(scores.row(h), p.tokens(), scorer.window, k)));
    }
  }
  return kept;
}

/// SnapKV; Ada-KV when the heads of a layer share what is left of the budget beside the window.
Kept wanted_kept(const Prompt& p, const Compressor<ObservationWindow, Uniform>& m) {
  const auto budget = even(p.layers(), p.tokens(), m.keep.amount);
  return kept_by_window(p, m.scorer, [&](Index l, const oracle::Array2& scores) {
    const Index k = oracle::item(budget, l), window = m.scorer.window;
    std::vector<Index> of_heads(static_cast<std::size_t>(scores.rows), k);
    if (m.selector.heads != SelectHeads::shared || k <= window) return of_heads;
    const std::vector<Index> older(of_heads.size(), scores.columns);
    const auto hits = oracle::hits_per_head(scores, scores.rows * (k - window));
    if (m.selector.mode == Mode::paper)
      of_heads = oracle::ada_kv_exact(hits, k - window, m.selector.floor, older);
    else if (k - window < scores.columns)
      of_heads = oracle::ada_kv_published(hits, k - window, m.selector.floor);
    else
      of_heads = older;
    for (Index& b : of_heads) b = std::min(b, scores.columns) + window;
    return of_heads;
  });
}

/// Tokens per layer, the window included: the line of PyramidKV over what is there beside it.
std::vector<Index> pyramid_budgets(const Pyramid& rule, Index layers, Index total, Index tokens) {
  const Index capacity = total / layers;
  if (rule.mode == Mode::reference) {
    const Index window = std::min(rule.window, capacity);
    auto budgets = oracle::pyramid_published(
        layers, tokens, {.capacity = capacity, .window = window, .beta = static_cast<Index>(rule.beta)});
    for (Index& b : budgets) b = std::min(b + window, tokens);
    return budgets;
  }
  if (capacity < rule.window)
    return oracle::apportion(std::vector<double>(static_cast<std::size_t>(layers), 1.0), total,
                             std::vector<Index>(static_cast<std::size_t>(layers), tokens), 0);
  const std::vector<Index> older(static_cast<std::size_t>(layers), std::max<Index>(0, tokens - rule.window));
  auto budgets = oracle::pyramid_exact(total - layers * rule.window, rule.beta, older);
  for (Index& b : budgets) b = std::min(b + rule.window, tokens);
  return budgets;
}

Kept wanted_kept(const Prompt& p, const Compressor<ObservationWindow, Pyramid>& m) {
  const std::vector<Index> candidates(static_cast<std::size_t>(p.layers()), p.tokens());
  const auto budgets =
      pyramid_budgets(m.budget, p.layers(), oracle::total_tokens(m.keep.amount, candidates), p.tokens());
  return kept_by_window(p, m.scorer, [&](Index l, const oracle::Array2& scores) {
    return std::vector<Index>(static_cast<std::size_t>(scores.rows), oracle::item(budgets, l));
  });
}

Kept wanted_kept(const Prompt& p, const Compressor<EliteWindow, StrengthSkewness>& m) {
  std::vector<std::vector<double>> importance;
  std::vector<Index> visual_tokens, candidates;
  for (Index l = 0; l < p.layers(); ++l) {
    const auto at = static_cast<std::size_t>(l);
    const auto elite = oracle::elite_window(p.queries[at], p.keys[at], kinds_of(p),
                                            static_cast<double>(p.shape(l).scale), {.alpha = m.scorer.alpha});
    importance.push_back(oracle::mean_of_layer(elite.importance));
    visual_tokens = elite.visual;
    candidates.push_back(static_cast<Index>(elite.visual.size()));
  }
  const auto budgets = oracle::strength_skewness(importance, oracle::total_tokens(m.keep.amount, candidates),
                                                 {.lowest = m.budget.least});
  Kept kept;
  for (std::size_t l = 0; l < budgets.size(); ++l) {
    Positions layer = text_rows(p);
    for (const Index i : oracle::select_top(importance[l], budgets[l]))
      layer.push_back(static_cast<Position>(visual_tokens[static_cast<std::size_t>(i)]));
    std::sort(layer.begin(), layer.end());
    kept.emplace_back(static_cast<std::size_t>(p.shape(0).kv_heads), layer);
  }
  return kept;
}

template <Backend B, class M>
void keeps_what_the_paper_keeps(B& be, const Prompt& p, const Case& c, const M& method) {
  test::keeps_what_the_paper_keeps(be, p, c, method, wanted_kept(p, method));
}

TYPED_TEST(Policies, RecipesKeepWhatTheirPapersKeep) {
  std::uint64_t seed = 100;
  const std::vector<double> ratios = is_small<TypeParam>() ? std::vector{0.35} : std::vector{0.0, 0.1, 0.35, 0.9};
  for (const Case& c : cases_for<TypeParam>())
    for (const double ratio : ratios) {
      const Prompt p = random_prompt(++seed, 3, c.tokens, c.kv_heads, c.group, c.tags);
      const auto with_ratio = [&](auto method) {
        method.keep = Keep::ratio(ratio);
        return method;
      };
      auto snap = with_ratio(snap_kv());
      snap.scorer.window = 8;
      auto elite = with_ratio(air_cache());
      elite.scorer.alpha = 0.5;
      keeps_what_the_paper_keeps(this->be(), p, c, with_ratio(streaming_llm()));
      keeps_what_the_paper_keeps(this->be(), p, c, with_ratio(random_choice()));
      keeps_what_the_paper_keeps(this->be(), p, c, with_ratio(h2o()));
      keeps_what_the_paper_keeps(this->be(), p, c, snap);
      keeps_what_the_paper_keeps(this->be(), p, c, with_ratio(tova()));
      keeps_what_the_paper_keeps(this->be(), p, c, with_ratio(key_norm()));
      keeps_what_the_paper_keeps(this->be(), p, c, with_ratio(key_diff()));
      auto shared = with_ratio(ada_kv());
      shared.scorer.window = 8;
      for (const double floor : {0.0, 0.2, 1.0}) {
        shared.selector.floor = floor;
        keeps_what_the_paper_keeps(this->be(), p, c, shared);
      }
      shared.selector.mode = Mode::reference, shared.selector.floor = 0.3;
      keeps_what_the_paper_keeps(this->be(), p, c, shared);
      auto pyramid = with_ratio(pyramid_kv());
      for (const Mode mode : {Mode::paper, Mode::reference}) {
        pyramid.budget.mode = mode;
        keeps_what_the_paper_keeps(this->be(), p, c, pyramid);
      }
      keeps_what_the_paper_keeps(this->be(), p, c, elite);
      keeps_what_the_paper_keeps(this->be(), p, c, with_ratio(air_cache()));
      if (is_small<TypeParam>() && seed % 5 != 0) continue;  // the rest takes long there
      keeps_what_the_paper_keeps(this->be(), p, c, with_ratio(expected_attention()));
      auto lag = with_ratio(lag_kv());
      keeps_what_the_paper_keeps(this->be(), p, c, lag);
      lag.scorer.lag = 8;
      keeps_what_the_paper_keeps(this->be(), p, c, lag);
      auto crossing = with_ratio(csp());
      keeps_what_the_paper_keeps(this->be(), p, c, crossing);
      crossing.scorer.cross = 0.25, crossing.scorer.window = 4;
      keeps_what_the_paper_keeps(this->be(), p, c, crossing);
      crossing.scorer.mode = crossing.selector.mode = Mode::reference;
      keeps_what_the_paper_keeps(this->be(), p, c, crossing);
      crossing.scorer = {.mode = Mode::reference}, crossing.keep = Keep::ratio(0.2);  // as many rows as newest tokens
      keeps_what_the_paper_keeps(this->be(), p, c, crossing);
    }
}

TYPED_TEST(Policies, FullKeepsEverything) {
  const Prompt p = random_prompt(3, 2, 50, 2, 2, {span(0, 30)});
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.feed(full(), 0, 50);
  const auto report = fed.cache.compress(fed.id, full());
  EXPECT_EQ(report.tokens_after, report.tokens_before);
  EXPECT_EQ(report.pages_freed, 0);
}

// ---- a second round, on heads that by now hold different tokens

/// Rows `tokens` and heads [first, first + count) of an array.
oracle::Array3 slice(const oracle::Array3& x, const Positions& tokens, Index first, Index count) {
  oracle::Array3 out(static_cast<Index>(tokens.size()), count, x.c);
  for (Index t = 0; t < out.a; ++t)
    for (Index h = 0; h < count; ++h)
      for (Index d = 0; d < x.c; ++d) out.at(t, h, d) = x.at(tokens[static_cast<std::size_t>(t)], first + h, d);
  return out;
}

/// What one head saw before it was compressed for the first time, and which tokens it holds at the second.
struct FirstRound {
  oracle::Array3 queries, keys;
  Positions held;
};

template <Backend B, class M, class ScoresOf>
void second_round(B& be, const M& method, const ScoresOf& wanted_scores) {
  const Index first = 60, all = 100, heads = 2, group = 2;
  Kept other_pages;
  for (const Index page : {16, 32, 64}) {
    const Prompt p = random_prompt(55, 2, all, heads, group, {});
    FedCache<B> fed(be, p, page);
    fed.feed(method, 0, first);
    fed.cache.compress(fed.id, method);
    const Kept before = kept_in(fed, p);
    ASSERT_NE(before[0][0], before[0][1]) << "the heads must differ for this test to mean anything";
    fed.feed(method, first, all, 17);
    fed.cache.compress(fed.id, method);
    const Kept after = kept_in(fed, p);
    const auto budgets = even(p.layers(), all, method.keep.amount);
    for (Index l = 0; l < p.layers(); ++l)
      for (Index h = 0; h < heads; ++h) {
        const auto at = static_cast<std::size_t>(l);
        Positions held = before[at][static_cast<std::size_t>(h)];
        for (Position t = first; t < all; ++t) held.push_back(t);
        Positions prompt(static_cast<std::size_t>(first));
        std::iota(prompt.begin(), prompt.end(), 0);
        const auto scores = wanted_scores(
            p.shape(l), slice(p.queries[at], held, h * group, group), slice(p.keys[at], held, h, 1), all - first,
            FirstRound{slice(p.queries[at], prompt, h * group, group), slice(p.keys[at], prompt, h, 1), held});
        const Index k = budgets[at],
                    recent = static_cast<Index>(method.selector.recent_share * static_cast<double>(k) + 1e-9);
        Positions wanted;
        for (const Index i : oracle::heavy_and_recent(scores, k - recent, recent))
          wanted.push_back(held[static_cast<std::size_t>(i)]);
        EXPECT_EQ(after[at][static_cast<std::size_t>(h)], wanted)
            << method.scorer.name << ", pages of " << page << ", layer " << l << ", head " << h;
      }
    if (other_pages.empty()) other_pages = after;
    EXPECT_EQ(after, other_pages) << "the size of pages must not matter";
  }
}

TYPED_TEST(Policies, SecondRoundOfSnapKv) {
  auto method = snap_kv();
  method.scorer.window = 6;
  for (const double ratio : {0.3, 0.6}) {
    method.keep = Keep::ratio(ratio);
    second_round(this->be(), method,
                 [&](const LayerShape& shape, const oracle::Array3& queries, const oracle::Array3& keys, Index,
                     const FirstRound&) {
                   auto scores =
                       oracle::observation_window(queries, keys, settings_of(shape),
                                                  {.window = method.scorer.window, .kernel = method.scorer.pool})
                           .row(0);
                   while (static_cast<Index>(scores.size()) < keys.a)
                     scores.push_back(1000 + static_cast<double>(scores.size()));  // the window
                   return scores;
                 });
  }
}

TYPED_TEST(Policies, SecondRoundOfCsp) {
  auto method = csp();
  method.scorer.window = 6;
  for (const double ratio : {0.3, 0.6}) {
    method.keep = Keep::ratio(ratio);
    second_round(this->be(), method,
                 [&](const LayerShape& shape, const oracle::Array3& queries, const oracle::Array3& keys, Index,
                     const FirstRound&) {
                   const std::vector<int> text_only(static_cast<std::size_t>(keys.a), 0);
                   const auto parts =
                       oracle::cross_self_parts(queries, keys, text_only, settings_of(shape), {.n = 1, .window = 6});
                   std::vector<bool> ranked(text_only.size(), true);
                   std::fill(ranked.end() - 6, ranked.end(), false);
                   auto scores = oracle::cross_self_order(parts.self.row(0), parts.cross.row(0), ranked, 0.5);
                   for (double& x : scores) x = -x;
                   return scores;
                 });
  }
}

TYPED_TEST(Policies, SecondRoundOfH2o) {
  auto method = h2o();
  for (const double ratio : {0.3, 0.6}) {
    method.keep = Keep::ratio(ratio);
    second_round(this->be(), method,
                 [&](const LayerShape& shape, const oracle::Array3& queries, const oracle::Array3& keys, Index fresh,
                     const FirstRound& earlier) {
                   std::vector<double> acc(static_cast<std::size_t>(keys.a), 0.0);
                   for (Index h = 0; h < queries.b; ++h) {
                     for (Index row = 0; row < earlier.keys.a; ++row) {  // nothing was missing yet
                       const auto p = oracle::attention_row(earlier.queries, earlier.keys, h, row, settings_of(shape));
                       for (std::size_t j = 0; j < acc.size() && earlier.held[j] < static_cast<Position>(p.size()); ++j)
                         acc[j] += p[static_cast<std::size_t>(earlier.held[j])] / static_cast<double>(queries.b);
                     }
                     for (Index row = keys.a - fresh; row < keys.a; ++row) {
                       const auto p = oracle::attention_row(queries, keys, h, row, settings_of(shape));
                       for (std::size_t j = 0; j < p.size(); ++j) acc[j] += p[j] / static_cast<double>(queries.b);
                     }
                   }
                   return acc;
                 });
  }
}

TYPED_TEST(Policies, SecondRoundOfRandomAndStreaming) {
  auto coin = random_choice();
  coin.keep = Keep::ratio(0.4);
  const Prompt p = random_prompt(56, 2, 100, 2, 1, {});
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 60);
  fed.cache.compress(fed.id, coin);
  fed.append(60, 40);
  const Kept before = kept_in(fed, p);
  fed.cache.compress(fed.id, coin);
  const Kept after = kept_in(fed, p);
  for (std::size_t l = 0; l < 2; ++l)
    for (std::size_t h = 0; h < 2; ++h) {
      std::vector<double> scores;
      for (const Position t : before[l][h]) scores.push_back(static_cast<double>(random_unit(0, l, h, t)));
      Positions wanted;
      for (const Index i : oracle::select_top(scores, 40)) wanted.push_back(before[l][h][static_cast<std::size_t>(i)]);
      EXPECT_EQ(after[l][h], wanted);
    }

  auto streaming = streaming_llm();
  streaming.keep = Keep::tokens(2 * 10);
  fed.cache.compress(fed.id, streaming);
  for (std::size_t l = 0; l < 2; ++l)
    for (std::size_t h = 0; h < 2; ++h) {
      // Heads hold different tokens: the first four that any head holds are the sinks.
      std::vector<Position> any = after[l][0];
      any.insert(any.end(), after[l][1].begin(), after[l][1].end());
      std::sort(any.begin(), any.end());
      any.erase(std::unique(any.begin(), any.end()), any.end());
      Positions sinks, recent = after[l][h];
      for (const Position t : after[l][h])
        if (t <= any[3]) sinks.push_back(t);
      recent.erase(recent.begin(), recent.end() - static_cast<std::ptrdiff_t>(10 - sinks.size()));
      sinks.insert(sinks.end(), recent.begin(), recent.end());
      EXPECT_EQ(fed.cache.kept(fed.id, static_cast<Index>(l), static_cast<Index>(h)), sinks);
    }
}

TYPED_TEST(Policies, SecondRoundOfAirCacheLeavesTextAlone) {
  const Prompt p = random_prompt(57, 3, 120, 2, 2, {span(4, 50), span(70, 100)});
  auto method = air_cache();
  method.keep = Keep::ratio(0.3);
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.feed(method, 0, 60, 20);
  fed.cache.compress(fed.id, method);
  fed.feed(method, 60, 120, 33);
  const auto report = fed.cache.compress(fed.id, method);
  Index visual_kept = 0;
  const auto kinds = kinds_of(p);
  for (Index l = 0; l < 3; ++l) {
    const auto kept = fed.cache.kept(fed.id, l, 0);
    EXPECT_EQ(kept, fed.cache.kept(fed.id, l, 1)) << "one choice per layer";
    Positions text_kept;
    for (const Position t : kept) {
      if (kinds[static_cast<std::size_t>(t)] == oracle::TokenKind::text)
        text_kept.push_back(t);
      else
        ++visual_kept;
    }
    EXPECT_EQ(text_kept, text_rows(p));
    EXPECT_EQ(static_cast<Index>(kept.size() - text_kept.size()), report.layer_budgets[static_cast<std::size_t>(l)]);
  }
  EXPECT_EQ(visual_kept, oracle::total_tokens(0.3, {76, 76, 76})) << "of all visual tokens ever given";
}

// ---- waits

TEST(Waits, AtMostOneInCompressAndNoneElsewhere) {
  waits_at_most_once(full());
  waits_at_most_once(random_choice());
  waits_at_most_once(streaming_llm());
  waits_at_most_once(h2o());
  waits_at_most_once(snap_kv());
  waits_at_most_once(tova());
  waits_at_most_once(key_norm());
  waits_at_most_once(key_diff());
  waits_at_most_once(pyramid_kv());
  waits_at_most_once(ada_kv());
  waits_at_most_once(air_cache());
  waits_at_most_once(csp());
  waits_at_most_once(lag_kv());
  waits_at_most_once(expected_attention());
}

TEST(Memory, EverythingIsGivenBack) {
  WalledBackend be;
  {
    const Prompt p = random_prompt(61, 2, 90, 2, 2, {span(5, 60)});
    FedCache<WalledBackend> fed(be, p);
    fed.feed(air_cache(), 0, 90);
    fed.cache.compress(fed.id, air_cache());
    EXPECT_GT(be.allocations(), 0);
  }
  EXPECT_EQ(be.allocations(), 0);
}

// ---- budgets

std::vector<Index> allocate(const auto& allocator, const std::vector<LayerSummary>& layers,
                            const std::vector<Index>& available, Index total) {
  std::vector<double> scratch(available.size());
  std::vector<Index> keep(available.size());
  allocator.allocate(layers.data(), available.data(), static_cast<Index>(available.size()), total, scratch.data(),
                     keep.data());
  return keep;
}

TEST(Budgets, AreTheTextbooksAndExact) {
  Dice dice{70};
  for (int round = 0; round < 20000; ++round) {
    const Index n = 1 + dice.below(round % 3 == 0 ? 40 : 6);
    std::vector<LayerSummary> layers;
    std::vector<double> strength, skewness;
    std::vector<Index> available;
    const bool odd = dice.chance(0.5);  // zeros, negatives, layers of few tokens
    Index sum = 0;
    for (Index l = 0; l < n; ++l) {
      available.push_back(odd ? dice.below(6) * dice.below(9) : 100);
      strength.push_back(available.back() == 0 || (odd && dice.chance(0.2))
                             ? 0
                             : std::ldexp(dice.unit(), static_cast<int>(dice.below(8))));
      skewness.push_back(available.back() < 3 ? 0 : 3 * dice.symmetric() + (odd ? 0 : 2));
      layers.push_back({strength.back(), skewness.back(), available.back()});
      sum += available.back();
    }
    const Index total = dice.within(0, sum + 3), least = dice.below(4);
    const bool use_strength = dice.chance(0.7), use_skewness = !use_strength || dice.chance(0.7);
    const StrengthSkewness policy{.use = use_strength && use_skewness ? BudgetUse::both
                                         : use_strength               ? BudgetUse::strength
                                                                      : BudgetUse::skewness,
                                  .least = least,
                                  .layer_floor = 0.25 * static_cast<double>(dice.below(5))};
    const auto got = allocate(policy, layers, available, total);
    const auto wanted = oracle::strength_skewness_budgets(strength, skewness, available, total,
                                                          {.use_strength = use_strength,
                                                           .use_skewness = use_skewness,
                                                           .lowest = least,
                                                           .even_share = policy.layer_floor});
    ASSERT_EQ(got, wanted) << "round " << round << ", total " << total << ", least " << least;
    ASSERT_EQ(std::accumulate(got.begin(), got.end(), Index{0}), std::min(total, sum));
    ASSERT_EQ(allocate(Uniform{}, layers, available, total), oracle::uniform_budgets(total, available))
        << "round " << round;
  }
}

TEST(Budgets, PyramidsAreTheTextbooks) {
  Dice dice{71};
  for (int round = 0; round < 20000; ++round) {
    const Index layers = dice.within(2, 40), tokens = dice.within(0, 500);
    const Pyramid rule{.beta = static_cast<double>(dice.within(1, 40)),
                       .window = dice.chance(0.2) ? 0 : dice.below(70),
                       .mode = dice.chance(0.5) ? Mode::paper : Mode::reference};
    const std::vector<Index> available(static_cast<std::size_t>(layers), tokens);
    const Index total = dice.within(0, layers * tokens);
    const auto got = allocate(rule, {}, available, total);
    ASSERT_EQ(got, pyramid_budgets(rule, layers, total, tokens))
        << "round " << round << ": " << layers << " layers of " << tokens << ", total " << total << ", beta "
        << rule.beta << ", window " << rule.window << (rule.mode == Mode::paper ? ", paper" : ", reference");
    if (rule.mode == Mode::paper) {
      ASSERT_EQ(std::accumulate(got.begin(), got.end(), Index{0}), total) << "round " << round;
    }
  }
}

/// Layers that hold different numbers of tokens: no oracle, but laws.
TEST(Budgets, PyramidsOfRaggedLayersAreExactAndFall) {
  Dice dice{72};
  for (int round = 0; round < 20000; ++round) {
    const Index layers = dice.within(1, 12);
    const Pyramid rule{.beta = 1 + 30 * dice.unit(), .window = dice.below(20)};
    std::vector<Index> available;
    for (Index l = 0; l < layers; ++l) available.push_back(dice.below(100));
    const Index all = std::accumulate(available.begin(), available.end(), Index{0}), total = dice.within(0, all + 5);
    const auto got = allocate(rule, {}, available, total);
    ASSERT_EQ(std::accumulate(got.begin(), got.end(), Index{0}), std::min(total, all)) << "round " << round;
    Index before = std::numeric_limits<Index>::max();
    for (std::size_t l = 0; l < got.size(); ++l) {
      ASSERT_TRUE(0 <= got[l] && got[l] <= available[l]) << "round " << round << " layer " << l;
      if (got[l] == available[l]) continue;
      ASSERT_LE(got[l], before) << "round " << round << " layer " << l
                                << ": more than the one below, though that had room";
      before = got[l];
    }
  }
}

TEST(Budgets, SurviveBadNumbers) {
  const double nan = std::numeric_limits<double>::quiet_NaN(), inf = std::numeric_limits<double>::infinity();
  for (const double bad : {nan, inf, -inf, -1.0, 1e300, 1e-320}) {
    const auto keep = allocate(StrengthSkewness{}, {{bad, 1, 10}, {1, bad, 10}, {1, 1, 10}}, {10, 10, 10}, 12);
    EXPECT_EQ(keep[0] + keep[1] + keep[2], 12) << bad;
    for (const Index k : keep) EXPECT_TRUE(0 <= k && k <= 10) << bad;
  }
  EXPECT_EQ(allocate(Uniform{}, {}, {}, 5), std::vector<Index>{});
  EXPECT_EQ(allocate(Uniform{}, {{}, {}}, {3, 3}, -2), (std::vector<Index>{0, 0}));
}

// ---- the choice itself, from scores that are known exactly

TYPED_TEST(Policies, TheChoiceIsExact) {
  Dice dice{80};
  for (int round = 0; round < 100; ++round) {
    const Index layers = 1 + dice.below(3), heads = 1 + dice.below(3), tokens = dice.within(1, 90),
                page = Index{16} << dice.below(3);
    std::vector<TagSpan> tags{span(static_cast<Position>(dice.below(20)), static_cast<Position>(20 + dice.below(60)))};
    if (dice.chance(0.5))
      tags.push_back(span(static_cast<Position>(dice.below(30)), static_cast<Position>(30 + dice.below(10)),
                          TokenClass::image, true));
    if (dice.chance(0.3)) tags.push_back(span(60, 64, TokenClass::system, true));
    const Prompt p = random_prompt(1, layers, tokens, heads, 1, tags, 4);
    FedCache<typename TestFixture::B> fed(this->be(), p, page);
    fed.append(0, tokens);

    Compressor<Scripted, Uniform> method{
        {dice.at},
        {},
        {.among = dice.chance(0.5) ? all_tokens : visual,
         .heads = static_cast<SelectHeads>(dice.below(3)),
         .recent_share = dice.chance(0.5) ? 0 : dice.unit(),
         .floor = dice.chance(0.2) ? 1 : dice.unit()},
        dice.chance(0.5) ? Keep::ratio(dice.unit()) : Keep::tokens(dice.below(layers * tokens + 5))};
    if (method.selector.heads == SelectHeads::shared && method.selector.recent_share == 0 && dice.chance(0.5))
      method.selector.mode = Mode::reference;
    std::vector<bool> member, reserved;
    for (Position t = 0; t < tokens; ++t) {
      const TagSpan* tag = fed.cache.tags(fed.id).find(t);
      member.push_back(method.selector.among.has(tag ? tag->token_class : TokenClass::text));
      reserved.push_back(member.back() && tag && tag->is_protected);
    }
    const Index members = std::count(member.begin(), member.end(), true),
                stay = std::count(reserved.begin(), reserved.end(), true);
    const std::vector<Index> candidates(static_cast<std::size_t>(layers), members);
    const Index total = method.keep.unit == Keep::Unit::ratio ? oracle::total_tokens(method.keep.amount, candidates)
                                                              : static_cast<Index>(method.keep.amount);
    const auto budgets = oracle::uniform_budgets(total, candidates);

    const Plan plan = fed.cache.plan(fed.id, method);
    const auto report = fed.cache.commit(plan);
    Index nans = 0;
    for (Index l = 0; l < layers; ++l) {
      std::vector<std::vector<double>> scores(static_cast<std::size_t>(heads));
      std::vector<bool> candidate;
      for (Position t = 0; t < tokens; ++t)
        candidate.push_back(member[static_cast<std::size_t>(t)] && !reserved[static_cast<std::size_t>(t)]);
      oracle::Array2 of_layer(heads, tokens);
      for (Index h = 0; h < heads; ++h)
        for (Position t = 0; t < tokens; ++t) {
          float x = Scripted::of(method.scorer.seed, l, h, t);
          if (method.selector.heads == SelectHeads::layer) {
            x = 0;
            for (Index other = 0; other < heads; ++other) x += Scripted::of(method.scorer.seed, l, other, t);
            x /= static_cast<float>(heads);
          }
          scores[static_cast<std::size_t>(h)].push_back(static_cast<double>(x));
          of_layer.at(h, t) = static_cast<double>(x);
          nans += candidate[static_cast<std::size_t>(t)] && std::isnan(x);
        }
      const Index even_k = std::max<Index>(0, budgets[static_cast<std::size_t>(l)] - stay);
      std::vector<Index> k(static_cast<std::size_t>(heads), even_k);
      if (method.selector.heads == SelectHeads::shared) {
        const std::vector<std::vector<bool>> up(static_cast<std::size_t>(heads), candidate);
        const std::vector<Index> there(static_cast<std::size_t>(heads), members - stay);
        const auto hits = oracle::hits_per_head(of_layer, heads * even_k, up);
        if (method.selector.mode == Mode::paper)
          k = oracle::ada_kv_exact(hits, even_k, method.selector.floor, there);
        else if (even_k < members - stay)
          k = oracle::ada_kv_published(hits, even_k, method.selector.floor);
      }
      for (Index h = 0; h < heads; ++h) {
        std::vector<double>& of_head = scores[static_cast<std::size_t>(h)];
        Index newest =
            static_cast<Index>(method.selector.recent_share * static_cast<double>(oracle::item(k, h)) + 1e-9);
        for (Position t = static_cast<Position>(tokens - 1); t >= 0 && newest > 0; --t)
          if (candidate[static_cast<std::size_t>(t)]) of_head[static_cast<std::size_t>(t)] = 1000, --newest;
        Positions wanted = to_positions(oracle::select_top(of_head, oracle::item(k, h), candidate));
        for (Position t = 0; t < tokens; ++t)
          if (!candidate[static_cast<std::size_t>(t)]) wanted.push_back(t);
        std::sort(wanted.begin(), wanted.end());
        ASSERT_EQ(fed.cache.kept(fed.id, l, h), wanted)
            << "round " << round << ", layer " << l << ", head " << h << ", k " << oracle::item(k, h);
        ASSERT_EQ(report.layer_budgets[static_cast<std::size_t>(l)], budgets[static_cast<std::size_t>(l)]);
      }
    }
    if (method.selector.recent_share == 0 && method.keep != Keep::ratio(1)) {
      EXPECT_EQ(report.nan_scores, nans) << "round " << round;
    }
  }
}

TYPED_TEST(Policies, PagesAndBytesAreNeverExceeded) {
  Dice dice{81};
  for (int round = 0; round < 40; ++round) {
    const Index layers = 1 + dice.below(3), heads = 1 + dice.below(2), tokens = dice.within(1, 300),
                page = Index{16} << dice.below(3);
    const Prompt p = random_prompt(1, layers, tokens, heads, 1, {}, 4);
    FedCache<typename TestFixture::B> fed(this->be(), p, page);
    fed.append(0, tokens);
    const Index page_bytes = fed.cache.stats(fed.id).page_bytes / fed.cache.stats(fed.id).pages;
    const Index pages = dice.below(layers * ceil_div(tokens, page) + 2),
                bytes = dice.below((layers * ceil_div(tokens, page) + 2) * heads * page_bytes);
    const bool in_pages = dice.chance(0.5);
    const Compressor<Scripted, Uniform> method{{dice.at}, {}, {}, in_pages ? Keep::pages(pages) : Keep::bytes(bytes)};
    fed.cache.compress(fed.id, method);
    const auto stats = fed.cache.stats(fed.id);
    if (in_pages) {
      EXPECT_LE(stats.pages, pages * heads) << "round " << round;
    } else {
      EXPECT_LE(stats.page_bytes, bytes) << "round " << round;
    }
    // Nothing is thrown away that would have fitted: at least the whole pages granted are used.
    const Index granted = in_pages ? pages : bytes / (page_bytes * heads);
    EXPECT_GE(stats.live_tokens, std::min(granted * page, layers * tokens) * heads - layers * heads * page)
        << "round " << round;
  }
}

TYPED_TEST(Policies, TokensWithoutAScoreStay) {
  // 20 tokens fill a page of 16 and a part of the next; five more arrive after the last observation.
  const Prompt p = random_prompt(90, 2, 25, 2, 1, {});
  auto method = snap_kv();
  method.scorer.window = 2;
  method.keep = Keep::tokens(2 * 8);
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.feed(method, 0, 20);
  fed.append(20, 5);
  fed.cache.compress(fed.id, method);
  for (const Index l : {0, 1})
    for (const Index h : {0, 1}) {
      const auto kept = fed.cache.kept(fed.id, l, h);
      ASSERT_EQ(kept.size(), 8u);
      EXPECT_EQ(Positions(kept.end() - 7, kept.end()), (Positions{18, 19, 20, 21, 22, 23, 24}))
          << "five without a score, and the window";
    }
}

TYPED_TEST(Policies, LayersThatAreNotCompressedStay) {
  Prompt p = random_prompt(91, 3, 40, 2, 1, {});
  p.model.layers[1].compress = false;
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.feed(snap_kv(), 0, 40);
  const auto report = fed.cache.compress(fed.id, snap_kv());
  EXPECT_EQ(report.layer_budgets[1], -1);
  EXPECT_EQ(fed.cache.kept(fed.id, 1, 0).size(), 40u);
  EXPECT_EQ(fed.cache.kept(fed.id, 0, 0).size(), 8u);
}

TYPED_TEST(Policies, MistakesAreNamedAndChangeNothing) {
  const Prompt p = random_prompt(92, 2, 40, 2, 1, {});
  FedCache<typename TestFixture::B> fed(this->be(), p);
  fed.append(0, 40);
  const auto says = [&](const std::string& words, auto&& call) {
    const std::string said = error_of(call);
    EXPECT_NE(said.find(words), std::string::npos) << said;
  };
  says("layer 0 was not observed", [&] { fed.cache.compress(fed.id, snap_kv()); });
  says("must be odd", [&] { fed.observe(Compressor{ObservationWindow{.pool = 4}, Uniform{}}, 0, 40); });
  fed.observe(snap_kv(), 0, 40);
  says("by another policy", [&] { fed.cache.compress(fed.id, h2o()); });
  says("by another policy", [&] { fed.observe(air_cache(), 0, 40); });
  says("holds no such token", [&] {
    fed.cache.observe(fed.id, 0, snap_kv(), fed.queries(0, 0, 2), Positions{39, 40});
  });
  auto wrong = snap_kv();
  wrong.keep = Keep::ratio(1.5);
  says("ratio must be within [0, 1]", [&] { fed.cache.compress(fed.id, wrong); });
  const Plan plan = fed.cache.plan(fed.id, snap_kv());
  fed.cache.tag(fed.id, span(0, 1, TokenClass::system, true));
  says("stale", [&] { fed.cache.commit(plan); });
  EXPECT_EQ(fed.cache.kept(fed.id, 0, 0).size(), 40u);
}

}  // namespace
}  // namespace kvpare::test

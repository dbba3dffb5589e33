// What a policy is. Each part is a plain value: settings as public members, `name`, `fields()`, comparable, stateless.
//
// | expression                              | gives   | promises                                                     |
// |-----------------------------------------|---------|--------------------------------------------------------------|
// | `P::name`, `P::fields()`                |         | the settings by name, for parsing, printing and tables       |
// | **Scorer** `s.reads()`                  | `Reads` | only the rows, or the features, it names are supplied        |
// | `score(be, s, seen, out)`               | –       | writes (streaming: adds to) every `out(h, column)`           |
// |                                         |         | Where it reads features: one row, a column per token of      |
// |                                         |         | `seen.features`; called once, the layers share the scores    |
// | `s.check_layer(shape, layer)`           | –       | optional: throws where it cannot score such a layer          |
// | `S::measures_density`                   | `bool`  | where true, `score` writes `out.density`                     |
// | `take_step(be, s, row)`                 | –       | optional: carries scores on over a decode step               |
// | **BudgetAllocator** `a.needs`           | `BudgetNeeds` | what of `layers` below is filled                       |
// | `a.allocate(layers, available, n, total, scratch, keep)` | – | `keep[l]` tokens per layer, summing to `total`     |
// |                                         |         | clamped to what is available. Runs on the backend as one     |
// |                                         |         | call: KVPARE_HD, no memory but n doubles of scratch          |
// | `a.check_layers(n)`                     | –       | optional: throws where it does not go with so many layers    |
// | `A::follows_compress`                   | `bool`  | where true, decode takes the ratio that compress left        |
// | `s.scores_budgets()`                    | `bool`  | optional: a score is minus the budget from which on a token  |
// |                                         |         | stays; below that it goes even where there is room           |
// | **any** `p.mode`, `p.has_reference()`   | `Mode`, `bool` | optional: goes the way of published code; does it    |
// |                                         |         | with these settings have one of its own                      |
// | **Selector** `s.among`, `s.heads`, …    |         | see TopK: the selector is data, the pipeline carries it out  |
//
// The smallest scorer:
//
//   struct Oldest {
//     static constexpr std::string_view name = "oldest";
//     static constexpr auto fields() { return std::tuple{}; }
//     constexpr Reads reads() const { return {}; }
//     friend bool operator==(const Oldest&, const Oldest&) = default;
//   };
//   template <Backend B>
//   void score(B& be, const Oldest&, const Observation<B>&, Scores out) {
//     be.each(out.heads * out.columns, OldestFirst{out});   // OldestFirst: a KVPARE_HD functor
//   }
#pragma once

#include <concepts>
#include <string_view>

#include "../core/field.hpp"
#include "observation.hpp"

namespace kvpare {

/// Whose rule where published code departs from its paper, or both miss the budget: `paper` is the paper's, or that rule
/// mended, and keeps to the budget; `reference` is what the code does, for comparisons with its results, and may miss the
/// budget on either side: each says how. No more stays than there is.
enum class Mode : std::uint8_t { paper, reference };
inline constexpr std::string_view choices(Mode*) { return "paper|reference"; }

template <class P>
concept Policy = std::regular<P> && requires {
  { P::name } -> std::convertible_to<std::string_view>;
  P::fields();
};

/// Throws unless every number among the settings is within its range, and `policy.check()`, where there is one, agrees.
template <Policy P>
void check_settings(const P& policy) {
  for_each_field<P>([&](const auto& field) {
    if constexpr (requires { field.low; }) {
      const auto& value = policy.*field.member;
      require(field.low <= value && value <= field.high, P::name, ".", field.name, " = ", value, ", must be within [",
              field.low, ", ", field.high, "]");
    }
  });
  if constexpr (requires { policy.check(); }) policy.check();
}

/// Gives every cached token of one layer a score; higher = keep.
template <class S, class B>
concept Scorer = Policy<S> && Backend<B> && requires(B& be, const S& s, const Observation<B>& seen, Scores out) {
  { s.reads() } -> std::same_as<Reads>;
  { score(be, s, seen, out) } -> std::same_as<void>;
};

/// Throws where a scorer cannot score a layer of such a shape.
template <class S>
void check_layer_of(const S& scorer, const LayerShape& shape, Index layer) {
  if constexpr (requires { scorer.check_layer(shape, layer); }) scorer.check_layer(shape, layer);
}

/// What an allocator asks of the layers; what nobody asks for is not computed.
struct BudgetNeeds {
  bool summary = false;  // sum and skewness
  bool curve = false;
  bool density = false;  // of a scorer that measures it
  constexpr bool any() const { return summary || curve || density; }
};

/// What an allocator sees of one layer: its candidates' scores, averaged over the kv heads.
struct LayerSummary {
  double sum = 0, skewness = 0;
  Index count = 0;
  const double* curve = nullptr;  // [count] running sums of the scores in descending order, of tokens that stay anyway as well;
                                  // NaN count as 0
  double density = 0;             // share of the layer's attention entries that count
  Index stays = 0;                // tokens that stay whatever their score
  double recent_share = 0;        // of the budget: what the selector gives to the newest tokens
};

/// With mode = reference: the newest tokens that a share of the mean budget is, at least one; as many in every layer.
KVPARE_HD constexpr Index newest_of_mean(double share, Index total, Index layers) {
  if (!(share > 0)) return 0;
  const Index newest = static_cast<Index>(share * static_cast<double>(total) / static_cast<double>(layers));
  return newest > 1 ? newest : 1;
}

/// Does a part ask for the way of published code?
template <class P>
bool asks_reference(const P& part) {
  if constexpr (requires { requires std::same_as<decltype(P::mode), Mode>; })
    return part.mode == Mode::reference;
  else
    return false;
}

/// Is there such a way, with the part's settings?
template <class P>
bool has_reference(const P& part) {
  if constexpr (requires { part.has_reference(); })
    return part.has_reference();
  else
    return false;
}

/// The score of a token that outranks all others by a rule (SnapKV's window), whatever it is attended to; the higher `rank`,
/// which is at least 1, the sooner. Budgets leave such scores out of what they see. The rank is score / first_rank.
inline constexpr float first_rank = 0x1p60f;
constexpr KVPARE_HD float score_of_rank(Index rank) { return first_rank * static_cast<float>(rank); }
/// Is it such a score, or a mean over kv heads of some? Others stay below 2^44.
constexpr KVPARE_HD bool ranks_first(float score) { return score >= 0x1p44f; }

/// Are a scorer's scores budgets, with the minus sign?
template <class S>
bool budgets_scored(const S& scorer) {
  if constexpr (requires { scorer.scores_budgets(); })
    return scorer.scores_budgets();
  else
    return false;
}

/// Throws where a budget does not go with so many layers that take part.
template <class A>
void check_layers_of(const A& budget, Index layers) {
  if constexpr (requires { budget.check_layers(layers); }) budget.check_layers(layers);
}

/// Budgets that go on between decode steps from what `compress` left.
template <class A>
concept FollowsCompress = A::follows_compress;

/// Scorers whose running scores a decode step changes by `take_step`, where others just add the step's attention.
template <class S, class B>
concept TakesSteps = requires(B& be, const S& s, const DecodeRow& row) { take_step(be, s, row); };

/// Scorers that write `Scores::density`.
template <class S>
concept MeasuresDensity = S::measures_density;

/// Splits a total over the layers.
template <class A>
concept BudgetAllocator = Policy<A> && requires(const A& a, const LayerSummary* layers, const Index* available, Index n,
                                                Index total, double* scratch, Index* keep) {
  { a.needs } -> std::convertible_to<BudgetNeeds>;
  { a.allocate(layers, available, n, total, scratch, keep) } -> std::same_as<void>;
};

}  // namespace kvpare

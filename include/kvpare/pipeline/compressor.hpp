// A compression method: who scores, who splits the budget, who chooses, how much stays, and in which form.
#pragma once

#include <string_view>

#include "../policy/contracts.hpp"
#include "../policy/precision/precision.hpp"
#include "../policy/select/keep.hpp"
#include "../policy/select/top_k.hpp"

namespace kvpare {

/// `Compressor{EliteWindow{}, StrengthSkewness{}, TopK{.among = visual}, Keep::ratio(0.1)}` is AirCache at 10 %. A fifth member
/// gives the survivors, or the dropped, a smaller form: see Precision.
template <class S, class A, class L = TopK, class P = Precision>
struct Compressor {
  S scorer = {};
  A budget = {};
  L selector = {};
  Keep keep = {};
  P precision = {};
  friend bool operator==(const Compressor&, const Compressor&) = default;
};
template <class S, class A, class L, class P>
Compressor(S, A, L, Keep, P) -> Compressor<S, A, L, P>;
template <class S, class A, class L>
Compressor(S, A, L, Keep) -> Compressor<S, A, L>;
template <class S, class A, class L>
Compressor(S, A, L) -> Compressor<S, A, L>;
template <class S, class A>
Compressor(S, A) -> Compressor<S, A>;

/// Calls `f` with the policy itself; a choice made at run time (AnyOf) overloads this to call it with what it holds.
template <class P, class F>
decltype(auto) with_policy(const P& policy, F&& f) {
  return f(policy);
}

/// The name of a policy, or of the one that was chosen at run time.
template <class P>
std::string_view policy_name(const P& policy) {
  return with_policy(policy, [](const auto& p) -> std::string_view { return std::remove_cvref_t<decltype(p)>::name; });
}

/// What the budgets of a method want to know of the layers.
template <class A>
BudgetNeeds needs_of(const A& budget) {
  return with_policy(budget, [](const auto& a) { return BudgetNeeds{std::remove_cvref_t<decltype(a)>::needs}; });
}

/// May anything go at `compress`?
template <class C>
bool evicts(const C& compressor) {
  return compressor.keep != Keep::ratio(1) || compressor.selector.only_positive || !compressor.selector.also.empty();
}

/// Throws unless all settings of a method make sense.
template <class C>
  requires requires(const C& c) { c.scorer, c.budget, c.selector, c.keep; }
void check(const C& compressor) {
  check(compressor.keep);
  check_settings(compressor.scorer);
  check_settings(compressor.budget);
  check_settings(compressor.selector);
  if (needs_of(compressor.budget).density)
    require(with_policy(compressor.scorer,
                        [](const auto& s) { return MeasuresDensity<std::remove_cvref_t<decltype(s)>>; }),
            "budget ", policy_name(compressor.budget), " follows how dense the layers' attention is, which scorer ",
            policy_name(compressor.scorer), " does not measure; post_vision does");
  bool asked = false, has_one = false;
  const TopK& selector = compressor.selector;
  const auto look = [&](const auto& part) {
    if (asks_reference(part)) asked = true, has_one = has_one || has_reference(part);
  };
  with_policy(compressor.scorer, look), with_policy(compressor.budget, look), look(compressor.selector);
  require(!asked || has_one,
          "mode = reference: with these settings no published code goes another way, must be paper; it "
          "does in csp, with budget = pyramid, density or prefix, with heads = shared and with represent > 0");
  require(!asked || !selector.splits(),
          "mode = reference does as released code, which knows one budget; each and also must be none");
  require(!asked || selector.mode == Mode::reference || selector.recent_share == 0,
          "mode = reference in a budget or scorer, but the selector, which gives a recent_share to the newest, is in mode = "
          "paper; both must be in one");
  if (selector.granularity == Granularity::page)
    require(!with_policy(compressor.scorer, [](const auto& s) { return budgets_scored(s); }), "granularity = page with ",
            policy_name(compressor.scorer),
            " in mode = reference, whose scores say from which budget on a token stays: pages have no mean of that");
  if constexpr (requires { check_settings(compressor.precision); }) check_settings(compressor.precision);
}

/// The forms that a method asks for, of a model of so many layers. Throws where its settings do not go with them.
template <class C>
Precision precision_of(const C& compressor, Index layers) {
  const Precision p = with_policy(compressor.precision, [&](const auto& policy) { return policy.precision(layers); });
  check(p);
  return p;
}

}  // namespace kvpare

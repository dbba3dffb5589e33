// The selector: the best of one class of tokens, the rest untouched.
#pragma once

#include <string_view>
#include <tuple>

#include "../contracts.hpp"

namespace kvpare {

/// Who chooses: each kv head for itself, from the same budget; all heads of a layer together, by their mean score; or each
/// for itself, from a budget that the heads of a layer share.
enum class SelectHeads : std::uint8_t { kv, layer, shared };
inline constexpr std::string_view choices(SelectHeads*) { return "kv|layer|shared"; }

/// Keeps, per kv head, the `k` best-scored tokens among some classes; everything else stays as it is.
///
/// The budget counts all tokens of those classes. Protected ones take their part of it first (and stay even if there are
/// more of them than the budget allows), then the newest `recent_share` of what is left, then the best by score.
/// Tokens that have no score yet (appended after the last observation) count as protected, and so do the `first` oldest and
/// the `last` newest of those classes.
/// Rules    with only_positive, tokens whose score is not above 0 go even where the budget has room: the way of methods
///          whose scorer decides by a rule of its own (ZipVL); the budget is then a bound
/// Shared   with heads = shared a head's budget is B_h = c_h (1 - floor) + B floor, apportioned so that a layer's budgets
///          sum to what they would be if they were even: B is the even budget, c_h how many of the layer's best heads * B
///          scores are head h's. Ties there go to the lower head, and between equal remainders as well. Heads then differ
///          in length, and their pages are freed. Ada-KV (Feng et al. 2024, arXiv 2407.11550), algorithm 1; the released
///          code rounds each B_h for itself and may miss the sum. `recent_share` is of each head's own B_h
/// Ties     to the lower position; NaN scores rank last and are counted
/// Cost     that of `select_top`, plus one mean over heads with heads = layer, twice that with heads = shared
struct TopK {
  static constexpr std::string_view name = "top_k";

  ClassSet among = all_tokens;  // up for eviction, and counted by the budget
  SelectHeads heads = SelectHeads::kv;
  double recent_share = 0;  // share of the budget that goes to the newest tokens
  double floor = 0.2;       // with heads = shared: share of the even budget that every head keeps
  Index first = 0, last = 0;   // so many of the oldest and of the newest tokens stay anyway, within the budget
  bool only_positive = false;  // tokens whose score is not above 0 go even where there is room

  static constexpr auto fields() {
    return std::tuple{Choice{"among", &TopK::among, "classes up for eviction, counted by the budget"},
                      Choice{"heads", &TopK::heads,
                             "who chooses: each kv head, all of a layer together, or each from a shared budget"},
                      Field<TopK, double>{"recent_share", &TopK::recent_share, 0.0, 1.0,
                                          "share of the budget that goes to the newest tokens"},
                      Field<TopK, double>{"floor", &TopK::floor, 0.0, 1.0,
                                          "with heads = shared: share of the even budget that every head keeps"},
                      Field<TopK, Index>{"first", &TopK::first, 0, 1 << 20, "oldest tokens that stay anyway"},
                      Field<TopK, Index>{"last", &TopK::last, 0, 1 << 20, "newest tokens that stay anyway"},
                      Choice{"only_positive", &TopK::only_positive,
                             "tokens whose score is not above 0 go even where there is room"}};
  }
  friend bool operator==(const TopK&, const TopK&) = default;
};

static_assert(Policy<TopK>);

}  // namespace kvpare

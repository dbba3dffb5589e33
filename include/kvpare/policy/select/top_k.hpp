// The selector: the best of one class of tokens, the rest untouched.
#pragma once

#include <string_view>
#include <tuple>

#include "../contracts.hpp"

namespace kvpare {

/// Whether the kv heads of a layer choose each for itself or together (by their mean score).
enum class SelectHeads : std::uint8_t { kv, layer };
inline constexpr std::string_view choices(SelectHeads*) { return "kv|layer"; }

/// Keeps, per kv head, the `k` best-scored tokens among some classes; everything else stays as it is.
///
/// The budget counts all tokens of those classes. Protected ones take their part of it first (and stay even if there are
/// more of them than the budget allows), then the newest `recent_share` of what is left, then the best by score.
/// Tokens that have no score yet (appended after the last observation) count as protected.
/// Ties     to the lower position; NaN scores rank last and are counted
/// Cost     that of `select_top`, plus one mean over heads with heads = layer
struct TopK {
  static constexpr std::string_view name = "top_k";

  ClassSet among = all_tokens;  // up for eviction, and counted by the budget
  SelectHeads heads = SelectHeads::kv;
  double recent_share = 0;  // share of the budget that goes to the newest tokens

  static constexpr auto fields() {
    return std::tuple{Choice{"among", &TopK::among, "classes up for eviction, counted by the budget"},
                      Choice{"heads", &TopK::heads, "who chooses: each kv head, or all heads of a layer together"},
                      Field<TopK, double>{"recent_share", &TopK::recent_share, 0.0, 1.0,
                                          "share of the budget that goes to the newest tokens"}};
  }
  friend bool operator==(const TopK&, const TopK&) = default;
};

static_assert(Policy<TopK>);

}  // namespace kvpare

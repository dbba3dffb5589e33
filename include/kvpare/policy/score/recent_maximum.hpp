// The most attention that a token has received of late: what QAQ foretells coming attention by.
#pragma once

#include <algorithm>
#include <limits>
#include <string_view>
#include <tuple>

#include "../contracts.hpp"

namespace kvpare {

/// Formula  score[h, j] = max over the newest `rows` query rows and the query heads of kv head h of softmax(q_r K^T)[j];
///          1 for tokens that came after the first of these rows: nobody knows them yet. Never below `least`, so that 0
///          is said of tokens that no row has seen at all
/// Decode   a step's attention joins by the maximum. Whenever `every` divides the number of positions so far, the maximum
///          is of exactly `rows` rows: it begins anew with the first of them; where that is one of a prompt's, it goes on
///          from the prompt's maximum. Tokens that come later than its first row have 1 until it begins again
/// Shapes   query rows [rows, q_heads, key_dim], keys through pages -> scores [kv_heads, columns]
/// Ties     none made here; a NaN logit makes its row NaN, which no maximum takes up
/// Cost     one product of `rows` rows and the keys. A chunk of fewer rows joins what is there by the maximum
/// Source   QAQ (Dong et al. 2024, arXiv 2403.04643), section 4.2. Ours: the query heads of a kv head join by the maximum;
///          the window between decode steps is exact only where widths are decided
struct RecentMaximum {
  static constexpr std::string_view name = "recent_maximum";
  static constexpr float least = std::numeric_limits<float>::min();  // of a token that some row has seen

  Index rows = 5;    // newest query rows
  Index every = 16;  // decode steps from one decision to the next

  static constexpr auto fields() {
    return std::tuple{Field<RecentMaximum, Index>{"rows", &RecentMaximum::rows, 1, 64, "newest query rows that count"},
                      Field<RecentMaximum, Index>{"every", &RecentMaximum::every, 1, 1 << 20,
                                                  "decode steps from one decision to the next, at least `rows`"}};
  }
  void check() const { require(every >= rows, name, ".every = ", every, ", must be at least rows = ", rows); }
  constexpr Reads reads() const { return {.rows = Reads::Rows::all, .streams = true, .attention = true}; }
  friend bool operator==(const RecentMaximum&, const RecentMaximum&) = default;
};

namespace detail {

/// One token of one kv head per call.
struct JoinRecent {
  const float* largest;       // [q_heads, columns]
  const Position* positions;  // [columns]
  Position first_row;         // tokens after it are not seen by all rows
  Index group, columns;
  bool takes_over;  // what was known before no longer counts
  float* scores;    // [kv_heads, columns]
  KVPARE_HD void operator()(Index i) const {
    const Index head = i / columns, column = i % columns;
    float most = RecentMaximum::least;
    for (Index g = 0; g < group; ++g) {
      const float a = largest[(head * group + g) * columns + column];
      if (a > most) most = a;
    }
    const float before = scores[i];
    const bool unknown = positions[column] > first_row || (!takes_over && before == 0);
    scores[i] = unknown ? 1.0f : !takes_over && before > most ? before : most;
  }
};

/// One slot of one kv head per call.
struct JoinStep {
  const float* attention;  // [kv_heads, slots]
  float* scores;
  const Index* position;  // [kv_heads] + 1
  Index slots, rows, every;
  KVPARE_HD void operator()(Index i) const {
    const bool begins = position[i / slots] % every == (every - rows + 1) % every;
    const float before = scores[i];
    float most = RecentMaximum::least;
    if (attention[i] > most) most = attention[i];
    scores[i] = begins ? most : before == 0 ? 1.0f : before > most ? before : most;
  }
};

}  // namespace detail

template <Backend B>
void score(B& be, const RecentMaximum& policy, const Observation<B>& all, Scores out) {
  if (all.rows() == 0) return;
  const Index count = std::min(policy.rows, all.rows()), q_heads = all.shape->q_heads;
  const Observation<B> seen = newest_rows(all, count);
  const Buffer<B, const Position> positions(be, std::span<const Position>(seen.columns->positions));
  const Buffer<B, float> largest(be, q_heads * out.columns);
  fill(be, largest.data(), largest.size(), 0.0f);
  const ObservedKeys<B> keys(be, seen);
  auto mass = keys.attention(seen);
  mass.heads = HeadGroups::query_head, mass.take_max = true;
  mass.out = largest.data();
  be.attention_mass(mass);
  be.each(out.heads * out.columns,
          detail::JoinRecent{largest.data(), positions.data(), seen.row_positions.front(), seen.shape->group(),
                             out.columns, count == policy.rows, out.data});
}

template <Backend B>
void take_step(B& be, const RecentMaximum& policy, const DecodeRow& row) {
  be.each(row.heads * row.slots,
          detail::JoinStep{row.attention, row.scores, row.position, row.slots, policy.rows, policy.every});
}

}  // namespace kvpare

// The most attention that a token has received of late: what QAQ foretells coming attention by.
#pragma once

#include <algorithm>
#include <string_view>
#include <tuple>
#include <vector>

#include "../contracts.hpp"

namespace kvpare {

/// Formula  score[h, j] = max over the newest `rows` query rows and the query heads of kv head h of softmax(q_r K^T)[j]; 1 for
///          tokens that fewer of these rows have seen: nobody knows them yet
/// Decode   a step's attention joins by the maximum. At positions that `every` divides the maximum begins anew, from the rows
///          on that make `rows` of them before the next such position; so there it is of exactly `rows` rows
/// Shapes   query rows [rows, q_heads, key_dim], keys through pages -> scores [kv_heads, columns]
/// Ties     none made here; a NaN logit makes its row NaN, which no maximum takes up
/// Cost     one product of `rows` rows and the keys. A chunk of fewer rows joins what is there by the maximum
/// Source   QAQ (Dong et al. 2024, arXiv 2403.04643), section 4.2. Ours: the query heads of a kv head join by the maximum; the
///          window between decode steps is exact only where widths are decided
struct RecentMaximum {
  static constexpr std::string_view name = "recent_maximum";

  Index rows = 5;    // newest query rows
  Index every = 16;  // decode steps from one decision to the next

  static constexpr auto fields() {
    return std::tuple{Field<RecentMaximum, Index>{"rows", &RecentMaximum::rows, 1, 64, "newest query rows that count"},
                      Field<RecentMaximum, Index>{"every", &RecentMaximum::every, 1, 1 << 20,
                                                  "decode steps from one decision to the next, at least `rows`"}};
  }
  void check() const {
    require(every >= rows, name, ".every = ", every, ", must be at least rows = ", rows);
  }
  constexpr Reads reads() const { return {.rows = Reads::Rows::all, .streams = true, .attention = true}; }
  friend bool operator==(const RecentMaximum&, const RecentMaximum&) = default;
};

namespace detail {

/// One token of one kv head per call.
struct JoinRecent {
  const float *largest, *seen;  // [q_heads, columns], [kv_heads, columns] rows that see the token
  Index group, columns;
  float rows;       // that could have
  bool takes_over;  // what was known before no longer counts
  float* scores;    // [kv_heads, columns]
  KVPARE_HD void operator()(Index i) const {
    const Index head = i / columns, column = i % columns;
    float most = takes_over ? 0.0f : scores[i];
    for (Index g = 0; g < group; ++g) {
      const float a = largest[(head * group + g) * columns + column];
      if (a > most) most = a;
    }
    scores[i] = seen[i] < rows && takes_over ? 1.0f : most;
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
    const float so_far = begins ? 0.0f : scores[i];
    scores[i] = attention[i] > so_far ? attention[i] : so_far;
  }
};

}  // namespace detail

template <Backend B>
void score(B& be, const RecentMaximum& policy, const Observation<B>& seen, Scores out) {
  if (seen.rows() == 0) return;
  const Index count = std::min(policy.rows, seen.rows()), q_heads = seen.shape->q_heads;
  std::vector<Index> newest;
  for (Index r = seen.rows() - count; r < seen.rows(); ++r) newest.push_back(r);
  const Buffer<B, Index> rows(be, newest), total(be, std::span(&count, 1));
  const Buffer<B, float> largest(be, q_heads * out.columns), seen_by(be, out.heads * out.columns);
  fill(be, largest.data(), largest.size(), 0.0f);
  fill(be, seen_by.data(), seen_by.size(), 0.0f);
  const ObservedKeys<B> keys(be, seen);
  auto mass = keys.attention(seen);
  mass.row_list = rows.data(), mass.row_count = total.data();
  mass.heads = HeadGroups::query_head, mass.take_max = true;
  mass.out = largest.data(), mass.seen = seen_by.data();
  be.attention_mass(mass);
  be.each(out.heads * out.columns,
          detail::JoinRecent{largest.data(), seen_by.data(), seen.shape->group(), out.columns,
                             static_cast<float>(count), count == policy.rows, out.data});
}

template <Backend B>
void take_step(B& be, const RecentMaximum& policy, const DecodeRow& row) {
  be.each(row.heads * row.slots,
          detail::JoinStep{row.attention, row.scores, row.position, row.slots, policy.rows, policy.every});
}

}  // namespace kvpare

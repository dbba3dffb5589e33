// CORM's rule: a token stays while any of the last query rows found it important.
#pragma once

#include <algorithm>
#include <string_view>
#include <tuple>
#include <vector>

#include "../contracts.hpp"

namespace kvpare {

/// What a row's attention is compared with: 1 / (tokens the row sees in that head), or 1 / (its position + 1).
enum class FairShare : std::uint8_t { keys, position };
inline constexpr std::string_view choices(FairShare*) { return "keys|position"; }

/// Scores a token by how many more rows it lives without being important; below 0 it goes. For selectors with
/// `only_positive`, at compress and between decode steps.
///
/// Formula  token j is important to row t in kv head h where max over the head's query heads of A[t, j] >= 1 / n_t
///          score[h, j] = w - 1/2 - (t - the last row that j was important to); a token that never was counts from the row
///          before the first that saw it. So it falls below 0 once w rows in a row found it minor
/// Shapes   every query row [rows, q_heads, key_dim], keys through pages -> scores [kv_heads, columns], carried on
/// Ties     attention equal to the share is important. A NaN logit makes its row find nothing important
/// Cost     the last w rows of each observation over all keys: what was important before them has gone by then. At decode
///          nothing but the attention that `attend` has anyway
/// Source   CORM (Dai et al., arXiv 2404.15949), section 4. Ours: any query head of the group counts (the paper has no groups),
///          all rows of a prompt are rows of the rule, and tokens go once at its end. The r newest tokens, that stay anyway,
///          are the selector's `last`
struct RecentMessage {
  static constexpr std::string_view name = "recent_message";

  Index w = 256;                      // rows that a token lives without being important
  FairShare share = FairShare::keys;  // what is important

  static constexpr auto fields() {
    return std::tuple{Field<RecentMessage, Index>{"w", &RecentMessage::w, 1, 1 << 20,
                                                  "rows that a token lives without being important"},
                      Choice{"share", &RecentMessage::share, "important is what has more than 1 / these"}};
  }
  constexpr Reads reads() const { return {.rows = Reads::Rows::all, .streams = true, .attention = true}; }
  friend bool operator==(const RecentMessage&, const RecentMessage&) = default;
};

namespace detail {

/// Of an entry: its row's number, from 1, where it is important.
struct ImportantRow {
  const float* share;  // [rows]
  Index before;        // rows that are not looked at
  KVPARE_HD float operator()(float p, Index row, Index) const {
    return p >= share[row] ? static_cast<float>(before + row + 1) : 0.0f;
  }
};

/// `rows` rows on. A score of 0 is of a token that no row has seen before; no other score is a whole number.
struct LiveOn {
  const float* last;              // [q_heads, columns] number of the last row that it was important to, 0 = none
  const std::int32_t* first_row;  // [columns] the first of the rows that sees it
  Index columns, group, rows, w;
  float* score;  // [kv_heads, columns]
  KVPARE_HD void operator()(Index i) const {
    const Index head = i / columns, column = i % columns;
    float at = 0;
    for (Index q = head * group; q < (head + 1) * group; ++q)
      if (last[q * columns + column] > at) at = last[q * columns + column];
    const float life = static_cast<float>(w) - 0.5f, passed = static_cast<float>(rows);
    if (at > 0)
      score[i] = life - (passed - at);
    else if (score[i] == 0)
      score[i] = life - (passed - static_cast<float>(first_row[column]));
    else
      score[i] -= passed;
  }
};

struct LiveOnOneStep {
  const float* attention;  // [kv_heads, slots] the largest of each group
  const Index* keys;       // [kv_heads] what 1 is shared by
  Index slots, w;
  float* score;  // [kv_heads, slots]
  KVPARE_HD void operator()(Index i) const {
    const float life = static_cast<float>(w) - 0.5f;
    const bool important = attention[i] >= 1.0f / static_cast<float>(keys[i / slots]);
    score[i] = important ? life : (score[i] == 0 ? life : score[i]) - 1.0f;
  }
};

}  // namespace detail

template <Backend B>
void score(B& be, const RecentMessage& policy, const Observation<B>& all, Scores out) {
  if (all.rows() == 0) return;
  const LayerShape& shape = *all.shape;
  const Index n = all.columns->count;
  std::vector<std::int32_t> first_row(static_cast<std::size_t>(n), 0);
  for (Index r = 0; r < all.rows(); ++r)
    first_row[static_cast<std::size_t>(all.row_columns[static_cast<std::size_t>(r)])] = static_cast<std::int32_t>(r);
  const Buffer<B, std::int32_t> first_rows(be, first_row);
  const Buffer<B, float> last(be, shape.q_heads * n);
  fill(be, last.data(), last.size(), 0.0f);
  const Observation<B> seen = newest_rows(all, std::min(all.rows(), policy.w));

  // Heads that hold the same tokens share the sizes of their rows; others go one by one.
  const ObservedKeys<B> keys(be, seen);
  const Index together = seen.columns->aligned ? out.heads : 1;
  for (Index h = 0; h < out.heads; h += together) {
    LayerShape part = shape;
    part.kv_heads = together, part.q_heads = together * shape.group();
    std::vector<float> shares;
    const std::vector<Index> counts = tokens_seen(seen, h);
    for (std::size_t r = 0; r < counts.size(); ++r)
      shares.push_back(
          1.0f / static_cast<float>(policy.share == FairShare::keys ? counts[r] : Index{seen.row_positions[r]} + 1));
    const Buffer<B, float> of_rows(be, shares);
    Buffer<B, float> sinks;
    if (!shape.sink_logits.empty()) {
      const auto first = shape.sink_logits.begin() + h * shape.group();
      part.sink_logits.assign(first, first + part.q_heads);
      std::vector<float> each_row;
      for (Index r = 0; r < seen.rows(); ++r) each_row.insert(each_row.end(), first, first + part.q_heads);
      sinks = Buffer<B, float>(be, each_row);
    }
    auto mass = keys.template arguments<PlainLogit, detail::ImportantRow>(seen);
    mass.entry = {of_rows.data(), all.rows() - seen.rows()};
    mass.extra = sinks.data();
    if (part.q_heads == shape.q_heads) mass.lse = seen.row_lse;
    mass.shape = &part;
    mass.keys = seen.heads.subspan(static_cast<std::size_t>(h), static_cast<std::size_t>(together));
    if (!mass.column_of.empty()) mass.column_of = mass.column_of.subspan(static_cast<std::size_t>(h), 1);
    mass.queries = seen.queries.heads_part(h * shape.group(), part.q_heads);
    mass.heads = HeadGroups::query_head, mass.take_max = true;
    mass.out = last.data() + h * shape.group() * n;
    be.attention_mass(mass);
  }
  be.each(out.heads * n,
          detail::LiveOn{last.data(), first_rows.data(), n, shape.group(), all.rows(), policy.w, out.data});
}

/// One row more, whose attention is known.
template <Backend B>
void take_step(B& be, const RecentMessage& policy, const DecodeRow& row) {
  be.each(row.heads * row.slots,
          detail::LiveOnOneStep{row.attention, policy.share == FairShare::keys ? row.keys : row.position, row.slots,
                                policy.w, row.scores});
}

}  // namespace kvpare

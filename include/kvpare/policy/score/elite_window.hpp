// AirCache's importance of visual tokens: attention from the few text rows that matter.
#pragma once

#include <algorithm>
#include <limits>
#include <string_view>
#include <tuple>
#include <vector>

#include "../contracts.hpp"

namespace kvpare {

/// Scores visual tokens by the attention of *elite* text tokens: those that the last text token attends to almost as
/// strongly as to its favourite.
///
/// Formula  att = mean over query heads of softmax(q_last K_text^T), text keys only
///          elite = { text j : att[j] >= alpha * max(att) },  without tokens that precede every visual token or that the
///          last row does not see
///          A = softmax(Q_elite K^T) over {visual keys, elite keys}, causal
///          score[h, i] = mean over elite rows that see i of A[row, i], mean over the query heads of kv head h
/// Shapes   queries of all text rows [rows, q_heads, key_dim], keys through pages -> scores [kv_heads, columns]
/// Falls    back to the last text row alone when nobody is elected (or only tokens before the image), and for a token
///          that no elite row sees. Without visual tokens all scores are 0.
/// Ties     att equal to the threshold is elite. A NaN logit makes its row's scores NaN, which selectors rank last
/// Cost     one row over the text keys, then the elite rows over the visual keys; logits are recomputed, never
///          renormalised from probabilities (these underflow). Scratch: that of `attention_mass`
/// Source   AirCache (arXiv 2503.23956, ICCV 2025), elite observation window. Ours: one elite set per layer (mean over all
///          query heads), the causal mask in the second pass, and the fallbacks.
struct EliteWindow {
  static constexpr std::string_view name = "elite_window";

  double alpha = 0.9;  // share of the peak attention a text token must reach

  static constexpr auto fields() {
    return std::tuple{Field<EliteWindow, double>{"alpha", &EliteWindow::alpha, 0.0, 1.0,
                                                 "share of the last text row's peak that makes a text token elite"}};
  }
  constexpr Reads reads() const { return {.rows = Reads::Rows::all, .of = ClassSet(~visual.bits)}; }
  friend bool operator==(const EliteWindow&, const EliteWindow&) = default;
};

namespace detail {

/// Is the text token of this column elite? `any[0]` says whether an eligible one reached the threshold; if not, the last
/// row's token stands in.
struct EliteTest {
  const float* attention;        // [columns] of the last text row
  const std::uint8_t* eligible;  // [columns]
  const RowSummary* peaks;       // over all text columns; over eligible ones
  double alpha;
  Index last_column;

  KVPARE_HD bool operator()(Index column) const {
    const double threshold = alpha * static_cast<double>(peaks[0].max);
    const bool any = peaks[1].count > 0 && static_cast<double>(peaks[1].max) >= threshold;
    if (!any) return column == last_column;
    return eligible[column] != 0 && static_cast<double>(attention[column]) >= threshold;
  }
};

struct EliteWeights {
  EliteTest elite;
  const std::int32_t* row_columns;
  float* weights;
  KVPARE_HD void operator()(Index row) const { weights[row] = elite(row_columns[row]) ? 1.0f : 0.0f; }
};

/// Adds the elite text slots of one entry to a mask that holds the visual ones.
struct AddElite {
  EliteTest elite;
  const std::uint64_t* text;
  const std::int32_t* column_of;  // null: the slot itself
  Index page_tokens;
  std::uint64_t* mask;
  KVPARE_HD void operator()(Index entry) const {
    std::uint64_t word = mask[entry];
    for (Index s = 0; s < page_tokens; ++s)
      if (text[entry] >> s & 1u) {
        const Index slot = entry * page_tokens + s;
        if (elite(column_of != nullptr ? column_of[slot] : slot)) word |= std::uint64_t{1} << s;
      }
    mask[entry] = word;
  }
};

/// Weight of the fallback row: 1 when some visual token is seen by no elite row. One value per launch keeps the verb's
/// rule that a row of weight 0 costs nothing.
struct AnyUnseen {
  const float* seen;            // [kv_heads, columns]
  const std::uint64_t* wanted;  // bitmap of visual columns
  Index heads, columns, word_tokens;
  float* weight;
  KVPARE_HD void operator()(Index) const {
    float any = 0;
    for (Index c = 0; c < columns && any == 0; ++c)
      if (has_column(wanted, c, word_tokens)) {
        bool by_any_head = false;
        for (Index h = 0; h < heads; ++h) by_any_head = by_any_head || seen[h * columns + c] > 0;
        if (!by_any_head) any = 1;
      }
    *weight = any;
  }
};

struct DivideBySeen {
  float* score;
  const float* seen;
  const float* fallback;
  KVPARE_HD void operator()(Index i) const { score[i] = seen[i] > 0 ? score[i] / seen[i] : fallback[i]; }
};

}  // namespace detail

template <Backend B>
void score(B& be, const EliteWindow& policy, const Observation<B>& seen, Scores out) {
  const Columns& columns = *seen.columns;
  const Index heads = out.heads, n = columns.count;
  std::vector<std::uint64_t> visual_columns = columns.of_class(visual),
                             text_columns = columns.of_class(ClassSet(~visual.bits));
  const std::vector<std::uint64_t> live = columns.live_in_any();
  for (std::size_t w = 0; w < live.size(); ++w) visual_columns[w] &= live[w], text_columns[w] &= live[w];
  Index first_visual = 0;
  while (first_visual < n && !columns.has(visual_columns, first_visual)) ++first_visual;
  fill(be, out.data, heads * n, 0.0f);
  if (first_visual == n || seen.rows() == 0) return;

  // What the host knows: which columns may be elected, and the last text row.
  std::vector<std::uint8_t> eligible(static_cast<std::size_t>(n), 0);
  std::vector<std::uint64_t> eligible_columns(text_columns.size(), 0);
  const Position image_begin = columns.positions[static_cast<std::size_t>(first_visual)],
                 last_position = seen.row_positions.back();
  for (const std::int32_t c : seen.row_columns)
    if (const Position p = columns.positions[static_cast<std::size_t>(c)];
        p > image_begin && (seen.shape->window == 0 || p > last_position - seen.shape->window)) {
      eligible[static_cast<std::size_t>(c)] = 1;
      eligible_columns[static_cast<std::size_t>(c / columns.word_tokens)] |= std::uint64_t{1}
                                                                             << (c % columns.word_tokens);
    }
  const Index last_row = seen.rows() - 1;
  const Buffer<B, std::uint8_t> eligible_flags(be, eligible);
  const Buffer<B, std::uint64_t> text_bits(be, text_columns), eligible_bits(be, eligible_columns),
      visual_bits(be, visual_columns);
  const Buffer<B, std::int32_t> row_columns(be, seen.row_columns);
  const Index one = 1;
  const Buffer<B, const Index> last_row_list(be, std::span(&last_row, 1)), one_row(be, std::span(&one, 1));
  const ObservedKeys<B> keys(be, seen);
  const SlotMask<B> text_mask(be, seen, text_columns), mask(be, seen, visual_columns);

  // Pass 1: what the last text row attends to among text.
  Buffer<B, float> attention(be, n);
  fill(be, attention.data(), n, 0.0f);
  auto first = keys.arguments(seen);
  first.key_mask = text_mask.pointers();
  first.row_list = last_row_list.data(), first.row_count = one_row.data();
  first.heads = HeadGroups::layer;
  first.out = attention.data();
  be.attention_mass(first);
  Buffer<B, RowSummary> peaks(be, 2);
  const MaskedRow peak_rows[] = {{attention.data(), text_bits.data(), n, columns.word_tokens},
                                 {attention.data(), eligible_bits.data(), n, columns.word_tokens}};
  be.reduce(peak_rows, peaks.data());
  const detail::EliteTest elite{attention.data(), eligible_flags.data(), peaks.data(), policy.alpha,
                                seen.row_columns[static_cast<std::size_t>(last_row)]};

  // Pass 2: what the elite rows attend to among visual and elite keys.
  Buffer<B, float> weights(be, seen.rows()), seen_by(be, heads * n), fallback(be, heads * n), fallback_weight(be, 1);
  be.each(seen.rows(), detail::EliteWeights{elite, row_columns.data(), weights.data()});
  for (Index h = 0; h < mask.different(); ++h)
    be.each(mask.size(h),
            detail::AddElite{elite, text_mask.words(h), keys.column_of(h), columns.word_tokens, mask.words(h)});
  fill(be, seen_by.data(), heads * n, 0.0f);
  fill(be, fallback.data(), heads * n, 0.0f);
  auto second = keys.arguments(seen);
  second.key_mask = mask.pointers();
  second.row_weights = weights.data();
  second.out = out.data;
  second.seen = seen_by.data();
  be.attention_mass(second);

  // Tokens that no elite row sees: as if the last text token were the only elite one.
  std::vector<std::uint64_t> fallback_columns = visual_columns;
  const std::int32_t last_column = seen.row_columns[static_cast<std::size_t>(last_row)];
  fallback_columns[static_cast<std::size_t>(last_column / columns.word_tokens)] |=
      std::uint64_t{1} << (last_column % columns.word_tokens);
  const SlotMask<B> fallback_mask(be, seen, fallback_columns);
  be.each(1,
          detail::AnyUnseen{seen_by.data(), visual_bits.data(), heads, n, columns.word_tokens, fallback_weight.data()});
  auto last = keys.arguments(seen);
  last.queries = seen.queries.part(last_row, 1);
  last.row_positions += last_row;
  last.key_mask = fallback_mask.pointers();
  last.row_weights = fallback_weight.data();
  last.out = fallback.data();
  be.attention_mass(last);
  be.each(heads * n, detail::DivideBySeen{out.data, seen_by.data(), fallback.data()});
}

}  // namespace kvpare

// AirCache steps 1 to 4: which visual tokens do the elite text rows of one layer attend to?
#pragma once

#include <algorithm>
#include <functional>

#include "causal_attention.hpp"
#include "reduce.hpp"

namespace kvpare::oracle {

enum class TokenKind { text, visual };

/// Scaled (and capped) logit of a query head's row and a token of the prompt.
using PromptLogit = std::function<double(Index head, Index row, Index key)>;

struct EliteWindowSettings {
  double alpha = 0.9;          // elected: at least alpha * the largest of the last text row
  bool first_is_key = true;    // false: token 0 (BOS) is no text key in the last row
  Index window = 0;            // sliding window of the layer, 0 = none
};

struct EliteWindowResult {
  Index last_text = -1;              // the last text token, -1 if there is none
  std::vector<double> last_row;      // [tokens] step 1, mean over query heads; 0 where there is no text key
  double threshold = 0;              // alpha * max
  std::vector<Index> elected;        // step 2, every token at or above the threshold, ascending
  std::vector<Index> rows;           // the elite rows used: elected without those that precede all visual tokens
  std::vector<Index> visual;         // the visual tokens, ascending
  std::vector<Index> rows_seeing;    // [visual] elite rows that see it; 0: the last text token stood in
  Array2 importance;                 // [q_heads, visual] step 4
};

/// Steps 3 and 4 for a given elite set: softmax of each elite row over {visual, elite} keys it can see, from logits;
/// then per visual token the mean over the elite rows that see it (0 if none does).
/// Shapes  -> importance [q_heads, visual], rows_seeing [visual]
inline Array2 cross_modal_importance(const PromptLogit& logit, Index q_heads, const std::vector<Index>& visual,
                                     const std::vector<Index>& elite, Index window, std::vector<Index>& rows_seeing) {
  const AttentionSettings how{.window = window};
  std::vector<Index> keys = visual;
  keys.insert(keys.end(), elite.begin(), elite.end());

  rows_seeing.assign(visual.size(), 0);
  for (Index e : elite)
    for (Index i = 0; i < count_of(visual); ++i)
      if (sees(how, e, item(visual, i))) ++item(rows_seeing, i);

  Array2 importance(q_heads, count_of(visual));
  for (Index h = 0; h < q_heads; ++h)
    for (Index e : elite) {
      std::vector<double> logits;
      for (Index j : keys) logits.push_back(sees(how, e, j) ? logit(h, e, j) : -infinity);
      const std::vector<double> p = softmax(logits);
      for (Index i = 0; i < count_of(visual); ++i)
        if (sees(how, e, item(visual, i))) importance.at(h, i) += item(p, i) / static_cast<double>(item(rows_seeing, i));
    }
  return importance;
}

/// 1. Att = softmax over text keys only of the last text row, per query head, then the mean over all query heads.
/// 2. elected = { j : Att_j >= alpha * max Att }. Those that precede all visual tokens (BOS, a system prompt) are
///    dropped from the elite set, as rows and as keys of step 3; if nothing is left the last text token alone is elite.
/// 3. and 4. as `cross_modal_importance`. A token that no elite row can see gets what it would get if the last text
///    token alone were elite; a token that this one cannot see either gets 0.
/// Source  AirCache, arXiv 2503.23956; choices as in its "Uncertain" section. Positions are the token indices.
inline EliteWindowResult elite_window_from_logits(const PromptLogit& logit, Index q_heads,
                                                  const std::vector<TokenKind>& kinds,
                                                  const EliteWindowSettings& settings = {}) {
  const AttentionSettings how{.window = settings.window};
  const Index tokens = count_of(kinds);
  EliteWindowResult result;
  result.last_row.assign(kinds.size(), 0.0);
  for (Index t = 0; t < tokens; ++t) {
    if (item(kinds, t) == TokenKind::visual) result.visual.push_back(t);
    if (item(kinds, t) == TokenKind::text) result.last_text = t;
  }
  result.rows_seeing.assign(result.visual.size(), 0);
  result.importance = Array2(q_heads, count_of(result.visual));
  const Index last = result.last_text;
  if (last < 0) return result;

  std::vector<Index> text_keys;
  for (Index j = 0; j < tokens; ++j)
    if (item(kinds, j) == TokenKind::text && sees(how, last, j) && (j > 0 || settings.first_is_key || last == 0))
      text_keys.push_back(j);

  for (Index h = 0; h < q_heads; ++h) {
    std::vector<double> logits(kinds.size(), -infinity);
    for (Index j : text_keys) item(logits, j) = logit(h, last, j);
    const std::vector<double> p = softmax(logits);
    for (Index j = 0; j < tokens; ++j) item(result.last_row, j) += item(p, j) / static_cast<double>(q_heads);
  }

  result.threshold = settings.alpha * *std::max_element(result.last_row.begin(), result.last_row.end());
  for (Index j : text_keys)
    if (item(result.last_row, j) >= result.threshold) result.elected.push_back(j);

  const Index first_visual = result.visual.empty() ? tokens : result.visual.front();
  for (Index j : result.elected)
    if (j > first_visual) result.rows.push_back(j);
  if (result.rows.empty()) result.rows = {last};

  result.importance =
      cross_modal_importance(logit, q_heads, result.visual, result.rows, settings.window, result.rows_seeing);

  std::vector<Index> seen_by_last;
  const Array2 by_last = cross_modal_importance(logit, q_heads, result.visual, {last}, settings.window, seen_by_last);
  for (Index i = 0; i < count_of(result.visual); ++i)
    if (item(result.rows_seeing, i) == 0)
      for (Index h = 0; h < q_heads; ++h) result.importance.at(h, i) = by_last.at(h, i);
  return result;
}

/// The same from dense arrays of the layer.
/// Shapes  queries [tokens, q_heads, width], keys [tokens, kv_heads, width], kinds [tokens]
inline EliteWindowResult elite_window(const Array3& queries, const Array3& keys, const std::vector<TokenKind>& kinds,
                                      double scale, const EliteWindowSettings& settings = {}, double softcap = 0) {
  require(queries.a == count_of(kinds) && keys.a == count_of(kinds), "oracle: a kind for each token");
  const AttentionSettings how{.scale = scale, .softcap = softcap};
  const PromptLogit logit = [&](Index head, Index row, Index key) {
    return capped_logit(how, dot_of(queries, keys, row, head, key));
  };
  return elite_window_from_logits(logit, queries.b, kinds, settings);
}

}  // namespace kvpare::oracle

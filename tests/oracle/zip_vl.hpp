// ZipVL: how many tokens matter by the attention probe rows pay them, which ones by the same per row that sees them.
#pragma once

#include <algorithm>
#include <functional>

#include "causal_attention.hpp"
#include "reduce.hpp"
#include "select_top.hpp"

namespace kvpare::oracle {

/// The least p whose p largest numbers reach tau of the total. A prefix within 1e-6 of the total from there counts as
/// there: which side a sum that lands on the threshold falls to would be rounding otherwise.
inline Index zipvl_count(std::vector<double> accumulated, double tau) {
  std::sort(accumulated.begin(), accumulated.end(), std::greater<>());
  double total = 0, sum = 0;
  for (const double a : accumulated) total += a;
  Index p = 0;
  while (p < count_of(accumulated) && sum < tau * total - 1e-6 * total) sum += item(accumulated, p++);
  return p;
}

struct ZipvlScores {
  std::vector<double> accumulated;  // a_j = Σ_rows p
  std::vector<double> normalised;   // a_j / the number of these rows that see j; 0 where none does
};
/// p [rows, tokens], of rows at these positions; tokens are at 0, 1, 2 …
inline ZipvlScores zipvl_scores(const Array2& p, const std::vector<Index>& row_positions,
                                const AttentionSettings& how = {}) {
  ZipvlScores scores;
  for (Index j = 0; j < p.columns; ++j) {
    double sum = 0;
    Index seen = 0;
    for (Index row = 0; row < p.rows; ++row) sum += p.at(row, j), seen += sees(how, item(row_positions, row), j);
    scores.accumulated.push_back(sum);
    scores.normalised.push_back(seen == 0 ? 0 : sum / static_cast<double>(seen));
  }
  return scores;
}

/// How many by the accumulated scores, which by the normalised ones. Ascending; ties to the lower index.
inline std::vector<Index> zipvl_important(const ZipvlScores& scores, double tau) {
  return select_top(scores.normalised, zipvl_count(scores.accumulated, tau));
}

/// A row of the prompt and what it pays each token, mean over all query heads.
struct ProbeRow {
  Index row = 0;
  std::vector<double> attention;  // [tokens], or as many as the row sees
};

/// Attention of these rows of the prompt, mean over all query heads.
/// Shapes  queries [tokens, q_heads, width], keys [tokens, kv_heads, width]
inline std::vector<ProbeRow> zipvl_probes(const Array3& queries, const Array3& keys, const AttentionSettings& how,
                                          const std::vector<Index>& rows) {
  std::vector<ProbeRow> probes;
  for (const Index row : rows) {
    Array2 heads(queries.b, keys.a);
    for (Index h = 0; h < queries.b; ++h) {
      const std::vector<double> p = attention_row(queries, keys, h, row, how);
      for (Index j = 0; j < keys.a; ++j) heads.at(h, j) = item(p, j);
    }
    probes.push_back({row, mean_of_layer(heads)});
  }
  return probes;
}

struct ZipvlSelection {
  ZipvlScores scores;            // a and s
  Index count = 0;               // p
  std::vector<Index> important;  // T, ascending
};

/// a_j = sum over probe rows, p = the fewest that hold tau of all, s_j = a_j / (probe rows that see j), T = the p best
/// by s, ties to the lower index. Nothing is added to T: the last token and the probes' own are the caller's.
/// Source  ZipVL, arXiv 2410.08584
inline ZipvlSelection zipvl_select(const std::vector<ProbeRow>& probes, Index tokens, double tau,
                                   const AttentionSettings& how = {}) {
  Array2 p(count_of(probes), tokens);
  std::vector<Index> rows;
  for (Index i = 0; i < p.rows; ++i) {
    rows.push_back(item(probes, i).row);
    const std::vector<double>& a = item(probes, i).attention;
    for (Index j = 0; j < count_of(a); ++j) p.at(i, j) = item(a, j);
  }
  ZipvlSelection out;
  out.scores = zipvl_scores(p, rows, how);
  out.count = zipvl_count(out.scores.accumulated, tau);
  out.important = zipvl_important(out.scores, tau);
  return out;
}

/// The same from queries and keys, for given probe rows; one p and one T for the layer.
inline ZipvlSelection zipvl_select(const Array3& queries, const Array3& keys, const AttentionSettings& how,
                                   const std::vector<Index>& probe_rows, double tau) {
  return zipvl_select(zipvl_probes(queries, keys, how, probe_rows), keys.a, tau, how);
}

}  // namespace kvpare::oracle

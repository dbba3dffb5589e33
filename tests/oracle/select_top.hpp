// The k best of a row.
#pragma once

#include "sort_rows.hpp"

namespace kvpare::oracle {

/// Indices of the k best candidates, ascending. Ties go to the lower index, NaN ranks last (and is taken when nothing
/// else is left); k beyond the candidates gives them all, k <= 0 none. `candidates` empty: every index is one.
inline std::vector<Index> select_top(const std::vector<double>& scores, Index k, const std::vector<bool>& candidates = {}) {
  require(candidates.empty() || candidates.size() == scores.size(), "oracle: a candidate flag each");
  std::vector<Index> kept;
  for (Index i = 0; i < count_of(scores); ++i)
    if (candidates.empty() || item(candidates, i)) kept.push_back(i);
  std::sort(kept.begin(), kept.end(), [&](Index a, Index b) { return ranks_before(scores, a, b); });
  if (count_of(kept) > k) kept.resize(static_cast<std::size_t>(std::max<Index>(k, 0)));
  std::sort(kept.begin(), kept.end());
  return kept;
}

/// One selection per row, each with its own k and candidates (`candidates` empty: all).
inline std::vector<std::vector<Index>> select_top_rows(const std::vector<std::vector<double>>& rows,
                                                       const std::vector<Index>& k,
                                                       const std::vector<std::vector<bool>>& candidates = {}) {
  std::vector<std::vector<Index>> out;
  for (Index i = 0; i < count_of(rows); ++i)
    out.push_back(select_top(item(rows, i), item(k, i), candidates.empty() ? std::vector<bool>{} : item(candidates, i)));
  return out;
}

}  // namespace kvpare::oracle

// CORM: a key goes when none of the last w queries paid it at least the average; there is no budget.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>

#include "causal_attention.hpp"

namespace kvpare::oracle {

struct CormKey {
  Index position = 0;
  std::optional<Index> last_important;  // step; before any importance the step before its first row; none: no row yet
};

/// What one kv head holds, oldest first.
struct CormHead {
  std::vector<CormKey> held;
  std::optional<Index> step;  // the newest one observed
  double closest = infinity;  // the least |t a - 1| so far: how near any entry came to the threshold

  std::vector<Index> positions() const {
    std::vector<Index> out;
    for (const CormKey& key : held) out.push_back(key.position);
    return out;
  }

  /// A new key; the next row covers it.
  void hold(Index position) { held.push_back({position, {}}); }

  /// A step: one row per query head over all that is held. A key is important if any row pays it at least 1 / t, t the
  /// number of keys in the row unless it is given. An entry within 1e-9 of the average counts as there.
  /// Shapes  rows [query heads of the group][held]
  void observe(const std::vector<std::vector<double>>& rows, Index at_step, Index t = 0) {
    require(!step || at_step > *step, "oracle: steps go on");
    step = at_step;
    for (CormKey& key : held)
      if (!key.last_important) key.last_important = at_step - 1;
    for (const auto& row : rows) {
      require(count_of(row) == count_of(held), "oracle: a row covers what is held");
      const double average = 1.0 / static_cast<double>(t > 0 ? t : count_of(row));
      for (Index i = 0; i < count_of(row); ++i) {
        const double times = item(row, i) / average;
        closest = std::min(closest, std::abs(times - 1));
        if (times >= 1 - 1e-9) item(held, i).last_important = at_step;
      }
    }
  }
  void observe(const std::vector<double>& row, Index at_step, Index t = 0) {
    observe(std::vector<std::vector<double>>{row}, at_step, t);
  }

  /// Drops every key that was minor in the last w steps and is not among the r newest. -> positions gone, ascending
  std::vector<Index> evict(Index w, Index r) {
    std::vector<CormKey> kept;
    std::vector<Index> gone;
    for (Index i = 0; i < count_of(held); ++i) {
      const CormKey& key = item(held, i);
      const bool recent = i >= count_of(held) - r;
      if (!recent && key.last_important && *step - *key.last_important >= w)
        gone.push_back(key.position);
      else
        kept.push_back(key);
    }
    held = kept;
    return gone;
  }
};

/// After a prompt whose last w rows count as steps, the row at position i as step i + 1; nothing is evicted yet. t is
/// the number of keys a row sees; a key is important if any query head of the kv head finds it so.
/// Shapes  queries [tokens, q_heads, width], keys [tokens, kv_heads, width]
/// Source  CORM, arXiv 2404.15949
inline CormHead corm_prompt(const Array3& queries, const Array3& keys, const AttentionSettings& how, Index kv_head,
                            Index w) {
  require(queries.a == keys.a && keys.b > 0 && queries.b % keys.b == 0, "oracle: a query for each token and head");
  require(how.causal, "oracle: a step's row ends at its own token");
  const Index group = queries.b / keys.b;
  CormHead head;
  for (Index row = 0; row < keys.a; ++row) {
    head.hold(row);
    if (row < keys.a - w) continue;
    Index seen = 0;
    for (Index j = 0; j <= row; ++j) seen += sees(how, row, j);
    std::vector<std::vector<double>> rows;
    for (Index h = kv_head * group; h < (kv_head + 1) * group; ++h) {
      rows.push_back(attention_row(queries, keys, h, row, how));
      rows.back().resize(static_cast<std::size_t>(row + 1));
    }
    head.observe(rows, row + 1, seen);
  }
  return head;
}

}  // namespace kvpare::oracle

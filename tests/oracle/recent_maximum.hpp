// QAQ: the attention that is to come, foretold by the largest share of the newest rows.
#pragma once

#include <algorithm>

#include "causal_attention.hpp"

namespace kvpare::oracle {

/// What one kv head holds, and for each token the shares that rows have given it, oldest first: of a row the largest over
/// the query heads.
struct RecentAttention {
  struct Token {
    Index position = 0;
    std::vector<double> shares = {};
  };
  std::vector<Token> held;

  void hold(Index position) { held.push_back({position}); }

  /// One row per query head over all that is held; what a row does not see has 0 there. NaN are not taken up.
  /// Shapes  rows [query heads of the group][held]
  void observe(const std::vector<std::vector<double>>& rows) {
    for (Index i = 0; i < count_of(held); ++i) {
      double most = 0;
      for (const auto& row : rows) {
        require(count_of(row) == count_of(held), "oracle: a row covers what is held");
        if (item(row, i) > most) most = item(row, i);
      }
      item(held, i).shares.push_back(most);
    }
  }

  /// S[t] = max over the newest n rows; 1, all that there can be, for tokens that have not been there for n rows.
  std::vector<double> scores(Index n) const {
    std::vector<double> out;
    for (const Token& token : held)
      out.push_back(count_of(token.shares) < n ? 1.0 : *std::max_element(token.shares.end() - n, token.shares.end()));
    return out;
  }
};

/// After a whole prompt.
/// Shapes  queries [tokens, q_heads, width], keys [tokens, kv_heads, width]
/// Source  QAQ, arXiv 2403.04643, section 4.2; heads of a group by the maximum
inline RecentAttention recent_attention(const Array3& queries, const Array3& keys, const AttentionSettings& how,
                                        Index kv_head) {
  require(queries.a == keys.a && keys.b > 0 && queries.b % keys.b == 0, "oracle: a query for each token and head");
  const Index group = queries.b / keys.b;
  RecentAttention head;
  for (Index row = 0; row < keys.a; ++row) {
    head.hold(row);
    std::vector<std::vector<double>> rows;
    for (Index h = kv_head * group; h < (kv_head + 1) * group; ++h) {
      rows.push_back(attention_row(queries, keys, h, row, how));
      rows.back().resize(static_cast<std::size_t>(row + 1));
    }
    head.observe(rows);
  }
  return head;
}

}  // namespace kvpare::oracle

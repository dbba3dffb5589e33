// What a row of ordinary attention is: visibility, logits, probabilities.
#pragma once

#include <cmath>

#include "dense.hpp"
#include "softmax.hpp"

namespace kvpare::oracle {

/// How a layer turns q.k into a logit, and what a row may see.
struct AttentionSettings {
  double scale = 1;     // multiplies q.k
  double softcap = 0;   // > 0: logit = softcap * tanh(scale q.k / softcap)
  Index window = 0;     // > 0: a row sees only the last `window` positions, its own included
  bool causal = true;   // a row sees no later position
  std::vector<double> sink = {};  // empty or [q_heads]: exp(sink) joins the denominator only; never scaled or capped
};

/// position_j <= position_r (when causal) and position_j > position_r - window (when there is one).
inline bool sees(const AttentionSettings& how, Index row_position, Index key_position) {
  if (how.causal && key_position > row_position) return false;
  return how.window == 0 || key_position > row_position - how.window;
}

/// softcap * tanh(scale * dot / softcap), or scale * dot without a cap.
inline double capped_logit(const AttentionSettings& how, double dot) {
  const double s = how.scale * dot;
  return how.softcap > 0 ? how.softcap * std::tanh(s / how.softcap) : s;
}

/// q[row, head, :] . k[key, head / group, :], group = q_heads / kv_heads.
inline double dot_of(const Array3& queries, const Array3& keys, Index row, Index head, Index key) {
  require(keys.b > 0 && queries.b % keys.b == 0, "oracle: q_heads must be a multiple of kv_heads");
  require(queries.c == keys.c, "oracle: queries and keys differ in width");
  const Index kv_head = head / (queries.b / keys.b);
  double sum = 0;
  for (Index d = 0; d < keys.c; ++d) sum += queries.at(row, head, d) * keys.at(key, kv_head, d);
  return sum;
}

/// Ordinary attention of one prompt row over all tokens; positions are the token indices.
/// Shapes  queries [tokens, q_heads, width], keys [tokens, kv_heads, width] -> p [tokens], 0 where not visible
inline std::vector<double> attention_row(const Array3& queries, const Array3& keys, Index head, Index row,
                                         const AttentionSettings& how) {
  std::vector<double> logits(static_cast<std::size_t>(keys.a), -infinity);
  for (Index j = 0; j < keys.a; ++j)
    if (sees(how, row, j)) item(logits, j) = capped_logit(how, dot_of(queries, keys, row, head, j));
  if (how.sink.empty()) return softmax(logits);
  std::vector<double> with_sink = logits;
  with_sink.push_back(item(how.sink, head));
  return softmax_given(logits, log_sum_exp(with_sink));
}

}  // namespace kvpare::oracle

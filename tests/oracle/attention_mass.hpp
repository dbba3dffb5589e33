// The attention that chosen rows give to each key, summed (or the largest) over the rows.
#pragma once

#include <algorithm>
#include <functional>
#include <optional>

#include "causal_attention.hpp"

namespace kvpare::oracle {

using LogitRule = std::function<double(double dot, Index row, Index key)>;  // row, key: indices into queries and keys
using EntryRule = std::function<double(double p, Index row, Index key)>;

enum class Combine { sum, max };
enum class Heads { query, kv_mean, layer_mean };
enum Part : Index { part_all = 0, part_same = 1, part_other = 2 };  // all keys; keys of the row's class; the others

/// Everything per row is indexed by the row of `queries`, whether the row is listed or not.
struct AttentionMassInput {
  Array3 queries;                             // [rows, q_heads, width]
  Array3 keys;                                // [tokens, kv_heads, width]
  std::vector<Index> row_positions;           // [rows]
  std::vector<Index> key_positions;           // [tokens]
  std::optional<std::vector<Index>> rows;     // which rows take part; absent: all
  std::vector<double> weights;                // empty (1) or [rows]; 0 skips the row
  std::optional<Array2> head_weights;         // [q_heads, rows], multiplies `weights`; 0 skips the row for that head
  std::vector<std::vector<bool>> key_mask;    // empty (all), [1][tokens], or [kv_heads][tokens] for ragged heads
  std::vector<int> row_class, key_class;      // [rows], [tokens]; empty: all of class 0
  AttentionSettings how;                      // scale, softcap, window, causal
  std::optional<Array2> lse;                  // [rows, q_heads], natural log; absent: computed
  std::optional<Array2> extra;                // [rows, q_heads], a logit: exp(extra) joins the computed denominator
  LogitRule logit;                            // absent: scale and softcap of `how`
  EntryRule entry;                            // absent: p
  Combine combine = Combine::sum;
  Heads heads = Heads::query;
  double share = 1;                           // for `count`
};

/// heads is q_heads, kv_heads or 1. Skipped rows and rows that see nothing: lse -infinity, peak, count and mass 0.
struct AttentionMass {
  Array3 out;    // [3 parts, heads, tokens]
  Array2 seen;   // [heads, tokens]  sum of w_r over the rows that see j (mean over the heads folded)
  Array2 lse;    // [rows, q_heads]  as used
  Array2 peak;   // [rows, q_heads]  largest p over the visible keys
  Array2 count;  // [rows, q_heads]  visible keys with p >= share * peak
  Array3 mass;   // [3 parts, rows, q_heads]  sum of p (not weighted, not `entry`)
};

/// Mean over the query heads each output head stands for. [parts, q_heads, tokens] -> [parts, heads, tokens]
inline Array3 fold_heads(const Array3& x, Index kv_heads, Heads heads) {
  const Index out_heads = heads == Heads::query ? x.b : heads == Heads::kv_mean ? kv_heads : 1;
  const Index group = x.b / out_heads;
  Array3 out(x.a, out_heads, x.c);
  for (Index part = 0; part < x.a; ++part)
    for (Index h = 0; h < x.b; ++h)
      for (Index j = 0; j < x.c; ++j) out.at(part, h / group, j) += x.at(part, h, j) / static_cast<double>(group);
  return out;
}

/// Key j is visible to row r when the mask has it, position_j <= position_r (causal) and it is inside the window.
///   s = logit(q_r . k_j, r, j)    p = exp(s - lse_r)    lse_r = ln(sum over visible exp(s) + exp(extra))
///   out[part, head, j] = sum (or max with 0) over rows of w_r * entry(p, r, j), then the mean over folded heads
/// A row that sees nothing adds nothing.
inline AttentionMass attention_mass(const AttentionMassInput& in) {
  const Index rows = in.queries.a, q_heads = in.queries.b, tokens = in.keys.a, kv_heads = in.keys.b;
  require(kv_heads > 0 && q_heads % kv_heads == 0, "oracle: q_heads must be a multiple of kv_heads");
  require(count_of(in.row_positions) == rows && count_of(in.key_positions) == tokens, "oracle: a position each");
  const Index group = q_heads / kv_heads;

  std::vector<Index> listed;
  for (Index r = 0; r < rows; ++r) listed.push_back(r);
  if (in.rows) listed = *in.rows;

  auto in_mask = [&](Index kv_head, Index j) -> bool {
    if (in.key_mask.empty()) return true;
    return item(item(in.key_mask, count_of(in.key_mask) == 1 ? 0 : kv_head), j);
  };

  AttentionMass result{Array3(3, q_heads, tokens), Array2(q_heads, tokens),  Array2(rows, q_heads, -infinity),
                       Array2(rows, q_heads),      Array2(rows, q_heads),    Array3(3, rows, q_heads)};
  Array3 seen(1, q_heads, tokens);

  for (Index r : listed)
    for (Index h = 0; h < q_heads; ++h) {
      const double row_weight = in.weights.empty() ? 1.0 : item(in.weights, r);
      const double w = row_weight * (in.head_weights ? in.head_weights->at(h, r) : 1.0);
      if (w == 0) continue;

      std::vector<Index> visible;
      std::vector<double> logits;
      for (Index j = 0; j < tokens; ++j) {
        if (!in_mask(h / group, j) || !sees(in.how, item(in.row_positions, r), item(in.key_positions, j))) continue;
        const double dot = dot_of(in.queries, in.keys, r, h, j);
        visible.push_back(j);
        logits.push_back(in.logit ? in.logit(dot, r, j) : capped_logit(in.how, dot));
      }
      if (visible.empty()) continue;

      std::vector<double> denominator = logits;
      if (in.extra) denominator.push_back(in.extra->at(r, h));
      const double lse = in.lse ? in.lse->at(r, h) : log_sum_exp(denominator);
      const std::vector<double> p = softmax_given(logits, lse);
      result.lse.at(r, h) = lse;

      double peak = 0;
      for (double x : p) peak = std::max(peak, x);
      result.peak.at(r, h) = peak;

      for (Index i = 0; i < count_of(visible); ++i) {
        const Index j = item(visible, i);
        const int row_class = in.row_class.empty() ? 0 : item(in.row_class, r);
        const int key_class = in.key_class.empty() ? 0 : item(in.key_class, j);
        const double added = w * (in.entry ? in.entry(item(p, i), r, j) : item(p, i));
        seen.at(0, h, j) += w;
        if (item(p, i) >= in.share * peak) result.count.at(r, h) += 1;
        for (Part part : {part_all, row_class == key_class ? part_same : part_other}) {
          double& out = result.out.at(part, h, j);
          out = in.combine == Combine::sum ? out + added : std::max(out, added);
          result.mass.at(part, r, h) += item(p, i);
        }
      }
    }

  result.out = fold_heads(result.out, kv_heads, in.heads);
  seen = fold_heads(seen, kv_heads, in.heads);
  result.seen = Array2(seen.b, seen.c);
  result.seen.values = seen.values;
  return result;
}

/// The same onto an earlier result, as chunked prefill does: `out` adds up (or takes the larger), `seen` adds up,
/// the token axis may have grown, what is per row is that of the new rows.
inline void accumulate(const AttentionMassInput& in, AttentionMass& onto) {
  AttentionMass now = attention_mass(in);
  require(onto.out.b == now.out.b && onto.out.c <= now.out.c, "oracle: accumulate onto the same heads and no more tokens");
  for (Index h = 0; h < onto.out.b; ++h)
    for (Index j = 0; j < onto.out.c; ++j) {
      for (Index part = 0; part < 3; ++part) {
        double& out = now.out.at(part, h, j);
        const double before = onto.out.at(part, h, j);
        out = in.combine == Combine::sum ? before + out : std::max(before, out);
      }
      now.seen.at(h, j) += onto.seen.at(h, j);
    }
  onto = now;
}

}  // namespace kvpare::oracle

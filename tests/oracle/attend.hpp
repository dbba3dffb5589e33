// Attention of one sequence and one layer over a cache whose heads may hold different tokens.
#pragma once

#include <algorithm>

#include "causal_attention.hpp"

namespace kvpare::oracle {

/// A cached token as one kv head holds it.
struct CachedToken {
  Index position = 0;
  std::vector<double> key;    // [key_width]
  std::vector<double> value;  // [value_width]
};
using CachedHead = std::vector<CachedToken>;  // any order, any length

struct AttendInput {
  Array3 queries;                // [rows, q_heads, key_width]
  std::vector<Index> positions;  // [rows]
  std::vector<CachedHead> heads;  // [kv_heads]; query head h reads head h / (q_heads / kv_heads)
  Index value_width = 0;
  AttentionSettings how;
  std::vector<double> sink;      // empty or [q_heads]: exp(sink) joins the denominator only; never scaled or capped
};

struct AttendResult {
  Array3 out;  // [rows, q_heads, value_width]
  Array2 lse;  // [rows, q_heads], natural log, sink included
};

enum class Fold { sum, mean, max };

/// Logits of one row over the tokens of its kv head; -infinity where not visible.
inline std::vector<double> attend_logits(const AttendInput& in, Index row, Index head) {
  const Index kv_heads = count_of(in.heads);
  require(kv_heads > 0 && in.queries.b % kv_heads == 0, "oracle: q_heads must be a multiple of kv_heads");
  const CachedHead& cache = item(in.heads, head / (in.queries.b / kv_heads));
  std::vector<double> logits;
  for (const CachedToken& token : cache) {
    double dot = 0;
    for (Index d = 0; d < in.queries.c; ++d) dot += in.queries.at(row, head, d) * item(token.key, d);
    logits.push_back(sees(in.how, item(in.positions, row), token.position) ? capped_logit(in.how, dot) : -infinity);
  }
  return logits;
}

/// lse of one row, sink included; a row that sees no token has -infinity, sink or not.
inline double attend_lse(const AttendInput& in, std::vector<double> logits, Index head) {
  const bool blind = std::all_of(logits.begin(), logits.end(), [](double s) { return s == -infinity; });
  if (blind) return -infinity;
  if (!in.sink.empty()) logits.push_back(item(in.sink, head));
  return log_sum_exp(logits);
}

/// out[r, h, :] = sum_j p_j v_j over the visible tokens, p_j = exp(s_j - lse); a row that sees nothing gives zeros.
inline AttendResult attend(const AttendInput& in) {
  const Index rows = in.queries.a, q_heads = in.queries.b, group = q_heads / count_of(in.heads);
  AttendResult result{Array3(rows, q_heads, in.value_width), Array2(rows, q_heads)};
  for (Index r = 0; r < rows; ++r)
    for (Index h = 0; h < q_heads; ++h) {
      const std::vector<double> logits = attend_logits(in, r, h);
      const double lse = attend_lse(in, logits, h);
      const std::vector<double> p = softmax_given(logits, lse);
      const CachedHead& cache = item(in.heads, h / group);
      for (Index j = 0; j < count_of(cache); ++j) {
        if (item(logits, j) == -infinity) continue;
        for (Index d = 0; d < in.value_width; ++d)
          result.out.at(r, h, d) += item(p, j) * item(item(cache, j).value, d);
      }
      result.lse.at(r, h) = lse;
    }
  return result;
}

/// sum, mean or max of numbers; of none 0.
inline double fold(const std::vector<double>& x, Fold how) {
  if (x.empty()) return 0;
  if (how == Fold::max) return *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (double v : x) sum += v;
  return how == Fold::mean ? sum / static_cast<double>(x.size()) : sum;
}

/// mass[kv_head][j] = fold over rows of (fold over the group's query heads of p[r, h, j]), p = 0 where not visible.
/// The same fold twice is that fold over all (row, query head) pairs. Indexed as `heads` is.
inline std::vector<std::vector<double>> attend_mass(const AttendInput& in, Fold over_heads, Fold over_rows) {
  const Index kv_heads = count_of(in.heads), group = in.queries.b / kv_heads, rows = in.queries.a;
  std::vector<std::vector<double>> mass;
  for (Index kv = 0; kv < kv_heads; ++kv) {
    const Index tokens = count_of(item(in.heads, kv));
    std::vector<std::vector<double>> of_rows(static_cast<std::size_t>(tokens));  // [tokens][rows]
    for (Index r = 0; r < rows; ++r) {
      std::vector<std::vector<double>> of_heads(static_cast<std::size_t>(tokens));  // [tokens][group]
      for (Index h = kv * group; h < (kv + 1) * group; ++h) {
        const std::vector<double> logits = attend_logits(in, r, h);
        const std::vector<double> p = softmax_given(logits, attend_lse(in, logits, h));
        for (Index j = 0; j < tokens; ++j) item(of_heads, j).push_back(item(p, j));
      }
      for (Index j = 0; j < tokens; ++j) item(of_rows, j).push_back(fold(item(of_heads, j), over_heads));
    }
    mass.emplace_back();
    for (const auto& x : of_rows) mass.back().push_back(fold(x, over_rows));
  }
  return mass;
}

}  // namespace kvpare::oracle

// H2O's importance: all the attention a token has received so far.
#pragma once

#include <string_view>
#include <tuple>

#include "../contracts.hpp"

namespace kvpare {

/// Formula  score[h, j] = sum over all query rows so far of softmax(q_r K^T)[j], mean over the query heads of kv head h
/// Shapes   every query row [rows, q_heads, key_dim], keys through pages -> scores [kv_heads, columns], added to
/// Ties     none made here; a NaN logit makes its row NaN
/// Cost     one QK product of the whole prompt; chunks add up, nothing is kept of them. Append a chunk before observing it
/// Source   H2O (Zhang et al. 2023, arXiv 2306.14048), section 4; column sums, not normalised by age, as published.
///          Ours: the group's mean (the published code is multi-head). Its recent half is the selector's `recent_share`.
struct AccumulatedAttention {
  static constexpr std::string_view name = "accumulated_attention";
  static constexpr auto fields() { return std::tuple{}; }
  constexpr Reads reads() const { return {.rows = Reads::Rows::all, .streams = true, .attention = true}; }
  friend bool operator==(const AccumulatedAttention&, const AccumulatedAttention&) = default;
};

template <Backend B>
void score(B& be, const AccumulatedAttention&, const Observation<B>& seen, Scores out) {
  const ObservedKeys<B> keys(be, seen);
  auto mass = keys.attention(seen);
  mass.out = out.data;
  be.attention_mass(mass);
}

}  // namespace kvpare

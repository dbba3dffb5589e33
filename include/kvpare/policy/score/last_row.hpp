// TOVA's importance: what the newest query row looks at.
#pragma once

#include <string_view>
#include <tuple>

#include "../contracts.hpp"

namespace kvpare {

/// Formula  score[h, j] = softmax(q_last K^T)[j], mean over the query heads of kv head h
/// Shapes   the last query row [1, q_heads, key_dim], keys through pages -> scores [kv_heads, columns]
/// Ties     none made here; a NaN logit makes the whole row NaN
/// Cost     one row over all keys; nothing at decode, where `attend` has it anyway
/// Source   TOVA (Oren et al. 2024, arXiv 2401.06104), section 3.2, where all heads of a layer choose together: that is
///          the selector's `heads = layer`. The newest token has no privilege, as published.
struct LastRow {
  static constexpr std::string_view name = "last_row";
  static constexpr auto fields() { return std::tuple{}; }
  constexpr Reads reads() const { return {.rows = Reads::Rows::last, .count = 1, .attention = true}; }
  friend bool operator==(const LastRow&, const LastRow&) = default;
};

template <Backend B>
void score(B& be, const LastRow&, const Observation<B>& seen, Scores out) {
  fill(be, out.data, out.heads * out.columns, 0.0f);
  const ObservedKeys<B> keys(be, seen);
  auto mass = keys.attention(seen);
  mass.out = out.data;
  be.attention_mass(mass);
}

}  // namespace kvpare

// Short keys are kept: no query, no attention.
#pragma once

#include <cmath>
#include <string_view>
#include <tuple>
#include <vector>

#include "lengths.hpp"

namespace kvpare {

/// Scores a token by how short its key is: short keys draw most attention.
///
/// Formula  score[h, j] = -||k_hj||_2
/// Shapes   keys through pages -> scores [kv_heads, columns]
/// Ties     none made here; a NaN key gives NaN
/// Cost     reads each key once; scratch a float per slot
/// Source   Devoto et al. 2024 (arXiv 2406.11430), section 3. Keys after RoPE, as there. They leave the first layers whole;
///          here LayerShape::compress says which stay so.
struct KeyNorm {
  static constexpr std::string_view name = "key_norm";
  static constexpr auto fields() { return std::tuple{}; }
  constexpr Reads reads() const { return {}; }
  friend bool operator==(const KeyNorm&, const KeyNorm&) = default;
};

namespace detail {

struct NegativeLength {
  KVPARE_HD static float of(float squares) { return -std::sqrt(squares); }
};

}  // namespace detail

template <Backend B>
void score(B& be, const KeyNorm&, const Observation<B>& seen, Scores out) {
  detail::write_lengths<detail::NegativeLength>(be, Side::keys, seen, out);
}

}  // namespace kvpare

// Short keys are kept: no query, no attention.
#pragma once

#include <cmath>
#include <string_view>
#include <tuple>
#include <vector>

#include "../contracts.hpp"

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

struct NegativeNorm {
  const float* squares;         // [slots]
  const std::int32_t* columns;  // [slots], -1 = no token; or null: the slot itself
  Index count;                  // columns
  float* out;                   // [count]
  KVPARE_HD void operator()(Index slot) const {
    const Index column = columns != nullptr ? columns[slot] : slot;
    if (column >= 0 && column < count) out[column] = -std::sqrt(squares[slot]);
  }
};

}  // namespace detail

template <Backend B>
void score(B& be, const KeyNorm&, const Observation<B>& seen, Scores out) {
  fill(be, out.data, out.heads * out.columns, 0.0f);
  std::vector<Buffer<B, float>> squares;
  std::vector<StatisticsRow> rows;
  for (const HeadPages& list : seen.heads) {
    squares.emplace_back(be, list.slots());
    StatisticsRow row;
    row.pages = list, row.width = seen.shape->key_dim, row.per_slot = true, row.sum_squares = squares.back().data();
    rows.push_back(row);
  }
  be.statistics(rows);
  for (Index h = 0; h < out.heads; ++h) {
    const HeadPages& list = seen.heads[static_cast<std::size_t>(h)];
    Buffer<B, std::int32_t> columns;
    if (!seen.columns->aligned) {
      std::vector<std::int32_t> map(static_cast<std::size_t>(list.slots()), -1);
      for_each_token(seen, h, [&](Index slot, Index column) {
        map[static_cast<std::size_t>(slot)] = static_cast<std::int32_t>(column);
      });
      columns = Buffer<B, std::int32_t>(be, map);
    }
    be.each(list.slots(), detail::NegativeNorm{squares[static_cast<std::size_t>(h)].data(), columns.data(), out.columns,
                                               out.data + h * out.columns});
  }
}

}  // namespace kvpare

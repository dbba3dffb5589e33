// How long keys or values are, column by column.
#pragma once

#include <cmath>
#include <vector>

#include "../contracts.hpp"

namespace kvpare::detail {

template <class Length>
struct WriteLength {
  const float* squares;         // [slots]
  const std::int32_t* columns;  // [slots], -1 = no token; or null: the slot itself
  Index count;                  // columns
  float* out;                   // [count]
  KVPARE_HD void operator()(Index slot) const {
    const Index column = columns != nullptr ? columns[slot] : slot;
    if (column >= 0 && column < count) out[column] = Length::of(squares[slot]);
  }
};

/// `Length::of` of every token's sum of squares; what other columns have means nothing. Reads keys or values once.
template <class Length, Backend B>
void write_lengths(B& be, Side side, const Observation<B>& seen, Scores out) {
  fill(be, out.data, out.heads * out.columns, 0.0f);
  std::vector<Buffer<B, float>> squares;
  std::vector<StatisticsRow> rows;
  for (const HeadPages& list : seen.heads) {
    squares.emplace_back(be, list.slots());
    StatisticsRow row;
    row.pages = list, row.side = side, row.per_slot = true, row.sum_squares = squares.back().data();
    row.width = side == Side::keys ? seen.shape->key_dim : seen.shape->value_dim;
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
    be.each(list.slots(), WriteLength<Length>{squares[static_cast<std::size_t>(h)].data(), columns.data(), out.columns,
                                              out.data + h * out.columns});
  }
}

}  // namespace kvpare::detail

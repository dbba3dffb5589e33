// One row per layer from one row per head. Written once, on `each`.
#pragma once

#include "../backend.hpp"

namespace kvpare {

namespace detail {
struct MeanOverHeads {
  static constexpr Index block = 4;  // columns per call
  const float* rows;                 // [heads, columns]
  Index heads, columns;
  float* mean;  // [columns]
  KVPARE_HD void operator()(Index i) const {
    const Index begin = i * block;
    const float count = static_cast<float>(heads);
    if (begin + block <= columns) {
      float sum[block] = {};
      for (Index h = 0; h < heads; ++h)
        for (Index c = 0; c < block; ++c) sum[c] += rows[h * columns + begin + c];
      for (Index c = 0; c < block; ++c) mean[begin + c] = sum[c] / count;
      return;
    }
    for (Index column = begin; column < columns; ++column) {
      float sum = 0;
      for (Index h = 0; h < heads; ++h) sum += rows[h * columns + column];
      mean[column] = sum / count;
    }
  }
};
}  // namespace detail

/// mean[c] = average over heads of rows[h, c].
template <Backend B>
void reduce_heads(B& be, const float* rows, Index heads, Index columns, float* mean) {
  be.each(ceil_div(columns, detail::MeanOverHeads::block), detail::MeanOverHeads{rows, heads, columns, mean});
}

}  // namespace kvpare

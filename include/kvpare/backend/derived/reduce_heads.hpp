// One row per layer from one row per head. Written once, on `each`.
#pragma once

#include "../backend.hpp"

namespace kvpare {

namespace detail {
struct MeanOverHeads {
  const float* rows;  // [heads, columns]
  Index heads, columns;
  float* mean;  // [columns]
  KVPARE_HD void operator()(Index c) const {
    float sum = 0;
    for (Index h = 0; h < heads; ++h) sum += rows[h * columns + c];
    mean[c] = sum / static_cast<float>(heads);
  }
};
}  // namespace detail

/// mean[c] = average over heads of rows[h, c].
template <Backend B>
void reduce_heads(B& be, const float* rows, Index heads, Index columns, float* mean) {
  be.each(columns, detail::MeanOverHeads{rows, heads, columns, mean});
}

}  // namespace kvpare

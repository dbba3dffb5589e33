// What a compression is measured against: the attention of the prompt's own prefill.
#pragma once

#include "compression.hpp"

namespace bench {

/// Seconds of causal attention over a layer's whole prompt by `attend`, 64 rows at a time: its time is linear in the
/// position, so the middles of four equal parts stand for all.
template <Element T>
double prefill_by_attend(Prompt<T>& prompt) {
  const Index tokens = prompt.filled.tokens, rows = 64, samples = 4;
  double sum = 0;
  for (Index sample = 0; sample < samples; ++sample) {
    const Queries<T> queries(prompt.filled.shape, rows, tokens * (2 * sample + 1) / (2 * samples) - rows / 2);
    sum += seconds_of(
        [&] { prompt.filled.cache.attend(sample % prompt.filled.layers, {queries.of(prompt.filled.sequence)}); });
  }
  return sum / samples * static_cast<double>(tokens) / rows;
}

/// The same by Eigen's products alone, of Q and K and of P and V over the causal half, without a softmax: a lower bound
/// for whoever computes in float on this CPU.
inline double prefill_by_products(const LayerShape& shape, Index tokens, Index threads) {
  const double flops =
      static_cast<double>(shape.q_heads * tokens * tokens * shape.key_dim);  // of either, half of 2·Q·N²·D
  return flops / product_rate({.m = 256, .n = tokens, .k = shape.key_dim}, threads) +
         flops / product_rate({.m = 256, .n = shape.value_dim, .k = tokens, .b_transposed = false}, threads);
}

}  // namespace bench

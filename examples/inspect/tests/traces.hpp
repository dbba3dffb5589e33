// Small traces with random values, for tests.
#pragma once

#include <random>

#include "support/trace.hpp"

namespace inspect {

struct RandomLayer {
  Index q_heads, kv_heads, key_dim, value_dim;
};

template <class T>
void add_random_layer(example::Trace& trace, const RandomLayer& shape, unsigned seed) {
  std::mt19937 random(seed);
  const auto next = [&] { return 4 * static_cast<float>(random() >> 8) / (1 << 24) - 2; };  // the same everywhere
  const auto values = [&](Index heads, Index width) {
    std::vector<T> out;
    for (Index i = 0; i < trace.tokens() * heads * width; ++i) out.emplace_back(next());
    return out;
  };
  const auto q = values(shape.q_heads, shape.key_dim), k = values(shape.kv_heads, shape.key_dim),
             v = values(shape.kv_heads, shape.value_dim);
  const Index tokens = trace.tokens();
  trace.append(std::ssize(trace.layers), {q.data(), tokens, shape.q_heads, shape.key_dim},
               {k.data(), tokens, shape.kv_heads, shape.key_dim}, {v.data(), tokens, shape.kv_heads, shape.value_dim});
}

/// Positions 0, 1, ... and all text; layers are added.
inline example::Trace trace_of(Index tokens) {
  example::Trace trace;
  for (Index t = 0; t < tokens; ++t) trace.positions.push_back(static_cast<Position>(t));
  return trace;
}

}  // namespace inspect

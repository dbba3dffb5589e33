// The models whose attention is measured.
#pragma once

#include <cmath>
#include <kvpare/core/shape.hpp>

namespace bench {

using kvpare::Index;
using kvpare::LayerShape;

inline LayerShape shape_of(Index q_heads, Index kv_heads, Index head_dim) {
  return {.q_heads = q_heads,
          .kv_heads = kv_heads,
          .key_dim = head_dim,
          .value_dim = head_dim,
          .scale = 1 / std::sqrt(static_cast<float>(head_dim))};
}
inline LayerShape llama_8b() { return shape_of(32, 8, 128); }    // Llama-3.1-8B
inline LayerShape qwen_vl_7b() { return shape_of(28, 4, 128); }  // Qwen2.5-VL-7B

}  // namespace bench

// Four floats side by side: what every instruction set has.
#pragma once

#include <cstring>

#include "../../../core/config.hpp"

namespace kvpare::cpu::fused {

using Four = float __attribute__((vector_size(16)));

KVPARE_INLINE Four load_four(const float* p) {
  Four v;
  std::memcpy(&v, p, 16);
  return v;
}
KVPARE_INLINE void store_four(float* p, Four v) { std::memcpy(p, &v, 16); }

/// x[i][j] and x[j][i] change places.
KVPARE_INLINE void transpose(Four (&x)[4]) {
  const Four a = __builtin_shufflevector(x[0], x[1], 0, 4, 1, 5), b = __builtin_shufflevector(x[2], x[3], 0, 4, 1, 5);
  const Four c = __builtin_shufflevector(x[0], x[1], 2, 6, 3, 7), d = __builtin_shufflevector(x[2], x[3], 2, 6, 3, 7);
  x[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5), x[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  x[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5), x[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}

}  // namespace kvpare::cpu::fused

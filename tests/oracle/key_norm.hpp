// Keys that are short draw most attention.
#pragma once

#include <cmath>

#include "dense.hpp"

namespace kvpare::oracle {

/// score[h, j] = -||k[j, h, :]||_2.  keys [tokens, kv_heads, width] -> [kv_heads, tokens]
/// Source  Devoto et al., arXiv 2406.11430
inline Array2 key_norm(const Array3& keys) {
  Array2 scores(keys.b, keys.a);
  for (Index h = 0; h < keys.b; ++h)
    for (Index j = 0; j < keys.a; ++j) {
      double squares = 0;
      for (Index d = 0; d < keys.c; ++d) squares += keys.at(j, h, d) * keys.at(j, h, d);
      scores.at(h, j) = -std::sqrt(squares);
    }
  return scores;
}

}  // namespace kvpare::oracle

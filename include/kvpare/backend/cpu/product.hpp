// Dense products by Eigen, which no other header includes.
#pragma once

#include "../arguments.hpp"

#if !defined(KVPARE_COMPILED_LOOPS) || KVPARE_COMPILED_LOOPS == 6
#include <Eigen/Core>
#endif

namespace kvpare::cpu {

// Compiled here, or, with KVPARE_COMPILED_LOOPS, with the kernels in one file of their own (see fused/sets.hpp).
#if !defined(KVPARE_COMPILED_LOOPS)
#define KVPARE_PRODUCT_INLINE inline
#else
#define KVPARE_PRODUCT_INLINE
#endif

/// Matrix b of the batch.
KVPARE_PRODUCT_INLINE void multiply(const ProductArguments& p, Index b);

#if !defined(KVPARE_COMPILED_LOOPS) || KVPARE_COMPILED_LOOPS == 6
KVPARE_PRODUCT_INLINE void multiply(const ProductArguments& p, Index b) {
  using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using In = Eigen::Map<const Matrix>;
  const In first(p.a + b * p.m * p.k, p.m, p.k);
  Eigen::Map<Matrix> to(p.c + b * p.m * p.n, p.m, p.n);
  if (p.b_transposed)
    to.noalias() = first * In(p.b + b * p.n * p.k, p.n, p.k).transpose();
  else
    to.noalias() = first * In(p.b + b * p.k * p.n, p.k, p.n);
}
#endif
#undef KVPARE_PRODUCT_INLINE

}  // namespace kvpare::cpu

// What this machine can do, measured in this process: plain reads, plain copies, dense products.
#pragma once

#include <cstddef>
#include <span>

#include <kvpare/core/config.hpp>

namespace bench {

using kvpare::Index;

/// Bytes of K and V (or of scores, rows, ...) that the inputs of one benchmark rotate through, and the length of what
/// the yardsticks read or copy: far more than a last-level cache holds. Set once, by the command line.
Index& rotation_bytes();

/// Bytes read per second by all threads together, by the fastest of a few simple loops.
double read_rate(Index threads);

/// Reads rows that lie apart, and nothing more; row_bytes must be a multiple of 256.
void read_rows(std::span<const std::byte* const> rows, Index row_bytes);

/// Bytes per second that memcpy moves, those read and those written both counted.
double copy_rate(Index threads);

/// C[m, n] = A[m, k] * B[n, k]^T, or A[m, k] * B[k, n]; row-major floats.
struct ProductShape {
  Index m = 0, n = 0, k = 0;
  bool b_transposed = true;
};

/// Floating-point operations per second of Eigen on this product, every thread with its own operands.
double product_rate(const ProductShape& shape, Index threads);

}  // namespace bench

// `product` on the device: C = A B or A B^T in f32, batches of small matrices. A block computes 64 x 64 numbers of a C,
// 4 x 4 per thread, from slabs of 16 along k in shared memory. Where that makes few blocks (a row times a long matrix),
// k is cut and the pieces are added up afterwards, first to last. The shape alone decides the order of summation.
#pragma once

#include <algorithm>

#include "each.cuh"
#include "tuning.cuh"

namespace kvpare::cuda {

namespace detail {

struct ProductKernel {
  static constexpr int threads = 256, tile = 64, slab = 16, each = 4;  // numbers of a thread along a side
  static constexpr int row = tile + 4;                                 // of a slab: banks differ, 16-byte loads align
  static_assert(threads * each * each == tile * tile);

  ProductArguments p;
  Index row_tiles = 0, column_tiles = 0;
  Index pieces = 1, depth = 0;  // of k, and how long
  float* out = nullptr;         // [pieces][batch][m, n]

  Index shared_bytes() const { return 2 * slab * row * static_cast<Index>(sizeof(float)); }

  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    Index at = b.block();
    const Index column = at % column_tiles * tile;
    at /= column_tiles;
    const Index top = at % row_tiles * tile;
    at /= row_tiles;
    const Index piece = at % pieces, matrix = at / pieces;
    const Index first = piece * depth, last = std::min(p.k, first + depth);

    auto* left = b.template shared<float>(0);  // [slab][row]: A^T, then B
    auto* right = left + slab * row;
    const float* a_rows = p.a + matrix * p.m * p.k;
    const float* b_rows = p.b + matrix * p.n * p.k;
    const int x = b.thread() % (tile / each) * each, y = b.thread() / (tile / each) * each;
    float sums[each][each] = {};
    for (Index k = first; k < last; k += slab) {
      for (int i = b.thread(); i < slab * tile; i += threads) {
        const int d = i % slab, r = i / slab;
        left[d * row + r] = top + r < p.m && k + d < last ? a_rows[(top + r) * p.k + k + d] : 0.0f;
        if (p.b_transposed)
          right[d * row + r] = column + r < p.n && k + d < last ? b_rows[(column + r) * p.k + k + d] : 0.0f;
      }
      if (!p.b_transposed)
        for (int i = b.thread(); i < slab * tile; i += threads) {
          const int d = i / tile, c = i % tile;
          right[d * row + c] = column + c < p.n && k + d < last ? b_rows[(k + d) * p.n + column + c] : 0.0f;
        }
      b.sync();
      for (int d = 0; d < slab; ++d) {
        float l[each], r[each];
        for (int i = 0; i < each; ++i) l[i] = left[d * row + y + i], r[i] = right[d * row + x + i];
        for (int i = 0; i < each; ++i)
          for (int j = 0; j < each; ++j) sums[i][j] += l[i] * r[j];
      }
      b.sync();
    }
    float* c = out + (piece * p.batch + matrix) * p.m * p.n;
    for (int i = 0; i < each; ++i)
      for (int j = 0; j < each; ++j)
        if (top + y + i < p.m && column + x + j < p.n) c[(top + y + i) * p.n + column + x + j] = sums[i][j];
  }
};

struct AddPieces {
  const float* pieces_of;  // [pieces][numbers]
  Index pieces, numbers;
  float* out;
  KVPARE_HD void operator()(Index i) const {
    float sum = 0;
    for (Index p = 0; p < pieces; ++p) sum += pieces_of[p * numbers + i];
    out[i] = sum;
  }
};

}  // namespace detail

template <class Work>
void product(Work& work, const ProductArguments& p) {
  using Kernel = detail::ProductKernel;
  constexpr ProductTuning tuning = product_tuning;
  Kernel kernel{p, ceil_div(p.m, Kernel::tile), ceil_div(p.n, Kernel::tile), 1, p.k, p.c};
  const Index tiles = kernel.row_tiles * kernel.column_tiles * p.batch, numbers = p.batch * p.m * p.n;
  if (tiles == 0) return;
  const Index pieces = std::min(tuning.blocks / tiles, ceil_div(p.k, tuning.least_depth));
  if (pieces > 1) {
    kernel.depth = round_up(ceil_div(p.k, pieces), Kernel::slab);
    kernel.pieces = ceil_div(p.k, kernel.depth);
    kernel.out = work.template scratch<float>(kernel.pieces * numbers);
  }
  work.launch(tiles * kernel.pieces, kernel);
  if (kernel.pieces > 1) each(work, numbers, detail::AddPieces{kernel.out, kernel.pieces, numbers, p.c});
}

}  // namespace kvpare::cuda

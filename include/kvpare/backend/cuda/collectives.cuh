// What the threads of a warp, or of a block, find out together. Orders are fixed, so sums of floats come out the same
// on every run. All threads of the warp, or block, make the call; T has 4 or 8 bytes.
//
// Those of a block exchange through `room`: shared memory for a T per warp, to be used again after the next sync.
#pragma once

#include <cmath>

#include "block.cuh"

namespace kvpare::cuda {

struct Sum {
  template <class T>
  KVPARE_DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};
struct Least {
  template <class T>
  KVPARE_DEVICE T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Greatest {
  template <class T>
  KVPARE_DEVICE T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};

struct GreatestNumber {
  KVPARE_DEVICE float operator()(float a, float b) const { return std::fmax(a, b); }
};

/// Every lane gets join of all x; join(a, b) = join(b, a).
template <class Block, class T, class Join>
KVPARE_DEVICE T warp_fold(Block& b, T x, Join join) {
  for (int mask = 16; mask > 0; mask /= 2) x = join(x, b.shuffle_xor(x, mask));
  return x;
}

template <class Block, class T>
KVPARE_DEVICE T warp_sum(Block& b, T x) {
  return warp_fold(b, x, Sum{});
}

/// The largest number; NaN are left out.
template <class Block>
KVPARE_DEVICE float warp_max(Block& b, float x) {
  return warp_fold(b, x, GreatestNumber{});
}

/// The sum of x over the lanes up to one's own.
template <class Block, class T>
KVPARE_DEVICE T warp_scan(Block& b, T x) {
  for (int n = 1; n < 32; n *= 2) {
    const T lower = b.shuffle_up(x, n);
    if (b.lane() >= n) x = lower + x;
  }
  return x;
}

/// Every thread gets join of all x; `nothing` is what join leaves the other as it is with.
template <class Block, class T, class Join>
KVPARE_DEVICE T block_fold(Block& b, T x, T nothing, Join join, T* room) {
  x = warp_fold(b, x, join);
  if (b.lane() == 0) room[b.warp()] = x;
  b.sync();
  return warp_fold(b, b.lane() < b.warps() ? room[b.lane()] : nothing, join);
}

template <class Block, class T>
KVPARE_DEVICE T block_sum(Block& b, T x, T* room) {
  return block_fold(b, x, T{}, Sum{}, room);
}

/// Sums over the threads before one's own, and over all. Nothing is subtracted: infinities stay what they are.
template <class T>
struct Scan {
  T before, total;
};
template <class Block, class T>
KVPARE_DEVICE Scan<T> block_scan(Block& b, T x, T* room) {
  const T here = warp_scan(b, x);
  if (b.lane() == 31) room[b.warp()] = here;
  b.sync();
  const T warps = warp_scan(b, b.lane() < b.warps() ? room[b.lane()] : T{});
  const T lower_warps = b.shuffle(warps, b.warp() > 0 ? b.warp() - 1 : 0), lower_lanes = b.shuffle_up(here, 1);
  const T warp_start = b.warp() > 0 ? lower_warps : T{};
  return {b.lane() > 0 ? warp_start + lower_lanes : warp_start, b.shuffle(warps, 31)};
}

/// A bit per column of 64: lane l has columns l and l + 32.
template <class Block>
KVPARE_DEVICE std::uint64_t ballot(Block& b, bool low, bool high) {
  const std::uint64_t upper = b.ballot(high);
  return b.ballot(low) | upper << 32;
}

}  // namespace kvpare::cuda

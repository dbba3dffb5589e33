// What a codec's tile looks like on the device, and the kernels over it.
#pragma once

#include "codecs.cuh"

namespace kvpare::cuda {

/// The handle of a codec on one side; null when there is no such tile.
template <class Work, Codec C>
const TileOps<Work>* tile_ops(Side, TileShape shape) {
  static constexpr TileOps<Work> ops;
  return C::fits(shape) ? &ops : nullptr;
}

}  // namespace kvpare::cuda

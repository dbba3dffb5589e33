// `attend` on the device.
#pragma once

#include <stdexcept>

#include "codecs.cuh"
#include "tiles.cuh"

namespace kvpare::cuda {

template <class Work, class P>
const void* pair_ops(TileShape, TileShape) {
  return nullptr;
}
template <class Work>
Support pair_support(const PageGeometry&) {
  return Support::generic;
}
template <class Work>
void attend(Work&, const LayerShape&, std::span<const AttendSequence>, MassKind) {
  throw std::logic_error("attend: not written yet");
}

}  // namespace kvpare::cuda

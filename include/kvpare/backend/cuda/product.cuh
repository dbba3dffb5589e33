// `product` on the device.
#pragma once

#include <stdexcept>

#include "workspace.cuh"

namespace kvpare::cuda {

template <class Work>
void product(Work&, const ProductArguments&) {
  throw std::logic_error("product: not written yet");
}

}  // namespace kvpare::cuda

// Everything for a GPU: the library without the CPU backend, and the CUDA backend. Include it in .cu files.
#pragma once

#include "any_backend.hpp"
#include "backend/cuda/backend.cuh"
#include "backend/cuda/runtime.cuh"

#if defined(__CUDACC__)
namespace kvpare::cuda {

/// The backend trait on a stream of the caller: `cuda::Backend backend({.stream = stream});`
class Backend : public BasicBackend<Stream> {
 public:
  explicit Backend(Options options = {}) : BasicBackend<Stream>(options) {}
  cudaStream_t stream() { return runtime().stream(); }
};

static_assert(kvpare::Backend<Backend>);

}  // namespace kvpare::cuda
#endif

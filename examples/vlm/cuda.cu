// The engine on a GPU: all that nvcc compiles of this program.
#include "cuda.hpp"

#include <kvpare/cuda.cuh>
#include <stdexcept>
#include <string>

#include "decoder.inl"
#include "dialogue.inl"
#include "engine.inl"

namespace vlm {
namespace {

class OwnStream {
 protected:
  OwnStream() {
    const cudaError_t made = cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking);
    kvpare::require(made == cudaSuccess, "--device cuda: making a stream: ", cudaGetErrorString(made));
  }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  ~OwnStream() { cudaStreamDestroy(stream_); }

  cudaStream_t stream_ = nullptr;
};

class StreamAndBackend : OwnStream, public kvpare::cuda::Backend {
 public:
  StreamAndBackend() : kvpare::cuda::Backend({.stream = stream_, .pinned_bytes = 4 << 20}) {}
};

}  // namespace

void check_cuda() {
  int devices = 0;
  const cudaError_t found = cudaGetDeviceCount(&devices);
  if (found != cudaSuccess || devices == 0)
    throw std::runtime_error(std::string("--device cuda: no CUDA device was found") +
                             (found != cudaSuccess ? std::string(": ") + cudaGetErrorString(found) : ""));
}

std::unique_ptr<Engine> make_cuda_engine(Index page_tokens) {
  return std::make_unique<EngineOn<kvpare::cuda::Backend, StreamAndBackend>>(page_tokens);
}

}  // namespace vlm

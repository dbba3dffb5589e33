// The backends that every conformance suite runs on: the CPU at every instruction set and with one and two threads, and
// the walled backend; or, where a file that includes the suite asks for it, the device's kernels on the host (tests/simt), or
// on the device itself (tests/cuda).
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "walled_backend.hpp"

#if defined(KVPARE_TEST_SIMT)
#include "simt/backend.hpp"
#elif defined(KVPARE_TEST_CUDA)
#include <kvpare/cuda.cuh>
#endif

namespace kvpare::test {

template <cpu::Isa set, Index thread_count>
struct CpuRig {
  using Backend = cpu::Backend;
  static constexpr cpu::Isa isa = set;
  static constexpr Index threads = thread_count;
  static std::string name() {
    return std::string("Cpu_") + std::string(cpu::name_of(set)) + "_" + std::to_string(thread_count);
  }
  static bool available() { return cpu::supports(set); }
  static Backend& backend() {
    static Backend one({.threads = thread_count, .isa = set});
    return one;
  }
};

struct WalledRig {
  using Backend = WalledBackend;
  static std::string name() { return "Walled"; }
  static bool available() { return true; }
  static Backend& backend() {
    static Backend one;
    return one;
  }
};

#if defined(KVPARE_TEST_SIMT)

/// The CUDA backend's own kernels, a fiber per thread. Slow: `small` asks for small shapes.
struct SimtRig {
  using Backend = simt::Backend;
  static constexpr bool small = true;
  static std::string name() { return "Simt"; }
  static bool available() { return true; }
  static Backend& backend() {
    static Backend one(simt::Runtime::Settings{.arena_bytes = Index{256} << 20});
    return one;
  }
};

using AllRigs = ::testing::Types<SimtRig>;
using PipelineRigs = ::testing::Types<SimtRig>;

#elif defined(KVPARE_TEST_CUDA)

/// The device, on a stream of its own.
struct CudaRig {
  using Backend = cuda::Backend;
  static std::string name() { return "Cuda"; }
  static bool available() {
    int devices = 0;
    return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
  }
  static Backend& backend() {
    static cudaStream_t stream = [] {
      cudaStream_t s = nullptr;
      cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking);
      return s;
    }();
    static Backend one({.stream = stream});
    return one;
  }
};

using AllRigs = ::testing::Types<CudaRig>;
using PipelineRigs = ::testing::Types<CudaRig>;

#else

using AllRigs =
    ::testing::Types<CpuRig<cpu::Isa::plain, 1>, CpuRig<cpu::Isa::plain, 2>, CpuRig<cpu::Isa::avx2, 1>,
                     CpuRig<cpu::Isa::avx2, 2>, CpuRig<cpu::Isa::avx512, 1>, CpuRig<cpu::Isa::avx512, 2>, WalledRig>;

/// For what does not depend on the instruction set: pipelines, policies.
using PipelineRigs = ::testing::Types<CpuRig<cpu::Isa::plain, 2>, WalledRig>;

#endif

/// Does a rig want small shapes?
template <class Rig>
constexpr bool is_small() {
  if constexpr (requires { Rig::small; })
    return Rig::small;
  else
    return false;
}

struct RigNames {
  template <class Rig>
  static std::string GetName(int) {
    return Rig::name();
  }
};

/// A typed suite's fixture: `be()` is the rig's backend.
template <class Rig>
class OnRig : public ::testing::Test {
 public:
  using B = typename Rig::Backend;

 protected:
  void SetUp() override {
    if (!Rig::available()) GTEST_SKIP() << Rig::name() << ": this machine lacks the instruction set, or the device";
  }
  static B& be() { return Rig::backend(); }
};

/// A host array in backend memory.
template <Backend B, class T>
Buffer<B, T> upload(B& be, const std::vector<T>& values) {
  return Buffer<B, T>(be, std::span<const T>(values));
}

/// Backend memory as a host array: one copy, one wait.
template <Backend B, class T>
std::vector<T> download(B& be, const Buffer<B, T>& buffer) {
  std::vector<T> values;
  if (buffer.size() > 0) be.wait(buffer.to_host(values));
  return values;
}

/// The message of an InvalidArgument, or "no error".
template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const InvalidArgument& e) {
    return e.what();
  }
  return "no error";
}

}  // namespace kvpare::test

// Where kernels run: a CUDA stream of the caller, with pinned memory for what goes to the device and comes back.
//
// Nothing here synchronises but `wait`, with one exception that it takes work to reach: host memory on its way to the device
// lies in a ring of pinned memory, and a caller who queues more than a ring's worth of copies before the device has done the
// first of them waits for that one.
// While the stream is being captured into a graph, copies to the device keep pinned memory of their own for as long as the
// runtime lives, since every replay reads it again.
#pragma once

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

#include "../../core/error.hpp"
#include "block.cuh"

namespace kvpare::cuda {

/// A backend is of the device that is current when it is made, and wants it current whenever it is called.
struct Options {
  cudaStream_t stream = nullptr;     // the caller's; outlives the backend. Null is CUDA's default stream
  Index pinned_bytes = 32 << 20;     // of the ring
  cudaMemPool_t pool = nullptr;      // where `allocate` takes memory from; null = a pool of the backend's own
};

namespace detail {

inline void check(cudaError_t code, const char* what) {
  require(code == cudaSuccess, "cuda backend: ", what, ": ", cudaGetErrorString(code));
}

/// How many blocks of a kernel are to share a multiprocessor, where it says so: bounds its registers.
template <class Kernel>
constexpr int least_blocks() {
  if constexpr (requires { Kernel::least_blocks; })
    return Kernel::least_blocks;
  else
    return 1;
}

template <class Kernel>
__global__ void __launch_bounds__(Kernel::threads, least_blocks<Kernel>()) run(const __grid_constant__ Kernel kernel) {
  DeviceBlock block;
  kernel(block);
}

}  // namespace detail

class Stream {
 public:
  static constexpr std::string_view name = "cuda";
  struct Ticket {
    std::uint64_t number = 0;
  };

  explicit Stream(Options options = {}) : stream_(options.stream), pool_(options.pool) {
    detail::check(cudaGetDevice(&device_), "which device is current");
    const auto attribute = [&](cudaDeviceAttr which) {
      int value = 0;
      detail::check(cudaDeviceGetAttribute(&value, which, device_), "asking for an attribute of the device");
      return value;
    };
    multiprocessors_ = attribute(cudaDevAttrMultiProcessorCount);
    shared_limit_ = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    const int major = attribute(cudaDevAttrComputeCapabilityMajor), minor = attribute(cudaDevAttrComputeCapabilityMinor);
    require(major >= 8, "cuda backend: device ", device_, " has compute capability ", major, ".", minor,
            ", must be 8.0 or newer");
    if (pool_ == nullptr) {
      cudaMemPoolProps wanted = {};
      wanted.allocType = cudaMemAllocationTypePinned;
      wanted.location.type = cudaMemLocationTypeDevice, wanted.location.id = device_;
      detail::check(cudaMemPoolCreate(&own_pool_, &wanted), "making a memory pool");
      std::uint64_t keep = ~std::uint64_t{0};  // what was given back is kept for the next allocation
      detail::check(cudaMemPoolSetAttribute(own_pool_, cudaMemPoolAttrReleaseThreshold, &keep), "setting up the pool");
      pool_ = own_pool_;
    }
    segment_bytes_ = round_up(std::max<Index>(options.pinned_bytes, Index{1} << 16) / segments, 64);
    void* ring = nullptr;
    detail::check(cudaMallocHost(&ring, static_cast<std::size_t>(segment_bytes_ * segments)), "pinned memory");
    ring_ = static_cast<std::byte*>(ring);
    for (cudaEvent_t& e : left_) detail::check(cudaEventCreateWithFlags(&e, cudaEventDisableTiming), "making an event");
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() {
    cudaStreamSynchronize(stream_);
    for (const Staged& s : staged_) give_back(s.block, s.done);
    for (const auto& [memory, bytes] : spare_) cudaFreeHost(memory);
    for (void* memory : captured_) cudaFreeHost(memory);
    for (cudaEvent_t e : spare_events_) cudaEventDestroy(e);
    for (cudaEvent_t e : left_) cudaEventDestroy(e);
    cudaFreeHost(ring_);
    if (own_pool_ != nullptr) cudaMemPoolDestroy(own_pool_);
  }

  cudaStream_t stream() const { return stream_; }
  Index multiprocessors() const { return multiprocessors_; }
  Index shared_limit() const { return shared_limit_; }

  void* allocate(Index bytes) {
    if (bytes < 0 || capturing()) return nullptr;  // memory of a graph would be the graph's
    void* memory = nullptr;
    const auto size = static_cast<std::size_t>(std::max<Index>(bytes, 1));
    if (cudaMallocFromPoolAsync(&memory, size, pool_, stream_) == cudaSuccess) return memory;
    cudaGetLastError();  // so that the next launch does not report it
    return nullptr;
  }
  void release(void* memory) {
    if (memory != nullptr) cudaFreeAsync(memory, stream_);
  }

  void to_backend(void* to, const void* from, Index bytes) {
    if (bytes <= 0) return;
    if (capturing()) return copy_in(to, keep_for_replay(from, bytes), bytes);
    auto* target = static_cast<std::byte*>(to);
    const auto* source = static_cast<const std::byte*>(from);
    while (bytes > 0) {
      if (used_ == segment_bytes_) next_segment();
      const Index part = std::min(bytes, segment_bytes_ - used_);
      std::byte* pinned = ring_ + segment_ * segment_bytes_ + used_;
      std::memcpy(pinned, source, static_cast<std::size_t>(part));
      copy_in(target, pinned, part);
      target += part, source += part, bytes -= part, used_ = std::min(round_up(used_ + part, 64), segment_bytes_);
    }
  }

  Ticket to_host(void* to, const void* from, Index bytes) {
    if (bytes <= 0) return {last_ticket_};
    require(!capturing(), "cuda backend: a copy to the host cannot be captured into a graph");
    Staged s{++last_ticket_, to, bytes, pinned(bytes), event()};
    detail::check(cudaMemcpyAsync(s.block.memory, from, static_cast<std::size_t>(bytes), cudaMemcpyDeviceToHost, stream_),
                  "copying to the host");
    detail::check(cudaEventRecord(s.done, stream_), "recording an event");
    staged_.push_back(s);
    return {last_ticket_};
  }

  void wait(Ticket ticket) {
    while (!staged_.empty() && staged_.front().number <= ticket.number) {
      const Staged s = staged_.front();
      detail::check(cudaEventSynchronize(s.done), "waiting for a copy");
      std::memcpy(s.to, s.block.memory, static_cast<std::size_t>(s.bytes));
      give_back(s.block, s.done);
      staged_.pop_front();
    }
  }

  bool capturing() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    detail::check(cudaStreamIsCapturing(stream_, &status), "asking whether the stream is captured");
    return status == cudaStreamCaptureStatusActive;
  }

  template <class Kernel>
  void launch(Index blocks, const Kernel& kernel) {
    static_assert(std::is_trivially_copyable_v<Kernel> && sizeof(Kernel) <= 4096, "kernels are small plain structs");
    if (blocks <= 0) return;
    require(blocks <= 0x7fffffff, "cuda backend: ", blocks, " blocks in one launch, must be below 2^31");
    const Index shared = kernel.shared_bytes();
    require(shared <= shared_limit_, "cuda backend: a kernel wants ", shared, " bytes of shared memory, the device has ",
            shared_limit_);
    if (shared > 48 * 1024)
      detail::check(cudaFuncSetAttribute(detail::run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         static_cast<int>(shared)),
                    "asking for shared memory");
    detail::run<Kernel><<<static_cast<unsigned>(blocks), Kernel::threads, static_cast<std::size_t>(shared), stream_>>>(
        kernel);
    detail::check(cudaGetLastError(), "launching a kernel");
  }

 private:
  static constexpr Index segments = 8;
  struct Pinned {
    void* memory = nullptr;
    Index bytes = 0;
  };
  struct Staged {  // a copy to the host that nobody has waited for
    std::uint64_t number;
    void* to;
    Index bytes;
    Pinned block;
    cudaEvent_t done;
  };

  void copy_in(void* to, const void* pinned, Index bytes) {
    detail::check(cudaMemcpyAsync(to, pinned, static_cast<std::size_t>(bytes), cudaMemcpyHostToDevice, stream_),
                  "copying to the device");
  }
  const void* keep_for_replay(const void* from, Index bytes) {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    detail::check(cudaThreadExchangeStreamCaptureMode(&mode), "leaving the strict mode of capture");
    void* memory = nullptr;
    const cudaError_t code = cudaMallocHost(&memory, static_cast<std::size_t>(bytes));
    cudaThreadExchangeStreamCaptureMode(&mode);
    detail::check(code, "pinned memory");
    captured_.push_back(memory);
    std::memcpy(memory, from, static_cast<std::size_t>(bytes));
    return memory;
  }
  void next_segment() {
    detail::check(cudaEventRecord(left_[static_cast<std::size_t>(segment_)], stream_), "recording an event");
    segment_ = (segment_ + 1) % segments, used_ = 0;
    detail::check(cudaEventSynchronize(left_[static_cast<std::size_t>(segment_)]), "waiting for a segment of the ring");
  }
  Pinned pinned(Index bytes) {
    const auto fits = std::find_if(spare_.begin(), spare_.end(), [&](const Pinned& p) { return p.bytes >= bytes; });
    if (fits != spare_.end()) {
      const Pinned p = *fits;
      spare_.erase(fits);
      return p;
    }
    Pinned p{nullptr, round_up(bytes, 4096)};
    detail::check(cudaMallocHost(&p.memory, static_cast<std::size_t>(p.bytes)), "pinned memory");
    return p;
  }
  cudaEvent_t event() {
    cudaEvent_t e = nullptr;
    if (spare_events_.empty()) {
      detail::check(cudaEventCreateWithFlags(&e, cudaEventDisableTiming), "making an event");
    } else {
      e = spare_events_.back();
      spare_events_.pop_back();
    }
    return e;
  }
  void give_back(Pinned block, cudaEvent_t done) { spare_.push_back(block), spare_events_.push_back(done); }

  cudaStream_t stream_ = nullptr;
  cudaMemPool_t pool_ = nullptr, own_pool_ = nullptr;
  int device_ = 0;
  Index multiprocessors_ = 0, shared_limit_ = 0;
  std::byte* ring_ = nullptr;
  Index segment_bytes_ = 0, segment_ = 0, used_ = 0;
  std::array<cudaEvent_t, segments> left_ = {};  // recorded when a segment was filled
  std::deque<Staged> staged_;                    // in the order of their tickets
  std::uint64_t last_ticket_ = 0;
  std::vector<Pinned> spare_;
  std::vector<cudaEvent_t> spare_events_;
  std::vector<void*> captured_;
};

}  // namespace kvpare::cuda

#endif  // __CUDACC__

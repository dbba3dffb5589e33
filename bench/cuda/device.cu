// The yardstick of the CUDA benchmarks, and how much memory there is.
#include "support.cuh"

namespace bench {
namespace {

constexpr Index yardstick_bytes = Index{1} << 30;

__global__ void copy_all(const uint4* from, uint4* to, Index count) {
  const Index step = static_cast<Index>(gridDim.x) * blockDim.x;
  for (Index i = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step)
    __stcs(to + i, __ldcs(from + i));
}

struct Yardstick {
  void *from = nullptr, *to = nullptr;
  int multiprocessors = 0;
  Yardstick() {
    check(cudaMalloc(&from, yardstick_bytes), "memory of the yardstick");
    check(cudaMalloc(&to, yardstick_bytes), "memory of the yardstick");
    check(cudaMemset(from, 0x5a, yardstick_bytes), "filling the yardstick");
    check(cudaDeviceSynchronize(), "filling the yardstick");
    int device = 0;
    check(cudaGetDevice(&device), "which device is current");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "asking for an attribute");
  }
};

Yardstick& yardstick() {
  static Yardstick one;  // for the life of the process
  return one;
}

}  // namespace

double copy_rate(cudaStream_t stream) {
  Yardstick& y = yardstick();
  Clock clock;
  const auto rate = [&](const auto& copy) {
    copy();
    std::vector<double> seconds;
    for (int i = 0; i < 7; ++i) seconds.push_back(clock.seconds_of(stream, copy));
    return 2 * static_cast<double>(yardstick_bytes) / median(seconds);
  };
  const double by_driver =
      rate([&] { check(cudaMemcpyAsync(y.to, y.from, yardstick_bytes, cudaMemcpyDeviceToDevice, stream), "copying"); });
  const double by_kernel = rate([&] {
    copy_all<<<static_cast<unsigned>(y.multiprocessors * 16), 256, 0, stream>>>(
        static_cast<const uint4*>(y.from), static_cast<uint4*>(y.to),
        yardstick_bytes / static_cast<Index>(sizeof(uint4)));
    check(cudaGetLastError(), "copying");
  });
  return std::max(by_driver, by_kernel);
}

void require_room(double bytes) {
  yardstick();
  std::size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "asking for free memory");
  const double room = std::min(static_cast<double>(free) * 0.95, static_cast<double>(most_bytes));
  if (bytes > room)
    throw DoesNotFit(kvpare::message("skipped: needs ", static_cast<Index>(bytes / 0x1p20), " MiB, has room for ",
                                     static_cast<Index>(room / 0x1p20)));
}

}  // namespace bench

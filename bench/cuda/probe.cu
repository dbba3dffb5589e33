// kvpare_gpu_probe [file]: what kernels rely on, asked of the device in a few seconds; in words, and as JSON in a file.
//
//   read, copy        bytes per second, plain loops over 2 GiB (copies: read and written both counted)
//   f16 subnormals    does mma keep 16-bit operands that are subnormal? Codes below 8 bits are such operands as they
// lie
//   mma               rate of mma 16x8x16 of f16, two floating-point operations per product
//   e4m3              conversions of two numbers to f16 per clock and multiprocessor, lanes counted
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

void check(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  std::fprintf(stderr, "kvpare_gpu_probe: %s: %s\n", what, cudaGetErrorString(code));
  std::exit(2);
}

template <class Launch>
double median_seconds(const Launch& launch) {
  cudaEvent_t first, last;
  check(cudaEventCreate(&first), "making an event");
  check(cudaEventCreate(&last), "making an event");
  for (int i = 0; i < 3; ++i) launch();
  std::vector<float> ms(11);
  for (float& t : ms) {
    check(cudaEventRecord(first), "recording an event");
    launch();
    check(cudaGetLastError(), "launching a kernel");
    check(cudaEventRecord(last), "recording an event");
    check(cudaEventSynchronize(last), "running a kernel");
    check(cudaEventElapsedTime(&t, first, last), "reading a clock");
  }
  std::nth_element(ms.begin(), ms.begin() + 5, ms.end());
  return ms[5] * 1e-3;
}

__global__ void read_all(const uint4* from, std::size_t count, std::uint32_t* never) {
  constexpr int unroll = 8;
  const std::size_t step = std::size_t{gridDim.x} * blockDim.x;
  std::uint32_t sum = 0;
  for (std::size_t i = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x; i + (unroll - 1) * step < count;
       i += unroll * step) {
    uint4 v[unroll];
#pragma unroll
    for (int u = 0; u < unroll; ++u) v[u] = __ldcs(from + i + u * step);
#pragma unroll
    for (int u = 0; u < unroll; ++u) sum ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
  }
  if (sum == 0x12345678u) *never = sum;
}

__global__ void copy_all(const uint4* from, uint4* to, std::size_t count) {
  const std::size_t step = std::size_t{gridDim.x} * blockDim.x;
  for (std::size_t i = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step)
    __stcs(to + i, __ldcs(from + i));
}

__device__ void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// One operand is a code of 1 to 15 in the low bits of a half, code * 2^-24; the other is 1. Gives sums of codes.
__global__ void subnormal_sums(float* sums) {
  const std::uint32_t code = 1 + threadIdx.x % 15, two = code | code << 16, ones = 0x3c003c00u;
  const std::uint32_t codes4[4] = {two, two, two, two}, codes2[2] = {two, two};
  const std::uint32_t ones4[4] = {ones, ones, ones, ones}, ones2[2] = {ones, ones};
  float as_a[4] = {}, as_b[4] = {};
  mma(as_a, codes4, ones2);
  mma(as_b, ones4, codes2);
  for (int i = 0; i < 4; ++i) {
    sums[threadIdx.x * 8 + i] = as_a[i] * 0x1p24f;
    sums[threadIdx.x * 8 + 4 + i] = as_b[i] * 0x1p24f;
  }
}

bool keeps_subnormals(float* memory) {
  subnormal_sums<<<1, 32>>>(memory);
  float sums[256];
  check(cudaMemcpy(sums, memory, sizeof sums, cudaMemcpyDeviceToHost), "reading the sums");
  const auto sum_of_group = [](int group) {  // lanes 4 g … 4 g + 3 hold four codes each of row, or column, g
    float sum = 0;
    for (int lane = 4 * group; lane < 4 * group + 4; ++lane) sum += 4.0f * static_cast<float>(1 + lane % 15);
    return sum;
  };
  bool kept = true;
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      kept &= sums[lane * 8 + i] == sum_of_group(lane / 4);
      kept &= sums[lane * 8 + 4 + i] == sum_of_group(lane % 4 * 2 + i % 2);
    }
  return kept;
}

constexpr int mma_chains = 8, rounds = 4096;

__global__ void many_mma(float* never) {
  const std::uint32_t a[4] = {threadIdx.x, 1, 2, 3}, b[2] = {0x3c003c00u, threadIdx.x};
  float c[mma_chains][4] = {};
  for (int i = 0; i < rounds; ++i)
#pragma unroll
    for (int j = 0; j < mma_chains; ++j) mma(c[j], a, b);
  float sum = 0;
  for (const auto& part : c)
    for (const float x : part) sum += x;
  if (sum == 1.2345f) *never = sum;
}

__global__ void many_conversions(std::uint32_t* never) {
#if __CUDA_ARCH__ >= 890
  std::uint32_t v[mma_chains], sum = 0;
  for (int j = 0; j < mma_chains; ++j) v[j] = threadIdx.x * 77u + static_cast<std::uint32_t>(j);
  for (int i = 0; i < rounds; ++i)
#pragma unroll
    for (int j = 0; j < mma_chains; ++j) {
      std::uint32_t two;
      asm volatile("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(two) : "h"(static_cast<unsigned short>(v[j])));
      v[j] = two;
    }
  for (const std::uint32_t x : v) sum ^= x;
  if (sum == 0x12345678u) *never = sum;
#endif
}

}  // namespace

int main(int count, char** arguments) {
  cudaDeviceProp device = {};
  check(cudaGetDeviceProperties(&device, 0), "looking for a device");
  int driver = 0, runtime = 0, khz = 0;
  check(cudaDriverGetVersion(&driver), "asking for the driver's version");
  check(cudaRuntimeGetVersion(&runtime), "asking for the runtime's version");
  check(cudaDeviceGetAttribute(&khz, cudaDevAttrClockRate, 0), "asking for an attribute");
  const int units = device.multiProcessorCount;
  const std::size_t bytes = std::size_t{2} << 30, numbers = bytes / sizeof(uint4);
  uint4 *from = nullptr, *to = nullptr;
  check(cudaMalloc(&from, bytes), "memory");
  check(cudaMalloc(&to, bytes), "memory");
  check(cudaMemset(from, 0x5a, bytes), "filling memory");
  auto* never = reinterpret_cast<std::uint32_t*>(to);

  double read = 0;
  for (const int blocks : {4, 8, 16})
    read = std::max(read, static_cast<double>(bytes) /
                              median_seconds([&] { read_all<<<units * blocks, 256>>>(from, numbers, never); }));
  const double by_kernel =
      2 * static_cast<double>(bytes) / median_seconds([&] { copy_all<<<units * 16, 256>>>(from, to, numbers); });
  const double by_driver = 2 * static_cast<double>(bytes) / median_seconds([&] {
                             check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice), "copying");
                           });
  const bool kept = keeps_subnormals(reinterpret_cast<float*>(to));
  const double products = median_seconds([&] { many_mma<<<units * 4, 128>>>(reinterpret_cast<float*>(to)); });
  const double flops = 4096.0 * mma_chains * rounds * 4 * units * 4 / products;
  const double converting = median_seconds([&] { many_conversions<<<units * 8, 256>>>(never); });
  const bool converts = device.major * 10 + device.minor >= 89;
  const double lanes = converts ? 8.0 * 256 * rounds * mma_chains / converting / (khz * 1e3) : 0;

  std::printf("%s, compute capability %d.%d, %d multiprocessors, L2 %d MiB, %.0f MHz, driver %d, runtime %d\n",
              device.name, device.major, device.minor, units, device.l2CacheSize >> 20, khz / 1e3, driver, runtime);
  std::printf("read %.0f GB/s, copy %.0f GB/s by a kernel, %.0f by the driver (read + written)\n", read / 1e9,
              by_kernel / 1e9, by_driver / 1e9);
  std::printf("f16 subnormals in mma: %s\n", kept ? "kept" : "NOT KEPT: attention over codes is wrong on this device");
  std::printf("mma 16x8x16 of f16: %.0f TFLOP/s; e4m3 to f16: %.1f lane conversions per clock and multiprocessor\n",
              flops / 1e12, lanes);
  if (count > 1) {
    std::FILE* file = std::fopen(arguments[1], "w");
    if (file == nullptr) return 3;
    std::fprintf(
        file,
        "{\"device\": \"%s\", \"compute_capability\": \"%d.%d\", \"multiprocessors\": %d, \"l2_mib\": %d,\n"
        " \"clock_mhz\": %.0f, \"driver\": %d, \"runtime\": %d, \"read_bytes_per_second\": %.4e,\n"
        " \"copy_bytes_per_second\": %.4e, \"copy_bytes_per_second_driver\": %.4e, \"f16_subnormals_kept\": %s,\n"
        " \"mma_flops\": %.4e, \"e4m3_lanes_per_clock\": %.1f}\n",
        device.name, device.major, device.minor, units, device.l2CacheSize >> 20, khz / 1e3, driver, runtime, read,
        by_kernel, by_driver, kept ? "true" : "false", flops, lanes);
    std::fclose(file);
  }
  return kept ? 0 : 1;
}

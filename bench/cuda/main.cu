// kvpare_bench_cuda: Google Benchmark's command line. Fails where there is no device.
#include "support.cuh"

int main(int count, char** arguments) {
  bool lists = false;  // names can be listed anywhere
  for (int i = 1; i < count; ++i) lists |= std::string_view(arguments[i]).starts_with("--benchmark_list_tests");
  benchmark::Initialize(&count, arguments);
  if (benchmark::ReportUnrecognizedArguments(count, arguments)) return 1;
  cudaDeviceProp device = {};
  const cudaError_t found = cudaGetDeviceProperties(&device, 0);
  if (found != cudaSuccess && !lists) {
    std::fprintf(stderr, "kvpare_bench_cuda: no device: %s\n", cudaGetErrorString(found));
    return 2;
  }
  benchmark::AddCustomContext("device", device.name);
  benchmark::AddCustomContext("multiprocessors", std::to_string(device.multiProcessorCount));
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}

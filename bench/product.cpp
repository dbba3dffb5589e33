// product: dense products through the Eigen that the library's user compiles.
#include "support/rig.hpp"
#include "support/run.hpp"

namespace bench {
namespace {

void product(benchmark::State& state, Index batch, const ProductShape& p, Index threads) {
  kvpare::cpu::Backend backend({.threads = threads});
  const std::vector<float> a = random_rows<float>(batch, p.m, p.k), b = random_rows<float>(batch, p.n, p.k, 2);
  std::vector<float> c(static_cast<std::size_t>(batch * p.m * p.n));
  const double flops = 2.0 * static_cast<double>(batch * p.m * p.n * p.k);
  run(state, {.against = {of_sgemm(flops, p, threads)}}, [&](Index) {
    backend.product({.a = a.data(),
                     .b = b.data(),
                     .c = c.data(),
                     .batch = batch,
                     .m = p.m,
                     .n = p.n,
                     .k = p.k,
                     .b_transposed = p.b_transposed});
  });
}

const bool added = [] {
  for (Index tokens : {2048, 8192})
    for (Index threads : {1, 2})
      add(kvpare::message("product/cpu/float/batch:4/M:256/N:", tokens, "/K:128/threads:", threads),
          [=](benchmark::State& state) { product(state, 4, {.m = 256, .n = tokens, .k = 128}, threads); });
  return true;
}();

}  // namespace
}  // namespace bench

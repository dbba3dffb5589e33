// The CUDA backend on fibers. It and the cache on it are compiled once for all tests: compiled/*.cpp.
#pragma once

#include <kvpare/backend/cuda/backend.cuh>
#include <kvpare/compiled.hpp>

#include "runtime.hpp"

namespace kvpare::test::simt {
using Backend = cuda::BasicBackend<Runtime>;
static_assert(kvpare::Backend<Backend>);
}  // namespace kvpare::test::simt

#if defined(KVPARE_TEST_COMPILED_SIMT)
extern template class kvpare::cuda::BasicBackend<kvpare::test::simt::Runtime>;
namespace kvpare {
KVPARE_COMPILED_CACHE(extern template, test::simt::Backend)
}
#endif

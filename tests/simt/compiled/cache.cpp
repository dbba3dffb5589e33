// The cache, once for all tests of the CUDA backend on the host.
#include "../backend.hpp"

namespace kvpare {
KVPARE_COMPILED_CACHE(template, test::simt::Backend)
}

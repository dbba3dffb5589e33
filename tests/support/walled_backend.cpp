// The cache on the walled backend, once for all tests.
#include "walled_backend.hpp"

namespace kvpare {
KVPARE_COMPILED_CACHE(template, test::WalledBackend)
}

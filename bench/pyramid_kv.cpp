// The recipe pyramid_kv.
#include "support/compression.hpp"

namespace bench {
namespace {
const bool added = add_recipe("pyramid_kv", kvpare::pyramid_kv(), {.query_rows = 8});
}  // namespace
}  // namespace bench

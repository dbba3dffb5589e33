// The recipe ada_kv.
#include "support/compression.hpp"

namespace bench {
namespace {
const bool added = add_recipe("ada_kv", kvpare::ada_kv(), {.query_rows = 32});
}  // namespace
}  // namespace bench

// The recipe snap_kv: the last 32 rows of the prompt, every head for itself.
#include "support/compression.hpp"

namespace bench {
namespace {
const bool added = add_recipe("snap_kv", kvpare::snap_kv(), {.query_rows = 32});
}  // namespace
}  // namespace bench

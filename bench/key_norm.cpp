// The recipe key_norm.
#include "support/compression.hpp"

namespace bench {
namespace {
const bool added = add_recipe("key_norm", kvpare::key_norm(), {.query_rows = 1});
}  // namespace
}  // namespace bench

// The recipe key_diff.
#include "support/compression.hpp"

namespace bench {
namespace {
const bool added = add_recipe("key_diff", kvpare::key_diff(), {.query_rows = 1});
}  // namespace
}  // namespace bench

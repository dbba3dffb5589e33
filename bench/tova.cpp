// The recipe tova.
#include "support/compression.hpp"

namespace bench {
namespace {
const bool added = add_recipe("tova", kvpare::tova(), {.query_rows = 1});
}  // namespace
}  // namespace bench

// The recipe random: looks at no query.
#include "support/compression.hpp"

namespace bench {
namespace {
const bool added = add_recipe("random", kvpare::random_choice(), {.query_rows = 1});
}  // namespace
}  // namespace bench

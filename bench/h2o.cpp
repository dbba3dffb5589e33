// The recipe h2o: all rows of the prompt, so its time per token grows with the prompt. One layer is enough to wait for.
#include "support/compression.hpp"

namespace bench {
namespace {
const bool added = add_recipe("h2o", kvpare::h2o(), {.layers = 1, .most_tokens = 16384});
}  // namespace
}  // namespace bench

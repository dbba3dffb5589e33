// The recipe streaming_llm: looks at no query.
#include "support/compression.hpp"

namespace bench {
namespace {
const bool added = add_recipe("streaming_llm", kvpare::streaming_llm(), {.query_rows = 1});
}  // namespace
}  // namespace bench

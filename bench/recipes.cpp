// The recipes that need no more than a line; air_cache has a file of its own.
#include "support/compression.hpp"

namespace bench {
namespace {

const bool added = [] {
  constexpr RecipeRun last_row{.query_rows = 1}, last_rows{.query_rows = 32};
  auto csp = kvpare::csp();
  csp.scorer.window = last_rows.query_rows;
  add_recipe("ada_kv", kvpare::ada_kv(), last_rows);
  add_recipe("csp", csp, last_rows);
  add_recipe("expected_attention", kvpare::expected_attention(), {.layers = 1, .query_rows = 32, .most_tokens = 16384});
  add_recipe("h2o", kvpare::h2o(), {.layers = 1, .most_tokens = 16384});  // reads all rows; one layer is enough to wait for
  add_recipe("key_diff", kvpare::key_diff(), last_row);
  add_recipe("key_norm", kvpare::key_norm(), last_row);
  add_recipe("lag_kv", kvpare::lag_kv(), last_row);
  add_recipe("pyramid_kv", kvpare::pyramid_kv(), {.query_rows = 8});
  add_recipe("random", kvpare::random_choice(), last_row);                // looks at no query
  add_recipe("snap_kv", kvpare::snap_kv(), last_rows);
  add_recipe("streaming_llm", kvpare::streaming_llm(), last_row);         // looks at no query
  return add_recipe("tova", kvpare::tova(), last_row);
}();

}  // namespace
}  // namespace bench

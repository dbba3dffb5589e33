// The recipes that need no more than a line; air_cache has a file of its own.
#include "support/compression.hpp"

namespace bench {
namespace {

const bool added = [] {
  constexpr RecipeRun last_row{.query_rows = 1}, last_rows{.query_rows = 32};
  auto csp = kvpare::csp();
  csp.scorer.window = last_rows.query_rows;
  add_recipe("ada_kv", kvpare::ada_kv(), last_rows);
  add_recipe("cam", kvpare::cam(), {.layers = 1, .most_tokens = 16384});
  add_recipe("chunk_kv", kvpare::chunk_kv(), last_rows);
  add_recipe("corm", kvpare::corm(), {.layers = 1, .most_tokens = 16384});
  add_recipe("csp", csp, last_rows);
  add_recipe("expected_attention", kvpare::expected_attention(), {.layers = 1, .query_rows = 32, .most_tokens = 16384});
  add_recipe("h2o", kvpare::h2o(), {.layers = 1, .most_tokens = 16384});
  add_recipe("key_diff", kvpare::key_diff(), last_row);
  add_recipe("key_norm", kvpare::key_norm(), last_row);
  add_recipe("kv_crush", kvpare::kv_crush(), last_rows);
  add_recipe("lag_kv", kvpare::lag_kv(), last_row);
  add_recipe("prefix_kv", kvpare::prefix_kv(), {.layers = 1, .most_tokens = 16384});
  add_recipe("pyramid_kv", kvpare::pyramid_kv(), {.query_rows = 8});
  add_recipe("random", kvpare::random_choice(), last_row);                // looks at no query
  add_recipe("snap_kv", kvpare::snap_kv(), last_rows);
  add_recipe("streaming_llm", kvpare::streaming_llm(), last_row);         // looks at no query
  add_recipe("vl_cache", kvpare::vl_cache(), last_rows);
  add_recipe("zip_vl", kvpare::zip_vl(), {.query_rows = 128});  // its probes
  return add_recipe("tova", kvpare::tova(), last_row);
}();

}  // namespace
}  // namespace bench

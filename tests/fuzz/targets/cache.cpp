// Operations on KvCache in an order that the input chooses, beside the naive model of ../cache_walk.hpp.
//
// Input  byte 0: page size and room in the pool · byte 1: seed of the rows · the rest: choices, some bytes each
#include "fuzz/byte_choices.hpp"
#include "fuzz/cache_walk.hpp"
#include "fuzz/target.hpp"

using namespace kvpare;
using namespace kvpare::test;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  throw_when_a_check_fails();
  static cpu::Backend backend({.threads = 1});
  ByteChoices choices(data, size);
  const Index page_tokens = Index{16} << choices.below(3), pool_bytes = choices.chance(0.5) ? 48 << 10 : 2 << 20;
  WalkedCache checked(backend, small_model(), {.page_tokens = page_tokens, .pool_bytes = pool_bytes},
                      static_cast<std::uint64_t>(choices.below(256)));
  Walk<ByteChoices> walk(checked, choices, {});
  for (Index i = 0; !choices.empty(); ++i) walk.step(i);
  checked.verify_all();
  while (!checked.held.empty()) checked.release(checked.held.begin()->first);
  must(checked.cache.pool().stats().pages_in_use == 0, "pages are lost when all sequences are released");
  return 0;
}

// Operations on KvCache in an order that the input chooses, beside the naive model of ../cache_walk.hpp.
//
// Input  byte 0: page size, and whether tokens change their forms · byte 1: room in the pool · byte 2: seed of the rows · the
//        rest: choices, some bytes each
#include "fuzz/byte_choices.hpp"
#include "fuzz/cache_walk.hpp"
#include "fuzz/target.hpp"

using namespace kvpare;
using namespace kvpare::test;

namespace {

template <class Checked>
void walk(ByteChoices& choices, Model model, Index page_tokens) {
  static cpu::Backend backend({.threads = 1});
  const Index pool_bytes = choices.chance(0.5) ? (Checked::mixed ? 400 << 10 : 48 << 10) : 4 << 20;
  Checked checked(backend, std::move(model), {.page_tokens = page_tokens, .pool_bytes = pool_bytes},
                  static_cast<std::uint64_t>(choices.below(256)));
  Walk<ByteChoices, Checked> walk(checked, choices, {});
  for (Index i = 0; !choices.empty(); ++i) walk.step(i);
  checked.verify_all();
  while (!checked.held.empty()) checked.release(checked.held.begin()->first);
  must(checked.cache.pool().stats().pages_in_use == 0, "pages are lost when all sequences are released");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  throw_when_a_check_fails();
  ByteChoices choices(data, size);
  const Index first = choices.below(6), page_tokens = Index{16} << first % 3;
  if (first < 3)
    walk<WalkedCache>(choices, small_model(), page_tokens);
  else
    walk<MixedCache>(choices, mixed_model(), page_tokens);
  return 0;
}

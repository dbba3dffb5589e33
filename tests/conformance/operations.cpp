// Random operations on a cache beside its naive model, on every backend: what fuzz/cache_operations.cpp does at length on the
// CPU. To repeat a failure, run with the environment variable KVPARE_SEED=<seed printed>.
#include <gtest/gtest.h>

#include <cstdlib>

#include "fuzz/cache_walk.hpp"

namespace kvpare::test {
namespace {

template <class Rig>
class Operations : public OnRig<Rig> {};
TYPED_TEST_SUITE(Operations, PipelineRigs, RigNames);

template <class Rig, class FormatList>
void walk(Index page_tokens, Index pool_bytes, std::uint64_t seed) {
  if (const char* wanted = std::getenv("KVPARE_SEED")) seed = std::strtoull(wanted, nullptr, 10);
  using Checked = CheckedCache<FormatList, typename Rig::Backend>;
  Checked checked(Rig::backend(), Checked::mixed ? mixed_model() : small_model(),
                  {.page_tokens = page_tokens, .pool_bytes = pool_bytes}, seed);
  Walk<Dice, Checked> walk(checked, checked.dice, {});
  const Index operations = is_small<Rig>() ? 100 : 1500;
  for (Index i = 0; i < operations; ++i) {
    walk.step(i);
    if (::testing::Test::HasFailure())
      FAIL() << "operation " << i << " of KVPARE_SEED=" << seed << ", page_tokens " << page_tokens;
  }
  checked.verify_all();
  while (!checked.held.empty()) checked.release(checked.held.begin()->first);
  EXPECT_EQ(checked.cache.pool().stats().pages_in_use, 0) << "leaked by KVPARE_SEED=" << seed;
}

TYPED_TEST(Operations, OfRawPagesAgreeWithTheModel) {
  walk<TypeParam, WalkedFormats>(16, 8 << 20, 101);
  walk<TypeParam, WalkedFormats>(64, 8 << 20, 102);
  walk<TypeParam, WalkedFormats>(16, 80 << 10, 103);  // a pool that is often full
}
TYPED_TEST(Operations, OfPagesOfAllFormsAgreeWithTheModel) {
  walk<TypeParam, MixedFormats>(16, 64 << 20, 111);
  walk<TypeParam, MixedFormats>(32, 64 << 20, 112);
  walk<TypeParam, MixedFormats>(16, 250 << 10, 113);
}

}  // namespace
}  // namespace kvpare::test

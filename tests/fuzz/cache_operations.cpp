// Random operations on KvCache, each beside a naive model that keeps every token of every sequence for itself.
//
// To repeat a failure, run with the environment variable KVPARE_SEED=<seed printed>.
#include <gtest/gtest.h>

#include <cstdlib>
#include <thread>
#include <vector>

#include "fuzz/cache_walk.hpp"

namespace kvpare::test {
namespace {

std::vector<std::uint64_t> seeds(std::uint64_t first, std::uint64_t count) {
  if (const char* wanted = std::getenv("KVPARE_SEED")) return {std::strtoull(wanted, nullptr, 10)};
  std::vector<std::uint64_t> all(count);
  std::iota(all.begin(), all.end(), first);
  return all;
}

template <class Checked>
constexpr Index never_full = Checked::mixed ? 64 << 20 : 8 << 20;

template <class Checked = WalkedCache>
void walk(Index page_tokens, Index pool_bytes, std::uint64_t seed, Index operations) {
  cpu::Backend be({.threads = 1});
  Checked checked(be, Checked::mixed ? mixed_model() : small_model(), {.page_tokens = page_tokens, .pool_bytes = pool_bytes},
                  seed);
  Walk<Dice, Checked> walk(checked, checked.dice, {});
  for (Index i = 0; i < operations; ++i) {
    try {
      walk.step(i);
    } catch (const std::exception& e) {
      ADD_FAILURE() << e.what();
    }
    if (::testing::Test::HasFailure())
      FAIL() << "operation " << i << " of KVPARE_SEED=" << seed << ", page_tokens " << page_tokens;
  }
  checked.verify_all();
  EXPECT_GT(walk.steps_that_evicted, operations / (Checked::mixed ? 400 : 100)) << "decode is to evict often";
  if constexpr (Checked::mixed) {
    EXPECT_GT(walk.tokens_tiered, operations) << "tokens are to change their form often";
    EXPECT_GT(walk.steps_that_demoted, operations / 400) << "decode is to demote often";
  }
  while (!checked.held.empty()) checked.release(checked.held.begin()->first);
  ASSERT_EQ(checked.cache.pool().stats().pages_in_use, 0) << "leaked by KVPARE_SEED=" << seed;
  EXPECT_EQ(checked.cache.pool().stats().refusals > 0, pool_bytes < never_full<Checked>)
      << "small pools, and only these, are to be full at times";
}

constexpr Index long_walk = 40000;

TEST(CacheOperations, AgreeWithTheModelInPagesOf16) {
  for (const std::uint64_t seed : seeds(1, 2)) walk(16, never_full<WalkedCache>, seed, long_walk);
}
TEST(CacheOperations, AgreeWithTheModelInPagesOf32) {
  for (const std::uint64_t seed : seeds(11, 2)) walk(32, never_full<WalkedCache>, seed, long_walk);
}
TEST(CacheOperations, AgreeWithTheModelInPagesOf64) {
  for (const std::uint64_t seed : seeds(21, 2)) walk(64, never_full<WalkedCache>, seed, long_walk);
}
TEST(CacheOperations, AgreeWithTheModelWhenThePoolIsOftenFull) {
  for (const std::uint64_t seed : seeds(31, 3)) walk(16, 80 << 10, seed, long_walk);
}

constexpr Index mixed_walk = 12000;  // every step reads all tokens of a layer

TEST(MixedOperations, AgreeWithTheModelInPagesOf16) {
  for (const std::uint64_t seed : seeds(61, 2)) walk<MixedCache>(16, never_full<MixedCache>, seed, mixed_walk);
}
TEST(MixedOperations, AgreeWithTheModelInPagesOf32) {
  for (const std::uint64_t seed : seeds(71, 1)) walk<MixedCache>(32, never_full<MixedCache>, seed, mixed_walk);
}
TEST(MixedOperations, AgreeWithTheModelInPagesOf64) {
  for (const std::uint64_t seed : seeds(81, 1)) walk<MixedCache>(64, never_full<MixedCache>, seed, mixed_walk);
}
TEST(MixedOperations, AgreeWithTheModelWhenThePoolIsOftenFull) {
  for (const std::uint64_t seed : seeds(91, 2)) walk<MixedCache>(16, 250 << 10, seed, mixed_walk);
}

/// Two threads, each with sequences of its own; all are forks of two prompts, so they share pages.
void walk_in_two_threads(Index backend_threads, std::uint64_t seed, Index operations) {
  cpu::Backend be({.threads = backend_threads});
  WalkedCache all(be, small_model(), {.page_tokens = 16, .pool_bytes = 512 << 10}, seed);
  std::vector<SequenceId> ids{all.create(), all.create()};
  for (const SequenceId id : ids)
    for (Index l = 0; l < all.cache.layers(); ++l) ASSERT_EQ(all.append(id, l, 60), Outcome::done);
  for (Index i = 0; i < 6; ++i) ids.push_back(all.fork(ids[static_cast<std::size_t>(i)]));

  const auto work = [&](WalkedCache& mine) {
    Walk walk(mine, mine.dice, {.alone = false});
    for (Index i = 0; i < operations && !::testing::Test::HasFailure(); ++i) {
      walk.step(i);
      if (::testing::Test::HasFailure()) ADD_FAILURE() << "operation " << i << " of KVPARE_SEED=" << mine.dice.seed;
    }
  };
  WalkedCache one = all.part({ids[0], ids[3], ids[4], ids[7]}, seed + 1),
              two = all.part({ids[1], ids[2], ids[5], ids[6]}, seed + 2);
  {
    std::jthread first([&] { work(one); }), second([&] { work(two); });
  }
  all.held = one.held;
  all.held.merge(two.held);
  all.verify_all();
  while (!all.held.empty()) all.release(all.held.begin()->first);
  EXPECT_EQ(all.cache.pool().stats().pages_in_use, 0);
}

TEST(CacheOperationsThreads, SequencesOfOnePoolDoNotDisturbOneAnother) {
  for (const std::uint64_t seed : seeds(41, 3)) walk_in_two_threads(1, seed, 4000);
}
TEST(CacheOperationsThreads, NorWhenTheBackendHasThreadsOfItsOwn) {
  for (const std::uint64_t seed : seeds(51, 1)) walk_in_two_threads(2, seed, 1000);
}

}  // namespace
}  // namespace kvpare::test

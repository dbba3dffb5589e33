// Many threads on one cache and one pool: each has sequences of its own, most of them forks of one common prefix, and
// checks them against a naive model of its own. Calls that concern different sequences may run side by side, create, fork
// and release among them; those that concern one sequence take turns.
#include <gtest/gtest.h>

#include <atomic>
#include <mutex>
#include <thread>
#include <vector>

#include "fuzz/cache_walk.hpp"
#include "support/sanitizers.hpp"

namespace kvpare::test {
namespace {

constexpr std::size_t threads = 8;
constexpr Index never_full = 8 << 20;

/// One cache, its common prefix, and a part of it for each thread.
struct Shared {
  cpu::Backend be;
  WalkedCache all;
  SequenceId prefix;
  std::vector<WalkedCache> parts;

  Shared(Index pool_bytes, Index prefix_tokens, Index backend_threads = 1)
      : be({.threads = backend_threads}), all(be, small_model(), {.page_tokens = 16, .pool_bytes = pool_bytes}, 1),
        prefix(all.create()) {
    for (Index l = 0; l < all.cache.layers(); ++l) EXPECT_EQ(all.append(prefix, l, prefix_tokens), Outcome::done);
    for (std::size_t t = 0; t < threads; ++t) parts.push_back(all.part({}, 100 + t));
  }

  template <class Work>
  void run(const Work& work) {
    {
      std::vector<std::jthread> running;
      for (std::size_t t = 0; t < threads; ++t)
        running.emplace_back([&, t] {
          try {
            work(parts[t], t);
          } catch (const std::exception& e) {
            ADD_FAILURE() << "thread " << t << ": " << e.what();
          }
        });
    }
    for (WalkedCache& part : parts) all.held.merge(part.held);
    all.verify_all();
    while (!all.held.empty()) all.release(all.held.begin()->first);
    EXPECT_EQ(all.cache.pool().stats().pages_in_use, 0) << "nothing may be lost";
  }

  /// The prefix is everybody's, so its forks take turns.
  SequenceId fork_prefix(WalkedCache& mine) {
    const std::lock_guard turn(turn_);
    const SequenceId id = mine.cache.fork(prefix);
    mine.held[id] = all.held.at(prefix);
    return id;
  }

 private:
  std::mutex turn_;
};

/// Everything a sequence can live through, now and then with a full pool.
void everybody_walks(Index pool_bytes, Index backend_threads, Index operations) {
  Shared shared(pool_bytes, 60, backend_threads);
  shared.run([&](WalkedCache& mine, std::size_t) {
    shared.fork_prefix(mine);
    Walk<Dice> walk(mine, mine.dice, {.most_sequences = 4, .alone = false});
    for (Index i = 0; i < tries(operations) && !::testing::Test::HasFailure(); ++i) {
      if (mine.held.size() < 4 && mine.dice.chance(0.1)) shared.fork_prefix(mine);
      walk.step(i);
    }
  });
  EXPECT_EQ(shared.all.cache.pool().stats().refusals > 0, pool_bytes < never_full)
      << "small pools, and only these, are to be full at times";
}

TEST(ParallelSequences, AgreeWithTheirModels) { everybody_walks(never_full, 1, 2000); }
TEST(ParallelSequences, AgreeWithTheirModelsWhenThePoolIsOftenFull) { everybody_walks(200 << 10, 1, 2000); }
TEST(ParallelSequences, AgreeWithTheirModelsOnABackendWithThreads) { everybody_walks(never_full, 2, 500); }

/// Short lives: the table of sequences changes all the time, and pages go from hand to hand.
TEST(ParallelSequences, ComeAndGo) {
  Shared shared(never_full, 40);
  std::atomic<Index> lives = 0;
  shared.run([&](WalkedCache& mine, std::size_t) {
    for (Index i = 0; i < 300 && !::testing::Test::HasFailure(); ++i) {
      const SequenceId id = i % 3 == 0 ? mine.create() : shared.fork_prefix(mine);
      const Index l = i % mine.cache.layers();
      ASSERT_EQ(mine.append(id, l, mine.dice.within(1, 40)), Outcome::done);
      const SequenceId twin = mine.fork(id);
      mine.truncate(id, static_cast<Position>(mine.dice.below(60)));
      mine.verify(twin), mine.verify(id);
      mine.verify_attend(twin, l);
      mine.release(id);
      mine.verify_rows(twin);
      mine.release(twin);
      ++lives;
    }
  });
  EXPECT_EQ(lives, static_cast<Index>(300 * threads));
}

/// A batch is the caller's: threads decode theirs while others append, with every head at its budget all the time.
TEST(ParallelSequences, DecodeSideBySide) {
  Shared shared(never_full, 60);
  shared.run([&](WalkedCache& mine, std::size_t t) {
    const SequenceId id = shared.fork_prefix(mine);
    AnyCompressor method = make_compressor(t % 2 == 0 ? "tova(keep=90t)" : "streaming_llm(keep=90t)");
    for (Index step = 0; step < 150 && !::testing::Test::HasFailure(); ++step)
      for (Index l = 0; l < mine.cache.layers(); ++l) {
        const Positions at{static_cast<Position>(mine.model(id, l).last() + 1)};
        ASSERT_EQ(mine.append(id, l, at), Outcome::done);
        ASSERT_EQ(mine.decode(id, l, method, at, false), "");
        if (mine.shape(l).compress) {
          ASSERT_EQ(mine.model(id, l).most_tokens(), 30);
        }
      }
    mine.verify(id);
  });
}

}  // namespace
}  // namespace kvpare::test

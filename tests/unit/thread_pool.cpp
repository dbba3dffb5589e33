// The CPU backend's threads: every task of a call is done once, and before the call returns.
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <kvpare/backend/cpu/parallel.hpp>
#include <thread>
#include <vector>

namespace kvpare::test {
namespace {

TEST(ThreadPool, RunsAllTasksOnce) {
  for (const Index threads : {1, 2, 3, 8}) {
    cpu::ThreadPool pool(threads);
    EXPECT_EQ(pool.threads(), threads);
    for (const Index tasks : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> times(static_cast<std::size_t>(tasks));
      pool(tasks, [&](Index i) { ++times[static_cast<std::size_t>(i)]; });
      for (const auto& n : times) EXPECT_EQ(n, 1) << threads << " threads, " << tasks << " tasks";
    }
  }
}

/// A worker that is late for one call must not take a task of the next for one of it. That needs it to wake at one moment of
/// some, so: more threads than cores, callers by turns, and calls of few tasks before calls of more. A call that counts too many tasks may never return.
TEST(ThreadPool, ACallIsOverWhenItsTasksAre) {
  cpu::ThreadPool pool(6);
  std::atomic<int> wrong = 0;
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(3);
  const auto call = [&](Index first) {
    for (Index i = first; std::chrono::steady_clock::now() < until && wrong == 0; ++i) {
      const Index tasks = 2 + i * 7 % 23;
      std::vector<std::atomic<int>> times(static_cast<std::size_t>(tasks));
      pool(tasks, [&](Index t) { ++times[static_cast<std::size_t>(t)]; });
      for (const auto& n : times) wrong += n != 1;
    }
  };
  {
    std::vector<std::jthread> callers;
    for (Index c = 0; c < 4; ++c) callers.emplace_back(call, c);
  }
  EXPECT_EQ(wrong, 0) << "tasks that were not done once when their call was over";
}

}  // namespace
}  // namespace kvpare::test

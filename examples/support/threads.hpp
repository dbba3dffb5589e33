// Work on several threads at once.
#pragma once

#include <exception>
#include <functional>
#include <kvpare/core/config.hpp>
#include <mutex>
#include <thread>
#include <vector>

namespace example {

/// Runs `work` on several threads, this one among them, and rethrows the first thing that one of them threw.
inline void run_on_threads(kvpare::Index threads, const std::function<void()>& work) {
  std::exception_ptr problem;
  std::mutex mutex;
  const auto guarded = [&] {
    try {
      work();
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!problem) problem = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  for (kvpare::Index t = 1; t < threads; ++t) others.emplace_back(guarded);
  guarded();
  for (std::thread& other : others) other.join();
  if (problem) std::rethrow_exception(problem);
}

}  // namespace example

// Clocks, medians, and work on several threads at once.
#pragma once

#include <algorithm>
#include <barrier>
#include <chrono>
#include <thread>
#include <vector>

#include <kvpare/core/config.hpp>

namespace bench {

using kvpare::Index;

template <class F>
double seconds_of(F&& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Of a few values, which are reordered; 0 of none.
inline double median(std::vector<double>& values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

/// Calls `work(thread, piece)` for every piece on every thread, all threads at once. Gives the units per second of all
/// threads together, a piece being `units`: each thread's by the median of its pieces.
template <class Work>
double rate_of(Index threads, Index pieces, double units, const Work& work) {
  std::vector<double> rates(static_cast<std::size_t>(threads));
  std::barrier start(threads);
  const auto run = [&](Index thread) {
    std::vector<double> seconds;
    start.arrive_and_wait();
    for (Index piece = 0; piece < pieces; ++piece) seconds.push_back(seconds_of([&] { work(thread, piece); }));
    rates[static_cast<std::size_t>(thread)] = units / median(seconds);
  };
  std::vector<std::thread> others;
  for (Index thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
  run(0);
  for (std::thread& other : others) other.join();
  double sum = 0;
  for (double rate : rates) sum += rate;
  return sum;
}

}  // namespace bench

// One benchmark: yardsticks, steps, yardsticks again; and the counters that come of it.
#pragma once

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include <benchmark/benchmark.h>

#include "timing.hpp"
#include "yardstick.hpp"

namespace bench {

/// A fraction of what the machine can do: `counter` = units per second of a step / units per second of the yardstick.
struct Against {
  std::string counter;
  double units = 0;  // of one step
  std::function<double()> rate;
};

inline Against of_read_bw(double bytes, Index threads) {
  return {"of_read_bw", bytes, [=] { return read_rate(threads); }};
}
inline Against of_memcpy(double bytes, Index threads) {
  return {"of_memcpy", bytes, [=] { return copy_rate(threads); }};
}
inline Against of_sgemm(double flops, const ProductShape& shape, Index threads) {
  return {"of_sgemm", flops, [=] { return product_rate(shape, threads); }};
}

/// What one step does.
struct Cost {
  double bytes = 0;   // that the method must move; 0: not counted
  double tokens = 0;  // that it goes through
  std::vector<Against> against = {};
};

/// Calls `prepare(i)`, off the clock, and `step(i)` for i = 0, 1, ... Gives the median seconds of a step, and sets
/// `us`, `bytes_per_second`, `tokens_per_second` and the fractions by it. Every yardstick is measured before and after
/// the steps, and its average counts.
template <class Step, class Prepare>
double run(benchmark::State& state, const Cost& cost, const Step& step, const Prepare& prepare) {
  std::vector<double> rates;
  for (const Against& a : cost.against) rates.push_back(a.rate());
  std::vector<double> each;
  Index i = 0;
  for (auto _ : state) {
    state.PauseTiming();
    prepare(i);
    state.ResumeTiming();
    each.push_back(seconds_of([&] { step(i); }));
    ++i;
  }
  const double seconds = median(each);
  state.counters["us"] = seconds * 1e6;
  if (cost.bytes > 0) state.counters["bytes_per_second"] = cost.bytes / seconds;
  if (cost.tokens > 0) state.counters["tokens_per_second"] = cost.tokens / seconds;
  for (std::size_t a = 0; a < rates.size(); ++a) {
    const double rate = (rates[a] + cost.against[a].rate()) / 2;
    state.counters[cost.against[a].counter] = cost.against[a].units / seconds / rate;
  }
  return seconds;
}

/// The same with nothing to prepare.
template <class Step>
double run(benchmark::State& state, const Cost& cost, const Step& step) {
  return run(state, cost, step, [](Index) {});
}

}  // namespace bench

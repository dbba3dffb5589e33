// kvpare_bench: Google Benchmark's command line, and --rotate_mib=<n> (see README.md).
#include <charconv>
#include <cstdio>
#include <string_view>

#include <benchmark/benchmark.h>
#include <kvpare/kvpare.hpp>

#include "support/yardstick.hpp"

namespace {

/// Takes --rotate_mib=<n> out of the arguments. False when n is no number from 8 to 65536.
bool take_rotation(int& count, char** arguments) {
  constexpr std::string_view name = "--rotate_mib=";
  int kept = 1;
  for (int i = 1; i < count; ++i) {
    const std::string_view argument = arguments[i];
    if (!argument.starts_with(name)) {
      arguments[kept++] = arguments[i];
      continue;
    }
    int mib = 0;
    const char* end = argument.data() + argument.size();
    const auto [stop, error] = std::from_chars(argument.data() + name.size(), end, mib);
    if (error != std::errc{} || stop != end || mib < 8 || mib > 65536) return false;
    bench::rotation_bytes() = kvpare::Index{mib} << 20;
  }
  count = kept;
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  if (!take_rotation(count, arguments)) {
    std::fputs("--rotate_mib: must be a whole number within [8, 65536]\n", stderr);
    return 1;
  }
  benchmark::AddCustomContext("kvpare instruction set", std::string(name_of(kvpare::cpu::chosen_isa())));
  benchmark::AddCustomContext("rotation MiB", std::to_string(bench::rotation_bytes() >> 20));
  benchmark::Initialize(&count, arguments);
  if (benchmark::ReportUnrecognizedArguments(count, arguments)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}

// What fuzz targets share: how a broken promise is reported.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace kvpare::test {

/// Ends the program, which is what a fuzzer takes for a finding.
inline void must(bool ok, const std::string& broken) {
  if (ok) return;
  std::fprintf(stderr, "%s\n", broken.c_str());
  std::abort();
}

/// GoogleTest's checks, used outside a test, throw what nobody catches.
inline void throw_when_a_check_fails() { ::testing::GTEST_FLAG(throw_on_failure) = true; }

}  // namespace kvpare::test

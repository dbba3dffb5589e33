// Is the address sanitizer on, and how often does a test then try?
#pragma once

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#define KVPARE_TEST_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define KVPARE_TEST_ASAN 1
#endif
#endif

namespace kvpare::test {

#if defined(KVPARE_TEST_ASAN)
inline constexpr bool with_asan = true;
#else
inline constexpr bool with_asan = false;
#endif

/// n; with the address sanitizer, which takes ten times as long, a tenth of it.
constexpr std::uint64_t tries(std::uint64_t n) { return with_asan ? (n + 9) / 10 : n; }

}  // namespace kvpare::test

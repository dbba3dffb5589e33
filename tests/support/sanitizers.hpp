// Which sanitizer is on, and how often does a test then try?
#pragma once

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#define KVPARE_TEST_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define KVPARE_TEST_ASAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define KVPARE_TEST_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define KVPARE_TEST_TSAN 1
#endif
#endif

namespace kvpare::test {

#if defined(KVPARE_TEST_ASAN)
inline constexpr bool with_asan = true;
#else
inline constexpr bool with_asan = false;
#endif
#if defined(KVPARE_TEST_TSAN)
inline constexpr bool with_tsan = true;
#else
inline constexpr bool with_tsan = false;
#endif

/// n; a tenth of it with the address sanitizer, half of it with the thread sanitizer: about as many seconds.
template <class Integer>
constexpr Integer tries(Integer n) { return with_asan ? (n + 9) / 10 : with_tsan ? (n + 1) / 2 : n; }

}  // namespace kvpare::test

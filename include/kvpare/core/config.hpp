// The few words every header uses: the integer type, and the macros that let one source serve host and device.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define KVPARE_HD __host__ __device__
#else
#define KVPARE_HD
#endif

#if defined(__GNUC__) || defined(__clang__)
#define KVPARE_INLINE inline __attribute__((always_inline))
#else
#define KVPARE_INLINE inline
#endif

namespace kvpare {

using Index = std::int64_t;     // every count, offset and stride; in elements unless the name says otherwise
using Position = std::int32_t;  // logical place of a token in its sequence: orders and masks, survives eviction
using PageId = std::uint32_t;   // a page, as its owner numbers it

constexpr KVPARE_HD Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }
constexpr KVPARE_HD Index round_up(Index a, Index b) { return ceil_div(a, b) * b; }

}  // namespace kvpare

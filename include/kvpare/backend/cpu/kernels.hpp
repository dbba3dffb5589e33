// The inner loops of the CPU backend over raw rows (float, half, bfloat16), one table of them per instruction set.
//
// kernels.inl holds each loop once, written on a small vector type. It is included once per set, each time inside that
// set's namespace, behind that set's vector type and under the compiler's "may use these instructions" pragma. So one
// binary built for the baseline carries all sets, and the table is picked at run time. Nothing in such a region may be
// a lambda (it would not inherit the pragma) or include a system header.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../../core/config.hpp"
#include "../../core/dtype.hpp"
#include "isa.hpp"
#include "region.hpp"

#if KVPARE_HAS_X86_SETS
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace kvpare::cpu {

/// Rows of one head inside one page: row t is at base + slots[t] * row_bytes.
///
/// Dead or invisible rows are simply not listed; their memory may hold anything and is never read.
struct RowSet {
  const std::byte* base = nullptr;
  Index row_bytes = 0;
  const std::uint8_t* slots = nullptr;
  int count = 0;  // 0..64
  DType dtype = DType::f32;

  constexpr const std::byte* row(int t) const { return base + slots[t] * row_bytes; }
};

/// The loops of one instruction set.
///
/// Every width >= 1 is right; multiples of 16 are fast. Rows, counts and n may be 0. Nothing is read or written outside
/// the elements named, pointers need the alignment of their element type only, and outputs never overlap inputs.
/// Sums are made in float, in an order that is fixed within a set and differs between sets.
/// No loop throws or allocates.
struct Kernels {
  Isa isa;  // sets that differ where pages hold codes only have tables that differ in this only

  /// Formula  out[i * out_stride + t] = sum_c q[i * q_stride + c] * key_t[c],  i < rows, t < keys.count, c < width
  /// Ahead    `next` is what will be read after this: its rows are prefetched, at the size of a row of `keys`, spread
  ///          over the loop. Count 0 = nothing. The values of the same page are best where pages follow each other in
  ///          memory, the keys of the next page where they are scattered.
  void (*dot)(const float* q, Index q_stride, Index rows, Index width, const RowSet& keys, const RowSet& next,
              float* out, Index out_stride);

  /// Formula  acc[i * acc_stride + c] = alpha_i * acc[i * acc_stride + c] + sum_t p[i * p_stride + t] * value_t[c]
  /// Alpha    one factor per row; null = 1. Where it is 0, the old acc is not read, whatever it holds.
  /// Ahead    as in dot: the keys of the next page, or its values where dot has fetched the keys
  /// NaN      a listed value of NaN or infinity stays NaN even where p is 0: list what is visible only
  void (*accumulate)(const float* p, Index p_stride, const float* alpha, Index rows, Index width, const RowSet& values,
                     const RowSet& next, float* acc, Index acc_stride);

  /// One page of a running softmax in base 2, for rows of logits x[rows][n] that include the factor log2(e).
  ///
  /// Formula  peak' = max(peak_i, max_t x[i * x_stride + t]);  alpha_i = 2^(peak_i - peak');
  ///          x[..] = 2^(x[..] - peak');  sum_i = alpha_i * sum_i + sum_t x[..];  peak_i = peak'
  /// Start    peak = -inf, sum = 0: then alpha = 0
  /// NaN      a logit of -inf gives 0, also while peak' is -inf (then alpha = 1). NaN is ignored by peak, kept in x
  ///          and sum. +inf gives NaN.
  void (*running_softmax)(float* x, Index x_stride, Index rows, Index n, float* peak, float* sum, float* alpha);

  /// The largest of x[n]; -inf for n = 0. NaN are ignored.
  float (*max_of)(const float* x, Index n);

  /// Formula  x[t] = 2^(x[t] - shift) in place; returns the sum
  /// Error    relative 2e-7 of 2^(the float x[t] - shift); below 2^-126 it is 0, so -inf gives 0; 2^0 is exactly 1
  /// NaN      stays NaN, in x and in the sum; shift must be finite and x[t] - shift at most 127
  float (*exp2_shift_sum)(float* x, Index n, float shift);

  void (*add_scaled)(const float* x, Index n, float factor, float* out);  // out += factor * x
  void (*max_scaled)(const float* x, Index n, float factor, float* out);  // out = max(out, factor * x); a NaN product
                                                                          // leaves out as it is
  void (*multiply)(float* x, Index n, float factor);                      // x *= factor

  void (*to_float)(const std::byte* from, DType type, Index n, float* to);    // exact; NaN stays NaN
  void (*from_float)(const float* from, Index n, DType type, std::byte* to);  // to nearest, ties to even: the very
                                                                              // bits of core/dtype.hpp, NaN included

  /// For many query rows against many keys (the score matrix of prefill): all keys of a head are packed once, in their
  /// own type where that is as fast as float, panel_tokens at a time. Then a tile of query rows meets every panel, then
  /// the next tile. Tiles of 12 to 60 rows, multiples of 12, are equally fast; other heights lose up to a tenth.
  Index panel_tokens = 0;  // 16..64

  /// Bytes of one packed panel of keys of this width and type. Any alignment will do; a multiple of 64 is fastest.
  Index (*panel_bytes)(Index width, DType type);

  /// Packs keys that lie anywhere: row t of the panel is the `width` elements at rows[t], t < count <= panel_tokens.
  /// The panel's other rows become 0. The layout is this set's own business.
  void (*pack_panel)(const std::byte* const* rows, Index count, Index width, DType type, std::byte* panel);

  /// Formula  out[i * out_stride + t] = sum_c q[i * q_stride + c] * key_t[c],  i < rows, t < panel_tokens
  void (*dot_panel)(const float* q, Index q_stride, Index rows, Index width, const std::byte* panel, DType type,
                    float* out, Index out_stride);
};

}  // namespace kvpare::cpu

// The kernels are compiled here, or, with KVPARE_COMPILED_LOOPS, in one file of their own (see fused/sets.hpp).
#if !defined(KVPARE_COMPILED_LOOPS)
#define KVPARE_KERNELS_HERE 1
#define KVPARE_KERNELS_INLINE inline
#elif KVPARE_COMPILED_LOOPS == 6
#define KVPARE_KERNELS_HERE 1
#define KVPARE_KERNELS_INLINE
#else
#define KVPARE_KERNELS_HERE 0
#endif

namespace kvpare::cpu::plain {
#include "vector_plain.inl"
//
#if KVPARE_KERNELS_HERE
#include "kernels.inl"
#endif
}  // namespace kvpare::cpu::plain

#if KVPARE_HAS_X86_SETS
KVPARE_BEGIN_SET("avx2,fma,f16c")
namespace kvpare::cpu::avx2 {
#include "vector_avx2.inl"
//
#if KVPARE_KERNELS_HERE
#include "kernels.inl"
#endif
}  // namespace kvpare::cpu::avx2
KVPARE_END_SET

#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // g++ 12 about its own _mm512_undefined_ps()
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
KVPARE_BEGIN_SET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
namespace kvpare::cpu::avx512 {
#include "vector_avx512.inl"
//
#if KVPARE_KERNELS_HERE
#include "kernels.inl"
#endif
}  // namespace kvpare::cpu::avx512
KVPARE_END_SET
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

namespace kvpare::cpu {

/// The table of a set. A set that this machine lacks may be looked at, not run.
#if KVPARE_KERNELS_HERE
KVPARE_KERNELS_INLINE const Kernels& kernels(Isa isa) {
#if KVPARE_HAS_X86_SETS
  if (isa == Isa::avx2) return avx2::table<Isa::avx2>;
  if (isa == Isa::avx2_vnni) return avx2::table<Isa::avx2_vnni>;
  if (isa == Isa::avx512) return avx512::table<Isa::avx512>;
  if (isa == Isa::avx512_vnni) return avx512::table<Isa::avx512_vnni>;
#endif
  (void)isa;
  return plain::table<Isa::plain>;
}
#undef KVPARE_KERNELS_INLINE
#else
const Kernels& kernels(Isa isa);
#endif
#undef KVPARE_KERNELS_HERE

}  // namespace kvpare::cpu

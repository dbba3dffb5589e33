// The block of threads that a kernel is written on. Nothing else in backend/cuda touches thread ids, barriers, warp
// instructions or inline PTX, so a kernel runs wherever there is such a block: on the device (DeviceBlock, below), and on
// the host, a fiber per thread, where tests check indexing, barriers and memory (tests/simt).
//
// | expression                        | does                                                                              |
// |-----------------------------------|-----------------------------------------------------------------------------------|
// | `b.thread()`, `b.threads()`       | index within the block, and how many there are: a multiple of 32                  |
// | `b.lane()`, `b.warp()`, `b.warps()` | index within the warp of 32; which warp; how many                               |
// | `b.block()`, `b.blocks()`         | index of the block, and how many were launched                                    |
// | `b.shared<T>(bytes)`              | shared memory at that offset; a multiple of alignof(T)                            |
// | `b.sync()`                        | waits for all threads; what they wrote to memory is seen by all                   |
// | `b.sync(barrier, threads)`        | the same among that many threads, whole warps; barrier within [1, 15]             |
// | `b.sync_warp()`                   | the same within the warp                                                          |
// | `b.shuffle(x, lane)`              | x of that lane of the warp; T of 4 or 8 bytes                                     |
// | `b.shuffle_xor(x, mask)`          | x of lane ^ mask                                                                  |
// | `b.shuffle_up(x, n)`              | x of lane - n; one's own where there is none                                      |
// | `b.ballot(yes)`                   | a bit per lane                                                                    |
// | `b.mma(c, a, b, F16{})`           | c += a b, 16x8x16, f16 or bf16 into f32: see Fragments                            |
// | `b.mma(c, a, b, S8{})`            | c += a b, 16x8x32, int8 into int32                                                |
// | `b.transpose(x)`                  | 8x8 matrix of 16-bit numbers, row lane / 4, columns 2 (lane % 4) and + 1, transposed |
// | `b.copy_async(shared, global)`    | 16 bytes, both aligned to 16; there once waited for                               |
// | `b.commit_copies()`               | the copies begun since the last call are a group                                  |
// | `b.wait_copies<n>()`              | all groups of this thread but the newest n have arrived; others see them after a sync |
// | `b.load(p)`                       | a value of up to 16 bytes, aligned to its size, from global memory                |
// | `b.add(p, x)`, `b.join(p, bits)`, `b.most(p, x)` | atomic +=, |=, max on global or shared memory; gives the old value |
//
// Static, numbers only:
//
// | `B::exp2(x)`                      | 2^x, 2 ulp; 0 for -inf                                                            |
// | `B::pack(lo, hi, F16{})`          | two floats rounded to nearest even, the first in the low half                     |
// | `B::unpack_low(x, F16{})`, `B::unpack_high` | one of the two as a float                                               |
// | `B::mul2(a, b, F16{})`, `B::fma2(a, b, c, F16{})` | pairs of f16 or bf16, each rounded once                           |
// | `B::permute(a, b, selector)`      | four bytes of the eight of (b, a), a nibble of the selector each                  |
//
// Barriers, warp operations, mma and transpose are called by all threads of the block, or warp.
//
// Fragments  g = lane / 4, t = lane % 4; two numbers per register of mma 16x8x16 (16 bits each, the lower column low):
//            a[0]: row g,     columns 2t, 2t + 1    a[1]: row g + 8, the same
//            a[2]: row g,     columns 2t + 8, + 9   a[3]: row g + 8, the same
//            b[0]: rows 2t, 2t + 1 of column g      b[1]: rows 2t + 8, 2t + 9 of column g
//            c[0], c[1]: row g, columns 2t, 2t + 1  c[2], c[3]: row g + 8, the same
//            16x8x32 of int8: four numbers per register: columns (rows) 4t … 4t + 3, and + 16 instead of + 8.
#pragma once

#include "../../core/dtype.hpp"

// KVPARE_DEVICE_UNROLL stands before a loop over registers, whose indices must be constants; KVPARE_DEVICE_ROLL
// before one that must not grow.
#if defined(__CUDACC__)
#define KVPARE_DEVICE __device__ __forceinline__
#define KVPARE_DEVICE_UNROLL _Pragma("unroll")
#define KVPARE_DEVICE_ROLL _Pragma("unroll 1")
#else
#define KVPARE_DEVICE inline
#define KVPARE_DEVICE_UNROLL
#define KVPARE_DEVICE_ROLL
#endif

namespace kvpare::cuda {

struct F16 {};
struct BF16 {};
struct S8 {};

/// Sixteen bytes: what one load moves.
struct alignas(16) Words {
  std::uint32_t w[4];
};

#if defined(__CUDACC__)

namespace detail {
extern __shared__ __align__(128) unsigned char shared_memory[];
}  // namespace detail

class DeviceBlock {
 public:
  KVPARE_DEVICE int thread() const { return static_cast<int>(threadIdx.x); }
  KVPARE_DEVICE int threads() const { return static_cast<int>(blockDim.x); }
  KVPARE_DEVICE int lane() const { return thread() & 31; }
  KVPARE_DEVICE int warp() const { return thread() >> 5; }
  KVPARE_DEVICE int warps() const { return threads() >> 5; }
  KVPARE_DEVICE Index block() const { return static_cast<Index>(blockIdx.x); }
  KVPARE_DEVICE Index blocks() const { return static_cast<Index>(gridDim.x); }

  template <class T>
  KVPARE_DEVICE T* shared(Index bytes) const {
    return reinterpret_cast<T*>(detail::shared_memory + bytes);
  }

  KVPARE_DEVICE void sync() { __syncthreads(); }
  KVPARE_DEVICE void sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
  }
  KVPARE_DEVICE void sync_warp() { __syncwarp(); }

  template <class T>
  KVPARE_DEVICE T shuffle(T x, int lane) {
    return __shfl_sync(all_lanes, x, lane);
  }
  template <class T>
  KVPARE_DEVICE T shuffle_xor(T x, int mask) {
    return __shfl_xor_sync(all_lanes, x, mask);
  }
  template <class T>
  KVPARE_DEVICE T shuffle_up(T x, int n) {
    return __shfl_up_sync(all_lanes, x, static_cast<unsigned>(n));
  }
  KVPARE_DEVICE std::uint32_t ballot(bool yes) { return __ballot_sync(all_lanes, yes); }

  KVPARE_DEVICE void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], F16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  KVPARE_DEVICE void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], BF16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  KVPARE_DEVICE void mma(int (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], S8) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  KVPARE_DEVICE std::uint32_t transpose(std::uint32_t x) {
    std::uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
  }

  KVPARE_DEVICE void copy_async(void* to_shared, const void* global) {
    const auto to = static_cast<std::uint32_t>(__cvta_generic_to_shared(to_shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  }
  KVPARE_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int newest>
  KVPARE_DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
  }

  template <class T>
  KVPARE_DEVICE T load(const T* p) const {
    static_assert(sizeof(T) <= 16 && alignof(T) == sizeof(T), "loads move 1, 2, 4, 8 or 16 aligned bytes");
    __builtin_assume(__isGlobal(p));  // else loads through pointers out of memory are generic ones
    if constexpr (sizeof(T) == 16) {
      const uint4 x = *reinterpret_cast<const uint4*>(p);
      return std::bit_cast<T>(x);
    } else {
      return *p;
    }
  }

  KVPARE_DEVICE float add(float* p, float x) { return atomicAdd(p, x); }
  KVPARE_DEVICE std::uint32_t add(std::uint32_t* p, std::uint32_t x) { return atomicAdd(p, x); }
  KVPARE_DEVICE std::uint64_t add(std::uint64_t* p, std::uint64_t x) {
    return atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(x));
  }
  KVPARE_DEVICE std::uint32_t join(std::uint32_t* p, std::uint32_t x) { return atomicOr(p, x); }
  KVPARE_DEVICE std::uint64_t join(std::uint64_t* p, std::uint64_t x) {
    return atomicOr(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(x));
  }
  KVPARE_DEVICE std::uint32_t most(std::uint32_t* p, std::uint32_t x) { return atomicMax(p, x); }

  static KVPARE_DEVICE float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  }
  static KVPARE_DEVICE std::uint32_t pack(float lo, float hi, F16) {
    std::uint32_t x;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(hi), "f"(lo));
    return x;
  }
  static KVPARE_DEVICE std::uint32_t pack(float lo, float hi, BF16) {
    std::uint32_t x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(hi), "f"(lo));
    return x;
  }
  static KVPARE_DEVICE float unpack_low(std::uint32_t x, F16) { return half_float(static_cast<std::uint16_t>(x)); }
  static KVPARE_DEVICE float unpack_high(std::uint32_t x, F16) { return half_float(static_cast<std::uint16_t>(x >> 16)); }
  static KVPARE_DEVICE float unpack_low(std::uint32_t x, BF16) { return std::bit_cast<float>(x << 16); }
  static KVPARE_DEVICE float unpack_high(std::uint32_t x, BF16) { return std::bit_cast<float>(x & 0xffff0000u); }

  static KVPARE_DEVICE std::uint32_t mul2(std::uint32_t a, std::uint32_t b, F16) {
    std::uint32_t x;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(x) : "r"(a), "r"(b));
    return x;
  }
  static KVPARE_DEVICE std::uint32_t mul2(std::uint32_t a, std::uint32_t b, BF16) {
    return fma2(a, b, 0x80008000u, BF16{});  // - 0: keeps the sign of a zero product
  }
  static KVPARE_DEVICE std::uint32_t fma2(std::uint32_t a, std::uint32_t b, std::uint32_t c, F16) {
    std::uint32_t x;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
    return x;
  }
  static KVPARE_DEVICE std::uint32_t fma2(std::uint32_t a, std::uint32_t b, std::uint32_t c, BF16) {
    std::uint32_t x;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
    return x;
  }
  static KVPARE_DEVICE std::uint32_t permute(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
    return __byte_perm(a, b, selector);
  }

 private:
  static constexpr unsigned all_lanes = 0xffffffffu;
  static KVPARE_DEVICE float half_float(std::uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
};

#endif  // __CUDACC__

}  // namespace kvpare::cuda

// The loops over codes, compiled for every instruction set: `fused::<set>::Set` has them as static functions.
//
// They are templates, and a program whose many files use many codecs compiles them over and over. KVPARE_COMPILED_LOOPS, defined
// for all its files as 0, leaves them to five files that define it as 1 … 5 before they include this header (one per set), and
// the kernels of ../kernels.hpp and ../product.hpp to one that defines it as 6: cmake/loops.cmake makes a library of these.
// Without it nothing needs to be linked.
#pragma once

#include "../kernels.hpp"
#include "fours.hpp"
#include "layout.hpp"
#include "mixed.hpp"

namespace kvpare::cpu::fused::plain {
using namespace kvpare::cpu::plain;
#define KVPARE_MANY_REGISTERS 0
#include "ints_plain.inl"
//
#include "loops.inl"
#define KVPARE_SET_NUMBER 1
#include "instances.inl"
#undef KVPARE_SET_NUMBER
}  // namespace kvpare::cpu::fused::plain

#if KVPARE_HAS_X86_SETS
#define KVPARE_DOTS 0
KVPARE_BEGIN_SET("avx2,fma,f16c")
namespace kvpare::cpu::fused::avx2 {
using namespace kvpare::cpu::avx2;
#include "ints_avx2.inl"
//
#include "loops.inl"
#define KVPARE_SET_NUMBER 2
#include "instances.inl"
#undef KVPARE_SET_NUMBER
}  // namespace kvpare::cpu::fused::avx2
KVPARE_END_SET
#undef KVPARE_DOTS

#define KVPARE_DOTS 1
KVPARE_BEGIN_SET("avx2,fma,f16c,avxvnni")
namespace kvpare::cpu::fused::avx2_vnni {
using namespace kvpare::cpu::avx2;
#include "ints_avx2.inl"
//
#include "loops.inl"
#define KVPARE_SET_NUMBER 3
#include "instances.inl"
#undef KVPARE_SET_NUMBER
}  // namespace kvpare::cpu::fused::avx2_vnni
KVPARE_END_SET
#undef KVPARE_DOTS
#undef KVPARE_MANY_REGISTERS

#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // g++ 12 about its own _mm512_undefined_ps()
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#define KVPARE_MANY_REGISTERS 1
#define KVPARE_DOTS 0
KVPARE_BEGIN_SET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
namespace kvpare::cpu::fused::avx512 {
using namespace kvpare::cpu::avx512;
#include "ints_avx512.inl"
//
#include "loops.inl"
#define KVPARE_SET_NUMBER 4
#include "instances.inl"
#undef KVPARE_SET_NUMBER
}  // namespace kvpare::cpu::fused::avx512
KVPARE_END_SET
#undef KVPARE_DOTS

#define KVPARE_DOTS 1
KVPARE_BEGIN_SET("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
namespace kvpare::cpu::fused::avx512_vnni {
using namespace kvpare::cpu::avx512;
#include "ints_avx512.inl"
//
#include "loops.inl"
#define KVPARE_SET_NUMBER 5
#include "instances.inl"
#undef KVPARE_SET_NUMBER
}  // namespace kvpare::cpu::fused::avx512_vnni
KVPARE_END_SET
#undef KVPARE_DOTS
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif
#undef KVPARE_MANY_REGISTERS

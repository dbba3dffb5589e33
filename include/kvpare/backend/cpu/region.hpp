// How one source becomes code for several instruction sets: KVPARE_BEGIN_SET("avx2,fma") … KVPARE_END_SET.
//
// Functions between the two may use the instructions named, whatever the translation unit was compiled for. Nothing in
// such a region may be a lambda (it would not inherit the pragma) or include a system header.
#pragma once

#include "../../core/config.hpp"

// Loops over arrays of vectors must be unrolled whole, or the vectors live in memory. nvcc's front end does not know
// the pragma; the host compiler behind it unrolls them at -O3 by itself.
#if defined(__CUDACC__)
#define KVPARE_UNROLL
#else
#define KVPARE_UNROLL _Pragma("GCC unroll 64")
#endif

#if defined(__clang__)
#define KVPARE_BEGIN_SET(names) \
  _Pragma(KVPARE_SET_TEXT(clang attribute push(__attribute__((target(names))), apply_to = function)))
#define KVPARE_END_SET _Pragma("clang attribute pop")
#else
#define KVPARE_BEGIN_SET(names) _Pragma("GCC push_options") _Pragma(KVPARE_SET_TEXT(GCC target(names)))
#define KVPARE_END_SET _Pragma("GCC pop_options")
#endif
#define KVPARE_SET_TEXT(...) #__VA_ARGS__

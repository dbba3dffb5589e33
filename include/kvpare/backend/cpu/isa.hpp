// Which instruction set the CPU backend runs on: found at run time, once, in one binary.
#pragma once

#include <cstdlib>
#include <string>
#include <string_view>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define KVPARE_HAS_X86_SETS 1
#include <cpuid.h>
#else
#define KVPARE_HAS_X86_SETS 0
#endif

#include "../../core/error.hpp"

namespace kvpare::cpu {

/// Each set holds the ones before it.
///
/// plain   what the compiler was told to build for: SSE2 on x86-64, NEON on 64-bit ARM
/// avx2    AVX2, FMA, F16C
/// avx512  AVX-512 F, BW, DQ, VL
enum class Isa { plain, avx2, avx512 };

constexpr std::string_view name_of(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "plain";
}

/// The best set that this CPU has and whose registers the operating system saves.
inline Isa detected_isa() {
#if KVPARE_HAS_X86_SETS
  static const Isa found = [] {
    __builtin_cpu_init();
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;  // clang 14 has no name for it
    if (!f16c || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::plain;
    const bool all = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return all ? Isa::avx512 : Isa::avx2;
  }();
  return found;
#else
  return Isa::plain;
#endif
}

/// The set named by `word`, as far as this machine goes. Null or empty means the detected one.
///
/// Throws   InvalidArgument for a word that is no set, or a set that this machine lacks
inline Isa isa_from_text(const char* word) {
  if (word == nullptr || *word == '\0') return detected_isa();
  for (const Isa isa : {Isa::plain, Isa::avx2, Isa::avx512}) {
    if (word != name_of(isa)) continue;
    require(isa <= detected_isa(), "KVPARE_ISA = ", word, ", but this machine has only ", name_of(detected_isa()));
    return isa;
  }
  fail(std::string("KVPARE_ISA = '") + word + "', must be one of: plain avx2 avx512");
}

/// What the backend runs: the detected set, or a lower one that the environment variable KVPARE_ISA asks for. The
/// variable is read at the first call.
///
/// Throws   InvalidArgument where isa_from_text does
inline Isa chosen_isa() {
  static const Isa chosen = isa_from_text(std::getenv("KVPARE_ISA"));
  return chosen;
}

}  // namespace kvpare::cpu

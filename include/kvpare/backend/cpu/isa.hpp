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

/// plain        what the compiler was told to build for: SSE2 on x86-64, NEON on 64-bit ARM
/// avx2         AVX2, FMA, F16C
/// avx2_vnni    avx2 and AVX-VNNI: dot products of bytes
/// avx512       avx2 and AVX-512 F, BW, DQ, VL
/// avx512_vnni  avx512 and AVX-512 VNNI
///
/// The sets with VNNI differ from those without only where pages hold codes. They are no chain: a CPU may have avx2_vnni
/// and not avx512, or the other way round. In rising order of preference.
enum class Isa { plain, avx2, avx2_vnni, avx512, avx512_vnni };

inline constexpr Isa all_isas[] = {Isa::plain, Isa::avx2, Isa::avx2_vnni, Isa::avx512, Isa::avx512_vnni};

constexpr std::string_view name_of(Isa isa) {
  switch (isa) {
    case Isa::avx2: return "avx2";
    case Isa::avx2_vnni: return "avx2_vnni";
    case Isa::avx512: return "avx512";
    case Isa::avx512_vnni: return "avx512_vnni";
    default: return "plain";
  }
}

/// Whether this CPU has the set and the operating system saves its registers.
inline bool supports(Isa isa) {
#if KVPARE_HAS_X86_SETS
  static const unsigned found = [] {
    __builtin_cpu_init();
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) != 0;  // clang 14 has no name for it
    unsigned sets = 1u << static_cast<int>(Isa::plain);
    if (!f16c || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return sets;
    sets |= 1u << static_cast<int>(Isa::avx2);
    constexpr unsigned avx_vnni = 1u << 4;  // of eax of leaf 7, subleaf 1
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & avx_vnni) != 0) sets |= 1u << static_cast<int>(Isa::avx2_vnni);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      sets |= 1u << static_cast<int>(Isa::avx512);
      if (__builtin_cpu_supports("avx512vnni")) sets |= 1u << static_cast<int>(Isa::avx512_vnni);
    }
    return sets;
  }();
  return (found >> static_cast<int>(isa) & 1u) != 0;
#else
  return isa == Isa::plain;
#endif
}

/// The best set of this machine.
inline Isa detected_isa() {
  Isa best = Isa::plain;
  for (const Isa isa : all_isas)
    if (supports(isa)) best = isa;
  return best;
}

/// The set named by `word`, as far as this machine goes. Null or empty means the detected one.
///
/// Throws   InvalidArgument for a word that is no set, or a set that this machine lacks
inline Isa isa_from_text(const char* word) {
  if (word == nullptr || *word == '\0') return detected_isa();
  for (const Isa isa : all_isas) {
    if (word != name_of(isa)) continue;
    require(supports(isa), "KVPARE_ISA = ", word, ", but the best that this machine has is ", name_of(detected_isa()));
    return isa;
  }
  fail(std::string("KVPARE_ISA = '") + word + "', must be one of: plain avx2 avx2_vnni avx512 avx512_vnni");
}

/// What the backend runs: the detected set, or another one that the environment variable KVPARE_ISA asks for. The
/// variable is read at the first call.
///
/// Throws   InvalidArgument where isa_from_text does
inline Isa chosen_isa() {
  static const Isa chosen = isa_from_text(std::getenv("KVPARE_ISA"));
  return chosen;
}

}  // namespace kvpare::cpu

// The codecs of the example programs' page formats, see formats.hpp.
//
// A codec brings loops for every instruction set, some seconds of a compiler's time each. They are compiled once, in the
// formats_*.cpp beside this file, and not again wherever a cache of these formats is built.
#pragma once

#include <kvpare/backend/cpu/tiles.hpp>
#include <kvpare/codec/folded.hpp>
#include <kvpare/codec/fp8.hpp>
#include <kvpare/codec/ggml.hpp>
#include <kvpare/codec/group.hpp>
#include <kvpare/codec/ternary.hpp>
#include <kvpare/codec/turbo_quant.hpp>

// Codecs by the width of their codes, which is what their loops have in common: one .cpp per list.
#define KVPARE_EXAMPLE_CODECS_8(x)                                                                                     \
  x(Int8) x(KiviKeys<8, 32>) x(KiviValues<8, 32>) x(KiviKeys<8, 8>) x(KiviValues<8, 8>) x(KvTunerToken<8>) x(Fp8E4M3)  \
      x(Q8_0)
#define KVPARE_EXAMPLE_CODECS_4(x)                                                                                     \
  x(Int4) x(KiviKeys<4, 32>) x(KiviValues<4, 32>) x(KiviKeys<4, 8>) x(KiviValues<4, 8>) x(KvTunerToken<4>)             \
      x(MikvKeys<4>) x(MikvGroup<4>) x(ZipVlKeys<4>) x(ZipVlValues<4>) x(TurboQuant<4>) x(Q4_0)
#define KVPARE_EXAMPLE_CODECS_3(x)                                                                                     \
  x(KiviKeys<3, 32>) x(KiviValues<3, 32>) x(KiviKeys<3, 8>) x(KiviValues<3, 8>) x(MikvKeys<3>) x(MikvGroup<3>)         \
      x(TurboQuant<3>)
#define KVPARE_EXAMPLE_CODECS_2(x)                                                                                     \
  x(Int2) x(KiviKeys<2, 32>) x(KiviValues<2, 32>) x(KiviKeys<2, 8>) x(KiviValues<2, 8>) x(KvTunerToken<2>)             \
      x(MikvKeys<2>) x(MikvGroup<2>) x(ZipVlKeys<2>) x(ZipVlValues<2>) x(Ternary<>)

#define KVPARE_EXAMPLE_LOOPS(...) template const TileOps* tile_ops<__VA_ARGS__>(Side, TileShape, Isa, int);
#define KVPARE_EXAMPLE_LOOPS_ELSEWHERE(...) extern KVPARE_EXAMPLE_LOOPS(__VA_ARGS__)
namespace kvpare::cpu {
KVPARE_EXAMPLE_CODECS_8(KVPARE_EXAMPLE_LOOPS_ELSEWHERE)
KVPARE_EXAMPLE_CODECS_4(KVPARE_EXAMPLE_LOOPS_ELSEWHERE)
KVPARE_EXAMPLE_CODECS_3(KVPARE_EXAMPLE_LOOPS_ELSEWHERE)
KVPARE_EXAMPLE_CODECS_2(KVPARE_EXAMPLE_LOOPS_ELSEWHERE)
}  // namespace kvpare::cpu

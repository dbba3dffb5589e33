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
#include <kvpare/codec/kv_quant.hpp>
#include <kvpare/codec/qaq.hpp>
#include <kvpare/codec/sparse.hpp>
#include <kvpare/codec/ternary.hpp>
#include <kvpare/codec/thin.hpp>
#include <kvpare/codec/turbo_quant.hpp>
#include <kvpare/codec/unrotated.hpp>
#include <kvpare/codec/vid_kv.hpp>

// Codecs by the width of their codes, which is what their loops have in common: one .cpp per list. Each on the sides that
// format_list.hpp has it on; keys along tokens for either group of KIVI's.
#define KVPARE_EXAMPLE_CODECS_8(keys, values)                                                                          \
  keys(Int8) values(Int8) keys(KiviKeys<8, 32>) keys(KiviKeys<8, 8>) keys(KiviValues<8, 32>) values(KiviValues<8, 32>) \
      keys(KiviValues<8, 8>) values(KiviValues<8, 8>) keys(KvTunerToken<8>) values(KvTunerToken<8>) keys(Fp8E4M3)      \
          values(Fp8E4M3) keys(Q8_0) values(Q8_0)
#define KVPARE_EXAMPLE_CODECS_4(keys, values)                                                                          \
  keys(Int4) values(Int4) keys(KiviKeys<4, 32>) keys(KiviKeys<4, 8>) keys(KiviValues<4, 32>) values(KiviValues<4, 32>) \
      keys(KiviValues<4, 8>) values(KiviValues<4, 8>) keys(KvTunerToken<4>) values(KvTunerToken<4>) keys(MikvKeys<4>)  \
          values(MikvGroup<4>) keys(ZipVlKeys<4>) values(ZipVlValues<4>) keys(TurboQuant<4>) values(TurboQuant<4>)     \
              keys(Q4_0) values(Q4_0)
#define KVPARE_EXAMPLE_CODECS_3(keys, values)                                                                          \
  keys(KiviKeys<3, 32>) keys(KiviKeys<3, 8>) values(KiviValues<3, 32>) values(KiviValues<3, 8>) keys(MikvKeys<3>)      \
      values(MikvGroup<3>) keys(TurboQuant<3>) values(TurboQuant<3>)
#define KVPARE_EXAMPLE_CODECS_2(keys, values)                                                                          \
  keys(Int2) values(Int2) keys(KiviKeys<2, 32>) values(KiviKeys<2, 32>) keys(KiviKeys<2, 8>) values(KiviKeys<2, 8>)    \
      keys(KiviValues<2, 32>) values(KiviValues<2, 32>) keys(KiviValues<2, 8>) values(KiviValues<2, 8>)                \
          keys(KvTunerToken<2>) values(KvTunerToken<2>) keys(MikvKeys<2>) values(MikvGroup<2>) keys(ZipVlKeys<2>)      \
              values(ZipVlValues<2>) keys(Ternary<>) values(Ternary<>)
#define KVPARE_EXAMPLE_CODECS_THIN(keys, values)                                                                       \
  keys(Thin<Raw<float>, 40>) keys(Thin<Raw<float>, 50>) keys(Thin<Raw<half>, 40>) keys(Thin<Raw<half>, 50>)            \
      keys(Thin<Raw<bfloat16>, 40>) keys(Thin<Raw<bfloat16>, 50>) keys(Thin<KiviKeys<4, 32>, 50, 8>)                   \
          keys(Thin<KiviKeys<4, 8>, 50, 8>)
#define KVPARE_EXAMPLE_CODECS_SPECTRA(keys, values)                                                                    \
  keys(VidKvKeys<50, 32>) keys(VidKvKeys<75, 32>) keys(VidKvKeys<50, 32, OneBit::literal>) keys(VidKvKeys<50, 8>)      \
      keys(VidKvKeys<75, 8>) keys(VidKvKeys<50, 8, OneBit::literal>) values(VidKvValues<32>) values(VidKvValues<8>)    \
          values(Ternary<TernaryFit::mean, Along::tokens, 32>) values(Ternary<TernaryFit::mean, Along::tokens, 8>)
#define KVPARE_EXAMPLE_CODECS_OWN_WIDTHS(keys, values)                                                                 \
  keys(Qaq<4, QaqSide::keys>) values(Qaq<4, QaqSide::values>) keys(Qaq<3, QaqSide::keys>)                              \
      values(Qaq<3, QaqSide::values>) keys(Qaq<2, QaqSide::keys>) values(Qaq<2, QaqSide::values>)
#define KVPARE_EXAMPLE_CODECS_LEARNT(keys, values)                                                                     \
  keys(Unrotated<CsrKeys<4, 0, 256>>) values(CsrValues<4, 0, 256>) keys(Unrotated<CsrKeys<2, 0, 256>>)                 \
      values(CsrValues<2, 0, 256>) keys(CsrKeys<4, 0, 256>) keys(KvQuantKeys<4>) values(KvQuantValues<4>)              \
          keys(KvQuantKeys<3>) values(KvQuantValues<3>) keys(KvQuantKeys<2>) values(KvQuantValues<2>)                  \
              keys(KvQuantRotatedKeys<3>)

#define KVPARE_EXAMPLE_KEYS(...) template const TileOps* tile_ops<__VA_ARGS__, Side::keys>(TileShape, Isa, int);
#define KVPARE_EXAMPLE_VALUES(...) template const TileOps* tile_ops<__VA_ARGS__, Side::values>(TileShape, Isa, int);
#define KVPARE_EXAMPLE_KEYS_ELSEWHERE(...) extern KVPARE_EXAMPLE_KEYS(__VA_ARGS__)
#define KVPARE_EXAMPLE_VALUES_ELSEWHERE(...) extern KVPARE_EXAMPLE_VALUES(__VA_ARGS__)
namespace kvpare::cpu {
KVPARE_EXAMPLE_CODECS_8(KVPARE_EXAMPLE_KEYS_ELSEWHERE, KVPARE_EXAMPLE_VALUES_ELSEWHERE)
KVPARE_EXAMPLE_CODECS_4(KVPARE_EXAMPLE_KEYS_ELSEWHERE, KVPARE_EXAMPLE_VALUES_ELSEWHERE)
KVPARE_EXAMPLE_CODECS_3(KVPARE_EXAMPLE_KEYS_ELSEWHERE, KVPARE_EXAMPLE_VALUES_ELSEWHERE)
KVPARE_EXAMPLE_CODECS_2(KVPARE_EXAMPLE_KEYS_ELSEWHERE, KVPARE_EXAMPLE_VALUES_ELSEWHERE)
KVPARE_EXAMPLE_CODECS_THIN(KVPARE_EXAMPLE_KEYS_ELSEWHERE, KVPARE_EXAMPLE_VALUES_ELSEWHERE)
KVPARE_EXAMPLE_CODECS_SPECTRA(KVPARE_EXAMPLE_KEYS_ELSEWHERE, KVPARE_EXAMPLE_VALUES_ELSEWHERE)
KVPARE_EXAMPLE_CODECS_OWN_WIDTHS(KVPARE_EXAMPLE_KEYS_ELSEWHERE, KVPARE_EXAMPLE_VALUES_ELSEWHERE)
KVPARE_EXAMPLE_CODECS_LEARNT(KVPARE_EXAMPLE_KEYS_ELSEWHERE, KVPARE_EXAMPLE_VALUES_ELSEWHERE)
}  // namespace kvpare::cpu

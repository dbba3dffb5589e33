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
#define KVPARE_EXAMPLE_CODECS_8(on_keys, on_values)                                                               \
  on_keys(Int8) on_values(Int8) on_keys(KiviKeys<8, 32>) on_keys(KiviKeys<8, 8>) on_keys(KiviValues<8, 32>)       \
      on_values(KiviValues<8, 32>) on_keys(KiviValues<8, 8>) on_values(KiviValues<8, 8>) on_keys(KvTunerToken<8>) \
          on_values(KvTunerToken<8>) on_keys(Fp8E4M3) on_values(Fp8E4M3) on_keys(Q8_0) on_values(Q8_0)
#define KVPARE_EXAMPLE_CODECS_4(on_keys, on_values)                                                               \
  on_keys(Int4) on_values(Int4) on_keys(KiviKeys<4, 32>) on_keys(KiviKeys<4, 8>) on_keys(KiviValues<4, 32>)       \
      on_values(KiviValues<4, 32>) on_keys(KiviValues<4, 8>) on_values(KiviValues<4, 8>) on_keys(KvTunerToken<4>) \
          on_values(KvTunerToken<4>) on_keys(MikvKeys<4>) on_values(MikvGroup<4>) on_keys(ZipVlKeys<4>)           \
              on_values(ZipVlValues<4>) on_keys(TurboQuant<4>) on_values(TurboQuant<4>) on_keys(Q4_0) on_values(Q4_0)
#define KVPARE_EXAMPLE_CODECS_3(on_keys, on_values)                                                         \
  on_keys(KiviKeys<3, 32>) on_keys(KiviKeys<3, 8>) on_values(KiviValues<3, 32>) on_values(KiviValues<3, 8>) \
      on_keys(MikvKeys<3>) on_values(MikvGroup<3>) on_keys(TurboQuant<3>) on_values(TurboQuant<3>)
#define KVPARE_EXAMPLE_CODECS_2(on_keys, on_values)                                                               \
  on_keys(Int2) on_values(Int2) on_keys(KiviKeys<2, 32>) on_values(KiviKeys<2, 32>) on_keys(KiviKeys<2, 8>)       \
      on_values(KiviKeys<2, 8>) on_keys(KiviValues<2, 32>) on_values(KiviValues<2, 32>) on_keys(KiviValues<2, 8>) \
          on_values(KiviValues<2, 8>) on_keys(KvTunerToken<2>) on_values(KvTunerToken<2>) on_keys(MikvKeys<2>)    \
              on_values(MikvGroup<2>) on_keys(ZipVlKeys<2>) on_values(ZipVlValues<2>) on_keys(Ternary<>)          \
                  on_values(Ternary<>)
#define KVPARE_EXAMPLE_CODECS_THIN(on_keys, on_values)                                               \
  on_keys(Thin<Raw<float>, 40>) on_keys(Thin<Raw<float>, 50>) on_keys(Thin<Raw<half>, 40>)           \
      on_keys(Thin<Raw<half>, 50>) on_keys(Thin<Raw<bfloat16>, 40>) on_keys(Thin<Raw<bfloat16>, 50>) \
          on_keys(Thin<KiviKeys<4, 32>, 50, 8>) on_keys(Thin<KiviKeys<4, 8>, 50, 8>)
#define KVPARE_EXAMPLE_CODECS_SPECTRA(on_keys, on_values)                                                              \
  on_keys(VidKvKeys<50, 32>) on_keys(VidKvKeys<75, 32>) on_keys(VidKvKeys<50, 32, OneBit::literal>)                    \
      on_keys(VidKvKeys<50, 8>) on_keys(VidKvKeys<75, 8>) on_keys(VidKvKeys<50, 8, OneBit::literal>)                   \
          on_values(VidKvValues<32>) on_values(VidKvValues<8>) on_values(Ternary<TernaryFit::mean, Along::tokens, 32>) \
              on_values(Ternary<TernaryFit::mean, Along::tokens, 8>)
#define KVPARE_EXAMPLE_CODECS_OWN_WIDTHS(on_keys, on_values)                                       \
  on_keys(Qaq<4, QaqSide::keys>) on_values(Qaq<4, QaqSide::values>) on_keys(Qaq<3, QaqSide::keys>) \
      on_values(Qaq<3, QaqSide::values>) on_keys(Qaq<2, QaqSide::keys>) on_values(Qaq<2, QaqSide::values>)
#define KVPARE_EXAMPLE_CODECS_LEARNT(on_keys, on_values)                                                              \
  on_keys(Unrotated<CsrKeys<4, 0, 256>>) on_values(CsrValues<4, 0, 256>) on_keys(Unrotated<CsrKeys<2, 0, 256>>)       \
      on_keys(Unrotated<CsrKeys<4, 1024>>) on_values(CsrValues<4, 1024>)                                              \
      on_keys(Unrotated<CsrKeys<4, 1024, 256>>) on_values(CsrValues<4, 1024, 256>)                                    \
      on_values(CsrValues<2, 0, 256>) on_keys(CsrKeys<4, 0, 256>) on_keys(KvQuantKeys<4>) on_values(KvQuantValues<4>) \
          on_keys(KvQuantKeys<3>) on_values(KvQuantValues<3>) on_keys(KvQuantKeys<2>) on_values(KvQuantValues<2>)     \
              on_keys(KvQuantRotatedKeys<3>)

#define KVPARE_EXAMPLE_KEYS(...) template const TileOps* tile_ops<__VA_ARGS__, Side::keys>(TileShape, int);
#define KVPARE_EXAMPLE_VALUES(...) template const TileOps* tile_ops<__VA_ARGS__, Side::values>(TileShape, int);
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

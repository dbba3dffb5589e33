#include "codecs.hpp"

#include <algorithm>
#include <kvpare/codec/block_float.hpp>
#include <kvpare/codec/folded.hpp>
#include <kvpare/codec/fp8.hpp>
#include <kvpare/codec/ggml.hpp>
#include <kvpare/codec/group.hpp>
#include <kvpare/codec/raw.hpp>
#include <kvpare/codec/rotation.hpp>
#include <kvpare/codec/round_trip.hpp>
#include <kvpare/codec/ternary.hpp>
#include <kvpare/codec/turbo_quant.hpp>
#include <kvpare/core/error.hpp>

namespace tune {

namespace {

template <class... Cs>
std::vector<CodecEntry> entries() {
  return {CodecEntry{Cs::name, [](kvpare::TileShape s) { return Cs::fits(s); },
                     [](kvpare::TileShape s) { return Cs::tile_bytes(s); },
                     [](const std::vector<float>& rows, Index width, Index page_tokens, const std::vector<float>& query_peak) {
                       return kvpare::round_trip<Cs>(rows, width, page_tokens, {.query_peak = query_peak});
                     }}...};
}

template <Index group>
std::vector<CodecEntry> with_groups_of() {
  using namespace kvpare;
  return entries<Raw<half>, Raw<bfloat16>, Fp8E4M3, Fp8E5M2, Int8, Int4, Int3, Int2, Int1, Symmetric<8, group>,
                 Symmetric<4, group>, Affine<8, group>, Affine<4, group>, Affine<3, group>, Affine<2, group>,
                 KiviKeys<8, group>, KiviKeys<4, group>, KiviKeys<3, group>, KiviKeys<2, group>, KvTunerToken<8>,
                 KvTunerToken<4>, KvTunerToken<2>, MikvGroup<4>, MikvGroup<3>, MikvGroup<2>, MikvKeys<4>, MikvKeys<3>,
                 MikvKeys<2>, ZipVlKeys<4>, ZipVlKeys<2>, ZipVlValues<4>, ZipVlValues<2>, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0,
                 Iq4Nl, MxFp4<>, NvFp4<>, Ternary<>, Rotated<Int4>, Rotated<Int3>, Rotated<Int2>, TurboQuant<4>,
                 TurboQuant<3>, TurboQuant<2>, TurboProduct<4>, TurboProduct<3>>();
}

}  // namespace

const std::vector<CodecEntry>& known_codecs(Index group) {
  static const std::vector<CodecEntry> of_8 = with_groups_of<8>(), of_32 = with_groups_of<32>();
  kvpare::require(group == 8 || group == 32, "group = ", group, ", must be 8 or 32");
  return group == 8 ? of_8 : of_32;
}

const CodecEntry& find_codec(std::string_view name, Index group) {
  const auto& all = known_codecs(group);
  const auto at = std::find_if(all.begin(), all.end(), [&](const CodecEntry& c) { return c.name == name; });
  std::string names;
  for (const CodecEntry& c : all) names += ' ', names += c.name;
  kvpare::require(at != all.end(), "no codec named '", name, "'; known:", names);
  return *at;
}

}  // namespace tune

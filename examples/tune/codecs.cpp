#include "codecs.hpp"

#include <algorithm>
#include <kvpare/codec/block_float.hpp>
#include <kvpare/codec/folded.hpp>
#include <kvpare/codec/fp8.hpp>
#include <kvpare/codec/ggml.hpp>
#include <kvpare/codec/group.hpp>
#include <kvpare/codec/kv_quant.hpp>
#include <kvpare/codec/qaq.hpp>
#include <kvpare/codec/raw.hpp>
#include <kvpare/codec/rotation.hpp>
#include <kvpare/codec/sparse.hpp>
#include <kvpare/codec/ternary.hpp>
#include <kvpare/codec/thin.hpp>
#include <kvpare/codec/turbo_quant.hpp>
#include <kvpare/codec/unrotated.hpp>
#include <kvpare/codec/vid_kv.hpp>
#include <kvpare/core/error.hpp>

namespace tune {

namespace {

template <class C>
CodecEntry entry() {
  return {C::name, [](kvpare::TileShape s) { return C::fits(s); }, [](kvpare::TileShape s) { return C::tile_bytes(s); },
          kvpare::round_trip<C>};
}
template <class... Cs>
std::vector<CodecEntry> entries() {
  return {entry<Cs>()...};
}
template <class... Pairs>
std::vector<FormEntry> forms() {
  return {FormEntry{entry<typename Pairs::Key>(), entry<typename Pairs::Value>()}...};
}

template <Index group>
std::vector<FormEntry> forms_with_groups_of() {
  using namespace kvpare;
  using Groups = Symmetric<4, group>;
  return forms<Pair<Thin<Raw<half>, 40>, Raw<half>>, Pair<Thin<Raw<half>, 50>, Raw<half>>, Pair<Thin<Groups, 50, group>, Groups>,
               Pair<Thin<KiviKeys<4, group>, 50, 8>, KiviValues<4, group>>, Pair<KiviKeys<4, group>, KiviValues<4, group>>,
               Pair<KiviKeys<2, group>, KiviValues<2, group>>, Pair<VidKvKeys<75, group>, VidKvValues<group>>,
               Pair<VidKvKeys<50, group>, VidKvValues<group>>, Pair<VidKvKeys<25, group>, VidKvValues<group>>,
               Pair<VidKvKeys<50, group>, VidKvProtectedValues<group>>,
               Pair<VidKvKeys<50, group, OneBit::literal>, Ternary<TernaryFit::mean, Along::tokens, group>>,
               Pair<Qaq<4, QaqSide::keys>, Qaq<4, QaqSide::values>>, Pair<Qaq<3, QaqSide::keys>, Qaq<3, QaqSide::values>>,
               Pair<Qaq<2, QaqSide::keys>, Qaq<2, QaqSide::values>>,
               Pair<Unrotated<CsrKeys<8, 0, 256>>, CsrValues<8, 0, 256>>,
               Pair<Unrotated<CsrKeys<4, 0, 256>>, CsrValues<4, 0, 256>>, Pair<CsrKeys<4, 0, 256>, CsrValues<4, 0, 256>>,
               Pair<KvQuantKeys<4>, KvQuantValues<4>>, Pair<KvQuantKeys<3>, KvQuantValues<3>>,
               Pair<KvQuantKeys<2>, KvQuantValues<2>>, Pair<KvQuantRotatedKeys<4>, KvQuantValues<4>>,
               Pair<KvQuantRotatedKeys<3>, KvQuantValues<3>>, Pair<KvQuantRotatedKeys<2>, KvQuantValues<2>>>();
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

std::vector<FormEntry> known_forms(Index group) {
  std::vector<FormEntry> all;
  for (const CodecEntry& codec : known_codecs(group)) all.push_back({codec, codec});
  const std::vector<FormEntry> of_two = group == 8 ? forms_with_groups_of<8>() : forms_with_groups_of<32>();
  all.insert(all.end(), of_two.begin(), of_two.end());
  return all;
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

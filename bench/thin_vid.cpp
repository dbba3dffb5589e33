// Decode attention over thin keys and VidKV's pages, against the plain form each of them replaces; and how fast they encode.
#include <kvpare/codec/vid_kv.hpp>

#include "support/coded_pages.hpp"

namespace {

using namespace bench;

// For raw rows `codes` has the plain loops.
using Half = kvpare::Raw<kvpare::half>;
using Int4 = kvpare::Symmetric<4, 32>;
using Int2 = kvpare::Affine<2, 32>;
using Whole4 = kvpare::Int4;
template <class C, int percent, Index align>
using Thin = kvpare::Thin<C, percent, align>;
using kvpare::KiviKeys;
using kvpare::KiviValues;
using kvpare::VidKvKeys;
using kvpare::VidKvValues;

/// `of_plain`: time of a step over that of the other form, a step of each by turns.
template <class K, class V, class PlainK, class PlainV>
void add_thin_vid(const std::string& name) {
  add_beside<K, V, PlainK, PlainV>("thin_vid/cpu/" + name, "of_plain");
}

[[maybe_unused]] const bool added = [] {
  add_thin_vid<Thin<Int4, 50, 32>, Int4, Int4, Int4>("thin50a32_int4_g32");
  add_thin_vid<Thin<Whole4, 50, 8>, Whole4, Whole4, Whole4>("thin50a8_int4");
  add_thin_vid<Thin<Whole4, 40, 16>, Whole4, Whole4, Whole4>("thin40a16_int4");
  add_thin_vid<Thin<KiviKeys<4>, 50, 16>, KiviValues<4>, KiviKeys<4>, KiviValues<4>>("thin50a16_kivi4");
  add_thin_vid<Thin<KiviKeys<2>, 40, 16>, KiviValues<2>, KiviKeys<2>, KiviValues<2>>("thin40a16_kivi2");
  add_thin_vid<Thin<Half, 40, 1>, Thin<Half, 0, 1>, Thin<Half, 0, 1>, Thin<Half, 0, 1>>("thin40_half");
  add_thin_vid<VidKvKeys<50>, VidKvValues<>, Int2, Int2>("vid_kv50");
  add_thin_vid<VidKvKeys<50>, VidKvValues<>, KiviKeys<2>, KiviValues<2>>("vid_kv50_of_kivi2");
  add_thin_vid<VidKvKeys<25>, VidKvValues<>, Int2, Int2>("vid_kv25");
  add_thin_vid<VidKvKeys<75>, VidKvValues<>, Int2, Int2>("vid_kv75");
  add_encode<Thin<Int4, 50, 32>, Int4>("thin_vid_encode/cpu/thin50a32_int4_g32");
  add_encode<VidKvKeys<50>, VidKvValues<>>("thin_vid_encode/cpu/vid_kv50");
  add_encode<KiviKeys<2>, KiviValues<2>>("thin_vid_encode/cpu/kivi2");
  return true;
}();

}  // namespace

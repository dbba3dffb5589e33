// KVQuant beside int4: attention on its pages, keys before and after RoPE, and how fast tokens are coded.
#include <kvpare/codec/kv_quant.hpp>

#include "support/coded_pages.hpp"

namespace {

using namespace bench;
using Int4 = kvpare::Symmetric<4, 32>;
constexpr Index learned_pages = 8;  // that codebooks are learned from

/// `of_int4`: time of a step over that of int4, a step of each by turns.
template <class K, class V>
void add_kv_quant(const std::string& name, bool gaps = false) {
  add_beside<K, V, Int4, Int4>("kv_quant/cpu/" + name, "of_int4", learned_pages, gaps);
  if (!gaps) add_encode<K, V>("kv_quant_encode/cpu/" + name, learned_pages);
}

[[maybe_unused]] const bool added = [] {
  add_kv_quant<kvpare::KvQuantKeys<4>, kvpare::KvQuantValues<4>>("kv_quant4");
  add_kv_quant<kvpare::KvQuantKeys<4>, kvpare::KvQuantValues<4>>("kv_quant4_gaps", true);
  add_kv_quant<kvpare::KvQuantKeys<3>, kvpare::KvQuantValues<3>>("kv_quant3");
  add_kv_quant<kvpare::KvQuantKeys<2>, kvpare::KvQuantValues<2>>("kv_quant2");
  add_kv_quant<kvpare::KvQuantRotatedKeys<4>, kvpare::KvQuantValues<4>>("kv_quant4_rotated");
  add_kv_quant<Int4, Int4>("int4_g32");
  return true;
}();

}  // namespace

// Decode attention on codes, page by page: keys, softmax, values, as `attend` calls them, without the cache around.
#include <kvpare/codec/fp8.hpp>
#include <kvpare/codec/group.hpp>
#include <kvpare/codec/ternary.hpp>

#include "support/coded_pages.hpp"

namespace {

using namespace bench;

template <class K, class V>
bool add_codes(std::string_view name, int probability_bits) {
  for (const LayerShape& shape : {llama_8b(), qwen_vl_7b()})
    for (const Index tokens : {1024, 4096, 16384, 32768}) {
      const std::string text = kvpare::message("codes/cpu/", name, "/Q:", shape.q_heads, "/H:", shape.kv_heads,
                                               "/D:", shape.key_dim, "/N:", tokens, "/p:", probability_bits);
      add(text, [=](benchmark::State& state) {
        auto& pages = kept(text, [&] { return std::make_unique<CodedPages>(shape, tokens, coded<K, V>(shape, tokens, probability_bits)); });
        const double bytes = static_cast<double>(pages.bytes());
        run(state, {.bytes = bytes, .tokens = static_cast<double>(tokens), .against = {of_read_bw(bytes, 1)}},
            [&](Index i) { pages.step(i); });
      });
    }
  if constexpr (!K::rows_move || kvpare::is_raw<K>) return true;
  const std::string text = kvpare::message("codes_append/cpu/", name, "/H:8/D:128/N:1024/p:", probability_bits);
  add(text, [=](benchmark::State& state) {
    auto& pages = kept(text, [&] { return std::make_unique<CodedPages>(llama_8b(), 1024, coded<K, V>(llama_8b(), 1024, probability_bits)); });
    for (Index slot = 0; auto _ : state) pages.append(slot++ % coded_page_tokens);
  });
  return true;
}

template <class C>
bool add_codes(std::string_view name, int probability_bits = 16) {
  return add_codes<C, C>(name, probability_bits);
}

using kvpare::Affine;
using kvpare::Symmetric;
[[maybe_unused]] const bool added =
    add_codes<kvpare::Raw<kvpare::half>>("half_by_rows") && add_codes<kvpare::Fp8E4M3>("fp8_e4m3") &&
    add_codes<Symmetric<8, 32>>("int8_g32") && add_codes<Symmetric<4, 32>>("int4_g32") &&
    add_codes<Symmetric<4, 32>>("int4_g32", 8) && add_codes<Affine<4, 32>>("int4_g32_min") &&
    add_codes<Affine<2, 32>>("int2_g32_min") && add_codes<kvpare::Ternary<>>("ternary") &&
    add_codes<kvpare::KiviKeys<4>, kvpare::KiviValues<4>>("kivi4", 16) &&
    add_codes<kvpare::KiviKeys<2>, kvpare::KiviValues<2>>("kivi2", 16);

}  // namespace

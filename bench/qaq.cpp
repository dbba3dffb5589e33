// Decode attention on pages of tokens in several numbers of bits (QAQ), against pages of each of these alone.
#include <kvpare/codec/group.hpp>
#include <kvpare/codec/qaq.hpp>

#include "support/coded_pages.hpp"

namespace {

using namespace bench;
using kvpare::Affine;
using kvpare::Qaq;
using kvpare::QaqSide;

/// Half of the tokens of a page have a range four times that of the others.
template <class K, class V>
CodedSetup uneven(const LayerShape& layer, Index tokens) {
  constexpr Index different = 16;
  CodedSetup setup = coded<K, V>(layer, tokens, 16, different);
  for (Index t = 0; t < coded_page_tokens * different; ++t)
    if ((t % coded_page_tokens * 7 + t / coded_page_tokens) % 4 < 2)
      for (Index c = 0; c < layer.key_dim; ++c) setup.rows[static_cast<std::size_t>(t * layer.key_dim + c)] *= 4;
  setup.key_state.clear(), setup.value_state.clear();  // no targets: pages are filled
  return setup;
}

/// `of_parts`: time of a step over that of steps over pages of each number of bits that QAQ's have, a step of each by turns.
template <class K, class V>
void add_qaq(const std::string& name) {
  add_beside("qaq/cpu/" + name, "of_parts", [](const LayerShape& layer, Index tokens) {
    Beside rig{std::make_unique<CodedPages>(layer, tokens, uneven<K, V>(layer, tokens)), {}};
    const TileShape shape{coded_page_tokens, layer.key_dim};
    double share[9] = {};
    std::uint8_t bits[kvpare::detail::qaq_most_blocks] = {};
    K::read_bits(shape, rig.pages->first_tile(Side::keys), bits);
    for (const std::uint8_t b : bits) share[b] += 0.125;
    V::read_bits(shape, rig.pages->first_tile(Side::values), bits);
    for (const std::uint8_t b : bits) share[b] += 0.125;
    for (int b = 0; b <= 8; ++b)
      kvpare::detail::with_qaq_bits(share[b] > 0 ? b : 0, [&]<int one>() {
        rig.others.emplace_back(
            share[b], std::make_unique<CodedPages>(layer, tokens, uneven<Affine<one>, Affine<one>>(layer, tokens)));
      });
    return rig;
  });
  add_encode<K, V>("qaq_encode/cpu/" + name);
}

[[maybe_unused]] const bool added = [] {
  add_qaq<Qaq<3, QaqSide::keys>, Qaq<3, QaqSide::values>>("3_bits");
  add_qaq<Qaq<3, QaqSide::keys, 0>, Qaq<3, QaqSide::values, 0>>("3_bits_no_outliers");
  add_qaq<Qaq<2, QaqSide::keys>, Qaq<2, QaqSide::values>>("2_bits");
  return true;
}();

}  // namespace

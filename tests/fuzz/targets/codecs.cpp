// Every kind of codec on any bytes: tiles that nobody encoded, and rows of any floats at all.
//
// Input  byte 0: codec · byte 1: slots of the tile · byte 2: width · byte 3: rows, whether there is a state · the rest, over and
//        over again: the bytes of the tile, of the state and of the rows
#include <cmath>
#include <cstring>
#include <vector>

#include "fuzz/byte_choices.hpp"
#include "fuzz/target.hpp"
#include "kvpare/codec/fp8.hpp"
#include "kvpare/codec/ggml.hpp"
#include "kvpare/codec/kv_quant.hpp"
#include "kvpare/codec/ternary.hpp"
#include "kvpare/codec/turbo_quant.hpp"

using namespace kvpare;
using namespace kvpare::test;

namespace {

/// The input's bytes, in memory of exactly the size asked for, so that a sanitizer sees the first byte beside it.
template <class T>
std::vector<T> fill(ByteChoices& choices, Index n, const std::uint8_t* data, std::size_t size) {
  std::vector<T> all(static_cast<std::size_t>(n));
  auto* bytes = reinterpret_cast<unsigned char*>(all.data());
  const auto shift = static_cast<std::size_t>(choices.below(256));
  for (std::size_t i = 0; i < all.size() * sizeof(T); ++i) bytes[i] = size > 0 ? data[(i + shift) % size] : 0;
  return all;
}

template <class C>
void run(TileShape shape, Index count, bool with_state, ByteChoices& choices, const std::uint8_t* data,
         std::size_t size) {
  if (!C::fits(shape)) return;
  const std::vector<float> state = fill<float>(choices, state_floats<C>(shape.width), data, size);
  const float* given = with_state && !state.empty() ? state.data() : nullptr;
  std::vector<std::byte> tile = fill<std::byte>(choices, C::tile_bytes(shape), data, size);
  std::vector<float> row(static_cast<std::size_t>(shape.width));
  const std::vector<Position> positions = fill<Position>(choices, shape.tokens, data, size);
  const TokenFacts facts{positions.data(), nullptr};
  const auto decode = [&](Index t) {
    decode_row<C>(shape, tile.data(), t, positions[static_cast<std::size_t>(t)], given, row.data());
  };
  for (Index t = 0; t < shape.tokens; ++t) decode(t);

  const std::vector<float> rows = fill<float>(choices, count * shape.width, data, size);
  encode_rows<C>(shape, rows.data(), 0, count, facts, given, tile.data());
  for (Index t = 0; t < count; ++t) {
    decode(t);
    if (given == nullptr)
      for (const float x : row)
        must(std::isfinite(x), std::string(C::name) + " decodes its own tile to infinity or NaN");
  }
  if constexpr (C::rows_move) {
    std::vector<std::byte> again(tile.size());
    for (Index t = count; t-- > 0;)
      encode_rows<C>(shape, rows.data() + t * shape.width, t, 1, facts.from(t), given, again.data());
    must(std::memcmp(again.data(), tile.data(), static_cast<std::size_t>(C::tile_bytes({count, shape.width}))) == 0,
         std::string(C::name) + " codes a row by what is beside it");
  }
  if constexpr (GgmlCodec<C>) {
    if (!ggml_fits<C>(shape.width)) return;
    const std::vector<std::byte> foreign = fill<std::byte>(choices, ggml_row_bytes<C>(shape.width), data, size);
    std::vector<std::byte> ours(foreign.size()), back(foreign.size());
    from_ggml<C>(shape.width, foreign.data(), ours.data());
    to_ggml<C>(shape.width, ours.data(), back.data());
    must(back == foreign, std::string(C::name) + " loses bits of a ggml row");
  }
}

template <class... Cs>
void run_one(Index which, TileShape shape, Index count, bool with_state, ByteChoices& choices, const std::uint8_t* data,
             std::size_t size) {
  Index k = 0;
  ((k++ == which ? run<Cs>(shape, count, with_state, choices, data, size) : void()), ...);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  ByteChoices choices(data, size);
  const Index which = choices.below(36), tokens = Index{16} << choices.below(3);
  constexpr Index widths[] = {8, 64, 80, 96, 128, 256, 7, 24};
  const TileShape shape{tokens, widths[choices.below(8)]};
  const Index count = 1 + choices.below(tokens);
  const bool with_state = choices.chance(0.5);
  const std::size_t head = size < 5 ? size : 5;
  run_one<Int8, Symmetric<4, 32>, Int3, Int2, Int1, Affine<4, 32>, Affine<1>, KvTunerToken<8>, KvTunerToken<2, 8>,
          KiviKeys<2>, KiviKeys<8, 16>, MikvKeys<3>, ZipVlKeys<4>, ZipVlValues<2>,
          Group<GroupSpec{.bits = 4, .fit = Fit::integer, .along = Along::tokens, .scale = ScaleType::f32}>,
          Group<GroupSpec{.bits = 2, .fit = Fit::min_max, .scale = ScaleType::f32, .packing = Packing::halves}>,
          Fp8E4M3, Fp8E5M2, MxFp4<Ties::down>, NvFp4<>, Q8_0, Q5_0, Q5_1, Iq4Nl, Q2_0, Ternary<>,
          Ternary<TernaryFit::amax, Along::tokens, 16>, Rotated<KiviKeys<4>, 5>, TurboQuant<3, true>, TurboProduct<4>,
          KvQuantRotatedKeys<4>, KvQuantKeys<3, 2>, KvQuantValues<2>, Outliers<Affine<4>, 3>, Unrotated<KiviKeys<2, 16>>,
          Unrotated<Outliers<Symmetric<2>, 1>>>(
      which, shape, count, with_state, choices, data + head, size - head);
  return 0;
}

// Codecs that fold: attention over what is stored equals attention over what it stands for.
#pragma once

#include "codec_tiles.hpp"

namespace kvpare::test {

/// What the innermost codec stores, its query and its output, through any number of folds.
template <class C>
float fold_query(Index width, const float* state, float* q) {
  if constexpr (FoldedCodec<C>) {
    const float bias = C::fold_query(width, state, q);
    return bias + fold_query<typename C::Inner>(inner_width<C>(width), state ? state + C::own_state_floats(width) : nullptr, q);
  } else {
    return 0.0f;
  }
}
template <class C>
void fold_output(Index width, const float* state, float sum, float* out) {
  if constexpr (FoldedCodec<C>) {
    fold_output<typename C::Inner>(inner_width<C>(width), state ? state + C::own_state_floats(width) : nullptr, sum, out);
    C::fold_output(width, state, sum, out);
  }
}
template <class C>
void decode_innermost(TileShape shape, const std::byte* tile, Index slot, const float* state, float* row) {
  if constexpr (FoldedCodec<C>)
    decode_innermost<typename C::Inner>({shape.tokens, inner_width<C>(shape.width)}, tile, slot,
                                        state ? state + C::own_state_floats(shape.width) : nullptr, row);
  else
    C::decode(shape, tile, slot, state, row);
}

/// Numbers that the innermost codec stores.
template <class C>
Index innermost_width(Index width) {
  if constexpr (FoldedCodec<C>)
    return innermost_width<typename C::Inner>(inner_width<C>(width));
  else
    return width;
}

/// q·k' and Σ p v' both ways.
template <FoldedCodec C>
void expect_folds(TileShape shape, const float* state, float tolerance = 1e-4f) {
  const auto w = static_cast<std::size_t>(shape.width), stored = static_cast<std::size_t>(innermost_width<C>(shape.width));
  const auto rows = outliers(21, shape.tokens, shape.width);
  GuardedTile<C> tile(shape);
  tile.encode(rows, 0, state);
  const auto q = gaussians(22, shape.width);
  auto folded = q;
  const float bias = fold_query<C>(shape.width, state, folded.data());
  std::vector<float> direct(w, 0.0f), inside(w, 0.0f), row(w);
  float sum = 0;
  for (Index t = 0; t < shape.tokens; ++t) {
    const auto x = tile.decode(t, state);
    decode_innermost<C>(shape, tile.tile(), t, state, row.data());
    float want = 0, got = bias, size = std::abs(bias);
    const float p = 1 / static_cast<float>(t + 2);
    sum += p;
    for (std::size_t c = 0; c < w; ++c) {
      want += q[c] * x[c], size += std::abs(q[c] * x[c]), direct[c] += p * x[c];
      if (c >= stored) continue;
      got += folded[c] * row[c], size += std::abs(folded[c] * row[c]), inside[c] += p * row[c];
    }
    ASSERT_NEAR(got, want, tolerance * size) << C::name << " key " << t;
  }
  fold_output<C>(shape.width, state, sum, inside.data());
  float size = 0;
  for (const float x : direct) size = std::max(size, std::abs(x));
  for (std::size_t c = 0; c < w; ++c)
    ASSERT_NEAR(inside[c], direct[c], tolerance * size) << C::name << " channel " << c;
}

}  // namespace kvpare::test

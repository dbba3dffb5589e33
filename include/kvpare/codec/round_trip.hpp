// Rows through a codec and back, on the host: what measuring a codec needs.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "codec.hpp"

namespace kvpare {

/// Rows [tokens, width] coded page by page, as canonical bytes, and decoded. State, where the codec makes any, is made of
/// these rows and of `query_peak` [width], the largest |q| per channel (or empty); else it is neutral.
///
/// Needs  C::fits({page_tokens, width})   Cost: one tile of memory
template <Codec C>
std::vector<float> round_trip(const std::vector<float>& rows, Index width, Index page_tokens,
                              const std::vector<float>& query_peak = {}) {
  std::vector<float> state;
  if constexpr (MakesState<C>) {
    std::vector<float> min(static_cast<std::size_t>(width), std::numeric_limits<float>::infinity());
    std::vector<float> max(min.size(), -std::numeric_limits<float>::infinity());
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const std::size_t c = i % min.size();
      min[c] = std::min(min[c], rows[i]), max[c] = std::max(max[c], rows[i]);
    }
    state.resize(static_cast<std::size_t>(state_floats<C>(width)));
    C::make_state(width, {min.data(), max.data(), query_peak.empty() ? nullptr : query_peak.data()}, state.data());
  }
  const float* made = state.empty() ? nullptr : state.data();
  const TileShape shape{page_tokens, width};
  const Index tokens = static_cast<Index>(rows.size()) / width;
  std::vector<std::byte> tile(static_cast<std::size_t>(C::tile_bytes(shape)));
  std::vector<float> decoded(rows.size());
  for (Index t = 0; t < tokens; t += page_tokens) {
    const Index count = std::min(page_tokens, tokens - t);
    C::encode(shape, rows.data() + t * width, 0, count, made, tile.data());
    for (Index r = 0; r < count; ++r) C::decode(shape, tile.data(), r, made, decoded.data() + (t + r) * width);
  }
  return decoded;
}

}  // namespace kvpare

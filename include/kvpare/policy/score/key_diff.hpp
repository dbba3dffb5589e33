// Keys unlike the others are kept: no query, no attention.
#pragma once

#include <cmath>
#include <string_view>
#include <tuple>
#include <vector>

#include "../contracts.hpp"

namespace kvpare {

/// Scores a token by how much its key differs in direction from those of its head.
///
/// Formula  anchor_h = mean over the head's live tokens of k / ||k||;  score[h, j] = -cos(k_hj, anchor_h)
///          (a key or an anchor of length 0: cos = 0)
/// Shapes   keys through pages -> scores [kv_heads, columns]
/// Ties     none made here; a NaN key makes the anchor, and so every score of its head, NaN
/// Cost     reads the keys once; scratch a copy of one head's keys in floats
/// Source   KeyDiff (Park et al. 2025, arXiv 2504.15364), section 3
struct KeyDiff {
  static constexpr std::string_view name = "key_diff";
  static constexpr auto fields() { return std::tuple{}; }
  constexpr Reads reads() const { return {}; }
  friend bool operator==(const KeyDiff&, const KeyDiff&) = default;
};

namespace detail {

struct InverseNorm {
  const float* rows;
  Index width;
  float* out;
  KVPARE_HD void operator()(Index t) const {
    double squares = 0;
    for (Index c = 0; c < width; ++c)
      squares += static_cast<double>(rows[t * width + c]) * static_cast<double>(rows[t * width + c]);
    out[t] = squares == 0 ? 0.0f : static_cast<float>(1 / std::sqrt(squares));
  }
};

struct NegativeCosine {
  const float *dots, *inverse_norms;  // [tokens] key · anchor, 1 / ||key||
  const float* inverse_anchor_norm;   // [1]
  const std::int32_t* columns;        // [tokens]
  float* out;                         // [columns]
  KVPARE_HD void operator()(Index t) const { out[columns[t]] = -dots[t] * inverse_norms[t] * *inverse_anchor_norm; }
};

}  // namespace detail

template <Backend B>
void score(B& be, const KeyDiff&, const Observation<B>& seen, Scores out) {
  fill(be, out.data, out.heads * out.columns, 0.0f);
  const Index width = seen.shape->key_dim;
  for (Index h = 0; h < out.heads; ++h) {
    std::vector<std::int32_t> columns;
    for_each_token(seen, h, [&](Index, Index column) { columns.push_back(static_cast<std::int32_t>(column)); });
    const Index tokens = static_cast<Index>(columns.size());
    if (tokens == 0) continue;
    const Buffer<B, float> rows(be, tokens * width), inverse(be, tokens), dots(be, tokens), anchor(be, width),
        inverse_anchor(be, 1);
    const Buffer<B, std::int32_t> column_of(be, columns);
    GatherRow gather;
    gather.pages = seen.heads[static_cast<std::size_t>(h)], gather.width = width, gather.out = rows.data();
    be.gather(std::span(&gather, 1));
    be.each(tokens, detail::InverseNorm{rows.data(), width, inverse.data()});
    // The anchor's length does not matter for a cosine: the sum serves as well as the mean.
    be.product({.a = inverse.data(), .b = rows.data(), .c = anchor.data(), .m = 1, .n = width, .k = tokens});
    be.each(1, detail::InverseNorm{anchor.data(), width, inverse_anchor.data()});
    be.product({.a = rows.data(), .b = anchor.data(), .c = dots.data(), .m = tokens, .n = 1, .k = width});
    be.each(tokens, detail::NegativeCosine{dots.data(), inverse.data(), inverse_anchor.data(), column_of.data(),
                                           out.data + h * out.columns});
  }
}

}  // namespace kvpare

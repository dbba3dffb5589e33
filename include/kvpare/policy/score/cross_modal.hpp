// Visual tokens by how much the prompt's text has to do with them.
#pragma once

#include <string_view>
#include <tuple>

#include "../contracts.hpp"

namespace kvpare {

/// Formula  score[i] = sum_j X_v(i)·X_t(j) = X_v(i)·sum_j X_t(j)
/// Shapes   features: `sources` [visual tokens, 1, width] and `texts` [text tokens, 1, width], both as they enter the language
///          model, any element type; no queries, no keys -> scores [1, tokens], for all heads and layers
/// Ties     none made here; a NaN in a visual token makes its own score NaN, one in a text all of them
/// Cost     (visual + text tokens) * width; sums in double
/// Source   VidKV (Tao et al. 2025, arXiv 2503.16257), section 3.3, semantic token protection
struct CrossModal {
  static constexpr std::string_view name = "cross_modal";
  static constexpr auto fields() { return std::tuple{}; }
  constexpr Reads reads() const { return {.features = true, .texts = true}; }
  friend bool operator==(const CrossModal&, const CrossModal&) = default;
};

namespace detail {

struct SumOfTexts {
  ConstTensor texts;
  double* sum;  // [width]
  KVPARE_HD void operator()(Index channel) const {
    double total = 0;
    for (Index r = 0; r < texts.rows; ++r) total += static_cast<double>(element(texts, r, channel));
    sum[channel] = total;
  }
};

struct ProductWithTexts {
  ConstTensor sources;
  const double* sum;
  float* out;  // [tokens]
  KVPARE_HD void operator()(Index token) const {
    double total = 0;
    for (Index c = 0; c < sources.width; ++c) total += static_cast<double>(element(sources, token, c)) * sum[c];
    out[token] = static_cast<float>(total);
  }
};

}  // namespace detail

template <Backend B>
void score(B& be, const CrossModal&, const Observation<B>& seen, Scores out) {
  const Features& f = *seen.features;
  const Buffer<B, double> sum(be, f.texts.width);
  be.each(f.texts.width, detail::SumOfTexts{f.texts, sum.data()});
  be.each(f.tokens(), detail::ProductWithTexts{f.sources, sum.data(), out.data});
}

}  // namespace kvpare

// VidKV: visual tokens that matter to the text, by the embeddings alone.
#pragma once

#include "dense.hpp"

namespace kvpare::oracle {

/// score[i] = sum over text tokens j of X_v(i) . X_t(j).
/// Shapes  visual [tokens, width], text [text tokens, width] -> [tokens]
/// Source  VidKV, arXiv 2503.16257, section 3.3
inline std::vector<double> cross_modal_scores(const Array2& visual, const Array2& text) {
  require(visual.columns == text.columns, "oracle: features differ in width");
  std::vector<double> scores;
  for (Index i = 0; i < visual.rows; ++i) {
    double sum = 0;
    for (Index j = 0; j < text.rows; ++j)
      for (Index c = 0; c < visual.columns; ++c) sum += visual.at(i, c) * text.at(j, c);
    scores.push_back(sum);
  }
  return scores;
}

}  // namespace kvpare::oracle

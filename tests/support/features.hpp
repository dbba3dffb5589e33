// Features of visual tokens as an engine holds them, and the textbook's importance of these.
#pragma once

#include <kvpare/policy/score/transport.hpp>

#include "inputs.hpp"
#include "oracle/cross_modal.hpp"
#include "oracle/transport.hpp"

namespace kvpare::test {

struct FeatureSet {
  oracle::Array3 sources, targets;  // [tokens, 1, width]
  oracle::Array3 texts;             // [text tokens, 1, width]
  std::vector<Position> positions;
  std::vector<std::int32_t> x, y, image;

  Index tokens() const { return static_cast<Index>(positions.size()); }

  std::vector<double> importance(const Transport& s) const {
    std::vector<oracle::GridPlace> places;
    for (std::size_t t = 0; t < positions.size(); ++t) places.push_back({image[t], x[t], y[t]});
    const oracle::Array2 cost =
        oracle::transport_cost(rows(sources), rows(targets), places, {s.alpha, s.beta, s.gamma, s.sigma, s.squared});
    return s.plan == TransportPlan::semi_relaxed ? oracle::semi_relaxed_importance(cost, s.epsilon)
                                                 : oracle::balanced_importance(cost, s.epsilon, s.rounds);
  }
  std::vector<double> importance_to_text() const { return oracle::cross_modal_scores(rows(sources), rows(texts)); }

  static oracle::Array2 rows(const oracle::Array3& a) {
    oracle::Array2 out(a.a, a.c);
    out.values = a.values;
    return out;
  }
};

/// Random features of the tokens at these positions: a new image begins after every gap, rows of `columns` tokens.
/// Sources and targets have a part in common per token, and channels that are large throughout, as hidden states do.
inline FeatureSet random_features(Dice& dice, std::vector<Position> positions, Index width, DType type = DType::f32,
                                  Index columns = 5) {
  FeatureSet f;
  f.positions = std::move(positions);
  f.sources = random_array(dice, f.tokens(), 1, width, type);
  f.targets = random_array(dice, f.tokens(), 1, width, type);
  for (Index t = 0; t < f.tokens(); ++t)
    for (Index c = 0; c < width; ++c) {
      const double large = c % 7 == 3 ? 20 : 0;
      const double source = f.sources.at(t, 0, c);
      f.sources.at(t, 0, c) = rounded(source + large, type);
      f.targets.at(t, 0, c) = rounded(0.5 * f.targets.at(t, 0, c) + 0.7 * source + large, type);
    }
  std::int32_t image = -1, on_image = 0;
  for (std::size_t t = 0; t < f.positions.size(); ++t) {
    if (t == 0 || f.positions[t] > f.positions[t - 1] + 1) ++image, on_image = 0;
    f.x.push_back(on_image % static_cast<std::int32_t>(columns));
    f.y.push_back(on_image / static_cast<std::int32_t>(columns));
    f.image.push_back(image);
    ++on_image;
  }
  Dice of_text{static_cast<std::uint64_t>(1000 + width)};  // of their own, so that they change nothing else
  f.texts = random_array(of_text, 7, 1, width, type);
  return f;
}

/// Positions of a prompt's visual tokens.
inline std::vector<Position> visual_positions(const std::vector<TokenClass>& classes) {
  std::vector<Position> out;
  for (std::size_t t = 0; t < classes.size(); ++t)
    if (visual.has(classes[t])) out.push_back(static_cast<Position>(t));
  return out;
}

/// A set in backend memory.
template <Backend B>
class HeldFeatures {
 public:
  HeldFeatures(B& be, const FeatureSet& set, DType sources = DType::f32, DType targets = DType::f32)
      : set_(set), sources_(be, set.sources, sources), targets_(be, set.targets, targets),
        texts_(be, set.texts, sources) {}

  Features get() const {
    Features f;
    f.sources = sources_.tensor(), f.targets = targets_.tensor(), f.texts = texts_.tensor();
    f.positions = set_.positions, f.x = set_.x, f.y = set_.y, f.image = set_.image;
    return f;
  }

 private:
  const FeatureSet& set_;
  TensorBuffer<B> sources_, targets_, texts_;
};

}  // namespace kvpare::test

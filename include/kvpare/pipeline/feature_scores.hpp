// Scores of visual tokens by their features, on their way to the layers that share them.
#pragma once

#include <vector>

#include "compressor.hpp"
#include "observed_layer.hpp"

namespace kvpare::detail {

/// For verbs that show a policy queries.
template <class C>
void require_reads_no_features(const C& compressor) {
  require(!compressor.scorer.reads().features, "observe: scorer ", policy_name(compressor.scorer),
          " reads features of visual tokens, not queries; call observe_features, once per prompt");
}

/// Importance of tokens at their columns, all heads alike.
struct SpreadScores {
  const float* importance;
  const std::int32_t* token_of;  // [columns] -1 = none
  Index columns;
  float* out;  // [heads, columns]
  KVPARE_HD void operator()(Index i) const {
    const std::int32_t token = token_of[i % columns];
    out[i] = token < 0 ? 0.0f : importance[token];
  }
};

/// Throws unless features agree with one another and are what a scorer reads.
inline void check_features(const Features& f, const Reads& reads) {
  constexpr const char* verb = "observe_features";
  const Index tokens = f.tokens();
  const auto has_count = [&](std::size_t count, const char* what) {
    require(static_cast<Index>(count) == tokens, verb, ": ", count, ' ', what, ", must be ", tokens,
            ", one per position");
  };
  has_count(f.x.size(), "x coordinates");
  has_count(f.y.size(), "y coordinates");
  has_count(f.image.size(), "image numbers");
  const auto has_shape = [&](const ConstTensor& t, const char* what) {
    require(t.rows == tokens && (tokens == 0 || (t.heads == 1 && t.width == f.sources.width)), verb, ": ", what,
            " are [", t.rows, ", ", t.heads, ", ", t.width, "], must be [", tokens, ", 1, ", f.sources.width, "]");
    require(t.data != nullptr || tokens == 0, verb, ": ", what, ": no memory");
  };
  has_shape(f.sources, "sources");
  if (!reads.texts) has_shape(f.targets, "targets");
  if (reads.texts && tokens > 0)
    require(f.texts.rows > 0 && f.texts.heads == 1 && f.texts.width == f.sources.width && f.texts.data != nullptr, verb,
            ": texts are [", f.texts.rows, ", ", f.texts.heads, ", ", f.texts.width, "], must be [text tokens, 1, ",
            f.sources.width, "]");
  require(tokens == 0 || f.sources.width > 0, verb, ": features of width ", f.sources.width, ", must be positive");
  for (Index t = 0; t < tokens; ++t) {
    const Position at = f.positions[static_cast<std::size_t>(t)];
    const Position before = t == 0 ? -1 : f.positions[static_cast<std::size_t>(t - 1)];
    require(at > before, verb, ": position ", at, " of token ", t, " follows ", before,
            ", positions must ascend and not be negative");
  }
}

/// What a scorer makes of features: computed once, then laid out for one layer after the other.
template <Backend B>
class FeatureScores {
 public:
  template <class C>
  FeatureScores(B& be, const C& compressor, const Features& features) : positions_(features.positions) {
    require(compressor.scorer.reads().features, "observe_features: scorer ", policy_name(compressor.scorer),
            " reads no features; call observe");
    check_features(features, compressor.scorer.reads());
    importance_ = Buffer<B, float>(be, features.tokens());
    Observation<B> seen;
    seen.among = compressor.selector.classes(), seen.features = &features;
    if (features.tokens() == 0) return;
    score(be, compressor.scorer, seen, Scores{importance_.data(), 1, features.tokens()});
  }

  /// Throws where the layer does not hold all of the tokens, or holds one as text.
  template <class S>
  ObservedLayer<B> of_layer(B& be, const S& scorer, Index layer, Index heads, const Columns& columns) const {
    std::vector<std::int32_t> token_of(static_cast<std::size_t>(columns.count), -1);
    const std::vector<std::uint64_t> live = columns.live_in_any();
    Index c = 0;
    for (std::size_t t = 0; t < positions_.size(); ++t) {
      const auto at = [&] { return static_cast<std::size_t>(c); };
      while (c < columns.count && (!columns.has(live, c) || columns.positions[at()] < positions_[t])) ++c;
      require(c < columns.count && columns.positions[at()] == positions_[t], "observe_features: token ", t,
              " is of position ", positions_[t], ", but layer ", layer,
              " holds no such token (append to all layers first; evicted tokens are not handed over again)");
      require(visual.has(static_cast<TokenClass>(columns.classes[at()])), "observe_features: the token of position ",
              positions_[t], " is not visual; tag images and videos, and hand over features of their tokens only");
      token_of[at()] = static_cast<std::int32_t>(t);
    }
    const Buffer<B, std::int32_t> map(be, token_of);
    Buffer<B, float> scores(be, heads * columns.count);
    be.each(heads * columns.count, SpreadScores{importance_.data(), map.data(), columns.count, scores.data()});
    ObservedLayer<B> observed;
    observed.adopt(scorer, std::move(scores), columns.count);
    return observed;
  }

 private:
  std::span<const Position> positions_;
  Buffer<B, float> importance_;
};

}  // namespace kvpare::detail

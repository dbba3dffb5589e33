// Dialogue's members, for the files that compile them for a backend.
#pragma once

#include <algorithm>
#include <chrono>
#include <utility>

#include "dialogue.hpp"

namespace vlm {
namespace detail {

class Stopwatch {
 public:
  double us() const { return std::chrono::duration<double, std::micro>(Clock::now() - start_).count(); }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point start_ = Clock::now();
};

/// Shows a policy that reads features those of the picture.
template <kvpare::Backend B, class F>
void observe_picture(Cache<B, F>& cache, kvpare::SequenceId sequence, const kvpare::AnyCompressor& compressor,
                     const HiddenStates& states) {
  std::vector<Position> positions;
  std::vector<std::int32_t> x, y;
  const std::vector<std::int32_t> image(visual_tokens, 0);
  for (Index p = 0; p < visual_tokens; ++p) {
    positions.push_back(image_begin + static_cast<Position>(p));
    x.push_back(static_cast<std::int32_t>(p % patches_per_side));
    y.push_back(static_cast<std::int32_t>(p / patches_per_side));
  }
  const auto of_picture = [&](const Matrix& rows) {
    return kvpare::Buffer<B, const float>(
        cache.backend(), {rows.row(image_begin).data(), static_cast<std::size_t>(visual_tokens * model_width)});
  };
  const auto sources = of_picture(states.entering), targets = of_picture(states.mlp_input);
  std::vector<float> text;
  for (Index r = 0; r < states.entering.rows(); ++r)
    if (r < image_begin || r >= image_end)
      text.insert(text.end(), states.entering.row(r).data(), states.entering.row(r).data() + model_width);
  const kvpare::Buffer<B, const float> texts(cache.backend(), text);
  cache.observe_features(sequence, compressor,
                         {.sources = {sources.data(), visual_tokens, 1, model_width},
                          .targets = {targets.data(), visual_tokens, 1, model_width},
                          .positions = positions,
                          .x = x,
                          .y = y,
                          .image = image,
                          .texts = {texts.data(), std::ssize(text) / model_width, 1, model_width}});
}

}  // namespace detail

template <kvpare::Backend B, class F>
Dialogue<B, F>::Dialogue(const Decoder& decoder, Cache<B, F>& cache, std::span<const std::uint8_t> rgb,
                      std::span<const int> prompt, const kvpare::AnyCompressor& compressor)
    : Dialogue(decoder, cache, cache.create()) {
  Matrix x = decoder.embed_prompt(rgb, prompt);

  cache.tag(sequence_, {.begin = image_begin,
                        .end = image_end,
                        .token_class = kvpare::TokenClass::image,
                        .image = 0,
                        .grid_rows = patches_per_side,
                        .grid_cols = patches_per_side});
  length_ = static_cast<Position>(x.rows());

  const bool by_features = compressor.scorer.reads().features;
  HiddenStates states{.layer = layer_of_features(compressor)};
  const Decoder::Watch show_queries = [&](Index layer, const NewRows& rows) {
    const detail::Stopwatch observe;
    cache.observe(sequence_, layer, compressor, rows.backend_queries, rows.positions);
    cost_.compress_us += observe.us();
  };
  const detail::Stopwatch prefill;
  logits_ = decoder.forward(cache, sequence_, std::move(x), 0, by_features ? Decoder::Watch() : show_queries,
                            by_features ? &states : nullptr);
  cost_.prefill_us = prefill.us() - cost_.compress_us;

  cost_.bytes_before = cache.stats(sequence_).page_bytes;
  const detail::Stopwatch compress;
  if (by_features) detail::observe_picture(cache, sequence_, compressor, states);
  cache.compress(sequence_, compressor);
  cost_.compress_us += compress.us();
  cost_.bytes_after = cache.stats(sequence_).page_bytes;
}

template <kvpare::Backend B, class F>
Dialogue<B, F>::Dialogue(Dialogue&& other) noexcept
    : decoder_(other.decoder_), cache_(std::exchange(other.cache_, nullptr)), sequence_(other.sequence_),
      length_(other.length_), logits_(std::move(other.logits_)), cost_(other.cost_) {}

template <kvpare::Backend B, class F>
Dialogue<B, F>::~Dialogue() {
  if (cache_ != nullptr) cache_->release(sequence_);
}

template <kvpare::Backend B, class F>
Dialogue<B, F> Dialogue<B, F>::fork() const {
  Dialogue copy(*decoder_, *cache_, cache_->fork(sequence_));
  copy.length_ = length_;
  copy.logits_ = logits_;
  return copy;
}

template <kvpare::Backend B, class F>
void Dialogue<B, F>::read(std::span<const int> prompt) {
  logits_ = decoder_->forward(*cache_, sequence_, decoder_->embed_words(prompt), length_);
  length_ += static_cast<Position>(prompt.size());
}

template <kvpare::Backend B, class F>
std::vector<int> Dialogue<B, F>::answer(int longest) {
  std::vector<int> tokens;
  const example::Footprint held = example::footprint(*cache_, sequence_);
  ++cost_.answers;
  cost_.answer_bytes += held.bytes, cost_.answer_tokens += held.live_tokens;
  cost_.support = std::min(cost_.support, held.support);
  const detail::Stopwatch decode;
  while (std::ssize(tokens) < longest && (tokens.empty() || tokens.back() != end_of_answer)) {
    Index best = 0;
    logits_.maxCoeff(&best);
    tokens.push_back(static_cast<int>(best));
    read(std::span(&tokens.back(), 1));
  }
  cost_.decode_us += decode.us();
  cost_.decode_steps += std::ssize(tokens);
  return tokens;
}

template <kvpare::Backend B, class F>
std::vector<Index> Dialogue<B, F>::kept_patches(Index layer, Index kv_head) const {
  std::vector<Index> patches;
  for (const Position position : cache_->kept(sequence_, layer, kv_head))
    if (position >= image_begin && position < image_end) patches.push_back(position - image_begin);
  return patches;
}

}  // namespace vlm

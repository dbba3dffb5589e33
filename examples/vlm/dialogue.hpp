// A conversation about one picture: prefill, compress once, then answers and follow-up questions from what is left.
#pragma once

#include <vector>

#include "decoder.hpp"

namespace vlm {

/// What a dialogue cost. Prefill does not include what the compressor did on the way, but what it queued on a GPU.
struct Cost {
  double prefill_us = 0;
  double compress_us = 0;  // watching the prefill, scoring, evicting, moving
  double decode_us = 0;
  Index decode_steps = 0;
  Index bytes_before = 0, bytes_after = 0;  // of the pages in use, right before and after the compression
  Index answers = 0;                        // given so far; the next two are sums over them
  Index answer_bytes = 0;                   // of the pages in use as an answer begins, and of codec states
  Index answer_tokens = 0;                  // that they hold, over layers and kv heads
  kvpare::Support support = kvpare::Support::fused;  // the least of the formats in use as an answer begins
  void operator+=(const Cost& more);
};

/// The layer whose hidden states a policy that reads features is shown: the last of those it leaves whole, which is TopV's
/// layer 2; the first where it leaves none whole.
Index layer_of_features(const kvpare::AnyCompressor& compressor);

/// Defined in dialogue.inl.
template <kvpare::Backend B, class F = Formats>
class Dialogue {
 public:
  /// Reads the picture and the first prompt, and compresses. The decoder and the cache must outlive the dialogue.
  /// Throws std::runtime_error when the cache has no pages left.
  Dialogue(const Decoder& decoder, Cache<B, F>& cache, std::span<const std::uint8_t> rgb, std::span<const int> prompt,
           const kvpare::AnyCompressor& compressor);
  Dialogue(Dialogue&& other) noexcept;
  Dialogue& operator=(Dialogue&&) = delete;
  ~Dialogue();

  /// A second dialogue with the same past; the pages are shared.
  Dialogue fork() const;

  /// Reads a further prompt.
  void read(std::span<const int> prompt);

  /// The greedy answer, <eos> included, at most `longest` tokens. It becomes part of the dialogue.
  std::vector<int> answer(int longest);

  /// For the next token.
  const Row& logits() const { return logits_; }

  const Cost& cost() const { return cost_; }

  /// Visual tokens that one kv head of one layer still has, as patch indices, ascending.
  std::vector<Index> kept_patches(Index layer, Index kv_head) const;

 private:
  Dialogue(const Decoder& decoder, Cache<B, F>& cache, kvpare::SequenceId sequence)
      : decoder_(&decoder), cache_(&cache), sequence_(sequence) {}

  const Decoder* decoder_;
  Cache<B, F>* cache_;  // null once moved from
  kvpare::SequenceId sequence_;
  Position length_ = 0;
  Row logits_;
  Cost cost_;
};

}  // namespace vlm

// One text in the cache: tokens are read, the policy evicts, the next token is predicted from what is left.
#pragma once

#include <optional>
#include <string>

#include "decoder.hpp"
#include "support/formats.hpp"
#include "support/states.hpp"

namespace story {

using Formats = example::ModelFormats<float, 8>;  // the smallest heads of these models have 8 channels
using Cache = kvpare::KvCache<kvpare::cpu::Backend, Formats>;

/// When a method evicts tokens, or changes their form, while a text is read or written.
enum class Acts {
  never,       // it keeps everything as it is
  by_age,      // it keeps everything; tokens go through one at a time, older ones change their form, after the first block
  each_token,  // methods that decide at decode: tokens go through one at a time, each layer evicts (or demotes) after each
  each_block,  // methods that decide at the end of a prefill: every `block` tokens, from those tokens' queries
};

/// "never", "by age", "each token", "each block".
const char* name_of(Acts acts);

/// A policy as this program runs it.
struct Method {
  kvpare::AnyCompressor compressor = kvpare::make_compressor("full");
  Acts acts = Acts::never;
  Index block = 16;  // tokens; for each_block
};

/// How methods that can decide at decode do: after each token, or in blocks like the others, for comparison.
enum class AtDecode { each_token, each_block };

/// The way of acting that goes with the compressor.
Method make_method(kvpare::AnyCompressor compressor, Index block, AtDecode at_decode = AtDecode::each_token);

struct ContextOptions {
  Index most_tokens = 0;  // the text's, at most: that many find room
  Index page_tokens = 16;
  std::span<const example::States> states = {};  // what codecs have learnt of the model
};

/// What reading and writing a text has cost so far.
struct Usage {
  Index tokens = 0;   // read
  Index evicted = 0;  // over all layers and kv heads
  double seen = 0;    // tokens that a query saw in a kv head, itself included: mean over heads, summed over tokens
  Index peak_page_bytes = 0;  // of whole pages in use
  double bytes = 0;  // of whole pages in use and of codec states as a token was attended, summed over tokens
  double held = 0;   // tokens in these pages, over layers and kv heads, likewise
  kvpare::Support support = kvpare::Support::fused;  // the least of the formats that were attended to
};

class Context {
 public:
  /// The decoder and the backend must outlive the context.
  Context(const Decoder& decoder, kvpare::cpu::Backend& backend, Method method, ContextOptions options);

  struct Image;

  /// Goes on with a text that was put aside. The method must be the same. Throws what kvpare::load throws, and
  /// std::runtime_error when the text does not fit.
  Context(const Decoder& decoder, kvpare::cpu::Backend& backend, Method method, ContextOptions options,
          const Image& image);

  /// The text put aside: what the cache holds after the first `tokens` of them, as bytes. That is all that have been read,
  /// or those before the block that has begun, where a policy waits for the rest of the block with queries that no
  /// image holds; they have to be read again.
  struct Image {
    Position tokens = 0;
    std::string bytes = {};
  };
  Image image();

  /// The tokens become the next of the text: hidden rows [tokens, width], for Decoder::logits. `watch`, where there is
  /// one, sees the rows of every layer before they are attended to.
  /// Throws std::runtime_error where that is more than `most_tokens`.
  Matrix read(std::span<const int> tokens, const Attention& watch = {});

  Position length() const { return length_; }
  const Method& method() const { return method_; }
  Usage usage() const;
  kvpare::SequenceStats stats() const { return cache_.stats(sequence_); }

  /// Positions that one kv head of one layer still has.
  std::vector<Position> kept(Index layer, Index kv_head) const { return cache_.kept(sequence_, layer, kv_head); }

 private:
  Matrix read_part(std::span<const int> tokens, bool block_ends, const Attention& watch);
  void attend(const LayerRows& rows, bool block_ends);
  void take_aging();

  const Decoder& decoder_;
  Method method_;
  Index most_tokens_;
  Cache cache_;
  kvpare::SequenceId sequence_ = {};
  Position length_ = 0;
  Usage usage_;
};

}  // namespace story

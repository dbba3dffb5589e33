// A trace: what the attention layers of a model were given for one prompt. Recorded once, policies can be tried on it
// without the model.
//
// A safetensors file with these arrays; all are of the same tokens, in the order of the prompt:
//
//   layers.{l}.q   [tokens, q_heads, key_dim]      queries, after RoPE, not scaled     F32, F16 or BF16
//   layers.{l}.k   [tokens, kv_heads, key_dim]     keys, after RoPE                    likewise, each for itself
//   layers.{l}.v   [tokens, kv_heads, value_dim]   values                              likewise
//   positions      [tokens]                        ascending, from 0 on, gaps allowed  I32
//   token_class    [tokens]                        optional: 0 text, 1 image, 2 video, 3 audio, 4 system, 5 to 31 the
//                                                  recorder's own; without it all are text     U8
//
// Layers are numbered from 0 without a gap; they may differ in heads and widths. Query head h reads kv head
// h / (q_heads / kv_heads). Among the file's texts
//
//   softmax_scale  is what logits are multiplied with; without it 1 / sqrt(key_dim) of the layer
//   rope_theta, rope_pairing   say how keys and queries came to be rotated: the base, and halves or interleaved; for methods
//                  that turn them back. rope_dim is how many channels turn, without it all. A model with rope_sections or a
//                  rope_type other than default turned them in a way that these do not say, and one that names no pairing
//                  may have
//   others         (the model's name, ...) are kept and passed on
//
// `positions` order the tokens and say who sees whom (a query sees keys up to its own position); where a model rotates by
// several positions per token (M-RoPE), number the tokens of the prompt instead.
#pragma once

#include <cstddef>
#include <cstdint>
#include <kvpare/core/shape.hpp>
#include <kvpare/core/view.hpp>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "safetensors.hpp"

namespace example {

using kvpare::Index;
using kvpare::Position;

/// [rows, heads, width] of one element type, contiguous.
struct TraceArray {
  kvpare::DType dtype = kvpare::DType::f32;
  Index rows = 0, heads = 0, width = 0;
  std::vector<std::byte> values;

  kvpare::ConstTensor tensor() const;

  /// Further rows of the same heads, width and type; the first ones decide what those are. Throws InvalidArgument.
  void append(const kvpare::ConstTensor& rows);

  friend bool operator==(const TraceArray&, const TraceArray&) = default;
};

struct TraceLayer {
  TraceArray queries, keys, values;
  friend bool operator==(const TraceLayer&, const TraceLayer&) = default;
};

struct Trace {
  std::vector<TraceLayer> layers;
  std::vector<Position> positions;
  std::vector<std::uint8_t> token_class;        // one per token, or empty: all are text
  std::optional<float> softmax_scale;           // none: 1 / sqrt(key_dim)
  std::map<std::string, std::string> metadata;  // other texts, passed on as they are

  Index tokens() const { return static_cast<Index>(positions.size()); }

  /// The same for all queries, keys and values, or none when they differ.
  std::optional<kvpare::DType> common_dtype() const;

  /// What a cache needs to know; with a rope where the texts say it.
  kvpare::Model model() const;

  /// For recording: the next rows of a layer, layer after layer, chunk after chunk. Call once per layer and chunk; the
  /// positions are added separately. Throws InvalidArgument.
  void append(Index layer, const kvpare::ConstTensor& queries, const kvpare::ConstTensor& keys,
              const kvpare::ConstTensor& values);

  friend bool operator==(const Trace&, const Trace&) = default;
};

/// Throws BadFile on what is no trace; the message says what was found and what was wanted.
Trace read_trace(const std::string& path);
Trace parse_trace(const Safetensors& file);

/// The bytes of the file; `name` stands for it in messages. Throws BadFile on a trace that `read_trace` would refuse.
std::string print_trace(const Trace& trace, const std::string& name);
void write_trace(const std::string& path, const Trace& trace);

}  // namespace example

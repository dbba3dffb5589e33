// The model: the pass through its layers. Attention, and what it remembers, is somebody else's: see context.hpp.
#pragma once

#include <functional>
#include <kvpare/kvpare.hpp>
#include <span>

#include "model_file.hpp"

namespace story {

/// One layer's attention for new tokens, one row each. Queries and keys have been through RoPE and are not scaled.
struct LayerRows {
  Index layer;
  kvpare::ConstTensor queries;       // [rows, q_heads, head_dim]
  kvpare::ConstTensor keys, values;  // [rows, kv_heads, head_dim]: to be remembered
  std::span<const Position> positions;
  kvpare::Tensor out;  // [rows, q_heads, head_dim]: to be filled in
};

using Attention = std::function<void(const LayerRows&)>;

class Decoder {
 public:
  explicit Decoder(Weights weights) : weights_(std::move(weights)) {}

  const Shape& shape() const { return weights_.shape; }

  /// What the cache needs to know of the model.
  kvpare::Model attention_shapes() const;

  /// Tokens at consecutive positions from `first` go through all layers: [tokens, width] after the final norm.
  /// Throws InvalidArgument on tokens outside of the vocabulary.
  Matrix forward(std::span<const int> tokens, Position first, const Attention& attention) const;

  /// [rows, vocabulary], of rows that `forward` gave.
  Matrix logits(const Matrix& hidden) const;

 private:
  Weights weights_;
};

}  // namespace story

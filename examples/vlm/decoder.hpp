// The model: its weights, and the pass through its layers. Keys and values live in kvpare's cache and nowhere else.
//
// Dense layers are computed on the host, attention where the cache is: `forward` is a template on its backend.
// data/README.md describes the architecture; names of weights are those of the file.
#pragma once

#include <Eigen/Core>
#include <cstdint>
#include <functional>
#include <kvpare/any_backend.hpp>
#include <span>
#include <vector>

#include "model_shape.hpp"
#include "support/format_list.hpp"
#include "support/safetensors.hpp"

namespace vlm {

using example::Safetensors;

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Row = Eigen::RowVectorXf;

using Formats = example::ModelFormats<float, 32>;
template <kvpare::Backend B, class F = Formats>
using Cache = kvpare::KvCache<B, F>;

/// What the cache needs to know of the model.
kvpare::Model attention_shapes();

/// What the attention of one layer is given.
struct NewRows {
  kvpare::ConstTensor queries, keys, values;  // [host] queries and keys after RoPE
  kvpare::ConstTensor backend_queries;        // [backend] the same queries
  std::span<const Position> positions;
};

/// What a pass computes on its way through one layer, for policies that read features: [tokens, model_width].
struct HiddenStates {
  Index layer = 0;        // which one
  Matrix entering = {};   // the residual stream before the layer
  Matrix mlp_input = {};  // after its attention and the norm that precedes its MLP
};

class Decoder {
 public:
  /// Called once per layer with all new rows, when their keys and values are in the cache.
  using Watch = std::function<void(Index layer, const NewRows& rows)>;

  /// Throws BadFile.
  explicit Decoder(const Safetensors& file);

  /// <bos> and the image (96 x 96 RGB): [145, model_width]. These two throw InvalidArgument on what is no image or no word.
  Matrix embed_image(std::span<const std::uint8_t> rgb) const;
  Matrix embed_words(std::span<const int> tokens) const;

  /// The image, then the words.
  Matrix embed_prompt(std::span<const std::uint8_t> rgb, std::span<const int> tokens) const;

  /// Appends the embedded tokens to a sequence, at consecutive positions from `first`, and gives the logits after the
  /// last. `states`, where given, gets those of the layer it names.
  template <kvpare::Backend B, class F>  // in decoder.inl
  Row forward(Cache<B, F>& cache, kvpare::SequenceId sequence, Matrix x, Position first, const Watch& watch = {},
              HiddenStates* states = nullptr) const;

 private:
  /// Everything of a pass but attention; matrices are [tokens, heads * head_dim], those of the present layer.
  class Pass {
   public:
    Pass(const Decoder& decoder, Matrix x, Position first);

    /// Makes queries, keys and values of a layer, rotated.
    void begin(Index layer);
    /// The rest of the layer, from what attention gave.
    void finish(Index layer);
    /// After the last token.
    Row logits() const;
    /// What enters the next layer to begin.
    const Matrix& residual() const { return x_; }

    Matrix queries, keys, values, attended, mlp_input;
    std::vector<Position> positions;

   private:
    const Decoder& decoder_;
    Matrix x_;
    Matrix cos_, sin_;  // of RoPE's angles, the same in all layers
  };

  struct Layer {
    Row attention_norm, mlp_norm;
    Matrix query, key, value, output;  // [out, in]: y = x * W^T
    Matrix gate, up, down;
  };

  Matrix words_, head_;
  Matrix patch_;
  Row patch_bias_;
  Matrix row_place_, column_place_;
  Row final_norm_;
  std::vector<Layer> layers_;
};

}  // namespace vlm

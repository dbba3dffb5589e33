// The weights of a llama2.c model file of the "legacy" kind (version 0), all little-endian:
//
//   7 int32    width, hidden width, layers, q heads, kv heads, vocabulary, longest sequence;
//              a negative vocabulary says that the classifier has weights of its own
//   float32    embedding        [vocabulary, width]
//              attention norm   [layers, width]
//              query            [layers, q heads * head dim, width]      head dim = width / q heads
//              key, value       [layers, kv heads * head dim, width]
//              output           [layers, width, q heads * head dim]
//              mlp norm         [layers, width]
//              gate (w1)        [layers, hidden width, width]
//              down (w2)        [layers, width, hidden width]
//              up (w3)          [layers, hidden width, width]
//              final norm       [width]
//              cosines, sines   [longest sequence, head dim / 2] each; of RoPE, base 10000, and so not needed
//              classifier       [vocabulary, width], where it has weights of its own
#pragma once

#include <Eigen/Core>
#include <kvpare/core/config.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace story {

using kvpare::Index;
using kvpare::Position;

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Row = Eigen::RowVectorXf;

inline constexpr int begin_of_text = 1;  // <s>: before every text
inline constexpr int end_of_text = 2;    // </s>

struct Shape {
  Index width = 0, hidden_width = 0, layers = 0, q_heads = 0, kv_heads = 0, vocabulary = 0, longest = 0;
  Index head_dim() const { return width / q_heads; }
  friend bool operator==(const Shape&, const Shape&) = default;
};

struct Weights {
  struct Layer {
    Row attention_norm, mlp_norm;
    Matrix query, key, value, output;  // [out, in]: y = x * W^T
    Matrix gate, up, down;
  };

  Shape shape;
  Matrix embedding;
  std::vector<Layer> layers;
  Row final_norm;
  Matrix own_classifier;  // empty: the embedding serves

  const Matrix& classifier() const { return own_classifier.size() > 0 ? own_classifier : embedding; }
};

/// `name` stands for the file in messages. The length of the file must be exactly what its header asks for; nothing is
/// allocated before that is known. Throws BadFile.
Weights parse_model(std::string_view bytes, const std::string& name);

}  // namespace story

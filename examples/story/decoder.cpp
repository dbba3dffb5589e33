#include "decoder.hpp"

#include <cmath>
#include <numeric>
#include <vector>

namespace story {
namespace {

Matrix rms_norm(const Matrix& x, const Row& weight) {
  const Eigen::VectorXf scale = (x.array().square().rowwise().mean() + 1e-5f).rsqrt();
  return (x.array().colwise() * scale.array()).rowwise() * weight.array();
}

/// Rotary embedding on the pairs (2i, 2i + 1); the angles of a pass are the same in all its layers.
class Rope {
 public:
  Rope(std::span<const Position> positions, Index head_dim)
      : cos_(static_cast<Index>(positions.size()), head_dim / 2), sin_(cos_.rows(), cos_.cols()) {
    for (Index i = 0; i < cos_.cols(); ++i) {
      const double frequency = std::pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
      for (Index t = 0; t < cos_.rows(); ++t) {
        const double angle = positions[static_cast<std::size_t>(t)] * frequency;
        cos_(t, i) = static_cast<float>(std::cos(angle));
        sin_(t, i) = static_cast<float>(std::sin(angle));
      }
    }
  }

  /// x [rows, heads * head_dim], in place.
  void rotate(Matrix& x) const {
    const Index pairs = cos_.cols();
    for (Index t = 0; t < x.rows(); ++t) {
      float* pair = x.row(t).data();
      for (Index p = 0; p < x.cols() / 2; ++p, pair += 2) {
        const float c = cos_(t, p % pairs), s = sin_(t, p % pairs), a = pair[0], b = pair[1];
        pair[0] = a * c - b * s;
        pair[1] = a * s + b * c;
      }
    }
  }

 private:
  Matrix cos_, sin_;
};

}  // namespace

kvpare::Model Decoder::attention_shapes() const {
  const Shape& s = shape();
  const kvpare::LayerShape layer{.q_heads = s.q_heads,
                                 .kv_heads = s.kv_heads,
                                 .key_dim = s.head_dim(),
                                 .value_dim = s.head_dim(),
                                 .scale = 1 / std::sqrt(static_cast<float>(s.head_dim())),
                                 .rope = kvpare::rope_of_base(s.head_dim(), 10000, kvpare::RopePairing::interleaved)};
  return {.layers = std::vector<kvpare::LayerShape>(static_cast<std::size_t>(s.layers), layer)};
}

Matrix Decoder::forward(std::span<const int> tokens, Position first, const Attention& attention) const {
  const Shape& s = shape();
  const Index rows = std::ssize(tokens);
  Matrix x(rows, s.width);
  for (Index t = 0; t < rows; ++t) {
    const int token = tokens[static_cast<std::size_t>(t)];
    kvpare::require(token >= 0 && token < s.vocabulary, "token ", token, ", must be within [0, ", s.vocabulary, ")");
    x.row(t) = weights_.embedding.row(token);
  }
  std::vector<Position> positions(tokens.size());
  std::iota(positions.begin(), positions.end(), first);
  const Rope rope(positions, s.head_dim());

  Matrix out(rows, s.width);
  for (Index l = 0; l < s.layers; ++l) {
    const Weights::Layer& layer = weights_.layers[static_cast<std::size_t>(l)];
    const Matrix h = rms_norm(x, layer.attention_norm);
    Matrix queries = h * layer.query.transpose(), keys = h * layer.key.transpose();
    const Matrix values = h * layer.value.transpose();
    rope.rotate(queries);
    rope.rotate(keys);
    attention({.layer = l,
               .queries = {queries.data(), rows, s.q_heads, s.head_dim()},
               .keys = {keys.data(), rows, s.kv_heads, s.head_dim()},
               .values = {values.data(), rows, s.kv_heads, s.head_dim()},
               .positions = positions,
               .out = {out.data(), rows, s.q_heads, s.head_dim()}});
    x += out * layer.output.transpose();

    const Matrix m = rms_norm(x, layer.mlp_norm);
    const Matrix gate = m * layer.gate.transpose(), up = m * layer.up.transpose();
    const Matrix silu = gate.array() / (1 + (-gate.array()).exp());
    x += (silu.array() * up.array()).matrix() * layer.down.transpose();
  }
  return rms_norm(x, weights_.final_norm);
}

Matrix Decoder::logits(const Matrix& hidden) const { return hidden * weights_.classifier().transpose(); }

}  // namespace story

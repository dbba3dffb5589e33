#include "decoder.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

template class kvpare::KvCache<kvpare::cpu::Backend, vlm::Formats>;

namespace vlm {
namespace {

constexpr Index patch_values = patch_side * patch_side * 3;
constexpr Index rows_per_attend = 64;  // the most that one call takes

Matrix matrix(const Safetensors& file, const std::string& name, Index rows, Index columns) {
  const auto values = file.floats(name, {static_cast<std::uint64_t>(rows), static_cast<std::uint64_t>(columns)});
  return Eigen::Map<const Matrix>(values.data(), rows, columns);
}

Row vector(const Safetensors& file, const std::string& name, Index size) {
  const auto values = file.floats(name, {static_cast<std::uint64_t>(size)});
  return Eigen::Map<const Row>(values.data(), size);
}

Matrix rms_norm(const Matrix& x, const Row& weight) {
  const Eigen::VectorXf scale = (x.array().square().rowwise().mean() + 1e-5f).rsqrt();
  return (x.array().colwise() * scale.array()).rowwise() * weight.array();
}

/// Rotary embedding on the pairs (i, i + head_dim / 2); the angles of a pass are the same in all its layers.
class Rope {
 public:
  explicit Rope(std::span<const Position> positions)
      : cos_(static_cast<Index>(positions.size()), half), sin_(cos_.rows(), half) {
    for (Index t = 0; t < cos_.rows(); ++t) {
      for (Index i = 0; i < half; ++i) {
        const double angle = positions[static_cast<std::size_t>(t)] * std::pow(10000.0, -2.0 * i / head_dim);
        cos_(t, i) = static_cast<float>(std::cos(angle));
        sin_(t, i) = static_cast<float>(std::sin(angle));
      }
    }
  }

  /// x [rows, heads * head_dim], in place.
  void rotate(Matrix& x) const {
    for (Index begin = 0; begin < x.cols(); begin += head_dim) {
      auto a = x.middleCols(begin, half).array();
      auto b = x.middleCols(begin + half, half).array();
      const Matrix turned = a * cos_.array() - b * sin_.array();
      b = b * cos_.array() + a * sin_.array();
      a = turned.array();
    }
  }

 private:
  static constexpr Index half = head_dim / 2;
  Matrix cos_, sin_;
};

kvpare::Tensor heads_of(Matrix& x, Index heads) { return {x.data(), x.rows(), heads, head_dim}; }

/// Attention of all rows over what the cache still holds of their sequence.
Matrix attend(Cache& cache, Index layer, kvpare::SequenceId sequence, Matrix& queries,
              std::span<const Position> positions) {
  Matrix out(queries.rows(), queries.cols());
  for (Index begin = 0; begin < queries.rows(); begin += rows_per_attend) {
    const Index rows = std::min(rows_per_attend, queries.rows() - begin);
    const kvpare::AttendRequest request{
        .sequence = sequence,
        .queries = heads_of(queries, q_heads).part(begin, rows),
        .positions = positions.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(rows)),
        .out = heads_of(out, q_heads).part(begin, rows),
    };
    cache.attend(layer, std::span(&request, 1));
  }
  return out;
}

}  // namespace

kvpare::Model attention_shapes() {
  const kvpare::LayerShape shape{.q_heads = q_heads,
                                 .kv_heads = kv_heads,
                                 .key_dim = head_dim,
                                 .value_dim = head_dim,
                                 .scale = 1 / std::sqrt(static_cast<float>(head_dim))};
  return {.layers = std::vector<kvpare::LayerShape>(layer_count, shape)};
}

Decoder::Decoder(const Safetensors& file)
    : words_(matrix(file, "emb", vocabulary_size, model_width)),
      head_(matrix(file, "head", vocabulary_size, model_width)), patch_(matrix(file, "wp", model_width, patch_values)),
      patch_bias_(vector(file, "bp", model_width)), row_place_(matrix(file, "pr", patches_per_side, model_width)),
      column_place_(matrix(file, "pc", patches_per_side, model_width)), final_norm_(vector(file, "nf", model_width)) {
  for (Index l = 0; l < layer_count; ++l) {
    const std::string prefix = "layers." + std::to_string(l) + ".";
    layers_.push_back({.attention_norm = vector(file, prefix + "n1", model_width),
                       .mlp_norm = vector(file, prefix + "n2", model_width),
                       .query = matrix(file, prefix + "wq", q_heads * head_dim, model_width),
                       .key = matrix(file, prefix + "wk", kv_heads * head_dim, model_width),
                       .value = matrix(file, prefix + "wv", kv_heads * head_dim, model_width),
                       .output = matrix(file, prefix + "wo", model_width, q_heads * head_dim),
                       .gate = matrix(file, prefix + "w1", hidden_width, model_width),
                       .up = matrix(file, prefix + "w3", hidden_width, model_width),
                       .down = matrix(file, prefix + "w2", model_width, hidden_width)});
  }
}

Matrix Decoder::embed_image(std::span<const std::uint8_t> rgb) const {
  kvpare::require(std::ssize(rgb) == image_bytes, "image: ", rgb.size(), " bytes, must be ", image_bytes);
  // Patches in raster order; inside one: y, x, channel.
  Matrix patches(visual_tokens, patch_values);
  for (Index p = 0; p < visual_tokens; ++p) {
    const Index top = p / patches_per_side * patch_side, left = p % patches_per_side * patch_side;
    for (Index i = 0; i < patch_values; ++i) {
      const Index y = top + i / (patch_side * 3), x_and_channel = left * 3 + i % (patch_side * 3);
      const auto byte = rgb[static_cast<std::size_t>(y * image_side * 3 + x_and_channel)];
      patches(p, i) = (static_cast<float>(byte) / 255 - 0.4f) * 3;
    }
  }

  Matrix x(1 + visual_tokens, model_width);
  x.row(0) = words_.row(begin_of_text);
  auto visual = x.bottomRows(visual_tokens);
  visual.noalias() = patches * patch_.transpose();
  for (Index p = 0; p < visual_tokens; ++p)
    visual.row(p) += patch_bias_ + row_place_.row(p / patches_per_side) + column_place_.row(p % patches_per_side);
  return x;
}

Matrix Decoder::embed_words(std::span<const int> tokens) const {
  Matrix x(static_cast<Index>(tokens.size()), model_width);
  for (Index t = 0; t < x.rows(); ++t) {
    const int token = tokens[static_cast<std::size_t>(t)];
    kvpare::require(token >= 0 && token < vocabulary_size, "token ", token, ", must be within [0, ", vocabulary_size,
                    ")");
    x.row(t) = words_.row(token);
  }
  return x;
}

Matrix Decoder::embed_prompt(std::span<const std::uint8_t> rgb, std::span<const int> tokens) const {
  const Matrix image = embed_image(rgb), words = embed_words(tokens);
  Matrix x(image.rows() + words.rows(), model_width);
  x << image, words;
  return x;
}

Row Decoder::forward(Cache& cache, kvpare::SequenceId sequence, Matrix x, Position first, const Watch& watch) const {
  std::vector<Position> positions(static_cast<std::size_t>(x.rows()));
  for (std::size_t t = 0; t < positions.size(); ++t) positions[t] = first + static_cast<Position>(t);
  const Rope rope(positions);

  for (Index l = 0; l < layer_count; ++l) {
    const Layer& layer = layers_[static_cast<std::size_t>(l)];
    const Matrix h = rms_norm(x, layer.attention_norm);
    Matrix q = h * layer.query.transpose(), k = h * layer.key.transpose(), v = h * layer.value.transpose();
    rope.rotate(q);
    rope.rotate(k);
    if (cache.append(sequence, l, heads_of(k, kv_heads), heads_of(v, kv_heads), positions) != kvpare::Outcome::done)
      throw std::runtime_error("the cache is full: give it more pool_bytes");
    if (watch) watch(l, {heads_of(q, q_heads), heads_of(k, kv_heads), heads_of(v, kv_heads), positions});
    x.noalias() += attend(cache, l, sequence, q, positions) * layer.output.transpose();

    const Matrix m = rms_norm(x, layer.mlp_norm);
    const Matrix gate = m * layer.gate.transpose(), up = m * layer.up.transpose();
    const Matrix mixed = gate.array() / (1 + (-gate.array()).exp()) * up.array();
    x.noalias() += mixed * layer.down.transpose();
  }
  return rms_norm(x.bottomRows(1), final_norm_) * head_.transpose();
}

}  // namespace vlm

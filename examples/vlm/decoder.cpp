#include "decoder.hpp"

#include <cmath>
#include <utility>

#include "cpu.hpp"
#include "decoder.inl"

namespace vlm {
namespace {

constexpr Index patch_values = patch_side * patch_side * 3;

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

/// Rotary embedding on the pairs (i, i + head_dim / 2) of x [rows, heads * head_dim], in place.
void rotate(Matrix& x, const Matrix& cos, const Matrix& sin) {
  const Index half = head_dim / 2;
  for (Index begin = 0; begin < x.cols(); begin += head_dim) {
    auto a = x.middleCols(begin, half).array();
    auto b = x.middleCols(begin + half, half).array();
    const Matrix turned = a * cos.array() - b * sin.array();
    b = b * cos.array() + a * sin.array();
    a = turned.array();
  }
}

}  // namespace

kvpare::Model attention_shapes() {
  const kvpare::LayerShape shape{.q_heads = q_heads,
                                 .kv_heads = kv_heads,
                                 .key_dim = head_dim,
                                 .value_dim = head_dim,
                                 .scale = 1 / std::sqrt(static_cast<float>(head_dim)),
                                 .rope = kvpare::rope_of_base(head_dim)};
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

Decoder::Pass::Pass(const Decoder& decoder, Matrix x, Position first)
    : queries(x.rows(), q_heads * head_dim), keys(x.rows(), kv_heads * head_dim), values(x.rows(), kv_heads * head_dim),
      attended(x.rows(), q_heads * head_dim), positions(static_cast<std::size_t>(x.rows())), decoder_(decoder),
      x_(std::move(x)), cos_(x_.rows(), head_dim / 2), sin_(x_.rows(), head_dim / 2) {
  for (Index t = 0; t < x_.rows(); ++t) {
    const Position position = first + static_cast<Position>(t);
    positions[static_cast<std::size_t>(t)] = position;
    for (Index i = 0; i < head_dim / 2; ++i) {
      const double angle = position * std::pow(10000.0, -2.0 * i / head_dim);
      cos_(t, i) = static_cast<float>(std::cos(angle));
      sin_(t, i) = static_cast<float>(std::sin(angle));
    }
  }
}

void Decoder::Pass::begin(Index l) {
  const Layer& layer = decoder_.layers_[static_cast<std::size_t>(l)];
  const Matrix h = rms_norm(x_, layer.attention_norm);
  queries.noalias() = h * layer.query.transpose();
  keys.noalias() = h * layer.key.transpose();
  values.noalias() = h * layer.value.transpose();
  rotate(queries, cos_, sin_);
  rotate(keys, cos_, sin_);
}

void Decoder::Pass::finish(Index l) {
  const Layer& layer = decoder_.layers_[static_cast<std::size_t>(l)];
  x_.noalias() += attended * layer.output.transpose();
  mlp_input = rms_norm(x_, layer.mlp_norm);
  const Matrix gate = mlp_input * layer.gate.transpose(), up = mlp_input * layer.up.transpose();
  const Matrix mixed = gate.array() / (1 + (-gate.array()).exp()) * up.array();
  x_.noalias() += mixed * layer.down.transpose();
}

Row Decoder::Pass::logits() const {
  return rms_norm(x_.bottomRows(1), decoder_.final_norm_) * decoder_.head_.transpose();
}

template Row Decoder::forward(Cache<kvpare::cpu::Backend>&, kvpare::SequenceId, Matrix, Position, const Watch&,
                              HiddenStates*) const;

}  // namespace vlm

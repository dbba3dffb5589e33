#include "model_file.hpp"

#include <array>
#include <bit>
#include <cstring>
#include <limits>

#include "support/bad_file.hpp"

namespace story {
namespace {

using example::expect;

static_assert(std::endian::native == std::endian::little, "numbers are copied as they stand in the file");

constexpr std::size_t header_bytes = 7 * sizeof(std::int32_t);
constexpr std::int32_t magic_of_later_versions = 0x616b3432;  // "ak42"

/// A count that a header may make as large as it likes: it stops at the largest number instead of wrapping.
class Count {
 public:
  Count(Index n) : n_(static_cast<std::uint64_t>(n)) {}
  friend Count operator+(Count a, Count b) {
    if (__builtin_add_overflow(a.n_, b.n_, &a.n_)) a.n_ = std::numeric_limits<std::uint64_t>::max();
    return a;
  }
  friend Count operator*(Count a, Count b) {
    if (__builtin_mul_overflow(a.n_, b.n_, &a.n_)) a.n_ = std::numeric_limits<std::uint64_t>::max();
    return a;
  }
  std::uint64_t value() const { return n_; }

 private:
  std::uint64_t n_;
};

/// Floats one after the other; the caller knows that there are enough.
class Floats {
 public:
  explicit Floats(std::string_view bytes) : bytes_(bytes) {}

  Matrix matrix(Index rows, Index columns) {
    Matrix out(rows, columns);
    copy(out.data(), out.size());
    return out;
  }
  Row row(Index size) {
    Row out(size);
    copy(out.data(), size);
    return out;
  }
  void skip(Index count) { bytes_.remove_prefix(static_cast<std::size_t>(count) * sizeof(float)); }

 private:
  void copy(float* to, Index count) {
    std::memcpy(to, bytes_.data(), static_cast<std::size_t>(count) * sizeof(float));
    skip(count);
  }
  std::string_view bytes_;
};

}  // namespace

Weights parse_model(std::string_view bytes, const std::string& name) {
  std::array<std::int32_t, 7> header{};
  expect(bytes.size() >= header_bytes, name, bytes.size(), " bytes, too short for the header of a model (",
         header_bytes, " bytes)");
  std::memcpy(header.data(), bytes.data(), header_bytes);
  expect(header[0] != magic_of_later_versions, name, "is of version ", header[1],
         " of the format, only the legacy one (version 0) is read here");
  static constexpr const char* names[] = {"width",    "hidden width", "layers",          "q heads",
                                          "kv heads", "vocabulary",   "longest sequence"};
  for (std::size_t i = 0; i < header.size(); ++i) {
    const bool negative_is_fine = i == 5 && header[i] != std::numeric_limits<std::int32_t>::min();
    expect(header[i] > 0 || (negative_is_fine && header[i] != 0), name, names[i], " = ", header[i],
           negative_is_fine ? ", must not be 0" : ", must be positive");
  }
  const bool shared_classifier = header[5] > 0;
  Weights out;
  const Shape& s = out.shape = {.width = header[0],
                                .hidden_width = header[1],
                                .layers = header[2],
                                .q_heads = header[3],
                                .kv_heads = header[4],
                                .vocabulary = shared_classifier ? Index{header[5]} : -Index{header[5]},
                                .longest = header[6]};
  expect(s.vocabulary > end_of_text, name, "vocabulary = ", s.vocabulary, ", must be at least ", end_of_text + 1);
  expect(s.q_heads % s.kv_heads == 0, name, "q heads = ", s.q_heads, ", must be a multiple of kv heads = ", s.kv_heads);
  expect(s.width % s.q_heads == 0, name, "width = ", s.width, ", must be a multiple of q heads = ", s.q_heads);
  const Index head_dim = s.head_dim(), half = head_dim / 2, kv_width = s.kv_heads * head_dim;
  expect(head_dim % 2 == 0 && head_dim <= 4096, name, "head dim = ", head_dim,
         " (width / q heads), must be even and at most 4096");

  const Count in_layer = Count(2) * s.width + Count(2) * s.width * s.width + Count(2) * kv_width * s.width +
                         Count(3) * s.hidden_width * s.width;
  const Count floats = Count(s.vocabulary) * s.width * (shared_classifier ? 1 : 2) + Count(s.layers) * in_layer +
                       s.width + Count(2) * s.longest * half;
  const std::uint64_t wanted = (floats * sizeof(float) + header_bytes).value();
  expect(bytes.size() == wanted, name, bytes.size(), " bytes; a model of width ", s.width, ", hidden width ",
         s.hidden_width, ", ", s.layers, " layers, ", s.q_heads, " q heads, ", s.kv_heads, " kv heads, vocabulary ",
         header[5], ", longest sequence ", s.longest, " takes ", wanted);

  Floats in(bytes.substr(header_bytes));
  out.embedding = in.matrix(s.vocabulary, s.width);
  out.layers.resize(static_cast<std::size_t>(s.layers));
  const auto each_row = [&](Row Weights::Layer::*row) {
    for (Weights::Layer& layer : out.layers) layer.*row = in.row(s.width);
  };
  const auto each_matrix = [&](Matrix Weights::Layer::*matrix, Index rows, Index columns) {
    for (Weights::Layer& layer : out.layers) layer.*matrix = in.matrix(rows, columns);
  };
  each_row(&Weights::Layer::attention_norm);
  each_matrix(&Weights::Layer::query, s.width, s.width);
  each_matrix(&Weights::Layer::key, kv_width, s.width);
  each_matrix(&Weights::Layer::value, kv_width, s.width);
  each_matrix(&Weights::Layer::output, s.width, s.width);
  each_row(&Weights::Layer::mlp_norm);
  each_matrix(&Weights::Layer::gate, s.hidden_width, s.width);
  each_matrix(&Weights::Layer::down, s.width, s.hidden_width);
  each_matrix(&Weights::Layer::up, s.hidden_width, s.width);
  out.final_norm = in.row(s.width);
  in.skip(2 * s.longest * half);
  if (!shared_classifier) out.own_classifier = in.matrix(s.vocabulary, s.width);
  return out;
}

}  // namespace story

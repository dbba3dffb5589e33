#include "tiny_model.hpp"

#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <kvpare/core/random.hpp>

namespace story::tests {
namespace {

template <class T>
void put(std::string& bytes, T value) {
  char raw[sizeof(T)];
  std::memcpy(raw, &value, sizeof(T));
  bytes.append(raw, sizeof(T));
}

using Vector = std::vector<double>;

/// Arrays of floats, one after the other, as doubles.
class Arrays {
 public:
  explicit Arrays(const std::string& bytes, std::size_t at) : bytes_(bytes), at_(at) {}
  Vector next(int count) {
    Vector out(static_cast<std::size_t>(count));
    for (double& value : out) {
      float number;
      std::memcpy(&number, bytes_.data() + at_, sizeof number);
      value = number;
      at_ += sizeof number;
    }
    return out;
  }
  std::size_t at() const { return at_; }

 private:
  const std::string& bytes_;
  std::size_t at_;
};

Vector norm(const Vector& x, const double* weight) {
  double squares = 0;
  for (const double value : x) squares += value * value;
  const double scale = 1 / std::sqrt(squares / static_cast<double>(x.size()) + 1e-5);
  Vector out(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) out[i] = x[i] * scale * weight[i];
  return out;
}

/// The matrix [rows, x.size()] times x.
Vector times(const double* matrix, int rows, const Vector& x) {
  Vector out(static_cast<std::size_t>(rows), 0.0);
  for (std::size_t r = 0; r < out.size(); ++r)
    for (std::size_t c = 0; c < x.size(); ++c) out[r] += matrix[r * x.size() + c] * x[c];
  return out;
}

void rotate(Vector& x, int head_dim, int position) {
  for (std::size_t i = 0; i < x.size(); i += 2) {
    const double angle = position / std::pow(10000.0, static_cast<double>(i % static_cast<std::size_t>(head_dim)) /
                                                          static_cast<double>(head_dim));
    const double a = x[i], b = x[i + 1];
    x[i] = a * std::cos(angle) - b * std::sin(angle);
    x[i + 1] = a * std::sin(angle) + b * std::cos(angle);
  }
}

}  // namespace

std::string model_bytes(const Shape& s, bool own_classifier, std::uint64_t seed) {
  std::string bytes;
  for (const Index number : {s.width, s.hidden_width, s.layers, s.q_heads, s.kv_heads,
                             own_classifier ? -s.vocabulary : s.vocabulary, s.longest})
    put(bytes, static_cast<std::int32_t>(number));
  std::uint64_t next = 0;
  const auto add = [&](Index count, float centre, float spread) {
    for (Index i = 0; i < count; ++i) put(bytes, centre + spread * (2 * kvpare::random_unit(seed, next++) - 1));
  };
  const Index kv_width = s.kv_heads * s.head_dim();
  add(s.vocabulary * s.width, 0, 1);
  add(s.layers * s.width, 1, 0.3f);                                                // attention norm
  add(s.layers * s.width * s.width + 2 * s.layers * kv_width * s.width, 0, 0.6f);  // query, key, value
  add(s.layers * s.width * s.width, 0, 0.3f);                                      // output
  add(s.layers * s.width, 1, 0.3f);                                                // mlp norm
  add(3 * s.layers * s.hidden_width * s.width, 0, 0.3f);
  add(s.width, 1, 0.3f);
  add(s.longest * s.head_dim(), 0, 1);  // cosines and sines: nobody reads them
  if (own_classifier) add(s.vocabulary * s.width, 0, 1);
  return bytes;
}

std::string tokenizer_bytes(const std::vector<Piece>& pieces) {
  std::size_t longest = 0;
  for (const Piece& piece : pieces) longest = std::max(longest, piece.text.size());
  std::string bytes;
  put(bytes, static_cast<std::int32_t>(longest));
  for (const Piece& piece : pieces) {
    put(bytes, piece.score);
    put(bytes, static_cast<std::int32_t>(piece.text.size()));
    bytes += piece.text;
  }
  return bytes;
}

std::vector<Piece> with_bytes(const std::vector<Piece>& pieces) {
  std::vector<Piece> all = {{"<unk>", 0}, {"\n<s>\n", 0}, {"\n</s>\n", 0}};
  for (int byte = 0; byte < 256; ++byte) {
    char name[8];
    std::snprintf(name, sizeof name, "<0x%02X>", static_cast<unsigned>(byte) & 0xffu);
    all.push_back({name, 0});
  }
  all.insert(all.end(), pieces.begin(), pieces.end());
  return all;
}

std::vector<std::vector<double>> textbook_logits(const std::string& model, const std::vector<int>& tokens,
                                                 const Sees& sees) {
  std::array<std::int32_t, 7> header;
  std::memcpy(header.data(), model.data(), sizeof header);
  const auto [dim, hidden, layers, heads, kv_heads, signed_vocabulary, longest] = header;
  const int vocabulary = std::abs(signed_vocabulary), size = dim / heads, kv_dim = kv_heads * size;
  Arrays in(model, sizeof header);
  const Vector embedding = in.next(vocabulary * dim), attention_norm = in.next(layers * dim),
               wq = in.next(layers * dim * dim), wk = in.next(layers * kv_dim * dim),
               wv = in.next(layers * kv_dim * dim), wo = in.next(layers * dim * dim), mlp_norm = in.next(layers * dim),
               w1 = in.next(layers * hidden * dim), w2 = in.next(layers * dim * hidden),
               w3 = in.next(layers * hidden * dim), final_norm = in.next(dim);
  in.next(longest * size);
  const Vector classifier = signed_vocabulary > 0 ? embedding : in.next(vocabulary * dim);

  std::vector<std::vector<Vector>> keys(static_cast<std::size_t>(layers)), values(keys);  // [layer][position]
  std::vector<Vector> logits;
  for (int t = 0; t < static_cast<int>(tokens.size()); ++t) {
    const double* row = &embedding[static_cast<std::size_t>(tokens[static_cast<std::size_t>(t)] * dim)];
    Vector x(row, row + dim);
    for (int l = 0; l < layers; ++l) {
      const auto layer = static_cast<std::size_t>(l);
      const Vector h = norm(x, &attention_norm[static_cast<std::size_t>(l * dim)]);
      Vector q = times(&wq[static_cast<std::size_t>(l * dim * dim)], dim, h);
      Vector k = times(&wk[static_cast<std::size_t>(l * kv_dim * dim)], kv_dim, h);
      rotate(q, size, t);
      rotate(k, size, t);
      keys[layer].push_back(k);
      values[layer].push_back(times(&wv[static_cast<std::size_t>(l * kv_dim * dim)], kv_dim, h));
      Vector attended(static_cast<std::size_t>(dim), 0.0);
      for (int head = 0; head < heads; ++head) {
        const int kv_head = head / (heads / kv_heads);
        Vector weights(static_cast<std::size_t>(t) + 1, 0.0);
        double sum = 0;
        for (int j = 0; j <= t; ++j) {
          if (!sees(l, kv_head, t, j)) continue;
          double dot = 0;
          for (int i = 0; i < size; ++i)
            dot += q[static_cast<std::size_t>(head * size + i)] *
                   keys[layer][static_cast<std::size_t>(j)][static_cast<std::size_t>(kv_head * size + i)];
          sum += weights[static_cast<std::size_t>(j)] = std::exp(dot / std::sqrt(static_cast<double>(size)));
        }
        for (int j = 0; j <= t; ++j)
          for (int i = 0; i < size; ++i)
            attended[static_cast<std::size_t>(head * size + i)] +=
                weights[static_cast<std::size_t>(j)] / sum *
                values[layer][static_cast<std::size_t>(j)][static_cast<std::size_t>(kv_head * size + i)];
      }
      const Vector projected = times(&wo[static_cast<std::size_t>(l * dim * dim)], dim, attended);
      for (std::size_t i = 0; i < x.size(); ++i) x[i] += projected[i];

      const Vector m = norm(x, &mlp_norm[static_cast<std::size_t>(l * dim)]);
      Vector gate = times(&w1[static_cast<std::size_t>(l * hidden * dim)], hidden, m);
      const Vector up = times(&w3[static_cast<std::size_t>(l * hidden * dim)], hidden, m);
      for (std::size_t i = 0; i < gate.size(); ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
      const Vector down = times(&w2[static_cast<std::size_t>(l * dim * hidden)], dim, gate);
      for (std::size_t i = 0; i < x.size(); ++i) x[i] += down[i];
    }
    logits.push_back(times(classifier.data(), vocabulary, norm(x, final_norm.data())));
  }
  return logits;
}

std::string data_folder() {
  const char* named = std::getenv("KVPARE_DATA");
  const std::filesystem::path folder = named != nullptr ? named : KVPARE_STORY_DATA;
  std::error_code ignored;
  return std::filesystem::exists(folder / "stories260K" / "stories260K.bin", ignored) ? folder.string() : "";
}

}  // namespace story::tests

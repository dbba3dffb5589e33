// Small models and tokenizers, made here, and the textbook's way through such a model: doubles and loops, straight from
// the bytes of the file.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "../model_file.hpp"

namespace story::tests {

/// The bytes of a model file with random weights. With `own_classifier` the classifier is no copy of the embedding.
std::string model_bytes(const Shape& shape, bool own_classifier, std::uint64_t seed);

/// The bytes of a tokenizer file.
struct Piece {
  std::string text;
  float score;
};
std::string tokenizer_bytes(const std::vector<Piece>& pieces);

/// The tokens that every tokenizer has (three marks and 256 bytes), then these.
std::vector<Piece> with_bytes(const std::vector<Piece>& pieces);

/// Does the query at position t see the key at position j <= t in this kv head of this layer?
using Sees = std::function<bool(Index layer, Index kv_head, Index t, Index j)>;

/// Logits after every token, [tokens][vocabulary].
std::vector<std::vector<double>> textbook_logits(const std::string& model, const std::vector<int>& tokens,
                                                 const Sees& sees);

/// The folder with a trained model and texts, as README.md says: $KVPARE_DATA, else shared/data beside the project.
/// Empty where there is none.
std::string data_folder();

}  // namespace story::tests

// llama2.c's tokenizer: pieces of text with scores, joined greedily (BPE).
//
// The file, little-endian: int32 length of the longest piece, then per token float32 score, int32 length, the piece.
// How many tokens there are stands in the model's file only. Tokens 3 to 258 stand for single bytes ("<0x00>" to
// "<0xFF>"), 1 and 2 for the begin and the end of a text.
#pragma once

#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "model_file.hpp"

namespace story {

class Tokenizer {
 public:
  /// `name` stands for the file in messages; `vocabulary` is the model's. Throws BadFile.
  static Tokenizer parse(std::string_view bytes, const std::string& name, Index vocabulary);

  Index vocabulary() const { return static_cast<Index>(pieces_.size()); }

  /// A space goes before the text, characters become tokens (their bytes, where there is no token for a character),
  /// and then the adjacent pair whose join has the best score is joined, the leftmost of equals, until there is none.
  /// An empty text has no tokens. Throws BadFile when the vocabulary is too small to have a needed byte.
  std::vector<int> encode(std::string_view text) const;

  /// What a token adds to the text, given the token before: the byte that it stands for, or its piece, which loses one
  /// leading space at the begin of a text. The begin and the end of a text add nothing.
  std::string decode(int previous, int token) const;

 private:
  std::string name_;
  std::vector<std::string> pieces_;
  std::vector<float> scores_;
  std::unordered_map<std::string, int> tokens_;  // of equal pieces the first token
};

/// The bytes of a text's first character: as its first byte says in UTF-8, fewer where the text breaks that promise.
std::size_t character_bytes(std::string_view text);

}  // namespace story

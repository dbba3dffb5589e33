// The fixed evaluation set: pictures, the turns of the dialogues about them, and what the full-cache model answers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model_shape.hpp"
#include "support/bad_file.hpp"

namespace vlm {

using example::BadFile;

struct Turn {
  std::string kind;            // desc, where or shape
  std::vector<int> prompt;     // token ids, <ans> included
  std::vector<int> answer;     // the true one, <eos> included
  std::vector<int> reference;  // what the model answers with its full cache; empty = the set does not say
  std::vector<float> logits;   // of the answer's first token with the full cache; empty for most turns

  /// Answers are cut after this many tokens.
  int longest_answer() const { return kind == "desc" ? 26 : 4; }
};

struct Scene {
  std::vector<std::uint8_t> image;  // image_bytes of them
  Turn describe;                    // desc: describe everything
  Turn first;                       // turn1: where is A
  std::vector<Turn> same;           // after turn1, about A again
  std::vector<Turn> other;          // after turn1, about other objects
};

struct EvaluationSet {
  std::vector<std::string> vocabulary;
  std::vector<Scene> scenes;
};

/// Reads vocab.json, eval128.jsonl and eval128.bin of a folder. Throws BadFile.
EvaluationSet read_evaluation_set(const std::string& folder);

}  // namespace vlm

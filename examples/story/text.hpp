// The texts on which predictions are measured.
#pragma once

#include <string_view>
#include <vector>

#include "tokenizer.hpp"

namespace story {

/// What is read of a file of stories.
struct TextRule {
  Index stories = 8;        // the first so many that the file has
  Index shortest = 200;     // characters; shorter ones are left out
  Index most_tokens = 256;  // of each story, its begin
};

/// One text of `rule.most_tokens` tokens at most, after the token that begins a text, per story. Stories are separated by
/// "<|endoftext|>" and lose the white space around them; a file without it is one story.
std::vector<std::vector<int>> read_stories(std::string_view text, const Tokenizer& tokenizer, const TextRule& rule);

}  // namespace story

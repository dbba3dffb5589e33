#include "text.hpp"

#include <algorithm>

namespace story {
namespace {

std::string_view trimmed(std::string_view text) {
  constexpr std::string_view white = " \t\n\r\v\f";
  const auto first = text.find_first_not_of(white);
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(white) - first + 1);
}

Index characters(std::string_view text) {
  Index count = 0;
  for (; !text.empty(); ++count) text.remove_prefix(character_bytes(text));
  return count;
}

}  // namespace

std::vector<std::vector<int>> read_stories(std::string_view text, const Tokenizer& tokenizer, const TextRule& rule) {
  constexpr std::string_view separator = "<|endoftext|>";
  std::vector<std::vector<int>> stories;
  bool more = true;
  for (Index i = 0; more && i < rule.stories; ++i) {
    const auto end = text.find(separator);
    more = end != std::string_view::npos;
    const std::string_view story = trimmed(text.substr(0, end));
    if (more) text.remove_prefix(end + separator.size());
    if (characters(story) < rule.shortest) continue;
    std::vector<int> tokens = tokenizer.encode(story);
    tokens.insert(tokens.begin(), begin_of_text);
    if (std::ssize(tokens) > rule.most_tokens + 1) tokens.resize(static_cast<std::size_t>(rule.most_tokens + 1));
    stories.push_back(std::move(tokens));
  }
  return stories;
}

}  // namespace story

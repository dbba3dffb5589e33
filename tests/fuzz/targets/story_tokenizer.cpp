// Tokenizer files of examples/story, and texts: whatever the vocabulary, a text has tokens, and they are the vocabulary's.
//
// Input  2 bytes: vocabulary, below 512 · 1 byte: length of a text · the text · the file
#include "fuzz/target.hpp"
#include "story/tokenizer.hpp"
#include "support/bad_file.hpp"

using kvpare::test::must;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 3) return 0;
  std::string_view rest(reinterpret_cast<const char*>(data) + 3, size - 3);
  const story::Index vocabulary = (data[0] | data[1] << 8) % 512;
  const std::string_view text = rest.substr(0, data[2]);
  rest.remove_prefix(text.size());
  try {
    const auto tokenizer = story::Tokenizer::parse(rest, "input", vocabulary);
    must(tokenizer.vocabulary() == vocabulary, "a token was lost");
    const std::vector<int> tokens = tokenizer.encode(text);
    must(tokens.empty() == text.empty() && tokens.size() <= text.size() + 1, "more tokens than bytes");
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      must(tokens[i] >= 0 && tokens[i] < vocabulary, "a token that does not exist");
      (void)tokenizer.decode(i > 0 ? tokens[i - 1] : story::begin_of_text, tokens[i]);
    }
    must(tokens == tokenizer.encode(text), "the same text has other tokens the second time");
  } catch (const example::BadFile& e) {
    must(std::string(e.what()).size() > std::string("input: ").size(), "a refusal says nothing");
  }
  return 0;
}

// Joining pieces: against the rule as it is told, pass after pass over the whole text.
#include <gtest/gtest.h>

#include <algorithm>
#include <kvpare/core/random.hpp>
#include <optional>

#include "../tokenizer.hpp"
#include "support/bad_file.hpp"
#include "tiny_model.hpp"

namespace {

using namespace story;
using namespace story::tests;

Tokenizer tokenizer_of(const std::vector<Piece>& pieces) {
  return Tokenizer::parse(tokenizer_bytes(pieces), "tokens", std::ssize(pieces));
}

/// "merge the best-scoring adjacent pair until none", of texts whose characters are bytes.
std::vector<int> joined_pass_by_pass(const std::vector<Piece>& pieces, const std::string& text) {
  const auto token_of = [&](const std::string& piece) -> std::optional<int> {
    const auto at = std::find_if(pieces.begin(), pieces.end(), [&](const Piece& p) { return p.text == piece; });
    if (at == pieces.end()) return {};
    return static_cast<int>(at - pieces.begin());
  };
  std::vector<int> tokens;
  for (const char c : " " + text)
    tokens.push_back(token_of(std::string(1, c)).value_or(static_cast<unsigned char>(c) + 3));
  while (true) {
    std::optional<int> best;
    std::size_t where = 0;
    for (std::size_t i = 0; i + 1 < tokens.size(); ++i) {
      const auto joined = token_of(pieces[static_cast<std::size_t>(tokens[i])].text +
                                   pieces[static_cast<std::size_t>(tokens[i + 1])].text);
      if (joined &&
          (!best || pieces[static_cast<std::size_t>(*joined)].score > pieces[static_cast<std::size_t>(*best)].score))
        best = joined, where = i;
    }
    if (!best) return tokens;
    tokens[where] = *best;
    tokens.erase(tokens.begin() + static_cast<std::ptrdiff_t>(where) + 1);
  }
}

TEST(TokenizerTest, JoinsTheBestPairFirstAndTheLeftmostOfEquals) {
  // "aab": with a+b best it is a|ab, though aa is met first.
  const auto pieces = with_bytes({{" ", 0}, {"a", 0}, {"b", 0}, {"aa", -2}, {"ab", -1}});
  EXPECT_EQ(tokenizer_of(pieces).encode("aab"), (std::vector<int>{259, 260, 263}));
  const auto equal = with_bytes({{" ", 0}, {"a", 0}, {"aa", -1}});
  EXPECT_EQ(tokenizer_of(equal).encode("aaa"), (std::vector<int>{259, 261, 260}));
}

TEST(TokenizerTest, AgreesWithTheRuleOnRandomVocabularies) {
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    std::vector<Piece> own = {{" ", 0}, {"a", 0}, {"b", 0}, {"c", 0}};
    for (std::uint64_t i = 0; i < 25; ++i) {
      std::string text;
      for (std::uint64_t c = 0; c < 2 + kvpare::random_bits(seed, i) % 3; ++c)
        text += " abc"[kvpare::random_bits(seed, i, c) % 4];
      own.push_back({text, static_cast<float>(kvpare::random_bits(seed, i, 99) % 9)});  // equal scores and pieces too
    }
    const auto pieces = with_bytes(own);
    const Tokenizer tokenizer = tokenizer_of(pieces);
    for (std::uint64_t round = 0; round < 20; ++round) {
      std::string text;
      for (std::uint64_t c = 0; c < 1 + kvpare::random_bits(seed, round) % 40; ++c)
        text += " abcd"[kvpare::random_bits(seed, round, c, 7) % 5];
      const std::vector<int> tokens = tokenizer.encode(text);
      ASSERT_EQ(tokens, joined_pass_by_pass(pieces, text)) << "seed " << seed << ", '" << text << "'";
      std::string back;
      for (std::size_t i = 0; i < tokens.size(); ++i)
        back += tokenizer.decode(i > 0 ? tokens[i - 1] : begin_of_text, tokens[i]);
      // What decoding drops is the leading space of the first piece, which encoding put there.
      ASSERT_EQ(back, text);
    }
  }
}

TEST(TokenizerTest, CharactersWithoutATokenAreBytes) {
  const auto pieces = with_bytes({{"\xc3\xa4", 0}});
  const Tokenizer tokenizer = tokenizer_of(pieces);
  EXPECT_EQ(tokenizer.encode("\xc3\xa4\xc3\xb6"), (std::vector<int>{' ' + 3, 259, 0xc3 + 3, 0xb6 + 3}));
  EXPECT_EQ(tokenizer.encode("\xc3"), (std::vector<int>{' ' + 3, 0xc3 + 3})) << "a character cut short";
  EXPECT_EQ(tokenizer.encode("\xa4\xff"), (std::vector<int>{' ' + 3, 0xa4 + 3, 0xff + 3})) << "no UTF-8 at all";
  EXPECT_TRUE(tokenizer.encode("").empty());
  EXPECT_THROW(tokenizer_of({{"<unk>", 0}, {"<s>", 0}, {"</s>", 0}}).encode("x"), example::BadFile);
}

TEST(TokenizerTest, DecodesBytesAndDropsOneSpaceAtTheBegin) {
  const auto pieces = with_bytes({{" a", 0}, {"  b", 0}, {"<0xZZ>", 0}, {"<0x4>>", 0}});
  const Tokenizer tokenizer = tokenizer_of(pieces);
  EXPECT_EQ(tokenizer.decode(begin_of_text, 259), "a");
  EXPECT_EQ(tokenizer.decode(5, 259), " a");
  EXPECT_EQ(tokenizer.decode(begin_of_text, 260), " b");
  EXPECT_EQ(tokenizer.decode(5, 10 + 3), "\n");
  EXPECT_EQ(tokenizer.decode(5, 0xff + 3), "\xff");
  EXPECT_EQ(tokenizer.decode(5, 0 + 3), std::string(1, '\0'));
  EXPECT_EQ(tokenizer.decode(5, 261), "<0xZZ>");
  EXPECT_EQ(tokenizer.decode(5, 262), "<0x4>>");
  EXPECT_EQ(tokenizer.decode(5, begin_of_text), "");
  EXPECT_EQ(tokenizer.decode(5, end_of_text), "");
}

TEST(TokenizerTest, LongTextsTakeNoLongerPerCharacter) {
  // A megabyte; joining pass by pass would take days.
  const auto pieces = with_bytes({{" ", 0}, {"a", 0}, {"aa", -1}, {"aaaa", -2}, {"aaaaaaaa", -3}});
  EXPECT_EQ(tokenizer_of(pieces).encode(std::string(1 << 20, 'a')).size(), 1 + (1u << 17));
}

}  // namespace

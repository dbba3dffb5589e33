// The files an engine is given: whatever they hold, reading them gives a model or a sentence.
#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <random>

#include "../text.hpp"
#include "support/bad_file.hpp"
#include "tiny_model.hpp"

namespace {

using namespace story;
using namespace story::tests;
using example::BadFile;

constexpr Shape shape{
    .width = 12, .hidden_width = 10, .layers = 2, .q_heads = 3, .kv_heads = 1, .vocabulary = 7, .longest = 9};

std::string message_of(const std::string& model) {
  try {
    parse_model(model, "model");
  } catch (const BadFile& error) {
    return error.what();
  }
  return "no error";
}

std::string with_number(std::string bytes, std::size_t index, std::int32_t number) {
  char raw[sizeof number];
  std::memcpy(raw, &number, sizeof number);
  return bytes.replace(4 * index, sizeof raw, raw, sizeof raw);
}

TEST(ModelFileTest, ReadsWhatTheHeaderSays) {
  for (const bool own_classifier : {false, true}) {
    const std::string bytes = model_bytes(shape, own_classifier, 1);
    const Weights weights = parse_model(bytes, "model");
    EXPECT_EQ(weights.shape, shape);
    ASSERT_EQ(weights.layers.size(), 2u);
    EXPECT_EQ(weights.layers[1].key.rows(), 4) << "one kv head of width 12 / 3";
    float last = 0;
    std::memcpy(&last, bytes.data() + bytes.size() - sizeof last, sizeof last);
    if (own_classifier)
      EXPECT_EQ(weights.classifier()(6, 11), last);
    else
      EXPECT_EQ(&weights.classifier(), &weights.embedding);
  }
}

TEST(ModelFileTest, EveryOtherLengthIsRefused) {
  const std::string bytes = model_bytes(shape, true, 1);
  for (std::size_t size = 0; size < bytes.size(); ++size)
    EXPECT_NE(message_of(bytes.substr(0, size)), "no error") << size;
  EXPECT_NE(message_of(bytes + "1234").find("takes " + std::to_string(bytes.size())), std::string::npos);
  EXPECT_EQ(message_of(bytes), "no error");
}

TEST(ModelFileTest, NumbersThatMakeNoSenseAreSentences) {
  const std::string bytes = model_bytes(shape, false, 1);
  constexpr std::int32_t most = std::numeric_limits<std::int32_t>::max();
  const struct {
    std::size_t index;
    std::int32_t number;
    const char* sentence;
  } wrong[] = {{0, 0, "model: width = 0, must be positive"},
               {0, -12, "width = -12, must be positive"},
               {0, 13, "width = 13, must be a multiple of q heads = 3"},
               {0, 9, "head dim = 3 (width / q heads), must be even"},
               {0, 0x616b3432, "is of version 10 of the format"},
               {1, 0, "hidden width = 0"},
               {2, 0, "layers = 0"},
               {2, most, "2147483647 layers"},
               {3, most, "q heads = 2147483647"},
               {4, 2, "must be a multiple of kv heads = 2"},
               {5, 0, "vocabulary = 0, must not be 0"},
               {5, 2, "vocabulary = 2, must be at least 3"},
               {5, -most - 1, "vocabulary = -2147483648, must be positive"},
               {5, -most, "bytes; a model of"},
               {6, -1, "longest sequence = -1"},
               {6, most, "bytes; a model of"}};
  for (const auto& [index, number, sentence] : wrong)
    EXPECT_NE(message_of(with_number(bytes, index, number)).find(sentence), std::string::npos)
        << message_of(with_number(bytes, index, number)) << "\n wanted: " << sentence;
  // Products of these are beyond 64 bits; wrapped, they could be any length.
  std::string huge = bytes;
  for (const std::size_t index : {0, 1, 2, 6}) huge = with_number(huge, index, 1 << 30);
  huge = with_number(with_number(huge, 3, 1 << 18), 4, 1 << 18);
  EXPECT_NE(message_of(huge).find("takes 18446744073709551615"), std::string::npos) << message_of(huge);
}

TEST(ModelFileTest, RandomHeadersNeverReadOutOfBounds) {
  const std::string bytes = model_bytes(shape, false, 1);
  std::mt19937 random(1);
  for (int round = 0; round < 20000; ++round) {
    std::string damaged = bytes.substr(0, random() % 3 == 0 ? random() % (bytes.size() + 1) : bytes.size());
    for (int i = 0; i < 1 + round % 3 && !damaged.empty(); ++i)
      damaged[random() % std::min<std::size_t>(damaged.size(), 28)] = static_cast<char>(random() % 16);
    try {
      const Weights weights = parse_model(damaged, "model");
      EXPECT_EQ(weights.embedding.size(), weights.shape.vocabulary * weights.shape.width);
    } catch (const BadFile&) {
    }
  }
}

// ---- the tokenizer

std::string tokenizer_message(const std::string& bytes, Index vocabulary) {
  try {
    Tokenizer::parse(bytes, "tokens", vocabulary);
  } catch (const BadFile& error) {
    return error.what();
  }
  return "no error";
}

TEST(TokenizerFileTest, EveryCutAndEveryOtherVocabularyIsRefused) {
  const auto pieces = with_bytes({{"a", -1}, {"ab", -2}});
  const std::string bytes = tokenizer_bytes(pieces);
  const Index count = std::ssize(pieces);
  EXPECT_EQ(tokenizer_message(bytes, count), "no error");
  for (std::size_t size = 0; size < bytes.size(); ++size)
    EXPECT_NE(tokenizer_message(bytes.substr(0, size), count), "no error") << size;
  EXPECT_NE(tokenizer_message(bytes, count - 1).find("10 bytes follow the 260 tokens"), std::string::npos)
      << tokenizer_message(bytes, count - 1);
  EXPECT_NE(tokenizer_message(bytes, count + 1).find("ends within the score of token 261"), std::string::npos);
}

TEST(TokenizerFileTest, DamageIsASentence) {
  const std::vector<Piece> pieces = {{"<unk>", 0}, {"b", 1}, {"c", 2}};
  const std::string bytes = tokenizer_bytes(pieces);
  const auto length_of = [&](std::int32_t length) { return with_number(bytes, 2, length); };
  EXPECT_NE(tokenizer_message(length_of(-1), 3).find("token 0 has -1 bytes, must be within [0, 5]"), std::string::npos);
  EXPECT_NE(tokenizer_message(length_of(6), 3).find("token 0 has 6 bytes"), std::string::npos);
  EXPECT_NE(tokenizer_message(with_number(length_of(1 << 30), 0, 1 << 30), 3).find("only 23 are left"),
            std::string::npos)
      << tokenizer_message(with_number(length_of(1 << 30), 0, 1 << 30), 3);
  EXPECT_NE(tokenizer_message(with_number(bytes, 1, 0x7fc00000), 3).find("must be finite"), std::string::npos);
  std::mt19937 random(1);
  for (int round = 0; round < 20000; ++round) {
    std::string damaged = bytes.substr(0, random() % 3 == 0 ? random() % (bytes.size() + 1) : bytes.size());
    for (int i = 0; i < 1 + round % 3 && !damaged.empty(); ++i)
      damaged[random() % damaged.size()] = static_cast<char>(random());
    try {
      const Tokenizer tokenizer = Tokenizer::parse(damaged, "tokens", 3);
      EXPECT_EQ(tokenizer.vocabulary(), 3);
      tokenizer.encode("abc");
    } catch (const BadFile&) {
    }
  }
}

// ---- what is read of a text

TEST(TextTest, StoriesAreCutSkippedAndCounted) {
  const auto pieces = with_bytes({});
  const Tokenizer tokenizer = Tokenizer::parse(tokenizer_bytes(pieces), "tokens", std::ssize(pieces));
  const std::string text = "\n abcd \n<|endoftext|>ab<|endoftext|>\xc3\xa4\xc3\xa4\xc3\xa4<|endoftext|>efgh";
  const auto stories = read_stories(text, tokenizer, {.stories = 8, .shortest = 3, .most_tokens = 4});
  ASSERT_EQ(stories.size(), 3u) << "two characters are too few; three of two bytes each are enough";
  EXPECT_EQ(stories[0], (std::vector<int>{1, ' ' + 3, 'a' + 3, 'b' + 3, 'c' + 3}));
  EXPECT_EQ(stories[1].size(), 5u);
  EXPECT_EQ(stories[2][4], 'g' + 3);
  EXPECT_EQ(read_stories(text, tokenizer, {.stories = 3, .shortest = 3, .most_tokens = 4}).size(), 2u)
      << "short stories count among the first";
  EXPECT_EQ(read_stories("abcdef", tokenizer, {.shortest = 3, .most_tokens = 100})[0].size(), 8u);
  EXPECT_TRUE(read_stories("", tokenizer, {}).empty());
}

}  // namespace

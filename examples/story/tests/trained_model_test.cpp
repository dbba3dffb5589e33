// On the trained model stories260K, where its files are found: what its authors and an independent program say of it.
#include <gtest/gtest.h>

#include <fstream>
#include <optional>

#include "../evaluate.hpp"
#include "../text.hpp"
#include "../writer.hpp"
#include "support/bad_file.hpp"
#include "tiny_model.hpp"

namespace {

using namespace story;

class TrainedModelTest : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = tests::data_folder();
    if (folder_.empty())
      GTEST_SKIP()
          << "stories260K/stories260K.bin is neither in the folder that KVPARE_DATA names nor in " KVPARE_STORY_DATA;
    decoder_.emplace(parse_model(read("stories260K/stories260K.bin"), "model"));
    tokenizer_.emplace(Tokenizer::parse(read("stories260K/tok512.bin"), "tokenizer", decoder_->shape().vocabulary));
  }

  std::string read(const std::string& file) const { return example::read_bytes(folder_ + "/" + file); }

  std::string written(const std::string& prompt, Index steps, const std::string& policy = "full") {
    Context context(*decoder_, backend_, make_method(kvpare::make_compressor(policy), 16),
                    {.most_tokens = decoder_->shape().longest});
    Draft draft{.tokens = tokenizer_->encode(prompt)};
    draft.tokens.insert(draft.tokens.begin(), begin_of_text);
    std::string text;
    write(*decoder_, context, draft, steps,
          [&](int previous, int token) { text += tokenizer_->decode(previous, token); });
    return text;
  }

  std::string folder_;
  std::optional<Decoder> decoder_;
  std::optional<Tokenizer> tokenizer_;
  kvpare::cpu::Backend backend_{{.threads = 1}};
};

TEST_F(TrainedModelTest, WritesTheDocumentedText) {
  // llama2.c, doc/stories260K.md, with temperature 0.
  EXPECT_EQ(
      written("", 256),
      "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw "
      "a big, red ball. She wanted to play with it, but it was too high.\n"
      "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. She said, \"I want "
      "to play with your ball, but I can't find it.\"\n"
      "Lily was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't know what to do.\"\n"
      "Lily didn't want to help her mom, so she said, \"I'm sorry, mom. I didn't know what to do.\" Her mom said, "
      "\"Don't worry, Lily. We can help you.");
}

TEST_F(TrainedModelTest, PredictsAsWellAsAnIndependentProgramSays) {
  if (!std::ifstream(folder_ + "/tinystories_sample/tinystories_sample.txt"))
    GTEST_SKIP() << "no tinystories_sample/tinystories_sample.txt in " << folder_;
  const std::string text = read("tinystories_sample/tinystories_sample.txt");
  const auto nats_per_token = [&](Index most_tokens, Index tokens) {
    const auto stories = read_stories(text, *tokenizer_, {.most_tokens = most_tokens});
    const Result result = evaluate(*decoder_, stories, {{"full", {}, {}}}, {.threads = 2})[0];
    EXPECT_EQ(result.tokens, tokens);
    return result.nats_per_token();
  };
  EXPECT_NEAR(nats_per_token(256, 1246), 1.2497527793, 1e-5);  // numpy, float32
  EXPECT_NEAR(nats_per_token(511, 1804), 1.2664410320, 1e-5);
}

}  // namespace

// Putting a text aside and going on: the same words as in one go, and whatever a file holds, a text or a sentence.
#include <gtest/gtest.h>

#include <random>

#include "../saved.hpp"
#include "support/bad_file.hpp"
#include "tiny_model.hpp"

namespace {

using namespace story;
using namespace story::tests;

constexpr Shape shape{
    .width = 24, .hidden_width = 20, .layers = 3, .q_heads = 6, .kv_heads = 2, .vocabulary = 90, .longest = 120};

/// A model that hardly ever ends a text: the two tokens that do have the logit 0, the best of the others is far above.
std::string talkative_model() {
  std::string bytes = model_bytes(shape, true, 11);
  const auto row = static_cast<std::size_t>(shape.width) * sizeof(float);
  const std::size_t classifier = bytes.size() - static_cast<std::size_t>(shape.vocabulary) * row;
  return bytes.replace(classifier + begin_of_text * row, 2 * row, 2 * row, '\0');
}

class SavedTest : public ::testing::Test {
 protected:
  Context fresh(const Terms& terms) {
    return Context(decoder_, backend_, method_of(terms, shape.layers),
                   {.most_tokens = shape.longest, .page_tokens = terms.page_tokens});
  }

  /// What `--prompt --steps N --save` leaves.
  std::string bytes_after(const Draft& begin, const Terms& terms, Index steps) {
    Context context = fresh(terms);
    Saved saved;
    saved.draft = begin, saved.terms = terms, saved.model = "model";
    write(decoder_, context, saved.draft, steps);
    saved.image = context.image();
    return print_saved(saved);
  }

  std::string message_of(const std::string& bytes) {
    try {
      parse_saved(bytes, "file", shape, "model");
    } catch (const example::BadFile& error) {
      return error.what();
    }
    return "no error";
  }

  const Decoder decoder_{parse_model(talkative_model(), "model")};
  kvpare::cpu::Backend backend_{{.threads = 1}};
  const Draft begin_{.tokens = {1, 4, 5}, .sampling = {.temperature = 0.5, .seed = 3}};
};

TEST_F(SavedTest, GoesOnAsIfNothingHadHappened) {
  for (const Terms& terms :
       {Terms{}, Terms{.policy = "h2o", .budget = "12t"}, Terms{.policy = "tova", .budget = "25%"},
        Terms{.policy = "streaming_llm", .budget = "9t", .page_tokens = 32}, Terms{.policy = "random", .budget = "12t"},
        Terms{.policy = "snap_kv", .budget = "12t", .block = 8},
        Terms{.policy = "ada_kv", .budget = "12t", .block = 16},
        Terms{.policy = "h2o", .budget = "12t", .block = 8, .all_in_blocks = true}}) {
    Context one = fresh(terms);
    Draft whole = begin_;
    ASSERT_EQ(write(decoder_, one, whole, 60), 60) << "choose other weights: the text ended early";
    for (const Index first : {0, 13, 30, 59}) {
      const std::string bytes = bytes_after(begin_, terms, first);
      Saved saved = parse_saved(bytes, "file", shape, "model");
      EXPECT_EQ(saved.terms, terms);
      EXPECT_EQ(saved.draft.sampling, begin_.sampling);
      Draft& rest = saved.draft;
      ASSERT_EQ(std::ssize(rest.tokens), 3 + first);
      Context other(decoder_, backend_, method_of(saved.terms, shape.layers),
                    {.most_tokens = shape.longest, .page_tokens = terms.page_tokens}, saved.image);
      EXPECT_EQ(write(decoder_, other, rest, 60 - first), 60 - first);
      EXPECT_EQ(rest.tokens, whole.tokens) << terms.policy << ", put aside after " << first;
      for (Index l = 0; l < shape.layers; ++l)
        for (Index h = 0; h < shape.kv_heads; ++h) EXPECT_EQ(one.kept(l, h), other.kept(l, h)) << terms.policy;
    }
  }
}

TEST_F(SavedTest, AFinishedTextStaysFinished) {
  Saved saved;
  saved.draft.tokens = {1, 7}, saved.draft.finished = true, saved.image.tokens = 2, saved.model = "model";
  EXPECT_TRUE(parse_saved(print_saved(saved), "file", shape, "model").draft.finished);
  saved.draft.finished = false;
  EXPECT_NE(message_of(print_saved(saved)).find("all tokens have been read"), std::string::npos);
}

TEST_F(SavedTest, DamageIsASentence) {
  const std::string bytes = bytes_after(begin_, {.policy = "h2o", .budget = "12t"}, 20);
  EXPECT_EQ(message_of(bytes), "no error");
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string copy = bytes;
    const auto at = copy.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    copy.replace(at, from.size(), to);
    const std::size_t head =
        static_cast<unsigned char>(copy[8]) + 256u * static_cast<unsigned char>(copy[9]) + to.size() - from.size();
    copy[8] = static_cast<char>(head & 0xff), copy[9] = static_cast<char>(head >> 8);
    return message_of(copy);
  };
  EXPECT_NE(message_of("kvstory2" + bytes.substr(8)).find("must begin with 'kvstory1'"), std::string::npos);
  EXPECT_NE(with("\"model\":\"model\"", "\"model\":\"other\"").find("was written by another model"), std::string::npos);
  EXPECT_NE(with("[1,4,5", "[1,90,5").find("tokens hold 90, must be within [0, 90)"), std::string::npos);
  EXPECT_NE(with("[1,4,5", "[1,-4,5").find("tokens hold -4"), std::string::npos);
  EXPECT_NE(with("\"read\":22", "\"read\":23").find("all tokens have been read"), std::string::npos);
  EXPECT_NE(with("\"read\":22", "\"read\":24").find("read = 24, must be within [0, 23]"), std::string::npos);
  EXPECT_NE(with("\"read\":22", "\"read\":-1").find("the head is not what it should be"), std::string::npos);
  EXPECT_NE(with("\"read\":22", "\"raed\":22").find("the head is not what it should be"), std::string::npos);
  EXPECT_NE(with("\"temperature\":0.5", "\"temperature\":-1").find("temperature = -1"), std::string::npos);
  EXPECT_NE(with("\"seed\":3", "\"seed\":\"3\"").find("the head is not what it should be"), std::string::npos);
  EXPECT_NE(with("\"tokens\":[", "\"tokens\":{").find("the head is not what it should be"), std::string::npos);
}

TEST_F(SavedTest, CutAndDamagedFilesAreRefusedOrRead) {
  const Terms terms{.policy = "h2o", .budget = "12t"};
  const std::string bytes = bytes_after(begin_, terms, 20);
  const auto read = [&](const std::string& damaged) {
    const Saved saved = parse_saved(damaged, "file", shape, "model");
    Context context(decoder_, backend_, method_of(saved.terms, shape.layers), {.most_tokens = shape.longest},
                    saved.image);
  };
  EXPECT_NO_THROW(read(bytes));
  for (std::size_t size = 0; size < bytes.size(); size += size < 400 ? 1 : 97)
    EXPECT_THROW(read(bytes.substr(0, size)), std::exception) << size;
  std::mt19937 random(1);
  for (int round = 0; round < 3000; ++round) {
    std::string damaged = bytes;
    for (int i = 0; i < 1 + round % 3; ++i) damaged[random() % damaged.size()] = static_cast<char>(random());
    try {
      read(damaged);
    } catch (const std::exception& error) {
      EXPECT_STRNE(error.what(), "");
    }
  }
}

TEST(TermsTest, AreAPolicyAndABudget) {
  EXPECT_EQ(method_of({}, 5).acts, Acts::never);
  EXPECT_EQ(method_of({.policy = "h2o", .budget = "12t"}, 5).compressor.keep, kvpare::Keep::tokens(60));
  EXPECT_EQ(method_of({.policy = "h2o(keep=60t)"}, 5).compressor.keep, kvpare::Keep::tokens(60));
  EXPECT_THROW(method_of({.policy = "h2o"}, 5), kvpare::InvalidArgument);
  EXPECT_NE(fingerprint("12345678"), fingerprint("12345679"));
  EXPECT_NE(fingerprint("1234567"), fingerprint(std::string("1234567\0", 8)));
}

}  // namespace

// Model and data files are bytes that nobody has checked before us: every way to break one gives a clear error.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "../decoder.hpp"
#include "../evaluation_set.hpp"

namespace {

using vlm::BadFile;
using vlm::Safetensors;

TEST(DecoderTest, SaysWhichWeightIsMissing) {
  try {
    vlm::Decoder decoder(Safetensors::parse(example::SafetensorsWriter().bytes(), "model"));
    FAIL() << "accepted a model without weights";
  } catch (const BadFile& error) {
    EXPECT_STREQ(error.what(), "model: array 'emb' is missing");
  }
}

/// A copy of the evaluation set in a folder of its own, to be damaged.
class EvaluationSetTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = ::testing::TempDir() + "kvpare_vlm_XXXXXX";  // unique: builds may test side by side
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
    for (const char* file : {"vocab.json", "eval128.jsonl", "eval128.bin"})
      std::filesystem::copy_file(std::filesystem::path(KVPARE_VLM_DATA) / file, folder_ / file,
                                 std::filesystem::copy_options::overwrite_existing);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  void write(const char* file, const std::string& bytes) { std::ofstream(folder_ / file, std::ios::binary) << bytes; }

  std::string message() const {
    try {
      vlm::read_evaluation_set(folder_.string());
    } catch (const BadFile& error) {
      return error.what();
    }
    return "no error";
  }

  std::filesystem::path folder_;
};

TEST_F(EvaluationSetTest, IsReadWhole) {
  const vlm::EvaluationSet set = vlm::read_evaluation_set(folder_.string());
  ASSERT_EQ(set.scenes.size(), 128u);
  EXPECT_EQ(set.vocabulary.size(), 188u);
  for (const vlm::Scene& scene : set.scenes) {
    EXPECT_EQ(scene.image.size(), 96u * 96 * 3);
    EXPECT_EQ(scene.same.size(), 2u);
    EXPECT_EQ(scene.other.size(), 4u);
  }
  EXPECT_EQ(set.scenes[0].describe.logits.size(), 188u);
}

TEST_F(EvaluationSetTest, MayComeWithoutReferences) {
  std::string lines = example::read_bytes((folder_ / "eval128.jsonl").string());
  const std::size_t at = lines.find("\"ref\"");
  lines.replace(at, 5, "\"rem\"");
  write("eval128.jsonl", lines);
  const vlm::EvaluationSet set = vlm::read_evaluation_set(folder_.string());
  EXPECT_TRUE(set.scenes[0].describe.reference.empty());
  EXPECT_FALSE(set.scenes[0].first.reference.empty());
}

TEST_F(EvaluationSetTest, DamageIsAClearError) {
  const std::string lines = example::read_bytes((folder_ / "eval128.jsonl").string());
  const auto damaged = [&](const std::string& from, const std::string& to) {
    std::string copy = lines;
    copy.replace(copy.find(from), from.size(), to);
    write("eval128.jsonl", copy);
    return message();
  };
  EXPECT_NE(damaged("\"q\": [164", "\"q\": [188").find("line 1: q holds token 188"), std::string::npos) << message();
  EXPECT_NE(damaged("\"q\": [164", "\"q\": [-1").find("line 1: q holds token -1"), std::string::npos) << message();
  EXPECT_NE(damaged("\"q\": [164", "\"q\": [\"x\"").find("line 1"), std::string::npos) << message();
  EXPECT_NE(damaged("\"desc\"", "\"dsec\"").find("line 1"), std::string::npos) << message();
  EXPECT_NE(damaged("{\"objs\"", "[\"objs\"").find("line 1"), std::string::npos) << message();
  EXPECT_NE(damaged("\"ref\": [", "\"ref\": [-1, ").find("line 1: ref holds token -1"), std::string::npos) << message();
  write("eval128.jsonl", lines.substr(0, lines.size() / 2));
  EXPECT_NE(message().find("line"), std::string::npos) << message();
  write("eval128.jsonl", lines.substr(0, lines.find('\n') + 1));
  EXPECT_NE(message().find("eval128.bin: 3538944 bytes, must be 27648"), std::string::npos) << message();
  write("vocab.json", "[\"one\", \"two\"]");
  EXPECT_NE(message().find("vocab.json: 2 words, must be 188"), std::string::npos) << message();
  std::filesystem::remove(folder_ / "vocab.json");
  EXPECT_NE(message().find("cannot be opened"), std::string::npos) << message();
}

}  // namespace

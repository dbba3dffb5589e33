// Model and data files are bytes that nobody has checked before us: every way to break one gives a clear error.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "../decoder.hpp"
#include "../evaluation_set.hpp"
#include "../safetensors.hpp"

namespace {

using vlm::BadFile;
using vlm::Safetensors;

/// A file with this header and `data_bytes` of data.
std::string file_of(const std::string& header, std::size_t data_bytes) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>(header.size() >> (8 * i) & 0xff);
  return bytes + header + std::string(data_bytes, '\0');
}

std::string one_array(const std::string& entry) { return R"({"a":)" + entry + "}"; }

std::string message_of(const std::string& bytes) {
  try {
    Safetensors::parse(bytes, "model");
  } catch (const BadFile& error) {
    return error.what();
  }
  return "no error";
}

TEST(SafetensorsTest, ReadsWhatIsThere) {
  std::string bytes = file_of(
      R"({"__metadata__":{"step":"7"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"none":{"dtype":"F32","shape":[0,3],"data_offsets":[8,8]}}   )",
      8);
  const float values[] = {1.5f, -2};
  std::memcpy(bytes.data() + bytes.size() - 8, values, 8);
  const Safetensors file = Safetensors::parse(bytes, "model");
  EXPECT_EQ(file.arrays().size(), 2u);
  EXPECT_EQ(file.floats("a", {2, 1}), (std::vector<float>{1.5f, -2}));
  EXPECT_TRUE(file.floats("none", {0, 3}).empty());
}

TEST(SafetensorsTest, ArraysNeedNotStandInTheOrderOfTheirNames) {
  const Safetensors file = Safetensors::parse(
      file_of(
          R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[4,7]},"b":{"dtype":"F32","shape":[],"data_offsets":[0,4]}})",
          7),
      "model");
  EXPECT_EQ(file.arrays().at("a").begin, 4u);
  EXPECT_EQ(file.floats("b", {}).size(), 1u);
}

struct Broken {
  const char* name;
  std::string bytes;
  const char* sentence;  // part of the message
};

class BrokenFile : public ::testing::TestWithParam<Broken> {};

TEST_P(BrokenFile, IsAClearError) {
  const std::string message = message_of(GetParam().bytes);
  EXPECT_EQ(message.rfind("model: ", 0), 0u) << message;
  EXPECT_NE(message.find(GetParam().sentence), std::string::npos) << message;
}

const std::string good = R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})";

INSTANTIATE_TEST_SUITE_P(
    Safetensors, BrokenFile,
    ::testing::Values(
        Broken{"empty", "", "too short"}, Broken{"length_cut", std::string("\x10\0\0", 3), "too short"},
        Broken{"header_cut", file_of(one_array(good), 8).substr(0, 20), "only 12 follow"},
        Broken{"length_huge", std::string(8, '\xff') + "{}", "must be at most 100000000"},
        Broken{"length_one_more", std::string("\x03\0\0\0\0\0\0\0{}", 10), "only 2 follow"},
        Broken{"header_empty", file_of("", 0), "not JSON"}, Broken{"header_no_json", file_of("{\"a\":", 0), "not JSON"},
        Broken{"header_not_utf8", file_of("{\"\xff\xfe\":1}", 0), "not JSON"},
        Broken{"header_list", file_of("[1]", 0), "must be an object"},
        Broken{"header_number", file_of("1", 0), "must be an object"},
        Broken{"header_deep", file_of(std::string(100000, '['), 0), "nested deeper"},
        Broken{"header_deep_inside", file_of(one_array(R"({"dtype":"F32","shape":[[2]],"data_offsets":[0,8]})"), 8),
               "nested deeper"},
        Broken{"name_twice", file_of(R"({"a":)" + good + R"(,"a":)" + good + "}", 8), "'a' twice"},
        Broken{"field_twice", file_of(one_array(R"({"dtype":"F32","dtype":"I8","shape":[2],"data_offsets":[0,8]})"), 8),
               "'dtype' twice"},
        Broken{"entry_number", file_of(one_array("3"), 0), "must be an object"},
        Broken{"dtype_missing", file_of(one_array(R"({"shape":[2],"data_offsets":[0,8]})"), 8), "dtype is missing"},
        Broken{"dtype_number", file_of(one_array(R"({"dtype":32,"shape":[2],"data_offsets":[0,8]})"), 8),
               "dtype is missing or no text"},
        Broken{"dtype_unknown", file_of(one_array(R"({"dtype":"F33","shape":[2],"data_offsets":[0,8]})"), 8),
               "'F33' is unknown"},
        Broken{"shape_missing", file_of(one_array(R"({"dtype":"F32","data_offsets":[0,8]})"), 8), "shape is missing"},
        Broken{"shape_negative", file_of(one_array(R"({"dtype":"F32","shape":[-2],"data_offsets":[0,8]})"), 8),
               "shape holds -2"},
        Broken{"shape_fraction", file_of(one_array(R"({"dtype":"F32","shape":[2.5],"data_offsets":[0,8]})"), 8),
               "shape holds 2.5"},
        Broken{"shape_beyond_64_bits",
               file_of(one_array(R"({"dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,8]})"), 8),
               "shape holds"},
        Broken{"shape_overflow",
               file_of(one_array(R"({"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,8]})"), 8),
               "more than 2^64 bytes"},
        Broken{"shape_overflows_to_right_size",
               file_of(one_array(R"({"dtype":"F32","shape":[4611686018427387906],"data_offsets":[0,8]})"), 8),
               "more than 2^64 bytes"},
        Broken{"shape_other_size", file_of(one_array(R"({"dtype":"F32","shape":[3],"data_offsets":[0,8]})"), 8),
               "takes 12"},
        Broken{"offsets_missing", file_of(one_array(R"({"dtype":"F32","shape":[2]})"), 8), "data_offsets is missing"},
        Broken{"offsets_three", file_of(one_array(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8,16]})"), 8),
               "must be [begin, end]"},
        Broken{"offsets_backwards", file_of(one_array(R"({"dtype":"F32","shape":[2],"data_offsets":[8,0]})"), 8),
               "must be [begin, end]"},
        Broken{"offsets_past_the_end", file_of(one_array(R"({"dtype":"F32","shape":[2],"data_offsets":[4,12]})"), 8),
               "end <= 8"},
        Broken{"offsets_wrap",
               file_of(one_array(R"({"dtype":"F32","shape":[2],"data_offsets":[18446744073709551608,0]})"), 8),
               "must be [begin, end]"},
        Broken{"data_cut", file_of(one_array(good), 7), "end <= 7"},
        Broken{"data_left_over", file_of(one_array(good), 9), "1 bytes at the end belong to no array"},
        Broken{"hole", file_of(one_array(R"({"dtype":"F32","shape":[1],"data_offsets":[4,8]})"), 8),
               "leave a hole at byte 0"},
        Broken{"overlap", file_of(R"({"a":)" + good + R"(,"b":)" + good + "}", 8), "overlap at byte 0"}),
    [](const auto& broken) { return std::string(broken.param.name); });

TEST(SafetensorsTest, AsksForTypeAndShapeByName) {
  const Safetensors file = Safetensors::parse(
      file_of(
          R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[1],"data_offsets":[8,10]}})",
          10),
      "model");
  EXPECT_THROW(file.floats("c", {2}), BadFile);
  EXPECT_THROW(file.floats("a", {1, 2}), BadFile);
  EXPECT_THROW(file.floats("b", {1}), BadFile);
  EXPECT_THROW(Safetensors::open("no such file"), BadFile);
  EXPECT_THROW(Safetensors::open(KVPARE_VLM_DATA), BadFile) << "a folder";
}

std::string model_bytes() { return vlm::read_bytes(KVPARE_VLM_DATA "/vlm.safetensors"); }

TEST(SafetensorsTest, EveryCutOfTheModelIsRefused) {
  const std::string bytes = model_bytes();
  const std::size_t header_end = 8 + 3376;
  for (std::size_t size = 0; size < bytes.size(); size += size < header_end ? 13 : 99991)
    EXPECT_NE(message_of(bytes.substr(0, size)), "no error") << size << " bytes";
  EXPECT_EQ(message_of(bytes), "no error");
}

TEST(SafetensorsTest, DamagedHeadersNeverReadOutOfBounds) {
  // Whatever a damaged header says, reading is refused or stays within the file (the sanitizer build watches).
  const std::string bytes = model_bytes();
  std::mt19937 random(1);
  for (int round = 0; round < 400; ++round) {
    std::string damaged = bytes;
    for (int i = 0; i < 1 + round % 4; ++i) damaged[random() % (8 + 3376)] = static_cast<char>(random());
    try {
      const Safetensors file = Safetensors::parse(damaged, "model");
      for (const auto& [name, array] : file.arrays()) {
        if (array.dtype == "F32") {
          EXPECT_EQ(file.floats(name, array.shape).size() * 4, array.end - array.begin);
        }
      }
    } catch (const BadFile&) {
    }
  }
}

TEST(DecoderTest, SaysWhichWeightIsMissing) {
  try {
    vlm::Decoder decoder(Safetensors::parse(file_of("{}", 0), "model"));
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

TEST_F(EvaluationSetTest, DamageIsAClearError) {
  const std::string lines = vlm::read_bytes((folder_ / "eval128.jsonl").string());
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

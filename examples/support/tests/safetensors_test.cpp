// Model and data files are bytes that nobody has checked before us: every way to break one gives a clear error.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <kvpare/core/dtype.hpp>
#include <random>
#include <span>
#include <stdexcept>
#include <vector>

#include "support/safetensors.hpp"

namespace {

using example::BadFile;
using example::Safetensors;
using example::SafetensorsWriter;

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
  EXPECT_EQ(file.metadata(), (Safetensors::Metadata{{"step", "7"}}));
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
        Broken{"metadata_list", file_of(R"({"__metadata__":["a"]})", 0), "__metadata__ is array, must be an object"},
        Broken{"metadata_number", file_of(R"({"__metadata__":{"step":7}})", 0), "'step' is number, must be a text"},
        Broken{"hole", file_of(one_array(R"({"dtype":"F32","shape":[1],"data_offsets":[4,8]})"), 8),
               "leave a hole at byte 0"},
        Broken{"overlap", file_of(R"({"a":)" + good + R"(,"b":)" + good + "}", 8), "overlap at byte 0"}),
    [](const auto& broken) { return std::string(broken.param.name); });

TEST(SafetensorsTest, AsksForTypeAndShapeByName) {
  const Safetensors file = Safetensors::parse(
      file_of(
          R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[1],"data_offsets":[8,10]},)"
          R"("n":{"dtype":"I16","shape":[1],"data_offsets":[10,12]}})",
          12),
      "model");
  EXPECT_THROW(file.floats("c", {2}), BadFile);
  EXPECT_THROW(file.raw("c"), BadFile);
  EXPECT_THROW(file.floats("a", {1, 2}), BadFile);
  EXPECT_THROW(file.bytes("a", {2}), BadFile);
  EXPECT_THROW(file.integers("a", {2}), BadFile);
  EXPECT_THROW(file.floats("n", {1}), BadFile);
  try {
    file.integers("b", {1});
    FAIL() << "took BF16 for I32";
  } catch (const BadFile& error) {
    EXPECT_STREQ(error.what(), "model: array 'b': dtype BF16, must be I32");
  }
  EXPECT_THROW(Safetensors::open("no such file"), BadFile);
  EXPECT_THROW(Safetensors::open(::testing::TempDir()), BadFile) << "a folder";
}

/// Arrays of every type that can be read.
struct Sample {
  std::vector<float> floats = {1.5f, -2, 0.1f, 65504, 0, 1e-3f};
  std::vector<kvpare::half> halves;
  std::vector<kvpare::bfloat16> bfloats;
  std::vector<std::uint8_t> small = {0, 7, 255};
  std::vector<std::int32_t> whole = {-1, 0, 2147483647};
  Sample() {
    for (const float value : floats) halves.emplace_back(value), bfloats.emplace_back(value);
  }
};

void add_sample(SafetensorsWriter& out, const Sample& sample) {
  out.add("a small one", {3}, std::span(sample.small));
  out.add("floats", {2, 3}, std::span(sample.floats));
  out.add("whole", {3, 1}, std::span(sample.whole));
  out.add("halves", "F16", {6}, std::as_bytes(std::span(sample.halves)));
  out.add("bfloats", "BF16", {3, 2}, std::as_bytes(std::span(sample.bfloats)));
  out.add("none", {0, 5}, std::span<const float>());
  out.metadata = {{"step", "7"}, {"note", "Grüße, \"quoted\""}};
}

std::string sample_bytes() {
  const Sample sample;
  SafetensorsWriter out;
  add_sample(out, sample);
  return out.bytes();
}

TEST(SafetensorsTest, WhatIsWrittenIsReadBack) {
  const Sample sample;
  SafetensorsWriter out;
  add_sample(out, sample);
  const Safetensors file = Safetensors::parse(out.bytes(), "sample");
  EXPECT_EQ(file.metadata(), out.metadata);
  EXPECT_EQ(file.arrays().size(), 6u);
  EXPECT_EQ(file.floats("floats", {2, 3}), sample.floats);
  EXPECT_EQ(file.bytes("a small one", {3}), sample.small);
  EXPECT_EQ(file.integers("whole", {3, 1}), sample.whole);
  EXPECT_TRUE(file.floats("none", {0, 5}).empty());
  for (std::size_t i = 0; i < sample.floats.size(); ++i) {
    EXPECT_EQ(file.floats("halves", {6})[i], static_cast<float>(sample.halves[i]));
    EXPECT_EQ(file.floats("bfloats", {3, 2})[i], static_cast<float>(sample.bfloats[i]));
  }
  const auto raw = file.raw("halves");
  EXPECT_TRUE(std::ranges::equal(raw, std::as_bytes(std::span(sample.halves))));
  for (const auto& [name, array] : file.arrays()) {
    EXPECT_EQ(array.begin % (array.dtype == "F32" || array.dtype == "I32" ? 4
                             : array.dtype == "U8"                        ? 1
                                                                          : 2),
              0u)
        << name;
  }
}

TEST(SafetensorsTest, TheOrderOfAddingDoesNotShow) {
  const std::vector<float> one = {1}, two = {2, 2};
  const std::vector<std::uint8_t> three = {3};
  SafetensorsWriter forwards, backwards;
  forwards.add("a", {1}, std::span(one)), forwards.add("b", {2}, std::span(two)),
      forwards.add("c", {1}, std::span(three));
  backwards.add("c", {1}, std::span(three)), backwards.add("b", {2}, std::span(two)),
      backwards.add("a", {1}, std::span(one));
  EXPECT_EQ(forwards.bytes(), backwards.bytes());
  EXPECT_EQ(SafetensorsWriter().bytes(), std::string("\x08\0\0\0\0\0\0\0{}      ", 16));
  // Spelt out once, so that a change of the form is noticed.
  const std::string header =
      R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]},)"
      R"("c":{"dtype":"U8","shape":[1],"data_offsets":[12,13]}})";
  EXPECT_EQ(forwards.bytes().substr(8, header.size()), header);
}

TEST(SafetensorsTest, TheWriterRefusesWhatTheReaderWould) {
  const std::vector<float> one = {1};
  SafetensorsWriter out;
  out.add("a", {1}, std::span(one));
  EXPECT_THROW(out.add("a", {1}, std::span(one)), std::invalid_argument) << "twice";
  EXPECT_THROW(out.add("b", {2}, std::span(one)), std::invalid_argument) << "too few values";
  EXPECT_THROW(out.add("b", {}, std::span<const float>()), std::invalid_argument) << "a single value is missing";
  EXPECT_THROW(out.add("b", "F33", {1}, std::as_bytes(std::span(one))), std::invalid_argument);
  EXPECT_THROW(out.add("b", {4294967296, 4294967296}, std::span(one)), std::invalid_argument);
  EXPECT_THROW(out.add("__metadata__", {1}, std::span(one)), std::invalid_argument);
  EXPECT_EQ(Safetensors::parse(out.bytes(), "a").arrays().size(), 1u);
  out.metadata["no UTF-8"] = "\xff";
  EXPECT_THROW(out.bytes(), std::invalid_argument);
  EXPECT_THROW(SafetensorsWriter().write(::testing::TempDir() + "no such folder/file"), BadFile);
}

TEST(SafetensorsTest, EveryCutIsRefused) {
  const std::string bytes = sample_bytes();
  for (std::size_t size = 0; size < bytes.size(); ++size)
    EXPECT_NE(message_of(bytes.substr(0, size)), "no error") << size << " bytes";
  EXPECT_EQ(message_of(bytes), "no error");
}

TEST(SafetensorsTest, DamagedHeadersNeverReadOutOfBounds) {
  // Whatever a damaged header says, reading is refused or stays within the file (the sanitizer build watches).
  const std::string bytes = sample_bytes();
  const std::size_t header_end = bytes.rfind('}');
  std::mt19937 random(1);
  int accepted = 0;
  for (int round = 0; round < 4000; ++round) {
    std::string damaged = bytes;
    for (int i = 0; i < 1 + round % 4; ++i) damaged[random() % header_end] = static_cast<char>(random());
    try {
      const Safetensors file = Safetensors::parse(damaged, "model");
      for (const auto& [name, array] : file.arrays()) {
        EXPECT_EQ(file.raw(name).size(), array.end - array.begin);
        if (array.dtype == "F32") {
          EXPECT_EQ(file.floats(name, array.shape).size() * 4, array.end - array.begin);
        }
      }
      ++accepted;
    } catch (const BadFile&) {
    }
  }
  EXPECT_GT(accepted, 0) << "names may change";
  EXPECT_LT(accepted, 4000);
}

}  // namespace

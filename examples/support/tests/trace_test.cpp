// A trace comes back as it was written, and every way in which its parts can disagree is a sentence.
#include <gtest/gtest.h>

#include <functional>
#include <kvpare/core/dtype.hpp>
#include <kvpare/core/error.hpp>

#include "support/trace.hpp"

namespace {

using example::BadFile;
using example::Index;
using example::Safetensors;
using example::SafetensorsWriter;
using example::Trace;

template <class T>
std::vector<T> noise(Index count, int seed) {
  std::vector<T> values;
  for (Index i = 0; i < count; ++i) values.emplace_back(static_cast<float>((i * 7 + seed * 13) % 31 - 15) / 8);
  return values;
}

template <class T>
void add_layer(Trace& trace, Index tokens, Index q_heads, Index kv_heads, Index key_dim, Index value_dim) {
  const Index layer = std::ssize(trace.layers);
  const int seed = static_cast<int>(layer);
  const auto q = noise<T>(tokens * q_heads * key_dim, seed), k = noise<T>(tokens * kv_heads * key_dim, seed + 1),
             v = noise<T>(tokens * kv_heads * value_dim, seed + 2);
  trace.append(layer, {q.data(), tokens, q_heads, key_dim}, {k.data(), tokens, kv_heads, key_dim},
               {v.data(), tokens, kv_heads, value_dim});
}

/// Two layers that share nothing but their tokens.
Trace sample() {
  Trace trace;
  trace.positions = {0, 1, 2, 5, 9};
  trace.token_class = {4, 0, 1, 1, 0};
  trace.softmax_scale = 0.1f;
  trace.metadata = {{"model", "none"}, {"rope_theta", "10000"}, {"rope_sections", "16,24,24"}};
  add_layer<float>(trace, 5, 4, 2, 8, 6);
  add_layer<kvpare::half>(trace, 5, 3, 1, 4, 4);
  return trace;
}

Trace reread(const Trace& trace) { return example::parse_trace(Safetensors::parse(print_trace(trace, "t"), "t")); }

std::string message_of(const std::function<void()>& what) {
  try {
    what();
  } catch (const BadFile& error) {
    return error.what();
  }
  return "no error";
}

TEST(TraceTest, ComesBackAsItWasWritten) {
  const Trace trace = sample();
  EXPECT_EQ(reread(trace), trace);
  EXPECT_EQ(trace.layers[0].queries.tensor().at(1, 2), trace.layers[0].queries.values.data() + (1 * 4 + 2) * 8 * 4);

  Trace plain;  // nothing that may be left out
  plain.positions = {3};
  add_layer<kvpare::bfloat16>(plain, 1, 2, 2, 3, 5);
  EXPECT_EQ(reread(plain), plain);
}

TEST(TraceTest, TellsShapesAndTypes) {
  const kvpare::Model model = sample().model();
  ASSERT_EQ(model.layers.size(), 2u);
  EXPECT_EQ(model.layers[0],
            (kvpare::LayerShape{.q_heads = 4, .kv_heads = 2, .key_dim = 8, .value_dim = 6, .scale = 0.1f}));
  EXPECT_EQ(model.layers[1],
            (kvpare::LayerShape{.q_heads = 3, .kv_heads = 1, .key_dim = 4, .value_dim = 4, .scale = 0.1f}));
  Trace plain = sample();
  plain.softmax_scale.reset();
  EXPECT_EQ(plain.model().layers[1].scale, 0.5f);
  EXPECT_FALSE(plain.common_dtype());
  Trace turned = sample();
  turned.metadata["rope_pairing"] = "interleaved";
  EXPECT_FALSE(turned.model().layers[0].rope) << "by sections: three numbers a token";
  turned.metadata.erase("rope_sections");
  EXPECT_EQ(turned.model().layers[1].rope, kvpare::rope_of_base(4, 10000, kvpare::RopePairing::interleaved));
  turned.metadata["rope_dim"] = "2", turned.metadata["rope_pairing"] = "halves";
  EXPECT_EQ(turned.model().layers[0].rope, kvpare::rope_of_base(2, 10000));
  turned.metadata["rope_type"] = "yarn";
  EXPECT_FALSE(turned.model().layers[0].rope);
  plain.layers.erase(plain.layers.begin());
  EXPECT_EQ(plain.common_dtype(), kvpare::DType::f16);
}

TEST(TraceTest, ChunksAddUp) {
  Trace whole = sample(), chunked = sample();
  chunked.layers.clear();
  for (const auto& [begin, count] : {std::pair<Index, Index>(0, 2), {2, 3}})
    for (std::size_t l = 0; l < 2; ++l) {
      const auto& [q, k, v] = whole.layers[l];
      chunked.append(static_cast<Index>(l), q.tensor().part(begin, count), k.tensor().part(begin, count),
                     v.tensor().part(begin, count));
    }
  EXPECT_EQ(chunked, whole);
  const auto& [q, k, v] = whole.layers[0];
  EXPECT_THROW(chunked.append(1, q.tensor(), k.tensor(), v.tensor()), kvpare::InvalidArgument) << "rows of layer 0";
}

TEST(TraceTest, RowsMayBeStrided) {
  const auto values = noise<float>(4 * 2 * 3, 0);
  kvpare::View<const float, 3> swapped = kvpare::dense(values.data(), 4, 2, 3);  // [heads, tokens, width] in memory
  swapped.shape[0] = 2, swapped.shape[1] = 4, swapped.stride[0] = 3, swapped.stride[1] = 6;
  example::TraceArray array;
  array.append(swapped);
  const auto* copied = reinterpret_cast<const float*>(array.values.data());
  for (Index t = 0; t < 2; ++t)
    for (Index h = 0; h < 4; ++h)
      for (Index c = 0; c < 3; ++c)
        EXPECT_EQ(copied[(t * 4 + h) * 3 + c], values[static_cast<std::size_t>((h * 2 + t) * 3 + c)]);
}

struct Damage {
  const char* name;
  std::function<void(Trace&)> damage;
  const char* sentence;
};

class DamagedTrace : public ::testing::TestWithParam<Damage> {};

TEST_P(DamagedTrace, IsNotWritten) {
  Trace trace = sample();
  GetParam().damage(trace);
  const std::string message = message_of([&] { print_trace(trace, "file"); });
  EXPECT_EQ(message.rfind("file: ", 0), 0u) << message;
  EXPECT_NE(message.find(GetParam().sentence), std::string::npos) << message;
}

INSTANTIATE_TEST_SUITE_P(
    Trace, DamagedTrace,
    ::testing::Values(
        Damage{"no_layers", [](Trace& trace) { trace.layers.clear(); }, "no layers"},
        Damage{"no_tokens", [](Trace& trace) { trace = {}, add_layer<float>(trace, 0, 1, 1, 1, 1); }, "no tokens"},
        Damage{"equal_positions", [](Trace& trace) { trace.positions[3] = 2; }, "positions: 2 of token 3 follows 2"},
        Damage{"negative_position", [](Trace& trace) { trace.positions[0] = -1; },
               "positions: -1 of token 0 comes first"},
        Damage{"last_position", [](Trace& trace) { trace.positions[4] = 2147483647; }, "stay below 2147483647"},
        Damage{"classes_short", [](Trace& trace) { trace.token_class.pop_back(); },
               "token_class: 4 tokens, positions: 5"},
        Damage{"class_32", [](Trace& trace) { trace.token_class[1] = 32; },
               "token_class: 32 of token 1, must be below 32"},
        Damage{"scale_0", [](Trace& trace) { trace.softmax_scale = 0.0f; }, "softmax_scale is 0, must be positive"},
        Damage{"scale_twice", [](Trace& trace) { trace.metadata["softmax_scale"] = "1"; }, "among the other texts"},
        Damage{"tokens_differ", [](Trace& trace) { trace.positions.push_back(10), trace.token_class.push_back(0); },
               "array 'layers.0.q': 5 tokens, positions: 6"},
        Damage{"heads_not_divisible",
               [](Trace& trace) { trace.layers.clear(), add_layer<float>(trace, 5, 3, 2, 4, 4); },
               "layer 0: 3 query heads, must be a multiple of its 2 kv heads"},
        Damage{"kv_heads_differ", [](Trace& trace) { std::swap(trace.layers[0].values, trace.layers[1].values); },
               "layer 0: values have 1 heads, keys 2"},
        Damage{"widths_differ",
               [](Trace& trace) {
                 Trace other;
                 add_layer<float>(other, 5, 4, 2, 6, 6);
                 trace.layers[0].keys = other.layers[0].keys;
               },
               "layer 0: queries are 8 wide, keys 6"},
        Damage{"bytes_missing", [](Trace& trace) { trace.layers[1].keys.values.pop_back(); },
               "do not fill shape [5, 1, 4]"}),
    [](const auto& damage) { return std::string(damage.param.name); });

/// A file that is a trace but for what `change` does to it.
class TraceFileTest : public ::testing::Test {
 protected:
  template <class T>
  void put(const std::string& name, const std::string& dtype, Safetensors::Shape shape, std::vector<T> values) {
    const auto bytes = std::as_bytes(std::span(values));
    arrays_[name] = {dtype, std::move(shape), std::vector<std::byte>(bytes.begin(), bytes.end())};
  }
  void SetUp() override {
    const std::vector<float> row = {1, 2, 3, 4};
    put("positions", "I32", {2}, std::vector<std::int32_t>{0, 1});
    for (const char* which : {"q", "k", "v"}) put(std::string("layers.0.") + which, "F32", {2, 1, 2}, row);
  }
  std::string message() const {
    SafetensorsWriter out;
    out.metadata = metadata_;
    for (const auto& [name, a] : arrays_) out.add(name, a.dtype, a.shape, a.values);
    return message_of([&] { example::parse_trace(Safetensors::parse(out.bytes(), "file")); });
  }
  struct Array {
    std::string dtype;
    Safetensors::Shape shape;
    std::vector<std::byte> values;
  };
  std::map<std::string, Array> arrays_;
  Safetensors::Metadata metadata_;
};

TEST_F(TraceFileTest, OnlyWhatATraceHasIsAccepted) {
  EXPECT_EQ(message(), "no error");
  const auto good = arrays_;
  const auto after = [&](const std::function<void()>& change) {
    arrays_ = good, metadata_.clear();
    change();
    return message();
  };
  const auto rename = [&](const char* from, const char* to) {
    auto node = arrays_.extract(from);
    node.key() = to;
    arrays_.insert(std::move(node));
  };
  const std::vector<float> four = {1, 2, 3, 4};
  EXPECT_EQ(after([&] { arrays_.erase("layers.0.k"); }), "file: array 'layers.0.k' is missing");
  EXPECT_EQ(after([&] { arrays_.erase("positions"); }), "file: array 'positions' is missing");
  EXPECT_EQ(after([&] { std::erase_if(arrays_, [](auto& a) { return a.first != "positions"; }); }),
            "file: no layers: array 'layers.0.q' is missing");
  for (const char* other :
       {"layers.0.x", "layers.00.q", "layers..q", "layers.-1.q", "layer.0.q", "positions2", "layers.q"})
    EXPECT_EQ(after([&] { rename("layers.0.q", other); }),
              std::string("file: array '") + other +
                  "' is no part of a trace; known: layers.N.q, layers.N.k, layers.N.v, positions, token_class");
  EXPECT_EQ(after([&] {
              put("layers.2.q", "F32", {2, 1, 2}, four);
            }),
            "file: layer 1 is missing although there is a layer 2, layers must be numbered from 0 without a gap");
  EXPECT_EQ(after([&] {
              put("layers.0.v", "F64", {2, 1, 1}, four);
            }),
            "file: array 'layers.0.v': dtype F64, must be F32, F16 or BF16");
  EXPECT_EQ(after([&] {
              put("layers.0.v", "F32", {2, 2}, four);
            }),
            "file: array 'layers.0.v': shape [2, 2], must be [tokens, heads, width]");
  EXPECT_EQ(after([&] {
              put("layers.0.v", "F32", {2, 0, 2}, std::vector<float>());
            }),
            "file: array 'layers.0.v': shape [2, 0, 2], must have a head and a width within [1, 4096]");
  EXPECT_EQ(after([&] {
              put("layers.0.v", "F32", {0, 4294967296, 2}, std::vector<float>());
            }),
            "file: array 'layers.0.v': shape [0, 4294967296, 2], no extent may exceed 2147483647");
  EXPECT_EQ(after([&] {
              put("positions", "I64", {2}, std::vector<std::int64_t>{0, 1});
            }),
            "file: array 'positions': dtype I64, must be I32");
  EXPECT_EQ(after([&] {
              put("positions", "I32", {2, 1}, std::vector<std::int32_t>{0, 1});
            }),
            "file: array 'positions': shape [2, 1], must be [tokens]");
  EXPECT_EQ(after([&] { put("token_class", "U8", {0}, std::vector<std::uint8_t>()); }),
            "file: token_class: 0 tokens, positions: 2, must be the same");
  EXPECT_EQ(after([&] { metadata_["softmax_scale"] = "1/8"; }), "file: softmax_scale is '1/8', must be a number");
  EXPECT_EQ(after([&] { metadata_["softmax_scale"] = "inf"; }),
            "file: softmax_scale is inf, must be positive and finite");
  EXPECT_EQ(after([&] { metadata_["rope_theta"] = "whatever"; }), "no error") << "without a pairing nothing reads it";
  EXPECT_EQ(after([&] { metadata_["rope_theta"] = "whatever", metadata_["rope_pairing"] = "halves"; }),
            "file: rope_theta is 'whatever', must be a number above 1");
  EXPECT_EQ(after([&] { metadata_["rope_theta"] = "10000", metadata_["rope_pairing"] = "thirds"; }),
            "file: rope_pairing is 'thirds', must be halves or interleaved");
}

}  // namespace

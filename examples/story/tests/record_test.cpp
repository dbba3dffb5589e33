// A recorded text is what an attention of textbook kind is given for it.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <numeric>

#include "../record.hpp"
#include "tiny_model.hpp"

namespace {

using namespace story;
using namespace story::tests;

constexpr Shape shape{
    .width = 24, .hidden_width = 20, .layers = 3, .q_heads = 6, .kv_heads = 2, .vocabulary = 30, .longest = 90};

float at(const kvpare::ConstTensor& t, Index row, Index head, Index i) {
  return static_cast<const float*>(t.at(row, head))[i];
}

/// Attention of a whole text at once, dense; what it was given stays here.
struct Dense {
  example::Trace given;
  void operator()(const LayerRows& rows) {
    given.append(rows.layer, rows.queries, rows.keys, rows.values);
    const Index group = rows.queries.heads / rows.keys.heads, width = rows.keys.width;
    for (Index t = 0; t < rows.queries.rows; ++t)
      for (Index h = 0; h < rows.queries.heads; ++h) {
        std::vector<double> weights;
        for (Index j = 0; j <= t; ++j) {
          double dot = 0;
          for (Index i = 0; i < width; ++i) dot += at(rows.queries, t, h, i) * at(rows.keys, j, h / group, i);
          weights.push_back(std::exp(dot / std::sqrt(static_cast<double>(width))));
        }
        const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
        for (Index i = 0; i < width; ++i) {
          double out = 0;
          for (Index j = 0; j <= t; ++j)
            out += weights[static_cast<std::size_t>(j)] / sum * at(rows.values, j, h / group, i);
          static_cast<float*>(rows.out.at(t, h))[i] = static_cast<float>(out);
        }
      }
  }
};

void expect_near(const example::TraceArray& got, const example::TraceArray& wanted, const char* what,
                 std::size_t layer) {
  ASSERT_EQ(got.rows, wanted.rows) << what << " of layer " << layer;
  ASSERT_EQ(got.heads, wanted.heads);
  ASSERT_EQ(got.width, wanted.width);
  for (Index t = 0; t < got.rows; ++t)
    for (Index h = 0; h < got.heads; ++h)
      for (Index i = 0; i < got.width; ++i)
        ASSERT_NEAR(at(got.tensor(), t, h, i), at(wanted.tensor(), t, h, i), 1e-4)
            << what << " of layer " << layer << ", token " << t << ", head " << h << ", channel " << i;
}

TEST(RecordTest, TheFileHoldsWhatAttentionWasGiven) {
  const Decoder decoder(parse_model(model_bytes(shape, false, 4), "model"));
  std::vector<int> tokens;
  for (std::uint64_t i = 0; i < 80; ++i) tokens.push_back(static_cast<int>(kvpare::random_bits(1, i) % 30));
  Dense dense;
  decoder.forward(tokens, 0, std::ref(dense));

  std::string file = ::testing::TempDir() + "kvpare_story_XXXXXX";
  const int descriptor = mkstemp(file.data());
  ASSERT_NE(descriptor, -1);
  close(descriptor);
  example::write_trace(file, record_text(decoder, tokens));
  const example::Trace trace = example::read_trace(file);
  std::filesystem::remove(file);

  std::vector<Position> positions(80);
  std::iota(positions.begin(), positions.end(), 0);
  EXPECT_EQ(trace.positions, positions);
  EXPECT_EQ(trace.model(), decoder.attention_shapes());
  EXPECT_EQ(trace.metadata.at("rope_theta"), "10000");
  EXPECT_EQ(trace.metadata.at("rope_pairing"), "interleaved");
  ASSERT_EQ(trace.layers.size(), 3u);
  for (std::size_t l = 0; l < 3; ++l) {
    expect_near(trace.layers[l].queries, dense.given.layers[l].queries, "queries", l);
    expect_near(trace.layers[l].keys, dense.given.layers[l].keys, "keys", l);
    expect_near(trace.layers[l].values, dense.given.layers[l].values, "values", l);
  }
}

}  // namespace

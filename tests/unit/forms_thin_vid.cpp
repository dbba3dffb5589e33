// Thin keys and VidKV's in a cache: their states are made of what the cache has seen, their pages decode by them.
#include <gtest/gtest.h>

#include <cmath>
#include <kvpare/codec/vid_kv.hpp>
#include <kvpare/kvpare.hpp>

#include "kvpare/policy/score/recent_maximum.hpp"
#include "oracle/think.hpp"
#include "oracle/vid_kv.hpp"
#include "support/codec_tiles.hpp"

namespace kvpare {
namespace {

using Half = Raw<half>;
using Thin8 = Thin<Int8, 40, 8>;
using Cache = KvCache<cpu::Backend, Formats<Pair<Half, Half>, Pair<Thin8, Half>, Pair<VidKvKeys<>, VidKvValues<>>>>;

constexpr Index width = 64, page = 32, heads = 2, group = 2, tokens = 96, looks = 40;

struct Text {
  cpu::Backend backend{{.threads = 1}};
  Cache cache{backend,
              {{{.q_heads = heads * group, .kv_heads = heads, .key_dim = width, .value_dim = width, .scale = 0.1f}}},
              {.page_tokens = page, .pool_bytes = 1 << 22}};
  SequenceId id = cache.create();
  std::vector<half> keys, queries;

  Text() {
    std::vector<Position> at;
    for (Index i = 0; i < tokens * heads * width; ++i)
      keys.emplace_back(test::gaussian(1, i) * (1 + static_cast<float>(i % width * 13 % 31)));
    for (Index i = 0; i < looks * heads * group * width; ++i)
      queries.emplace_back(test::gaussian(2, i) * (1 + static_cast<float>(i % width * 7 % 29)));
    for (Index t = 0; t < tokens; ++t) at.push_back(static_cast<Position>(t));
    const ConstTensor rows(keys.data(), tokens, heads, width);
    EXPECT_EQ(cache.append(id, 0, rows, rows, at), Outcome::done);
  }
  CompressReport compress(Form form) {
    Precision precision;
    precision.said = "test", precision.kept = std::move(form);
    precision.keep_raw_keys = precision.keep_raw_values = 0;
    const Compressor<RecentMaximum, Uniform, TopK, Precision> method{RecentMaximum{.rows = 1, .every = 1}, Uniform{},
                                                                     TopK{}, Keep::ratio(1), precision};
    std::vector<Position> at;
    for (Index r = 0; r < looks; ++r) at.push_back(static_cast<Position>(tokens - looks + r));
    cache.observe(id, 0, method, ConstTensor(queries.data(), looks, heads * group, width), at);
    return cache.compress(id, method);
  }
  float key(Index t, Index h, Index c) const {
    return static_cast<float>(keys[static_cast<std::size_t>((t * heads + h) * width + c)]);
  }
  /// Rows of a head as they are read back, in list order.
  std::vector<float> read(Index head) {
    const HeadPages list = cache.pages(id, 0)[static_cast<std::size_t>(head)];
    EXPECT_EQ(list.live_tokens(), tokens);
    const Buffer<cpu::Backend, float> out(backend, tokens * width);
    const GatherRow rows[] = {{list, Side::keys, nullptr, width, out.data()}};
    backend.gather(rows);
    return {out.data(), out.data() + tokens * width};
  }
};

TEST(FormsThinVid, ThinKeysLoseWhatTheNewestQueriesDoNotLookAt) {
  Text text;
  EXPECT_EQ(text.compress({"thin40a8_int8", "half"}).tokens_changed, heads * tokens);
  for (Index h = 0; h < heads; ++h) {
    oracle::Array3 queries(32, group, width);  // the newest 32 of 40
    oracle::Array2 keys(tokens, width);
    for (Index r = 0; r < 32; ++r)
      for (Index g = 0; g < group; ++g)
        for (Index c = 0; c < width; ++c)
          queries.at(r, g, c) = static_cast<double>(static_cast<float>(
              text.queries[static_cast<std::size_t>(((r + looks - 32) * heads * group + h * group + g) * width + c)]));
    for (Index t = 0; t < tokens; ++t)
      for (Index c = 0; c < width; ++c) keys.at(t, c) = static_cast<double>(text.key(t, h, c));
    const auto kept = oracle::think_kept(oracle::think_scores_as_released(queries, keys), 40, 8);
    const std::vector<float> got = text.read(h);
    for (Index t = 0; t < tokens; ++t)
      for (Index c = 0; c < width; ++c) {
        const float x = got[static_cast<std::size_t>(t * width + c)];
        if (std::find(kept.begin(), kept.end(), c) == kept.end())
          ASSERT_EQ(x, 0.0f) << "head " << h << " token " << t << " channel " << c;
        else
          ASSERT_NEAR(x, text.key(t, h, c), 0.6f) << "head " << h << " token " << t << " channel " << c;
      }
  }
}

TEST(FormsThinVid, VidKvOrdersChannelsByTheWholeLayer) {
  Text text;
  EXPECT_EQ(text.compress({"vid_kv50_g32", "ternary_channel_g32"}).tokens_changed, heads * tokens);
  oracle::Array3 all(tokens, heads, width);
  for (Index t = 0; t < tokens; ++t)
    for (Index h = 0; h < heads; ++h)
      for (Index c = 0; c < width; ++c) all.at(t, h, c) = static_cast<double>(text.key(t, h, c));
  const auto abnormal = oracle::abnormal_channels(all, 50);
  std::vector<float> state;
  for (const bool wide : {true, false})
    for (Index c = 0; c < width; ++c)
      if (abnormal[static_cast<std::size_t>(c)] == wide) state.push_back(static_cast<float>(c));
  for (Index h = 0; h < heads; ++h) {
    const std::vector<float> got = text.read(h);
    for (Index first = 0; first < tokens; first += page) {
      std::vector<float> rows;
      for (Index t = first; t < first + page; ++t)
        for (Index c = 0; c < width; ++c) rows.push_back(text.key(t, h, c));
      test::GuardedTile<VidKvKeys<>> tile({page, width});
      tile.encode(rows, 0, state.data());
      for (Index t = 0; t < page; ++t)
        EXPECT_EQ(tile.decode(t, state.data()),
                  std::vector<float>(got.begin() + (first + t) * width, got.begin() + (first + t + 1) * width));
    }
  }
}

}  // namespace
}  // namespace kvpare

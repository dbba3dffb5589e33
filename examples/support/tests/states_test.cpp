// States on file, and given to a cache.
#include "support/states.hpp"

#include <gtest/gtest.h>

#include <kvpare/codec/kv_quant.hpp>
#include <kvpare/kvpare.hpp>

namespace {

using example::BadFile;
using example::States;

std::string written(const char* name) { return ::testing::TempDir() + name; }

std::string message_of(const std::string& path) {
  try {
    example::read_states(path);
  } catch (const BadFile& error) {
    return error.what();
  }
  return "no error";
}

TEST(States, ComeBackAsTheyWent) {
  const States states{{"a", "b"}, {{{1, 2}, {}}, {{1, 2}, {3}}, {{}, {4}}}};
  const std::string path = written("states.safetensors");
  example::write_states(path, states);
  EXPECT_EQ(example::read_states(path), states);
}

TEST(States, OtherFilesAreRefused) {
  const std::string path = written("others.safetensors");
  example::SafetensorsWriter file;
  const std::vector<float> x = {1};
  file.add("layers.0.keys", {1}, std::span<const float>(x));
  file.write(path);
  EXPECT_NE(message_of(path).find("no text 'format'"), std::string::npos) << message_of(path);
  file.metadata = {{"format", "kvpare states"}, {"form", "a b"}};
  file.write(path);
  EXPECT_NE(message_of(path).find("form is 'a b'"), std::string::npos) << message_of(path);
  file.metadata["form"] = "a/b";
  file.write(path);
  EXPECT_EQ(message_of(path), "no error");
  file.add("layers.2.keys", {1}, std::span<const float>(x));
  file.write(path);
  EXPECT_NE(message_of(path).find("1 arrays beside layers.0 to layers.0"), std::string::npos) << message_of(path);
  example::SafetensorsWriter empty;
  empty.metadata = file.metadata;
  empty.write(path);
  EXPECT_NE(message_of(path).find("no layers.0.keys"), std::string::npos) << message_of(path);
}

TEST(States, LayersInARowShareMemory) {
  using Half = kvpare::Raw<kvpare::half>;
  using Codes = kvpare::KvQuantValues<2>;
  using Cache = kvpare::KvCache<kvpare::cpu::Backend, kvpare::Formats<kvpare::Pair<Half, Half>, kvpare::Pair<Codes, Codes>>>;
  const kvpare::LayerShape shape{.q_heads = 2, .kv_heads = 2, .key_dim = 16, .value_dim = 16, .scale = 1};
  kvpare::cpu::Backend backend({.threads = 1});
  Cache cache(backend, {{shape, shape, shape}}, {.page_tokens = 16, .pool_bytes = 1 << 20});
  const auto floats = static_cast<std::size_t>(2 * kvpare::state_floats<Codes>(16));
  const States::Layer first{std::vector<float>(floats, 0.5f), std::vector<float>(floats, 0.25f)};
  States::Layer other = first;
  other.keys[0] = 0;
  States states{{Codes::name, Codes::name}, {first, first}};
  EXPECT_THROW(example::share_states(cache, states), kvpare::InvalidArgument) << "two layers of three";
  states.layers.push_back(other);
  example::share_states(cache, states);
  EXPECT_EQ(cache.shared_state_bytes(), static_cast<kvpare::Index>(2 * 2 * floats * 4));
  const kvpare::SequenceId id = cache.create();
  EXPECT_EQ(cache.pages(id, 0)[1].states[0].keys, cache.pages(id, 1)[1].states[0].keys);
  EXPECT_EQ(*cache.pages(id, 2)[0].states[0].keys, 0);
  EXPECT_EQ(*cache.pages(id, 2)[1].states[0].values, 0.25f);
  states.form = kvpare::Form("half", "int4");
  EXPECT_THROW(example::share_states(cache, states), kvpare::InvalidArgument) << "no pages of that form";
}

}  // namespace

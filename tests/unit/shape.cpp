// What is refused in the shape of a model, and with which words.
#include <gtest/gtest.h>

#include <kvpare/core/shape.hpp>
#include <limits>
#include <string>

namespace kvpare {
namespace {

std::string error_of(const LayerShape& shape) {
  try {
    check(Model{{{.q_heads = 1, .kv_heads = 1, .key_dim = 1, .value_dim = 1, .scale = 1}, shape}});
  } catch (const InvalidArgument& e) {
    return e.what();
  }
  return "no error";
}

LayerShape right() { return {.q_heads = 8, .kv_heads = 2, .key_dim = 64, .value_dim = 32, .scale = 0.125f}; }

template <class Change>
std::string error_after(Change&& change) {
  LayerShape shape = right();
  change(shape);
  return error_of(shape);
}

TEST(Shape, WhatMakesSenseIsTaken) {
  EXPECT_EQ(error_of(right()), "no error");
  EXPECT_EQ(right().group(), 4);
  EXPECT_EQ(error_after([](auto& s) { s.sink_logits.assign(8, 0); }), "no error");
  EXPECT_EQ(error_after([](auto& s) { s.key_dim = 4096, s.value_dim = 4096; }), "no error");
}

TEST(Shape, WhatMakesNoneIsNamed) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(error_after([](auto& s) { s.kv_heads = 0; }), "layer 1: kv_heads = 0, must be at least 1");
  for (const Index heads : {0, -2, 7})
    EXPECT_EQ(error_after([&](auto& s) { s.q_heads = heads; }),
              "layer 1: q_heads = " + std::to_string(heads) + ", must be a positive multiple of kv_heads = 2");
  for (const Index width : {0, -1, 4097}) {
    EXPECT_EQ(error_after([&](auto& s) { s.key_dim = width; }), "layer 1: key_dim = " + std::to_string(width) + ", must be within [1, 4096]");
    EXPECT_EQ(error_after([&](auto& s) { s.value_dim = width; }), "layer 1: value_dim = " + std::to_string(width) + ", must be within [1, 4096]");
  }
  EXPECT_EQ(error_after([](auto& s) { s.scale = 0; }), "layer 1: scale = 0, must be positive and finite (usually 1 / sqrt(key_dim))");
  EXPECT_EQ(error_after([&](auto& s) { s.scale = nan; }), "layer 1: scale = nan, must be positive and finite (usually 1 / sqrt(key_dim))");
  EXPECT_EQ(error_after([](auto& s) { s.scale = std::numeric_limits<float>::infinity(); }),
            "layer 1: scale = inf, must be positive and finite (usually 1 / sqrt(key_dim))");
  EXPECT_EQ(error_after([](auto& s) { s.softcap = -1; }), "layer 1: softcap = -1, must be 0 (none) or positive and finite");
  EXPECT_EQ(error_after([&](auto& s) { s.softcap = nan; }), "layer 1: softcap = nan, must be 0 (none) or positive and finite");
  EXPECT_EQ(error_after([](auto& s) { s.window = -1; }), "layer 1: window = -1, must be 0 (none) or positive");
  EXPECT_EQ(error_after([](auto& s) { s.sink_logits = {1, 2}; }), "layer 1: 2 sink logits, must be none or one per query head (8)");
}

}  // namespace
}  // namespace kvpare

// Tags: spans that never overlap, later ones win; sets of classes and their names.
#include <gtest/gtest.h>

#include <kvpare/cache/tags.hpp>
#include <kvpare/core/random.hpp>
#include <string>
#include <vector>

namespace kvpare {
namespace {

TagSpan span(Position begin, Position end, TokenClass c = TokenClass::image, bool is_protected = false) {
  return {.begin = begin, .end = end, .token_class = c, .is_protected = is_protected};
}

TEST(Tags, WhatNoSpanCoversIsUnprotectedText) {
  Tags tags;
  tags.add(span(10, 20));
  for (const Position p : {0, 9, 20, 1000}) {
    EXPECT_EQ(tags.find(p), nullptr);
    EXPECT_EQ(tags.class_of(p), TokenClass::text);
  }
  EXPECT_EQ(tags.class_of(10), TokenClass::image);
  EXPECT_EQ(tags.class_of(19), TokenClass::image);
}

TEST(Tags, LaterSpansWinOverWhatTheyCover) {
  Tags tags;
  tags.add(span(10, 20));
  tags.add(span(30, 40, TokenClass::video));
  tags.add(span(15, 35, TokenClass::audio, true));
  EXPECT_EQ(tags.spans(), (std::vector{span(10, 15), span(15, 35, TokenClass::audio, true), span(35, 40, TokenClass::video)}));
  tags.add(span(20, 25));  // inside: what is around it stays in two parts
  EXPECT_EQ(tags.spans(), (std::vector{span(10, 15), span(15, 20, TokenClass::audio, true), span(20, 25),
                                       span(25, 35, TokenClass::audio, true), span(35, 40, TokenClass::video)}));
  tags.add(span(0, 100, TokenClass::system));
  EXPECT_EQ(tags.spans(), std::vector{span(0, 100, TokenClass::system)});
}

TEST(Tags, NeighboursTouchWithoutOverlap) {
  Tags tags;
  tags.add(span(10, 20)), tags.add(span(20, 30, TokenClass::video)), tags.add(span(0, 10, TokenClass::audio));
  EXPECT_EQ(tags.spans().size(), 3u);
  EXPECT_EQ(tags.class_of(9), TokenClass::audio);
  EXPECT_EQ(tags.class_of(10), TokenClass::image);
  EXPECT_EQ(tags.class_of(20), TokenClass::video);
}

/// Against an array with a class for every position.
TEST(Tags, AnyOverlapsEqualAnArray) {
  for (std::uint64_t seed = 0; seed < 500; ++seed) {
    Tags tags;
    std::vector<TagSpan> of(64);
    for (std::uint64_t i = 0; i < 12; ++i) {
      const auto begin = static_cast<Position>(random_bits(seed, i, 0) % 60), length = static_cast<Position>(1 + random_bits(seed, i, 1) % 20);
      TagSpan s = span(begin, std::min(begin + length, 64), static_cast<TokenClass>(random_bits(seed, i, 2) % 32), random_bits(seed, i, 3) % 2 == 0);
      s.image = static_cast<Index>(i);
      tags.add(s);
      std::fill(of.begin() + s.begin, of.begin() + s.end, s);
    }
    for (Position p = 0; p < 64; ++p) {
      const TagSpan* found = tags.find(p);
      ASSERT_EQ(found != nullptr, of[static_cast<std::size_t>(p)].end != 0);
      ASSERT_EQ(tags.class_of(p), of[static_cast<std::size_t>(p)].token_class);
      if (found == nullptr) continue;
      ASSERT_EQ(found->is_protected, of[static_cast<std::size_t>(p)].is_protected);
      ASSERT_EQ(found->image, of[static_cast<std::size_t>(p)].image);
    }
    for (std::size_t i = 1; i < tags.spans().size(); ++i) ASSERT_LE(tags.spans()[i - 1].end, tags.spans()[i].begin);
  }
}

std::string error_of(const TagSpan& s) {
  Tags tags;
  tags.add(span(3, 9));
  const Tags before = tags;
  try {
    tags.add(s);
  } catch (const InvalidArgument& e) {
    EXPECT_EQ(tags, before);
    return e.what();
  }
  return "no error";
}

TEST(Tags, MistakesAreRefusedAndChangeNothing) {
  EXPECT_EQ(error_of(span(5, 5)), "tag: span [5, 5), must be non-empty and not negative");
  EXPECT_EQ(error_of(span(6, 5)), "tag: span [6, 5), must be non-empty and not negative");
  EXPECT_EQ(error_of(span(-1, 5)), "tag: span [-1, 5), must be non-empty and not negative");
  EXPECT_EQ(error_of(span(0, 5, static_cast<TokenClass>(32))), "tag: class 32, must be below 32");
  EXPECT_EQ(error_of(span(0, 5, static_cast<TokenClass>(31))), "no error");
}

TEST(Tags, SayWhereClassesStand) {
  constexpr Position end = std::numeric_limits<Position>::max();
  Tags tags;
  EXPECT_EQ(tags.of_class(text), (PositionSpans{{0, end}}));
  EXPECT_EQ(tags.of_class(visual), PositionSpans{});
  tags.add(span(5, 10, TokenClass::image));
  tags.add(span(10, 12, TokenClass::video));
  tags.add(span(12, 14, TokenClass::text));
  tags.add(span(20, 22, TokenClass::image));
  EXPECT_EQ(tags.of_class(visual), (PositionSpans{{5, 12}, {20, 22}})) << "neighbours are joined";
  EXPECT_EQ(tags.of_class(text), (PositionSpans{{0, 5}, {12, 20}, {22, end}}));
  EXPECT_EQ(tags.of_class(all_tokens), (PositionSpans{{0, end}}));
  EXPECT_EQ(tags.where([](const TagSpan* s) { return s == nullptr; }), (PositionSpans{{0, 5}, {14, 20}, {22, end}}));
  EXPECT_EQ(tags.where([](const TagSpan* s) { return s != nullptr && s->begin == 12; }), (PositionSpans{{12, 14}}));
}

TEST(ClassSets, AreReadAndPrinted) {
  for (const std::string words : {"all", "visual", "text", "image", "video", "audio", "system", "text+image", "image+audio+system"}) {
    ClassSet set;
    ASSERT_TRUE(parse_setting(words, set)) << words;
    EXPECT_EQ(print_setting(set), words);
  }
  ClassSet set = text;
  EXPECT_TRUE(parse_setting("image+video", set));
  EXPECT_EQ(set, visual);
  for (const std::string_view words : {"", "+", "image+", "+image", "Image", "image audio", "picture"}) {
    set = text;
    EXPECT_FALSE(parse_setting(words, set)) << words;
    EXPECT_EQ(set, text) << "untouched by " << words;
  }
}

TEST(ClassSets, HoldWhatTheyName) {
  EXPECT_TRUE(visual.has(TokenClass::image) && visual.has(TokenClass::video) && !visual.has(TokenClass::text));
  for (int c = 0; c < token_classes; ++c) EXPECT_TRUE(all_tokens.has(static_cast<TokenClass>(c)));
}

}  // namespace
}  // namespace kvpare

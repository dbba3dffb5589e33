// Rotations against textbook matrices, what they leave alone, and which ropes are refused.
#include <gtest/gtest.h>

#include <kvpare/core/shape.hpp>
#include <limits>
#include <string>

#include "oracle/rope.hpp"
#include "support/inputs.hpp"

namespace kvpare::test {
namespace {

std::vector<double> random_row(Dice& dice, Index width) {
  std::vector<double> row(static_cast<std::size_t>(width));
  for (double& x : row) x = dice.symmetric();
  return row;
}

oracle::RopeSettings settings_of(const Rope& rope) {
  return {.inverse_frequencies = rope.inverse_frequencies, .interleaved = rope.pairing == RopePairing::interleaved};
}

TEST(Rope, ByHand) {
  // One pair, a quarter turn per position.
  const double quarter = std::acos(0.0);
  for (const RopePairing pairing : {RopePairing::halves, RopePairing::interleaved}) {
    const Rope rope{.inverse_frequencies = {quarter, 2 * quarter}, .pairing = pairing};
    double row[] = {1, 2, 3, 4, 5};
    rope.view().rotate(row, 1);  // the first pair by a quarter, the second by a half
    const std::vector<double> wanted =
        pairing == RopePairing::halves ? std::vector<double>{-3, -2, 1, -4, 5} : std::vector<double>{-2, 1, -3, -4, 5};
    for (std::size_t c = 0; c < 5; ++c) EXPECT_NEAR(row[c], wanted[c], 1e-12) << c;
  }
  const Rope usual = rope_of_base(8, 10000);
  ASSERT_EQ(usual.pairs(), 4);
  for (const auto& [i, f] : {std::pair{0, 1.0}, {1, 0.1}, {2, 0.01}, {3, 0.001}})
    EXPECT_NEAR(oracle::item(usual.inverse_frequencies, i), f, 1e-15);
}

TEST(Rope, IsTheTextbooksMatrix) {
  Dice dice{5};
  for (const RopePairing pairing : {RopePairing::halves, RopePairing::interleaved})
    for (const auto& [width, rotary_dim] : {std::pair<Index, Index>{8, 8}, {64, 64}, {80, 32}, {7, 2}})
      for (const Position p : {0, 1, 17, 4096, 1000000}) {
        const Rope rope = rope_of_base(rotary_dim, 10000, pairing);
        const std::vector<double> row = random_row(dice, width);
        const auto wanted =
            oracle::times(oracle::rotation_matrix(settings_of(rope), width, static_cast<double>(p)), row);
        std::vector<double> got = row;
        rope.view().rotate(got.data(), p);
        for (Index c = 0; c < width; ++c) {
          EXPECT_NEAR(oracle::item(got, c), oracle::item(wanted, c), 1e-12) << "channel " << c << " at " << p;
          EXPECT_NEAR(rope.view().rotated_channel(row.data(), c, p), oracle::item(wanted, c), 1e-12);
        }
        for (Index c = rotary_dim; c < width; ++c) EXPECT_EQ(oracle::item(got, c), oracle::item(row, c));
      }
}

TEST(Rope, TurnsBack) {
  Dice dice{6};
  for (const RopePairing pairing : {RopePairing::halves, RopePairing::interleaved})
    for (const double base : {10000.0, 500000.0})
      for (int round = 0; round < 200; ++round) {
        const Rope rope = rope_of_base(96, base, pairing);
        const Position p = static_cast<Position>(dice.within(0, 1000000));
        const std::vector<double> row = random_row(dice, 128);
        std::vector<double> there = row;
        std::vector<float> in_floats(row.begin(), row.end());
        rope.view().rotate(there.data(), p), rope.view().unrotate(there.data(), p);
        rope.view().rotate(in_floats.data(), p), rope.view().unrotate(in_floats.data(), p);
        for (std::size_t c = 0; c < row.size(); ++c) {
          ASSERT_NEAR(there[c], row[c], 1e-14);
          ASSERT_NEAR(static_cast<double>(in_floats[c]), row[c], 1e-6 / 4) << "channel " << c << " at " << p;
        }
      }
}

/// A logit asks only how far apart two tokens are.
TEST(Rope, LogitsDependOnTheDistance) {
  Dice dice{7};
  const Rope rope = rope_of_base(64, 10000);
  const auto logit = [&](std::vector<double> q, std::vector<double> k, Position at_q, Position at_k) {
    rope.view().rotate(q.data(), at_q), rope.view().rotate(k.data(), at_k);
    return std::inner_product(q.begin(), q.end(), k.begin(), 0.0);
  };
  const std::vector<double> q = random_row(dice, 64), k = random_row(dice, 64);
  for (const Position distance : {0, 1, 100, 5000}) {
    const double near = logit(q, k, distance, 0);
    for (const Position shift : {1, 777, 900000})
      EXPECT_NEAR(logit(q, k, distance + shift, shift), near, 1e-8) << "distance " << distance << " from " << shift;
  }
  EXPECT_GT(std::abs(logit(q, k, 1, 0) - logit(q, k, 100, 0)), 1e-3);
}

TEST(Rope, PairsTurnByTheirAxis) {
  Rope rope = rope_of_base(12, 100);
  rope.axes = axes_of_sections(1, 2, 3);
  EXPECT_EQ(rope.axes, (std::vector<std::uint8_t>{0, 1, 1, 2, 2, 2}));
  Dice dice{8};
  const std::vector<double> row = random_row(dice, 12);
  std::vector<double> turned = row, alike = row;
  rope.view().rotate(turned.data(), {3, 50, 7});
  for (Index pair = 0; pair < 6; ++pair) {
    const double p[] = {3, 50, 7};
    const auto wanted = oracle::times(
        oracle::rotation_matrix(settings_of(rope), 12, p[rope.axes[static_cast<std::size_t>(pair)]]), row);
    for (const Index c : {pair, pair + 6})
      EXPECT_NEAR(oracle::item(turned, c), oracle::item(wanted, c), 1e-12) << "channel " << c;
  }
  // A token of text stands at the same place along all axes: as if there were none.
  rope.view().rotate(alike.data(), 9);
  std::vector<double> plain = row;
  rope_of_base(12, 100).view().rotate(plain.data(), 9);
  EXPECT_EQ(alike, plain);
}

TEST(Rope, WhatMakesNoSenseIsNamed) {
  const auto error_after = [](auto&& change) {
    LayerShape shape{.q_heads = 1, .kv_heads = 1, .key_dim = 7, .value_dim = 4, .scale = 1, .rope = rope_of_base(6)};
    change(*shape.rope);
    return error_of([&] { check(shape, 3); });
  };
  EXPECT_EQ(error_after([](Rope&) {}), "no error");
  EXPECT_EQ(error_after([](Rope& r) { r.inverse_frequencies[2] = 0; }), "no error") << "a pair may stand still";
  EXPECT_EQ(error_after([](Rope& r) { r.inverse_frequencies.push_back(1); }),
            "layer 3: rope turns 4 pairs of channels, must be within [1, 3] for key_dim = 7");
  EXPECT_EQ(error_after([](Rope& r) { r.inverse_frequencies.clear(); }),
            "layer 3: rope turns 0 pairs of channels, must be within [1, 3] for key_dim = 7");
  EXPECT_EQ(error_after([](Rope& r) { r.inverse_frequencies[1] = -1; }),
            "layer 3: rope: inverse frequency 1 = -1, must be finite and not negative");
  for (const double odd : {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()})
    EXPECT_NE(error_after([&](Rope& r) { r.inverse_frequencies[1] = odd; }).find("must be finite"), std::string::npos);
  EXPECT_EQ(error_after([](Rope& r) {
              r.axes = {0, 1};
            }),
            "layer 3: rope has axes for 2 pairs, must be none or one per pair (3)");
  EXPECT_EQ(error_after([](Rope& r) {
              r.axes = {0, 1, 3};
            }),
            "layer 3: rope: axis 2 = 3, must be 0 (time), 1 (height) or 2 (width)");
  for (const Index odd : {0, 3, -2, 4098})
    EXPECT_EQ(error_of([&] { rope_of_base(odd); }),
              message("rope: rotary_dim = ", odd, ", must be even and within [2, 4096]"));
  for (const double base : {1.0, -5.0, std::numeric_limits<double>::infinity()})
    EXPECT_NE(error_of([&] { rope_of_base(8, base); }).find("must be finite and above 1"), std::string::npos);
  EXPECT_NE(error_of([] { axes_of_sections(1, -1, 2); }).find("section 1 has -1 pairs"), std::string::npos);
}

TEST(Rope, WhoNeedsOneSaysSo) {
  LayerShape shape;
  EXPECT_EQ(error_of([&] { plain_rope_of(shape, 2, "merge"); }),
            "merge: layer 2 has no rope, it must be said in LayerShape::rope");
  shape.rope = rope_of_base(4);
  EXPECT_EQ(&plain_rope_of(shape, 2, "merge"), &*shape.rope);
  shape.rope->axes = {0, 1};
  EXPECT_NE(error_of([&] { plain_rope_of(shape, 2, "merge"); }).find("turns by three numbers of a token"),
            std::string::npos);
}

}  // namespace
}  // namespace kvpare::test

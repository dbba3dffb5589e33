// Attention on codes (backend/cpu/fused) on every instruction set of this machine, against decoded rows in double.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <kvpare/backend/cpu/tiles.hpp>
#include <kvpare/core/random.hpp>
#include <limits>
#include <string>
#include <vector>

namespace kvpare::cpu {

inline constexpr float nan = std::numeric_limits<float>::quiet_NaN();
inline constexpr std::byte canary{0x5a};

inline std::vector<Isa> sets_of_this_machine() {
  std::vector<Isa> sets;
  for (const Isa isa : all_isas)
    if (supports(isa)) sets.push_back(isa);
  return sets;
}

// About normal, deviation 1.
inline float normal(std::uint64_t seed, Index i) {
  const std::uint64_t bits = random_bits(seed, static_cast<std::uint64_t>(i));
  Index sum = -2 * 65535;
  for (int part = 0; part < 4; ++part) sum += static_cast<Index>(bits >> 16 * part & 0xffff);
  return static_cast<float>(sum) * (1.7320508f / 65536);
}

/// Bytes at a 64-byte boundary, canaries behind.
class TileMemory {
 public:
  explicit TileMemory(Index bytes, std::byte fill = std::byte{0xff})
      : bytes_(bytes), memory_(static_cast<std::size_t>(bytes) + 192, canary) {
    std::fill_n(data(), bytes, fill);
  }
  std::byte* data() {
    const auto at = reinterpret_cast<std::uintptr_t>(memory_.data()) + 64;
    return memory_.data() + 64 + (64 - at % 64) % 64;
  }
  bool intact() {
    std::byte* end = data() + bytes_;
    return std::all_of(memory_.data(), data(), [](std::byte b) { return b == canary; }) &&
           std::all_of(end, memory_.data() + memory_.size(), [](std::byte b) { return b == canary; });
  }

 private:
  Index bytes_;
  std::vector<std::byte> memory_;
};

/// Which slots are looked at.
struct Slots {
  std::vector<std::uint8_t> list;
  bool gapless = true;
};
inline std::vector<Slots> slot_lists(Index tokens, std::uint64_t seed) {
  std::vector<Slots> lists(4);
  for (Index t = 0; t < tokens; ++t) {
    const auto slot = static_cast<std::uint8_t>(t);
    lists[0].list.push_back(slot);
    if (t < tokens - 5) lists[1].list.push_back(slot);
    if (random_unit(seed, t) < 0.5f) lists[2].list.push_back(slot);
    if (t == tokens - 2) lists[3].list.push_back(slot);
  }
  lists[2].gapless = lists[3].gapless = false;
  return lists;
}

/// What a row would be if all numbers were as far from the middle of their group as its range.
inline double square_of_ranges(Index group, const std::vector<float>& row) {
  double sum = 0;
  for (std::size_t c = 0; c < row.size(); c += static_cast<std::size_t>(group)) {
    const auto [low, high] = std::minmax_element(row.begin() + static_cast<std::ptrdiff_t>(c),
                                                 row.begin() + static_cast<std::ptrdiff_t>(c) + group);
    sum += static_cast<double>(group) * std::pow(static_cast<double>(*high - *low), 2);
  }
  return sum;
}

/// Scores of drawn queries are those of the rows that the listed slots decode to, within `tolerance(t)` of the t-th slot.
template <class Tolerance>
void expect_scores(const TileOps* ops, const Kernels& k, const TileRows& listed, Index rows,
                   const std::vector<std::vector<float>>& decoded, const Tolerance& tolerance) {
  const Index n = listed.count, width = listed.shape.width, stride = width + 3, out_stride = 67;
  std::vector<float> q(static_cast<std::size_t>(rows * stride), nan),
      out(static_cast<std::size_t>(rows * out_stride), nan);
  for (Index i = 0; i < rows; ++i)
    for (Index c = 0; c < width; ++c) q[static_cast<std::size_t>(i * stride + c)] = normal(2, i * stride + c);
  TileMemory prepared(ops->query_bytes(rows, width));
  ops->prepare_query(k, q.data(), stride, rows, width, listed.state, prepared.data());
  ASSERT_TRUE(prepared.intact());
  ops->score(k, prepared.data(), rows, listed, {listed.tile, ops->tile_bytes(listed.shape)}, out.data(), out_stride);
  ASSERT_TRUE(prepared.intact());
  for (Index i = 0; i < rows; ++i) {
    for (Index t = n; t < out_stride; ++t) ASSERT_TRUE(std::isnan(out[static_cast<std::size_t>(i * out_stride + t)]));
    for (Index t = 0; t < n; ++t) {
      double sum = 0;
      for (Index c = 0; c < width; ++c)
        sum += static_cast<double>(decoded[static_cast<std::size_t>(t)][static_cast<std::size_t>(c)]) *
               static_cast<double>(q[static_cast<std::size_t>(i * stride + c)]);
      ASSERT_NEAR(static_cast<double>(out[static_cast<std::size_t>(i * out_stride + t)]), sum, tolerance(t) + 1e-5)
          << "row " << i << " slot " << int{listed.slots[t]};
    }
  }
}

/// Sums of drawn probabilities, behind scaled accumulators or at their start, are those of the rows that the listed slots
/// decode to, within `tolerance(p)` for the probabilities of a row.
template <class Tolerance>
void expect_sums(const TileOps* ops, const Kernels& k, const TileRows& listed, Index rows,
                 const std::vector<std::vector<float>>& decoded, const Tolerance& tolerance) {
  const Index n = listed.count, width = listed.shape.width, stride = 64, acc_stride = round_up(width, 16);
  std::vector<float> p(static_cast<std::size_t>(rows * stride), nan),
      acc(static_cast<std::size_t>(rows * acc_stride), nan), alpha(static_cast<std::size_t>(rows));
  for (Index i = 0; i < rows; ++i) {
    alpha[static_cast<std::size_t>(i)] = ops->folds || i % 3 == 0 ? 0.0f : 0.25f;
    const float tiny = i % 2 == 0 ? 1.0f : 1e-20f;  // pages of tiny probabilities lose nothing
    for (Index t = 0; t < n; ++t)
      p[static_cast<std::size_t>(i * stride + t)] = tiny * std::pow(random_unit(3, i * 64 + t), 4.0f);
    if (i % 3 != 0)
      for (Index c = 0; c < width; ++c)
        acc[static_cast<std::size_t>(i * acc_stride + c)] = tiny * normal(4, i * 300 + c);
  }
  const float* factors = rows == 2 ? nullptr : alpha.data();
  if (factors == nullptr) std::fill(acc.begin(), acc.end(), 0.0f);
  const std::vector<float> before = acc;
  ops->accumulate(k, p.data(), stride, factors, rows, listed, {listed.tile, ops->tile_bytes(listed.shape)}, acc.data(),
                  acc_stride);
  if (ops->folds) {  // what is stored becomes what it stands for
    std::vector<float> sums(static_cast<std::size_t>(rows), 0.0f);
    for (Index i = 0; i < rows; ++i)
      for (Index t = 0; t < n; ++t) sums[static_cast<std::size_t>(i)] += p[static_cast<std::size_t>(i * stride + t)];
    ops->finish_output(rows, width, listed.state, sums.data(), acc.data(), acc_stride);
  }
  for (Index i = 0; i < rows; ++i) {
    const float* of_row = p.data() + i * stride;
    const double allowed = tolerance(of_row);
    for (Index c = 0; c < width; ++c) {
      const auto at = static_cast<std::size_t>(i * acc_stride + c);
      const float a = factors == nullptr ? 0.0f : alpha[static_cast<std::size_t>(i)];
      double sum = a == 0 ? 0.0 : static_cast<double>(a) * static_cast<double>(before[at]);
      double size = std::abs(sum);
      for (Index t = 0; t < n; ++t) {
        const double x = static_cast<double>(of_row[t]) *
                         static_cast<double>(decoded[static_cast<std::size_t>(t)][static_cast<std::size_t>(c)]);
        sum += x, size += std::abs(x);
      }
      ASSERT_NEAR(static_cast<double>(acc[at]), sum, allowed + 1e-6 * size) << "row " << i << " channel " << c;
    }
  }
}

template <Codec C>
void check(Side side, TileShape shape, Isa isa, int probability_bits, std::vector<Index> row_counts, double bound,
           const float* given_state = nullptr) {
  SCOPED_TRACE(std::string(C::name) + (side == Side::keys ? " keys " : " values ") + std::string(name_of(isa)) +
               " tokens " + std::to_string(shape.tokens) + " width " + std::to_string(shape.width) + " p " +
               std::to_string(probability_bits));
  const TileOps* ops = tile_ops<C>(side, shape, probability_bits);
  ASSERT_NE(ops, nullptr);
  const Kernels& k = kernels(isa);
  const float state_value = 0.75f;
  const float* state = given_state != nullptr                ? given_state
                       : state_floats<C>(shape.width) == 1 ? &state_value
                                                           : nullptr;

  std::vector<float> rows_of(static_cast<std::size_t>(shape.tokens * shape.width));
  for (Index i = 0; i < shape.tokens * shape.width; ++i)
    rows_of[static_cast<std::size_t>(i)] = normal(1, i) * (i % shape.width < 2 ? 20.0f : 1.0f);
  const Index bytes = C::tile_bytes(shape);
  for (const Slots& slots : slot_lists(shape.tokens, 5)) {
    TileMemory tile(ops->tile_bytes(shape)), canonical(bytes), back(bytes), other(bytes);
    ASSERT_EQ(ops->tile_bytes(shape), bytes);
    if (C::rows_move) {
      for (const std::uint8_t s : slots.list) {
        ops->encode(k, shape, rows_of.data() + s * shape.width, s, 1, {}, state, tile.data());
        C::encode(shape, rows_of.data() + s * shape.width, s, 1, state, canonical.data());
      }
    } else {
      const Index count = slots.list.back() + 1;
      ops->encode(k, shape, rows_of.data(), 0, count, {}, state, tile.data());
      C::encode(shape, rows_of.data(), 0, count, state, canonical.data());
    }
    ASSERT_TRUE(tile.intact());

    // Canonical bytes: those of the codec, and there and back.
    ops->to_canonical(k, shape, tile.data(), back.data());
    ASSERT_TRUE(back.intact());
    std::vector<float> want(static_cast<std::size_t>(shape.width)), got(want);
    std::vector<std::vector<float>> decoded;
    for (const std::uint8_t s : slots.list) {
      C::decode(shape, canonical.data(), s, state, want.data());
      C::decode(shape, back.data(), s, state, got.data());
      ASSERT_EQ(want, got);
      ops->decode(k, shape, tile.data(), s, 0, state, got.data());
      for (std::size_t c = 0; c < want.size(); ++c) ASSERT_FLOAT_EQ(want[c], got[c]);
      decoded.push_back(want);
    }
    if (slots.list.size() == static_cast<std::size_t>(shape.tokens)) {
      ASSERT_EQ(std::memcmp(canonical.data(), back.data(), static_cast<std::size_t>(bytes)), 0);
    }
    ops->from_canonical(k, shape, back.data(), other.data());
    ASSERT_TRUE(other.intact());
    ASSERT_EQ(std::memcmp(other.data(), tile.data(), static_cast<std::size_t>(bytes)), 0);

    const TileRows listed{tile.data(),  shape, state, slots.list.data(), static_cast<int>(slots.list.size()),
                          slots.gapless};
    const Index n = listed.count;
    // Scales of channels go into the integer query, also where a token's own number is 0.
    double square_of_peaks = 0;
    bool channels_have_scales = !C::rows_move;
    if constexpr (GroupCodec<C>) channels_have_scales = C::form.along == Along::tokens && C::form.zero == ZeroType::none;
    if (channels_have_scales) {
      std::vector<float> peak(want.size(), 0.0f);
      for (Index t = 0; t < shape.tokens; ++t) {
        C::decode(shape, canonical.data(), t, state, want.data());
        for (std::size_t c = 0; c < peak.size(); ++c) peak[c] = std::max(peak[c], std::abs(want[c]));
      }
      for (const float x : peak) square_of_peaks += static_cast<double>(x) * static_cast<double>(x);
    }
    // An integer query is off by a share of its largest number: relative to |k| times that, by sqrt(width).
    const auto of_score = [&](Index t) {
      const std::vector<float>& row = decoded[static_cast<std::size_t>(t)];
      double size = square_of_peaks;
      for (const float x : row) size += static_cast<double>(x) * static_cast<double>(x);
      if constexpr (GroupCodec<C>)
        size += square_of_ranges(C::form.along == Along::channels ? C::form.group_of(shape) : shape.width, row);
      return bound * 4 * std::sqrt(size);
    };
    const auto of_sum = [&](const float* p) {
      double largest = 0;
      for (const std::vector<float>& row : decoded)
        for (const float v : row) largest = std::max(largest, std::abs(static_cast<double>(v)));
      return bound * largest * static_cast<double>(*std::max_element(p, p + n)) * 8;
    };
    for (const Index rows : row_counts)
      if (side == Side::keys)
        expect_scores(ops, k, listed, rows, decoded, of_score);
      else
        expect_sums(ops, k, listed, rows, decoded, of_sum);
    ASSERT_TRUE(tile.intact());
  }
}

constexpr Index tile_widths[] = {16, 32, 64, 80, 96, 128, 256};

inline std::vector<Index> rows_for(TileShape shape) {
  if (shape.width == 128 && shape.tokens == 64) return {1, 2, 3, 4, 5, 7, 8, 11};
  return {shape.width == 96 ? 7 : 3};
}

/// Shapes of all sizes of pages, the smaller ones at one width only.
template <class F>
void for_each_shape(const F& f) {
  for (const Isa isa : sets_of_this_machine())
    for (const Index tokens : {16, 32, 64})
      for (const Index width : tile_widths)
        if (tokens == 64 || width == 64) f(isa, TileShape{tokens, width});
}

/// Bounds, as a share of the largest number that is held as an integer: half a step of it for each factor, summed at random.
template <Codec C>
void check_keys() {
  for_each_shape([](Isa isa, TileShape shape) {
    if (C::fits(shape) && !::testing::Test::HasFatalFailure())
      check<C>(Side::keys, shape, isa, 16, rows_for(shape), C::form.bits == 8 ? 1.0 / 32639 : 1.0 / 127);
  });
}
template <Codec C>
void check_values() {
  for (const int probability_bits : {16, 8})
    for_each_shape([probability_bits](Isa isa, TileShape shape) {
      if (C::fits(shape) && !::testing::Test::HasFatalFailure())
        check<C>(Side::values, shape, isa, probability_bits, rows_for(shape),
                 probability_bits == 16 ? 1.0 / 32767 : 1.0 / 255);
    });
}

}  // namespace kvpare::cpu

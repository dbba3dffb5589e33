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

template <Codec C>
void check(Side side, TileShape shape, Isa isa, int probability_bits, std::vector<Index> row_counts, double bound) {
  SCOPED_TRACE(std::string(C::name) + (side == Side::keys ? " keys " : " values ") + std::string(name_of(isa)) +
               " tokens " + std::to_string(shape.tokens) + " width " + std::to_string(shape.width) + " p " +
               std::to_string(probability_bits));
  const TileOps* ops = tile_ops<C>(side, shape, isa, probability_bits);
  ASSERT_NE(ops, nullptr);
  const Kernels& k = kernels(isa);
  const float state_value = 0.75f;
  const float* state = state_floats<C>(shape.width) > 0 ? &state_value : nullptr;

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
    ops->to_canonical(shape, tile.data(), back.data());
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
    ops->from_canonical(shape, back.data(), other.data());
    ASSERT_TRUE(other.intact());
    ASSERT_EQ(std::memcmp(other.data(), tile.data(), static_cast<std::size_t>(bytes)), 0);

    const TileRows listed{tile.data(),  shape, state, slots.list.data(), static_cast<int>(slots.list.size()),
                          slots.gapless};
    const Index n = listed.count;
    // Scales of channels go into the integer query, also where a token's own number is 0.
    double square_of_peaks = 0;
    if constexpr (GroupCodec<C>)
      if (C::form.along == Along::tokens && C::form.zero == ZeroType::none) {
        std::vector<float> peak(want.size(), 0.0f);
        for (Index t = 0; t < shape.tokens; ++t) {
          C::decode(shape, canonical.data(), t, state, want.data());
          for (std::size_t c = 0; c < peak.size(); ++c) peak[c] = std::max(peak[c], std::abs(want[c]));
        }
        for (const float x : peak) square_of_peaks += static_cast<double>(x) * static_cast<double>(x);
      }
    for (const Index rows : row_counts)
      if (side == Side::keys) {
        const Index stride = shape.width + 3, out_stride = 67;
        std::vector<float> q(static_cast<std::size_t>(rows * stride), nan),
            out(static_cast<std::size_t>(rows * out_stride), nan);
        for (Index i = 0; i < rows; ++i)
          for (Index c = 0; c < shape.width; ++c)
            q[static_cast<std::size_t>(i * stride + c)] = normal(2, i * stride + c);
        TileMemory prepared(ops->query_bytes(rows, shape.width));
        ops->prepare_query(k, q.data(), stride, rows, shape.width, state, prepared.data());
        ASSERT_TRUE(prepared.intact());
        ops->score(k, prepared.data(), rows, listed, {tile.data(), bytes}, out.data(), out_stride);
        for (Index i = 0; i < rows; ++i) {
          for (Index t = n; t < out_stride; ++t)
            ASSERT_TRUE(std::isnan(out[static_cast<std::size_t>(i * out_stride + t)]));
          for (Index t = 0; t < n; ++t) {
            double sum = 0, size = square_of_peaks;
            for (Index c = 0; c < shape.width; ++c) {
              const double x = decoded[static_cast<std::size_t>(t)][static_cast<std::size_t>(c)];
              const double y = static_cast<double>(q[static_cast<std::size_t>(i * stride + c)]);
              sum += x * y, size += x * x;
            }
            if constexpr (GroupCodec<C>)
              size += square_of_ranges(C::form.along == Along::channels ? C::form.group_of(shape) : shape.width,
                                       decoded[static_cast<std::size_t>(t)]);
            // An integer query is off by a share of its largest number: relative to |k| times that, by sqrt(width).
            ASSERT_NEAR(static_cast<double>(out[static_cast<std::size_t>(i * out_stride + t)]), sum,
                        bound * 4 * std::sqrt(size) + 1e-5)
                << "row " << i << " slot " << int{slots.list[static_cast<std::size_t>(t)]};
          }
        }
      } else {
        const Index stride = 64, acc_stride = round_up(shape.width, 16);
        std::vector<float> p(static_cast<std::size_t>(rows * stride), nan),
            acc(static_cast<std::size_t>(rows * acc_stride), nan);
        std::vector<float> alpha(static_cast<std::size_t>(rows));
        for (Index i = 0; i < rows; ++i) {
          alpha[static_cast<std::size_t>(i)] = i % 3 == 0 ? 0.0f : 0.25f;
          const float tiny = i % 2 == 0 ? 1.0f : 1e-20f;  // pages of tiny probabilities lose nothing
          for (Index t = 0; t < n; ++t)
            p[static_cast<std::size_t>(i * stride + t)] = tiny * std::pow(random_unit(3, i * 64 + t), 4.0f);
          if (i % 3 != 0)
            for (Index c = 0; c < shape.width; ++c)
              acc[static_cast<std::size_t>(i * acc_stride + c)] = tiny * normal(4, i * 300 + c);
        }
        const std::vector<float> before = acc;
        ops->accumulate(k, p.data(), stride, alpha.data(), rows, listed, {tile.data(), bytes}, acc.data(), acc_stride);
        for (Index i = 0; i < rows; ++i)
          for (Index c = 0; c < shape.width; ++c) {
            const float a = alpha[static_cast<std::size_t>(i)];
            double sum = a == 0 ? 0.0
                                : static_cast<double>(a) *
                                      static_cast<double>(before[static_cast<std::size_t>(i * acc_stride + c)]);
            double size = std::abs(sum), largest = 0, top = 0;
            for (Index t = 0; t < n; ++t) {
              const double x = decoded[static_cast<std::size_t>(t)][static_cast<std::size_t>(c)];
              const double y = static_cast<double>(p[static_cast<std::size_t>(i * stride + t)]);
              sum += x * y, size += std::abs(x * y), top = std::max(top, y);
              for (const float v : decoded[static_cast<std::size_t>(t)])
                largest = std::max(largest, std::abs(static_cast<double>(v)));
            }
            ASSERT_NEAR(static_cast<double>(acc[static_cast<std::size_t>(i * acc_stride + c)]), sum,
                        bound * largest * top * 8 + 1e-6 * size)
                << "row " << i << " channel " << c;
          }
      }
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

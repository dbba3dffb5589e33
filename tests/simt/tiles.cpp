// Every codec's kernels on the host's fibers against its own encode and decode: codes, scales and zeros to the last
// bit, whatever part of a tile is touched, and nothing beside it.
#include <gtest/gtest.h>

#include <cstring>
#include <kvpare/backend/cuda/tiles.cuh>
#include <kvpare/codec/block_float.hpp>
#include <kvpare/codec/folded.hpp>
#include <kvpare/codec/fp8.hpp>
#include <kvpare/codec/ggml.hpp>
#include <kvpare/codec/rotation.hpp>
#include <kvpare/codec/ternary.hpp>
#include <kvpare/codec/turbo_quant.hpp>

#include "simt/runtime.hpp"
#include "support/codec_tiles.hpp"

namespace kvpare::test {
namespace {

using Work = cuda::Workspace<simt::Runtime>;
using Bytes = std::vector<std::byte>;

/// A codec of one's own that codes a tile as a whole: a bit per number, above the channel's mean or not, and the mean.
struct ChannelMeans {
  static constexpr std::string_view name = "channel_means";
  static constexpr bool rows_move = false;
  static constexpr bool fits(TileShape s) { return s.tokens % 8 == 0; }
  static constexpr Index tile_bytes(TileShape s) { return s.width * (4 + s.tokens / 8); }
  static void encode(TileShape s, const float* rows, Index, Index count, const float*, std::byte* tile) {
    for (Index c = 0; c < s.width; ++c) {
      float sum = 0;
      for (Index t = 0; t < count; ++t) sum += rows[t * s.width + c];
      const float mean = count > 0 ? sum / static_cast<float>(count) : 0.0f;
      std::byte* to = tile + c * (4 + s.tokens / 8);
      std::memcpy(to, &mean, 4);
      std::memset(to + 4, 0, static_cast<std::size_t>(s.tokens / 8));
      for (Index t = 0; t < count; ++t)
        if (rows[t * s.width + c] > mean) to[4 + t / 8] |= static_cast<std::byte>(1u << t % 8);
    }
  }
  static void decode(TileShape s, const std::byte* tile, Index slot, const float*, float* row) {
    for (Index c = 0; c < s.width; ++c) {
      const std::byte* from = tile + c * (4 + s.tokens / 8);
      std::memcpy(&row[c], from, 4);
      row[c] += (from[4 + slot / 8] >> slot % 8 & std::byte{1}) != std::byte{0} ? 1.0f : -1.0f;
    }
  }
};

/// And one that codes rows, in a number of bytes that nothing divides.
struct OddRows {
  static constexpr std::string_view name = "odd_rows";
  static constexpr bool rows_move = true;
  static constexpr bool fits(TileShape) { return true; }
  static constexpr Index tile_bytes(TileShape s) { return s.tokens * (s.width + 1); }
  static void encode(TileShape s, const float* rows, Index first, Index count, const float*, std::byte* tile) {
    for (Index r = 0; r < count; ++r) {
      std::byte* row = tile + (first + r) * (s.width + 1);
      row[0] = std::byte{7};
      for (Index c = 0; c < s.width; ++c)
        row[c + 1] = static_cast<std::byte>(static_cast<int>(std::lround(rows[r * s.width + c] * 8)) & 255);
    }
  }
  static void decode(TileShape s, const std::byte* tile, Index slot, const float*, float* row) {
    const std::byte* from = tile + slot * (s.width + 1);
    for (Index c = 0; c < s.width; ++c)
      row[c] =
          static_cast<float>(std::to_integer<int>(from[c + 1])) + static_cast<float>(std::to_integer<int>(from[0]));
  }
};

/// Device memory that a test fills and reads.
template <class T>
struct There {
  There(simt::Runtime& of, const std::vector<T>& from) : runtime(of), size(std::ssize(from)) {
    data = static_cast<T*>(runtime.allocate(bytes()));
    runtime.to_backend(data, from.data(), bytes());
  }
  There(const There&) = delete;
  ~There() { runtime.release(data); }
  Index bytes() const { return size * static_cast<Index>(sizeof(T)); }
  std::vector<T> now() const {
    std::vector<T> host(static_cast<std::size_t>(size));
    runtime.wait(runtime.to_host(host.data(), data, bytes()));
    return host;
  }
  simt::Runtime& runtime;
  Index size;
  T* data;
};

/// Tiles of a codec on one side, with guard bytes between them, and the same as canonical bytes on the host.
template <Codec C>
struct Tiles {
  static constexpr Index guard = 64, count = 4;
  simt::Runtime& runtime;
  Work& work;
  TileShape shape;
  Side side;
  const cuda::TileOps<Work>* ops = cuda::tile_ops<Work, C>(side, shape);
  Index bytes = C::tile_bytes(shape), stride = round_up(bytes, 64) + guard;
  There<std::byte> memory{runtime, Bytes(static_cast<std::size_t>(guard + count * stride), std::byte{0xa5})};
  std::vector<Bytes> canonical{count, Bytes(static_cast<std::size_t>(bytes))};
  std::vector<float> state;  // null where the codec takes none
  There<float> state_there;

  Tiles(simt::Runtime& r, Work& w, TileShape s, Side of, std::uint64_t seed)
      : runtime(r), work(w), shape(s), side(of), state(state_of(s.width, seed)), state_there(r, state) {
    for (std::size_t n = 0; n < canonical.size(); ++n)  // any bytes at all
      for (std::size_t i = 0; i < canonical[n].size(); ++i)
        canonical[n][i] = static_cast<std::byte>(random_bits(seed + n, static_cast<Index>(i)) & 255);
    write_trits();
    repack(true);
  }
  /// Of ternary rows, bytes that are written: below 243.
  void write_trits() {
    using Stored = typename cuda::DeviceTiles<C, Side::keys>::Stored;
    if constexpr (GroupCodec<Stored>)
      if constexpr (Stored::form.ternary && Stored::form.along == Along::channels) {
        std::vector<std::uint8_t> codes(static_cast<std::size_t>(shape.width));
        std::vector<GroupBits> scales(static_cast<std::size_t>(shape.width));
        for (Bytes& tile_bytes : canonical)
          for (Index t = 0; t < shape.tokens; ++t) {
            Stored::read_row(shape, tile_bytes.data(), t, codes.data(), scales.data());
            Stored::write_row(shape, tile_bytes.data(), t, codes.data(), scales.data());
          }
      }
  }
  static std::vector<float> state_of(Index width, std::uint64_t seed) {
    std::vector<float> x(static_cast<std::size_t>(state_floats<C>(width)));
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = 0.5f + random_unit(seed + 77, static_cast<Index>(i));
    return x;
  }
  const float* host_state() const { return state.empty() ? nullptr : state.data(); }
  const float* device_state() const { return state.empty() ? nullptr : state_there.data; }
  std::byte* tile(Index n) const { return memory.data + guard + n * stride; }

  /// From the canonical bytes into the tiles, or what the tiles now hold; canonical bytes lie at odd addresses there.
  std::vector<Bytes> repack(bool into_tiles) {
    Bytes all(static_cast<std::size_t>(1 + count * (bytes + 2)), std::byte{0xa5});
    const auto at = [&](Index n) { return 1 + n * (bytes + 2); };
    for (Index n = 0; n < count && into_tiles; ++n)
      std::copy(canonical[static_cast<std::size_t>(n)].begin(), canonical[static_cast<std::size_t>(n)].end(),
                all.begin() + at(n));
    const There<std::byte> there(runtime, all);
    std::vector<cuda::RepackJob> jobs;
    for (Index n = 0; n < count; ++n) jobs.push_back({tile(n), there.data + at(n)});
    work.begin();
    (into_tiles ? ops->from_canonical : ops->to_canonical)(work, shape, jobs);
    const Bytes now = there.now();
    std::vector<Bytes> out;
    for (Index n = 0; n < count; ++n) {
      out.emplace_back(now.begin() + at(n), now.begin() + at(n) + bytes);
      if (now[static_cast<std::size_t>(at(n) - 1)] != std::byte{0xa5} ||
          now[static_cast<std::size_t>(at(n) + bytes)] != std::byte{0xa5})
        ADD_FAILURE() << C::name << ": repack writes beside the canonical bytes";
    }
    return out;
  }
  /// Are the tiles what the host has, and is nothing beside them touched?
  void expect_same(const char* after) {
    const std::vector<Bytes> now = repack(false);
    for (std::size_t n = 0; n < now.size(); ++n) {
      const auto [got, wanted] = std::mismatch(now[n].begin(), now[n].end(), canonical[n].begin());
      ASSERT_TRUE(got == now[n].end()) << C::name << (side == Side::keys ? " keys " : " values ") << shape.tokens << "x"
                                       << shape.width << " after " << after << ": tile " << n << " byte "
                                       << got - now[n].begin() << " of " << bytes << " is "
                                       << std::to_integer<int>(*got) << ", must be " << std::to_integer<int>(*wanted);
    }
    const Bytes all = memory.now();
    for (Index i = 0; i < std::ssize(all); ++i) {
      const Index in = (i - guard) % stride;
      if (i >= guard && in >= 0 && in < bytes) continue;
      ASSERT_EQ(all[static_cast<std::size_t>(i)], std::byte{0xa5})
          << C::name << " after " << after << ": a guard byte, " << in - bytes << " behind a tile";
    }
  }
};

/// Rows of an element type, a stride apart that may be more than their width, NaN between.
struct SourceRows {
  std::vector<std::byte> bytes;
  std::vector<float> floats;
  Index stride;

  SourceRows(std::uint64_t seed, Index rows, Index width, DType type, Index gap)
      : stride((width + gap) * size_of(type)) {
    floats = outliers(seed, rows, width);
    for (std::size_t i = 0; i < floats.size(); ++i)
      if (random_bits(seed + 5, static_cast<Index>(i)) % 97 == 0) floats[i] = i % 2 == 0 ? 0.0f : -0.0f;
    bytes.assign(static_cast<std::size_t>(rows * stride), std::byte{0xff});
    for (Index r = 0; r < rows; ++r)
      for (Index c = 0; c < width; ++c)
        with_type(type, [&](auto* t) {
          using T = std::remove_pointer_t<decltype(t)>;
          float& x = floats[static_cast<std::size_t>(r * width + c)];
          const T stored(x);
          x = static_cast<float>(stored);
          std::memcpy(bytes.data() + r * stride + c * size_of(type), &stored, sizeof stored);
        });
  }
};

struct Part {
  Index tile, first, count;
};

template <Codec C>
void check_encode(simt::Runtime& runtime, Work& work, TileShape shape, Side side, DType type, Index gap, bool neutral) {
  Tiles<C> tiles(runtime, work, shape, side, 11);
  const Index t = shape.tokens;
  // Rows that move: a whole tile; odd places and single rows; a last row. Else whole tiles, the last group partly
  // filled.
  const std::vector<Part> parts =
      C::rows_move ? std::vector<Part>{{0, 0, t}, {1, 0, 1}, {1, 3, 4}, {1, 9, t - 10}, {2, t - 1, 1}}
                   : std::vector<Part>{{0, 0, t}, {1, 0, t - 5}, {2, 0, 1}};
  Index rows = 0;
  for (const Part& p : parts) rows += p.count;
  const SourceRows source(21, rows, shape.width, type, gap);
  const There<std::byte> there(runtime, source.bytes);
  std::vector<cuda::EncodeJob> jobs;
  Index row = 0;
  for (const Part& p : parts) {
    jobs.push_back({there.data + row * source.stride, source.stride, type, neutral ? nullptr : tiles.device_state(),
                    tiles.tile(p.tile), p.first, p.count});
    C::encode(shape, source.floats.data() + row * shape.width, p.first, p.count, neutral ? nullptr : tiles.host_state(),
              tiles.canonical[static_cast<std::size_t>(p.tile)].data());
    row += p.count;
  }
  work.begin();
  tiles.ops->encode(work, shape, jobs);
  ASSERT_NO_FATAL_FAILURE(tiles.expect_same("encode"));
}

template <Codec C>
void check_decode(simt::Runtime& runtime, Work& work, TileShape shape, Side side, bool neutral) {
  Tiles<C> tiles(runtime, work, shape, side, 31);
  if constexpr (state_floats<C>(64) == 0) {  // any bytes decode to something, but numbers that were coded say more
    const auto x = outliers(5, shape.tokens, shape.width);
    C::encode(shape, x.data(), 0, shape.tokens, nullptr, tiles.canonical[0].data());
    tiles.repack(true);
  }
  const std::uint64_t masks[] = {low_bits(shape.tokens), 0x9249249249249249u & low_bits(shape.tokens), 0,
                                 std::uint64_t{1} << (shape.tokens - 1)};
  const Index stride = shape.width + (side == Side::keys ? 4 : 3);
  std::vector<float> wanted(static_cast<std::size_t>(2 + Tiles<C>::count * shape.tokens * stride), 1234.5f);
  const There<float> out(runtime, wanted);
  std::vector<cuda::DecodeJob> jobs;
  for (Index n = 0; n < Tiles<C>::count; ++n) {
    const Index at = (side == Side::keys ? 0 : 1) + n * shape.tokens * stride;
    const std::uint64_t slots = masks[n];
    jobs.push_back({tiles.tile(n), neutral ? nullptr : tiles.device_state(), slots, out.data + at, stride});
    for (Index s = 0, row = 0; s < shape.tokens; ++s)
      if ((slots >> s & 1) != 0)
        C::decode(shape, tiles.canonical[static_cast<std::size_t>(n)].data(), s, neutral ? nullptr : tiles.host_state(),
                  wanted.data() + at + row++ * stride);
  }
  work.begin();
  tiles.ops->decode(work, shape, work.put(jobs), std::ssize(jobs));
  const std::vector<float> got = out.now();
  for (std::size_t i = 0; i < got.size(); ++i)
    ASSERT_TRUE(std::bit_cast<std::uint32_t>(got[i]) == std::bit_cast<std::uint32_t>(wanted[i]) ||
                (got[i] != got[i] && wanted[i] != wanted[i]))
        << C::name << " " << shape.tokens << "x" << shape.width << " float " << i << " is " << got[i] << ", must be "
        << wanted[i];
  ASSERT_NO_FATAL_FAILURE(tiles.expect_same("decode"));
}

template <Codec C>
void check_moves(simt::Runtime& runtime, Work& work, TileShape shape, Side side) {
  if constexpr (C::rows_move) {
    Tiles<C> tiles(runtime, work, shape, side, 51);
    const auto last = static_cast<std::uint8_t>(shape.tokens - 1);
    // Down over itself, up over itself, to the other parity, and what an earlier move has left: no one writes what a
    // later reads.
    const std::vector<std::vector<cuda::RowMove>> lists = {{{0, 0, 0, 1, 0, last, 0}},
                                                           {{1, 1, 0, 2, 5, 7, 0},
                                                            {1, 1, 0, 1, 3, 1, 0},
                                                            {1, 2, 0, last, 1, 1, 0},
                                                            {1, 2, 0, 14, 4, 2, 0},
                                                            {2, 2, 0, 9, 8, 3, 0}},
                                                           {{3, 3, 0, 3, 2, 1, 0}, {3, 3, 0, 5, 3, 3, 0}}};
    std::vector<cuda::RowMove> all;
    std::vector<std::pair<std::size_t, int>> where;
    const Index row = C::tile_bytes({1, shape.width});
    std::vector<int> counts;
    for (const auto& list : lists) {
      where.emplace_back(all.size(), static_cast<int>(list.size()));
      std::uint32_t rows = 0;
      for (cuda::RowMove m : list) {
        m.row = rows, rows += m.count;
        all.push_back(m);
        std::memmove(tiles.canonical[m.to].data() + m.to_slot * row,
                     Bytes(tiles.canonical[m.from].begin() + m.from_slot * row,
                           tiles.canonical[m.from].begin() + (m.from_slot + m.count) * row)
                         .data(),
                     static_cast<std::size_t>(m.count * row));
      }
      counts.push_back(static_cast<int>(rows));
    }
    work.begin();
    const cuda::RowMove* there = work.put(all);
    cuda::detail::Moves<Work> moves(work);
    for (std::size_t i = 0; i < lists.size(); ++i)
      for (const cuda::RowPart& part : tiles.ops->row_parts(shape))
        moves.add({tiles.tile(0) + part.at, tiles.tile(0) + part.at, tiles.stride, tiles.stride, part.stride,
                   part.stride, part.bytes, there + where[i].first, where[i].second, counts[i]},
                  part.paired);
    moves.launch();
    ASSERT_NO_FATAL_FAILURE(tiles.expect_same("moves"));
  }
}

/// What tile_layout.cuh says, from its words alone: codes in pairs (of 3 bits the low two, then the highest), then
/// scales, then zeros.
template <Codec C>
void check_layout(simt::Runtime& runtime, Work& work, TileShape shape, Side side) {
  if constexpr (cuda::has_fragment_order<C>()) {
    if (shape.width * C::form.bits % 16 != 0 || (C::form.bits == 3 && shape.width % 32 != 0)) return;
    if (C::form.ternary && shape.width != 128) return;
    Tiles<C> tiles(runtime, work, shape, side, 61);
    const Bytes all = tiles.memory.now();
    const std::byte* tile = all.data() + Tiles<C>::guard;
    const Index bits = C::form.bits == 3 ? 2 : C::form.bits, group = C::form.group_of(shape);
    std::vector<float> row(static_cast<std::size_t>(shape.width));
    for (Index t = 0; t < shape.tokens; ++t) {
      C::decode(shape, tiles.canonical[0].data(), t, tiles.host_state(), row.data());
      for (Index c = 0; c < shape.width; ++c) {
        Index bit = t * shape.width * bits + c * bits;
        if (side == Side::values) {  // word w of a pair of tokens: 16 bits of the even one, then of the odd one
          const Index word = t / 2 * (shape.width * bits / 16) + c * bits / 16;
          bit = word * 32 + t % 2 * 16 + c * bits % 16;
        }
        unsigned two = 0;
        for (Index k = 0; k < 2 && bit / 8 + k < tiles.bytes; ++k)
          two |= std::to_integer<unsigned>(tile[bit / 8 + k]) << 8 * k;
        auto code = static_cast<std::uint8_t>(two >> bit % 8 & ((1u << bits) - 1u));
        if (C::form.ternary) {
          // Runs of 16 channels: five in each of two bytes of the first 16, in one of the other 10, one at the end.
          const Index run = c / 16, e = c % 16, y = e < 10 ? run * 2 + e / 5 : e < 15 ? run : 8 + run % 2;
          const Index plane = e < 10 ? 0 : shape.tokens * 16, row_bytes = e < 10 ? 16 : 10;
          Index place = plane + t * row_bytes + y;
          if (side == Side::values) place = plane + t / 2 * 2 * row_bytes + y / 2 * 4 + t % 2 * 2 + y % 2;
          constexpr unsigned powers[] = {1, 3, 9, 27, 81};
          const unsigned rest = std::to_integer<unsigned>(tile[place]) * powers[e < 15 ? e % 5 : run / 2] & 255u;
          code = static_cast<std::uint8_t>(rest * 3 >> 8);
        }
        if (C::form.bits == 3) {
          // Its two low bits are in half `half` of word `word` of the plane; two words have one of highest bits.
          const Index word = bit / 32, half = bit / 16 % 2, i = bit % 16 / 2;
          const Index high = shape.tokens * shape.width * 2 + word / 2 * 32 + half * 16 + word % 2 * 8;
          const unsigned byte = std::to_integer<unsigned>(tile[high / 8]);
          code = static_cast<std::uint8_t>(code | (byte >> (i % 4 * 2 + i / 4) & 1u) << 2);
        }
        const Index g =
            C::form.along == Along::channels ? t * (shape.width / group) + c / group : t / group * shape.width + c;
        const std::byte* scales = tile + shape.tokens * (C::form.ternary ? 26 : shape.width * C::form.bits / 8);
        const std::byte* zeros = scales + C::form.groups(shape) * detail::scale_size(C::form.scale);
        GroupBits x;
        for (Index k = 0; k < detail::scale_size(C::form.scale); ++k)
          x.scale |= std::to_integer<std::uint32_t>(scales[g * detail::scale_size(C::form.scale) + k]) << 8 * k;
        for (Index k = 0; k < detail::zero_size(C::form); ++k)
          x.zero |= std::to_integer<std::uint32_t>(zeros[g * detail::zero_size(C::form) + k]) << 8 * k;
        const float scaled = C::scale_of(x, tiles.host_state()) * C::level(code);
        const float value = C::form.zero == ZeroType::none ? scaled : scaled + C::zero_of(x, tiles.host_state());
        const float wanted = row[static_cast<std::size_t>(c)];
        ASSERT_TRUE(value == wanted || (value != value && wanted != wanted))
            << C::name << (side == Side::keys ? " keys" : " values") << " token " << t << " channel " << c;
      }
    }
  }
}

template <Codec C>
class DeviceTiles : public ::testing::Test {
 protected:
  template <class F>
  void for_each_shape(const F& f) {
    for (const Side side : {Side::keys, Side::values})
      for (const TileShape shape : {TileShape{16, 24}, {16, 64}, {32, 80}, {64, 80}, {64, 128}, {16, 256}})
        if (C::fits(shape) && !HasFatalFailure()) f(shape, side);
  }
  simt::Runtime runtime;
  Work work{runtime};
};

struct Names {
  template <Codec C>
  static std::string GetName(int) {
    return std::string(C::name);
  }
};

using FloatScales = Group<GroupSpec{.bits = 4, .fit = Fit::min_max, .group = 16, .scale = ScaleType::f32}>;
using SmallGroups = Symmetric<1, 8>;  // two to 16 bits
using Codecs =
    ::testing::Types<Int8, Symmetric<8, 32>, Int4, Affine<4, 32>, Affine<2, 32>, Int1, SmallGroups, Affine<1, 8>,
                     KvTunerToken<4>, MikvGroup<4>, FloatScales, KiviKeys<4, 16>, KiviKeys<2, 0>, KiviKeys<8, 16>,
                     Symmetric<3, 8>, KiviKeys<3, 16>, Symmetric<5, 16>, Q8_0, Q4_0, Q4_1, Q5_1, Q2_0, Q1_0, Iq4Nl,
                     Fp8E4M3, Fp8E5M2, MxFp4<>, NvFp4<>, Ternary<>, Ternary<TernaryFit::nonzero, Along::tokens, 16>,
                     Fixed<4>, Lloyd<4, true>, TurboQuant<4>, TurboQuant<3>, TurboProduct<3, 5>, Rotated<Int4>,
                     Rotated<KiviKeys<4, 16>, 1>, MikvKeys<4>, ZipVlKeys<8>, ZipVlValues<2>, Balanced<Rotated<Int4, 1>>,
                     ChannelScaled<NvFp4<>>, ChannelScaled<Ternary<>>, ChannelMeans, OddRows, Balanced<ChannelMeans>>;
TYPED_TEST_SUITE(DeviceTiles, Codecs, Names);

TYPED_TEST(DeviceTiles, LieAsTheLayoutSays) {
  this->for_each_shape([&](TileShape s, Side side) { check_layout<TypeParam>(this->runtime, this->work, s, side); });
}
TYPED_TEST(DeviceTiles, CanonicalBytesComeBack) {
  this->for_each_shape(
      [&](TileShape s, Side side) { Tiles<TypeParam>(this->runtime, this->work, s, side, 41).expect_same("repack"); });
}
TYPED_TEST(DeviceTiles, CodeAsTheCodecDoes) {
  this->for_each_shape([&](TileShape s, Side side) {
    for (const DType type : {DType::f32, DType::f16, DType::bf16})
      if (type == DType::f32 || s.width == 64)
        check_encode<TypeParam>(this->runtime, this->work, s, side, type, side == Side::keys ? 0 : 5,
                                type == DType::f16);
  });
}
TYPED_TEST(DeviceTiles, DecodeAsTheCodecDoes) {
  this->for_each_shape([&](TileShape s, Side side) {
    for (const bool neutral : {false, true})
      if (!neutral || state_floats<TypeParam>(s.width) > 0)
        check_decode<TypeParam>(this->runtime, this->work, s, side, neutral);
  });
}
TYPED_TEST(DeviceTiles, RowsMoveAsTheyAre) {
  this->for_each_shape([&](TileShape s, Side side) { check_moves<TypeParam>(this->runtime, this->work, s, side); });
}

}  // namespace
}  // namespace kvpare::test

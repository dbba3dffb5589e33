// The host's block against the table of block.cuh, and what it must find: missing barriers, divergence, overruns.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "simt/runtime.hpp"

namespace kvpare::test::simt {
namespace {

/// A kernel without state of its own: f(b) by every thread.
template <int threads_, class F>
struct Kernel {
  static constexpr int threads = threads_;
  F f;
  Index bytes = 0;
  Index shared_bytes() const { return bytes; }
  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    f(b);
  }
};
template <int threads, class F>
void run(Runtime& simt, Index blocks, Index shared_bytes, const F& f) {
  simt.launch(blocks, Kernel<threads, F>{f, shared_bytes});
}

template <class F>
std::string error_of(const F& f) {
  try {
    f();
  } catch (const std::logic_error& e) {
    return e.what();
  }
  return "no error";
}

template <class T>
struct Memory {
  Memory(Runtime& of, std::vector<T> from) : simt(of), size(static_cast<Index>(from.size())) {
    data = static_cast<T*>(simt.allocate(bytes()));
    simt.to_backend(data, from.data(), bytes());
  }
  ~Memory() { simt.release(data); }
  Index bytes() const { return size * static_cast<Index>(sizeof(T)); }
  std::vector<T> now() const {
    std::vector<T> host(static_cast<std::size_t>(size));
    simt.wait(simt.to_host(host.data(), data, bytes()));
    return host;
  }
  Runtime& simt;
  Index size;
  T* data;
};

TEST(Fibers, EveryThreadKnowsWhereItIs) {
  Runtime simt;
  const Memory<int> seen(simt, std::vector<int>(3 * 96, -1));
  run<96>(simt, 3, 0, [to = seen.data](auto& b) {
    EXPECT_EQ(b.threads(), 96);
    EXPECT_EQ(b.warps(), 3);
    EXPECT_EQ(b.blocks(), 3);
    EXPECT_EQ(b.thread(), 32 * b.warp() + b.lane());
    to[b.block() * 96 + b.thread()] = b.warp() * 100 + b.lane();
  });
  const auto now = seen.now();
  for (int i = 0; i < 3 * 96; ++i) EXPECT_EQ(now[static_cast<std::size_t>(i)], i % 96 / 32 * 100 + i % 32);
}

TEST(Fibers, WarpOperationsExchangeAcrossLanesOfTheirWarpAlone) {
  Runtime simt;
  run<96>(simt, 2, 0, [](auto& b) {
    const int t = b.thread(), first = 32 * b.warp(), lane = b.lane();
    EXPECT_EQ(b.shuffle(t, 5), first + 5);
    EXPECT_EQ(b.shuffle(t * 0.5, (lane * 7 + 3) % 32), (first + (lane * 7 + 3) % 32) * 0.5);
    EXPECT_EQ(b.shuffle(static_cast<float>(t), 31 - lane), static_cast<float>(first + 31 - lane));
    for (int mask = 0; mask < 32; ++mask) EXPECT_EQ(b.shuffle_xor(t, mask), first + (lane ^ mask));
    for (int n = 0; n < 32; ++n) EXPECT_EQ(b.shuffle_up(std::int64_t{t} << 40, n) >> 40, lane < n ? t : t - n);
    EXPECT_EQ(b.ballot(lane % 3 == 0), 0x49249249u);
    EXPECT_EQ(b.ballot(t == 40), b.warp() == 1 ? 1u << 8 : 0u);
    EXPECT_EQ(b.ballot(true), 0xffffffffu);
  });
}

TEST(Fibers, TransposeIsThatOfTheEightByEightMatrix) {
  Runtime simt;
  run<64>(simt, 1, 0, [](auto& b) {
    const auto element = [&](int row, int column) {
      return static_cast<std::uint32_t>(1000 * b.warp() + 10 * row + column);
    };
    const int row = b.lane() / 4, column = b.lane() % 4 * 2;
    EXPECT_EQ(b.transpose(element(row, column) | element(row, column + 1) << 16),
              element(column, row) | element(column + 1, row) << 16);
  });
}

/// A 16 x k matrix and a k x 8 one, and where the fragments of block.cuh have them: `per` numbers in a register.
template <class T, int k, int per>
struct Operands {
  T a[16][k], b[k][8];

  static std::uint32_t packed(const T* numbers) {
    std::uint32_t x = 0;
    std::memcpy(&x, numbers, 4);
    return x;
  }
  std::uint32_t a_of(int lane, int i) const {
    const int g = lane / 4, t = lane % 4;
    const int row = i == 1 || i == 3 ? g + 8 : g, column = i < 2 ? per * t : per * t + k / 2;
    return packed(&a[row][column]);
  }
  std::uint32_t b_of(int lane, int i) const {
    const int g = lane / 4, t = lane % 4;
    T down[per];
    for (int j = 0; j < per; ++j) down[j] = b[per * t + j + (i == 1 ? k / 2 : 0)][g];
    return packed(down);
  }
};
struct At {
  int row, column;
};
At c_at(int lane, int i) { return {i < 2 ? lane / 4 : lane / 4 + 8, 2 * (lane % 4) + i % 2}; }

template <class T, class Kind>
void expect_mma(bool whole_numbers) {
  Runtime simt;
  std::mt19937 random(7);
  for (int round = 0; round < 5; ++round) {
    Operands<T, 16, 2> of;
    const auto draw = [&] {
      return whole_numbers ? T(static_cast<float>(static_cast<int>(random() % 31) - 15))
                           : T(std::ldexp(static_cast<float>(random() % 2048) - 1024, -9));
    };
    for (auto& row : of.a)
      for (T& x : row) x = draw();
    for (auto& row : of.b)
      for (T& x : row) x = draw();
    run<32>(simt, 1, 0, [p = &of, whole_numbers](auto& b) {
      float c[4];
      std::uint32_t a[4], q[2];
      for (int i = 0; i < 4; ++i) a[i] = p->a_of(b.lane(), i), c[i] = static_cast<float>(100 * b.lane() + i);
      for (int i = 0; i < 2; ++i) q[i] = p->b_of(b.lane(), i);
      b.mma(c, a, q, Kind{});
      for (int i = 0; i < 4; ++i) {
        const auto [row, column] = c_at(b.lane(), i);
        double sum = 100 * b.lane() + i;
        for (int k = 0; k < 16; ++k)
          sum += static_cast<double>(static_cast<float>(p->a[row][k])) * static_cast<float>(p->b[k][column]);
        if (whole_numbers)
          EXPECT_EQ(c[i], sum);
        else
          EXPECT_NEAR(c[i], sum, 17 * 0x1p-24 * 4000);  // each of the sums below 4000 rounds once
      }
    });
  }
}
TEST(Fibers, MmaOfHalvesIsTheProductOfTheMatrices) {
  expect_mma<half, F16>(true);
  expect_mma<half, F16>(false);
}
TEST(Fibers, MmaOfBfloatsIsTheProductOfTheMatrices) {
  expect_mma<bfloat16, BF16>(true);
  expect_mma<bfloat16, BF16>(false);
}
TEST(Fibers, MmaOfBfloatsHasExactProducts) {  // 2^64 squared is no float
  Runtime simt;
  run<32>(simt, 1, 0, [](auto& b) {
    const std::uint32_t large = b.lane() % 4 == 0 ? b.pack(0x1p64f, 0, BF16{}) : 0;
    float c[4] = {-0x1.fffffep127f, 0, 0, 0};
    const std::uint32_t a[4] = {large, 0, 0, 0}, q[2] = {large, 0};
    b.mma(c, a, q, BF16{});
    EXPECT_EQ(c[0], 0x1p104f);
  });
}
TEST(Fibers, MmaOfBytesIsTheProductOfTheMatrices) {
  Runtime simt;
  std::mt19937 random(8);
  Operands<std::int8_t, 32, 4> of;
  for (auto& row : of.a)
    for (auto& x : row) x = static_cast<std::int8_t>(random());
  for (auto& row : of.b)
    for (auto& x : row) x = static_cast<std::int8_t>(random());
  run<64>(simt, 1, 0, [p = &of](auto& b) {
    int c[4];
    std::uint32_t a[4], q[2];
    for (int i = 0; i < 4; ++i) a[i] = p->a_of(b.lane(), i), c[i] = 1000 * b.lane() - i;
    for (int i = 0; i < 2; ++i) q[i] = p->b_of(b.lane(), i);
    b.mma(c, a, q, S8{});
    for (int i = 0; i < 4; ++i) {
      const auto [row, column] = c_at(b.lane(), i);
      int sum = 1000 * b.lane() - i;
      for (int k = 0; k < 32; ++k) sum += p->a[row][k] * p->b[k][column];
      EXPECT_EQ(c[i], sum);
    }
  });
}

TEST(Fibers, AsynchronousCopiesArriveWhenTheThreadThatBeganThemWaits) {
  Runtime simt;
  const Memory<std::uint32_t> from(simt, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12});
  run<32>(simt, 1, 48, [p = from.data](auto& b) {
    auto* s = b.template shared<std::uint32_t>(0);
    if (b.thread() == 0) {
      for (int i = 0; i < 2; ++i) {
        s[4 * i] = 0;
        b.copy_async(s + 4 * i, p + 4 * i);
        b.commit_copies();
      }
      b.copy_async(s + 8, p + 8);  // of no group yet
      EXPECT_EQ(s[0], 0xffffffffu) << "poison until it is there";
      b.template wait_copies<2>();
      EXPECT_EQ(s[0], 0xffffffffu);
      p[3] = 44;  // read when it arrives, not when it was begun
      b.template wait_copies<1>();
      EXPECT_EQ(s[0], 1u);
      EXPECT_EQ(s[3], 44u);
      EXPECT_EQ(s[4], 0xffffffffu) << "the newest group";
    }
    b.sync();
    if (b.thread() == 9) {
      b.template wait_copies<0>();
      EXPECT_EQ(s[4], 0xffffffffu) << "another thread's wait";
    }
    b.sync();
    if (b.thread() == 0) {
      b.template wait_copies<0>();
      EXPECT_EQ(s[7], 8u);
      EXPECT_EQ(s[8], 0xffffffffu) << "not committed";
      b.commit_copies();
      b.template wait_copies<0>();
      EXPECT_EQ(s[11], 12u);
    }
  });
}

TEST(Fibers, SharedMemoryIsPoisonAtTheBeginningOfEveryBlock) {
  Runtime simt;
  run<32>(simt, 3, 64, [](auto& b) {
    auto* s = b.template shared<float>(0);
    if (b.thread() < 16) {
      EXPECT_TRUE(std::isnan(s[b.thread()]));
      s[b.thread()] = 1;
    }
    b.sync();
    EXPECT_EQ(b.template shared<float>(60)[0], 1);
  });
}

TEST(Fibers, LoadsOfEverySize) {
  Runtime simt;
  const Memory<cuda::Words> from(simt, {{{0x03020100u, 0x07060504u, 0x0b0a0908u, 0x0f0e0d0cu}}});
  run<32>(simt, 1, 0, [p = from.data](auto& b) {
    EXPECT_EQ(b.load(p).w[3], 0x0f0e0d0cu);
    EXPECT_EQ(b.load(reinterpret_cast<const std::uint64_t*>(p) + 1), 0x0f0e0d0c0b0a0908u);
    EXPECT_EQ(b.load(reinterpret_cast<const std::uint8_t*>(p) + 5), 5);
  });
  EXPECT_EQ(error_of([&] {
              run<32>(simt, 1, 0, [p = from.data](auto& b) {
                if (b.thread() == 4) b.load(reinterpret_cast<const std::uint32_t*>(reinterpret_cast<char*>(p) + 2));
              });
            }),
            "block 0: thread 4: load from an address that is no multiple of 4");
}

TEST(Fibers, AtomicsGiveTheOldValue) {
  Runtime simt;
  const Memory<std::uint64_t> words(simt, {0, 0});
  const Memory<std::uint32_t> numbers(simt, {0, 0, 0});
  const Memory<float> sum(simt, {0.5f});
  run<64>(simt, 4, 0, [w = words.data, n = numbers.data, s = sum.data](auto& b) {
    const std::uint32_t ticket = b.add(&n[0], 1u);
    EXPECT_LT(ticket, 256u);
    b.add(&w[0], std::uint64_t{1} << 32);
    b.join(&w[1], std::uint64_t{1} << b.thread());
    const std::uint32_t bit = 1u << b.lane(), bits = b.join(&n[1], bit);
    EXPECT_EQ(n[1], bits | bit);
    const auto ten = static_cast<std::uint32_t>(b.thread() * 10), most = b.most(&n[2], ten);
    EXPECT_EQ(n[2], std::max(most, ten));
    const float old = b.add(s, 0.25f);
    EXPECT_EQ(*s, old + 0.25f);
  });
  EXPECT_EQ(words.now(), (std::vector<std::uint64_t>{std::uint64_t{256} << 32, ~std::uint64_t{0}}));
  EXPECT_EQ(numbers.now(), (std::vector<std::uint32_t>{256, ~0u, 630}));
  EXPECT_EQ(sum.now()[0], 64.5f);
}

TEST(Numbers, PowersOfTwo) {
  for (const float x : {0.0f, 1.0f, -1.0f, 0.3f, -17.25f, 100.5f})
    EXPECT_NEAR(FiberBlock::exp2(x) / std::exp2(static_cast<double>(x)), 1, 0x1p-22);
  EXPECT_EQ(FiberBlock::exp2(-std::numeric_limits<float>::infinity()), 0);
  EXPECT_EQ(FiberBlock::exp2(-130), 0) << "no subnormal results";
  EXPECT_EQ(FiberBlock::exp2(-126), 0x1p-126f);
}

TEST(Numbers, PairsPackAndUnpack) {
  EXPECT_EQ(FiberBlock::pack(1, -2, F16{}), 0xc0003c00u);
  EXPECT_EQ(FiberBlock::pack(1, -2, BF16{}), 0xc0003f80u);
  EXPECT_EQ(FiberBlock::pack(1 + 0x1p-11f, 1 + 3 * 0x1p-11f, F16{}), 0x3c023c00u) << "ties to even";
  EXPECT_EQ(FiberBlock::pack(1 + 0x1p-8f, 1 + 3 * 0x1p-8f, BF16{}), 0x3f823f80u) << "ties to even";
  EXPECT_EQ(FiberBlock::unpack_low(0xc0003c00u, F16{}), 1);
  EXPECT_EQ(FiberBlock::unpack_high(0xc0003c00u, F16{}), -2);
  EXPECT_EQ(FiberBlock::unpack_low(0xc0003f80u, BF16{}), 1);
  EXPECT_EQ(FiberBlock::unpack_high(0xc0003f80u, BF16{}), -2);
}

__extension__ using Wide = __int128;

/// The half nearest to n 2^-48, ties to even, in whole numbers.
std::uint16_t nearest_half(Wide n, bool negative_zero) {
  const bool negative = n < 0 || (n == 0 && negative_zero);
  const Wide size = n < 0 ? -n : n;
  const auto value = [](std::uint32_t bits) {  // of the positive half; one past the largest goes on in the same steps
    const std::uint32_t exponent = bits >> 10, fraction = bits & 0x3ff;
    return exponent == 0 ? static_cast<Wide>(fraction) << 24 : static_cast<Wide>(1024 + fraction) << (23 + exponent);
  };
  std::uint32_t low = 0, high = 0x7c00;  // value(low) <= size < value(high), or beyond
  if (size >= value(high)) return static_cast<std::uint16_t>((negative ? 0x8000u : 0u) | 0x7c00u);
  while (high - low > 1) (value((low + high) / 2) <= size ? low : high) = (low + high) / 2;
  const Wide below = size - value(low), above = value(high) - size;
  const std::uint32_t bits = below < above || (below == above && low % 2 == 0) ? low : high;
  return static_cast<std::uint16_t>((negative ? 0x8000u : 0u) | bits);
}
Wide scaled(std::uint16_t bits, int power) {
  return static_cast<Wide>(std::ldexp(static_cast<double>(detail::half_to_float(bits)), power));
}
void expect_fma(std::uint16_t a, std::uint16_t b, std::uint16_t c) {
  const auto minus_zero = [](std::uint16_t x) { return x == 0x8000; };
  const bool product_negative = ((a ^ b) & 0x8000) != 0;
  const Wide product = scaled(a, 24) * scaled(b, 24);
  EXPECT_EQ(FiberBlock::fma2(a | a * 65536u, b * 65537u, c * 65537u, F16{}),
            nearest_half(product + scaled(c, 48), product == 0 && product_negative && minus_zero(c)) * 65537u)
      << std::hex << a << ' ' << b << ' ' << c;
  EXPECT_EQ(FiberBlock::mul2(a * 65537u, b * 65537u, F16{}), nearest_half(product, product_negative) * 65537u)
      << std::hex << a << ' ' << b;
}
TEST(Numbers, PairsOfHalvesRoundOnce) {
  std::mt19937 random(9);
  for (int i = 0; i < 20000; ++i) {
    std::uint16_t x[3];
    for (auto& bits : x) do
        bits = static_cast<std::uint16_t>(random());
      while ((bits & 0x7c00) == 0x7c00);
    if (i % 2 == 0) x[2] = static_cast<std::uint16_t>(random() % 4);  // next to nothing: decides ties
    if (i % 4 == 0)
      x[0] = static_cast<std::uint16_t>(x[0] & 0xc300), x[2] = static_cast<std::uint16_t>(x[2] | (random() & 0x8000));
    expect_fma(x[0], x[1], x[2]);
  }
  for (const std::uint16_t c : {0x0000, 0x8000, 0x0001, 0x8001})  // 1.5 (1 + 2^-10) is halfway between two halves
    expect_fma(0x3e00, 0x3c01, c);
  EXPECT_EQ(FiberBlock::fma2(0x7c00, 0x3c00, 0xfc00, F16{}) & 0x7c00, 0x7c00u);
  EXPECT_TRUE(std::isnan(FiberBlock::unpack_low(FiberBlock::fma2(0x7c00, 0x3c00, 0xfc00, F16{}), F16{})));
  EXPECT_EQ(FiberBlock::mul2(0x7bff7c00u, 0xfbff3c00u, F16{}), 0xfc007c00u);
}
TEST(Numbers, PairsOfBfloatsRoundOnce) {
  const auto fma = [](float a, float b, float c) {
    return FiberBlock::unpack_low(FiberBlock::fma2(FiberBlock::pack(a, 0, BF16{}), FiberBlock::pack(b, 0, BF16{}),
                                                   FiberBlock::pack(c, 0, BF16{}), BF16{}),
                                  BF16{});
  };
  const float b = 1 + 0x1p-7f;  // 1.5 b = 387 / 256, halfway between 386 and 388
  EXPECT_EQ(fma(1.5f, b, 0), 388 / 256.0f);
  EXPECT_EQ(fma(1.5f, b, 0x1p-133f), 388 / 256.0f);
  EXPECT_EQ(fma(1.5f, b, -0x1p-133f), 386 / 256.0f) << "the sum is no double";
  EXPECT_EQ(fma(-1.5f, b, 0x1p-133f), -386 / 256.0f);
  EXPECT_EQ(fma(1.5f, 1 + 0x1p-6f, 0x1p-133f), 390 / 256.0f);
  EXPECT_EQ(fma(1.5f, 1 + 3 * 0x1p-7f, 0), 392 / 256.0f);  // 393, to even
  EXPECT_EQ(fma(1.5f, 1 + 3 * 0x1p-7f, 0x1p-133f), 394 / 256.0f);
  EXPECT_EQ(fma(0x1.fep127f, 1, 0x1p118f), 0x1.fep127f) << "less than half a step above the largest";
  EXPECT_TRUE(std::isinf(fma(0x1.fep127f, 1, 0x1p119f)));
  EXPECT_EQ(fma(0x1p-70f, 0x1p-64f, 0), 0) << "half of the smallest, to even";
  EXPECT_EQ(fma(0x1p-70f, 0x1.02p-64f, 0), 0x1p-133f);
  EXPECT_TRUE(std::signbit(FiberBlock::unpack_high(FiberBlock::mul2(0x80000000u, 0x3f800000u, BF16{}), BF16{})));
}

TEST(Numbers, PermuteTakesBytesOfTheSecondAboveTheFirst) {
  EXPECT_EQ(FiberBlock::permute(0x33221100u, 0x77665544u, 0x3210), 0x33221100u);
  EXPECT_EQ(FiberBlock::permute(0x33221100u, 0x77665544u, 0x7650), 0x77665500u);
  EXPECT_EQ(FiberBlock::permute(0x33221100u, 0x77665544u, 0x0426), 0x00442266u);
  EXPECT_NE(error_of([] { FiberBlock::permute(0, 0, 0x8000); }).find("permute: a nibble"), std::string::npos);
}

/// Sum of 0 .. 255 over eight warps; `broken` leaves a barrier out.
int wrong_sums(bool with_sync, std::uint64_t seed) {
  Runtime simt(Runtime::Settings{.arena_bytes = 1 << 16, .seed = seed});
  const Memory<int> sums(simt, std::vector<int>(4, 0));
  run<256>(simt, 4, 32, [with_sync, to = sums.data](auto& b) {
    int sum = b.thread();
    for (int mask = 16; mask > 0; mask /= 2) sum += b.shuffle_xor(sum, mask);
    auto* of_warps = b.template shared<int>(0);
    if (b.lane() == 0) of_warps[b.warp()] = sum;
    if (with_sync) b.sync();
    if (b.thread() == 0) {
      sum = 0;
      for (int w = 0; w < b.warps(); ++w) sum += of_warps[w];
      to[b.block()] = sum;
    }
  });
  int wrong = 0;
  for (const int sum : sums.now()) wrong += sum != 255 * 256 / 2;
  return wrong;
}
TEST(Schedules, AReductionOverEightWarpsNeedsItsBarrier) {
  int wrong = 0;
  for (std::uint64_t seed = 1; seed <= 5; ++seed) {
    EXPECT_EQ(wrong_sums(true, seed), 0);
    wrong += wrong_sums(false, seed);
  }
  EXPECT_GT(wrong, 0) << "the missing barrier does not show";
}

TEST(Schedules,
     AReaderThatIsLateAllTheSameNeedsTheBarrier) {  // warp 1 works for long: only a warp 0 left behind shows it
  int wrong = 0;
  for (std::uint64_t seed = 1; seed <= 8; ++seed) {
    Runtime simt(Runtime::Settings{.seed = seed});
    const Memory<int> seen(simt, std::vector<int>(8, 0));
    run<64>(simt, 8, 4, [to = seen.data](auto& b) {
      if (b.warp() == 1)
        for (int i = 0; i < 12; ++i) b.sync_warp();
      if (b.warp() == 0) b.sync_warp();
      if (b.thread() == 0) *b.template shared<int>(0) = 1;
      if (b.thread() == 32) to[b.block()] = *b.template shared<int>(0);
    });
    for (const int x : seen.now()) wrong += x != 1;
  }
  EXPECT_GT(wrong, 0);
}

TEST(Schedules, LanesOfAWarpNeedSyncWarp) {
  const auto wrong = [](bool with_sync) {
    Runtime simt;
    const Memory<int> seen(simt, std::vector<int>(32, 0));
    run<32>(simt, 1, 128, [with_sync, to = seen.data](auto& b) {
      auto* s = b.template shared<int>(0);
      s[b.lane()] = b.lane();
      if (with_sync) b.sync_warp();
      to[b.lane()] = s[(b.lane() + 31) % 32];
    });
    int count = 0;
    const auto now = seen.now();
    for (int lane = 0; lane < 32; ++lane) count += now[static_cast<std::size_t>(lane)] != (lane + 31) % 32;
    return count;
  };
  EXPECT_EQ(wrong(true), 0);
  EXPECT_GT(wrong(false), 1) << "one: lanes run in the order of their numbers";
}

TEST(Schedules, AreDrawnFromTheSeedAndChangeWithEveryWait) {
  const auto order = [](Runtime& simt) {
    const Memory<int> seen(simt, std::vector<int>(1 + 4 * 64 * 2, 0));
    run<64>(simt, 4, 0, [to = seen.data](auto& b) {
      for (int i = 0; i < 2; ++i) {
        to[++to[0]] = static_cast<int>(b.block()) * 64 + b.thread();
        b.sync();
      }
    });
    return seen.now();
  };
  Runtime simt;
  simt.seed(5);
  const auto first = order(simt), next = order(simt);
  EXPECT_NE(first, next);
  EXPECT_NE(std::vector(first.begin() + 1, first.begin() + 65), std::vector(first.begin() + 65, first.begin() + 129));
  std::vector<int> blocks;
  for (std::size_t i = 1; i < first.size(); i += 128) blocks.push_back(first[i] / 64);
  EXPECT_FALSE(std::is_sorted(blocks.begin(), blocks.end()));
  simt.seed(5);
  EXPECT_EQ(order(simt), first);
  simt.seed(6);
  EXPECT_NE(order(simt), first);
}

TEST(Schedules, NamedBarriersAreAmongTheirWarpsAlone) {
  Runtime simt;
  run<128>(simt, 3, 16, [](auto& b) {
    auto* s = b.template shared<int>(0);
    const int pair = b.warp() / 2;
    for (int i = 0; i < 20 + 10 * pair; ++i) {  // the pairs need not agree on how often
      if (b.thread() % 64 == 0) s[pair] = i;
      b.sync(1 + pair, 64);
      EXPECT_EQ(s[pair], i);
      b.sync(1 + pair, 64);
    }
    b.sync();
    EXPECT_EQ(s[0] + s[1], 19 + 29);
  });
}

template <int threads, class F>
std::string launch_error(const F& f) {
  Runtime simt;
  return error_of([&] { run<threads>(simt, 1, 64, f); });
}

TEST(Mistakes, ABarrierThatSomeNeverReach) {
  EXPECT_EQ(launch_error<64>([](auto& b) {
              if (b.thread() == 7) return;
              b.sync();
            }),
            "block 0: no thread can go on: threads 0-6, 8-63 wait in sync; thread 7 returned");
  EXPECT_EQ(launch_error<64>([](auto& b) {
              if (b.warp() == 0)
                b.sync();
              else
                b.sync(3, 64);
            }),
            "block 0: no thread can go on: threads 0-31 wait in sync; threads 32-63 wait in sync(3, 64)");
  EXPECT_EQ(launch_error<64>([](auto& b) {
              if (b.lane() < 4)
                b.sync();
              else
                b.ballot(true);
            }),
            "block 0: no thread can go on: threads 4-31, 36-63 wait in ballot; threads 0-3, 32-35 wait in sync");
}
TEST(Mistakes, AWarpOperationThatSomeNeverReach) {
  EXPECT_EQ(launch_error<64>([](auto& b) {
              if (b.thread() == 40) return;
              b.shuffle(1.0, 0);
            }),
            "block 0: no thread can go on: threads 32-39, 41-63 wait in shuffle of 8 bytes; threads 0-31, 40 returned");
}
TEST(Mistakes, LanesInDifferentOperations) {
  const auto text = launch_error<64>([](auto& b) {
    if (b.thread() == 35)
      b.shuffle(1, 0);
    else
      b.ballot(true);
  });
  EXPECT_NE(text.find("all lanes of a warp must be in the same operation"), std::string::npos) << text;
  EXPECT_NE(text.find("ballot"), std::string::npos) << text;
  EXPECT_NE(text.find("shuffle of 4 bytes"), std::string::npos) << text;
  EXPECT_NE(text.find("thread 35 is in"), std::string::npos) << text;
}
TEST(Mistakes, BarriersOfDifferentSizesOrOfPartsOfWarps) {
  EXPECT_NE(launch_error<96>([](auto& b) {
              b.sync(1, b.warp() == 0 ? 64 : 96);
            }).find("all must name the same number of threads"),
            std::string::npos);
  EXPECT_NE(launch_error<64>([](auto& b) {
              if (b.lane() < 16) b.sync(2, 32);
            }).find("are alone of their warp in sync(2, 32)"),
            std::string::npos);
  EXPECT_NE(launch_error<64>([](auto& b) { b.sync(16, 64); }).find("barrier 16, must be within [1, 15]"),
            std::string::npos);
  EXPECT_NE(launch_error<64>([](auto& b) { b.sync(1, 48); }).find("a barrier of 48 threads"), std::string::npos);
}
TEST(Mistakes, AddressesOfSharedMemoryAndCopies) {
  EXPECT_NE(launch_error<32>([](auto& b) { b.template shared<int>(2); }).find("no multiple of 4"), std::string::npos);
  EXPECT_NE(launch_error<32>([](auto& b) { b.template shared<int>(68); }).find("at 68 of 64 bytes"), std::string::npos);
  const cuda::Words words{};
  EXPECT_NE(launch_error<32>([from = &words](auto& b) {
              b.copy_async(b.template shared<char>(8), from);
            }).find("multiples of 16"),
            std::string::npos);
  EXPECT_NE(launch_error<32>([from = &words](auto& b) {
              b.copy_async(b.template shared<char>(64), from);
            }).find("not the block's"),
            std::string::npos);
}

TEST(Mistakes, AnExceptionOfAThreadComesOutOfTheLaunchWhichCanBeRepeated) {
  Runtime simt;
  for (int i = 0; i < 3; ++i) {
    EXPECT_THROW(run<64>(simt, 2, 0,
                         [](auto& b) {
                           b.sync();
                           if (b.thread() == 33) throw std::out_of_range("mine");
                           b.sync();
                         }),
                 std::out_of_range);
    run<96>(simt, 2, 0, [](auto& b) { EXPECT_EQ(b.shuffle(b.thread(), 3), 32 * b.warp() + 3); });
  }
  EXPECT_EQ(simt.counts.launches, 6);
}

TEST(Launch, Limits) {
  Runtime simt;
  const auto nothing = [](auto&) {};
  EXPECT_EQ(error_of([&] { run<48>(simt, 1, 0, nothing); }),
            "launch: 48 threads, must be a multiple of 32 within [32, 1024]");
  EXPECT_EQ(error_of([&] { run<1056>(simt, 1, 0, nothing); }),
            "launch: 1056 threads, must be a multiple of 32 within [32, 1024]");
  EXPECT_EQ(error_of([&] { run<32>(simt, 1, simt.shared_limit() + 1, nothing); }),
            "launch: 232449 bytes of shared memory, must be within [0, 232448]");
  EXPECT_NE(error_of([&] { run<32>(simt, -1, 0, nothing); }).find("launch: -1 blocks"), std::string::npos);
  run<32>(simt, 0, 0, [](auto&) { FAIL() << "there is no block"; });
  EXPECT_EQ(simt.counts.launches, 0);
  run<1024>(simt, 1, simt.shared_limit(), [](auto& b) { b.sync(); });
  EXPECT_EQ(simt.counts.launches, 1);
}

TEST(RuntimeDeathTest, MemoryIsBehindAWall) {
  Runtime simt;
  const Memory<int> number(simt, {3});
  EXPECT_DEATH(*static_cast<volatile int*>(number.data) = 1, "");
  int host = 0;
  const auto ticket = simt.to_host(&host, number.data, 4);
  EXPECT_EQ(host, -1) << "poison until waited for";
  simt.wait(ticket);
  EXPECT_EQ(host, 3);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(simt.allocate(1)) % 64, 0u);
}

TEST(RuntimeDeathTest, OverrunsAreFound) {
  if (!with_asan) GTEST_SKIP() << "needs the address sanitizer";
  Runtime simt;
  const Memory<char> first(simt, std::vector<char>(100, 0)), second(simt, std::vector<char>(100, 0));
  const auto touch = [&](const char* p) {
    run<32>(simt, 1, 0, [p](auto& b) {
      if (b.thread() != 31) return;
      [[maybe_unused]] volatile char read = b.load(p);
    });
  };
  touch(first.data), touch(first.data + 99), touch(second.data);
  EXPECT_DEATH(touch(first.data + 100), "use-after-poison");
  EXPECT_DEATH(touch(second.data - 1), "use-after-poison");
  EXPECT_DEATH(touch(second.data + 100), "use-after-poison");
  EXPECT_DEATH(touch(second.data + 4096), "use-after-poison") << "where nothing was allocated yet";
  const char* released = nullptr;
  {
    const Memory<char> third(simt, std::vector<char>(8, 0));
    released = third.data;
    touch(released);
  }
  EXPECT_DEATH(touch(released), "use-after-poison");

  const auto touch_shared = [&](Index at) {
    run<32>(simt, 1, 100, [at](auto& b) {
      b.sync();
      if (b.thread() == 5) b.template shared<char>(0)[at] = 1;
    });
  };
  touch_shared(99);
  EXPECT_DEATH(touch_shared(100), "heap-buffer-overflow");
  EXPECT_DEATH(touch_shared(-1), "heap-buffer-overflow");
}

}  // namespace
}  // namespace kvpare::test::simt

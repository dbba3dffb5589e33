// The loops of backend/cpu/kernels.hpp on every instruction set of this machine, against loops in double.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <kvpare/backend/cpu/kernels.hpp>
#include <kvpare/core/random.hpp>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace kvpare::cpu {
namespace {

constexpr float inf = std::numeric_limits<float>::infinity();
constexpr float nan = std::numeric_limits<float>::quiet_NaN();
constexpr float canary = -7.25e11f;

constexpr Index widths[] = {1, 3, 8, 16, 17, 64, 72, 80, 96, 128, 192, 256};
constexpr Index row_counts[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 33};
constexpr DType types[] = {DType::f32, DType::f16, DType::bf16};

// n elements that end where readable memory ends: one read or write too far is a crash, with intrinsics too.
template <class T>
class AtEnd {
 public:
  explicit AtEnd(Index n, T fill = T{}) : size_(n) {
    constexpr std::size_t page = 4096;
    const std::size_t bytes = static_cast<std::size_t>(n) * sizeof(T);
    mapped_ = (bytes + page - 1) / page * page + page;
    void* p = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    map_ = static_cast<std::byte*>(p);
    mprotect(map_ + mapped_ - page, page, PROT_NONE);
    data_ = reinterpret_cast<T*>(map_ + mapped_ - page - bytes);
    for (Index i = 0; i < n; ++i) data_[i] = fill;
  }
  AtEnd(AtEnd&& other) noexcept
      : size_(other.size_), mapped_(other.mapped_), map_(std::exchange(other.map_, nullptr)), data_(other.data_) {}
  AtEnd& operator=(AtEnd&&) = delete;
  ~AtEnd() {
    if (map_ != nullptr) munmap(map_, mapped_);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](Index i) { return data_[i]; }
  const T& operator[](Index i) const { return data_[i]; }
  Index size() const { return size_; }

 private:
  Index size_;
  std::size_t mapped_ = 0;
  std::byte* map_ = nullptr;
  T* data_ = nullptr;
};

float random_value(std::uint64_t seed, Index i) { return 2 * random_unit(seed, i) - 1; }

float rounded(float x, DType type) {
  return with_type(type, [&](auto* t) { return static_cast<float>(std::remove_pointer_t<decltype(t)>(x)); });
}

void put(std::byte* at, float x, DType type) {
  with_type(type, [&](auto* t) {
    const std::remove_pointer_t<decltype(t)> element(x);
    std::memcpy(at, &element, sizeof element);
  });
}

// One page of 64 slots. Unlisted slots, and the gap after each row, are NaN. Keeps its own values, in double.
struct Page {
  Index width, row_bytes;
  AtEnd<std::byte> bytes;
  std::vector<std::uint8_t> slots;
  std::vector<double> values;  // [count][width]
  RowSet set;

  Page(DType type, Index w, Index count, std::uint64_t seed, bool scattered)
      : width(w), row_bytes(w * size_of(type) + (scattered ? 3 * size_of(type) : 0)),
        bytes(63 * row_bytes + w * size_of(type)) {
    for (Index i = 0; i + size_of(type) <= bytes.size(); i += size_of(type)) put(bytes.data() + i, nan, type);
    // Scattered: the last slot first, then every third, so the row against the end of memory is among them.
    for (Index t = 0; t < count; ++t)
      slots.push_back(static_cast<std::uint8_t>(scattered ? (63 - t * 19 % 64) : t));
    for (Index t = 0; t < count; ++t)
      for (Index c = 0; c < w; ++c) {
        const float x = rounded(random_value(seed, t * w + c), type);
        put(bytes.data() + slots[static_cast<std::size_t>(t)] * row_bytes + c * size_of(type), x, type);
        values.push_back(x);
      }
    set = {bytes.data(), row_bytes, slots.data(), static_cast<int>(count), type};
  }
  double at(Index t, Index c) const { return values[static_cast<std::size_t>(t * width + c)]; }
};

// Rows with a gap between them; the gap of an input is NaN, that of an output holds canaries.
struct Rows {
  Index rows, width, stride;
  AtEnd<float> data;

  Rows(Index r, Index w, Index gap, float fill)
      : rows(r), width(w), stride(w + gap), data((r - 1) * (w + gap) + w, fill) {}
  static Rows random(Index r, Index w, std::uint64_t seed) {
    Rows x(r, w, 5, nan);
    for (Index i = 0; i < r; ++i)
      for (Index c = 0; c < w; ++c) x(i, c) = random_value(seed, i * w + c);
    return x;
  }
  float& operator()(Index i, Index c) { return data[i * stride + c]; }
  float* p() { return data.data(); }
  bool gaps_untouched() {
    for (Index i = 0; i + 1 < rows; ++i)
      for (Index c = width; c < stride; ++c)
        if ((*this)(i, c) != canary) return false;
    return true;
  }
};

// A float sum of n products, in any order, errs by at most about n * 2^-24 of the sum of their sizes.
double tolerance(Index n, double sum_of_sizes) { return static_cast<double>(n + 4) * 0x1p-24 * sum_of_sizes + 1e-37; }

class CpuKernels : public ::testing::TestWithParam<Isa> {
 protected:
  const Kernels& k = kernels(GetParam());

  void check_dot(DType type, Index width, Index rows, Index count, bool scattered) {
    SCOPED_TRACE(::testing::Message() << name_of(type) << " width " << width << " rows " << rows << " count " << count);
    const Page keys(type, width, count, 1, scattered), next(type, width, 64 - count, 2, scattered);
    Rows q = Rows::random(rows, width, 3), out(rows, count + 1, 2, canary);
    k.dot(q.p(), q.stride, rows, width, keys.set, next.set, out.p(), out.stride);
    for (Index i = 0; i < rows; ++i) {
      for (Index t = 0; t < count; ++t) {
        double want = 0, size = 0;
        for (Index c = 0; c < width; ++c) want += q(i, c) * keys.at(t, c), size += std::abs(q(i, c) * keys.at(t, c));
        ASSERT_NEAR(out(i, t), want, tolerance(width, size)) << "row " << i << " token " << t;
      }
      ASSERT_EQ(out(i, count), canary);
    }
    ASSERT_TRUE(out.gaps_untouched());
  }

  void check_accumulate(DType type, Index width, Index rows, Index count, bool scattered, bool with_alpha) {
    SCOPED_TRACE(::testing::Message() << name_of(type) << " width " << width << " rows " << rows << " count " << count
                                      << " alpha " << with_alpha);
    const Page values(type, width, count, 1, scattered), next(type, width, 64 - count, 2, scattered);
    Rows p = Rows::random(rows, count + 1, 3), acc(rows, width, 3, canary);
    AtEnd<float> alpha(rows);
    std::vector<double> want(static_cast<std::size_t>(rows * width)), size = want;
    for (Index i = 0; i < rows; ++i) {
      alpha[i] = i % 3 == 1 ? 0.0f : random_unit(4, i);
      const double factor = with_alpha ? alpha[i] : 1.0;
      for (Index c = 0; c < width; ++c) {
        acc(i, c) = factor == 0 ? nan : random_value(5, i * width + c);
        auto& w = want[static_cast<std::size_t>(i * width + c)];
        auto& s = size[static_cast<std::size_t>(i * width + c)];
        w = factor == 0 ? 0 : factor * acc(i, c);
        s = std::abs(w);
        for (Index t = 0; t < count; ++t) w += p(i, t) * values.at(t, c), s += std::abs(p(i, t) * values.at(t, c));
      }
    }
    k.accumulate(p.p(), p.stride, with_alpha ? alpha.data() : nullptr, rows, width, values.set, next.set, acc.p(),
                 acc.stride);
    for (Index i = 0; i < rows; ++i)
      for (Index c = 0; c < width; ++c)
        ASSERT_NEAR(acc(i, c), want[static_cast<std::size_t>(i * width + c)],
                    tolerance(count, size[static_cast<std::size_t>(i * width + c)]))
            << "row " << i << " channel " << c;
    ASSERT_TRUE(acc.gaps_untouched());
  }

  void check_panel(DType type, Index width, Index rows, Index count) {
    SCOPED_TRACE(::testing::Message() << name_of(type) << " width " << width << " rows " << rows << " count " << count);
    const Page keys(type, width, count, 1, true);
    std::vector<const std::byte*> at;
    for (int t = 0; t < count; ++t) at.push_back(keys.set.row(t));
    AtEnd<std::byte> panel(k.panel_bytes(width, type), std::byte{0x7f});
    k.pack_panel(at.data(), count, width, type, panel.data());
    Rows q = Rows::random(rows, width, 3), out(rows, k.panel_tokens, 2, canary);
    k.dot_panel(q.p(), q.stride, rows, width, panel.data(), type, out.p(), out.stride);
    for (Index i = 0; i < rows; ++i)
      for (Index t = 0; t < k.panel_tokens; ++t) {
        double want = 0, size = 0;
        for (Index c = 0; c < width && t < count; ++c)
          want += q(i, c) * keys.at(t, c), size += std::abs(q(i, c) * keys.at(t, c));
        ASSERT_NEAR(out(i, t), want, tolerance(width, size)) << "row " << i << " token " << t;
      }
    ASSERT_TRUE(out.gaps_untouched());
  }
};

TEST_P(CpuKernels, DotMatchesLoops) {
  for (const DType type : types) {
    for (const Index width : widths)
      for (const Index rows : row_counts) check_dot(type, width, rows, 11, true);
    for (const Index width : {Index{17}, Index{128}})
      for (Index count = 0; count <= 64; ++count) check_dot(type, width, 7, count, count % 2 == 0);
  }
}

TEST_P(CpuKernels, AccumulateMatchesLoops) {
  for (const DType type : types) {
    for (const Index width : widths)
      for (const Index rows : row_counts) check_accumulate(type, width, rows, 11, true, rows % 2 == 0);
    for (const Index width : {Index{17}, Index{128}})
      for (Index count = 0; count <= 64; ++count)
        check_accumulate(type, width, 7, count, count % 2 == 0, count % 3 != 0);
  }
}

TEST_P(CpuKernels, NoRowsTouchNothing) {
  const Page page(DType::f16, 128, 64, 1, false);
  k.dot(nullptr, 0, 0, 128, page.set, page.set, nullptr, 0);
  k.accumulate(nullptr, 0, nullptr, 0, 128, page.set, page.set, nullptr, 0);
  k.dot_panel(nullptr, 0, 0, 128, nullptr, DType::f16, nullptr, 0);
  k.running_softmax(nullptr, 0, 0, 64, nullptr, nullptr, nullptr);
}

TEST_P(CpuKernels, PanelMatchesLoops) {
  ASSERT_GE(k.panel_tokens, 16);
  ASSERT_LE(k.panel_tokens, 64);
  for (const DType type : types) {
    for (const Index width : widths)
      for (const Index rows : row_counts) check_panel(type, width, rows, k.panel_tokens);
    for (const Index width : {Index{17}, Index{128}})
      for (Index count = 0; count <= k.panel_tokens; ++count) check_panel(type, width, 5, count);
    for (Index rows = 1; rows <= 33; ++rows) check_panel(type, 24, rows, k.panel_tokens);
  }
}

TEST_P(CpuKernels, RunningSoftmaxIsTheSoftmaxOfAllPages) {
  for (const Index n : {Index{1}, Index{5}, Index{16}, Index{33}, Index{64}}) {
    constexpr Index rows = 5, pages = 4;
    AtEnd<float> peak(rows, -inf), sum(rows, 0.0f), alpha(rows, canary);
    std::vector<std::vector<double>> logits(rows), p(rows);
    for (Index page = 0; page < pages; ++page) {
      Rows x(rows, n, 3, canary);
      for (Index i = 0; i < rows; ++i)
        for (Index t = 0; t < n; ++t) {
          // Row 1 sees nothing in the first page, row 2 nothing at all, row 3 every second token.
          const bool seen = !(i == 1 && page == 0) && i != 2 && !(i == 3 && t % 2 != 0);
          x(i, t) = seen ? 30 * random_value(static_cast<std::uint64_t>(page), i * n + t) : -inf;
          logits[static_cast<std::size_t>(i)].push_back(x(i, t));
        }
      k.running_softmax(x.p(), x.stride, rows, n, peak.data(), sum.data(), alpha.data());
      ASSERT_TRUE(x.gaps_untouched());
      for (Index i = 0; i < rows; ++i) {
        for (double& old : p[static_cast<std::size_t>(i)]) old *= alpha[i];
        for (Index t = 0; t < n; ++t) p[static_cast<std::size_t>(i)].push_back(x(i, t));
      }
      ASSERT_EQ(alpha[2], 1.0f);
      ASSERT_TRUE(page > 0 || alpha[0] == 0.0f);
    }
    for (Index i = 0; i < rows; ++i) {
      const auto& all = logits[static_cast<std::size_t>(i)];
      double most = -inf, total = 0;
      for (const double x : all) most = std::max(most, x);
      for (const double x : all) total += i == 2 ? 0 : std::exp2(x - most);
      ASSERT_EQ(peak[i], static_cast<float>(most));
      ASSERT_NEAR(sum[i], total, 2e-6 * total);
      for (std::size_t t = 0; t < all.size(); ++t) {
        const double want = i == 2 ? 0 : std::exp2(all[t] - most);
        ASSERT_NEAR(p[static_cast<std::size_t>(i)][t], want, 4e-6 * want + 1e-37) << "row " << i << " token " << t;
      }
    }
  }
}

TEST_P(CpuKernels, RunningSoftmaxKeepsNaNVisible) {
  float x[3] = {1, nan, 3}, peak = -inf, sum = 0, alpha = 0;
  k.running_softmax(x, 3, 1, 3, &peak, &sum, &alpha);
  EXPECT_EQ(peak, 3);
  EXPECT_EQ(x[0], 0.25f);
  EXPECT_TRUE(std::isnan(x[1]));
  EXPECT_EQ(x[2], 1.0f);
  EXPECT_TRUE(std::isnan(sum));
}

TEST_P(CpuKernels, MaxOf) {
  EXPECT_EQ(k.max_of(nullptr, 0), -inf);
  for (Index n = 1; n <= 200; ++n) {
    AtEnd<float> x(n);
    for (Index i = 0; i < n; ++i) x[i] = -2 - random_unit(1, i);
    for (const Index place : {Index{0}, n / 2, n - 1}) {
      const float kept = x[place];
      x[place] = -1;
      ASSERT_EQ(k.max_of(x.data(), n), -1) << n << " at " << place;
      x[place] = nan;
      const float most = k.max_of(x.data(), n);
      ASSERT_TRUE(n == 1 ? most == -inf : most <= -2 && most >= -3) << n << " at " << place;
      x[place] = kept;
    }
  }
}

TEST_P(CpuKernels, Exp2WithinItsBound) {
  AtEnd<float> x(1 << 16);
  for (Index i = 0; i < x.size(); ++i) x[i] = -126 * static_cast<float>(i) / static_cast<float>(x.size()) + 0.3f;
  std::vector<double> want;
  double total = 0;
  constexpr float shift = 0.3f;
  for (Index i = 0; i < x.size(); ++i) {
    want.push_back(std::exp2(static_cast<double>(x[i] - shift)));
    total += want.back();
  }
  const double sum = k.exp2_shift_sum(x.data(), x.size(), shift);
  for (Index i = 0; i < x.size(); ++i)
    ASSERT_NEAR(x[i], want[static_cast<std::size_t>(i)], 2e-7 * want[static_cast<std::size_t>(i)]) << i;
  EXPECT_NEAR(sum, total, 1e-5 * total);
}

TEST_P(CpuKernels, Exp2OfEveryFractionAndSpecialValues) {
  // All floats of [-1, -1/2): every rounding of the reduced argument near its worst.
  std::vector<float> x;
  for (std::uint32_t bits = 0xbf000000u; bits <= 0xbf800000u; bits += 3) x.push_back(std::bit_cast<float>(bits));
  auto y = x;
  k.exp2_shift_sum(y.data(), static_cast<Index>(y.size()), 0);
  for (std::size_t i = 0; i < x.size(); ++i) {
    const double want = std::exp2(static_cast<double>(x[i]));
    ASSERT_LE(std::abs(y[i] - want), 2e-7 * want) << x[i];
  }

  for (Index n = 1; n <= 70; ++n) {
    AtEnd<float> z(n);
    for (Index i = 0; i < n; ++i) z[i] = i % 4 == 0 ? 5.0f : i % 4 == 1 ? -inf : i % 4 == 2 ? 4.0f : -200.0f;
    const float sum = k.exp2_shift_sum(z.data(), n, 5);
    float want = 0;
    for (Index i = 0; i < n; ++i) {
      const float p = i % 4 == 0 ? 1.0f : i % 4 == 2 ? 0.5f : 0.0f;
      ASSERT_EQ(z[i], p) << n << " at " << i;
      want += p;
    }
    ASSERT_EQ(sum, want) << n;
    z[n - 1] = nan;
    ASSERT_TRUE(std::isnan(k.exp2_shift_sum(z.data(), n, 5)));
    ASSERT_TRUE(std::isnan(z[n - 1]));
  }
  EXPECT_EQ(k.exp2_shift_sum(nullptr, 0, 0), 0.0f);
  float edge[4] = {-126, std::nextafter(-126.0f, -inf), 100, 127};
  k.exp2_shift_sum(edge, 4, 0);
  EXPECT_EQ(edge[0], 0x1p-126f);
  EXPECT_EQ(edge[1], 0.0f);
  EXPECT_EQ(edge[2], 0x1p100f);
  EXPECT_EQ(edge[3], 0x1p127f);
}

TEST_P(CpuKernels, ScaledRows) {
  for (Index n = 0; n <= 70; ++n) {
    AtEnd<float> x(n), sum(n), most(n), product(n);
    for (Index i = 0; i < n; ++i) x[i] = random_value(1, i), product[i] = x[i], sum[i] = most[i] = random_value(2, i);
    k.add_scaled(x.data(), n, 3, sum.data());
    k.max_scaled(x.data(), n, 3, most.data());
    k.multiply(product.data(), n, 3);
    for (Index i = 0; i < n; ++i) {
      ASSERT_NEAR(sum[i], random_value(2, i) + 3.0 * x[i], 1e-6) << n << " at " << i;
      ASSERT_EQ(most[i], std::max(random_value(2, i), 3 * x[i])) << n << " at " << i;
      ASSERT_EQ(product[i], 3 * x[i]) << n << " at " << i;
    }
    if (n == 0) continue;
    x[n - 1] = nan;
    k.max_scaled(x.data(), n, 3, most.data());
    ASSERT_FALSE(std::isnan(most[n - 1]));
  }
}

TEST_P(CpuKernels, EveryHalfAndBfloat16Widens) {
  std::vector<std::uint16_t> all(65536);
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::uint16_t>(i);
  AtEnd<float> out(65536);
  for (const DType type : {DType::f16, DType::bf16}) {
    k.to_float(reinterpret_cast<const std::byte*>(all.data()), type, 65536, out.data());
    for (Index i = 0; i < 65536; ++i) {
      const auto bits = static_cast<std::uint16_t>(i);
      const float want = type == DType::f16 ? kvpare::detail::half_to_float(bits) : kvpare::detail::bfloat16_to_float(bits);
      if (std::isnan(want)) {
        ASSERT_TRUE(std::isnan(out[i])) << i;
      } else {
        ASSERT_EQ(std::bit_cast<std::uint32_t>(out[i]), std::bit_cast<std::uint32_t>(want)) << i;
      }
    }
  }
}

TEST_P(CpuKernels, NarrowingGivesTheBitsOfCore) {
  // Around every half and bfloat16: the value, the tie above it, and the neighbours of that tie; both signs.
  std::vector<float> x = {0.0f,  -0.0f, inf,     -inf,   nan,      -nan,       65504,    65519,     65519.996f, 65520,
                          65536, 1e30f, 3.4e38f, 1e-45f, 0x1p-25f, 0x1.8p-25f, 0x1p-26f, 0x1p-126f, 0x1p-127f};
  for (const std::uint32_t bits : {0x7f800001u, 0x7fbfffffu, 0xff812345u, 0x7fc00001u, 0xffffffffu})
    x.push_back(std::bit_cast<float>(bits));
  for (std::uint32_t i = 0; i < 65536; ++i) {
    for (const std::uint32_t base : {std::bit_cast<std::uint32_t>(kvpare::detail::half_to_float(static_cast<std::uint16_t>(i))),
                                     i << 16})
      for (const std::uint32_t add : {0u, 0xfffu, 0x1000u, 0x1001u, 0x7fffu, 0x8000u, 0x8001u})
        x.push_back(std::bit_cast<float>(base + add));
    x.push_back((static_cast<float>(i & 0x7ffu) + 0.5f) * 0x1p-24f);  // ties between subnormal halves
  }
  const Index n = static_cast<Index>(x.size());
  for (const DType type : {DType::f16, DType::bf16}) {
    AtEnd<std::uint16_t> out(n);
    k.from_float(x.data(), n, type, reinterpret_cast<std::byte*>(out.data()));
    for (Index i = 0; i < n; ++i) {
      const float v = x[static_cast<std::size_t>(i)];
      const std::uint16_t want = type == DType::f16 ? kvpare::detail::float_to_half(v) : kvpare::detail::float_to_bfloat16(v);
      ASSERT_EQ(out[i], want) << name_of(type) << " of bits " << std::hex << std::bit_cast<std::uint32_t>(v);
    }
  }
}

TEST_P(CpuKernels, ConversionsOfAnyLength) {
  for (const DType type : types)
    for (Index n = 0; n <= 40; ++n) {
      AtEnd<float> x(n), back(n);
      AtEnd<std::byte> stored(n * size_of(type));
      for (Index i = 0; i < n; ++i) x[i] = random_value(1, i);
      k.from_float(x.data(), n, type, stored.data());
      k.to_float(stored.data(), type, n, back.data());
      for (Index i = 0; i < n; ++i) ASSERT_EQ(back[i], rounded(x[i], type)) << name_of(type) << " " << n << " at " << i;
    }
}

std::vector<Isa> sets_of_this_machine() {
  std::vector<Isa> sets;
  for (const Isa isa : {Isa::plain, Isa::avx2, Isa::avx512})
    if (supports(isa)) sets.push_back(isa);
  return sets;
}
INSTANTIATE_TEST_SUITE_P(Sets, CpuKernels, ::testing::ValuesIn(sets_of_this_machine()),
                         [](const auto& set) { return std::string(name_of(set.param)); });

TEST(CpuIsa, WordsAreNamesOfSets) {
  EXPECT_EQ(isa_from_text(nullptr), detected_isa());
  EXPECT_EQ(isa_from_text(""), detected_isa());
  for (const Isa isa : sets_of_this_machine()) EXPECT_EQ(isa_from_text(std::string(name_of(isa)).c_str()), isa);
  for (const char* word : {"sse", "AVX2", "avx512 ", "avx"}) {
    try {
      isa_from_text(word);
      FAIL() << word;
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(std::string(e.what()), std::string("KVPARE_ISA = '") + word + "', must be one of: plain avx2 avx2_vnni avx512 avx512_vnni");
    }
  }
  for (const Isa isa : all_isas) {
    if (supports(isa)) continue;
    EXPECT_THROW(isa_from_text(std::string(name_of(isa)).c_str()), InvalidArgument);
  }
  EXPECT_TRUE(supports(chosen_isa()));
}

}  // namespace
}  // namespace kvpare::cpu

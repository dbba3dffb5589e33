// What warps and blocks find out together (backend/cuda/collectives.cuh), against sums in order on the host.
#include <gtest/gtest.h>

#include <kvpare/backend/cuda/collectives.cuh>
#include <limits>
#include <vector>

#include "runtime.hpp"

namespace kvpare::test::simt {
namespace {

/// Memory of the runtime, filled and read back.
template <class T>
class Array {
 public:
  Array(Runtime& runtime, const std::vector<T>& values)
      : runtime_(&runtime), size_(values.size()), data_(static_cast<T*>(runtime.allocate(bytes()))) {
    runtime.to_backend(data_, values.data(), bytes());
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { runtime_->release(data_); }
  T* data() const { return data_; }
  std::vector<T> read() const {
    std::vector<T> values(size_);
    runtime_->wait(runtime_->to_host(values.data(), data_, bytes()));
    return values;
  }

 private:
  Index bytes() const { return static_cast<Index>(size_ * sizeof(T)); }
  Runtime* runtime_;
  std::size_t size_;
  T* data_;
};

template <class T>
std::vector<T> some(int n) {
  std::vector<T> values;
  Draws draws(static_cast<std::uint64_t>(n));
  for (int i = 0; i < n; ++i) values.push_back(static_cast<T>(static_cast<int>(draws.below(2001)) - 1000));
  return values;
}

template <class T>
struct WarpKernel {
  static constexpr int threads = 96;
  const T* x;
  T *sum, *least, *scan;
  Index shared_bytes() const { return 0; }
  template <class Block>
  void operator()(Block& b) const {
    const int t = b.thread();
    sum[t] = cuda::warp_sum(b, x[t]);
    least[t] = cuda::warp_fold(b, x[t], cuda::Least{});
    scan[t] = cuda::warp_scan(b, x[t]);
  }
};

/// Each collective twice, on the same room after a sync.
template <class T, int thread_count>
struct BlockKernel {
  static constexpr int threads = thread_count;
  const T* x;
  T *sum, *most, *before, *total;
  Index shared_bytes() const { return 32 * static_cast<Index>(sizeof(T)); }
  template <class Block>
  void operator()(Block& b) const {
    const int t = b.thread();
    T* room = b.template shared<T>(0);
    sum[t] = cuda::block_sum(b, x[t], room);
    b.sync();
    most[t] = cuda::block_fold(b, x[t], std::numeric_limits<T>::lowest(), cuda::Greatest{}, room);
    b.sync();
    const auto scan = cuda::block_scan(b, x[t], room);
    before[t] = scan.before, total[t] = scan.total;
  }
};

template <class T>
class Collectives : public ::testing::Test {};
using Numbers = ::testing::Types<int, Index, float, double>;
TYPED_TEST_SUITE(Collectives, Numbers);

TYPED_TEST(Collectives, OfAWarp) {
  using T = TypeParam;
  Runtime runtime;
  const auto x = some<T>(96);
  const Array<T> in(runtime, x), sum(runtime, x), least(runtime, x), scan(runtime, x);
  runtime.launch(1, WarpKernel<T>{in.data(), sum.data(), least.data(), scan.data()});
  for (std::size_t w = 0; w < 3; ++w) {
    T running = 0, lowest = x[32 * w];
    for (std::size_t i = 32 * w; i < 32 * w + 32; ++i) {
      running += x[i], lowest = std::min(lowest, x[i]);
      EXPECT_EQ(scan.read()[i], running) << i;
    }
    for (std::size_t i = 32 * w; i < 32 * w + 32; ++i) {
      EXPECT_EQ(sum.read()[i], running) << i;
      EXPECT_EQ(least.read()[i], lowest) << i;
    }
  }
}

template <class T, int threads>
void check_block(std::vector<T> x) {
  for (std::uint64_t seed = 1; seed <= 8; ++seed) {
    Runtime runtime;
    runtime.seed(seed);
    const Array<T> in(runtime, x), sum(runtime, x), most(runtime, x), before(runtime, x), total(runtime, x);
    runtime.launch(1, BlockKernel<T, threads>{in.data(), sum.data(), most.data(), before.data(), total.data()});
    T running = 0, highest = x[0];
    const auto got = before.read();
    for (std::size_t i = 0; i < x.size(); ++i) {
      ASSERT_EQ(got[i], running) << threads << " threads, seed " << seed << ", thread " << i;
      running += x[i], highest = std::max(highest, x[i]);
    }
    EXPECT_EQ(sum.read(), std::vector<T>(x.size(), running)) << threads << " threads, seed " << seed;
    EXPECT_EQ(total.read(), std::vector<T>(x.size(), running)) << threads << " threads, seed " << seed;
    EXPECT_EQ(most.read(), std::vector<T>(x.size(), highest)) << threads << " threads, seed " << seed;
  }
}

TYPED_TEST(Collectives, OfABlock) {
  check_block<TypeParam, 32>(some<TypeParam>(32));
  check_block<TypeParam, 96>(some<TypeParam>(96));
  check_block<TypeParam, 256>(some<TypeParam>(256));
  check_block<TypeParam, 1024>(some<TypeParam>(1024));
}

TEST(CollectiveCases, AScanAddsAndNeverSubtracts) {
  std::vector<double> x(256, 1);
  x[100] = std::numeric_limits<double>::infinity();
  check_block<double, 256>(x);
}

struct BallotKernel {
  static constexpr int threads = 32;
  std::uint64_t* out;
  Index shared_bytes() const { return 0; }
  template <class Block>
  void operator()(Block& b) const {
    const std::uint64_t bits = cuda::ballot(b, b.lane() % 3 == 0, b.lane() == 31);
    if (b.lane() == 7) *out = bits;
  }
};

TEST(CollectiveCases, ABallotOfSixtyFour) {
  Runtime runtime;
  const Array<std::uint64_t> out(runtime, {0});
  runtime.launch(1, BallotKernel{out.data()});
  EXPECT_EQ(out.read()[0], 0x8000000049249249u);
}

}  // namespace
}  // namespace kvpare::test::simt

// The wall itself: what the other suites rely on when they say "on the walled backend too".
#include <gtest/gtest.h>

#include "support/inputs.hpp"

namespace kvpare::test {
namespace {

struct Store {
  int* to;
  int value;
  void operator()(Index) const { *to = value; }
};

TEST(WallDeathTest, MemoryCannotBeTouchedOutsideAVerb) {
  WalledBackend be(Index{1} << 16);
  const Buffer<WalledBackend, int> number(be, 1);
  volatile int* outside = number.data();
  EXPECT_DEATH(*outside = 1, "");
  EXPECT_DEATH((void)*outside, "");
  be.each(1, Store{number.data(), 7});
  EXPECT_EQ(download(be, number)[0], 7);
  EXPECT_DEATH((void)*outside, "");  // closed again
}

TEST(Wall, CopiesArriveWhenTheyAreWaitedForAndNotBefore) {
  WalledBackend be(Index{1} << 16);
  const auto numbers = upload(be, std::vector<int>{1, 2});
  int first = 0, second = 0;
  const auto ticket = be.to_host(&first, numbers.data(), sizeof(int));
  const auto later = be.to_host(&second, numbers.data() + 1, sizeof(int));
  be.each(1, Store{numbers.data(), 9});  // queued after the copy: it must not show
  EXPECT_EQ(first, -1) << "poison until waited for";
  be.wait(ticket);
  EXPECT_EQ(first, 1);
  EXPECT_EQ(second, -1) << "the later copy has not been waited for";
  be.wait(later);
  EXPECT_EQ(second, 2);
}

TEST(Wall, AWaitDeliversAllCopiesBeforeIt) {
  WalledBackend be(Index{1} << 16);
  const auto numbers = upload(be, std::vector<int>{1, 2});
  int first = 0, second = 0;
  be.to_host(&first, numbers.data(), sizeof(int));
  be.wait(be.to_host(&second, numbers.data() + 1, sizeof(int)));
  EXPECT_EQ(first, 1);
  EXPECT_EQ(second, 2);
}

TEST(Wall, FreshAndReleasedMemoryIsNaN) {
  WalledBackend be(Index{1} << 16);
  void* before = nullptr;
  {
    const auto numbers = upload(be, std::vector<float>{1, 2, 3});
    before = numbers.data();
  }
  const Buffer<WalledBackend, float> again(be, 3);
  ASSERT_EQ(static_cast<void*>(again.data()), before) << "the same place";
  for (const float x : download(be, again)) EXPECT_TRUE(std::isnan(x));
}

TEST(Wall, HostMemoryMayBeReusedAtOnce) {
  WalledBackend be(Index{1} << 16);
  std::vector<int> from{5};
  const Buffer<WalledBackend, int> number(be, 1);
  be.to_backend(number.data(), from.data(), sizeof(int));
  from[0] = 6;
  EXPECT_EQ(download(be, number)[0], 5);
}

TEST(Wall, CountsWhatCrossesIt) {
  WalledBackend be(Index{1} << 16);
  const auto numbers = upload(be, std::vector<int>{1, 2});
  fill(be, numbers.data(), 2, 3);
  (void)download(be, numbers);
  EXPECT_EQ(be.counts.copies_in, 1);
  EXPECT_EQ(be.counts.copies_out, 1);
  EXPECT_EQ(be.counts.waits, 1);
  EXPECT_EQ(be.counts.launches, 1);
}

TEST(Wall, AFullArenaIsARefusalAndFreedMemoryJoins) {
  WalledBackend be(4096);
  EXPECT_EQ(be.allocate(4097), nullptr);
  void* a = be.allocate(1024);
  void* b = be.allocate(3072);
  ASSERT_NE(a, nullptr);
  ASSERT_NE(b, nullptr);
  EXPECT_EQ(be.allocate(1), nullptr);
  be.release(a);
  be.release(b);
  EXPECT_EQ(be.allocations(), 0);
  void* all = be.allocate(4096);
  EXPECT_NE(all, nullptr);
  be.release(all);
  EXPECT_THROW(be.release(all), std::logic_error);
  EXPECT_NE(error_of([&] { (Buffer<WalledBackend, int>(be, 4096)); }).find("walled backend: no memory for 16384 bytes"),
            std::string::npos);
}

}  // namespace
}  // namespace kvpare::test

// The block of backend/cuda/block.cuh on the host: a fiber per thread. Each runs until it must wait for others; who goes
// first is drawn, and so is which warps run far ahead, so that a barrier that is missing shows in the results of some seed.
// What a device would hang on, or do in a way nobody documents, is a std::logic_error that says who waits in what.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <exception>
#include <kvpare/backend/cuda/block.cuh>
#include <map>
#include <memory>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "fiber.hpp"

namespace kvpare::test::simt {

using cuda::BF16;
using cuda::F16;
using cuda::S8;

/// The same numbers everywhere, unlike those of <random>'s distributions.
class Draws {
 public:
  explicit Draws(std::uint64_t seed) : state_(seed) {}
  std::uint32_t bits() {  // splitmix64
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return static_cast<std::uint32_t>(z >> 32);
  }
  std::uint32_t below(std::uint32_t n) { return static_cast<std::uint32_t>(std::uint64_t{bits()} * n >> 32); }
  template <class T>
  void shuffle(std::vector<T>& of) {
    for (std::size_t i = of.size(); i > 1; --i) std::swap(of[i - 1], of[below(static_cast<std::uint32_t>(i))]);
  }

 private:
  std::uint64_t state_;
};

/// Where the lanes of a warp leave what an operation takes from them.
union Exchange {
  std::array<std::uint64_t, 32> words;
  struct {
    float a[16][16], b[8][16];  // b by columns
  } floats;
  struct {
    std::int8_t a[16][32], b[8][32];
  } bytes;
  struct {
    std::uint16_t x[8][8];
  } halves;
};

class FiberBlock;

/// What the threads of one block share, and what lets them wait for each other.
class BlockState {
 public:
  struct Place {
    Index block, blocks;
    int threads;
    Index shared_bytes;
  };
  /// A kernel, not owned: what calls it for one thread.
  struct Body {
    void (*call)(const void* kernel, FiberBlock&) = nullptr;
    const void* kernel = nullptr;
  };

  /// Runs one block to its end. Throws what a thread threw, or std::logic_error when none of them can go on.
  void run(const Place& place, Body body, Draws& draws);

  const Place& place() const { return place_; }
  std::byte* shared() const { return shared_.get(); }

  /// A warp operation: lanes fill the exchange, meet, and read it. The next operation has another one, so a lane that is
  /// late to read is not overtaken.
  Exchange& join(int thread, std::string_view operation) {
    Warp& warp = warps_[static_cast<std::size_t>(thread / 32)];
    if (warp.here != 0 && warp.operation != operation)
      fail("thread ", thread, " is in ", operation, " while ", threads_of(thread / 32, warp.here), " in ",
           warp.operation, ": all lanes of a warp must be in the same operation");
    warp.operation = operation;
    return warp.exchange[warp.number & 1];
  }
  void meet(int thread) {
    Warp& warp = warps_[static_cast<std::size_t>(thread / 32)];
    warp.here |= 1u << thread % 32;
    if (warp.here != ~0u) return wait(thread, {warp.operation});
    warp.here = 0;
    ++warp.number;
    release(thread / 32, ~0u, thread);
  }

  void sync(int thread, int number, int threads) {
    Barrier& barrier = barriers_[static_cast<std::size_t>(number)];
    if (barrier.arrived == 0) {
      barrier.threads = threads;
      barrier.here.fill(0);
    } else if (barrier.threads != threads) {
      fail("thread ", thread, " is in ", sync_name(number, threads), " while others wait in ",
           sync_name(number, barrier.threads), ": all must name the same number of threads");
    }
    barrier.here[static_cast<std::size_t>(thread / 32)] |= 1u << thread % 32;
    if (++barrier.arrived < threads) return wait(thread, {"sync", number, threads});
    barrier.arrived = 0;
    for (std::size_t w = 0; w < barrier.here.size(); ++w)
      if (barrier.here[w] != 0 && barrier.here[w] != ~0u)
        fail(threads_of(static_cast<int>(w), barrier.here[w]), " alone of their warp in ", sync_name(number, threads),
             ": a barrier is among whole warps");
    for (std::size_t w = 0; w < barrier.here.size(); ++w)
      if (barrier.here[w] != 0) release(static_cast<int>(w), ~0u, thread);
  }

  template <class... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    std::ostringstream text;
    text << "block " << place_.block << ": ";
    (text << ... << parts);
    throw std::logic_error(text.str());
  }

 private:
  struct Warp {
    std::uint32_t here = 0;  // lanes that have arrived
    std::string_view operation;
    unsigned number = 0;
    Exchange exchange[2];
  };
  struct Barrier {
    int arrived = 0, threads = 0;
    std::array<std::uint32_t, 32> here{};
  };
  struct Waiting {
    std::string_view operation;
    int barrier = 0, threads = 0;
  };
  struct Thread {
    Fiber fiber;
    BlockState* block = nullptr;
    int number = 0;
    Waiting waits_in;
  };
  struct SharedDelete {
    void operator()(std::byte* p) const { ::operator delete(p, shared_alignment); }
  };
  static constexpr std::align_val_t shared_alignment{128};

  static std::string sync_name(int barrier, int threads) {
    return barrier == 0 ? "sync" : "sync(" + std::to_string(barrier) + ", " + std::to_string(threads) + ")";
  }
  static std::string threads_of(int warp, std::uint32_t lanes) {
    std::vector<int> threads;
    for (int lane = 0; lane < 32; ++lane)
      if (lanes >> lane & 1) threads.push_back(32 * warp + lane);
    return listed(threads) + (threads.size() == 1 ? " is" : " are");
  }
  /// "threads 0-6, 8, 9"
  static std::string listed(const std::vector<int>& threads) {
    std::string text = threads.size() == 1 ? "thread " : "threads ";
    for (std::size_t i = 0; i < threads.size();) {
      std::size_t last = i;
      while (last + 1 < threads.size() && threads[last + 1] == threads[last] + 1) ++last;
      if (i > 0) text += ", ";
      text += std::to_string(threads[i]);
      if (last > i) text += '-' + std::to_string(threads[last]);
      i = last + 1;
    }
    return text;
  }

  void wait(int thread, const Waiting& in) {
    Thread& self = *threads_[static_cast<std::size_t>(thread)];
    self.waits_in = in;
    self.fiber.pause();
  }
  void release(int warp, std::uint32_t lanes, int but) {
    for (int lane = 0; lane < 32; ++lane)
      if (const int thread = 32 * warp + lane; lanes >> lane & 1 && thread != but) ready_.push_back(thread);
  }
  [[noreturn]] void report_stuck() const {
    std::map<std::string, std::vector<int>> groups;
    for (int t = 0; t < place_.threads; ++t) {
      const Thread& thread = *threads_[static_cast<std::size_t>(t)];
      const auto& [operation, barrier, threads] = thread.waits_in;
      groups[thread.fiber.ended() ? "returned"
             : barrier == 0       ? "in " + std::string(operation)
                                  : "in " + sync_name(barrier, threads)]
          .push_back(t);
    }
    std::string text;
    for (const auto& [where, threads] : groups) {
      if (!text.empty()) text += "; ";
      text +=
          listed(threads) + (where == "returned" ? " returned" : (threads.size() == 1 ? " waits " : " wait ") + where);
    }
    fail("no thread can go on: ", text);
  }

  Place place_{};
  Body body_;
  std::unique_ptr<std::byte, SharedDelete> shared_;
  std::vector<std::unique_ptr<Thread>> threads_;  // as many as the largest block so far: their stacks are used again
  std::vector<Warp> warps_;
  std::array<Barrier, 16> barriers_;
  std::vector<int> ready_, turn_;
  std::exception_ptr thrown_;
};

class FiberBlock {
 public:
  FiberBlock(BlockState& of, int thread) : of_(&of), thread_(thread) {}
  FiberBlock(const FiberBlock&) = delete;
  FiberBlock& operator=(const FiberBlock&) = delete;

  int thread() const { return thread_; }
  int threads() const { return of_->place().threads; }
  int lane() const { return thread_ & 31; }
  int warp() const { return thread_ >> 5; }
  int warps() const { return threads() >> 5; }
  Index block() const { return of_->place().block; }
  Index blocks() const { return of_->place().blocks; }

  template <class T>
  T* shared(Index bytes) const {
    if (bytes < 0 || bytes > of_->place().shared_bytes)
      fail("shared memory at ", bytes, " of ", of_->place().shared_bytes, " bytes");
    if (bytes % static_cast<Index>(alignof(T)) != 0) fail("shared memory at ", bytes, ", no multiple of ", alignof(T));
    return reinterpret_cast<T*>(of_->shared() + bytes);
  }

  void sync() { of_->sync(thread_, 0, threads()); }
  void sync(int barrier, int threads) {
    if (barrier < 1 || barrier > 15) fail("barrier ", barrier, ", must be within [1, 15]");
    if (threads < 32 || threads % 32 != 0 || threads > this->threads())
      fail("a barrier of ", threads, " threads, must be whole warps of the block's ", this->threads());
    of_->sync(thread_, barrier, threads);
  }
  void sync_warp() {
    of_->join(thread_, "sync_warp");
    of_->meet(thread_);
  }

  template <class T>
  T shuffle(T x, int lane) {
    if (lane < 0 || lane > 31) fail("shuffle from lane ", lane);
    return exchanged(x, lane, sizeof(T) == 4 ? "shuffle of 4 bytes" : "shuffle of 8 bytes");
  }
  template <class T>
  T shuffle_xor(T x, int mask) {
    if (mask < 0 || mask > 31) fail("shuffle_xor by ", mask);
    return exchanged(x, lane() ^ mask, sizeof(T) == 4 ? "shuffle_xor of 4 bytes" : "shuffle_xor of 8 bytes");
  }
  template <class T>
  T shuffle_up(T x, int n) {
    if (n < 0 || n > 31) fail("shuffle_up by ", n);
    return exchanged(x, lane() < n ? lane() : lane() - n,
                     sizeof(T) == 4 ? "shuffle_up of 4 bytes" : "shuffle_up of 8 bytes");
  }
  std::uint32_t ballot(bool yes) {
    Exchange& all = of_->join(thread_, "ballot");
    all.words[static_cast<std::size_t>(lane())] = yes;
    of_->meet(thread_);
    std::uint32_t bits = 0;
    for (std::size_t i = 0; i < 32; ++i) bits |= static_cast<std::uint32_t>(all.words[i]) << i;
    return bits;
  }

  template <class Kind>
    requires std::is_same_v<Kind, F16> || std::is_same_v<Kind, BF16>
  void mma(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], Kind kind) {
    auto& all = of_->join(thread_, std::is_same_v<Kind, F16> ? "mma of f16" : "mma of bf16").floats;
    const int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < 4; ++i) {
      float* at = &all.a[g + 8 * (i & 1)][2 * t + 8 * (i >> 1)];
      at[0] = unpack_low(a[i], kind), at[1] = unpack_high(a[i], kind);
    }
    for (int i = 0; i < 2; ++i) {
      float* at = &all.b[g][2 * t + 8 * i];
      at[0] = unpack_low(b[i], kind), at[1] = unpack_high(b[i], kind);
    }
    of_->meet(thread_);
    for (int i = 0; i < 4; ++i) {
      const float* row = all.a[g + 8 * (i >> 1)];
      const float* column = all.b[2 * t + (i & 1)];
      // A product of two bf16 is exact in a double, not in a float.
      for (int k = 0; k < 16; ++k) c[i] = static_cast<float>(c[i] + static_cast<double>(row[k]) * column[k]);
    }
  }
  void mma(int (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], S8) {
    auto& all = of_->join(thread_, "mma of s8").bytes;
    const int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < 4; ++i) std::memcpy(&all.a[g + 8 * (i & 1)][4 * t + 16 * (i >> 1)], &a[i], 4);
    for (int i = 0; i < 2; ++i) std::memcpy(&all.b[g][4 * t + 16 * i], &b[i], 4);
    of_->meet(thread_);
    for (int i = 0; i < 4; ++i) {
      const std::int8_t* row = all.a[g + 8 * (i >> 1)];
      const std::int8_t* column = all.b[2 * t + (i & 1)];
      int sum = 0;
      for (int k = 0; k < 32; ++k) sum += row[k] * column[k];
      c[i] = static_cast<int>(static_cast<std::uint32_t>(c[i]) + static_cast<std::uint32_t>(sum));  // wraps, as there
    }
  }
  std::uint32_t transpose(std::uint32_t x) {
    auto& all = of_->join(thread_, "transpose").halves;
    const int row = lane() / 4, column = lane() % 4 * 2;
    std::memcpy(&all.x[row][column], &x, 4);
    of_->meet(thread_);
    return all.x[column][row] | std::uint32_t{all.x[column + 1][row]} << 16;
  }

  void copy_async(void* to_shared, const void* global) {
    const auto* to = static_cast<std::byte*>(to_shared);
    if (to < of_->shared() || to + 16 > of_->shared() + of_->place().shared_bytes)
      fail("copy_async to what is not the block's shared memory");
    if (reinterpret_cast<std::uintptr_t>(to_shared) % 16 != 0 || reinterpret_cast<std::uintptr_t>(global) % 16 != 0)
      fail("copy_async between addresses that are no multiples of 16");
    std::memset(to_shared, WalledMemory::poison, 16);
    copies_.push_back({to_shared, global, groups_});
  }
  void commit_copies() { ++groups_; }
  template <int newest>
  void wait_copies() {
    static_assert(newest >= 0);
    std::size_t arrived = 0;
    for (; arrived < copies_.size() && copies_[arrived].group < groups_ - newest; ++arrived)
      std::memcpy(copies_[arrived].to, copies_[arrived].from, 16);
    copies_.erase(copies_.begin(), copies_.begin() + static_cast<std::ptrdiff_t>(arrived));
  }

  template <class T>
  T load(const T* p) const {
    static_assert(sizeof(T) <= 16 && alignof(T) == sizeof(T), "loads move 1, 2, 4, 8 or 16 aligned bytes");
    if (reinterpret_cast<std::uintptr_t>(p) % sizeof(T) != 0)
      fail("load from an address that is no multiple of ", sizeof(T));
    return *p;
  }

  float add(float* p, float x) { return std::exchange(*p, *p + x); }
  std::uint32_t add(std::uint32_t* p, std::uint32_t x) { return std::exchange(*p, *p + x); }
  std::uint64_t add(std::uint64_t* p, std::uint64_t x) { return std::exchange(*p, *p + x); }
  std::uint32_t join(std::uint32_t* p, std::uint32_t x) { return std::exchange(*p, *p | x); }
  std::uint64_t join(std::uint64_t* p, std::uint64_t x) { return std::exchange(*p, *p | x); }
  std::uint32_t most(std::uint32_t* p, std::uint32_t x) { return std::exchange(*p, std::max(*p, x)); }

  static float exp2(float x) {
    const float y = std::exp2(x);
    return y < 0x1p-126f ? 0.0f : y;  // no subnormal results there
  }
  static std::uint32_t pack(float lo, float hi, F16) { return joined(half(lo).bits, half(hi).bits); }
  static std::uint32_t pack(float lo, float hi, BF16) { return joined(bfloat16(lo).bits, bfloat16(hi).bits); }
  static float unpack_low(std::uint32_t x, F16) { return detail::half_to_float(static_cast<std::uint16_t>(x)); }
  static float unpack_high(std::uint32_t x, F16) { return detail::half_to_float(static_cast<std::uint16_t>(x >> 16)); }
  static float unpack_low(std::uint32_t x, BF16) { return std::bit_cast<float>(x << 16); }
  static float unpack_high(std::uint32_t x, BF16) { return std::bit_cast<float>(x & 0xffff0000u); }

  template <class Kind>
  static std::uint32_t mul2(std::uint32_t a, std::uint32_t b, Kind kind) {
    return fma2(a, b, 0x80008000u, kind);  // - 0: keeps the sign of a zero product
  }
  template <class Kind>
  static std::uint32_t fma2(std::uint32_t a, std::uint32_t b, std::uint32_t c, Kind kind) {
    return pack(to_odd(unpack_low(a, kind), unpack_low(b, kind), unpack_low(c, kind)),
                to_odd(unpack_high(a, kind), unpack_high(b, kind), unpack_high(c, kind)), kind);
  }
  static std::uint32_t permute(std::uint32_t a, std::uint32_t b, std::uint32_t selector) {
    const std::uint64_t bytes = std::uint64_t{b} << 32 | a;
    std::uint32_t x = 0;
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t nibble = selector >> 4 * i & 15;
      if (nibble > 7) throw std::logic_error("permute: a nibble of the selector above 7, which spreads a sign there");
      x |= static_cast<std::uint32_t>(bytes >> 8 * nibble & 0xff) << 8 * i;
    }
    return x;
  }

 private:
  struct Copy {
    void* to;
    const void* from;
    Index group;
  };

  template <class... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    of_->fail("thread ", thread_, ": ", parts...);
  }
  template <class T>
  T exchanged(T x, int from, std::string_view operation) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    static_assert(std::is_trivially_copyable_v<T>);
    Exchange& all = of_->join(thread_, operation);
    std::memcpy(&all.words[static_cast<std::size_t>(lane())], &x, sizeof(T));
    of_->meet(thread_);
    std::memcpy(&x, &all.words[static_cast<std::size_t>(from)], sizeof(T));
    return x;
  }
  static std::uint32_t joined(std::uint16_t low, std::uint16_t high) { return low | std::uint32_t{high} << 16; }

  /// a b + c to a float whose last bit says whether anything was cut off: rounding it again to the ten or seven bits of
  /// the result then is the same as rounding once. The product is exact in a double; the sum may not be.
  static float to_odd(float a, float b, float c) {
    const double product = static_cast<double>(a) * b, sum = product + c;
    if (!std::isfinite(sum)) return static_cast<float>(sum);
    const double part = sum - product;
    const double lost = (product - (sum - part)) + (c - part);  // exact: what the sum lacks
    auto rounded = static_cast<float>(sum);
    const double over = rounded - sum;  // infinite when the float is
    if (over == 0 && lost == 0) return rounded;
    // Towards zero, then odd.
    const bool too_far =
        over != 0 ? std::signbit(over) == std::signbit(rounded) : std::signbit(lost) != std::signbit(rounded);
    auto bits = std::bit_cast<std::uint32_t>(rounded);
    if (too_far) --bits;
    return std::bit_cast<float>(bits | 1u);
  }

  BlockState* of_;
  int thread_;
  std::vector<Copy> copies_;  // begun and not yet waited for, oldest first
  Index groups_ = 0;          // committed so far
};

inline void BlockState::run(const Place& place, Body body, Draws& draws) {
  place_ = place;
  body_ = body;
  thrown_ = nullptr;
  shared_.reset(
      static_cast<std::byte*>(::operator new(static_cast<std::size_t>(place.shared_bytes), shared_alignment)));
  std::memset(shared_.get(), WalledMemory::poison, static_cast<std::size_t>(place.shared_bytes));
  warps_.assign(static_cast<std::size_t>(place.threads / 32), Warp{});
  barriers_.fill(Barrier{});
  ready_.clear();
  while (threads_.size() < static_cast<std::size_t>(place.threads)) threads_.push_back(std::make_unique<Thread>());
  for (int t = 0; t < place.threads; ++t) {
    Thread& thread = *threads_[static_cast<std::size_t>(t)];
    thread.block = this, thread.number = t;
    thread.fiber.start(
        [](void* argument) {
          auto& self = *static_cast<Thread*>(argument);
          FiberBlock b(*self.block, self.number);
          try {
            self.block->body_.call(self.block->body_.kernel, b);
          } catch (...) {
            self.block->thrown_ = std::current_exception();
          }
        },
        &thread);
    ready_.push_back(t);
  }

  std::uint32_t awake = ~0u;  // by warp: the others stand still for some turns, so that these run ahead
  for (int left = place.threads; left > 0;) {
    if (ready_.empty()) report_stuck();
    if (draws.below(8) == 0) awake = draws.below(2) == 0 ? ~0u : draws.bits();
    const auto asleep =
        std::stable_partition(ready_.begin(), ready_.end(), [&](int t) { return (awake >> t / 32 & 1) != 0; });
    turn_.assign(ready_.begin(), asleep);
    ready_.erase(ready_.begin(), asleep);
    if (turn_.empty()) awake = ~0u;
    draws.shuffle(turn_);
    for (const int t : turn_) {
      Fiber& fiber = threads_[static_cast<std::size_t>(t)]->fiber;
      fiber.resume();
      left -= fiber.ended();
      if (thrown_) std::rethrow_exception(std::exchange(thrown_, nullptr));
    }
  }
}

}  // namespace kvpare::test::simt

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

}  // namespace
}  // namespace kvpare::test::simt

// The runtime of backend/cuda on the host: memory behind a wall, kernels on fibers. A launch has run when it returns.
#pragma once

#include <numeric>
#include <string_view>
#include <type_traits>
#include <vector>

#include "fiber_block.hpp"
#include "support/walled_memory.hpp"

namespace kvpare::test::simt {

class Runtime : public WalledMemory {
 public:
  static constexpr std::string_view name = "simt";

  struct Settings {
    Index arena_bytes = Index{64} << 20;
    int multiprocessors = 4;
    std::uint64_t seed = 1;
  };
  Runtime() : Runtime(Settings{}) {}
  explicit Runtime(const Settings& settings)
      : WalledMemory(settings.arena_bytes, with_asan ? 64 : 0), multiprocessors_(settings.multiprocessors),
        draws_(settings.seed) {}

  /// Everything after this runs in the order that this seed draws.
  void seed(std::uint64_t to) { draws_ = Draws(to); }

  bool capturing() const { return false; }
  int multiprocessors() const { return multiprocessors_; }
  void multiprocessors(int count) { multiprocessors_ = count; }
  Index shared_limit() const { return Index{227} << 10; }

  /// A kernel has `threads`, a constant; `shared_bytes()`; and is called with a block by each of its threads.
  template <class Kernel>
  void launch(Index blocks, const Kernel& kernel) {
    static_assert(std::is_trivially_copyable_v<Kernel>, "a kernel travels to the device as bytes");
    launch({0, blocks, Kernel::threads, kernel.shared_bytes()}, {&call<Kernel>, &kernel});
  }

 private:
  static constexpr Index max_blocks = (Index{1} << 31) - 1;

  template <class Kernel>
  static void call(const void* kernel, FiberBlock& b) {
    (*static_cast<const Kernel*>(kernel))(b);
  }
  void launch(BlockState::Place place, BlockState::Body body) {
    if (place.threads < 32 || place.threads % 32 != 0 || place.threads > 1024)
      refuse(place.threads, " threads, must be a multiple of 32 within [32, 1024]");
    if (place.shared_bytes < 0 || place.shared_bytes > shared_limit())
      refuse(place.shared_bytes, " bytes of shared memory, must be within [0, ", shared_limit(), "]");
    if (place.blocks < 0 || place.blocks > max_blocks)
      refuse(place.blocks, " blocks, must be within [0, ", max_blocks, "]");
    if (place.blocks == 0) return;
    std::vector<Index> order(static_cast<std::size_t>(place.blocks));
    std::iota(order.begin(), order.end(), Index{0});
    draws_.shuffle(order);
    counted_launch([&] {
      for (const Index block : order) {
        place.block = block;
        block_.run(place, body, draws_);
      }
    });
  }

  template <class... Parts>
  [[noreturn]] static void refuse(const Parts&... parts) {
    std::ostringstream text;
    text << "launch: ";
    (text << ... << parts);
    throw std::logic_error(text.str());
  }

  int multiprocessors_;
  Draws draws_;
  BlockState block_;
};

}  // namespace kvpare::test::simt

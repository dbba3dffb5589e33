// The CPU backend: the trait's verbs on the machine's own memory.
#pragma once

#include <cstdlib>
#include <functional>
#include <memory>
#include <string_view>
#include <thread>

#include "../backend.hpp"
#include "attend.hpp"
#include "attention_mass.hpp"
#include "isa.hpp"
#include "rows.hpp"
#include "select_top.hpp"
#include "tiles.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kvpare::cpu {

struct Options {
  Index threads = 0;          // of the backend's own pool; 0 = one per core
  ParallelFor parallel = {};  // the engine's own pool instead; may call from any threads, must return when all is done
  Isa isa = chosen_isa();     // kernels to run: what the machine has, or less
  int probability_bits = 16;  // 16 or 8: how finely attention over integer codes holds its probabilities. 8 is faster
                              // with many query heads per kv head, and adds 1 to 2 % to the error of 4-bit codes
};

/// Verbs run to completion before they return, so tickets are always ready. One backend may serve several caches; calls
/// from several threads are safe as long as they concern different sequences.
class Backend {
 public:
  static constexpr std::string_view name = "cpu";
  static constexpr bool on_host = true;
  struct Ticket {};

  explicit Backend(Options options = {}) : isa_(options.isa), probability_bits_(options.probability_bits) {
    require(probability_bits_ == 16 || probability_bits_ == 8, "cpu backend: probability_bits = ", probability_bits_,
            ", must be 16 or 8");
    require(options.threads >= 0, "cpu backend: threads = ", options.threads, ", must be 0 (all cores) or positive");
    require(supports(options.isa), "cpu backend: instruction set ", name_of(options.isa),
            ", but the best that this machine has is ", name_of(detected_isa()));
    if (options.parallel) {
      parallel_ = std::move(options.parallel);
    } else {
      const Index cores = static_cast<Index>(std::thread::hardware_concurrency());
      pool_ = std::make_unique<ThreadPool>(options.threads > 0 ? options.threads : std::max<Index>(1, cores));
      parallel_ = std::ref(*pool_);
    }
  }
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  Isa isa() const { return isa_; }
  Index threads() const { return pool_ ? pool_->threads() : 0; }  // 0: the engine's pool

  /// Large blocks ask for huge pages where the system has them: attention walks the whole pool at every step, and
  /// address translation in 4 KiB pages costs it time.
  void* allocate(Index bytes) {
    if (bytes < 0) return nullptr;  // so that g++ does not see sizes that cannot be
    constexpr Index huge_page = 2 << 20;
    const Index alignment = bytes >= huge_page ? huge_page : 64;
    void* memory =
        std::aligned_alloc(static_cast<std::size_t>(alignment), static_cast<std::size_t>(round_up(bytes, alignment)));
#if defined(__linux__)
    if (memory != nullptr && bytes >= huge_page) madvise(memory, static_cast<std::size_t>(bytes), MADV_HUGEPAGE);
#endif
    return memory;
  }
  void release(void* memory) { std::free(memory); }
  void to_backend(void* to, const void* from, Index bytes) {
    if (bytes > 0) std::memcpy(to, from, static_cast<std::size_t>(bytes));  // an empty array may be null
  }
  Ticket to_host(void* to, const void* from, Index bytes) {
    if (bytes > 0) std::memcpy(to, from, static_cast<std::size_t>(bytes));
    return {};
  }
  void wait(Ticket) {}

  template <class F>
  void each(Index n, const F& f) {
    constexpr Index block = 4096;
    team().run(ceil_div(n, block), [&](Index b) {
      for (Index i = b * block; i < std::min(n, (b + 1) * block); ++i) f(i);
    });
  }

  void reduce(std::span<const MaskedRow> rows, RowSummary* out) { cpu::reduce(team(), rows, out); }
  void sort_rows(std::span<const SortRow> rows) { cpu::sort_rows(team(), rows); }
  void select_top(std::span<const TopRow> rows) { cpu::select_top(team(), rows); }
  template <class Logit, class EntryOf>
  void attention_mass(const MassArguments<Logit, EntryOf>& arguments) {
    cpu::attention_mass(team(), arguments);
  }
  void statistics(std::span<const StatisticsRow> rows) { cpu::statistics(team(), rows); }
  void gather(std::span<const GatherRow> rows) { cpu::gather(team(), rows); }
  void product(const ProductArguments& arguments) { cpu::product(team(), arguments); }
  void append(const AppendArguments& arguments) { cpu::append(team(), arguments); }
  void compact(std::span<const CompactList> lists) { cpu::compact(team(), lists); }
  void encode(std::span<const EncodeList> lists) { cpu::encode(team(), lists); }
  void repack(std::span<const RepackTile> tiles, RepackTo to) { cpu::repack(team(), tiles, to); }
  template <Codec C, Side side>
  const void* codec(TileShape shape) const {
    return tile_ops<C, side>(shape, probability_bits_);
  }
  template <class P>
  const void* pair(TileShape, TileShape) const {
    return nullptr;
  }
  Support support(const PageGeometry& g) const {
    const auto side = [](const void* codec) {
      return codec == nullptr ? Support::fused : static_cast<const TileOps*>(codec)->support;
    };
    return std::min(side(g.key_codec), side(g.value_codec));
  }
  void attend(const LayerShape& shape, std::span<const AttendSequence> batch, MassKind kind) {
    cpu::attend(team(), shape, batch, kind);
  }

 private:
  Team team() const { return {&kernels(isa_), &parallel_}; }

  Isa isa_;
  int probability_bits_;
  std::unique_ptr<ThreadPool> pool_;
  ParallelFor parallel_;
};

static_assert(kvpare::Backend<Backend>);

}  // namespace kvpare::cpu

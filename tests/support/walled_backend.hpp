// A backend whose memory lies behind a wall (walled_memory.hpp). The verbs are those of the CPU.
#pragma once

#include <kvpare/backend/cpu/backend.hpp>
#include <kvpare/compiled.hpp>

#include "support/walled_memory.hpp"

namespace kvpare::test {

class WalledBackend : public WalledMemory {
 public:
  static constexpr std::string_view name = "walled";
  static constexpr bool on_host = true;

  explicit WalledBackend(Index arena_bytes = Index{256} << 20) : WalledMemory(arena_bytes), verbs_({.threads = 1}) {}

  template <class F>
  void each(Index n, const F& f) {
    counted_launch([&] { verbs_.each(n, f); });
  }
  void reduce(std::span<const MaskedRow> rows, RowSummary* out) {
    counted_launch([&] { verbs_.reduce(rows, out); });
  }
  void sort_rows(std::span<const SortRow> rows) {
    counted_launch([&] { verbs_.sort_rows(rows); });
  }
  void select_top(std::span<const TopRow> rows) {
    counted_launch([&] { verbs_.select_top(rows); });
  }
  template <class Logit, class EntryOf>
  void attention_mass(const MassArguments<Logit, EntryOf>& arguments) {
    counted_launch([&] { verbs_.attention_mass(arguments); });
  }
  void statistics(std::span<const StatisticsRow> rows) {
    counted_launch([&] { verbs_.statistics(rows); });
  }
  void gather(std::span<const GatherRow> rows) {
    counted_launch([&] { verbs_.gather(rows); });
  }
  void product(const ProductArguments& arguments) {
    counted_launch([&] { verbs_.product(arguments); });
  }
  void append(const AppendArguments& arguments) {
    counted_launch([&] { verbs_.append(arguments); });
  }
  void compact(std::span<const CompactList> lists) {
    counted_launch([&] { verbs_.compact(lists); });
  }
  void encode(std::span<const EncodeList> lists) {
    counted_launch([&] { verbs_.encode(lists); });
  }
  void repack(std::span<const RepackTile> tiles, RepackTo to) {
    counted_launch([&] { verbs_.repack(tiles, to); });
  }
  template <Codec C, Side side>
  const void* codec(TileShape shape) const {
    return verbs_.codec<C, side>(shape);
  }
  template <class P>
  const void* pair(TileShape keys, TileShape values) const {
    return verbs_.pair<P>(keys, values);
  }
  Support support(const PageGeometry& g) const { return verbs_.support(g); }
  void attend(const LayerShape& shape, std::span<const AttendSequence> batch, MassKind kind) {
    counted_launch([&] { verbs_.attend(shape, batch, kind); });
  }

 private:
  cpu::Backend verbs_;
};

static_assert(kvpare::Backend<WalledBackend>);

}  // namespace kvpare::test

#if defined(KVPARE_TEST_COMPILED)  // once for all tests: walled_backend.cpp
namespace kvpare {
KVPARE_COMPILED_CACHE(extern template, test::WalledBackend)
}
#endif

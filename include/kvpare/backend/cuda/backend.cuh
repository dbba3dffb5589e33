// The backend trait on a device. BasicBackend is the same on a CUDA stream (cuda::Backend, runtime.cuh) and on fibers
// (tests/simt): only the runtime differs.
#pragma once

#include <string_view>
#include <utility>

#include "../backend.hpp"
#include "attend.cuh"
#include "attention_mass.cuh"
#include "each.cuh"
#include "product.cuh"
#include "ranking.cuh"
#include "rows.cuh"
#include "tiles.cuh"
#include "workspace.cuh"

namespace kvpare::cuda {

/// Verbs are queued on one stream and return at once. A backend serves one host thread at a time.
template <class Runtime>
class BasicBackend {
 public:
  static constexpr std::string_view name = Runtime::name;
  using Ticket = typename Runtime::Ticket;
  using Work = Workspace<Runtime>;

  template <class... Options>
  explicit BasicBackend(Options&&... options) : runtime_(std::forward<Options>(options)...), work_(runtime_) {}
  BasicBackend(const BasicBackend&) = delete;
  BasicBackend& operator=(const BasicBackend&) = delete;

  Runtime& runtime() { return runtime_; }
  /// Memory for verbs ahead of time: without it the first calls take what they need, later ones find it there.
  void reserve(Index scratch_bytes, Index argument_bytes = 0) { work_.reserve(scratch_bytes, argument_bytes); }

  void* allocate(Index bytes) { return runtime_.allocate(bytes); }
  void release(void* memory) { runtime_.release(memory); }
  void to_backend(void* to, const void* from, Index bytes) { runtime_.to_backend(to, from, bytes); }
  Ticket to_host(void* to, const void* from, Index bytes) { return runtime_.to_host(to, from, bytes); }
  void wait(Ticket ticket) { runtime_.wait(ticket); }

  template <class F>
  void each(Index n, const F& f) {
    cuda::each(begin(), n, f);
  }
  void reduce(std::span<const MaskedRow> rows, RowSummary* out) { cuda::reduce(begin(), rows, out); }
  void sort_rows(std::span<const SortRow> rows) { cuda::sort_rows(begin(), rows); }
  void select_top(std::span<const TopRow> rows) { cuda::select_top(begin(), rows); }
  template <class Logit, class EntryOf>
  void attention_mass(const MassArguments<Logit, EntryOf>& arguments) {
    cuda::attention_mass(begin(), arguments);
  }
  void statistics(std::span<const StatisticsRow> rows) { cuda::statistics(begin(), rows); }
  void gather(std::span<const GatherRow> rows) { cuda::gather(begin(), rows); }
  void product(const ProductArguments& arguments) { cuda::product(begin(), arguments); }
  void append(const AppendArguments& arguments) { cuda::append(begin(), arguments); }
  void compact(std::span<const CompactList> lists) { cuda::compact(begin(), lists); }
  void encode(std::span<const EncodeList> lists) { cuda::encode(begin(), lists); }
  void repack(std::span<const RepackTile> tiles, RepackTo to) { cuda::repack(begin(), tiles, to); }
  template <Codec C, Side side>
  const void* codec(TileShape shape) const {
    return tile_ops<Work, C, side>(shape);
  }
  template <class P>
  const void* pair(TileShape keys, TileShape values) const {
    return pair_ops<Work, P>(keys, values);
  }
  Support support(const PageGeometry& g) const { return pair_support<Work>(g); }
  void attend(const LayerShape& shape, std::span<const AttendSequence> batch, MassKind kind) {
    cuda::attend(begin(), shape, batch, kind);
  }

 private:
  Work& begin() {
    work_.begin();
    return work_;
  }

  Runtime runtime_;
  Work work_;
};

}  // namespace kvpare::cuda

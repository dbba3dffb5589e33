// What every verb on the device needs beside its kernels: scratch memory, and a way to send host arrays along.
//
// A Runtime is where kernels really run: a CUDA stream (runtime.cuh), or fibers on the host (tests/simt).
//
// | expression                    | does                                                                                  |
// |-------------------------------|---------------------------------------------------------------------------------------|
// | `R::name`                     | name of the backend                                                                   |
// | `r.allocate(bytes)`, `r.release(p)` | memory of the device, 64-byte aligned, or null; given back once queued work is done |
// | `r.to_backend(to, from, bytes)`, `r.to_host(…)`, `r.wait(ticket)` | copies, as the backend trait has them               |
// | `r.launch(blocks, kernel)`    | queues a kernel, see below; nothing for 0 blocks                                       |
// | `r.capturing()`               | whether what is queued now is recorded, to be done later and more than once           |
// | `r.multiprocessors()`         | how many there are                                                                    |
// | `r.shared_limit()`            | most shared memory of a block, in bytes                                               |
//
// A kernel is a trivially copyable struct of views, with
//
//   static constexpr int threads;                                      // of a block, a multiple of 32
//   static constexpr int least_blocks;                                 // may be left out: so many on a multiprocessor
//   Index shared_bytes() const;                                        // of a block
//   template <class Block> KVPARE_DEVICE void operator()(Block& b) const;
//
// Nothing waits. Verbs run in order on one stream, so all of them use the same scratch, one after the other.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstring>
#include <span>
#include <vector>

#include "../arguments.hpp"
#include "block.cuh"
#include "page_tables.cuh"

namespace kvpare::cuda {

template <class Runtime>
class Workspace {
 public:
  explicit Workspace(Runtime& runtime) : runtime_(&runtime) {}
  /// Floats of scratch for rows on their way from one form to another: what is more goes in several lots. 32 MiB stay in the
  /// caches of a large device.
  Index lot_floats = Index{8} << 20;

  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    tables_.release(*runtime_);
    for (Area* area : {&scratch_, &sent_})
      for (const Chunk& c : area->chunks) runtime_->release(c.memory);
  }

  Runtime& runtime() { return *runtime_; }
  Index multiprocessors() const { return runtime_->multiprocessors(); }

  /// Takes memory ahead of time, so that no verb has to: for scratch, and for host arrays on their way.
  void reserve(Index scratch_bytes, Index sent_bytes) {
    begin();
    if (scratch_bytes > 0) (void)take(scratch_, scratch_bytes);
    if (sent_bytes > 0) (void)take(sent_, sent_bytes);
    begin();
  }

  /// Starts a verb: what the one before put here is no longer needed by anything that is queued from now on.
  void begin() {
    scratch_.rewind(), sent_.rewind();
    staged_.clear(), staged_chunk_ = -1;
    formats_.clear();
    patch_tables();  // of a verb that found nothing to launch
  }

  /// Device memory until the next verb, 64-byte aligned, not initialised. Grows to the largest verb so far.
  /// Throws InvalidArgument when the device has no memory left.
  template <class T>
  T* scratch(Index size) {
    return reinterpret_cast<T*>(take(scratch_, size * static_cast<Index>(sizeof(T))).first);
  }

  /// A host array in device memory until the next verb: sent before the next launch, with all others put here so far.
  template <class T>
  const T* put(std::span<const T> values) {
    static_assert(std::is_trivially_copyable_v<T>);
    const Index bytes = static_cast<Index>(values.size_bytes());
    const auto [memory, chunk] = take(sent_, std::max<Index>(bytes, 1));
    if (chunk != staged_chunk_) send(), staged_chunk_ = chunk, staged_to_ = memory;
    staged_.resize(static_cast<std::size_t>(memory - staged_to_ + bytes));
    if (bytes > 0) std::memcpy(staged_.data() + (memory - staged_to_), values.data(), values.size_bytes());
    return reinterpret_cast<const T*>(memory);
  }
  template <class T>
  const T* put(const std::vector<T>& values) {
    return put(std::span<const T>(values));
  }

  /// A list as kernels take it: the same words, in device memory. Lists with a version stay there, and what has changed of
  /// them since is sent along; others are sent whole.
  HeadPages put(const HeadPages& list) {
    HeadPages there = list;
    std::uint32_t blocks = 0, states = 0;
    for (const Entry& e : list.entries) blocks = std::max(blocks, e.offsets), states = std::max(states, e.state);
    const std::span offsets(list.offsets, static_cast<std::size_t>(static_cast<Index>(blocks) * list.page_tokens));
    // What a graph is captured for is not done yet, so the tables must not count on it.
    if (list.version != nullptr && (!runtime_->capturing() || tables_.holds(*list.version))) {
      const detail::PageTables::Place at = tables_.update(*runtime_, *list.version, list.entries, offsets, patches_);
      there.entries = {at.entries, list.entries.size()}, there.offsets = at.offsets;
    } else {
      there.entries = {put(list.entries), list.entries.size()}, there.offsets = put(offsets);
    }
    there.formats = {put_formats(list.formats), list.formats.size()};
    there.states = {put(list.states.first(states)), states};
    there.version = nullptr;
    return there;
  }

  template <class Kernel>
  void launch(Index blocks, const Kernel& kernel) {
    patch_tables();
    send();
    runtime_->launch(blocks, kernel);
  }

 private:
  struct Chunk {
    std::byte* memory = nullptr;
    Index bytes = 0;
  };
  struct Area {
    std::vector<Chunk> chunks;
    std::size_t chunk = 0;
    Index used = 0;  // of that chunk
    void rewind() { chunk = 0, used = 0; }
  };

  /// Address, and number of the chunk it is in.
  std::pair<std::byte*, Index> take(Area& area, Index bytes) {
    constexpr Index least_chunk = 1 << 20;
    while (area.chunk < area.chunks.size() && area.used + bytes > area.chunks[area.chunk].bytes)
      ++area.chunk, area.used = 0;
    if (area.chunk == area.chunks.size()) {
      const Index size = std::max(round_up(bytes, least_chunk), least_chunk);
      auto* memory = static_cast<std::byte*>(runtime_->allocate(size));
      require(memory != nullptr, Runtime::name, " backend: no memory for ", size, " bytes of scratch",
              runtime_->capturing() ? ", which cannot be taken while a graph is captured: reserve it, or call once before"
                                    : "");
      area.chunks.push_back({memory, size});
    }
    std::byte* at = area.chunks[area.chunk].memory + area.used;
    area.used = round_up(area.used + bytes, 64);
    return {at, static_cast<Index>(area.chunk)};
  }

  /// What changed in page tables, one launch for all lists.
  void patch_tables() {
    if (patches_.empty()) return;
    std::vector<detail::PatchKernel::Patch> patches;
    for (const detail::PageTables::Patch& p : patches_) patches.push_back({put(p.from), p.to, std::ssize(p.from)});
    const detail::PatchKernel kernel{put(std::span<const detail::PatchKernel::Patch>(patches))};
    const Index count = std::ssize(patches);
    patches_.clear();
    send();
    runtime_->launch(count, kernel);
  }

  void send() {
    if (!staged_.empty()) runtime_->to_backend(staged_to_, staged_.data(), static_cast<Index>(staged_.size()));
    staged_.clear(), staged_chunk_ = -1;
  }

  /// All heads of a layer name the same formats: sent once.
  const PageGeometry* put_formats(std::span<const PageGeometry> formats) {
    for (const auto& [here, there] : formats_)
      if (here.data() == formats.data() && here.size() == formats.size()) return there;
    formats_.emplace_back(formats, put(formats));
    return formats_.back().second;
  }

  Runtime* runtime_;
  detail::PageTables tables_;
  std::vector<detail::PageTables::Patch> patches_;  // not on their way yet
  Area scratch_, sent_;
  std::vector<std::byte> staged_;  // bytes that go to staged_to_
  std::byte* staged_to_ = nullptr;
  Index staged_chunk_ = -1;
  std::vector<std::pair<std::span<const PageGeometry>, const PageGeometry*>> formats_;
};

}  // namespace kvpare::cuda

// Lists that stay on the device from call to call: entries and offsets of each, and which part of them has changed.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "../../cache/pages.hpp"
#include "block.cuh"

namespace kvpare::cuda::detail {

/// Copies what changed to where it belongs, a block per patch.
struct PatchKernel {
  struct Patch {
    const std::byte* from;
    std::byte* to;
    Index bytes;  // a multiple of 16, like both addresses
  };
  static constexpr int threads = 64;
  const Patch* patches;

  Index shared_bytes() const { return 0; }
  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const Patch p = patches[b.block()];
    for (Index at = b.thread() * 16; at < p.bytes; at += threads * 16)
      *reinterpret_cast<Words*>(p.to + at) = b.load(reinterpret_cast<const Words*>(p.from + at));
  }
};

/// A table per list. What the device holds is known on the host, so only the stretch of entries that differs is sent: after
/// an append the last one. Tables of lists that are gone are used again.
class PageTables {
 public:
  struct Place {
    const Entry* entries;
    const std::uint16_t* offsets;
  };
  struct Patch {
    std::span<const std::byte> from;  // host: valid until the next update of that list
    std::byte* to;
  };

  /// Where the list is once `patches` have been carried out. Throws InvalidArgument when the device has no memory left.
  template <class Runtime>
  Place update(Runtime& runtime, const ListVersion& version, std::span<const Entry> entries,
               std::span<const std::uint16_t> offsets, std::vector<Patch>& patches) {
    Table& table = tables_[*version.id()];
    const Index bytes = static_cast<Index>(entries.size_bytes()), offset_bytes = padded(offsets.size_bytes());
    if (table.content != version.content() || table.memory == nullptr) {
      if (table.memory == nullptr || bytes > table.entry_bytes || offset_bytes > table.offset_bytes) {
        give_back(table);
        table = make(runtime, version, bytes, offset_bytes);
      }
      difference(table.entries, std::as_bytes(entries), table.memory, patches);
      difference(table.offsets, std::as_bytes(offsets), table.memory + table.entry_bytes, patches);
      table.content = version.content();
    }
    return {reinterpret_cast<const Entry*>(table.memory),
            reinterpret_cast<const std::uint16_t*>(table.memory + table.entry_bytes)};
  }

  /// Is what the device holds of a list what it is now?
  bool holds(const ListVersion& version) const {
    const auto at = tables_.find(*version.id());
    return at != tables_.end() && at->second.content == version.content();
  }

  template <class Runtime>
  void release(Runtime& runtime) {
    for (std::byte* slab : slabs_) runtime.release(slab);
    slabs_.clear(), tables_.clear(), spare_.clear();
  }

 private:
  static constexpr Index unit = 16, least_slab = 1 << 20;
  struct Table {
    std::weak_ptr<const std::uint64_t> owner;
    std::uint64_t content = 0;
    std::byte* memory = nullptr;
    Index entry_bytes = 0, offset_bytes = 0;      // room
    std::vector<std::byte> entries = {}, offsets = {};  // what the device holds
  };

  static Index padded(std::size_t bytes) { return round_up(static_cast<Index>(bytes), unit); }

  /// The stretch in which `now` differs from `held`, which becomes `now`.
  static void difference(std::vector<std::byte>& held, std::span<const std::byte> now, std::byte* there,
                         std::vector<Patch>& patches) {
    const std::size_t before = held.size(), size = static_cast<std::size_t>(padded(now.size()));
    held.resize(size);
    Index first = -1, last = 0;
    for (std::size_t at = 0; at < size; at += unit) {
      const std::size_t count = std::min<std::size_t>(unit, now.size() - at);
      if (at < before && std::memcmp(held.data() + at, now.data() + at, count) == 0) continue;
      std::memcpy(held.data() + at, now.data() + at, count);
      if (first < 0) first = static_cast<Index>(at);
      last = static_cast<Index>(at) + unit;
    }
    if (first >= 0)
      patches.push_back({std::span(held).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(last - first)),
                         there + first});
  }

  template <class Runtime>
  Table make(Runtime& runtime, const ListVersion& version, Index bytes, Index offset_bytes) {
    sweep();
    // Room to grow, in sizes of powers of two, so that what one list gives back another can use.
    const Index entry_room = room_for(bytes), offset_room = offset_bytes == 0 ? 0 : room_for(offset_bytes);
    Table table{.owner = version.id(), .entry_bytes = entry_room, .offset_bytes = offset_room};
    const Index size = entry_room + offset_room;
    if (auto fits = spare_.find(size); fits != spare_.end() && !fits->second.empty()) {
      table.memory = fits->second.back();
      fits->second.pop_back();
      return table;
    }
    if (size > slab_left_) {
      const Index slab = std::max(size, least_slab);
      auto* memory = static_cast<std::byte*>(runtime.allocate(slab));
      require(memory != nullptr, Runtime::name, " backend: no memory for ", slab, " bytes of page tables");
      slabs_.push_back(memory), slab_at_ = memory, slab_left_ = slab;
    }
    table.memory = slab_at_;
    slab_at_ += size, slab_left_ -= size;
    return table;
  }
  static Index room_for(Index bytes) {
    return static_cast<Index>(std::bit_ceil(static_cast<std::uint64_t>(std::max<Index>(bytes, 512))));
  }
  void give_back(const Table& table) {
    if (table.memory != nullptr) spare_[table.entry_bytes + table.offset_bytes].push_back(table.memory);
  }
  /// Once in a while: as many new tables as there were after the last time.
  void sweep() {
    if (++made_since_sweep_ < std::max<std::size_t>(64, tables_.size() / 2)) return;
    made_since_sweep_ = 0;
    for (auto at = tables_.begin(); at != tables_.end();) {
      const bool gone = at->second.memory != nullptr && at->second.owner.expired();
      if (gone) give_back(at->second);
      at = gone ? tables_.erase(at) : std::next(at);
    }
  }

  std::unordered_map<std::uint64_t, Table> tables_;  // by id
  std::map<Index, std::vector<std::byte*>> spare_;    // by size
  std::vector<std::byte*> slabs_;
  std::byte* slab_at_ = nullptr;
  Index slab_left_ = 0;
  std::size_t made_since_sweep_ = 0;
};

}  // namespace kvpare::cuda::detail

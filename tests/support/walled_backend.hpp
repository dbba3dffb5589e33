// A backend whose memory lies behind a wall: unreadable and unwritable outside a verb. The verbs are those of the CPU.
//
// It stands in for a device that does not share memory with the host. What the CPU backend forgives, this one does not:
//   touching backend memory outside a verb     a segmentation fault
//   reading a copy before its ticket is waited  poison: the bytes are staged, and delivered by `wait`
//   reading memory never written, or released   poison: 0xff, which is NaN in every element type
// It also counts what crosses the wall, so that "waits at most once" is a number.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <kvpare/backend/cpu/backend.hpp>
#include <map>
#include <stdexcept>
#include <vector>

namespace kvpare::test {

class WalledBackend {
 public:
  static constexpr std::string_view name = "walled";
  static constexpr int poison = 0xff;
  struct Ticket {
    std::uint64_t number = 0;
  };

  /// What was asked of the backend so far.
  struct Counts {
    Index copies_in = 0, copies_out = 0, waits = 0, launches = 0;
  };

  explicit WalledBackend(Index arena_bytes = Index{256} << 20) : verbs_({.threads = 1}), bytes_(arena_bytes) {
    void* mapped =
        mmap(nullptr, static_cast<std::size_t>(bytes_), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::runtime_error("walled backend: no address space");
    arena_ = static_cast<std::byte*>(mapped);
    free_.emplace(0, bytes_);
  }
  WalledBackend(const WalledBackend&) = delete;
  WalledBackend& operator=(const WalledBackend&) = delete;
  ~WalledBackend() { munmap(arena_, static_cast<std::size_t>(bytes_)); }

  Counts counts;

  Index allocations() const { return static_cast<Index>(taken_.size()); }

  void* allocate(Index bytes) {
    const Index size = round_up(std::max<Index>(bytes, 1), 64);
    for (auto hole = free_.begin(); hole != free_.end(); ++hole) {
      const auto [at, room] = *hole;
      if (room < size) continue;
      free_.erase(hole);
      if (room > size) free_.emplace(at + size, room - size);
      taken_.emplace(at, size);
      const Opening open(*this);
      std::memset(arena_ + at, poison, static_cast<std::size_t>(size));
      return arena_ + at;
    }
    return nullptr;
  }

  void release(void* memory) {
    if (memory == nullptr) return;
    const auto taken = taken_.find(static_cast<std::byte*>(memory) - arena_);
    if (taken == taken_.end()) throw std::logic_error("walled backend: released what was never allocated");
    const auto [at, size] = *taken;
    taken_.erase(taken);
    {
      const Opening open(*this);
      std::memset(arena_ + at, poison, static_cast<std::size_t>(size));
    }
    const auto hole = free_.emplace(at, size).first;
    if (const auto next = std::next(hole); next != free_.end() && at + hole->second == next->first) {
      hole->second += next->second;
      free_.erase(next);
    }
    if (hole != free_.begin())
      if (const auto before = std::prev(hole); before->first + before->second == at) {
        before->second += hole->second;
        free_.erase(hole);
      }
  }

  void to_backend(void* to, const void* from, Index bytes) {
    ++counts.copies_in;
    if (bytes == 0) return;
    const Opening open(*this);
    std::memcpy(to, from, static_cast<std::size_t>(bytes));
  }

  Ticket to_host(void* to, const void* from, Index bytes) {
    ++counts.copies_out;
    Staged staged{++last_ticket_, static_cast<std::byte*>(to), std::vector<std::byte>(static_cast<std::size_t>(bytes))};
    if (bytes > 0) {
      const Opening open(*this);
      std::memcpy(staged.bytes.data(), from, staged.bytes.size());
      std::memset(to, poison, staged.bytes.size());
    }
    staged_.push_back(std::move(staged));
    return {last_ticket_};
  }

  void wait(Ticket ticket) {
    ++counts.waits;
    std::size_t done = 0;
    for (; done < staged_.size() && staged_[done].number <= ticket.number; ++done)
      if (!staged_[done].bytes.empty())
        std::memcpy(staged_[done].to, staged_[done].bytes.data(), staged_[done].bytes.size());
    staged_.erase(staged_.begin(), staged_.begin() + static_cast<std::ptrdiff_t>(done));
  }

  template <class F>
  void each(Index n, const F& f) {
    launch([&] { verbs_.each(n, f); });
  }
  void reduce(std::span<const MaskedRow> rows, RowSummary* out) {
    launch([&] { verbs_.reduce(rows, out); });
  }
  void sort_rows(std::span<const SortRow> rows) {
    launch([&] { verbs_.sort_rows(rows); });
  }
  void select_top(std::span<const TopRow> rows) {
    launch([&] { verbs_.select_top(rows); });
  }
  template <class Logit, class EntryOf>
  void attention_mass(const MassArguments<Logit, EntryOf>& arguments) {
    launch([&] { verbs_.attention_mass(arguments); });
  }
  void statistics(std::span<const StatisticsRow> rows) {
    launch([&] { verbs_.statistics(rows); });
  }
  void gather(std::span<const GatherRow> rows) {
    launch([&] { verbs_.gather(rows); });
  }
  void product(const ProductArguments& arguments) {
    launch([&] { verbs_.product(arguments); });
  }
  void append(const AppendArguments& arguments) {
    launch([&] { verbs_.append(arguments); });
  }
  void compact(std::span<const CompactList> lists) {
    launch([&] { verbs_.compact(lists); });
  }
  void encode(std::span<const EncodeList> lists) {
    launch([&] { verbs_.encode(lists); });
  }
  void repack(std::span<const RepackTile> tiles, RepackTo to) {
    launch([&] { verbs_.repack(tiles, to); });
  }
  template <Codec C>
  const void* codec(Side side, TileShape shape) const {
    return verbs_.codec<C>(side, shape);
  }
  template <class P>
  const void* pair(TileShape keys, TileShape values) const {
    return verbs_.pair<P>(keys, values);
  }
  Support support(const PageGeometry& g) const { return verbs_.support(g); }
  void attend(const LayerShape& shape, std::span<const AttendSequence> batch, MassKind kind) {
    launch([&] { verbs_.attend(shape, batch, kind); });
  }

 private:
  struct Staged {
    std::uint64_t number;
    std::byte* to;
    std::vector<std::byte> bytes;
  };

  /// The wall is open while one of these lives.
  struct Opening {
    explicit Opening(const WalledBackend& backend) : of(backend) { of.set_wall(PROT_READ | PROT_WRITE); }
    ~Opening() { of.set_wall(PROT_NONE); }
    const WalledBackend& of;
  };
  void set_wall(int protection) const {
    if (mprotect(arena_, static_cast<std::size_t>(bytes_), protection) != 0) std::abort();
  }

  template <class F>
  void launch(const F& verb) {
    ++counts.launches;
    const Opening open(*this);
    verb();
  }

  cpu::Backend verbs_;
  Index bytes_;
  std::byte* arena_ = nullptr;
  std::map<Index, Index> free_, taken_;  // offset -> size
  std::uint64_t last_ticket_ = 0;
  std::vector<Staged> staged_;  // in the order of their tickets
};

static_assert(kvpare::Backend<WalledBackend>);

}  // namespace kvpare::test

// Memory behind a wall: unreadable and unwritable but while an Opening lives. It stands in for a device that does not share
// memory with the host. What plain memory forgives, this does not:
//   touching it outside a verb                  a segmentation fault
//   reading a copy before its ticket is waited  poison: the bytes are staged, and delivered by `wait`
//   reading memory never written, or released   poison: 0xff, which is NaN in every element type
//   reading past what was asked for             a report, under AddressSanitizer
// It also counts what crosses the wall, so that "waits at most once" is a number.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <kvpare/core/config.hpp>
#include <map>
#include <stdexcept>
#include <vector>

#include "sanitizers.hpp"
#if defined(KVPARE_TEST_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace kvpare::test {

/// What the address sanitizer lets no one touch; nothing without it.
inline void forbid([[maybe_unused]] const void* memory, [[maybe_unused]] Index bytes) {
#if defined(KVPARE_TEST_ASAN)
  ASAN_POISON_MEMORY_REGION(memory, static_cast<std::size_t>(bytes));
#endif
}
inline void permit([[maybe_unused]] const void* memory, [[maybe_unused]] Index bytes) {
#if defined(KVPARE_TEST_ASAN)
  ASAN_UNPOISON_MEMORY_REGION(memory, static_cast<std::size_t>(bytes));
#endif
}

class WalledMemory {
 public:
  static constexpr int poison = 0xff;
  struct Ticket {
    std::uint64_t number = 0;
  };

  /// What was asked so far.
  struct Counts {
    Index copies_in = 0, copies_out = 0, waits = 0, launches = 0;
  };

  /// `gap`: bytes left after every allocation, for those who overrun one.
  explicit WalledMemory(Index arena_bytes, Index gap = 0) : bytes_(arena_bytes), gap_(gap) {
    void* mapped =
        mmap(nullptr, static_cast<std::size_t>(bytes_), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::runtime_error("walled memory: no address space");
    madvise(mapped, static_cast<std::size_t>(bytes_), MADV_HUGEPAGE);  // a wall of few pages is soon up; a wish, no need
    arena_ = static_cast<std::byte*>(mapped);
    free_.emplace(0, bytes_);
    forbid(arena_, bytes_);
  }
  WalledMemory(const WalledMemory&) = delete;
  WalledMemory& operator=(const WalledMemory&) = delete;
  ~WalledMemory() {
    permit(arena_, bytes_);  // the addresses may be someone else's next
    munmap(arena_, static_cast<std::size_t>(bytes_));
  }

  Counts counts;

  Index allocations() const { return static_cast<Index>(taken_.size()); }

  void* allocate(Index bytes) {
    const Index asked = std::max<Index>(bytes, 1), size = round_up(asked, 64) + gap_;
    for (auto hole = free_.begin(); hole != free_.end(); ++hole) {
      const auto [at, room] = *hole;
      if (room < size) continue;
      free_.erase(hole);
      if (room > size) free_.emplace(at + size, room - size);
      taken_.emplace(at, size);
      wipe(at, size);
      forbid(arena_ + at + asked, size - asked);
      return arena_ + at;
    }
    return nullptr;
  }

  void release(void* memory) {
    if (memory == nullptr) return;
    const auto taken = taken_.find(static_cast<std::byte*>(memory) - arena_);
    if (taken == taken_.end()) throw std::logic_error("walled memory: released what was never allocated");
    const auto [at, size] = *taken;
    taken_.erase(taken);
    wipe(at, size);
    forbid(arena_ + at, size);
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

 protected:
  /// The wall is open while one of these lives.
  struct Opening {
    explicit Opening(const WalledMemory& memory) : of(memory) { of.set_wall(PROT_READ | PROT_WRITE); }
    ~Opening() { of.set_wall(PROT_NONE); }
    const WalledMemory& of;
  };

  template <class F>
  void counted_launch(const F& verb) {
    ++counts.launches;
    const Opening open(*this);
    verb();
  }

 private:
  struct Staged {
    std::uint64_t number;
    std::byte* to;
    std::vector<std::byte> bytes;
  };

  void set_wall(int protection) const {
    if (mprotect(arena_, static_cast<std::size_t>(bytes_), protection) != 0) std::abort();
  }
  void wipe(Index at, Index size) {
    permit(arena_ + at, size);
    const Opening open(*this);
    std::memset(arena_ + at, poison, static_cast<std::size_t>(size));
  }

  Index bytes_, gap_;
  std::byte* arena_ = nullptr;
  std::map<Index, Index> free_, taken_;  // offset -> size
  std::uint64_t last_ticket_ = 0;
  std::vector<Staged> staged_;  // in the order of their tickets
};

}  // namespace kvpare::test

// Memory that runs out when a test says so: the host's, by this program's operator new, and the CPU backend's. For one source
// file per program.
#pragma once

#include <cstdlib>
#include <kvpare/backend/cpu/backend.hpp>
#include <new>

namespace {

/// Which allocation of this program fails: the n-th from now on, alone or with all that follow.
struct FailingAllocations {
  bool armed = false, all_that_follow = false;
  long left = 0;
  bool of_host = true;  // false: only the backend's fail

  bool fails() {
    if (!armed) return false;
    if (left > 0) --left;
    if (left > 0) return false;
    armed = all_that_follow;
    return true;
  }
} failing;

void* memory_or_null(std::size_t bytes, std::size_t alignment) {
  if (failing.of_host && failing.fails()) return nullptr;
  return std::aligned_alloc(alignment, (bytes + alignment) / alignment * alignment);
}

void* memory_or_throw(std::size_t bytes, std::size_t alignment) {
  if (void* p = memory_or_null(bytes, alignment)) return p;
  throw std::bad_alloc();
}

}  // namespace

// (noinline: g++ would see free() meet operator new and warn.)
[[gnu::noinline]] void* operator new(std::size_t bytes) { return memory_or_throw(bytes, 16); }
[[gnu::noinline]] void* operator new(std::size_t bytes, std::align_val_t a) {
  return memory_or_throw(bytes, static_cast<std::size_t>(a));
}
[[gnu::noinline]] void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept { return memory_or_null(bytes, 16); }
[[gnu::noinline]] void operator delete(void* p) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
[[gnu::noinline]] void operator delete(void* p, const std::nothrow_t&) noexcept { std::free(p); }

namespace kvpare::test {

/// Its memory runs out together with the host's.
struct FailingBackend : cpu::Backend {
  using cpu::Backend::Backend;
  void* allocate(Index bytes) { return failing.fails() ? nullptr : cpu::Backend::allocate(bytes); }
};

}  // namespace kvpare::test

// A function on a stack of its own, which can pause and be resumed where it was.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "support/walled_memory.hpp"

#if defined(__x86_64__)
#define KVPARE_TEST_OWN_SWITCH 1
#else
#include <ucontext.h>
#endif
#if defined(KVPARE_TEST_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

namespace kvpare::test::simt {

#if defined(KVPARE_TEST_OWN_SWITCH)
/// Leaves this stack, saved in *from, for the one saved as `to`. swapcontext would make two system calls for it.
[[gnu::naked, gnu::noinline]] inline void switch_stack(void** /*from: rdi*/, void* /*to: rsi*/) {
  asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\t"
      "popq %rcx\n\tjmp *%rcx");  // the processor would predict a ret to go back to the caller
}
#endif

class Fiber {
 public:
  Fiber() {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    void* mapped =
        mmap(nullptr, page + stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw std::runtime_error("fiber: no memory for a stack");
    mapped_ = static_cast<std::byte*>(mapped);
    stack_ = mapped_ + page;
    mprotect(mapped_, page, PROT_NONE);  // a kernel that needs more stack faults
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    permit(stack_, stack_bytes);
    munmap(mapped_, static_cast<std::size_t>(stack_ - mapped_) + stack_bytes);
  }

  /// Runs body(argument), which must not throw, from the next resume() on. What the fiber did before is abandoned.
  void start(void (*body)(void*), void* argument) {
    // The address sanitizer still remembers the frames of an abandoned run, and of one that ended those of enter().
    const std::size_t remembered = ended_ ? std::min(stack_bytes, std::size_t{16} << 10) : stack_bytes;
    permit(stack_ + stack_bytes - remembered, static_cast<Index>(remembered));
    body_ = body, argument_ = argument, ended_ = false;
#if defined(KVPARE_TEST_OWN_SWITCH)
    // Tops at one offset within their pages would fall into the same few sets of the first cache.
    const std::size_t page = reinterpret_cast<std::uintptr_t>(stack_) >> 12;
    auto* top = reinterpret_cast<void**>(stack_ + stack_bytes - page % 64 * 64);
    *--top = nullptr;                              // where enter() would return to: here stack traces end
    *--top = reinterpret_cast<void*>(&enter);      // where the first switch returns to
    for (int i = 0; i < 6; ++i) *--top = nullptr;  // the registers it restores
    inside_ = top;
#else
    getcontext(&inside_);
    inside_.uc_stack = {.ss_sp = stack_, .ss_flags = 0, .ss_size = stack_bytes};
    inside_.uc_link = nullptr;
    makecontext(&inside_, &enter, 0);
#endif
#if defined(KVPARE_TEST_ASAN)
    fake_stack_ = nullptr;
#endif
  }

  /// From outside: until it pauses or ends.
  void resume() {
    running = this;
#if defined(KVPARE_TEST_ASAN)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_, stack_bytes);
#endif
#if defined(KVPARE_TEST_OWN_SWITCH)
    switch_stack(&outside_, inside_);
#else
    swapcontext(&outside_, &inside_);
#endif
#if defined(KVPARE_TEST_ASAN)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  /// From inside: back to whoever resumed it.
  void pause() {
#if defined(KVPARE_TEST_ASAN)
    __sanitizer_start_switch_fiber(ended_ ? nullptr : &fake_stack_, outer_stack_, outer_bytes_);
#endif
#if defined(KVPARE_TEST_OWN_SWITCH)
    switch_stack(&inside_, outside_);
#else
    swapcontext(&inside_, &outside_);
#endif
#if defined(KVPARE_TEST_ASAN)
    __sanitizer_finish_switch_fiber(fake_stack_, &outer_stack_, &outer_bytes_);
#endif
  }

  bool ended() const { return ended_; }

 private:
  static constexpr std::size_t stack_bytes = std::size_t{256} << 10;  // touched only as far as used
  static inline thread_local Fiber* running = nullptr;

  static void enter() {
    Fiber& self = *running;
#if defined(KVPARE_TEST_ASAN)
    __sanitizer_finish_switch_fiber(nullptr, &self.outer_stack_, &self.outer_bytes_);
#endif
    self.body_(self.argument_);
    self.ended_ = true;
    self.pause();
  }

  std::byte* mapped_ = nullptr;
  std::byte* stack_ = nullptr;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  bool ended_ = true;
#if defined(KVPARE_TEST_OWN_SWITCH)
  void* inside_ = nullptr;
  void* outside_ = nullptr;
#else
  ucontext_t inside_, outside_;
#endif
#if defined(KVPARE_TEST_ASAN)
  void* fake_stack_ = nullptr;
  const void* outer_stack_ = nullptr;
  std::size_t outer_bytes_ = 0;
#endif
};

}  // namespace kvpare::test::simt

// Who does the work: a small pool of threads, or the engine's own.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "../../core/config.hpp"
#include "../../core/error.hpp"

namespace kvpare::cpu {

/// Runs body(0) … body(tasks - 1), in any order, on any threads, and returns when all are done.
using ParallelFor = std::function<void(Index tasks, const std::function<void(Index)>& body)>;

/// `threads - 1` workers beside the caller. Tasks are handed out one by one, so uneven ones balance. A worker that has
/// nothing to do looks for work for some tens of microseconds before it sleeps: decode steps follow one another closely.
class ThreadPool {
 public:
  explicit ThreadPool(Index threads) {
    require(threads >= 1 && threads <= 1024, "thread pool: threads = ", threads, ", must be within [1, 1024]");
    for (Index t = 1; t < threads; ++t) workers_.emplace_back([this] { work(); });
  }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  ~ThreadPool() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread& w : workers_) w.join();
  }

  Index threads() const { return static_cast<Index>(workers_.size()) + 1; }

  /// Not reentrant; calls from several threads take turns. `body` must not throw.
  void operator()(Index tasks, const std::function<void(Index)>& body) {
    if (workers_.empty() || tasks <= 1) {
      for (Index t = 0; t < tasks; ++t) body(t);
      return;
    }
    std::lock_guard turn(turn_);
    {
      std::lock_guard lock(mutex_);
      body_ = &body;
      tasks_ = tasks;
      next_.store(0, std::memory_order_relaxed);
      busy_.store(static_cast<Index>(workers_.size()), std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    run();
    while (busy_.load(std::memory_order_acquire) != 0) pause();
  }

 private:
  static constexpr int spins = 20000;

  static void pause() {
#if defined(__x86_64__) && !defined(__CUDA_ARCH__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
  }

  void run() {
    for (Index t; (t = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) (*body_)(t);
  }

  void work() {
    std::uint64_t seen = 0;
    while (true) {
      for (int i = 0; i < spins && generation_.load(std::memory_order_acquire) == seen; ++i) pause();
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
        seen = generation_.load(std::memory_order_acquire);
        if (stop_) return;
      }
      run();
      busy_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_;
  const std::function<void(Index)>* body_ = nullptr;
  Index tasks_ = 0;
  std::atomic<Index> next_{0}, busy_{0};
  std::atomic<std::uint64_t> generation_{0};
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace kvpare::cpu

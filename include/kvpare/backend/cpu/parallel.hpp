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
/// nothing to do looks for work for about a millisecond before it sleeps: the layers of a decode step follow one another
/// closely, and waking a thread costs as much as a short layer.
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
    }
    wake_.notify_all();
    for (std::thread& w : workers_) w.join();
  }

  Index threads() const { return static_cast<Index>(workers_.size()) + 1; }

  /// Not reentrant; calls from several threads take turns. `body` must not throw. Returns when all tasks are done, not
  /// when all workers have woken: one that comes late finds nothing to take.
  void operator()(Index tasks, const std::function<void(Index)>& body) {
    if (workers_.empty() || tasks <= 1) {
      for (Index t = 0; t < tasks; ++t) body(t);
      return;
    }
    require(tasks <= most_tasks, "thread pool: ", tasks, " tasks, must be at most ", most_tasks);
    std::lock_guard turn(turn_);
    const std::uint64_t left = (job_of(left_.load(std::memory_order_relaxed)) + 1) << 32 | static_cast<std::uint64_t>(tasks);
    {
      std::lock_guard lock(mutex_);
      body_.store(&body, std::memory_order_relaxed);
      tasks_.store(static_cast<std::uint64_t>(tasks), std::memory_order_relaxed);
      done_.store(0, std::memory_order_relaxed);
      left_.store(left, std::memory_order_release);
    }
    wake_.notify_all();
    run(job_of(left));
    while (done_.load(std::memory_order_acquire) != static_cast<std::uint64_t>(tasks)) pause();
  }

 private:
  static constexpr int spins = 60000;
  static constexpr Index most_tasks = (Index{1} << 32) - 1;

  static constexpr std::uint64_t job_of(std::uint64_t left) { return left >> 32; }

  static void pause() {
#if defined(__x86_64__) && !defined(__CUDA_ARCH__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
  }

  /// Takes tasks of one job until there are none left, or the job is over. Whether there is one is said by the same word as
  /// the job, so that a worker that comes late takes none of the next job under the old number. A task that was taken keeps
  /// its job from being over, so what is read after taking it belongs to it.
  void run(std::uint64_t job) {
    std::uint64_t left = left_.load(std::memory_order_acquire);
    while (job_of(left) == job && (left & 0xffffffffu) != 0) {
      if (!left_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      (*body_.load(std::memory_order_relaxed))(
          static_cast<Index>(tasks_.load(std::memory_order_relaxed) - (left & 0xffffffffu)));
      done_.fetch_add(1, std::memory_order_release);
      left = left_.load(std::memory_order_acquire);
    }
  }

  void work() {
    std::uint64_t seen = 0;  // the last job looked at
    while (true) {
      for (int i = 0; i < spins && job_of(left_.load(std::memory_order_acquire)) == seen; ++i) pause();
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || job_of(left_.load(std::memory_order_acquire)) != seen; });
        if (stop_) return;
        seen = job_of(left_.load(std::memory_order_acquire));
      }
      run(seen);
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_;
  std::atomic<std::uint64_t> left_{0};  // job number and how many of its tasks nobody has taken, in one word
  std::atomic<std::uint64_t> tasks_{0}, done_{0};
  std::atomic<const std::function<void(Index)>*> body_{nullptr};
  bool stop_ = false;
  std::vector<std::thread> workers_;
};

}  // namespace kvpare::cpu

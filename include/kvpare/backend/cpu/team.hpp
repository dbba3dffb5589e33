// What every CPU verb works with: the kernels of the chosen instruction set, the threads, and scratch memory per thread.
#pragma once

#include <cmath>
#include <deque>
#include <vector>

#include "../arguments.hpp"
#include "kernels.hpp"
#include "parallel.hpp"

namespace kvpare::cpu {

struct Team {
  const Kernels* kernels = nullptr;
  const ParallelFor* parallel = nullptr;

  /// body(i) for i in [0, tasks), spread over the threads.
  template <class Body>
  void run(Index tasks, const Body& body) const {
    if (tasks == 1)
      body(Index{0});
    else if (tasks > 1)
      (*parallel)(tasks, body);
  }
};

/// Scratch of one thread: grows to the largest need, is reused by every verb, and holds nothing between them.
class Scratch {
 public:
  /// Room for `count` floats, 64-byte aligned, contents undefined; valid until the next `reset`.
  float* floats(Index count) { return reinterpret_cast<float*>(bytes(count * 4)); }

  std::byte* bytes(Index count) {
    const Index size = round_up(count, 64);
    if (top_ == blocks_.size()) blocks_.emplace_back();
    std::vector<Line>& block = blocks_[top_++];
    if (static_cast<Index>(block.size()) * 64 < size) block.resize(static_cast<std::size_t>(size / 64));
    return reinterpret_cast<std::byte*>(block.data());
  }

  void reset() { top_ = 0; }

  /// This thread's, with everything handed out earlier taken back.
  static Scratch& fresh() {
    thread_local Scratch scratch;
    scratch.reset();
    return scratch;
  }

 private:
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  std::deque<std::vector<Line>> blocks_;
  std::size_t top_ = 0;
};

using kvpare::detail::ln_2;
using kvpare::detail::log2_e;

/// Turns dot products into logits in units of log2: x = log2(e) * logit, in place. With no softcap the factor has been
/// folded into the query; with softcap c:  c * tanh(x / c), by tanh(y) = (1 - t) / (1 + t), t = exp(-2|y|).
inline void cap_logits(const Kernels& k, float* x, Index n, float softcap, float* scratch) {
  for (Index i = 0; i < n; ++i) scratch[i] = -2 * log2_e / softcap * std::abs(x[i]);
  k.exp2_shift_sum(scratch, n, 0.0f);
  for (Index i = 0; i < n; ++i) x[i] = std::copysign(softcap * log2_e * (1 - scratch[i]) / (1 + scratch[i]), x[i]);
}

/// What a query is multiplied by so that its dot products are logits in units of log2 (before a softcap: plain logits).
inline float query_factor(const LayerShape& shape) { return shape.softcap > 0 ? shape.scale : shape.scale * log2_e; }

}  // namespace kvpare::cpu

// `each` on the device: a thread per index.
#pragma once

#include "workspace.cuh"

namespace kvpare::cuda {

namespace detail {

template <class F>
struct EachKernel {
  static constexpr int threads = 256;
  Index n;
  F f;

  Index shared_bytes() const { return 0; }
  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const Index i = b.block() * threads + b.thread();
    if (i < n) f(i);
  }
};

}  // namespace detail

template <class Work, class F>
void each(Work& work, Index n, const F& f) {
  using Kernel = detail::EachKernel<F>;
  work.launch(ceil_div(n, Kernel::threads), Kernel{n, f});
}

}  // namespace kvpare::cuda

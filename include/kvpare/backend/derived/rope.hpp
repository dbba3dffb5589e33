// A layer's rotation where functors can follow it.
#pragma once

#include "../../core/rope.hpp"
#include "../backend.hpp"

namespace kvpare {

/// A Rope in backend memory. Without one its view turns nothing.
template <Backend B>
class BackendRope {
 public:
  BackendRope() = default;
  BackendRope(B& be, const Rope& rope)
      : frequencies_(be, std::span<const double>(rope.inverse_frequencies)),
        axes_(be, std::span<const std::uint8_t>(rope.axes)),
        view_{frequencies_.data(), axes_.data(), rope.pairs(), rope.pairing} {}
  const RopeView& view() const { return view_; }

 private:
  Buffer<B, const double> frequencies_;
  Buffer<B, const std::uint8_t> axes_;
  RopeView view_;
};

}  // namespace kvpare

// Floats of the host that a backend reads or writes in between.
#pragma once

#include <kvpare/backend/backend.hpp>
#include <span>

namespace example {

/// On the CPU the host's own memory, elsewhere a copy beside it. The host's floats must outlive this.
template <kvpare::Backend B>
class TakenInTurns {
 public:
  /// Throws InvalidArgument when the backend has no memory left.
  TakenInTurns(B& be, std::span<float> host) : be_(be), host_(host) {
    if constexpr (!in_place) copy_ = kvpare::Buffer<B, float>(be, static_cast<kvpare::Index>(host.size()));
  }

  /// Where the backend has them.
  float* on_backend() const {
    if constexpr (in_place) return host_.data();
    return copy_.data();
  }

  /// Queued: what the host has written.
  void to_backend() {
    if constexpr (!in_place) be_.to_backend(copy_.data(), host_.data(), copy_.bytes());
  }

  /// Waits until the host has what the backend has written.
  void to_host() {
    if constexpr (!in_place) be_.wait(be_.to_host(host_.data(), copy_.data(), copy_.bytes()));
  }

 private:
  static constexpr bool in_place = B::name == "cpu";  // whose memory is the host's
  B& be_;
  std::span<float> host_;
  kvpare::Buffer<B, float> copy_;
};

}  // namespace example

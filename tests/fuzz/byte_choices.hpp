// Choices drawn from the bytes of a fuzzer's input, with the words of support/inputs.hpp's Dice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <kvpare/core/config.hpp>

namespace kvpare::test {

/// Few bytes per choice, so that a small change of an input is a small change of what happens. After the last byte
/// every choice is the first one; `empty` says so.
class ByteChoices {
 public:
  ByteChoices(const std::uint8_t* data, std::size_t size) : at_(data), end_(data + size) {}

  bool empty() const { return at_ == end_; }
  Index below(Index n) {
    Index x = byte();
    for (Index reach = 256; reach < n; reach *= 256) x = x * 256 + byte();
    return x % n;
  }
  Index within(Index low, Index high) { return low + below(high - low + 1); }
  double unit() { return static_cast<double>(byte()) / 256; }
  bool chance(double p) { return unit() < p; }

 private:
  Index byte() { return at_ == end_ ? 0 : *at_++; }
  const std::uint8_t *at_, *end_;
};

}  // namespace kvpare::test

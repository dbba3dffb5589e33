// Random inputs: the same on every machine, and exact in the element type they are meant for.
#pragma once

#include <algorithm>
#include <cstring>
#include <kvpare/core/random.hpp>
#include <kvpare/core/view.hpp>
#include <numeric>
#include <vector>

#include "oracle/dense.hpp"
#include "rigs.hpp"

namespace kvpare::test {

/// A stream of random numbers.
struct Dice {
  std::uint64_t seed = 1, at = 0;

  double unit() { return static_cast<double>(random_unit(seed, at++)); }  // [0, 1)
  double symmetric() { return 2 * unit() - 1; }                           // [-1, 1)
  Index below(Index n) { return static_cast<Index>(random_bits(seed, at++) % static_cast<std::uint64_t>(n)); }
  Index within(Index low, Index high) { return low + below(high - low + 1); }
  bool chance(double p) { return unit() < p; }

  std::vector<Index> permutation(Index n) {
    std::vector<Index> p(static_cast<std::size_t>(n));
    std::iota(p.begin(), p.end(), Index{0});
    for (Index i = n - 1; i > 0; --i)
      std::swap(p[static_cast<std::size_t>(i)], p[static_cast<std::size_t>(below(i + 1))]);
    return p;
  }
};

/// The nearest number of the element type.
inline double rounded(double x, DType type) {
  return with_type(type, [&](auto* t) {
    return static_cast<double>(static_cast<float>(std::remove_pointer_t<decltype(t)>(static_cast<float>(x))));
  });
}

inline double write_element(double x, DType type, std::byte* to) {
  return with_type(type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    const T value(static_cast<float>(x));
    std::memcpy(to, &value, sizeof(T));
    return static_cast<double>(static_cast<float>(value));
  });
}

inline double read_element(const std::byte* from, DType type) {
  return with_type(type, [&](auto* t) {
    std::remove_pointer_t<decltype(t)> value;
    std::memcpy(&value, from, sizeof value);
    return static_cast<double>(static_cast<float>(value));
  });
}

/// Numbers within [-size, size], exact in `type`.
inline oracle::Array3 random_array(Dice& dice, Index a, Index b, Index c, DType type, double size = 1) {
  oracle::Array3 x(a, b, c);
  for (double& v : x.values) v = rounded(size * dice.symmetric(), type);
  return x;
}

/// A dense tensor in backend memory.
template <Backend B>
class TensorBuffer {
 public:
  TensorBuffer(B& be, const oracle::Array3& x, DType type)
      : be_(&be), like_(x), type_(type), memory_(be, bytes_of(x, type)) {}

  ConstTensor tensor() const {
    Tensor t = writable();
    return t;
  }
  Tensor writable() const {
    Tensor t;
    t.data = memory_.data(), t.dtype = type_;
    t.rows = like_.a, t.heads = like_.b, t.width = like_.c;
    t.head_stride = like_.c, t.row_stride = like_.b * like_.c;
    return t;
  }

  oracle::Array3 download() const {
    const std::vector<std::byte> bytes = test::download(*be_, memory_);
    oracle::Array3 x = like_;
    for (std::size_t i = 0; i < x.values.size(); ++i)
      x.values[i] = read_element(bytes.data() + i * static_cast<std::size_t>(size_of(type_)), type_);
    return x;
  }
  std::vector<std::byte> raw() const { return test::download(*be_, memory_); }

 private:
  static std::vector<std::byte> bytes_of(const oracle::Array3& x, DType type) {
    std::vector<std::byte> bytes(x.values.size() * static_cast<std::size_t>(size_of(type)));
    for (std::size_t i = 0; i < x.values.size(); ++i)
      write_element(x.values[i], type, bytes.data() + i * static_cast<std::size_t>(size_of(type)));
    return bytes;
  }
  B* be_;
  oracle::Array3 like_;
  DType type_;
  Buffer<B, std::byte> memory_;
};

inline std::vector<float> to_floats(const std::vector<double>& x) { return {x.begin(), x.end()}; }

}  // namespace kvpare::test

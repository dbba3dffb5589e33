// Borrowed, strided memory: the way engines hand in theirs.
#pragma once

#include <concepts>
#include <type_traits>

#include "config.hpp"
#include "dtype.hpp"
#include "error.hpp"

namespace kvpare {

/// Pointer, shape, strides (in elements). Trivially copyable; owns nothing.
template <class T, int Rank>
struct View {
  T* data = nullptr;
  Index shape[Rank] = {};
  Index stride[Rank] = {};

  template <std::convertible_to<Index>... I>
    requires(sizeof...(I) == Rank)
  constexpr KVPARE_HD T& operator()(I... i) const {
    Index offset = 0;
    int d = 0;
    ((offset += static_cast<Index>(i) * stride[d++]), ...);
    return data[offset];
  }
};

/// A view of contiguous memory, last index fastest.
template <class T, std::convertible_to<Index>... N>
constexpr KVPARE_HD auto dense(T* data, N... n) -> View<T, static_cast<int>(sizeof...(N))> {
  View<T, static_cast<int>(sizeof...(N))> v{data, {static_cast<Index>(n)...}, {}};
  Index step = 1;
  for (int d = static_cast<int>(sizeof...(N)) - 1; d >= 0; --d) {
    v.stride[d] = step;
    step *= v.shape[d];
  }
  return v;
}

/// Rows × heads × width in one of our element types: K, V, Q or an output of one layer, in the engine's (backend's)
/// memory. The width is contiguous; rows and heads may be strided. `Void` is `void` or `const void`.
template <class Void>
struct BasicTensor {
  Void* data = nullptr;
  DType dtype = DType::f32;
  Index rows = 0, heads = 0, width = 0;
  Index row_stride = 0, head_stride = 0;  // in elements

  constexpr BasicTensor() = default;

  template <class T>
    requires Element<std::remove_const_t<T>> && std::convertible_to<T*, Void*>
  constexpr BasicTensor(View<T, 3> v)
      : data(v.data), dtype(dtype_of<std::remove_const_t<T>>()), rows(v.shape[0]), heads(v.shape[1]), width(v.shape[2]),
        row_stride(v.stride[0]), head_stride(v.stride[1]) {
    require(v.stride[2] == 1 || v.shape[2] <= 1, "tensor: the last stride is ", v.stride[2], ", must be 1");
  }

  template <class T>
    requires Element<std::remove_const_t<T>> && std::convertible_to<T*, Void*>
  constexpr BasicTensor(T* dense_data, Index n, Index h, Index w) : BasicTensor(dense(dense_data, n, h, w)) {}

  /// A writable tensor is a readable one.
  template <class Other>
    requires(std::is_const_v<Void>&& std::same_as<Other, void>)
  constexpr KVPARE_HD BasicTensor(const BasicTensor<Other>& t)
      : data(t.data), dtype(t.dtype), rows(t.rows), heads(t.heads), width(t.width), row_stride(t.row_stride),
        head_stride(t.head_stride) {}

  /// Rows [first, first + count).
  constexpr KVPARE_HD BasicTensor part(Index first, Index count) const {
    BasicTensor t = *this;
    t.data = at(first, 0);
    t.rows = count;
    return t;
  }

  /// Heads [first, first + count).
  constexpr KVPARE_HD BasicTensor heads_part(Index first, Index count) const {
    BasicTensor t = *this;
    t.data = at(0, first);
    t.heads = count;
    return t;
  }

  /// Address of a row of one head. Arithmetic only: nothing is read.
  constexpr KVPARE_HD Void* at(Index row, Index head) const {
    using Byte = std::conditional_t<std::is_const_v<Void>, const std::byte, std::byte>;
    return static_cast<Byte*>(data) + (row * row_stride + head * head_stride) * size_of(dtype);
  }
};

using Tensor = BasicTensor<void>;
using ConstTensor = BasicTensor<const void>;

}  // namespace kvpare

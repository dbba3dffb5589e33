// One number of a row in global memory, in any of the element types.
#pragma once

#include "../arguments.hpp"
#include "block.cuh"

namespace kvpare::cuda::detail {

using kvpare::detail::ln_2;
using kvpare::detail::log2_e;

template <class Block>
KVPARE_DEVICE float number_at(const Block& b, const std::byte* row, DType type, Index i = 0) {
  if (type == DType::f32) return b.load(reinterpret_cast<const float*>(row) + i);
  const std::uint16_t bits = b.load(reinterpret_cast<const std::uint16_t*>(row) + i);
  return type == DType::f16 ? kvpare::detail::half_to_float(bits) : kvpare::detail::bfloat16_to_float(bits);
}
KVPARE_DEVICE std::uint16_t short_number(float x, DType type) {
  return type == DType::f16 ? kvpare::detail::float_to_half(x) : kvpare::detail::float_to_bfloat16(x);
}
KVPARE_DEVICE void put_number(std::byte* row, float x, DType type, Index i = 0) {
  if (type == DType::f32)
    reinterpret_cast<float*>(row)[i] = x;
  else
    reinterpret_cast<std::uint16_t*>(row)[i] = short_number(x, type);
}

}  // namespace kvpare::cuda::detail

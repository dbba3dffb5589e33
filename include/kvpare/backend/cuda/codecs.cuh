// Codecs on the device: for every codec and side a table of launches over its tiles.
//
// A job is one tile; jobs of one codec go out with one launch. `tile_ops<Work, C>(side, shape)` gives the table; what a
// tile's bytes look like on the device is said by DeviceTiles (tile_layout.cuh).
#pragma once

#include <array>

#include "../../codec/codec.hpp"
#include "workspace.cuh"

namespace kvpare::cuda {

/// Rows of one tile that become floats: the n-th set bit of `slots` goes to out + n * out_stride.
struct DecodeJob {
  const std::byte* tile = nullptr;
  const float* state = nullptr;
  std::uint64_t slots = 0;
  float* out = nullptr;
  Index out_stride = 0;
};

/// Rows [count, width] of any element type that become slots [first, first + count) of a tile.
struct EncodeJob {
  const std::byte* rows = nullptr;
  Index row_bytes = 0;  // from one to the next
  DType type = DType::f32;
  const float* state = nullptr;
  std::byte* tile = nullptr;
  Index first = 0, count = 0;
};

/// A whole tile and its canonical bytes.
struct RepackJob {
  std::byte* tile = nullptr;
  std::byte* canonical = nullptr;
};

/// Where a part of each row lies in a tile: `bytes` at `at` + slot * stride; or, paired, two bytes at a time as values
/// in fragment order have it, unit u of slot t at `at` + t / 2 * 2 * stride + t % 2 * 2 + u * 4.
struct RowPart {
  Index at = 0, stride = 0, bytes = 0;
  bool paired = false;
};
/// Codes (their low bits and their high ones), scales, zeros; parts of no bytes are not there.
using RowParts = std::array<RowPart, 4>;

/// What a codec handle of the device points to.
template <class Work>
struct TileOps {
  bool rows_move = true;
  Index (*tile_bytes)(TileShape shape) = nullptr;
  void (*decode)(Work& work, TileShape shape, const DecodeJob* jobs, Index count) = nullptr;  // jobs [backend]
  void (*encode)(Work& work, TileShape shape, std::span<const EncodeJob> jobs) = nullptr;
  RowParts (*row_parts)(TileShape shape) = nullptr;  // null: rows do not move
  void (*to_canonical)(Work& work, TileShape shape, std::span<const RepackJob> jobs) = nullptr;
  void (*from_canonical)(Work& work, TileShape shape, std::span<const RepackJob> jobs) = nullptr;
};

}  // namespace kvpare::cuda

// Codecs on the device: for every codec and side a table of launches over its tiles.
//
// A job is one tile; jobs of one codec go out with one launch. `tile_ops<Work, C>(side, shape)` gives the table; what a
// tile's bytes look like on the device is said by its tiles' type (tiles.cuh).
#pragma once

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

/// Floats [count, width] that become slots [first, first + count) of a tile.
struct EncodeJob {
  const float* rows = nullptr;
  const float* state = nullptr;
  std::byte* tile = nullptr;
  Index first = 0, count = 0;
};

/// Rows of one tile that go to other slots of the same or another tile, codes and scales as they are. Jobs of one launch
/// touch different slots.
struct MoveJob {
  const std::byte* from = nullptr;
  std::byte* to = nullptr;
  Index from_slot = 0, to_slot = 0, count = 0;
};

/// A whole tile and its canonical bytes.
struct RepackJob {
  std::byte* tile = nullptr;
  std::byte* canonical = nullptr;
};

/// What a codec handle of the device points to.
template <class Work>
struct TileOps {
  bool rows_move = true;
  Index (*tile_bytes)(TileShape shape) = nullptr;
  void (*decode)(Work& work, TileShape shape, std::span<const DecodeJob> jobs) = nullptr;
  void (*encode)(Work& work, TileShape shape, std::span<const EncodeJob> jobs) = nullptr;
  void (*move_rows)(Work& work, TileShape shape, std::span<const MoveJob> jobs) = nullptr;  // null: rows do not move
  void (*to_canonical)(Work& work, TileShape shape, std::span<const RepackJob> jobs) = nullptr;
  void (*from_canonical)(Work& work, TileShape shape, std::span<const RepackJob> jobs) = nullptr;
};

}  // namespace kvpare::cuda

// Numbers that decide how fast kernels are and not what they compute.
#pragma once

#include "../../core/config.hpp"

namespace kvpare::cuda {

/// `attention_mass`: a block per range of keys of one kv head. Two blocks of eight warps fill the registers of a
/// multiprocessor; 128 query vectors of 128 channels in 16 bits are 40 KiB, and two blocks of 80 KiB fit where a
/// multiprocessor has 227.
struct MassTuning {
  int threads = 256;
  Index blocks_per_multiprocessor = 2;
  Index query_bytes = 40 << 10;       // of shared memory for queries
  Index much_query_bytes = 80 << 10;  // the same where a block may have much_shared
  Index much_shared = 200 << 10;
  Index most_vectors = 256;  // of a chunk: 160 bytes each beside their queries
};
inline constexpr MassTuning mass_tuning;

}  // namespace kvpare::cuda

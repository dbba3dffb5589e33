// Numbers that decide how fast kernels are and not what they compute.
#pragma once

#include "../../core/config.hpp"

namespace kvpare::cuda {

/// `select_top`: a block per row. Chosen for an H200: 1024 threads with their share of 32k keys in shared memory keep
/// one multiprocessor busy; rows of a few thousand columns are bound by barriers, which fewer threads pass sooner.
struct SelectTuning {
  int threads = 1024, few_threads = 256;
  Index few_columns = 8192;  // up to so many columns in the longest row, few_threads
  int digit_bits = 11;       // of the first digits; 8 KiB of counts
  int batch = 4;             // steps of 64 columns that a warp reads ahead
  int part_batch = 2;        // the same where only part of a row fits in shared memory: more would not fit in registers
};
inline constexpr SelectTuning select_tuning;

/// `sort_rows`: a block per row, digits of 8 bits.
struct SortTuning {
  int threads = 512;
  int items = 4;  // keys of a thread per tile
};
inline constexpr SortTuning sort_tuning;

/// `reduce`: a block per row.
struct ReduceTuning {
  int threads = 256;
  int batch = 4;
};
inline constexpr ReduceTuning reduce_tuning;

/// `product`: tiles of 64 x 64, cut along k only where there are few of them. The cut depends on the shape alone, so
/// the order of summation is the same on every device.
struct ProductTuning {
  Index blocks = 256;       // wanted; with fewer tiles than that, k is cut
  Index least_depth = 256;  // of a piece
};
inline constexpr ProductTuning product_tuning;

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

/// `attend`: how pages are cut into tasks, a block each. Costs are in units of one page of one task.
struct AttendTuning {
  double task = 1.5;      // to start a block: its rows, its first loads
  double partial = 0.15;  // to join the partial of one more task

  int registers = 36;     // of a thread beside accumulators and the tile that is under way
  /// Blocks of 128 threads on a multiprocessor, which bounds registers so that nothing spills.
  constexpr int blocks(int held) const {
    const int of_thread = (registers + held + 7) / 8 * 8;
    return of_thread >= 256 ? 2 : 65536 / 128 / of_thread;
  }
  Index blocks_of_generic = 4;
};
inline constexpr AttendTuning attend_tuning;

/// What kernels may take, checked whenever they are compiled (tests/cuda/compile.cmake), for every architecture: registers
/// of a thread, bytes spilled, bytes of stack. The row without a name is for kernels that no other names.
struct KernelBudget {
  const char* kernel;
  int registers, spilled_bytes, stack_bytes;
};
inline constexpr KernelBudget kernel_budgets[] = {
    {"", 128, 0, 0},
    {"TopKernel", 72, 32, 16},
    {"FusedAttend", 255, 256, 64},       // widths of 256; none spills at 128 and below
    {"GenericAttend", 208, 0, 2048},     // a row of codes on the stack
    {"MassKernel", 255, 128, 64},
    {"CanonicalEncode", 128, 0, 4096},
    {"CanonicalDecode", 128, 0, 4096},
    {"FragmentRepack", 144, 0, 0},
    {"FragmentEncode", 128, 0, 2048},
    {"EachKernel", 128, 0, 4096},        // states of codecs
};

}  // namespace kvpare::cuda

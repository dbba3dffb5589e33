// Numbers that decide how fast kernels are and not what they compute.
#pragma once

#include "../../core/config.hpp"

namespace kvpare::cuda {

/// `attend`: how pages are cut into tasks, a block each. Costs are in units of one page of one task.
struct AttendTuning {
  Index blocks = 4;      // of 128 threads on a multiprocessor: registers allow four with widths of 128
  double task = 1.5;     // to start a block: its rows, its first loads
  double partial = 0.15; // to join the partial of one more task
};
inline constexpr AttendTuning attend_tuning;

}  // namespace kvpare::cuda

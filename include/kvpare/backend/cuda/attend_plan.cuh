// How the pages of a call are cut into tasks: arithmetic on lengths, on the host.
#pragma once

#include <algorithm>
#include <span>

#include "tuning.cuh"

namespace kvpare::cuda::detail {

/// A stretch of pages that `times` sets of query rows attend to, each in tasks of its own.
struct Stretch {
  Index pages = 0, times = 1;
};

/// Pages per task, within [1, most], so that the call ends soonest: blocks of a machine run in waves, the longest task
/// of a wave decides when it ends, and every list is joined from as many partials as it has tasks.
///
///   waves * (pages of a task + tuning.task) + partials of the longest list * tuning.partial,  waves a fraction above 1
inline Index pages_per_task(std::span<const Stretch> stretches, Index blocks, Index most, const AttendTuning& tuning) {
  Index longest = 1;
  for (const Stretch& s : stretches) longest = std::max(longest, s.pages);
  Index best = 1;
  double least = -1;
  for (Index size = 1; size <= most; size += std::max<Index>(1, size / 4)) {
    Index tasks = 0;
    for (const Stretch& s : stretches) tasks += ceil_div(s.pages, size) * s.times;
    // Tasks of unequal length fill gaps: beyond the first wave, time grows with their number.
    const double waves = std::max(1.0, static_cast<double>(tasks) / static_cast<double>(blocks));
    const double rounded = waves < 4 ? static_cast<double>(ceil_div(tasks, blocks)) : waves;
    const double time = rounded * (static_cast<double>(std::min(size, longest)) + tuning.task) +
                        static_cast<double>(ceil_div(longest, size)) * tuning.partial;
    if (least < 0 || time < least) least = time, best = size;
    if (size >= longest) break;
  }
  return best;
}

}  // namespace kvpare::cuda::detail

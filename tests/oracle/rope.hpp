// Rotary position embedding as matrices.
#pragma once

#include <cmath>

#include "dense.hpp"

namespace kvpare::oracle {

struct RopeSettings {
  std::vector<double> inverse_frequencies;
  bool interleaved = false;
};

/// Identity but for a block [cos -sin; sin cos] per pair of channels.
inline Array2 rotation_matrix(const RopeSettings& rope, Index width, double position) {
  const Index pairs = count_of(rope.inverse_frequencies);
  require(2 * pairs <= width, "oracle: a rope wider than its rows");
  Array2 r(width, width);
  for (Index c = 0; c < width; ++c) r.at(c, c) = 1;
  for (Index i = 0; i < pairs; ++i) {
    const Index x = rope.interleaved ? 2 * i : i, y = rope.interleaved ? 2 * i + 1 : i + pairs;
    const double a = position * item(rope.inverse_frequencies, i);
    r.at(x, x) = r.at(y, y) = std::cos(a);
    r.at(x, y) = -std::sin(a), r.at(y, x) = std::sin(a);
  }
  return r;
}

/// Mean of the rotations of positions first, first + 1, …
inline Array2 mean_rotation(const RopeSettings& rope, Index width, Index first, Index count) {
  Array2 mean(width, width);
  for (Index p = first; p < first + count; ++p) {
    const Array2 r = rotation_matrix(rope, width, static_cast<double>(p));
    for (std::size_t i = 0; i < r.values.size(); ++i) mean.values[i] += r.values[i] / static_cast<double>(count);
  }
  return mean;
}

}  // namespace kvpare::oracle

// StreamingLLM: the first tokens and the last ones.
#pragma once

#include <algorithm>

#include "dense.hpp"

namespace kvpare::oracle {

/// Indices kept of a cache of `length` tokens: the first `start` and the last `recent`; all when it fits.
inline std::vector<Index> streaming_keep(Index length, Index start, Index recent) {
  std::vector<Index> kept;
  for (Index i = 0; i < length; ++i)
    if (i < start || i >= length - recent) kept.push_back(i);
  return kept;
}

/// Indices kept so that `incoming` tokens fit afterwards: the first `start` and the last recent - incoming (none if that
/// is negative); all when length + incoming fits already.
/// Source  StreamingLLM, arXiv 2309.17453
inline std::vector<Index> evict_for_space(Index length, Index incoming, Index start, Index recent) {
  if (length + incoming <= start + recent) return streaming_keep(length, length, 0);
  return streaming_keep(length, start, std::max<Index>(recent - incoming, 0));
}

}  // namespace kvpare::oracle

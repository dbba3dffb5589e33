// The cache as one writes it without a thought for memory: every sequence has its own copy of every token.
#pragma once

#include <algorithm>

#include "attend.hpp"

namespace kvpare::oracle {

/// One layer of a sequence; a fork is a copy.
struct CachedLayer {
  std::vector<CachedHead> heads;  // [kv_heads], by position
  std::vector<Index> given;       // positions ever appended and not truncated, evicted or not

  Index last() const { return given.empty() ? -1 : given.back(); }
  Index tokens() const {
    Index n = 0;
    for (const CachedHead& head : heads) n += count_of(head);
    return n;
  }
  Index most_tokens() const {
    Index n = 0;
    for (const CachedHead& head : heads) n = std::max(n, count_of(head));
    return n;
  }

  /// keys [tokens, kv_heads, key_width], values [tokens, kv_heads, value_width]
  void append(const std::vector<Index>& positions, const Array3& keys, const Array3& values) {
    for (Index h = 0; h < count_of(heads); ++h)
      for (Index t = 0; t < count_of(positions); ++t) {
        CachedToken token{item(positions, t), {}, {}};
        for (Index d = 0; d < keys.c; ++d) token.key.push_back(keys.at(t, h, d));
        for (Index d = 0; d < values.c; ++d) token.value.push_back(values.at(t, h, d));
        item(heads, h).push_back(token);
      }
    given.insert(given.end(), positions.begin(), positions.end());
  }

  void truncate(Index n) {
    for (CachedHead& head : heads) std::erase_if(head, [&](const CachedToken& token) { return token.position >= n; });
    std::erase_if(given, [&](Index p) { return p >= n; });
  }

  /// Of one head only these positions stay.
  void keep(Index head, const std::vector<Index>& positions) {
    std::erase_if(item(heads, head), [&](const CachedToken& token) {
      return !std::binary_search(positions.begin(), positions.end(), token.position);
    });
  }

  std::vector<Index> positions(Index head) const {
    std::vector<Index> at;
    for (const CachedToken& token : item(heads, head)) at.push_back(token.position);
    return at;
  }
};

using CachedSequence = std::vector<CachedLayer>;

}  // namespace kvpare::oracle

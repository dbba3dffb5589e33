// Which tokens of a list stay: one bitmap word per entry.
#pragma once

#include <algorithm>
#include <bit>
#include <span>
#include <utility>
#include <vector>

#include "pages.hpp"

namespace kvpare {

/// A set of slots of one head's list. Union, minus and count are word operations; iteration ascends and has no
/// repeats by construction.
class Selection {
 public:
  Selection() = default;
  explicit Selection(Index entries) : words_(static_cast<std::size_t>(entries), 0) {}
  explicit Selection(std::vector<std::uint64_t> words) : words_(std::move(words)) {}

  /// All live tokens of a list.
  static Selection live(std::span<const Entry> entries) {
    Selection s(static_cast<Index>(entries.size()));
    for (std::size_t e = 0; e < entries.size(); ++e) s.words_[e] = entries[e].live;
    return s;
  }

  Index entries() const { return static_cast<Index>(words_.size()); }
  std::uint64_t word(Index entry) const { return words_[static_cast<std::size_t>(entry)]; }
  std::uint64_t& word(Index entry) { return words_[static_cast<std::size_t>(entry)]; }
  std::span<const std::uint64_t> words() const { return words_; }

  void insert(Index entry, Index slot) { word(entry) |= std::uint64_t{1} << slot; }
  bool has(Index entry, Index slot) const { return word(entry) >> slot & 1u; }

  Index count() const {
    Index n = 0;
    for (std::uint64_t w : words_) n += std::popcount(w);
    return n;
  }

  Selection& operator|=(const Selection& other) {
    for (std::size_t e = 0; e < words_.size(); ++e) words_[e] |= other.words_[e];
    return *this;
  }
  Selection& operator&=(const Selection& other) {
    for (std::size_t e = 0; e < words_.size(); ++e) words_[e] &= other.words_[e];
    return *this;
  }
  Selection& operator-=(const Selection& other) {
    for (std::size_t e = 0; e < words_.size(); ++e) words_[e] &= ~other.words_[e];
    return *this;
  }

  friend bool operator==(const Selection&, const Selection&) = default;

 private:
  std::vector<std::uint64_t> words_;
};

/// Positions of the selected tokens of a list, ascending.
inline std::vector<Position> positions_of(const HeadPages& list, const Selection& chosen) {
  std::vector<Position> at;
  at.reserve(static_cast<std::size_t>(chosen.count()));
  for (Index e = 0; e < chosen.entries(); ++e)
    for_each_bit(chosen.word(e),
                 [&](Index slot) { at.push_back(list.position(list.entries[static_cast<std::size_t>(e)], slot)); });
  if (!list.ascends()) std::sort(at.begin(), at.end());
  return at;
}

/// The live tokens of a list that stand at some positions (ascending).
inline Selection selection_at(const HeadPages& list, std::span<const Position> positions) {
  Selection chosen(static_cast<Index>(list.entries.size()));
  for (Index e = 0; e < chosen.entries(); ++e) {
    const Entry& entry = list.entries[static_cast<std::size_t>(e)];
    for_each_bit(entry.live, [&](Index slot) {
      if (std::binary_search(positions.begin(), positions.end(), list.position(entry, slot))) chosen.insert(e, slot);
    });
  }
  return chosen;
}

}  // namespace kvpare

// One sequence of a cache: its lists, what each layer was given, what policies remember of it. Host bookkeeping.
#pragma once

#include <algorithm>
#include <any>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "../cache/compaction.hpp"
#include "../cache/plan.hpp"
#include "../cache/tags.hpp"
#include "decode_eviction.hpp"
#include "observed_layer.hpp"
#include "running_scores.hpp"

namespace kvpare::detail {

/// The entries of one head. Whoever changes them, or the offsets they name, says so.
class EntryList {
 public:
  auto begin() const { return entries_.begin(); }
  auto end() const { return entries_.end(); }
  std::size_t size() const { return entries_.size(); }
  std::size_t capacity() const { return entries_.capacity(); }
  bool empty() const { return entries_.empty(); }
  const Entry& back() const { return entries_.back(); }
  const Entry& operator[](std::size_t e) const { return entries_[e]; }
  operator std::span<const Entry>() const { return entries_; }

  std::vector<Entry>& change() {
    version_.changed();
    return entries_;
  }
  EntryList& operator=(std::vector<Entry>&& entries) {
    change() = std::move(entries);
    return *this;
  }
  const ListVersion& version() const { return version_; }

 private:
  std::vector<Entry> entries_;
  ListVersion version_;
};

/// Rows as they were appended, of tokens that were coded since; forks share them. No part of a snapshot.
struct ParkedRows {
  std::vector<Position> positions;  // ascending
  std::vector<float> keys, values;  // [tokens, width]
};

struct SequenceHead {
  EntryList entries;
  std::vector<std::uint16_t> offsets;
  std::vector<CodecState> states;  // by Entry::state - 1; the memory is the layer's
  std::vector<std::shared_ptr<const ParkedRows>> parked = {};

  /// The lot that has a token's row, and where; null where none was parked. Positions may have been given anew: the newest.
  std::pair<const ParkedRows*, Index> parked_row(Position p) const {
    for (std::size_t i = parked.size(); i-- > 0;) {
      const auto& at = parked[i]->positions;
      const auto found = std::lower_bound(at.begin(), at.end(), p);
      if (found != at.end() && *found == p) return {parked[i].get(), found - at.begin()};
    }
    return {nullptr, 0};
  }

  /// The tokens of a run, into a new page when it starts at slot 0, else into the last.
  void add(const WriteRun& run, std::span<const Position> positions, Index page_tokens) {
    std::vector<Entry>& list = entries.change();
    if (run.slot == 0) {
      Entry e;
      e.page = run.page, e.format = run.format, e.first = positions[0];
      list.push_back(e);
    }
    for (const Position p : positions) put_token(list.back(), p, page_tokens, offsets);
  }

  /// Does a run to come need its positions spelt out, where so far they were consecutive?
  bool needs_offsets(const WriteRun& run, std::span<const Position> positions) const {
    const bool fresh = run.slot == 0;
    if (!fresh && entries.back().offsets != 0) return false;
    return positions.back() - (fresh ? positions[0] : entries.back().first) != run.slot + run.count - 1;
  }

  /// Blocks of offsets stand in the order of their entries.
  void drop_last(Index page_tokens) {
    const Entry e = entries.back();
    entries.change().pop_back();
    if (e.offsets != 0) offsets.resize(static_cast<std::size_t>((e.offsets - 1) * page_tokens));
  }
};

/// Room for `more` elements, so that adding them cannot fail; grows by half at least, as adding one by one would.
template <class T>
inline void make_room(std::vector<T>& v, std::size_t more) {
  if (v.capacity() - v.size() < more) v.reserve(std::max(v.size() + more, v.capacity() + v.capacity() / 2));
}

/// State of one format for all heads of a layer, constant once a page uses it; forks share it, and layers where the caller says
/// so. What all heads of a layer share stands behind what they do not.
template <Backend B>
struct StateBlock {
  int format = 0;
  bool begun = false;  // the caller's part only (given_floats): nothing is coded with it
  Index heads = 0;
  Index key_floats = 0, value_floats = 0;            // of one state
  bool keys_of_layer = false, values_of_layer = false;  // one state for all heads
  Buffer<B, float> memory;  // [heads][own keys + own values] | keys of all | values of all

  /// From one head's own floats to the next one's.
  Index stride() const { return (keys_of_layer ? 0 : key_floats) + (values_of_layer ? 0 : value_floats); }
  Index floats() const {
    return heads * stride() + (keys_of_layer ? key_floats : 0) + (values_of_layer ? value_floats : 0);
  }
  /// Where the state of a head's side begins, and how many of these there are.
  Index offset(Side side, Index head) const {
    if (side == Side::keys) return keys_of_layer ? heads * stride() : head * stride();
    if (values_of_layer) return heads * stride() + (keys_of_layer ? key_floats : 0);
    return head * stride() + (keys_of_layer ? 0 : key_floats);
  }
  Index states(Side side) const { return (side == Side::keys ? keys_of_layer : values_of_layer) ? 1 : heads; }

  /// Null where the side has none.
  const float* of(Side side, Index head) const {
    return (side == Side::keys ? key_floats : value_floats) > 0 ? memory.data() + offset(side, head) : nullptr;
  }
  CodecState of_head(Index head) const { return {of(Side::keys, head), of(Side::values, head)}; }
};

template <Backend B>
struct SequenceLayer {
  std::vector<SequenceHead> heads;
  std::vector<std::shared_ptr<const StateBlock<B>>> states;  // by Entry::state - 1
  Aging aging;
  Buffer<B, float> query_peaks;    // [kv_heads, key_dim] largest |q| observed; empty where there are only raw formats
  Buffer<B, float> query_squares;  // [kv_heads, key_dim] sum of q^2 over rows and query heads
  Index query_vectors = 0;         // how many vectors per kv head those are of
  Buffer<B, float> query_newest;   // [query_window, kv_heads, key_dim] of the newest rows; where a codec asks for it
  std::vector<std::pair<Position, Position>>
      given_spans;            // [begin, end) of all positions ever appended, minus truncated
  Index compressed_to = 0, compressed_from = 0;  // at the last compress: tokens a head kept (the longest), of so many given
  ObservedLayer<B> observed;  // scores, or query rows, that wait for compress
  RunningScores<B> running;   // of a scorer that adds up attention, prompt and decode steps alike

  /// The newest state of a format that codes: an Entry::state, 0 = none.
  std::uint32_t state_of(int format) const { return newest(format, false); }
  /// The caller's part of a state to be made, or null.
  const StateBlock<B>* begun_state(int format) const {
    const std::uint32_t at = newest(format, true);
    return at == 0 ? nullptr : states[at - 1].get();
  }
  std::uint32_t newest(int format, bool begun) const {
    for (std::size_t s = states.size(); s-- > 0;)
      if (states[s]->format == format && states[s]->begun == begun) return static_cast<std::uint32_t>(s + 1);
    return 0;
  }
  void add_state(std::shared_ptr<const StateBlock<B>> block) {
    detail::make_room(states, 1);  // all of it, before heads point into the block
    for (SequenceHead& head : heads) detail::make_room(head.states, 1);
    for (std::size_t h = 0; h < heads.size(); ++h) heads[h].states.push_back(block->of_head(static_cast<Index>(h)));
    states.push_back(std::move(block));
  }

  /// Tokens a head may hold so that the ratio of the last compress holds, times `keep`.
  Index as_compressed(double keep) const {
    const double ratio = static_cast<double>(compressed_to) / static_cast<double>(std::max<Index>(compressed_from, 1));
    return static_cast<Index>(std::ceil(keep * ratio * static_cast<double>(given()) - 1e-9));
  }
  /// All tokens ever appended.
  Index given() const {
    Index n = 0;
    for (const auto& [begin, end] : given_spans) n += end - begin;
    return n;
  }

  bool empty() const {
    return std::all_of(heads.begin(), heads.end(), [](const SequenceHead& h) { return h.entries.empty(); });
  }
  Position last_position() const { return given_spans.empty() ? -1 : given_spans.back().second - 1; }
  /// Before runs and positions are added; afterwards that cannot fail.
  void make_room(std::span<const WriteRun> runs, std::span<const Position> positions, Index page_tokens) {
    for (std::size_t h = 0, r = 0; h < heads.size(); ++h) {
      std::size_t pages = 0, blocks = 0;
      for (; r < runs.size() && runs[r].head == static_cast<Index>(h); ++r) {
        pages += runs[r].slot == 0;
        blocks +=
            heads[h].needs_offsets(runs[r], positions.subspan(static_cast<std::size_t>(runs[r].row), runs[r].count));
      }
      detail::make_room(heads[h].entries.change(), pages);
      detail::make_room(heads[h].offsets, blocks * static_cast<std::size_t>(page_tokens));
    }
    std::size_t spans = positions[0] != last_position() + 1 || given_spans.empty();
    for (std::size_t i = 1; i < positions.size(); ++i) spans += positions[i] != positions[i - 1] + 1;
    detail::make_room(given_spans, spans);
  }
  void add_given(Position p) {
    if (!given_spans.empty() && given_spans.back().second == p)
      ++given_spans.back().second;
    else
      given_spans.emplace_back(p, p + 1);
  }
  void cut_given(Position n) {
    while (!given_spans.empty() && given_spans.back().first >= n) given_spans.pop_back();
    if (!given_spans.empty()) given_spans.back().second = std::min(given_spans.back().second, n);
  }
  /// Of these positions, how many were ever appended.
  Index given(const PositionSpans& at) const {
    Index n = 0;
    auto span = at.begin();
    for (const auto& [begin, end] : given_spans) {
      while (span != at.end() && span->second <= begin) ++span;
      for (auto s = span; s != at.end() && s->first < end; ++s)
        n += std::min(end, s->second) - std::max(begin, s->first);
    }
    return n;
  }
};

template <Backend B>
struct Sequence {
  Tags tags;
  std::uint64_t epoch = 0;
  std::vector<SequenceLayer<B>> layers;

  DecodeBudget decode_budget;

  Sequence branch(B& be) const {
    Sequence s;
    s.tags = tags;
    s.layers.resize(layers.size());
    for (std::size_t l = 0; l < layers.size(); ++l) {
      s.layers[l].heads = layers[l].heads, s.layers[l].given_spans = layers[l].given_spans;
      s.layers[l].states = layers[l].states, s.layers[l].aging = layers[l].aging;
      s.layers[l].compressed_to = layers[l].compressed_to, s.layers[l].compressed_from = layers[l].compressed_from;
      s.layers[l].running = layers[l].running.copy(be);
    }
    return s;
  }
};

}  // namespace kvpare::detail

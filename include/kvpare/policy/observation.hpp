// What a scorer looks at: one layer's keys and the query rows it asked for.
#pragma once

#include <algorithm>
#include <string_view>
#include <vector>

#include "../backend/backend.hpp"
#include "../cache/columns.hpp"

namespace kvpare {

/// Which query rows a scorer needs; exactly those are kept under chunked prefill, and counted.
struct Reads {
  enum class Rows : std::uint8_t { none, last, after_visual, all } rows = Rows::none;
  Index count = 0;           // with `last`: how many; with `after_visual`: so many of the newest at least, whatever they are of
  ClassSet of = all_tokens;  // only rows of these classes
  bool streams = false;      // rows may come chunk by chunk: scores add up, nothing is kept
  bool attention = false;    // the scores are the rows' attention itself, mean over a kv head's queries: what `attend`
                             // reports of a decode step is then all a scorer needs
  bool features = false;     // no rows, but Features of the prompt's visual tokens
  bool texts = false;        // and, in place of the targets, its text
  /// Can scores be made of what the cache holds, whenever they are wanted?
  constexpr bool cache_only() const { return rows == Rows::none && !features; }
  friend bool operator==(const Reads&, const Reads&) = default;
};

namespace detail {
/// One number of a tensor of one head, as a float.
KVPARE_HD inline float element(const ConstTensor& t, Index row, Index channel) {
  const void* at = t.at(row, 0);
  if (t.dtype == DType::f16) return static_cast<float>(static_cast<const half*>(at)[channel]);
  if (t.dtype == DType::bf16) return static_cast<float>(static_cast<const bfloat16*>(at)[channel]);
  return static_cast<const float*>(at)[channel];
}
}  // namespace detail

/// What an engine hands over of a prompt's visual tokens, for scorers that read features. Everything but the two tensors'
/// payload is host memory.
struct Features {
  ConstTensor sources;                    // [backend] [tokens, 1, width] hidden states that enter a layer
  ConstTensor targets;                    // [backend] [tokens, 1, width] what that layer makes of them; not for `texts`
  std::span<const Position> positions;    // of the tokens, ascending
  std::span<const std::int32_t> x, y;     // place on the grid of the token's image
  std::span<const std::int32_t> image;    // which image, or frame, or tile: any number
  ConstTensor texts = {};                 // [backend] [text tokens, 1, width] of the prompt's text, for scorers that read it
  Index tokens() const { return static_cast<Index>(positions.size()); }
};

/// Scores of one layer: [kv_heads, columns] in backend memory, higher = keep. Zero before the first observation.
struct Scores {
  float* data = nullptr;
  Index heads = 0, columns = 0;
  float* density = nullptr;  // [backend] one number: what the budget called `density` follows
  KVPARE_HD float& operator()(Index head, Index column) const { return data[head * columns + column]; }
};

/// A decode step's one row, as `take_step` of a scorer that goes on by a rule of its own sees it.
struct DecodeRow {
  const float* attention = nullptr;  // [backend] [heads, slots] the largest over a kv head's query heads
  float* scores = nullptr;           // [backend] [heads, slots] carried on; 0 for tokens that came since
  Index heads = 0, slots = 0;        // kv heads
  const Index* keys = nullptr;       // [backend] [heads] tokens that the row sees
  const Index* position = nullptr;   // [backend] [heads] its position + 1, the same for all
};

/// One layer, seen by a scorer. Everything but the queries' and keys' payload is host memory.
template <Backend B>
struct Observation {
  Index layer = 0;
  const LayerShape* shape = nullptr;
  std::span<const HeadPages> heads;  // per kv head
  const Columns* columns = nullptr;
  ConstTensor queries;                        // [rows, q_heads, key_dim], the rows asked for by `reads`
  std::span<const Position> row_positions;    // ascending
  std::span<const std::int32_t> row_columns;  // the column of each row's own token
  const float* row_lse = nullptr;             // [backend] [rows, q_heads] as KvCache::observe takes it; null = to be computed
  ClassSet among;                             // classes up for eviction
  Index compressed_to = 0;                    // tokens a head kept at the last compress, 0 = never compressed
  const Features* features = nullptr;         // of a scorer that reads them; nothing else is filled then

  Index rows() const { return static_cast<Index>(row_positions.size()); }
  TokenClass row_class(Index row) const {
    return static_cast<TokenClass>(
        columns->classes[static_cast<std::size_t>(row_columns[static_cast<std::size_t>(row)])]);
  }
};

/// Position of a layer's newest visual token, -1 = none.
inline Position last_visual(const Columns& columns) {
  const auto live = columns.live_in_any();
  for (Index c = columns.count; c-- > 0;)
    if (visual.has(static_cast<TokenClass>(columns.classes[static_cast<std::size_t>(c)])) && columns.has(live, c))
      return columns.positions[static_cast<std::size_t>(c)];
  return -1;
}

/// The newest rows of an observation.
template <Backend B>
Observation<B> newest_rows(const Observation<B>& seen, Index count) {
  Observation<B> part = seen;
  const Index first = seen.rows() - count;
  part.queries = seen.queries.part(first, count);
  part.row_positions = seen.row_positions.subspan(static_cast<std::size_t>(first));
  part.row_columns = seen.row_columns.subspan(static_cast<std::size_t>(first));
  if (seen.row_lse != nullptr) part.row_lse = seen.row_lse + first * seen.shape->q_heads;
  return part;
}

/// How many tokens of a head each row sees: those it holds up to the row's position, within the layer's window.
template <Backend B>
std::vector<Index> tokens_seen(const Observation<B>& seen, Index head) {
  const Columns& columns = *seen.columns;
  std::vector<Position> held;
  for (Index c = 0; c < columns.count; ++c)
    if (columns.has(columns.live_in(head), c)) held.push_back(columns.positions[static_cast<std::size_t>(c)]);
  std::vector<Index> counts;
  for (const Position p : seen.row_positions) {
    const auto end = std::upper_bound(held.begin(), held.end(), p);
    const auto begin =
        seen.shape->window > 0 ? std::upper_bound(held.begin(), end, p - seen.shape->window) : held.begin();
    counts.push_back(end - begin);
  }
  return counts;
}

/// Calls `f(slot, column)` for every live token of one head, in order.
template <Backend B, class F>
void for_each_token(const Observation<B>& seen, Index head, F&& f) {
  const HeadPages& list = seen.heads[static_cast<std::size_t>(head)];
  for (Index e = 0; e < static_cast<Index>(list.entries.size()); ++e)
    for_each_bit(list.entries[static_cast<std::size_t>(e)].live, [&](Index bit) {
      const Index slot = e * list.page_tokens + bit;
      f(slot, seen.columns->aligned
                  ? slot
                  : Index{seen.columns->of_slot[static_cast<std::size_t>(head)][static_cast<std::size_t>(slot)]});
    });
}

/// Host arrays of one observation in backend memory, as `attention_mass` takes them.
template <Backend B>
class ObservedKeys {
 public:
  ObservedKeys(B& be, const Observation<B>& seen) : positions_(be, seen.row_positions) {
    const std::vector<float>& sinks = seen.shape->sink_logits;
    if (!sinks.empty()) {
      std::vector<float> of_rows;
      for (Index r = 0; r < seen.rows(); ++r) of_rows.insert(of_rows.end(), sinks.begin(), sinks.end());
      sinks_ = Buffer<B, const float>(be, std::span<const float>(of_rows));
    }
    for (const auto& map : seen.columns->of_slot) {
      maps_.emplace_back(be, std::span<const std::int32_t>(map));
      map_pointers_.push_back(maps_.back().data());
    }
  }

  /// Attention as the layer itself has it: sinks take their part, and the denominators may be known.
  MassArguments<> attention(const Observation<B>& seen) const {
    auto a = arguments(seen);
    a.extra = sinks_.data();
    a.lse = seen.row_lse;
    return a;
  }

  /// Arguments with keys, queries and positions filled in; a softmax over just these keys.
  template <class Logit = PlainLogit, class EntryOf = Probability>
  MassArguments<Logit, EntryOf> arguments(const Observation<B>& seen) const {
    MassArguments<Logit, EntryOf> a;
    a.shape = seen.shape;
    a.keys = seen.heads;
    a.column_of = map_pointers_;
    a.columns = seen.columns->count;
    a.queries = seen.queries;
    a.row_positions = positions_.data();
    return a;
  }

  const std::int32_t* column_of(Index head) const {
    return map_pointers_.empty() ? nullptr : map_pointers_[static_cast<std::size_t>(head)];
  }

 private:
  Buffer<B, const Position> positions_;
  Buffer<B, const float> sinks_;  // [rows, q_heads]
  std::vector<Buffer<B, const std::int32_t>> maps_;
  std::vector<const std::int32_t*> map_pointers_;
};

/// A mask over the slots of each head, in backend memory.
template <Backend B>
class SlotMask {
 public:
  /// The live tokens of these columns.
  SlotMask(B& be, const Observation<B>& seen, std::span<const std::uint64_t> column_bitmap) {
    const Index different = seen.columns->aligned ? 1 : static_cast<Index>(seen.heads.size());
    for (Index h = 0; h < different; ++h) {
      const auto words = seen.columns->to_slots(seen.heads[static_cast<std::size_t>(h)], h, column_bitmap);
      words_.emplace_back(be, std::span<const std::uint64_t>(words));
    }
    for (std::size_t h = 0; h < seen.heads.size(); ++h) pointers_.push_back(words_[different == 1 ? 0 : h].data());
  }

  Index different() const { return static_cast<Index>(words_.size()); }
  std::uint64_t* words(Index head) const { return words_[static_cast<std::size_t>(head)].data(); }
  Index size(Index head) const { return words_[static_cast<std::size_t>(head)].size(); }
  std::span<const std::uint64_t* const> pointers() const { return pointers_; }

 private:
  std::vector<Buffer<B, std::uint64_t>> words_;
  std::vector<const std::uint64_t*> pointers_;
};

}  // namespace kvpare

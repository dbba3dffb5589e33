// Paged decode attention on a CPU.
//
// One task is a stretch of one head's list of one sequence. It reads every K and V row once for all query rows of the
// head's group, keeps (max, sum, accumulator) per query row with one rescale per page, and its state is merged with
// those of the list's other stretches in list order: results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <optional>
#include <vector>

#include "../arguments.hpp"
#include "team.hpp"
#include "tiles.hpp"

namespace kvpare::cpu {

namespace detail {

inline constexpr float minus_infinity = -std::numeric_limits<float>::infinity();
inline constexpr Index stretch_tokens = 2048;  // a stretch's state costs (value_dim + 2) floats per query row

/// The set bits of every byte, as bytes in ascending order.
inline constexpr auto bits_of_byte = [] {
  std::array<std::array<std::uint8_t, 8>, 256> table{};
  for (std::size_t byte = 0; byte < 256; ++byte)
    for (std::uint8_t bit = 0, n = 0; bit < 8; ++bit)
      if (byte >> bit & 1u) table[byte][n++] = bit;
  return table;
}();

/// The slots of one entry that at least one row sees, and how far each row sees into them.
struct VisibleSlots {
  std::uint8_t slots[64 + 8];  // written eight at a time
  int count = 0;
  bool same_for_all = true;  // every row sees all of them
  bool gapless = true;       // slots 0, 1, 2, …
  Position positions[64];    // where a codec reads them

  void list(std::uint64_t word) {
    gapless = (word & (word + 1)) == 0;
    if (gapless) {  // nobody is missing: the usual page
      for (int s = 0; s < 64; ++s) slots[s] = static_cast<std::uint8_t>(s);
      count = std::popcount(word);
      return;
    }
    count = 0;
    for (unsigned first = 0; first < 64; first += 8) {
      const std::size_t byte = word >> first & 255;
      for (std::size_t i = 0; i < 8; ++i)
        slots[static_cast<std::size_t>(count) + i] = static_cast<std::uint8_t>(bits_of_byte[byte][i] + first);
      count += std::popcount(byte);
    }
  }
};

/// Positions a row sees: (low, high].
struct Sight {
  Index low, high;
};

inline Sight sight_of(Position row, Index window) {
  return {window > 0 ? static_cast<Index>(row) - window : std::numeric_limits<Index>::min(), row};
}

/// Which slots of `e` the rows see, `all` being the union of their sights and `common` the intersection.
inline void see(const HeadPages& list, const Entry& e, Sight all, Sight common, VisibleSlots& seen) {
  seen.count = 0;
  if (e.live == 0 || e.first > all.high || e.last <= all.low) return;
  std::uint64_t word = e.live;
  if (e.last > all.high || e.first <= all.low)
    for_each_bit(e.live, [&](Index s) {
      const Index at = list.position(e, s);
      if (at > all.high || at <= all.low) word &= ~(std::uint64_t{1} << s);
    });
  seen.list(word);
  seen.same_for_all = e.last <= common.high && e.first > common.low;
}

inline RowSet key_rows(const PageGeometry& g, const Entry& e, const VisibleSlots& seen) {
  return {g.key_row(e.page, 0), g.key_row_bytes, seen.slots, seen.count, g.key_type};
}
inline RowSet value_rows(const PageGeometry& g, const Entry& e, const VisibleSlots& seen) {
  return {g.value_row(e.page, 0), g.value_row_bytes, seen.slots, seen.count, g.value_type};
}

/// The same of a coded side.
inline TileRows coded_rows(const HeadPages& list, const Entry& e, const TileOps& ops, const std::byte* tile,
                           Index width, const float* state, VisibleSlots& seen) {
  if (ops.reads_positions)
    for (int t = 0; t < seen.count; ++t) seen.positions[t] = list.position(e, seen.slots[t]);
  return {tile,       {list.page_tokens, width}, state, seen.slots, seen.count, seen.gapless,
          ops.reads_positions ? seen.positions : nullptr};
}

/// Query rows in the form that coded keys want, made once per format and state.
class PreparedQueries {
 public:
  PreparedQueries(const Kernels& k, const float* q, Index stride, Index rows, Index width)
      : k_(k), q_(q), stride_(stride), rows_(rows), width_(width) {}

  const std::byte* of(std::uint16_t format, const TileOps& ops, const float* state, Scratch& scratch) {
    if (made_.size() <= format) made_.resize(format + std::size_t{1});
    Made& made = made_[format];
    if (made.memory == nullptr)
      made.memory = scratch.bytes(ops.query_bytes(rows_, width_));
    else if (made.state == state)
      return made.memory;
    made.state = state;
    ops.prepare_query(k_, q_, stride_, rows_, width_, state, made.memory);
    return made.memory;
  }

 private:
  struct Made {
    std::byte* memory = nullptr;
    const float* state = nullptr;
  };
  const Kernels& k_;
  const float* q_;
  Index stride_, rows_, width_;
  std::vector<Made> made_;
};

/// Running softmax of some query rows over some keys: logits in units of log2.
struct SoftmaxState {
  float* max = nullptr;  // [rows]
  float* sum = nullptr;  // [rows]
  float* acc = nullptr;  // [rows, value_dim]

  static Index floats(Index rows, Index value_dim) { return rows * (round_up(value_dim, 16) + 2) + 32; }
  static Index stride(Index value_dim) { return round_up(value_dim, 16); }

  SoftmaxState(float* memory, Index rows, Index value_dim)
      : max(memory + round_up(rows * stride(value_dim), 16)), sum(max + rows), acc(memory) {}

  void clear(Index rows, Index value_dim) {
    std::fill_n(max, rows, minus_infinity);
    std::fill_n(sum, rows, 0.0f);
    std::fill_n(acc, rows * stride(value_dim), 0.0f);
  }
};

struct AttendTask {
  Index sequence, head, first_entry, end_entry, stretch;  // stretch: index among the head's
};

/// Query rows of one head as floats, ready for dot products: row r of group member g at (r * group + g) * stride.
inline void prepare_queries(const Kernels& k, const LayerShape& shape, const ConstTensor& queries, Index head,
                            float* to, Index stride) {
  const Index group = shape.group();
  for (Index r = 0; r < queries.rows; ++r)
    for (Index g = 0; g < group; ++g) {
      float* row = to + (r * group + g) * stride;
      k.to_float(static_cast<const std::byte*>(queries.at(r, head * group + g)), queries.dtype, shape.key_dim, row);
      k.multiply(row, shape.key_dim, query_factor(shape));
    }
}

/// Adds `from` to `to`, both softmax states over disjoint keys.
inline void merge(const Kernels& k, SoftmaxState& to, const SoftmaxState& from, Index rows, Index value_dim) {
  const Index stride = SoftmaxState::stride(value_dim);
  for (Index i = 0; i < rows; ++i) {
    const float peak = std::max(to.max[i], from.max[i]);
    const float mine = peak == minus_infinity ? 1 : std::exp2(to.max[i] - peak);
    const float theirs = peak == minus_infinity ? 1 : std::exp2(from.max[i] - peak);
    k.multiply(to.acc + i * stride, value_dim, mine);
    k.add_scaled(from.acc + i * stride, value_dim, theirs, to.acc + i * stride);
    to.sum[i] = to.sum[i] * mine + from.sum[i] * theirs;
    to.max[i] = peak;
  }
}

/// The softmax state of a run of pages whose values are stored transformed (FoldedCodec): undone once, at the end of the run.
class FoldedRun {
 public:
  bool open() const { return ops_ != nullptr; }
  bool is_of(const TileOps* ops, const float* codec_state) const { return ops_ == ops && codec_state_ == codec_state; }
  SoftmaxState state() const { return *state_; }

  void start(const TileOps& ops, const float* codec_state, Scratch& scratch, Index rows, Index value_dim) {
    if (!state_) state_.emplace(scratch.floats(SoftmaxState::floats(rows, value_dim)), rows, value_dim);
    ops_ = &ops, codec_state_ = codec_state;
    state_->clear(rows, value_dim);
  }
  void close(const Kernels& k, SoftmaxState& to, Index rows, Index value_dim) {
    ops_->finish_output(rows, value_dim, codec_state_, state_->sum, state_->acc, SoftmaxState::stride(value_dim));
    merge(k, to, *state_, rows, value_dim);
    ops_ = nullptr;
  }

 private:
  const TileOps* ops_ = nullptr;
  const float* codec_state_ = nullptr;
  std::optional<SoftmaxState> state_;
};

/// Runs the rows of one head over entries [first, end). With `logits` given, every logit is also written there at
/// [query row][slot]. Values that are stored transformed add up in a state of their own until the form changes.
inline void attend_stretch(const Kernels& k, const LayerShape& shape, const AttendSequence& s, const AttendTask& task,
                           SoftmaxState state, float* logits) {
  const HeadPages& list = s.heads[static_cast<std::size_t>(task.head)];
  const Index group = shape.group(), rows = s.queries.rows * group;
  const Index q_stride = round_up(shape.key_dim, 16), acc_stride = SoftmaxState::stride(shape.value_dim);
  Scratch& scratch = Scratch::fresh();
  float* q = scratch.floats(rows * q_stride);
  float* scores = scratch.floats(rows * 64);
  float* alpha = scratch.floats(rows);
  float* tanh_scratch = shape.softcap > 0 ? scratch.floats(64) : nullptr;
  prepare_queries(k, shape, s.queries, task.head, q, q_stride);
  state.clear(rows, shape.value_dim);
  PreparedQueries prepared(k, q, q_stride, rows, shape.key_dim);
  FoldedRun folded;

  const auto [lowest, highest] = std::minmax_element(s.positions.begin(), s.positions.end());
  const Sight all{sight_of(*lowest, shape.window).low, *highest};
  const Sight common{sight_of(*highest, shape.window).low, *lowest};

  VisibleSlots now, next;
  const auto seek = [&](Index e, VisibleSlots& seen) {  // the next entry that anybody sees
    for (; e < task.end_entry; ++e) {
      see(list, list.entries[static_cast<std::size_t>(e)], all, common, seen);
      if (seen.count > 0) break;
    }
    if (e >= task.end_entry) seen.count = 0;
    return e;
  };

  Index at = seek(task.first_entry, now);
  while (at < task.end_entry) {
    const Index following = seek(at + 1, next);
    const Entry& e = list.entries[static_cast<std::size_t>(at)];
    const Entry& ahead = list.entries[static_cast<std::size_t>(following < task.end_entry ? following : at)];
    const PageGeometry& g = list.formats[e.format];
    const PageGeometry& ahead_g = list.formats[ahead.format];
    const CodecState codec_state = list.state_of(e);
    const auto* key_ops = static_cast<const TileOps*>(g.key_codec);
    const auto* value_ops = static_cast<const TileOps*>(g.value_codec);
    const auto ahead_tile = [&](const std::byte* tile, Index bytes) {
      return following < task.end_entry ? AheadBytes{tile, bytes} : AheadBytes{};
    };

    if (key_ops != nullptr)
      key_ops->score(k, prepared.of(e.format, *key_ops, codec_state.keys, scratch), rows,
                     coded_rows(list, e, *key_ops, g.key_row(e.page, 0), shape.key_dim, codec_state.keys, now),
                     ahead_tile(ahead_g.key_row(ahead.page, 0), ahead_g.key_tile_bytes), scores, 64);
    else
      k.dot(q, q_stride, rows, shape.key_dim, key_rows(g, e, now),
            value_ops != nullptr ? RowSet{} : value_rows(g, e, now), scores, 64);
    if (shape.softcap > 0)
      for (Index i = 0; i < rows; ++i) cap_logits(k, scores + i * 64, now.count, shape.softcap, tanh_scratch);

    if (folded.open() && !folded.is_of(value_ops, codec_state.values)) folded.close(k, state, rows, shape.value_dim);
    if (value_ops != nullptr && value_ops->folds && !folded.open())
      folded.start(*value_ops, codec_state.values, scratch, rows, shape.value_dim);
    const SoftmaxState sums = folded.open() ? folded.state() : state;

    const auto absorb = [&](Index first_row, Index row_count, int from, int to) {  // listed slots [from, to)
      float* x = scores + first_row * 64 + from;
      for (Index i = 0; i < row_count && logits != nullptr; ++i) {
        float* page = logits + (first_row + i) * list.slots() + at * list.page_tokens;
        if (now.gapless)
          std::copy_n(x + i * 64, to - from, page + from);
        else
          for (int t = from; t < to; ++t) page[now.slots[t]] = x[i * 64 + t - from];
      }
      k.running_softmax(x, 64, row_count, to - from, sums.max + first_row, sums.sum + first_row, alpha);
      float* acc = sums.acc + first_row * acc_stride;
      if (value_ops != nullptr) {
        TileRows values =
            coded_rows(list, e, *value_ops, g.value_row(e.page, 0), shape.value_dim, codec_state.values, now);
        if (values.positions != nullptr) values.positions += from;
        values.slots += from, values.count = to - from, values.gapless = values.gapless && from == 0;
        value_ops->accumulate(k, x, 64, alpha, row_count, values,
                              ahead_tile(ahead_g.value_row(ahead.page, 0), ahead_g.value_tile_bytes), acc, acc_stride);
      } else {
        RowSet values = value_rows(g, e, now);
        values.slots += from;
        values.count = to - from;
        k.accumulate(x, 64, alpha, row_count, shape.value_dim, values,
                     ahead_g.key_codec != nullptr ? RowSet{} : key_rows(ahead_g, ahead, next), acc, acc_stride);
      }
    };

    if (now.same_for_all) {
      absorb(0, rows, 0, now.count);
    } else {
      // Rows of the same token see the same slots: a contiguous stretch, since positions ascend with the slot. A row must
      // not touch what it cannot see: 0 times a NaN value would still be NaN.
      for (Index r = 0; r < s.queries.rows; ++r) {
        const Sight sight = sight_of(s.positions[static_cast<std::size_t>(r)], shape.window);
        const auto before = [&](Index limit) {
          return static_cast<int>(std::partition_point(now.slots, now.slots + now.count,
                                                       [&](std::uint8_t t) { return list.position(e, t) <= limit; }) -
                                  now.slots);
        };
        const int to = before(sight.high);
        const int from = std::min(to, sight.low == std::numeric_limits<Index>::min() ? 0 : before(sight.low));
        if (from < to) absorb(r * group, group, from, to);
      }
    }
    std::swap(now, next);
    at = following;
  }
  if (folded.open()) folded.close(k, state, rows, shape.value_dim);
}

/// Divides by the sum (sink included; a row that saw nothing stays 0 with lse -inf), writes the output rows and, when asked,
/// lse and mass, for which the logits are turned into probabilities in place.
inline void finish(const Kernels& k, const LayerShape& shape, const AttendSequence& s, Index head, SoftmaxState state,
                   float* logits, MassKind kind) {
  const HeadPages& list = s.heads[static_cast<std::size_t>(head)];
  const Index group = shape.group(), stride = SoftmaxState::stride(shape.value_dim);
  float* mass = s.mass.empty() ? nullptr : s.mass[static_cast<std::size_t>(head)];
  for (Index r = 0; r < s.queries.rows; ++r) {
    for (Index m = 0; m < group; ++m) {
      const Index i = r * group + m, q_head = head * group + m;
      if (!shape.sink_logits.empty() && state.sum[i] != 0) {
        const float sink = shape.sink_logits[static_cast<std::size_t>(q_head)] * log2_e;
        const float peak = std::max(state.max[i], sink);
        const float mine = std::exp2(state.max[i] - peak);
        k.multiply(state.acc + i * stride, shape.value_dim, mine);
        state.sum[i] = state.sum[i] * mine + std::exp2(sink - peak);
        state.max[i] = peak;
      }
      const float sum = state.sum[i];
      if (sum != 0) k.multiply(state.acc + i * stride, shape.value_dim, 1 / sum);  // else the row saw nothing: zeros
      k.from_float(state.acc + i * stride, shape.value_dim, s.out.dtype, static_cast<std::byte*>(s.out.at(r, q_head)));
      if (s.lse != nullptr)
        s.lse[r * shape.q_heads + q_head] = sum == 0 ? minus_infinity : (state.max[i] + std::log2(sum)) * ln_2;
    }
    if (kind == MassKind::none) continue;
    Scratch& scratch = Scratch::fresh();
    float* largest = kind == MassKind::max ? scratch.floats(list.slots()) : nullptr;
    if (largest != nullptr) std::fill_n(largest, list.slots(), 0.0f);
    for (Index m = 0; m < group; ++m) {
      const Index i = r * group + m;
      float* p = logits + i * list.slots();
      const float sum = state.sum[i];
      if (sum == 0) continue;  // it saw nothing
      if (sum != sum) {        // what it did not see stays as it is all the same
        for (Index slot = 0; slot < list.slots(); ++slot) p[slot] = p[slot] == minus_infinity ? 0.0f : sum;
      } else {
        k.exp2_shift_sum(p, list.slots(), state.max[i]);
      }
      const float factor = sum != sum ? 1.0f : 1 / sum;
      if (largest != nullptr)
        k.max_scaled(p, list.slots(), factor, largest);
      else
        k.add_scaled(p, list.slots(), kind == MassKind::mean ? factor / static_cast<float>(group) : factor, mass);
    }
    if (largest != nullptr) k.add_scaled(largest, list.slots(), 1.0f, mass);
  }
}

}  // namespace detail

/// See AttendSequence. Arguments are valid: the pipeline checks them.
inline void attend(const Team& team, const LayerShape& shape, std::span<const AttendSequence> batch, MassKind kind) {
  using namespace detail;
  const Kernels& k = *team.kernels;
  const Index heads = shape.kv_heads;
  std::vector<AttendTask> tasks;
  std::vector<Index> stretches(batch.size() * static_cast<std::size_t>(heads)), state_at(stretches.size() + 1, 0),
      logits_at(stretches.size() + 1, 0);
  for (std::size_t b = 0; b < batch.size(); ++b) {
    const AttendSequence& s = batch[b];
    const Index rows = s.queries.rows * shape.group();
    for (Index h = 0; h < heads; ++h) {
      const HeadPages& list = s.heads[static_cast<std::size_t>(h)];
      const Index entries = static_cast<Index>(list.entries.size());
      const Index step = std::max<Index>(1, stretch_tokens / list.page_tokens);
      const Index n = std::max<Index>(1, ceil_div(entries, step));
      for (Index i = 0; i < n; ++i)
        tasks.push_back({static_cast<Index>(b), h, i * step, std::min(entries, (i + 1) * step), i});
      const std::size_t at = b * static_cast<std::size_t>(heads) + static_cast<std::size_t>(h);
      stretches[at] = n;
      state_at[at + 1] = state_at[at] + n * round_up(SoftmaxState::floats(rows, shape.value_dim), 16);
      logits_at[at + 1] = logits_at[at] + (kind == MassKind::none ? 0 : rows * list.slots());
    }
  }
  // Of the calling thread, not of a worker: it must outlive the tasks.
  thread_local std::vector<float> states, all_logits;
  states.resize(std::max(states.size(), static_cast<std::size_t>(state_at.back())));
  if (kind != MassKind::none) all_logits.assign(static_cast<std::size_t>(logits_at.back()), minus_infinity);
  float* state_memory = states.data();
  float* logits_memory = all_logits.data();

  const auto state_of = [&](Index b, Index h, Index stretch) {
    const Index rows = batch[static_cast<std::size_t>(b)].queries.rows * shape.group();
    return SoftmaxState(state_memory + state_at[static_cast<std::size_t>(b * heads + h)] +
                            stretch * round_up(SoftmaxState::floats(rows, shape.value_dim), 16),
                        rows, shape.value_dim);
  };
  const auto logits_of = [&](Index b, Index h) -> float* {
    return kind == MassKind::none ? nullptr : logits_memory + logits_at[static_cast<std::size_t>(b * heads + h)];
  };
  const auto finish_head = [&](Index b, Index h) {
    const AttendSequence& s = batch[static_cast<std::size_t>(b)];
    SoftmaxState state = state_of(b, h, 0);
    for (Index i = 1; i < stretches[static_cast<std::size_t>(b * heads + h)]; ++i)
      merge(k, state, state_of(b, h, i), s.queries.rows * shape.group(), shape.value_dim);
    finish(k, shape, s, h, state, logits_of(b, h), kind);
  };

  team.run(static_cast<Index>(tasks.size()), [&](Index t) {
    const AttendTask& task = tasks[static_cast<std::size_t>(t)];
    attend_stretch(k, shape, batch[static_cast<std::size_t>(task.sequence)], task,
                   state_of(task.sequence, task.head, task.stretch), logits_of(task.sequence, task.head));
    if (stretches[static_cast<std::size_t>(task.sequence * heads + task.head)] == 1)
      finish_head(task.sequence, task.head);
  });
  for (std::size_t at = 0; at < stretches.size(); ++at)
    if (stretches[at] > 1) finish_head(static_cast<Index>(at) / heads, static_cast<Index>(at) % heads);
}

}  // namespace kvpare::cpu

// The verbs over rows of scores on the device: `select_top`, `sort_rows`, `reduce`. One launch each, a block per row.
//
// Warps walk over a row in steps: as many whole words of its bitmap, 32 at most, as fit in 64 columns; two columns per
// lane. The scores of a step are two coalesced loads of 4 bytes a lane, so rows may begin at any float, and what a step
// finds out is a word of 64 bits by ballot, in the order that bitmaps have.
//
// select_top  The k-th largest key is found digit by digit from the top: 11 bits, 11, 10.
//   1  scores and bitmap are read, keys made, kept in shared memory and counted by their first digit
//   2  keys whose first digit is that of the k-th are counted by their second,
//   3  and by their third
//   4  bitmaps are written: keys above the k-th, and of those equal to it the lowest columns
//   Once the keys that share all digits so far are exactly those still wanted, the rest of 2 and 3 is left out. Where
//   some of the equals are left out, 4 is preceded by a count of them per warp, and a warp has a range of its own.
//   Global memory sees 4 1/8 bytes per column read and 1/8 written. Lane instructions per column: 21 in 1 (14 without a
//   bitmap; the key takes 8), 5 in 2 and 3 and 5 more where a column counts, 9 in 4; shared memory is accessed 1 1/2
//   times in 1, 1/2 in the others. 32k columns are some 46k warp instructions, 12k cycles of a multiprocessor that
//   starts four a cycle; searching the counts adds three times some 500. Keys beyond what shared memory holds (some 56k
//   columns of an H200) are made in every pass.
//
// sort_rows   Keys that grow as scores fall, with their columns, in scratch memory; four stable passes of 8 bits from
//   the bottom. A block moves a row tile by tile: a lane's place among equal digits is its rank in the warp (8
//   ballots), plus what lower warps have (counts per warp and digit), plus what earlier tiles had. Counts of all four
//   digits are taken while candidates are gathered.
//
// reduce      Two walks: sums and extremes, then moments about the mean. A thread adds up its columns in order, lanes
//   and then warps are joined by halves.
#pragma once

#include <algorithm>
#include <vector>

#include "collectives.cuh"
#include "tuning.cuh"
#include "workspace.cuh"

namespace kvpare::cuda {

namespace detail {

/// Grows in the order we rank by: what is no candidate, NaN, -inf (0x007fffff) … +inf (0xff800000); -0 = +0. Integers
/// only: no way of compiling floats changes it. NaN have the second count of the first digit for themselves, and what
/// is no candidate the first, so that both can be counted with the others.
inline constexpr int first_shift = 32 - select_tuning.digit_bits;
inline constexpr std::uint32_t no_key = 0, nan_key = 1u << first_shift, above_all_keys = 0xffffffffu;
static_assert(0x007fffffu >> first_shift > nan_key >> first_shift);
KVPARE_DEVICE std::uint32_t rank_key(float x) {
  std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  bits = bits == 0x80000000u ? 0 : bits;
  bits ^= static_cast<std::uint32_t>(static_cast<std::int32_t>(bits) >> 31) | 0x80000000u;
  return is_nan ? nan_key : bits;
}

/// Arguments of the blocks. Few of them travel with the launch, more by a copy before it.
template <class Row>
struct RowArguments {
  static constexpr Index most_here = 3584 / sizeof(Row);
  Row here[most_here];
  const Row* sent = nullptr;

  KVPARE_DEVICE Row operator[](Index i) const { return sent != nullptr ? sent[i] : here[i]; }
};

template <class Work, class Row>
RowArguments<Row> row_arguments(Work& work, std::span<const Row> rows) {
  RowArguments<Row> arguments;
  if (static_cast<Index>(rows.size()) <= arguments.most_here)
    std::copy(rows.begin(), rows.end(), arguments.here);
  else
    arguments.sent = work.put(rows);
  return arguments;
}

/// Two columns of a row.
struct ColumnPair {
  float x[2] = {0, 0};
  bool in[2] = {false, false};  // candidates
};

/// How the lanes of a warp walk over a row.
class RowWalk {
 public:
  template <class Block>
  KVPARE_DEVICE RowWalk(const Block& b, const float* values, const std::uint64_t* mask, Index columns,
                        Index word_tokens)
      : values_(values), mask_(mask), columns_(static_cast<int>(columns)), width_(static_cast<int>(word_tokens)),
        words_(static_cast<int>(ceil_div(columns, word_tokens))), words_per_step_(std::min(32, 64 / width_)),
        per_step_(words_per_step_ * width_), full_steps_(per_step_ == 64 ? columns_ / 64 : 0), lane_(b.lane()) {
    for (int h = 0; h < 2; ++h) word_[h] = (lane_ + 32 * h) / width_, bit_[h] = (lane_ + 32 * h) % width_;
  }

  KVPARE_DEVICE int steps() const { return (columns_ + per_step_ - 1) / per_step_; }
  KVPARE_DEVICE int column(int step, int half) const { return step * per_step_ + lane_ + 32 * half; }

  /// f(step, pair) for every stride-th step of [first, last), all lanes of a warp together; loads of `batch` steps are
  /// under way at a time.
  template <int batch, int stride, class Block, class F>
  KVPARE_DEVICE void for_steps(const Block& b, int first, int last, F&& f) const {
    if (mask_ != nullptr)
      for_steps_of<batch, stride, true>(b, first, last, f);
    else
      for_steps_of<batch, stride, false>(b, first, last, f);
  }

  /// Writes the words of a step. Bit c of `chosen`: its c-th column.
  KVPARE_DEVICE void write(std::uint64_t chosen, std::uint64_t* bitmap, int step) const {
    const int word = step * words_per_step_ + lane_;
    if (lane_ < words_per_step_ && word < words_) bitmap[word] = chosen >> lane_ * width_ & low_bits(width_);
  }

 private:
  template <int batch, int stride, bool masked, class Block, class F>
  KVPARE_DEVICE void for_steps_of(const Block& b, int first, int last, F&& f) const {
    const int full = std::min(last, full_steps_);
    for (; first + (batch - 1) * stride < full; first += batch * stride) {
      ColumnPair pairs[batch];
      for (int i = 0; i < batch; ++i) pairs[i] = read<masked, true>(b, first + i * stride);
      for (int i = 0; i < batch; ++i) f(first + i * stride, pairs[i]);
    }
    KVPARE_DEVICE_ROLL
    for (; first < last; first += stride) f(first, read<masked, false>(b, first));
  }

  /// `full`: the step has 64 columns, all within the row.
  template <bool masked, bool full, class Block>
  KVPARE_DEVICE ColumnPair read(const Block& b, int step) const {
    ColumnPair pair;
    for (int h = 0; h < 2; ++h) {
      if (!full && !(lane_ + 32 * h < per_step_ && column(step, h) < columns_)) continue;
      pair.x[h] = b.load(values_ + (full ? step * 64 + lane_ + 32 * h : column(step, h)));
      pair.in[h] = !masked || (b.load(mask_ + step * words_per_step_ + word_[h]) >> bit_[h] & 1u) != 0;
    }
    return pair;
  }

  const float* values_;
  const std::uint64_t* mask_;
  int columns_, width_, words_, words_per_step_, per_step_, full_steps_, lane_;
  int word_[2], bit_[2];  // of the lane's two columns, in any step
};

inline Index steps_of(Index columns, Index word_tokens) {
  return ceil_div(columns, std::min<Index>(32, 64 / word_tokens) * word_tokens);
}

inline void require_columns(Index columns) {
  require(columns < Index{1} << 30, "row of ", columns, " columns, must be below 2^30");
}

struct alignas(8) KeyPair {
  std::uint32_t key[2] = {0, 0};
};

/// Keys of the first kept_steps steps are made once and stay in shared memory; `whole`: that is all of any row.
template <int thread_count, bool whole>
struct TopKernel {
  static constexpr int threads = thread_count;
  static constexpr int warps = threads / 32, batch = whole ? select_tuning.batch : select_tuning.part_batch;
  static constexpr int digit_bits = select_tuning.digit_bits, bins = 1 << digit_bits, bins_each = bins / threads;
  static_assert(bins % threads == 0);

  RowArguments<TopRow> rows;
  Index kept_steps = 0;

  static constexpr Index room_at = bins * 4, found_at = room_at + 32 * 4, keys_at = found_at + 64,
                         step_bytes = 32 * sizeof(KeyPair);
  Index shared_bytes() const { return keys_at + kept_steps * step_bytes; }

  /// A digit, how many keys have it, and how many of those are wanted.
  struct Found {
    std::uint32_t digit, count, wanted;
  };

  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const TopRow row = rows[b.block()];
    const RowWalk walk(b, row.scores, row.candidates, row.columns, row.word_tokens);
    auto* counts = b.template shared<std::uint32_t>(0);
    const auto wanted = static_cast<std::uint32_t>(std::max<Index>(0, std::min(*row.k, row.columns)));

    for (int i = b.thread(); i < bins; i += threads) counts[i] = 0;
    b.sync();
    walk.for_steps<batch, warps>(b, b.warp(), walk.steps(), [&](int step, const ColumnPair& pair) {
      const KeyPair keys = keys_of(pair);
      if (whole || step < kept_steps) *kept_keys(b, step) = keys;
      for (const std::uint32_t key : keys.key) b.add(&counts[key >> first_shift], 1u);
    });
    b.sync();
    const std::uint32_t others = counts[no_key], nans = counts[nan_key >> first_shift];
    if (row.nan_count != nullptr && b.thread() == 0) *row.nan_count = nans;
    b.sync();

    // Keys from `least` up are chosen; where `limited`, only the `limit` lowest columns of those equal to it.
    std::uint32_t least = 0, limit = wanted;
    bool limited = false;
    Found found;
    const std::uint32_t candidates = find(b, counts, wanted, found) - others;
    if (wanted == 0) {
      least = above_all_keys;
    } else if (wanted >= candidates) {
      least = nan_key;
    } else {
      int shift = first_shift;
      least = found.digit << shift;
      while (found.count > found.wanted && shift > 0) {
        const int next = std::max(0, shift - digit_bits);
        const std::uint32_t range = 1u << shift;
        for_keys<warps>(b, walk, b.warp(), walk.steps(), [&](int, KeyPair keys) {
          const std::uint32_t above[2] = {keys.key[0] - least, keys.key[1] - least};
          if (std::min(above[0], above[1]) >= range) return;
          for (const std::uint32_t digits : above)
            if (digits < range) b.add(&counts[digits >> next], 1u);
        });
        b.sync();
        find(b, counts, found.wanted, found);
        least |= found.digit << next;
        shift = next;
      }
      limited = found.count > found.wanted, limit = found.wanted;
    }
    write(b, walk, row.chosen, least, limited, limit);
  }

 private:
  template <class Block>
  KVPARE_DEVICE KeyPair* kept_keys(Block& b, int step) const {
    return b.template shared<KeyPair>(keys_at) + step * 32 + b.lane();
  }
  static KVPARE_DEVICE KeyPair keys_of(const ColumnPair& pair) {
    KeyPair keys;
    for (int h = 0; h < 2; ++h) keys.key[h] = pair.in[h] ? rank_key(pair.x[h]) : no_key;
    return keys;
  }

  /// f(step, keys) for every stride-th step of [first, last), all lanes of a warp together.
  template <int stride, class Block, class F>
  KVPARE_DEVICE void for_keys(Block& b, const RowWalk& walk, int first, int last, F&& f) const {
    const int kept = whole ? last : std::min(last, static_cast<int>(kept_steps));
    for (; first + (batch - 1) * stride < kept; first += batch * stride) {
      KeyPair keys[batch];
      for (int i = 0; i < batch; ++i) keys[i] = *kept_keys(b, first + i * stride);
      for (int i = 0; i < batch; ++i) f(first + i * stride, keys[i]);
    }
    KVPARE_DEVICE_ROLL
    for (; first < kept; first += stride) f(first, *kept_keys(b, first));
    if constexpr (!whole)
      walk.for_steps<batch, stride>(b, first, last, [&](int step, const ColumnPair& pair) { f(step, keys_of(pair)); });
  }

  /// Goes down from the highest digit until `wanted` keys are counted, says where that is, and clears the counts.
  /// Returns how many were counted in all; with fewer than wanted, or none wanted, nothing is found.
  template <class Block>
  KVPARE_DEVICE std::uint32_t find(Block& b, std::uint32_t* counts, std::uint32_t wanted, Found& found) const {
    auto* shared_found = b.template shared<Found>(found_at);
    std::uint32_t* mine = counts + bins - (b.thread() + 1) * bins_each;
    std::uint32_t count[bins_each], sum = 0;
    for (int i = 0; i < bins_each; ++i) count[i] = mine[i];
    for (int i = 0; i < bins_each; ++i) sum += count[i], mine[i] = 0;
    const Scan<std::uint32_t> above = block_scan(b, sum, b.template shared<std::uint32_t>(room_at));
    if (std::uint32_t before = above.before; before < wanted && wanted <= before + sum) {
      for (int i = bins_each - 1; i >= 0; --i) {
        if (before < wanted && wanted <= before + count[i])
          *shared_found = {static_cast<std::uint32_t>(mine + i - counts), count[i], wanted - before};
        before += count[i];
      }
    }
    b.sync();
    found = *shared_found;
    return above.total;
  }

  template <class Block>
  KVPARE_DEVICE void write(Block& b, const RowWalk& walk, std::uint64_t* chosen, std::uint32_t least, bool limited,
                           std::uint32_t limit) const {
    const int steps = walk.steps(), each = (steps + warps - 1) / warps;
    const int first = b.warp() * each, last = std::min(steps, first + each);
    if (!limited) {
      for_keys<1>(b, walk, first, last, [&](int step, KeyPair keys) {
        walk.write(ballot(b, keys.key[0] >= least, keys.key[1] >= least), chosen, step);
      });
      return;
    }
    std::uint32_t equals = 0;
    for_keys<1>(b, walk, first, last, [&](int, KeyPair keys) {
      for (const std::uint32_t key : keys.key) equals += key == least;
    });
    const std::uint32_t before = block_scan(b, equals, b.template shared<std::uint32_t>(room_at)).before;
    std::uint32_t rank = b.shuffle(before, 0);  // among the equals, of the next one in the warp's range
    for_keys<1>(b, walk, first, last, [&](int step, KeyPair keys) {
      const std::uint64_t equal = ballot(b, keys.key[0] == least, keys.key[1] == least);
      bool take[2];
      for (int h = 0; h < 2; ++h) {
        const std::uint64_t lower = equal & low_bits(b.lane() + 32 * h);
        take[h] = keys.key[h] > least ||
                  (keys.key[h] == least && rank + static_cast<std::uint32_t>(count_bits(lower)) < limit);
      }
      walk.write(ballot(b, take[0], take[1]), chosen, step);
      rank += static_cast<std::uint32_t>(count_bits(equal));
    });
  }
};

/// Candidates on their way through the passes: keys that grow as values fall, and columns.
struct SortLists {
  std::uint32_t *keys = nullptr, *columns = nullptr;
};
struct SortJob {
  SortRow row;
  SortLists lists, room;
};

struct SortKernel {
  static constexpr int threads = sort_tuning.threads, items = sort_tuning.items, warps = threads / 32, batch = 2;
  static constexpr int bins = 256, passes = 4, tile = threads * items;
  static_assert(threads >= bins);

  RowArguments<SortJob> jobs;

  // Counts per digit of the four passes; where each digit goes next, per warp; rooms of the collectives.
  static constexpr Index counts_at = 0, starts_at = passes * bins * 4, room_at = starts_at + warps * bins * 4,
                         sums_at = room_at + 32 * 4;
  Index shared_bytes() const { return sums_at + 32 * 8; }

  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const SortJob job = jobs[b.block()];
    auto* counts = b.template shared<std::uint32_t>(counts_at);
    for (int i = b.thread(); i < passes * bins; i += threads) counts[i] = 0;
    b.sync();
    const int n = gather_candidates(b, job, counts);
    b.sync();
    for (int pass = 0; pass < passes; pass += 2) {
      move(b, job.lists, job.room, n, 8 * pass, counts + pass * bins);
      b.sync();
      move(b, job.room, job.lists, n, 8 * pass + 8, counts + (pass + 1) * bins);
      b.sync();
    }
    write(b, job, n);
  }

 private:
  /// Lists the candidates by column, counts the digits of their keys, and returns how many there are.
  template <class Block>
  KVPARE_DEVICE int gather_candidates(Block& b, const SortJob& job, std::uint32_t* counts) const {
    const MaskedRow& row = job.row.row;
    const RowWalk walk(b, row.values, row.mask, row.columns, row.word_tokens);
    const int steps = walk.steps(), each = (steps + warps - 1) / warps;
    const int first = b.warp() * each, last = std::min(steps, first + each);
    int here = 0;
    walk.for_steps<batch, 1>(b, first, last, [&](int, const ColumnPair& pair) {
      here += static_cast<int>(pair.in[0]) + static_cast<int>(pair.in[1]);
    });
    const Scan<int> place = block_scan(b, here, b.template shared<int>(room_at));
    int at = b.shuffle(place.before, 0);
    walk.for_steps<batch, 1>(b, first, last, [&](int step, const ColumnPair& pair) {
      const std::uint64_t in = ballot(b, pair.in[0], pair.in[1]);
      for (int h = 0; h < 2; ++h) {
        if (!pair.in[h]) continue;
        const int to = at + count_bits(in & low_bits(b.lane() + 32 * h));
        const std::uint32_t key = ~rank_key(pair.x[h]);
        job.lists.keys[to] = key, job.lists.columns[to] = static_cast<std::uint32_t>(walk.column(step, h));
        for (int pass = 0; pass < passes; ++pass) b.add(&counts[pass * bins + (key >> 8 * pass & 255u)], 1u);
      }
      at += count_bits(in);
    });
    return place.total;
  }

  /// One stable pass: by the digit at `shift`, equal digits in the order they have.
  template <class Block>
  KVPARE_DEVICE void move(Block& b, SortLists from, SortLists to, int n, int shift, const std::uint32_t* counts) const {
    auto* starts = b.template shared<std::uint32_t>(starts_at);
    auto* warp_starts = starts + b.warp() * bins;
    const bool has_digit = b.thread() < bins;
    // Where the thread's digit goes next.
    std::uint32_t next =
        block_scan(b, has_digit ? counts[b.thread()] : 0u, b.template shared<std::uint32_t>(room_at)).before;
    for (int start = 0; start < n; start += tile) {
      const int first = start + b.warp() * 32 * items + b.lane();
      std::uint32_t key[items], column[items], rank[items];
      for (int i = 0; i < items; ++i) {
        key[i] = column[i] = rank[i] = 0;
        if (first + 32 * i < n) key[i] = from.keys[first + 32 * i], column[i] = from.columns[first + 32 * i];
      }
      for (int d = b.lane(); d < bins; d += 32) warp_starts[d] = 0;
      b.sync_warp();
      for (int i = 0; i < items; ++i) {
        if (first - b.lane() + 32 * i >= n) break;
        const bool in = first + 32 * i < n;
        const std::uint32_t digit = key[i] >> shift & 255u;
        std::uint32_t peers = b.ballot(in);
        for (int bit = 0; bit < 8; ++bit) {
          const bool set = (digit >> bit & 1u) != 0;
          const std::uint32_t with = b.ballot(set);
          peers &= set ? with : ~with;
        }
        const std::uint32_t lower = peers & ((1u << b.lane()) - 1), before = warp_starts[digit];
        rank[i] = before + static_cast<std::uint32_t>(count_bits(lower));
        b.sync_warp();
        if (in && lower == 0) warp_starts[digit] = before + static_cast<std::uint32_t>(count_bits(peers));
        b.sync_warp();
      }
      b.sync();
      if (has_digit)
        for (int w = 0; w < warps; ++w) {
          const std::uint32_t count = starts[w * bins + b.thread()];
          starts[w * bins + b.thread()] = next;
          next += count;
        }
      b.sync();
      for (int i = 0; i < items; ++i) {
        if (first + 32 * i >= n) break;
        const std::uint32_t at = warp_starts[key[i] >> shift & 255u] + rank[i];
        to.keys[at] = key[i], to.columns[at] = column[i];
      }
      b.sync_warp();
    }
  }

  template <class Block>
  KVPARE_DEVICE void write(Block& b, const SortJob& job, int n) const {
    const SortRow& row = job.row;
    if (row.count != nullptr && b.thread() == 0) *row.count = n;
    double sum = 0;
    for (int start = 0; start < n; start += threads) {
      const int i = start + b.thread();
      double x = 0;
      if (i < n) {
        const std::uint32_t column = job.lists.columns[i];
        row.columns[i] = column;
        const float value = row.row.values[column];
        if (row.values != nullptr) row.values[i] = value;
        if (value == value) x = static_cast<double>(value);
      }
      if (row.running_sum == nullptr) continue;
      const Scan<double> sums = block_scan(b, x, b.template shared<double>(sums_at));
      if (i < n) row.running_sum[i] = sum + (sums.before + x);
      sum += sums.total;
      b.sync();
    }
  }
};

struct ReduceKernel {
  static constexpr int threads = reduce_tuning.threads;
  RowArguments<MaskedRow> rows;
  RowSummary* out = nullptr;

  static constexpr Index rooms = 7;
  Index shared_bytes() const { return rooms * 32 * 8; }

  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const MaskedRow row = rows[b.block()];
    const RowWalk walk(b, row.values, row.mask, row.columns, row.word_tokens);
    RowSummary s;
    std::uint64_t best = 0;  // key of the largest, then the complement of its column
    for_numbers(b, walk, [&](float x, int column) {
      if (x != x) {
        ++s.nan_count;
        return;
      }
      ++s.count;
      s.sum += static_cast<double>(x);
      s.min = std::min(s.min, x);
      best = std::max(best, std::uint64_t{rank_key(x)} << 32 | ~static_cast<std::uint32_t>(column));
    });
    s.nan_count = block_sum(b, s.nan_count, room<Index>(b, 0));
    s.count = block_sum(b, s.count, room<Index>(b, 1));
    s.sum = block_sum(b, s.sum, room<double>(b, 2));
    s.min = block_fold(b, s.min, RowSummary{}.min, Least{}, room<float>(b, 3));
    best = block_fold(b, best, std::uint64_t{0}, Greatest{}, room<std::uint64_t>(b, 4));
    if (s.count > 0) {
      s.argmax = static_cast<Index>(~static_cast<std::uint32_t>(best));
      s.max = row.values[s.argmax];
      s.mean = s.sum / static_cast<double>(s.count);
      for_numbers(b, walk, [&](float x, int) {
        const double d = static_cast<double>(x) - s.mean;
        if (d != d) return;
        s.moment2 += d * d;
        s.moment3 += d * d * d;
      });
      s.moment2 = block_sum(b, s.moment2, room<double>(b, 5));
      s.moment3 = block_sum(b, s.moment3, room<double>(b, 6));
    }
    if (b.thread() == 0) out[b.block()] = s;
  }

 private:
  template <class T, class Block>
  static KVPARE_DEVICE T* room(Block& b, Index i) {
    return b.template shared<T>(i * 32 * 8);
  }

  template <class Block, class F>
  KVPARE_DEVICE void for_numbers(Block& b, const RowWalk& walk, F&& f) const {
    walk.for_steps<reduce_tuning.batch, threads / 32>(b, b.warp(), walk.steps(), [&](int step, const ColumnPair& pair) {
      for (int h = 0; h < 2; ++h)
        if (pair.in[h]) f(pair.x[h], walk.column(step, h));
    });
  }
};

}  // namespace detail

template <class Work>
void reduce(Work& work, std::span<const MaskedRow> rows, RowSummary* out) {
  for (const MaskedRow& row : rows) detail::require_columns(row.columns);
  work.launch(static_cast<Index>(rows.size()), detail::ReduceKernel{detail::row_arguments(work, rows), out});
}

template <class Work>
void sort_rows(Work& work, std::span<const SortRow> rows) {
  Index columns = 0;
  for (const SortRow& row : rows) detail::require_columns(row.row.columns), columns += row.row.columns;
  auto* scratch = work.template scratch<std::uint32_t>(4 * columns);
  std::vector<detail::SortJob> jobs;
  for (const SortRow& row : rows) {
    const Index n = row.row.columns;
    jobs.push_back({row, {scratch, scratch + n}, {scratch + 2 * n, scratch + 3 * n}});
    scratch += 4 * n;
  }
  work.launch(static_cast<Index>(rows.size()),
              detail::SortKernel{detail::row_arguments(work, std::span<const detail::SortJob>(jobs))});
}

template <class Work>
void select_top(Work& work, std::span<const TopRow> rows) {
  constexpr SelectTuning tuning = select_tuning;
  Index columns = 0, steps = 0;
  for (const TopRow& row : rows) {
    detail::require_columns(row.columns);
    columns = std::max(columns, row.columns);
    steps = std::max(steps, detail::steps_of(row.columns, row.word_tokens));
  }
  const auto blocks = static_cast<Index>(rows.size());
  using Few = detail::TopKernel<tuning.few_threads, true>;
  using Many = detail::TopKernel<tuning.threads, true>;
  using Part = detail::TopKernel<tuning.threads, false>;
  const Index room = (work.runtime().shared_limit() - Part::keys_at) / Part::step_bytes;
  const auto arguments = detail::row_arguments(work, rows);
  if (steps > room)
    work.launch(blocks, Part{arguments, room});
  else if (columns > tuning.few_columns)
    work.launch(blocks, Many{arguments, steps});
  else
    work.launch(blocks, Few{arguments, steps});
}

}  // namespace kvpare::cuda

// Kernels over rows as they are: element types converted, rows moved, bytes copied. What they move is all they must
// move, each byte read and written once:
//
//   ConvertKernel   rows * width * (element read + element written)
//   MoveKernel      2 * rows * bytes of a row part, and 16 bytes per run of rows that moves
//   CopyKernel      2 * bytes
#pragma once

#include "codecs.cuh"
#include "elements.cuh"

namespace kvpare::cuda {

namespace detail {

KVPARE_HD inline bool aligned(const void* p, Index to) {
  return reinterpret_cast<std::uintptr_t>(p) % static_cast<std::uintptr_t>(to) == 0;
}

/// The set bits of a word as a list in shared memory, ascending: their number. All threads of a block of at least 64; a
/// barrier at the end.
template <class Block>
KVPARE_DEVICE int list_slots(Block& b, std::uint64_t word, std::uint8_t* list) {
  if (b.thread() < 64 && (word >> b.thread() & 1) != 0)
    list[count_bits(word & low_bits(b.thread()))] = static_cast<std::uint8_t>(b.thread());
  b.sync();
  return count_bits(word);
}

/// Four numbers: 16 or 8 bytes, aligned to as many.
struct alignas(16) Four {
  float x[4];
};
template <class Block>
KVPARE_DEVICE Four four_at(Block& b, const std::byte* p, DType type) {
  if (type == DType::f32) return std::bit_cast<Four>(b.load(reinterpret_cast<const Words*>(p)));
  const std::uint64_t bits = b.load(reinterpret_cast<const std::uint64_t*>(p));
  Four four;
  for (int i = 0; i < 4; ++i) {
    const auto one = static_cast<std::uint16_t>(bits >> 16 * i);
    four.x[i] = type == DType::f16 ? kvpare::detail::half_to_float(one) : kvpare::detail::bfloat16_to_float(one);
  }
  return four;
}
KVPARE_DEVICE void put_four(std::byte* p, const Four& four, DType type) {
  if (type == DType::f32) {
    *reinterpret_cast<Four*>(p) = four;
    return;
  }
  std::uint64_t bits = 0;
  for (int i = 0; i < 4; ++i) bits |= std::uint64_t{short_number(four.x[i], type)} << 16 * i;
  *reinterpret_cast<std::uint64_t*>(p) = bits;
}

/// Calls `f(row, channel, x)` for `rows` rows of numbers, in parallel and in no order.
template <class Block, class F>
KVPARE_DEVICE void for_each_number(Block& b, const std::byte* from, Index row_bytes, DType type, int rows, int width,
                                   const F& f) {
  const int size = static_cast<int>(size_of(type));
  if (width % 4 == 0 && aligned(from, 4 * size) && row_bytes % (4 * size) == 0) {
    const int items = width / 4;
    for (int i = b.thread(); i < rows * items; i += b.threads()) {
      const int row = i / items, c = i % items * 4;
      const Four four = four_at(b, from + row * row_bytes + c * size, type);
      for (int k = 0; k < 4; ++k) f(row, c + k, four.x[k]);
    }
  } else {
    for (int i = b.thread(); i < rows * width; i += b.threads()) {
      const int row = i / width, c = i % width;
      f(row, c, number_at(b, from + row * row_bytes + c * size, type));
    }
  }
}

}  // namespace detail

/// Rows of up to 64 slots: the n-th set one goes to `to` + n * to_row_bytes, as numbers of `to_type`.
struct ConvertJob {
  const std::byte* from = nullptr;
  std::byte* to = nullptr;
  Index from_row_bytes = 0, to_row_bytes = 0;
  std::uint64_t slots = 0;
  Index width = 0;
  DType from_type = DType::f32, to_type = DType::f32;
};

/// A block per job.
struct ConvertKernel {
  static constexpr int threads = 256;
  const ConvertJob* jobs;

  Index shared_bytes() const { return 64; }
  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const ConvertJob job = jobs[b.block()];
    auto* slots = b.template shared<std::uint8_t>(0);
    const int rows = detail::list_slots(b, job.slots, slots), width = static_cast<int>(job.width);
    if (job.from_type == job.to_type) {
      const int bytes = width * static_cast<int>(size_of(job.to_type));
      const bool whole = bytes % 16 == 0 && detail::aligned(job.from, 16) && detail::aligned(job.to, 16) &&
                         job.from_row_bytes % 16 == 0 && job.to_row_bytes % 16 == 0;
      if (whole)
        copy<Words>(b, job, slots, rows, bytes);
      else if (job.to_type == DType::f32)
        copy<std::uint32_t>(b, job, slots, rows, bytes);
      else
        copy<std::uint16_t>(b, job, slots, rows, bytes);
      return;
    }
    const int from_size = static_cast<int>(size_of(job.from_type)), to_size = static_cast<int>(size_of(job.to_type));
    if (width % 4 == 0 && detail::aligned(job.from, 4 * from_size) && detail::aligned(job.to, 4 * to_size) &&
        job.from_row_bytes % (4 * from_size) == 0 && job.to_row_bytes % (4 * to_size) == 0) {
      const int items = width / 4;
      for (int i = b.thread(); i < rows * items; i += threads) {
        const int row = i / items, c = i % items * 4;
        detail::put_four(job.to + row * job.to_row_bytes + c * to_size,
                         detail::four_at(b, job.from + slots[row] * job.from_row_bytes + c * from_size, job.from_type),
                         job.to_type);
      }
    } else {
      for (int i = b.thread(); i < rows * width; i += threads) {
        const int row = i / width, c = i % width;
        detail::put_number(
            job.to + row * job.to_row_bytes + c * to_size,
            detail::number_at(b, job.from + slots[row] * job.from_row_bytes + c * from_size, job.from_type),
            job.to_type);
      }
    }
  }

 private:
  template <class Unit, class Block>
  static KVPARE_DEVICE void copy(Block& b, const ConvertJob& job, const std::uint8_t* slots, int rows, int bytes) {
    constexpr int size = static_cast<int>(sizeof(Unit));
    const int units = bytes / size;
    for (int i = b.thread(); i < rows * units; i += threads) {
      const int row = i / units, at = i % units * size;
      *reinterpret_cast<Unit*>(job.to + row * job.to_row_bytes + at) =
          b.load(reinterpret_cast<const Unit*>(job.from + slots[row] * job.from_row_bytes + at));
    }
  }
};

/// Bytes as they are, between addresses of any alignment.
struct CopyJob {
  const std::byte* from = nullptr;
  std::byte* to = nullptr;
  Index bytes = 0;
};

/// Blocks [job][part]: 16 KiB of a job each.
struct CopyKernel {
  static constexpr int threads = 256;
  static constexpr Index part_bytes = 16 << 10;
  const CopyJob* jobs;
  Index parts;

  Index shared_bytes() const { return 0; }
  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const CopyJob job = jobs[b.block() / parts];
    const Index begin = b.block() % parts * part_bytes;
    const Index end = begin + part_bytes < job.bytes ? begin + part_bytes : job.bytes;
    Index done = begin;
    if (detail::aligned(job.from, 16) && detail::aligned(job.to, 16)) {
      const Index whole = begin < end ? begin + (end - begin) / 16 * 16 : begin;
      for (Index at = begin + b.thread() * 16; at < whole; at += threads * 16)
        *reinterpret_cast<Words*>(job.to + at) = b.load(reinterpret_cast<const Words*>(job.from + at));
      done = whole;
    }
    for (Index at = done + b.thread(); at < end; at += threads) job.to[at] = job.from[at];
  }
};

/// `count` rows from one page to another. A sequence's moves are carried out in order: none writes what a later one
/// reads.
struct RowMove {
  PageId from = 0, to = 0;
  std::uint32_t row = 0;  // rows of the sequence before it
  std::uint8_t from_slot = 0, to_slot = 0, count = 0, unused = 0;
};

/// One part of the rows of a sequence of moves.
struct MoveSequence {
  const std::byte* from = nullptr;  // page 0, with the part's offset
  std::byte* to = nullptr;
  Index from_page_bytes = 0, to_page_bytes = 0;
  Index from_stride = 0, to_stride = 0;  // from slot to slot
  Index bytes = 0;
  const RowMove* moves = nullptr;  // [backend]
  int move_count = 0, rows = 0;
};

/// Blocks [sequence][columns]: 64 bytes of all rows of a sequence each, since no column of a row knows of another. A
/// block takes rows by the batch: all are read before any is written. Later batches read nothing that earlier ones have
/// written, so a batch needs no barrier behind it.
template <class Unit, bool paired>
struct MoveKernel {
  static_assert(!paired || sizeof(Unit) == 2);
  static constexpr int threads = 256, held = 4, most_rows = 256;  // units that a thread holds; rows of a batch
  static constexpr int columns = 64 / static_cast<int>(sizeof(Unit));
  const MoveSequence* sequences;
  Index parts;

  Index shared_bytes() const { return 2 * most_rows * 8; }
  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const MoveSequence s = sequences[b.block() / parts];
    const int part = static_cast<int>(b.block() % parts),
              units = static_cast<int>(s.bytes / static_cast<Index>(sizeof(Unit)));
    const int first = part * columns, mine = units - first < columns ? units - first : columns;
    if (mine <= 0) return;
    const int batch = threads * held / mine < most_rows ? threads * held / mine : most_rows;
    auto* from = b.template shared<Index>(0);
    auto* to = b.template shared<Index>(most_rows * 8);
    for (int begin = 0; begin < s.rows; begin += batch) {
      const int rows = s.rows - begin < batch ? s.rows - begin : batch;
      if (b.thread() < rows) locate(s, begin + b.thread(), from[b.thread()], to[b.thread()]);
      b.sync();
      Unit unit[held] = {};
      Unit* target[held];
      for (int k = 0; k < held; ++k) {
        const int item = b.thread() + k * threads, row = item / mine, u = first + item % mine;
        target[k] = nullptr;
        if (row >= rows) continue;
        const Index at = u * static_cast<Index>(paired ? 4 : sizeof(Unit));
        unit[k] = b.load(reinterpret_cast<const Unit*>(s.from + from[row] + at));
        target[k] = reinterpret_cast<Unit*>(s.to + to[row] + at);
      }
      b.sync();
      for (int k = 0; k < held; ++k)
        if (target[k] != nullptr) *target[k] = unit[k];
    }
  }

 private:
  static KVPARE_DEVICE Index row_at(Index slot, Index stride) {
    return paired ? slot / 2 * 2 * stride + slot % 2 * 2 : slot * stride;
  }
  /// Offsets of a row of the sequence. A stretch that moves up within its page goes last row first.
  static KVPARE_DEVICE void locate(const MoveSequence& s, int row, Index& from, Index& to) {
    int low = 0, high = s.move_count;  // the last move that begins at or before the row
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (static_cast<int>(s.moves[middle].row) <= row ? low : high) = middle;
    }
    const RowMove m = s.moves[low];
    const int n = row - static_cast<int>(m.row);
    const bool up = m.from == m.to && m.to_slot > m.from_slot;
    const int r = up ? m.count - 1 - n : n;
    from = static_cast<Index>(m.from) * s.from_page_bytes + row_at(m.from_slot + r, s.from_stride);
    to = static_cast<Index>(m.to) * s.to_page_bytes + row_at(m.to_slot + r, s.to_stride);
  }
};

namespace detail {

template <class Work>
void convert(Work& work, const std::vector<ConvertJob>& jobs) {
  if (!jobs.empty()) work.launch(std::ssize(jobs), ConvertKernel{work.put(jobs)});
}

template <class Work>
void copy(Work& work, const std::vector<CopyJob>& jobs) {
  Index most = 0;
  for (const CopyJob& job : jobs) most = std::max(most, job.bytes);
  if (most == 0) return;
  const Index parts = ceil_div(most, CopyKernel::part_bytes);
  work.launch(std::ssize(jobs) * parts, CopyKernel{work.put(jobs), parts});
}

/// Sequences of moves, by the unit in which their bytes can move.
template <class Work>
class Moves {
 public:
  explicit Moves(Work& work) : work_(&work) {}

  void add(const MoveSequence& s, bool paired) {
    if (s.rows == 0 || s.bytes == 0) return;
    if (paired) return pairs_.push_back(s);
    std::uint64_t all = reinterpret_cast<std::uintptr_t>(s.from) | reinterpret_cast<std::uintptr_t>(s.to);
    for (const Index n : {s.from_page_bytes, s.to_page_bytes, s.from_stride, s.to_stride, s.bytes})
      all |= static_cast<std::uint64_t>(n);
    (all % 16 == 0 ? by16_ : all % 4 == 0 ? by4_ : all % 2 == 0 ? by2_ : by1_).push_back(s);
  }
  void launch() {
    launch<Words, false>(by16_);
    launch<std::uint32_t, false>(by4_);
    launch<std::uint16_t, false>(by2_);
    launch<std::uint8_t, false>(by1_);
    launch<std::uint16_t, true>(pairs_);
  }

 private:
  template <class Unit, bool paired>
  void launch(const std::vector<MoveSequence>& sequences) {
    Index most = 0;
    for (const MoveSequence& s : sequences) most = std::max(most, s.bytes);
    if (most == 0) return;
    const Index parts = ceil_div(most, 64);
    work_->launch(std::ssize(sequences) * parts, MoveKernel<Unit, paired>{work_->put(sequences), parts});
  }

  Work* work_;
  std::vector<MoveSequence> by16_, by4_, by2_, by1_, pairs_;
};

}  // namespace detail

}  // namespace kvpare::cuda

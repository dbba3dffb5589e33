// Rows of keys and values on the device: `append`, `compact`, `encode`, `repack`, `gather`, `statistics`, raw or coded.
//
// Each verb sorts its work by the form of the pages it touches and launches once per form, whatever the number of heads
// and pages. Bytes that must be moved, each once; what a codec's kernels move is said in tiles.cuh:
//
//   append      rows read in their type + written in the form of their page; nothing in between but for folded and
//               canonical codecs, whose rows pass through scratch as floats
//   compact     2 * bytes of the rows that move, codes as they are
//   encode      rows read in their old form + written in the new one; what is coded before goes through scratch as
//               floats
//   gather      rows read + 4 bytes per number
//   statistics  rows read (coded ones decoded to scratch: 8 bytes per number more) + 16 bytes per entry and channel,
//               twice
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "tiles.cuh"

namespace kvpare::cuda {

/// One side of some slots of a page as floats, raw or coded.
struct ReadJob {
  const PageGeometry* geometry = nullptr;  // host
  Side side = Side::keys;
  PageId page = 0;
  const float* state = nullptr;  // of that side
  std::uint64_t slots = 0;
  float* out = nullptr;  // the n-th set slot goes to out + n * out_stride
  Index out_stride = 0;
};

namespace detail {

/// One side of a page, coded or not.
template <class Work>
struct SideOf {
  std::byte* base;
  Index row_bytes;
  DType type;
  const TileOps<Work>* ops;  // null: raw rows
  Index tile_bytes;

  SideOf(const PageGeometry& g, PageId page, Side side)
      : base(side == Side::keys ? g.key_row(page, 0) : g.value_row(page, 0)),
        row_bytes(side == Side::keys ? g.key_row_bytes : g.value_row_bytes),
        type(side == Side::keys ? g.key_type : g.value_type),
        ops(static_cast<const TileOps<Work>*>(side == Side::keys ? g.key_codec : g.value_codec)),
        tile_bytes(side == Side::keys ? g.key_tile_bytes : g.value_tile_bytes) {}
};

inline const float* state_of(const CodecState& state, Side side) {
  return side == Side::keys ? state.keys : state.values;
}

/// Jobs by codec and shape, in the order in which these came up.
template <class Work, class Job>
class ByForm {
 public:
  struct Group {
    const TileOps<Work>* ops;
    TileShape shape;
    std::vector<Job> jobs;
  };
  /// Its place among the jobs of its group.
  std::size_t add(const TileOps<Work>* ops, TileShape shape, const Job& job) {
    const std::size_t group = find(ops, shape);
    if (group == groups_.size()) groups_.push_back({ops, shape, {}});
    groups_[group].jobs.push_back(job);
    return groups_[group].jobs.size() - 1;
  }
  std::size_t find(const TileOps<Work>* ops, TileShape shape) const {
    std::size_t group = 0;
    while (group < groups_.size() && !(groups_[group].ops == ops && groups_[group].shape == shape)) ++group;
    return group;
  }
  const std::vector<Group>& groups() const { return groups_; }
  void clear() { groups_.clear(); }

 private:
  std::vector<Group> groups_;
};

/// Scratch for floats that is filled, read and filled again.
template <class Work>
class Lot {
 public:
  /// `floats` in all, of which the largest part takes `of_part`.
  Lot(Work& work, Index floats, Index of_part)
      : work_(&work), floats_(std::min(floats, std::max(work.lot_floats, of_part))) {}
  /// Room for so many; where it is full, `flush()` launches what reads it, and it starts anew.
  template <class F>
  float* room(Index floats, const F& flush) {
    if (memory_ == nullptr) memory_ = work_->template scratch<float>(floats_);
    if (used_ + floats > floats_) flush(), used_ = 0;
    used_ += floats;
    return memory_ + used_ - floats;
  }

 private:
  Work* work_;
  float* memory_ = nullptr;
  Index floats_, used_ = 0;
};

/// Rows on their way to floats, by form.
template <class Work>
class Reads {
 public:
  using Decodes = ByForm<Work, DecodeJob>;

  explicit Reads(Work& work) : work_(&work) {}
  void add(TileShape shape, const ReadJob& job) {
    const SideOf<Work> from(*job.geometry, job.page, job.side);
    if (from.ops != nullptr)
      decodes_.add(from.ops, shape, {from.base, job.state, job.slots, job.out, job.out_stride});
    else
      converts_.push_back({from.base, reinterpret_cast<std::byte*>(job.out), from.row_bytes, job.out_stride * 4,
                           job.slots, shape.width, from.type, DType::f32});
  }
  void launch() {
    convert(*work_, converts_);
    for (const auto& g : decodes_.groups()) g.ops->decode(*work_, g.shape, work_->put(g.jobs), std::ssize(g.jobs));
    converts_.clear(), decodes_.clear();
  }

 private:
  Work* work_;
  std::vector<ConvertJob> converts_;
  Decodes decodes_;
};

}  // namespace detail

/// Reads rows of any forms as floats: one launch per form among the jobs.
template <class Work>
void read_rows(Work& work, TileShape shape, std::span<const ReadJob> jobs) {
  detail::Reads<Work> reads(work);
  for (const ReadJob& job : jobs) reads.add(shape, job);
  reads.launch();
}

template <class Work>
void append(Work& work, const AppendArguments& a) {
  std::vector<ConvertJob> raw;
  detail::ByForm<Work, EncodeJob> coded;
  for (const Side side : {Side::keys, Side::values}) {
    const ConstTensor& from = side == Side::keys ? a.keys : a.values;
    const Index row_bytes = from.row_stride * size_of(from.dtype);
    for (const WriteRun& run : a.runs) {
      const detail::SideOf<Work> to(a.formats[run.format], run.page, side);
      const auto* rows = static_cast<const std::byte*>(from.at(run.row, run.head));
      if (to.ops != nullptr)
        coded.add(to.ops, {a.page_tokens, from.width},
                  {rows, row_bytes, from.dtype, nullptr, to.base, run.slot, run.count});
      else
        raw.push_back({rows, to.base + run.slot * to.row_bytes, row_bytes, to.row_bytes, low_bits(run.count),
                       from.width, from.dtype, to.type});
    }
  }
  detail::convert(work, raw);
  for (const auto& g : coded.groups()) g.ops->encode(work, g.shape, g.jobs);
}

namespace detail {

/// Which bytes of a page are a row, coded or not.
template <class Work>
RowParts parts_of(const SideOf<Work>& tile, TileShape shape) {
  if (tile.ops != nullptr) return tile.ops->row_parts(shape);
  return {RowPart{0, tile.row_bytes, shape.width * size_of(tile.type)}};
}

/// Moves of one list and format, as sequences: one for each part of its keys and its values.
template <class Work>
void add_sequences(Moves<Work>& moves, const PageGeometry& g, Side side, TileShape shape, const RowMove* list,
                   int count, int rows) {
  const SideOf<Work> page(g, 0, side);
  const Index page_bytes = side == Side::keys ? g.key_page_bytes : g.value_page_bytes;
  for (const RowPart& part : parts_of(page, shape))
    moves.add({page.base + part.at, page.base + part.at, page_bytes, page_bytes, part.stride, part.stride, part.bytes,
               list, count, rows},
              part.paired);
}

}  // namespace detail

template <class Work>
void compact(Work& work, std::span<const CompactList> lists) {
  struct Stretch {  // moves of one list and format
    const CompactList* list;
    std::uint16_t format;
    std::size_t begin, end;
    int rows;
  };
  std::vector<RowMove> all;
  std::vector<Stretch> stretches;
  for (const CompactList& list : lists) {
    std::uint64_t seen = 0;  // formats below 64; the others one by one
    for (std::size_t i = 0; i < list.moves.size(); ++i) {
      const std::uint16_t format = list.moves[i].format;
      const bool again = format < 64
                             ? (seen >> format & 1) != 0
                             : std::any_of(list.moves.begin(), list.moves.begin() + static_cast<std::ptrdiff_t>(i),
                                           [&](const Move& m) { return m.format == format; });
      if (again) continue;
      if (format < 64) seen |= std::uint64_t{1} << format;
      Stretch s{&list, format, all.size(), all.size(), 0};
      for (const Move& m : list.moves.subspan(i)) {
        if (m.format != format || m.count == 0) continue;
        all.push_back({m.from, m.to, static_cast<std::uint32_t>(s.rows), m.from_slot, m.to_slot, m.count, 0});
        s.rows += m.count;
      }
      s.end = all.size();
      if (s.rows > 0) stretches.push_back(s);
    }
  }
  if (all.empty()) return;
  const RowMove* there = work.put(all);
  detail::Moves<Work> moves(work);
  for (const Stretch& s : stretches)
    for (const Side side : {Side::keys, Side::values})
      detail::add_sequences(moves, s.list->formats[s.format], side,
                            {s.list->page_tokens, side == Side::keys ? s.list->key_dim : s.list->value_dim},
                            there + s.begin, static_cast<int>(s.end - s.begin), s.rows);
  moves.launch();
}

namespace detail {

/// What `encode` does, gathered into few launches. Rows that must be decoded first share one scratch memory: when it is
/// full, what has been gathered is launched.
template <class Work>
class Recoding {
 public:
  /// `floats` of all pages, the largest of which has `of_page`.
  Recoding(Work& work, Index floats, Index of_page)
      : work_(&work), reads_(work), lot_(work, floats, of_page) {}

  void add(const EncodeList& list, const EncodePage& page, Side side) {
    const auto pieces =
        list.pieces.subspan(static_cast<std::size_t>(page.first_piece), static_cast<std::size_t>(page.pieces));
    if (pieces.empty()) return;
    const Target to{list,
                    page,
                    side,
                    {list.page_tokens, side == Side::keys ? list.key_dim : list.value_dim},
                    SideOf<Work>(list.formats[page.format], page.page, side)};
    if (to.ops() != nullptr && !to.ops()->rows_move)
      add_tile(to, pieces);
    else
      for (const EncodePiece& p : pieces) add_piece(to, p);
  }

  void launch() {
    launch_coding();
    copy(*work_, copies_);
    const RowMove* there = work_->put(moves_);
    Moves<Work> moves(*work_);
    for (Carried& c : carried_) {
      c.sequence.moves = there + c.move;
      moves.add(c.sequence, c.paired);
    }
    moves.launch();
  }

 private:
  /// A side of a page that is written.
  struct Target {
    const EncodeList& list;
    const EncodePage& page;
    Side side;
    TileShape shape;
    SideOf<Work> tile;

    const TileOps<Work>* ops() const { return tile.ops; }
    const PageGeometry& geometry(const EncodePiece& p) const { return list.formats[p.format]; }
    SideOf<Work> from(const EncodePiece& p) const { return {geometry(p), p.page, side}; }
    const float* state(std::uint32_t index) const {
      return index == 0 ? nullptr : state_of(list.states[index - 1], side);
    }
    bool same_form(const EncodePiece& p) const {
      const SideOf<Work> source = from(p);
      return source.ops == ops() && (ops() != nullptr ? state(p.state) == state(page.state)
                                                      : source.type == tile.type && source.row_bytes == tile.row_bytes);
    }
    EncodeJob job(const std::byte* rows, Index row_bytes, DType type, Index first, Index count) const {
      return {rows, row_bytes, type, state(page.state), tile.base, first, count};
    }
    EncodeJob job(const float* rows, Index first, Index count) const {
      return job(reinterpret_cast<const std::byte*>(rows), shape.width * 4, DType::f32, first, count);
    }
  };
  struct Carried {
    MoveSequence sequence;
    bool paired;
    std::size_t move;
  };

  void add_tile(const Target& to, std::span<const EncodePiece> pieces) {
    const EncodePiece &first = pieces.front(), &last = pieces.back();
    const SideOf<Work> from = to.from(first);
    const bool copied = std::all_of(pieces.begin(), pieces.end(), [&](const EncodePiece& p) {
      return to.same_form(p) && p.page == first.page && p.slot == p.to_slot;
    });
    if (copied) return copies_.push_back({from.base, to.tile.base, to.tile.tile_bytes});
    if (pieces.size() == 1 && from.ops == nullptr && first.to_slot == 0) {
      encodes_.add(to.ops(), to.shape,
                   to.job(from.base + first.slot * from.row_bytes, from.row_bytes, from.type, 0, first.count));
      return;
    }
    const Index count = last.to_slot + last.count;
    float* rows = room(count * to.shape.width);
    Index filled = 0;  // gaps get a neighbour's row: groups over tokens see nothing new
    for (const EncodePiece& p : pieces) {
      for (; filled < p.to_slot; ++filled) read(to, p, p.slot, 1, rows + filled * to.shape.width);
      read(to, p, p.slot, p.count, rows + filled * to.shape.width);
      filled += p.count;
    }
    encodes_.add(to.ops(), to.shape, to.job(rows, 0, count));
  }

  void add_piece(const Target& to, const EncodePiece& p) {
    const SideOf<Work> from = to.from(p);
    if (to.same_form(p)) return carry(to, p, from);
    const std::byte* rows = from.base + p.slot * from.row_bytes;
    Index row_bytes = from.row_bytes;
    DType type = from.type;
    if (from.ops != nullptr) {
      float* floats = room(p.count * to.shape.width);
      read(to, p, p.slot, p.count, floats);
      rows = reinterpret_cast<const std::byte*>(floats), row_bytes = to.shape.width * 4, type = DType::f32;
    }
    if (to.ops() != nullptr)
      encodes_.add(to.ops(), to.shape, to.job(rows, row_bytes, type, p.to_slot, p.count));
    else
      converts_.push_back({rows, to.tile.base + p.to_slot * to.tile.row_bytes, row_bytes, to.tile.row_bytes,
                           low_bits(p.count), to.shape.width, type, to.tile.type});
  }

  void carry(const Target& to, const EncodePiece& p, const SideOf<Work>& from) {
    const std::size_t move = moves_.size();
    moves_.push_back({0, 0, 0, p.slot, p.to_slot, p.count, 0});
    for (const RowPart& part : parts_of(to.tile, to.shape))
      carried_.push_back({{from.base + part.at, to.tile.base + part.at, 0, 0, part.stride, part.stride, part.bytes,
                           nullptr, 1, p.count},
                          part.paired,
                          move});
  }

  void read(const Target& to, const EncodePiece& p, Index slot, Index count, float* out) {
    reads_.add(to.shape,
               {&to.geometry(p), to.side, p.page, to.state(p.state), low_bits(count) << slot, out, to.shape.width});
  }

  float* room(Index floats) {
    return lot_.room(floats, [&] { launch_coding(); });
  }

  void launch_coding() {
    reads_.launch();
    convert(*work_, converts_);
    for (const auto& g : encodes_.groups()) g.ops->encode(*work_, g.shape, g.jobs);
    converts_.clear(), encodes_.clear();
  }

  Work* work_;
  Reads<Work> reads_;
  Lot<Work> lot_;
  std::vector<ConvertJob> converts_;
  ByForm<Work, EncodeJob> encodes_;
  std::vector<CopyJob> copies_;
  std::vector<RowMove> moves_;
  std::vector<Carried> carried_;
};

}  // namespace detail

template <class Work>
void encode(Work& work, std::span<const EncodeList> lists) {
  Index floats = 0, most = 0;
  for (const EncodeList& list : lists) {
    const Index of_page = list.page_tokens * (list.key_dim + list.value_dim);
    floats += std::ssize(list.pages) * of_page, most = std::max(most, of_page);
  }
  detail::Recoding<Work> recoding(work, floats, most);
  for (const EncodeList& list : lists)
    for (const EncodePage& page : list.pages)
      for (const Side side : {Side::keys, Side::values}) recoding.add(list, page, side);
  recoding.launch();
}

template <class Work>
void repack(Work& work, std::span<const RepackTile> tiles, RepackTo to) {
  std::vector<CopyJob> copies;
  detail::ByForm<Work, RepackJob> coded;
  for (const RepackTile& t : tiles) {
    const detail::SideOf<Work> tile(*t.geometry, t.page, t.side);
    if (tile.ops != nullptr)
      coded.add(tile.ops, {t.page_tokens, t.width}, {tile.base, t.canonical});
    else if (to == RepackTo::canonical)
      copies.push_back({tile.base, t.canonical, tile.tile_bytes});
    else
      copies.push_back({t.canonical, tile.base, tile.tile_bytes});
  }
  detail::copy(work, copies);
  for (const auto& g : coded.groups())
    (to == RepackTo::canonical ? g.ops->to_canonical : g.ops->from_canonical)(work, g.shape, g.jobs);
}

namespace detail {

/// An entry whose live tokens are in a mask or not, and the job that reads it: which slots, and where they go, is known
/// on the device only.
struct MaskedEntry {
  std::uint64_t live = 0;
  std::uint64_t* slots = nullptr;  // of its job
  void* out = nullptr;             // the job's pointer to its first row
};
struct MaskedList {
  const std::uint64_t* mask = nullptr;
  float* out = nullptr;
  Index width = 0;
  Index first = 0, entries = 0;
};

/// A block per list: rows of its entries go one after the other.
struct PlaceMasked {
  static constexpr int threads = 256;
  const MaskedList* lists;
  const MaskedEntry* entries;

  Index shared_bytes() const { return threads * 4; }
  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const MaskedList list = lists[b.block()];
    auto* counts = b.template shared<int>(0);
    Index before = 0;
    for (Index begin = 0; begin < list.entries; begin += threads) {
      const Index e = begin + b.thread();
      MaskedEntry entry;
      if (e < list.entries) {
        entry = entries[list.first + e];
        *entry.slots = entry.live &= list.mask[e];
      }
      counts[b.thread()] = count_bits(entry.live);
      b.sync();
      Index rows = before;
      for (int t = 0; t < threads; ++t) {
        if (t < b.thread()) rows += counts[t];
        before += counts[t];
      }
      if (e < list.entries) {
        float* out = list.out + rows * list.width;
        std::memcpy(entry.out, &out, sizeof out);  // a pointer to floats, or to the bytes of floats
      }
      b.sync();
    }
  }
};

}  // namespace detail

template <class Work>
void gather(Work& work, std::span<const GatherRow> rows) {
  std::vector<ConvertJob> raw;
  detail::ByForm<Work, DecodeJob> coded;
  struct Place {  // of an entry's job
    const TileOps<Work>* ops;
    TileShape shape;
    std::size_t job;
  };
  std::vector<Place> places;
  std::vector<detail::MaskedList> lists;
  std::vector<detail::MaskedEntry> entries;
  for (const GatherRow& g : rows) {
    const TileShape shape{g.pages.page_tokens, g.width};
    float* out = g.out;
    if (g.mask != nullptr) lists.push_back({g.mask, g.out, g.width, std::ssize(entries), std::ssize(g.pages.entries)});
    for (const Entry& e : g.pages.entries) {
      const detail::SideOf<Work> from(g.pages.formats[e.format], e.page, g.side);
      std::size_t job = 0;
      if (from.ops != nullptr) {
        job = coded.add(from.ops, shape,
                        {from.base, detail::state_of(g.pages.state_of(e), g.side), e.live, out, g.width});
      } else {
        job = raw.size();
        raw.push_back({from.base, reinterpret_cast<std::byte*>(out), from.row_bytes, g.width * 4, e.live, g.width,
                       from.type, DType::f32});
      }
      if (g.mask != nullptr) places.push_back({from.ops, shape, job}), entries.push_back({.live = e.live});
      out += count_bits(e.live) * g.width;
    }
  }

  // Jobs in device memory, where those of masked lists are finished.
  auto* raw_jobs = const_cast<ConvertJob*>(work.put(raw));
  std::vector<DecodeJob*> coded_jobs;
  for (const auto& g : coded.groups()) coded_jobs.push_back(const_cast<DecodeJob*>(work.put(g.jobs)));
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const Place& p = places[i];
    if (p.ops == nullptr) {
      entries[i].slots = &raw_jobs[p.job].slots, entries[i].out = &raw_jobs[p.job].to;
    } else {
      DecodeJob& job = coded_jobs[coded.find(p.ops, p.shape)][p.job];
      entries[i].slots = &job.slots, entries[i].out = &job.out;
    }
  }
  if (!lists.empty()) work.launch(std::ssize(lists), detail::PlaceMasked{work.put(lists), work.put(entries)});
  work.launch(std::ssize(raw), ConvertKernel{raw_jobs});
  for (std::size_t g = 0; g < coded_jobs.size(); ++g) {
    const auto& group = coded.groups()[g];
    group.ops->decode(work, group.shape, coded_jobs[g], std::ssize(group.jobs));
  }
}

namespace detail {

/// Rows of one entry: as they lie, or decoded.
struct StatisticsEntry {
  const std::byte* rows = nullptr;
  Index row_bytes = 0;
  DType type = DType::f32;
  bool decoded = false;  // the n-th row is that of the n-th live slot
  std::uint64_t live = 0;
  const std::uint64_t* mask = nullptr;  // the entry's word, or null
  Index width = 0, first_slot = 0, page_tokens = 0;
  float *min = nullptr, *max = nullptr, *sum = nullptr,
        *sum_squares = nullptr;  // of its list, per slot; or of the entry
};

/// NaN are left out of minima and maxima, as std::min(so far, x) has it, and not of sums.
struct Spread {
  float min = std::numeric_limits<float>::infinity(), max = -std::numeric_limits<float>::infinity(), sum = 0,
        sum_squares = 0;

  KVPARE_DEVICE void add(float x) {
    min = x < min ? x : min, max = x > max ? x : max;
    sum += x, sum_squares += kvpare::detail::product(x, x);
  }
  KVPARE_DEVICE void join(const Spread& s) {
    min = s.min < min ? s.min : min, max = s.max > max ? s.max : max;
    sum += s.sum, sum_squares += s.sum_squares;
  }
  KVPARE_DEVICE void put(float* to_min, float* to_max, float* to_sum, float* to_squares, Index at) const {
    if (to_min != nullptr) to_min[at] = min;
    if (to_max != nullptr) to_max[at] = max;
    if (to_sum != nullptr) to_sum[at] = sum;
    if (to_squares != nullptr) to_squares[at] = sum_squares;
  }
};

/// A block per entry. Per slot a warp per row; else a thread per channel, tokens in order.
struct StatisticsOfEntries {
  static constexpr int threads = 128;
  const StatisticsEntry* entries;
  bool per_slot;

  Index shared_bytes() const { return 64; }
  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const StatisticsEntry e = entries[b.block()];
    const std::uint64_t word = e.mask != nullptr ? e.live & *e.mask : e.live;
    const auto row = [&](int slot) {
      return e.rows + (e.decoded ? count_bits(e.live & low_bits(slot)) : slot) * e.row_bytes;
    };
    const Index size = size_of(e.type);
    if (per_slot) {
      for (int slot = b.warp(); slot < static_cast<int>(e.page_tokens); slot += threads / 32) {
        Spread s;
        if ((word >> slot & 1) != 0)
          for (Index c = b.lane(); c < e.width; c += 32) s.add(number_at(b, row(slot) + c * size, e.type));
        for (int mask = 16; mask > 0; mask /= 2)
          s.join({b.shuffle_xor(s.min, mask), b.shuffle_xor(s.max, mask), b.shuffle_xor(s.sum, mask),
                  b.shuffle_xor(s.sum_squares, mask)});
        if (b.lane() == 0) s.put(e.min, e.max, e.sum, e.sum_squares, e.first_slot + slot);
      }
      return;
    }
    auto* slots = b.template shared<std::uint8_t>(0);
    const int count = list_slots(b, word, slots);
    for (Index c = b.thread(); c < e.width; c += threads) {
      Spread s;
      for (int i = 0; i < count; ++i) s.add(number_at(b, row(slots[i]) + c * size, e.type));
      s.put(e.min, e.max, e.sum, e.sum_squares, c);
    }
  }
};

/// Blocks [list][part]: the spreads of a list's entries, joined in order; a thread per channel.
struct JoinStatistics {
  struct List {
    const float* spreads = nullptr;  // [entries][4][width]
    Index entries = 0, width = 0;
    float *min = nullptr, *max = nullptr, *sum = nullptr, *sum_squares = nullptr;
  };
  static constexpr int threads = 64;
  const List* lists;
  Index parts;

  Index shared_bytes() const { return 0; }
  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const List list = lists[b.block() / parts];
    const Index c = b.block() % parts * threads + b.thread();
    if (c >= list.width) return;
    Spread s;
    for (Index e = 0; e < list.entries; ++e) {
      const float* one = list.spreads + e * 4 * list.width + c;
      s.join({one[0], one[list.width], one[2 * list.width], one[3 * list.width]});
    }
    s.put(list.min, list.max, list.sum, list.sum_squares, c);
  }
};

/// Entries of lists, rows that are coded on their way to scratch. When that is full, what has been gathered is
/// launched.
template <class Work>
class Measuring {
 public:
  /// `floats` of all entries, the largest of which has `of_entry`.
  Measuring(Work& work, Index floats, Index of_entry)
      : work_(&work), reads_(work), lot_(work, floats, of_entry) {}

  void add(const StatisticsRow& s, std::size_t index, float* spread) {
    const Entry& entry = s.pages.entries[index];
    const Index rows = count_bits(entry.live), e = static_cast<Index>(index);
    const SideOf<Work> from(s.pages.formats[entry.format], entry.page, s.side);
    StatisticsEntry one{from.base,
                        from.row_bytes,
                        from.type,
                        false,
                        entry.live,
                        s.mask != nullptr ? s.mask + e : nullptr,
                        s.width,
                        e * s.pages.page_tokens,
                        s.pages.page_tokens};
    if (s.per_slot)
      one.min = s.min, one.max = s.max, one.sum = s.sum, one.sum_squares = s.sum_squares;
    else
      one.min = spread, one.max = spread + s.width, one.sum = spread + 2 * s.width,
      one.sum_squares = spread + 3 * s.width;
    if (from.ops != nullptr) {
      float* out = room(rows * s.width);
      reads_.add({s.pages.page_tokens, s.width}, {&s.pages.formats[entry.format], s.side, entry.page,
                                                  state_of(s.pages.state_of(entry), s.side), entry.live, out, s.width});
      one.rows = reinterpret_cast<const std::byte*>(out), one.row_bytes = s.width * 4, one.type = DType::f32;
      one.decoded = true;
    }
    entries_[s.per_slot].push_back(one);
  }
  void launch() {
    reads_.launch();
    for (const bool per_slot : {false, true}) {
      auto& some = entries_[per_slot];
      if (!some.empty()) work_->launch(std::ssize(some), StatisticsOfEntries{work_->put(some), per_slot});
      some.clear();
    }
  }

 private:
  float* room(Index floats) {
    return lot_.room(floats, [&] { launch(); });
  }

  Work* work_;
  Reads<Work> reads_;
  Lot<Work> lot_;
  std::vector<StatisticsEntry> entries_[2];  // [per_slot]
};

}  // namespace detail

template <class Work>
void statistics(Work& work, std::span<const StatisticsRow> rows) {
  Index floats = 0, most = 0;
  for (const StatisticsRow& s : rows)
    floats += s.pages.live_tokens() * s.width, most = std::max(most, s.pages.page_tokens * s.width);
  detail::Measuring<Work> measuring(work, floats, most);
  std::vector<detail::JoinStatistics::List> lists;
  Index widest = 0;
  for (const StatisticsRow& s : rows) {
    const Index entries = std::ssize(s.pages.entries);
    float* spreads = s.per_slot ? nullptr : work.template scratch<float>(entries * 4 * s.width);
    for (Index e = 0; e < entries; ++e)
      measuring.add(s, static_cast<std::size_t>(e), s.per_slot ? nullptr : spreads + e * 4 * s.width);
    if (s.per_slot) continue;
    lists.push_back({spreads, entries, s.width, s.min, s.max, s.sum, s.sum_squares});
    widest = std::max(widest, s.width);
  }
  measuring.launch();
  const Index parts = ceil_div(widest, detail::JoinStatistics::threads);
  if (!lists.empty()) work.launch(std::ssize(lists) * parts, detail::JoinStatistics{work.put(lists), parts});
}

}  // namespace kvpare::cuda

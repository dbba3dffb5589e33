// Attention probabilities of chosen rows, summed per key, on the device.
//
// Up to three passes over the keys (attention_mass_kernels.cuh), the first two followed by a join in a fixed order:
//
//   peaks    largest logit and sum of every row and query head; left out when lse is given and nothing asks for them
//   shares   row_near_peak and row_part_mass, where wanted
//   mass     `out` and `seen`
//
// Bytes         a key's row once per pass for all rows and query heads of a chunk (128 query vectors of 128 channels in
//               16 bits, or more: MassTuning), 2 key_dim of them in 16 bits; queries once per block from the
//               second-level cache, or once per 256 keys where they are more than a chunk
// Instructions  per 32 keys and 8 query vectors of 128 channels: 16 mma, 7 loads from shared memory and some 70 others
//               where all of the 8 see all of the 32 in sums of plain probabilities, 12 of a lane per (row, query head,
//               key); in floats a fused product per channel and 12 loads of 16 bytes per 128 of them
// Launches      one with lse given and 16-bit keys of one type; one more for the join of each pass, for weights of rows
//               and per further kind of keys; two more for HeadGroups::layer
// Scratch       16 bytes per row, query head and range of keys (about two ranges per multiprocessor, shared by chunks);
//               for HeadGroups::layer a row per kv head; coded keys as floats
#pragma once

#include <vector>

#include "attention_mass_kernels.cuh"
#include "rows.cuh"

namespace kvpare::cuda {

namespace detail {

/// Lists as kernels read them: raw rows where they lie, coded ones decoded.
template <class Work>
class MassLists {
 public:
  MassLists(Work& work, std::span<const HeadPages> keys, std::span<const std::uint64_t* const> masks,
            std::span<const std::int32_t* const> columns, Index width, Index most_mma_width)
      : most_mma_width_(most_mma_width) {
    decode(work, keys, width);
    std::vector<MassList> lists;
    std::int32_t decoded = 0;
    std::span<const PageGeometry> formats;
    const MassFormat* there = nullptr;
    for (std::size_t h = 0; h < keys.size(); ++h) {
      const HeadPages& list = keys[h];
      std::vector<std::int32_t> pages;  // of the entries: which decoded page
      for (std::size_t e = 0; e < list.entries.size(); ++e) {
        if (list.entries[e].live == 0) continue;
        const PageGeometry& g = list.formats[list.entries[e].format];
        kinds_[static_cast<std::size_t>(kind_of(g, width))] = true;
        if (g.key_codec == nullptr) continue;
        pages.resize(list.entries.size(), 0);
        pages[e] = decoded++;
      }
      if (formats.data() != list.formats.data() || formats.size() != list.formats.size() || there == nullptr) {
        formats = list.formats;
        there = put_formats(work, list, width);
      }
      const HeadPages on_device = work.put(list);
      MassList to;
      to.entries = on_device.entries.data(), to.offsets = on_device.offsets;
      to.decoded = pages.empty() ? nullptr : work.put(pages);
      to.formats = there;
      to.mask = masks.empty() ? nullptr : masks[h];
      to.columns = columns.empty() ? nullptr : columns[h];
      to.slots = static_cast<int>(list.slots()), to.page_tokens = static_cast<int>(list.page_tokens);
      lists.push_back(to);
      tiles_.push_back(static_cast<int>(ceil_div(list.slots(), key_tile)));
      all_tiles_ += tiles_.back();
    }
    lists_ = work.put(lists);
  }

  const MassList* data() const { return lists_; }
  bool has(TileKind kind) const {
    // Key tiles of several kinds are multiplied as floats.
    const bool several = kinds_[0] + kinds_[1] + kinds_[2] > 1;
    return kinds_[static_cast<std::size_t>(kind)] || (several && kind == TileKind::floats);
  }

  /// Ranges of key tiles, about `wanted` of them, and where those of each head begin.
  void cut(Index wanted, Index multiple, std::vector<MassJob>& jobs, std::vector<int>& first) const {
    const int size =
        static_cast<int>(round_up(std::max<Index>(ceil_div(all_tiles_, std::max<Index>(wanted, 1)), 1), multiple));
    jobs.clear(), first.assign(1, 0);
    for (std::size_t h = 0; h < tiles_.size(); ++h) {
      for (int begin = 0; begin < tiles_[h]; begin += size)
        jobs.push_back({static_cast<int>(h), begin, std::min(begin + size, tiles_[h])});
      first.push_back(static_cast<int>(jobs.size()));
    }
  }

 private:
  TileKind kind_of(const PageGeometry& g, Index width) const {
    const bool fits = g.key_codec == nullptr && g.key_type != DType::f32 && width % 8 == 0 &&
                      width <= most_mma_width_ && reinterpret_cast<std::uintptr_t>(g.keys) % 16 == 0 &&
                      g.key_page_bytes % 16 == 0 && g.key_row_bytes % 16 == 0;
    return !fits ? TileKind::floats : g.key_type == DType::f16 ? TileKind::f16 : TileKind::bf16;
  }

  const MassFormat* put_formats(Work& work, const HeadPages& list, Index width) {
    std::vector<MassFormat> formats;
    for (const PageGeometry& g : list.formats)
      if (g.key_codec != nullptr)
        formats.push_back({reinterpret_cast<const std::byte*>(decoded_), list.page_tokens * width * 4, width * 4,
                           DType::f32, TileKind::floats, true});
      else
        formats.push_back({g.keys, g.key_page_bytes, g.key_row_bytes, g.key_type, kind_of(g, width), false});
    return work.put(formats);
  }

  void decode(Work& work, std::span<const HeadPages> keys, Index width) {
    std::vector<ReadJob> jobs;
    for (const HeadPages& list : keys)
      for (const Entry& e : list.entries)
        if (const PageGeometry& g = list.formats[e.format]; e.live != 0 && g.key_codec != nullptr)
          jobs.push_back({&g, Side::keys, e.page, list.state_of(e).keys, low_bits(e.used), nullptr, width});
    if (jobs.empty()) return;
    const Index page_tokens = keys.front().page_tokens;  // of a cache's pages: the same for all heads
    decoded_ = work.template scratch<float>(static_cast<Index>(jobs.size()) * page_tokens * width);
    for (std::size_t i = 0; i < jobs.size(); ++i) jobs[i].out = decoded_ + static_cast<Index>(i) * page_tokens * width;
    read_rows(work, TileShape{page_tokens, width}, std::span<const ReadJob>(jobs));
  }

  Index most_mma_width_;
  const MassList* lists_ = nullptr;
  float* decoded_ = nullptr;
  std::vector<int> tiles_;
  Index all_tiles_ = 0;
  bool kinds_[3] = {};
};

template <class Logit, class EntryOf>
inline constexpr bool plain_functors = requires {
  Logit::plain;
}
&&requires { EntryOf::plain; };

/// The widest keys that go through the tensor cores. Functors of the caller's own get one kernel per type and pass,
/// which keeps what a program with many of them has to compile in bounds.
template <class Logit, class EntryOf>
inline constexpr Index most_mma_width = plain_functors<Logit, EntryOf> ? 256 : 128;

/// One pass: a launch per kind of key tile that there is.
template <MassPass pass, class Work, class Logit, class EntryOf>
struct MassLaunches {
  Work& work;
  const MassLists<Work>& lists;
  MassProblem<Logit, EntryOf> problem;
  DType queries;
  Index vectors;  // of the busiest call: rows are counted on the device

  template <class F>
  void for_each_dot(F&& f) const {
    if (lists.has(TileKind::f16)) for_width<F16>(f);
    if (lists.has(TileKind::bf16)) for_width<BF16>(f);
    if (lists.has(TileKind::floats)) f(static_cast<FloatDot*>(nullptr));
  }

  template <class T, class F>
  void for_width(F&& f) const {
    if constexpr (!plain_functors<Logit, EntryOf>)
      f(static_cast<MmaDot<T, 8>*>(nullptr));
    else if (problem.width <= 64)
      f(static_cast<MmaDot<T, 4>*>(nullptr));
    else if (problem.width <= 128)
      f(static_cast<MmaDot<T, 8>*>(nullptr));
    else
      f(static_cast<MmaDot<T, 16>*>(nullptr));
  }

  void run() {
    constexpr bool per_vector = pass == MassPass::peaks || pass == MassPass::shares;
    const Index wanted = work.multiprocessors() * mass_tuning.blocks_per_multiprocessor;
    int launches = 0, most_chunks = 1;
    for_each_dot([&]<class Dot>(Dot*) {
      ++launches;
      most_chunks = std::max(most_chunks, static_cast<int>(ceil_div(vectors, layout<Dot>().vectors)));
    });
    std::vector<MassJob> jobs;
    std::vector<int> first;
    lists.cut(per_vector ? ceil_div(wanted, most_chunks) : wanted, mass_tuning.threads / 32, jobs, first);
    const MassJob* job_list = work.put(jobs);
    const Index count = static_cast<Index>(jobs.size());
    if (per_vector) problem.sums = work.template scratch<MassSum>(launches * count * vectors);

    int launch = 0;
    for_each_dot([&]<class Dot>(Dot*) {
      MassKernel<pass, Dot, Logit, EntryOf> kernel{problem, layout<Dot>(), job_list, 1, nullptr};
      if (per_vector) {
        kernel.chunks = static_cast<int>(ceil_div(vectors, kernel.shared.vectors));
        kernel.sums = problem.sums + launch++ * count * vectors;
      }
      work.launch(count * kernel.chunks, kernel);
    });
    if constexpr (per_vector) {
      const MassJoinKernel<pass, Logit, EntryOf> join{problem, work.put(first), static_cast<int>(count), launches};
      work.launch(join.blocks(), join);
    }
  }

 private:
  template <class Dot>
  MassShared layout() const {
    const Index bytes = work.runtime().shared_limit() >= mass_tuning.much_shared ? mass_tuning.much_query_bytes
                                                                                 : mass_tuning.query_bytes;
    constexpr Index least = Dot::vector_tiles * vector_tile;
    MassShared s;
    s.query_parts = Dot::query_parts(queries), s.query_pitch = Dot::pitch(problem.width);
    s.channels = Dot::channels(problem.width);
    const Index fit = std::min(bytes / (s.query_parts * s.query_pitch), mass_tuning.most_vectors) / least * least;
    s.vectors = static_cast<int>(std::clamp<Index>(fit, least, round_up(vectors, least)));
    if (s.channels < problem.width) s.vectors = least;  // their logits wait in registers for the other channels
    s.lay_out(pass == MassPass::peaks || pass == MassPass::shares, mass_tuning.threads / 32);
    return s;
  }
};

}  // namespace detail

template <class Work, class Logit, class EntryOf>
void attention_mass(Work& work, const MassArguments<Logit, EntryOf>& a) {
  using namespace detail;
  const LayerShape& shape = *a.shape;
  const Index rows = a.queries.rows, parts = a.parts();
  if (rows == 0) return;
  const bool wants_rows =
      a.row_lse != nullptr || a.row_peak != nullptr || a.row_near_peak != nullptr || a.row_part_mass != nullptr;
  if (a.out == nullptr && a.seen == nullptr && !wants_rows) return;

  MassProblem<Logit, EntryOf> p;
  p.queries = a.queries, p.row_positions = a.row_positions, p.row_list = a.row_list, p.row_count = a.row_count;
  p.row_weights = a.row_weights, p.per_head_weights = a.per_head_weights;
  p.given_lse = a.lse, p.extra = a.extra;
  if (parts == 2) p.row_class = a.row_class, p.key_class = a.key_class;
  p.out = a.out, p.seen = a.seen;
  p.row_lse = a.row_lse, p.row_peak = a.row_peak, p.row_near_peak = a.row_near_peak, p.row_part_mass = a.row_part_mass;
  p.columns = a.columns, p.out_heads = a.out_heads(), p.window = shape.window;
  p.most_vectors = shape.group() * round_up(rows, vector_tile);
  p.scale = shape.softcap > 0 ? shape.scale : shape.scale * log2_e, p.softcap = shape.softcap;
  p.joined = a.heads == HeadGroups::query_head ? 1.0f
             : a.heads == HeadGroups::kv_head  ? 1.0f / static_cast<float>(shape.group())
                                               : 1.0f / static_cast<float>(shape.q_heads);
  p.peak_share = a.peak_share;
  p.kv_heads = static_cast<int>(shape.kv_heads), p.group = static_cast<int>(shape.group());
  p.parts = static_cast<int>(parts), p.width = static_cast<int>(shape.key_dim);
  p.heads = a.heads, p.take_max = a.take_max;
  p.logit = a.logit, p.entry = a.entry;

  const MassLists<Work> lists(work, a.keys, a.key_mask, a.column_of, shape.key_dim, most_mma_width<Logit, EntryOf>);
  p.lists = lists.data();
  if (a.row_weights != nullptr) {
    Index* used = work.template scratch<Index>(rows);
    Index* count = work.template scratch<Index>(1);
    work.launch(1, MassRowsKernel{a.row_list, a.row_count, a.row_weights, rows, a.per_head_weights ? shape.q_heads : 1,
                                  used, count});
    p.row_list = used, p.row_count = count;
  }

  const auto run = [&]<MassPass pass>() {
    MassLaunches<pass, Work, Logit, EntryOf>{work, lists, p, a.queries.dtype, p.most_vectors}.run();
  };
  const bool wants_peaks = a.row_lse != nullptr || a.row_peak != nullptr || a.row_near_peak != nullptr ||
                           (a.lse == nullptr && (a.out != nullptr || a.row_part_mass != nullptr));
  if (wants_peaks) {
    p.lse2 = work.template scratch<float>(shape.kv_heads * p.most_vectors);
    p.peak2 = work.template scratch<float>(shape.kv_heads * p.most_vectors);
    run.template operator()<MassPass::peaks>();
  }
  if (a.row_near_peak != nullptr || a.row_part_mass != nullptr) run.template operator()<MassPass::shares>();
  if (a.out == nullptr && a.seen == nullptr) return;

  // Several kv heads add to one row: each has a row of its own first.
  const Index size = parts * a.columns;
  if (a.out != nullptr && a.heads == HeadGroups::layer && shape.kv_heads > 1) {
    p.of_heads = work.template scratch<float>(shape.kv_heads * size);
    work.launch(ceil_div(shape.kv_heads * size, MassZeroKernel::threads),
                MassZeroKernel{p.of_heads, shape.kv_heads * size});
  }
  constexpr bool plain = requires { Logit::plain; }
  &&requires { EntryOf::plain; };
  const bool sums = parts == 1 && !a.take_max && a.heads != HeadGroups::query_head && shape.softcap == 0;
  if constexpr (plain) {
    if (sums) run.template operator()<MassPass::plain>();
  }
  if (!plain || !sums) run.template operator()<MassPass::mass>();
  if (p.of_heads != nullptr)
    work.launch(ceil_div(size, MassLayerKernel::threads),
                MassLayerKernel{p.of_heads, shape.kv_heads, size, a.take_max, a.out});
}

}  // namespace kvpare::cuda

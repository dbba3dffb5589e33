// `attend` on the device: lists are cut into tasks on the host, every form has its kernel, one more joins what they
// leave.
#pragma once

#include <bit>
#include <vector>

#include "../backend.hpp"
#include "attend_fused.cuh"
#include "attend_kernel.cuh"
#include "attend_plan.cuh"
#include "each.cuh"

namespace kvpare::cuda {

namespace detail {

/// What attends to pages of one form: a handle of a pair points to one.
template <class Work>
struct PairOps {
  Support support = Support::generic;
  Index blocks = 1;  // on a multiprocessor
  void (*attend)(Work& work, const AttendLayer& layer, const AttendTask* tasks, Index count) = nullptr;
};

template <class Kernel, class Work>
void launch_attend(Work& work, const AttendLayer& layer, const AttendTask* tasks, Index count) {
  work.launch(count, Kernel{layer, tasks});
}

template <class Work, class P>
inline constexpr PairOps<Work> generic_pair{
    Support::generic, attend_tuning.blocks_of_generic,
    launch_attend<GenericAttend<typename ReaderOf<typename P::Key>::type, typename ReaderOf<typename P::Value>::type>,
                  Work>};

template <class Work>
inline constexpr PairOps<Work> generic_rows{Support::generic, attend_tuning.blocks_of_generic,
                                            launch_attend<GenericAttend<ReadRaw, ReadRaw>, Work>};

template <class Work, class K, class V, int D>
inline constexpr PairOps<Work> fused_pair{Support::fused, FusedAttend<K, V, D>::least_blocks,
                                          launch_attend<FusedAttend<K, V, D>, Work>};

/// Keys and values as operands at one width, or null.
template <class Work, class K, class V, int D>
const PairOps<Work>* fused_ops(Index page_tokens) {
  using Keys = typename KeysOf<K, D>::type;
  using Values = typename ValuesOf<V, D>::type;
  if constexpr (Keys::fits && Values::fits && WarpFold<K, D>::known && WarpFold<V, D>::known)
    return Keys::fits_tokens(page_tokens) ? &fused_pair<Work, K, V, D> : nullptr;
  else
    return nullptr;
}
/// The widths that models have; null for others, and for pages that are not whole tiles of 16 tokens.
template <class Work, class K, class V>
const PairOps<Work>* fused_ops(Index page_tokens, Index key_dim, Index value_dim) {
  if (key_dim != value_dim || (page_tokens != 16 && page_tokens != 32 && page_tokens != 64)) return nullptr;
  switch (key_dim) {
    case 64:
      return fused_ops<Work, K, V, 64>(page_tokens);
    case 80:
      return fused_ops<Work, K, V, 80>(page_tokens);
    case 96:
      return fused_ops<Work, K, V, 96>(page_tokens);
    case 128:
      return fused_ops<Work, K, V, 128>(page_tokens);
    case 256:
      return fused_ops<Work, K, V, 256>(page_tokens);
    default:
      return nullptr;
  }
}

/// Raw rows: chosen by their types, widths and alignment.
template <class Work>
const PairOps<Work>* rows_ops(const PageGeometry& g, Index page_tokens, Index key_dim, Index value_dim) {
  const auto all =
      reinterpret_cast<std::uintptr_t>(g.keys) | reinterpret_cast<std::uintptr_t>(g.values) |
      static_cast<std::uintptr_t>(g.key_page_bytes | g.value_page_bytes | g.key_row_bytes | g.value_row_bytes);
  const PairOps<Work>* ops = nullptr;
  if (all % 16 == 0 && g.key_type == g.value_type) {
    if (g.key_type == DType::f16) ops = fused_ops<Work, Raw<half>, Raw<half>>(page_tokens, key_dim, value_dim);
    if (g.key_type == DType::bf16) ops = fused_ops<Work, Raw<bfloat16>, Raw<bfloat16>>(page_tokens, key_dim, value_dim);
  }
  return ops != nullptr ? ops : &generic_rows<Work>;
}

inline Sights sights_of(std::span<const Position> positions, Index window) {
  const auto [lowest, highest] = std::minmax_element(positions.begin(), positions.end());
  const auto low_of = [window](Position p) {
    return window > 0 ? static_cast<Index>(p) - window : std::numeric_limits<Index>::min();
  };
  return {low_of(*lowest), *highest, low_of(*highest), *lowest};
}

/// Tasks of one form, over all lists of the call.
template <class Work>
struct TasksOfForm {
  const PairOps<Work>* ops = nullptr;
  std::vector<AttendTask> tasks;
};

/// A call on its way to the device.
template <class Work>
class AttendCall {
 public:
  AttendCall(Work& work, const LayerShape& shape, std::span<const AttendSequence> batch, MassKind kind)
      : work_(work), shape_(shape), batch_(batch), kind_(kind) {
    layer_.key_dim = shape.key_dim, layer_.value_dim = shape.value_dim;
    layer_.group = static_cast<int>(shape.group());
    layer_.window = shape.window;
    layer_.factor = shape.scale * log2_e;
    layer_.softcap = shape.softcap * log2_e;
  }

  void run() {
    if (batch_.empty()) return;
    for (const AttendSequence& s : batch_) list_runs(s);
    cut();
    send();
  }

 private:
  struct Run {  // pages of one form and state in one list
    const PairOps<Work>* ops;
    std::uint16_t format;
    std::uint32_t state;
    Index head;                             // among the call's
    std::vector<std::uint32_t> pages = {};  // entries, ascending
  };

  void list_runs(const AttendSequence& s) {
    if (s.heads.empty()) return;
    layer_.page_tokens = s.heads.front().page_tokens;
    const Index group = shape_.group(), rows = s.queries.rows * group;
    const Sights sights = sights_of(s.positions, shape_.window);
    const Position* positions = work_.put(s.positions);
    const float* sinks =
        shape_.sink_logits.empty() || sinks_ != nullptr ? sinks_ : sinks_ = work_.put(shape_.sink_logits);
    for (Index h = 0; h < shape_.kv_heads; ++h) {
      const HeadPages& list = s.heads[static_cast<std::size_t>(h)];
      FinishedHead& head = heads_.emplace_back();
      head.rows = static_cast<int>(rows);
      head.out = static_cast<std::byte*>(s.out.at(0, h * group));
      head.row_bytes = s.out.row_stride * size_of(s.out.dtype),
      head.head_bytes = s.out.head_stride * size_of(s.out.dtype);
      head.out_type = s.out.dtype;
      head.lse = s.lse == nullptr ? nullptr : s.lse + h * group;
      head.sinks = sinks == nullptr ? nullptr : sinks + h * group;
      head.slots = list.slots();
      if (kind_ != MassKind::none) head.mass = s.mass[static_cast<std::size_t>(h)];

      AttendRun common;
      common.queries = static_cast<const std::byte*>(s.queries.at(0, h * group));
      common.row_bytes = s.queries.row_stride * size_of(s.queries.dtype);
      common.head_bytes = s.queries.head_stride * size_of(s.queries.dtype);
      common.query_type = s.queries.dtype;
      common.positions = positions, common.sights = sights;
      common.slots = head.slots;
      common.rows = static_cast<int>(rows);
      const std::size_t first_run = runs_.size();
      Run* last = nullptr;
      std::size_t from = list.entries.size(), to = 0;
      for (std::size_t e = 0; e < list.entries.size(); ++e) {
        const Entry& entry = list.entries[e];
        if (!sights.any_of(entry)) continue;
        if (last == nullptr || last->format != entry.format || last->state != entry.state)
          last = &run_of(first_run, list, entry, common);
        last->pages.push_back(static_cast<std::uint32_t>(e));
        from = std::min(from, e), to = e + 1;
      }
      if (from >= to) continue;
      HeadPages sent = list;
      if (list.version == nullptr)
        sent.entries = list.entries.subspan(from, to - from);  // nobody keeps the others
      else
        from = 0;
      sent = work_.put(sent);
      for (std::size_t r = first_run; r < runs_.size(); ++r) {
        AttendRun& run = sent_runs_[r];
        run.entries = sent.entries.data(), run.offsets = sent.offsets;
        const std::vector<std::uint32_t>& pages = runs_[r].pages;
        run.first_entry = static_cast<Index>(from);
        if (pages.back() - pages.front() + 1 != pages.size()) {
          run.order = work_.put(pages);
        } else {
          run.entries += pages.front() - from, run.first_entry = pages.front();
        }
      }
    }
  }

  Run& run_of(std::size_t first_run, const HeadPages& list, const Entry& entry, const AttendRun& common) {
    for (std::size_t r = first_run; r < runs_.size(); ++r)
      if (runs_[r].format == entry.format && runs_[r].state == entry.state) return runs_[r];
    const PageGeometry& g = list.formats[entry.format];
    const auto* pair = static_cast<const PairOps<Work>*>(g.pair);
    const bool raw = g.key_codec == nullptr && g.value_codec == nullptr;
    runs_.push_back({raw ? rows_ops<Work>(g, layer_.page_tokens, layer_.key_dim, layer_.value_dim) : pair, entry.format,
                     entry.state, std::ssize(heads_) - 1});
    Run& run = runs_.back();
    AttendRun& there = sent_runs_.emplace_back(common);
    const CodecState state = list.state_of(entry);
    there.keys = g.keys, there.values = g.values;
    there.key_page_bytes = g.key_page_bytes, there.value_page_bytes = g.value_page_bytes;
    there.key_row_bytes = g.key_row_bytes, there.value_row_bytes = g.value_row_bytes;
    there.key_type = g.key_type, there.value_type = g.value_type;
    there.key_state = state.keys, there.value_state = state.values;
    return run;
  }

  /// Runs become tasks; partials of a list are numbered by query rows, then in the order of its tasks.
  void cut() {
    std::vector<Stretch> stretches;
    Index blocks = 8;
    for (const Run& run : runs_) blocks = std::min(blocks, run.ops->blocks);
    for (const Run& run : runs_)
      stretches.push_back(
          {std::ssize(run.pages), ceil_div(heads_[static_cast<std::size_t>(run.head)].rows, rows_of_task)});
    const Index size = pages_per_task(stretches, work_.multiprocessors() * blocks, pages_of_task, attend_tuning);
    for (const Run& run : runs_)
      heads_[static_cast<std::size_t>(run.head)].partials += static_cast<int>(ceil_div(std::ssize(run.pages), size));
    for (FinishedHead& head : heads_) {
      head.first_partial = partials_;
      partials_ += head.partials * ceil_div(head.rows, rows_of_task);
    }
    Index before = 0;  // tasks of this list so far
    for (std::size_t r = 0; r < runs_.size(); ++r) {
      const Run& run = runs_[r];
      if (r == 0 || runs_[r - 1].head != run.head) before = 0;
      const FinishedHead& head = heads_[static_cast<std::size_t>(run.head)];
      std::vector<AttendTask>& tasks = tasks_of(run.ops);
      const Index count = std::ssize(run.pages);
      for (Index first = 0; first < count; first += size, ++before)
        for (Index chunk = 0; chunk * rows_of_task < head.rows; ++chunk)
          tasks.push_back({head.first_partial + chunk * head.partials + before, static_cast<int>(r),
                           static_cast<int>(first), static_cast<int>(std::min(size, count - first)),
                           static_cast<int>(chunk * rows_of_task)});
    }
  }
  std::vector<AttendTask>& tasks_of(const PairOps<Work>* ops) {
    for (TasksOfForm<Work>& f : forms_)
      if (f.ops == ops) return f.tasks;
    forms_.push_back({ops, {}});
    return forms_.back().tasks;
  }

  void send() {
    if (kind_ != MassKind::none) {
      Index floats = 0, rows = 0;
      for (const FinishedHead& head : heads_) floats += head.rows * head.slots, rows += head.rows;
      float* logits = work_.template scratch<float>(floats);
      float* max_sum = work_.template scratch<float>(2 * rows);
      each(work_, floats, kvpare::detail::Fill<float>{logits, no_logit});
      for (FinishedHead& head : heads_) {
        head.logits = logits, head.max_sum = max_sum;
        logits += head.rows * head.slots, max_sum += 2 * head.rows;
      }
    }
    for (std::size_t r = 0; r < runs_.size(); ++r)
      sent_runs_[r].logits = heads_[static_cast<std::size_t>(runs_[r].head)].logits;
    layer_.runs = work_.put(sent_runs_);
    layer_.states = work_.template scratch<float>(partials_ * partial_floats(shape_.value_dim));
    for (const TasksOfForm<Work>& form : forms_)
      form.ops->attend(work_, layer_, work_.put(form.tasks), std::ssize(form.tasks));

    Index blocks = 0;
    for (FinishedHead& head : heads_) head.first_block = blocks, blocks += head.rows;
    work_.launch(blocks, FinishAttend{layer_, work_.put(heads_), std::ssize(heads_), shape_.q_heads});
    if (kind_ == MassKind::none) return;
    blocks = 0;
    for (FinishedHead& head : heads_) head.first_block = blocks, blocks += ceil_div(head.slots, AddMass::threads);
    work_.launch(blocks, AddMass{work_.put(heads_), std::ssize(heads_), layer_.group, kind_});
  }

  Work& work_;
  const LayerShape& shape_;
  std::span<const AttendSequence> batch_;
  MassKind kind_;
  AttendLayer layer_;
  const float* sinks_ = nullptr;
  std::vector<FinishedHead> heads_;   // sequence by sequence
  std::vector<Run> runs_;             // those of a head next to each other
  std::vector<AttendRun> sent_runs_;  // the same, for kernels
  std::vector<TasksOfForm<Work>> forms_;
  Index partials_ = 0;
};

}  // namespace detail

/// The handle of a page format; null for raw rows, which are known by their types.
template <class Work, class P>
const void* pair_ops(TileShape keys, TileShape values) {
  if constexpr ((is_raw<typename P::Key> && is_raw<typename P::Value>) || host_only<typename P::Key>() ||
                host_only<typename P::Value>()) {
    return nullptr;
  } else {
    if (!P::fits(keys.tokens, keys.width, values.width)) return nullptr;
    const auto* fused =
        detail::fused_ops<Work, typename P::Key, typename P::Value>(keys.tokens, keys.width, values.width);
    return fused != nullptr ? fused : &detail::generic_pair<Work, P>;
  }
}

/// Raw rows are judged as those of a pool page, whose tiles say how many there are.
template <class Work>
Support pair_support(const PageGeometry& g) {
  if (g.pair != nullptr) return static_cast<const detail::PairOps<Work>*>(g.pair)->support;
  if (g.key_row_bytes == 0 || g.value_row_bytes == 0) return Support::generic;
  return detail::rows_ops<Work>(g, g.key_tile_bytes / g.key_row_bytes, g.key_row_bytes / size_of(g.key_type),
                                g.value_row_bytes / size_of(g.value_type))
      ->support;
}

/// See AttendSequence. Arguments are valid: the pipeline checks them.
template <class Work>
void attend(Work& work, const LayerShape& shape, std::span<const AttendSequence> batch, MassKind kind) {
  detail::AttendCall<Work>(work, shape, batch, kind).run();
}

}  // namespace kvpare::cuda

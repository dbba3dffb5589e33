// Kernels of `attend` that serve every form of pages: what they take, the one that decodes rows to floats, and the two
// that join what others left.
//
// A list of one kv head is cut into runs of one form and codec state, runs into tasks of some pages and up to 8 query
// rows. A block does one task and leaves a partial softmax per query row: max, sum and accumulator in units of log2.
// Partials of a query row are joined in the order of the tasks, which depends on the lists alone.
//
//   partial p of the call   states + p * partial_floats(value_dim):  max [8] | sum [8] | acc [8][value_dim]
//   query row i of a head   row i / group of the sequence, member i % group of the head's group
#pragma once

#include <cmath>
#include <limits>

#include "../../codec/raw.hpp"
#include "collectives.cuh"
#include "tiles.cuh"

namespace kvpare::cuda {
namespace detail {

inline constexpr float no_logit = -std::numeric_limits<float>::infinity();
inline constexpr int rows_of_task = 8;
inline constexpr int pages_of_task = 64;  // at most

constexpr KVPARE_HD Index partial_floats(Index value_dim) { return rows_of_task * (value_dim + 2); }

/// What the rows of a sequence see: positions (low, high].
struct Sights {
  Index low_of_all = 0, high_of_all = 0;        // seen by any row
  Index low_of_common = 0, high_of_common = 0;  // seen by every row

  KVPARE_HD bool any_of(const Entry& e) const { return e.live != 0 && e.first <= high_of_all && e.last > low_of_all; }
};

/// Pages of one form and state in one list, and the rows that attend to them.
struct AttendRun {
  const std::byte* queries = nullptr;  // of the head's first query head
  Index row_bytes = 0, head_bytes = 0;
  const Position* positions = nullptr;
  Sights sights;
  const Entry* entries = nullptr;  // of the list, from first_entry on
  const std::uint16_t* offsets = nullptr;
  const std::uint32_t* order = nullptr;  // which entries; null: one after the other
  Index first_entry = 0;
  float* logits = nullptr;  // [query rows][slots], units of log2; or null
  Index slots = 0;
  const std::byte *keys = nullptr, *values = nullptr;
  Index key_page_bytes = 0, value_page_bytes = 0, key_row_bytes = 0, value_row_bytes = 0;
  const float *key_state = nullptr, *value_state = nullptr;
  int rows = 0;  // query rows
  DType query_type = DType::f32, key_type = DType::f32, value_type = DType::f32;
};

struct AttendTask {
  Index partial = 0;
  int run = 0, first_page = 0, page_count = 0, first_row = 0;  // pages as the run orders them
};

/// What all tasks of a call have in common.
struct AttendLayer {
  const AttendRun* runs = nullptr;
  float* states = nullptr;
  Index key_dim = 0, value_dim = 0, page_tokens = 0;
  int group = 1;
  Index window = 0;
  float factor = 1;   // from q·k to units of log2
  float softcap = 0;  // in units of log2; 0 = none
};

/// Positions that a query row sees: (low, high].
struct RowSight {
  Position low, high;
  KVPARE_HD bool sees(Position p) const { return p <= high && p > low; }
};
KVPARE_DEVICE RowSight row_sight(const AttendRun& run, const AttendLayer& layer, int query_row) {
  const Position high = run.positions[query_row / layer.group];
  const Index low = layer.window > 0 ? static_cast<Index>(high) - layer.window : std::numeric_limits<Position>::min();
  constexpr Index least = std::numeric_limits<Position>::min();
  return {static_cast<Position>(low < least ? least : low), high};
}
KVPARE_DEVICE Position position_of(const AttendRun& run, const AttendLayer& layer, Position first,
                                   std::uint32_t offsets, int slot) {
  return first + (offsets == 0 ? slot : run.offsets[(offsets - 1) * layer.page_tokens + slot]);
}

/// A page as the rows of one call see it.
struct SeenPage {
  std::uint64_t seen = 0;  // slots that at least one row sees
  bool by_all = true;      // every row sees them all
  PageId page = 0;
  std::uint32_t index = 0;    // of the entry in its list
  Position first = 0;         // as Entry
  std::uint32_t offsets = 0;  // as Entry
};
KVPARE_DEVICE SeenPage page_of(const AttendRun& run, const AttendLayer& layer, int place) {
  const std::uint32_t index =
      run.order != nullptr ? run.order[place] : static_cast<std::uint32_t>(run.first_entry + place);
  const Entry e = run.entries[static_cast<Index>(index) - run.first_entry];
  const Sights& sights = run.sights;
  SeenPage page{e.live,   e.last <= sights.high_of_common && e.first > sights.low_of_common, e.page, index, e.first,
                e.offsets};
  if (e.last > sights.high_of_all || e.first <= sights.low_of_all)
    for (int slot = 0; slot < layer.page_tokens; ++slot) {
      const Index at = slot < e.used ? position_of(run, layer, e.first, e.offsets, slot) : sights.low_of_all;
      if (at > sights.high_of_all || at <= sights.low_of_all) page.seen &= ~(std::uint64_t{1} << slot);
    }
  return page;
}

KVPARE_DEVICE const std::byte* query_row(const AttendRun& run, const AttendLayer& layer, int i) {
  return run.queries + i / layer.group * run.row_bytes + i % layer.group * run.head_bytes;
}
KVPARE_DEVICE float capped(float logit, float softcap) {
  return softcap > 0 ? softcap * std::tanh(logit / softcap) : logit;
}

/// Raw rows of any element type as floats, by all threads of the block.
struct ReadRaw {
  template <Side side, class Block>
  static KVPARE_DEVICE void read(Block& b, const AttendRun& run, const AttendLayer&, const SeenPage& page, int first,
                                 int count, Index width, float* to) {
    const std::byte* tile =
        side == Side::keys ? run.keys + page.page * run.key_page_bytes : run.values + page.page * run.value_page_bytes;
    const Index row_bytes = side == Side::keys ? run.key_row_bytes : run.value_row_bytes;
    const DType type = side == Side::keys ? run.key_type : run.value_type;
    for (int t = 0; t < count; ++t) {
      if ((page.seen >> (first + t) & 1) == 0) continue;
      for (Index c = b.thread(); c < width; c += b.threads())
        to[t * width + c] = number_at(b, tile + (first + t) * row_bytes, type, c);
    }
  }
};

/// Undoes all folds around the innermost codec on one row.
template <Codec C>
KVPARE_DEVICE void unfold(Index width, const float* state, float* row) {
  if constexpr (FoldedCodec<C>) {
    unfold<typename C::Inner>(width, C::inner_state(width, state), row);
    C::backward(width, state, row);
  }
}
/// The innermost codec's own state.
template <Codec C>
KVPARE_DEVICE const float* innermost_state(Index width, const float* state) {
  if constexpr (FoldedCodec<C>)
    return innermost_state<typename C::Inner>(width, C::inner_state(width, state));
  else
    return state;
}

/// Rows of a codec as floats: in fragment order by all threads, in canonical order a thread per row.
template <Codec C>
struct ReadCoded {
  template <Side side, class Block>
  static KVPARE_DEVICE void read(Block& b, const AttendRun& run, const AttendLayer& layer, const SeenPage& page,
                                 int first, int count, Index width, float* to) {
    using Stored = typename DeviceTiles<C, side>::Stored;
    const TileShape shape{layer.page_tokens, width};
    const std::byte* tile =
        side == Side::keys ? run.keys + page.page * run.key_page_bytes : run.values + page.page * run.value_page_bytes;
    const float* state = side == Side::keys ? run.key_state : run.value_state;
    const float* inner = innermost_state<C>(width, state);
    const bool in_fragments = DeviceTiles<C, side>::in_fragments(shape);
    if constexpr (has_fragment_order<Stored>()) {
      if (in_fragments) {
        for (int t = 0; t < count; ++t) {
          if ((page.seen >> (first + t) & 1) == 0) continue;
          for (Index c = b.thread(); c < width; c += b.threads())
            to[t * width + c] = FragmentAccess<Stored, side>::number(shape, tile, first + t, c, inner);
        }
        if constexpr (FoldedCodec<C>) b.sync();
      }
    }
    for (int t = b.thread(); t < count; t += b.threads()) {
      if ((page.seen >> (first + t) & 1) == 0) continue;
      if (!in_fragments) Stored::decode(shape, tile, first + t, inner, to + t * width);
      unfold<C>(width, state, to + t * width);
    }
  }
};
template <Codec C>
struct ReaderOf {
  using type = ReadCoded<C>;
};
template <Element T>
struct ReaderOf<Raw<T>> {
  using type = ReadRaw;
};

/// Any keys and values, any widths: rows become floats in shared memory, products are scalar.
template <class Keys, class Values>
struct GenericAttend {
  static constexpr int threads = 128;
  AttendLayer layer;
  const AttendTask* tasks = nullptr;

  /// Query rows at once, and tokens at once, in about 40 KiB.
  KVPARE_HD int rows_at_once() const {
    const Index rows = 24 * 1024 / 4 / (layer.key_dim + layer.value_dim);
    return static_cast<int>(rows < 1 ? 1 : rows > rows_of_task ? rows_of_task : rows);
  }
  KVPARE_HD int tokens_at_once() const {
    const Index tokens = 16 * 1024 / 4 / widest();
    return static_cast<int>(tokens < 1 ? 1 : tokens > 16 ? 16 : tokens);
  }
  KVPARE_HD Index widest() const { return layer.key_dim > layer.value_dim ? layer.key_dim : layer.value_dim; }
  KVPARE_HD Index shared_bytes() const {
    const Index rows = rows_at_once();
    return 4 * (rows * (layer.key_dim + layer.value_dim) + tokens_at_once() * widest() + rows * tokens_at_once() +
                4 * rows_of_task);
  }

  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const AttendTask task = tasks[b.block()];
    const AttendRun run = layer.runs[task.run];
    const int rows = run.rows - task.first_row < rows_of_task ? run.rows - task.first_row : rows_of_task;
    for (int r = 0; r < rows; r += rows_at_once())
      some_rows(b, task, run, r, rows - r < rows_at_once() ? rows - r : rows_at_once());
  }

 private:
  template <class Block>
  KVPARE_DEVICE void some_rows(Block& b, const AttendTask& task, const AttendRun& run, int first_row, int rows) const {
    const int tokens = tokens_at_once();
    const Index key_dim = layer.key_dim, value_dim = layer.value_dim;
    float* q = b.template shared<float>(0);  // [rows][key_dim]
    float* acc = q + rows_at_once() * key_dim;
    float* numbers = acc + rows_at_once() * value_dim;  // [tokens][widest]
    float* scores = numbers + tokens * widest();        // [rows][tokens]
    float* most = scores + rows_at_once() * tokens;
    float* sum = most + rows_of_task;
    float* alpha = sum + rows_of_task;
    for (int i = 0; i < rows; ++i) {
      const std::byte* from = query_row(run, layer, task.first_row + first_row + i);
      for (Index c = b.thread(); c < key_dim; c += threads) q[i * key_dim + c] = number_at(b, from, run.query_type, c);
      for (Index c = b.thread(); c < value_dim; c += threads) acc[i * value_dim + c] = 0;
    }
    if (b.thread() < rows) most[b.thread()] = no_logit, sum[b.thread()] = 0;

    for (int p = 0; p < task.page_count; ++p) {
      const SeenPage page = page_of(run, layer, task.first_page + p);
      for (int first = 0; first < layer.page_tokens; first += tokens) {
        const int left = static_cast<int>(layer.page_tokens) - first, count = left < tokens ? left : tokens;
        const bool any = (page.seen >> first & low_bits(count)) != 0;
        if (!any) continue;
        b.sync();
        Keys::template read<Side::keys>(b, run, layer, page, first, count, key_dim, numbers);
        b.sync();
        for (int x = b.warp(); x < rows * count; x += threads / 32) {
          const int i = x / count, t = x % count, row = task.first_row + first_row + i;
          float logit = no_logit;
          if ((page.seen >> (first + t) & 1) != 0 &&
              (page.by_all ||
               row_sight(run, layer, row).sees(position_of(run, layer, page.first, page.offsets, first + t)))) {
            float dot = 0;
            for (Index c = b.lane(); c < key_dim; c += 32) dot += q[i * key_dim + c] * numbers[t * key_dim + c];
            dot = warp_sum(b, dot);
            logit = capped(dot * layer.factor, layer.softcap);
          }
          if (b.lane() == 0) {
            scores[i * tokens + t] = logit;
            if (run.logits != nullptr) run.logits[row * run.slots + page.index * layer.page_tokens + first + t] = logit;
          }
        }
        b.sync();
        if (b.thread() < rows) {
          const int i = b.thread();
          float peak = most[i];
          for (int t = 0; t < count; ++t) peak = std::fmax(peak, scores[i * tokens + t]);
          const float base = peak == no_logit ? 0.0f : peak;
          const float shrink = Block::exp2(most[i] - base);
          float total = sum[i] * shrink;  // a NaN stays
          for (int t = 0; t < count; ++t) {
            const float s = scores[i * tokens + t];
            // Less than nothing marks what the row does not see: a probability may well be 0.
            const float p_t = s == no_logit ? -1.0f : Block::exp2(s - base);
            scores[i * tokens + t] = p_t;
            if (s != no_logit) total += p_t;
          }
          alpha[i] = shrink;
          most[i] = peak, sum[i] = total;
        }
        b.sync();
        Values::template read<Side::values>(b, run, layer, page, first, count, value_dim, numbers);
        b.sync();
        for (Index x = b.thread(); x < rows * value_dim; x += threads) {
          const Index i = x / value_dim, c = x % value_dim;
          float total = acc[x] * alpha[i];
          for (int t = 0; t < count; ++t) {
            const float p_t = scores[i * tokens + t];
            if (!(p_t < 0)) total += p_t * numbers[t * value_dim + c];
          }
          acc[x] = total;
        }
      }
    }
    b.sync();
    float* out = layer.states + task.partial * partial_floats(value_dim);
    if (b.thread() < rows) {
      out[first_row + b.thread()] = most[b.thread()];
      out[rows_of_task + first_row + b.thread()] = sum[b.thread()];
    }
    for (Index x = b.thread(); x < rows * value_dim; x += threads)
      out[2 * rows_of_task + first_row * value_dim + x] = acc[x];
    b.sync();
  }
};

/// The end of one list: where its partials are, and what becomes of them.
struct FinishedHead {
  Index first_partial = 0;
  int partials = 0;  // of every eight query rows
  int rows = 0;      // query rows
  std::byte* out = nullptr;
  Index row_bytes = 0, head_bytes = 0;
  float* lse = nullptr;          // of row 0, first head of the group; or null
  const float* sinks = nullptr;  // of the group; or null
  float* logits = nullptr;       // [query rows][slots], or null: no mass
  float* mass = nullptr;
  Index slots = 0;
  float* max_sum = nullptr;  // [query rows][2] with logits
  Index first_block = 0;     // of this head in the launch
  DType out_type = DType::f32;
};

/// Which element of an ascending list of first blocks a block belongs to.
KVPARE_DEVICE Index owner_of(const FinishedHead* heads, Index count, Index block) {
  Index low = 0, high = count;
  while (high - low > 1) {
    const Index middle = (low + high) / 2;
    (heads[middle].first_block <= block ? low : high) = middle;
  }
  return low;
}

/// A block per query row: partials joined, the sink added, the row written.
struct FinishAttend {
  static constexpr int threads = 128;
  AttendLayer layer;
  const FinishedHead* heads = nullptr;
  Index head_count = 0, q_heads = 0;

  KVPARE_HD Index shared_bytes() const { return 4 * (2 * threads + threads / 32); }

  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const FinishedHead head = heads[owner_of(heads, head_count, b.block())];
    const int i = static_cast<int>(b.block() - head.first_block), chunk = i / rows_of_task, lane_row = i % rows_of_task;
    const int row = i / layer.group, member = i % layer.group;
    const Index floats = partial_floats(layer.value_dim);
    const float* partial =
        layer.states + (head.first_partial + static_cast<Index>(chunk) * head.partials) * floats + lane_row;
    float* weights = b.template shared<float>(0);
    float* sums = weights + threads;
    float* peaks = sums + threads;

    float peak = no_logit;
    for (int p = b.thread(); p < head.partials; p += threads) peak = std::fmax(peak, partial[p * floats]);
    peak = warp_max(b, peak);
    if (b.lane() == 0) peaks[b.warp()] = peak;
    b.sync();
    peak = peaks[0];
    for (int w = 1; w < threads / 32; ++w) peak = std::fmax(peak, peaks[w]);
    const float base = peak == no_logit ? 0.0f : peak;

    // Channels in steps of the block, partials in steps of the shared memory: one step of each for most.
    float sum = 0, scale = 1;
    for (Index first = 0; first < layer.value_dim; first += threads) {
      const Index c = first + b.thread();
      float acc = 0, total = 0;
      for (int p0 = 0; p0 < head.partials; p0 += threads) {
        const int count = head.partials - p0 < threads ? head.partials - p0 : threads;
        b.sync();
        if (b.thread() < count) {
          const float* own = partial + (p0 + b.thread()) * floats;
          const float sum_p = own[rows_of_task];
          // A partial that saw nothing weighs nothing; one that holds a NaN makes the row NaN.
          const float weight = sum_p == 0 ? 0.0f : sum_p != sum_p ? sum_p : Block::exp2(own[0] - base);
          weights[b.thread()] = weight, sums[b.thread()] = sum_p * weight;
        }
        b.sync();
        for (int p = 0; p < count; ++p) {
          total += sums[p];
          if (c < layer.value_dim && weights[p] != 0)
            acc +=
                partial[(p0 + p) * floats + 2 * rows_of_task - lane_row + lane_row * layer.value_dim + c] * weights[p];
        }
      }
      if (first == 0) {
        sum = total;
        if (head.sinks != nullptr && sum != 0) {
          const float sink = head.sinks[member] * log2_e;
          const float higher = std::fmax(base, sink);
          scale = Block::exp2(base - higher);
          sum = sum * scale + Block::exp2(sink - higher);
          peak = higher;
        }
      }
      if (c < layer.value_dim)
        put_number(head.out + row * head.row_bytes + member * head.head_bytes,
                   sum != 0 ? acc * (scale / sum) : 0.0f, head.out_type, c);
    }
    if (b.thread() == 0) {
      if (head.lse != nullptr) head.lse[row * q_heads + member] = sum == 0 ? no_logit : (peak + std::log2(sum)) * ln_2;
      if (head.max_sum != nullptr) head.max_sum[2 * i] = peak, head.max_sum[2 * i + 1] = sum;
    }
  }
};

/// A thread per slot: logits become probabilities, the group's heads one number, rows add up in their order.
struct AddMass {
  static constexpr int threads = 256;
  const FinishedHead* heads = nullptr;
  Index head_count = 0;
  int group = 1;
  MassKind kind = MassKind::sum;

  KVPARE_HD Index shared_bytes() const { return 0; }
  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const FinishedHead head = heads[owner_of(heads, head_count, b.block())];
    const Index slot = (b.block() - head.first_block) * threads + b.thread();
    if (slot >= head.slots) return;
    float mass = head.mass[slot];
    for (int first = 0; first < head.rows; first += group) {
      float largest = 0, total = 0;
      for (int i = first; i < first + group; ++i) {
        const float logit = head.logits[i * head.slots + slot], sum = head.max_sum[2 * i + 1];
        if (logit == no_logit || sum == 0) continue;
        const float p = sum != sum ? sum : Block::exp2(logit - head.max_sum[2 * i]) / sum;
        total += p;
        largest = p > largest || p != p ? p : largest;
      }
      mass += kind == MassKind::max ? largest : kind == MassKind::mean ? total / static_cast<float>(group) : total;
    }
    head.mass[slot] = mass;
  }
};

}  // namespace detail
}  // namespace kvpare::cuda

// The kernel of `attend` for forms whose numbers become operands of mma in registers (fragments.cuh).
//
// A block does one task; its warps take the 16-token tiles in turn, each with a softmax of its own, joined at the end.
// While a warp multiplies keys, its values are on their way; while it multiplies values, its next keys are.
//
// Exponents: p = 2^(s - reference). The reference follows the largest s (plus the exponent of the token's value scale)
// only when it has grown by 2^6 or more, and lies 8 below it: probabilities times scales stay below 2^14, which an f16
// holds, and accumulators are seldom rescaled.
#pragma once

#include "fragments.cuh"
#include "tuning.cuh"
#include "warp_folds.cuh"

namespace kvpare::cuda::detail {

template <Codec K, Codec V, int D>
struct FusedAttend {
  using Keys = typename KeysOf<K, D>::type;
  using Values = typename ValuesOf<V, D>::type;
  static constexpr int threads = 128, warps = threads / 32;
  static constexpr int per_tile = 16;
  static constexpr int zero_groups = Values::has_zero ? Values::groups : 1;
  static constexpr int least_blocks = attend_tuning.blocks(
      D / 4 + static_cast<int>(sizeof(typename Keys::Registers) + sizeof(typename Values::Registers)) / 4 +
      2 * zero_groups + Keys::temporaries + Values::temporaries);
  AttendLayer layer;
  const AttendTask* tasks = nullptr;

  /// A page with its addresses worked out.
  struct alignas(16) Page {
    const std::byte *keys, *values;
    std::uint64_t seen;
    std::uint32_t by_all, index;
    Position first;
    std::uint32_t offsets;
    std::uint64_t unused;
  };
  static constexpr Index pages_bytes = pages_of_task * sizeof(Page);
  static constexpr Index query_bytes = D / 16 * 32 * 8;
  static constexpr Index queries_at = pages_bytes, low_at = queries_at + query_bytes,
                         sums_at = low_at + (Keys::may_split ? query_bytes : 0),
                         factors_at = sums_at + (Keys::has_sums ? 2 * Keys::groups * rows_of_task * 4 : 0),
                         biases_at = factors_at + rows_of_task * 4, sights_at = biases_at + rows_of_task * 4,
                         run_at = sights_at + rows_of_task * 8, rows_at = run_at + round_up(sizeof(AttendRun), 16),
                         loop_bytes = rows_at + rows_of_task * D * 4;
  static constexpr int joined_floats = rows_of_task * (D + 2);  // of a warp, at the end: max, sum, acc as in a partial
  KVPARE_HD Index shared_bytes() const {
    constexpr Index joined = warps * joined_floats * 4;
    return loop_bytes > joined ? loop_bytes : joined;
  }

  template <class Block>
  KVPARE_DEVICE void operator()(Block& b) const {
    const AttendTask task = tasks[b.block()];
    prepare(b, task, layer.runs[task.run]);
    const AttendRun& run = *b.template shared<AttendRun>(run_at);
    const int left = run.rows - task.first_row, rows = left < rows_of_task ? left : rows_of_task;
    const int g = b.lane() >> 2, t = b.lane() & 3;
    const auto* pages = b.template shared<Page>(0);
    const auto* factors = b.template shared<float>(factors_at);
    const auto* sights = b.template shared<RowSight>(sights_at);
    const QueryFragments q{b.template shared<std::uint32_t>(queries_at),
                           b.template shared<std::uint32_t>(low_at),
                           Keys::may_split && splits(run),
                           {factors[2 * t], factors[2 * t + 1]},
                           b.template shared<float>(sums_at),
                           b.template shared<float>(sums_at) + Keys::groups * rows_of_task};
    const float* key_state = innermost_state<K>(D, run.key_state);
    const float* value_state = innermost_state<V>(D, run.value_state);
    const auto* biases = b.template shared<float>(biases_at) + 2 * t;

    const int tiles_of_page = static_cast<int>(layer.page_tokens) / per_tile;
    const int shift = tiles_of_page == 1 ? 0 : tiles_of_page == 2 ? 1 : 2, tiles = task.page_count << shift;
    const auto seen_of = [&](int tile) {
      return static_cast<std::uint32_t>(pages[tile >> shift].seen >> ((tile & (tiles_of_page - 1)) * per_tile)) &
             0xffffu;
    };
    const auto seek = [&](int tile) {
      while (tile < tiles && seen_of(tile) == 0) tile += warps;
      return tile;
    };
    const auto keys_at = [&](int tile) {
      return TilePlace{pages[tile >> shift].keys, run.key_row_bytes, (tile & (tiles_of_page - 1)) * per_tile,
                       layer.page_tokens};
    };
    const auto values_at = [&](int tile) {
      return TilePlace{pages[tile >> shift].values, run.value_row_bytes, (tile & (tiles_of_page - 1)) * per_tile,
                       layer.page_tokens};
    };

    typename Keys::Registers k;
    typename Values::Registers v;
    float acc[D / 16][4] = {}, zeros[zero_groups][2] = {};
    float sum[2] = {}, reference[2] = {no_logit, no_logit};
    int tile = seek(b.warp());
    if (tile < tiles) {
      Keys::load(b, keys_at(tile), k);
      Values::load(b, values_at(tile), v);
    }
    while (tile < tiles) {
      const Page& page = pages[tile >> shift];
      const std::uint32_t seen = seen_of(tile);
      const int first = (tile & (tiles_of_page - 1)) * per_tile;
      float s[4];
      Keys::score(b, k, q, keys_at(tile), key_state, s);
      const int next = seek(tile + warps);
      if (next < tiles) Keys::load(b, keys_at(next), k);

      const bool by_all = page.by_all != 0;
      std::uint32_t sees = 0xf;  // bit 2h + j: query row 2t + j sees token g + 8h
      if constexpr (FoldedCodec<K>)
        KVPARE_DEVICE_UNROLL for (int i = 0; i < 4; ++i) s[i] += biases[i & 1];
      if (layer.softcap > 0)
        KVPARE_DEVICE_UNROLL for (int i = 0; i < 4; ++i) s[i] = capped(s[i], layer.softcap);
      if (!by_all || seen != 0xffffu) {
        sees = 0;
        KVPARE_DEVICE_UNROLL for (int h = 0; h < 2; ++h) {
          const int slot = g + 8 * h;
          const Position at = by_all ? 0 : position_of(run, layer, page.first, page.offsets, first + slot);
          KVPARE_DEVICE_UNROLL for (int j = 0; j < 2; ++j)
            if ((seen >> slot & 1u) != 0 && (by_all || sights[2 * t + j].sees(at))) sees |= 1u << (2 * h + j);
        }
        KVPARE_DEVICE_UNROLL for (int i = 0; i < 4; ++i) s[i] = (sees >> i & 1u) != 0 ? s[i] : no_logit;
      }
      if (run.logits != nullptr)
        KVPARE_DEVICE_UNROLL for (int i = 0; i < 4; ++i) {
          if (2 * t + (i & 1) < rows)
            run.logits[(task.first_row + 2 * t + (i & 1)) * run.slots + page.index * layer.page_tokens + first + g +
                       (i >> 1) * 8] = s[i];
        }

      float p[2][2];
      {
        float exponent[2] = {};
        if constexpr (Values::scaled)
          KVPARE_DEVICE_UNROLL for (int h = 0; h < 2; ++h) {
            exponent[h] = (seen >> (g + 8 * h) & 1u) != 0 ? Values::exponent(v, h, value_state) : 0.0f;
          }
        float alpha[2];
        bool moved = false;
        KVPARE_DEVICE_UNROLL for (int j = 0; j < 2; ++j) {
          float most = std::fmax(s[j] + exponent[0], s[2 + j] + exponent[1]);
          KVPARE_DEVICE_UNROLL for (int mask = 4; mask < 32; mask *= 2)
            most = std::fmax(most, b.shuffle_xor(most, mask));
          const bool moves = most > reference[j] + 14;
          const float now = moves ? most - 8 : reference[j];
          alpha[j] = moves ? Block::exp2(reference[j] - now) : 1.0f;
          reference[j] = now;
          moved = moved || moves;
        }
        if (b.ballot(moved) != 0) {
          KVPARE_DEVICE_UNROLL for (int j = 0; j < 2; ++j) {
            sum[j] *= alpha[j];
            KVPARE_DEVICE_UNROLL for (auto& zero : zeros) zero[j] *= alpha[j];
            KVPARE_DEVICE_UNROLL for (auto& c : acc) c[j] *= alpha[j], c[2 + j] *= alpha[j];
          }
        }
        KVPARE_DEVICE_UNROLL for (int j = 0; j < 2; ++j) {
          const float base = reference[j] == no_logit ? 0.0f : reference[j];
          KVPARE_DEVICE_UNROLL for (int h = 0; h < 2; ++h) p[h][j] = Block::exp2(s[2 * h + j] - base);
          sum[j] += p[0][j] + p[1][j];
        }
      }

      if constexpr (Values::may_be_nan)
        if (seen != 0xffffu) Values::clear(t, seen, v);
      // Where rows differ in what they see, 0 times an infinity must not happen.
      bool apart = false;
      if constexpr (!Values::coded) apart = !by_all && b.ballot(!Values::finite(v)) != 0;
      if (!apart)
        Values::accumulate(b, v, p, value_state, acc, zeros);
      else if constexpr (!Values::coded)
        accumulate_apart(b, v, p, sees, acc);
      if (next < tiles) Values::load(b, values_at(next), v);
      tile = next;
    }
    join(b, task, run, sum, reference, acc, zeros);
  }

 private:
  /// Does a query need two numbers of 16 bits? Not where it has no more digits than a key.
  static KVPARE_DEVICE bool splits(const AttendRun& run) {
    if constexpr (Keys::may_split)
      return run.query_type != Keys::type && !(Keys::type == DType::f16 && run.query_type == DType::bf16);
    else
      return false;
  }

  /// Pages and query rows into shared memory. A row is scaled by a power of two to at most 2^norm.
  template <class Block>
  KVPARE_DEVICE void prepare(Block& b, const AttendTask& task, const AttendRun& there) const {
    const AttendRun run = there;
    const int left = run.rows - task.first_row, rows = left < rows_of_task ? left : rows_of_task;
    if (b.thread() == 0) *b.template shared<AttendRun>(run_at) = run;
    auto* pages = b.template shared<Page>(0);
    auto* high = b.template shared<std::uint32_t>(queries_at);
    auto* low = b.template shared<std::uint32_t>(low_at);
    auto* sums = b.template shared<float>(sums_at);
    auto* factors = b.template shared<float>(factors_at);
    auto* biases = b.template shared<float>(biases_at);
    auto* sights = b.template shared<RowSight>(sights_at);
    auto* staged = b.template shared<float>(rows_at);  // [8][D]
    for (int i = b.thread(); i < task.page_count; i += threads) {
      const SeenPage page = page_of(run, layer, task.first_page + i);
      pages[i] = {run.keys + page.page * run.key_page_bytes,
                  run.values + page.page * run.value_page_bytes,
                  page.seen,
                  page.by_all ? 1u : 0u,
                  page.index,
                  page.first,
                  page.offsets,
                  0};
    }
    for (int i = b.warp(); i < rows_of_task; i += warps) {
      float x[lane_numbers<D>] = {};
      if (i < rows) {
        const std::byte* row = query_row(run, layer, task.first_row + i);
        KVPARE_DEVICE_UNROLL for (int e = 0; e < lane_numbers<D>; ++e)
          if (has_number<D>(e, b.lane())) x[e] = number_at(b, row, run.query_type, e * 32 + b.lane());
      }
      float bias = WarpFold<K, D>::query(b, run.key_state, x);
      if constexpr (FoldedCodec<K>) bias = warp_sum(b, bias);
      float most = 0;
      KVPARE_DEVICE_UNROLL for (int e = 0; e < lane_numbers<D>; ++e) {
        if (!has_number<D>(e, b.lane())) continue;
        most = std::fmax(most, std::fabs(x[e]));
        staged[i * D + e * 32 + b.lane()] = x[e];
      }
      most = warp_max(b, most);
      if (b.lane() == 0) {
        factors[i] = static_cast<float>(exponent_of(most));
        biases[i] = bias * layer.factor;
        sights[i] = i < rows ? row_sight(run, layer, task.first_row + i)
                             : RowSight{std::numeric_limits<Position>::min(), std::numeric_limits<Position>::max()};
      }
    }
    b.sync();
    const bool split = splits(run);
    for (int x = b.thread(); x < D / 16 * 32 * 2; x += threads) {
      const int r = x / 64 * 2 + x % 2, lane = x / 2 % 32, i = lane >> 2;
      const float scale =
          power_of_two(Keys::norm - static_cast<int>(factors[i])) * power_of_two(Keys::gain(r) - Keys::most_gain);
      const float numbers[2] = {staged[i * D + Keys::channel(lane & 3, r, 0)] * scale,
                                staged[i * D + Keys::channel(lane & 3, r, 1)] * scale};
      const std::uint32_t rounded = Block::pack(numbers[0], numbers[1], typename Keys::Kind{});
      high[x] = rounded;
      if constexpr (Keys::may_split) {
        if (split)
          low[x] = Block::pack(numbers[0] - Block::unpack_low(rounded, typename Keys::Kind{}),
                               numbers[1] - Block::unpack_high(rounded, typename Keys::Kind{}), typename Keys::Kind{});
      }
    }
    if constexpr (Keys::has_sums) {
      for (int x = b.warp(); x < Keys::groups * rows_of_task; x += warps) {
        const int part = x / rows_of_task, i = x % rows_of_task;
        const float norm = power_of_two(Keys::norm - static_cast<int>(factors[i]));
        float sum = 0, lost = 0;
        for (int c = b.lane(); c < Keys::group; c += 32) {
          const float number = staged[i * D + part * Keys::group + c], scaled = number * norm;
          sum += number;
          lost += scaled - Block::unpack_low(Block::pack(scaled, 0, F16{}), F16{});
        }
        sum = warp_sum(b, sum), lost = warp_sum(b, lost);
        if (b.lane() == 0) {
          sums[x] = sum * layer.factor;
          sums[Keys::groups * rows_of_task + x] = lost * (Keys::middle * power_of_two(-Keys::most_gain));
        }
      }
    }
    b.sync();
    if (b.thread() < rows_of_task)
      factors[b.thread()] = layer.factor * Keys::code_factor *
                            Keys::state_factor(innermost_state<K>(D, run.key_state)) *
                            power_of_two(Keys::most_gain + static_cast<int>(factors[b.thread()]) - Keys::norm);
    b.sync();
  }
  /// 2^e at least `most`, for numbers of sane size.
  static KVPARE_DEVICE int exponent_of(float most) {
    if (!(most > 0 && most < 0x1p90f)) return 0;
    const int e = static_cast<int>(std::bit_cast<std::uint32_t>(most) >> 23) - 126;
    return e < -90 ? -90 : e;
  }

  template <class Block>
  static KVPARE_DEVICE void accumulate_apart(Block& b, const typename Values::Registers& v, const float (&p)[2][2],
                                             std::uint32_t sees, float (&acc)[D / 16][4]) {
    std::uint32_t lanes[4];  // that have bit i of `sees`
    KVPARE_DEVICE_UNROLL for (int i = 0; i < 4; ++i) lanes[i] = b.ballot((sees >> i & 1u) != 0);
    const auto seen_by = [&](int column) {
      const std::uint32_t low = (column & 1) != 0 ? lanes[1] : lanes[0], high = (column & 1) != 0 ? lanes[3] : lanes[2];
      std::uint32_t tokens = 0;
      KVPARE_DEVICE_ROLL for (int g = 0; g < 8; ++g)
        tokens |= (low >> (g * 4 + (column >> 1)) & 1u) << g | (high >> (g * 4 + (column >> 1)) & 1u) << (g + 8);
      return tokens;
    };
    Values::accumulate_apart(b, v, p, seen_by, acc);
  }

  /// Warps add up in their order; the block leaves one partial.
  template <class Block>
  KVPARE_DEVICE void join(Block& b, const AttendTask& task, const AttendRun& run, float (&sum)[2],
                          const float (&reference)[2], const float (&acc)[D / 16][4],
                          float (&zeros)[zero_groups][2]) const {
    const int g = b.lane() >> 2, t = b.lane() & 3;
    KVPARE_DEVICE_UNROLL for (int mask = 4; mask < 32; mask *= 2)
      KVPARE_DEVICE_UNROLL for (int j = 0; j < 2; ++j) {
        sum[j] += b.shuffle_xor(sum[j], mask);
        if constexpr (Values::has_zero)
          KVPARE_DEVICE_UNROLL for (auto& zero : zeros) zero[j] += b.shuffle_xor(zero[j], mask);
      }
    const float* state = run.value_state;
    const float factor = Values::state_factor(innermost_state<V>(D, state));
    b.sync();  // all are done with what lies in shared memory
    auto* all = b.template shared<float>(0);
    float* own = all + b.warp() * joined_floats;
    KVPARE_DEVICE_UNROLL for (int j = 0; j < 2; ++j) {
      const int i = 2 * t + j;
      if (g == 0) own[i] = reference[j], own[rows_of_task + i] = sum[j];
      KVPARE_DEVICE_UNROLL for (int m = 0; m < D / 16; ++m)
        KVPARE_DEVICE_UNROLL for (int h = 0; h < 2; ++h) {
          const int r = 2 * m + h;
          float x = acc[m][2 * h + j] * (Values::output_factor(r) * factor);
          if constexpr (Values::has_zero) x += Values::zero_of(zeros, g, r, j);
          own[2 * rows_of_task + i * D + Values::channel(g, r)] = x;
        }
    }
    b.sync();
    float* out = layer.states + task.partial * partial_floats(D);
    for (int i = b.warp(); i < rows_of_task; i += warps) {
      float peak = no_logit;
      KVPARE_DEVICE_UNROLL for (int w = 0; w < warps; ++w) peak = std::fmax(peak, all[w * joined_floats + i]);
      const float base = peak == no_logit ? 0.0f : peak;
      float total = 0, x[lane_numbers<D>] = {};
      KVPARE_DEVICE_UNROLL for (int w = 0; w < warps; ++w) {
        const float* of_warp = all + w * joined_floats;
        const float sum_w = of_warp[rows_of_task + i];
        const float weight = sum_w == 0 ? 0.0f : sum_w != sum_w ? sum_w : Block::exp2(of_warp[i] - base);
        total += sum_w * weight;
        if (weight != 0)
          KVPARE_DEVICE_UNROLL for (int e = 0; e < lane_numbers<D>; ++e)
            if (has_number<D>(e, b.lane())) x[e] += of_warp[2 * rows_of_task + i * D + e * 32 + b.lane()] * weight;
      }
      WarpFold<V, D>::output(b, state, total, x);
      KVPARE_DEVICE_UNROLL for (int e = 0; e < lane_numbers<D>; ++e)
        if (has_number<D>(e, b.lane())) out[2 * rows_of_task + i * D + e * 32 + b.lane()] = x[e];
      if (b.lane() == 0) out[i] = peak, out[rows_of_task + i] = total;
    }
  }
};

}  // namespace kvpare::cuda::detail

// Attention probabilities of chosen rows, summed per key, on a CPU: the verb most scorers stand on.
//
// Per kv head, the keys that the mask lets through are listed, by entry. Query vectors (row × query head) then go through
// in tiles: logits of a tile against all listed keys, softmax over what each row sees, addition into the output row. Since
// positions ascend with the slot, what a row sees is one stretch of the list. With many query vectors the keys are first
// packed for the product, in their own type. Partial outputs are added in a fixed order, whatever the number of threads.
//
// Scratch   per thread a tile of logits, mass_tile × listed keys floats; with more than few_vectors query vectors the
//           listed keys once more, packed; per task one output row per member
#pragma once

#include <algorithm>
#include <vector>

#include "../arguments.hpp"
#include "attend.hpp"
#include "rows.hpp"
#include "team.hpp"

namespace kvpare::cpu {

namespace detail {

inline constexpr Index mass_tile =
    48;  // query vectors per tile, a multiple of 12: their logits against 8k keys fill 1.6 MB
inline constexpr Index few_vectors = 64;  // up to so many, reading the rows where they lie beats packing them
inline constexpr Index mass_stripes = 4;  // at least so many (kv head, stripe of rows) tasks, if there are rows enough
inline constexpr Index packing_pieces = 4;  // tasks per head for packing

/// The keys of one head that the mask lets through, in order of position: key i of the list is the next set bit. Pages whose
/// positions interleave are cut into parts that do not.
struct ListedKeys {
  struct Part {
    Index entry, begin;  // begin: the first of its keys
    std::uint64_t word;
    Position last;  // of its keys
    Index count() const { return std::popcount(word); }
  };
  const HeadPages* pages = nullptr;
  const std::int32_t* column_of = nullptr;
  std::vector<Part> parts;
  Index size = 0;

  ListedKeys() = default;
  ListedKeys(const HeadPages& list, const std::uint64_t* mask, const std::int32_t* columns)
      : pages(&list), column_of(columns) {
    parts.reserve(list.entries.size());
    for (Index e = 0; e < static_cast<Index>(list.entries.size()); ++e) {
      const std::uint64_t live = entry(e).live, word = mask != nullptr ? live & mask[e] : live;
      if (word == 0) continue;
      parts.push_back({e, size, word, entry(e).last});
      size += parts.back().count();
    }
    const auto follows = [&](const Part& a, const Part& b) { return entry(a).last >= entry(b).first; };
    if (std::adjacent_find(parts.begin(), parts.end(), follows) != parts.end()) cut_where_they_interleave();
  }

  void cut_where_they_interleave() {
    struct Key {
      Position position;
      Index entry, slot;
    };
    std::vector<Key> keys;
    keys.reserve(static_cast<std::size_t>(size));
    for (const Part& p : parts)
      for_each_bit(p.word, [&](Index s) { keys.push_back({pages->position(entry(p), s), p.entry, s}); });
    std::sort(keys.begin(), keys.end(), [](const Key& a, const Key& b) { return a.position < b.position; });
    parts.clear();
    for (std::size_t i = 0; i < keys.size(); ++i) {
      if (i == 0 || keys[i].entry != keys[i - 1].entry) parts.push_back({keys[i].entry, static_cast<Index>(i), 0, 0});
      parts.back().word |= std::uint64_t{1} << keys[i].slot;
      parts.back().last = keys[i].position;
    }
  }

  const Entry& entry(Index e) const { return pages->entries[static_cast<std::size_t>(e)]; }
  const Entry& entry(const Part& p) const { return entry(p.entry); }
  Index column(const Part& p, Index slot) const {
    const Index at = p.entry * pages->page_tokens + slot;
    return column_of != nullptr ? column_of[at] : at;
  }

  /// How many listed keys stand at positions <= limit.
  Index before(Index limit) const {
    const auto part =
        std::partition_point(parts.begin(), parts.end(), [&](const Part& p) { return p.last <= limit; });
    if (part == parts.end()) return size;
    Index n = part->begin;
    const Entry& e = entry(*part);
    if (e.offsets == 0) {
      const Index seen = limit - e.first + 1;
      return seen <= 0 ? n : n + std::popcount(part->word & low_bits(seen));
    }
    for_each_bit(part->word, [&](Index s) { n += pages->position(e, s) <= limit; });
    return n;
  }

  /// Calls f(key, column) for each.
  template <class F>
  void for_each(F&& f) const {
    for (const Part& p : parts) {
      Index key = p.begin;
      for_each_bit(p.word, [&](Index s) { f(key++, column(p, s)); });
    }
  }

  /// to[column of key i] += from[i].
  void scatter_add(const Kernels& k, const float* from, float* to) const {
    for (const Part& p : parts) {
      const Index first = std::countr_zero(p.word);
      if (column_of == nullptr && p.word == low_bits(p.count()) << first) {
        k.add_scaled(from + p.begin, p.count(), 1, to + column(p, first));
      } else {
        Index key = p.begin;
        for_each_bit(p.word, [&](Index s) { to[column(p, s)] += from[key++]; });
      }
    }
  }
};

/// One query vector at work: a row, a query head of the group, and its weight.
struct MassVector {
  Index row, member;
  float weight;
};

/// The listed keys of one head, packed for products with many query vectors: in their own type, or as floats where they
/// are coded or of several types.
class PackedKeys {
 public:
  void reserve(const Kernels& k, const ListedKeys& keys, Index width) {
    type_ = DType::f32;
    as_floats_ = false;
    for (std::size_t i = 0; i < keys.parts.size(); ++i) {
      const PageGeometry& g = format(keys, keys.parts[i]);
      as_floats_ = as_floats_ || g.key_codec != nullptr || (i > 0 && g.key_type != type_);
      type_ = g.key_type;
    }
    if (as_floats_) type_ = DType::f32;
    panel_bytes_ = k.panel_bytes(width, type_);
    memory_.resize(static_cast<std::size_t>(panels(k, keys) * panel_bytes_) + 64);
  }
  Index panels(const Kernels& k, const ListedKeys& keys) const { return ceil_div(keys.size, k.panel_tokens); }

  /// Panels [first, end).
  void pack(const Kernels& k, const ListedKeys& keys, Index width, Index first, Index end) {
    const std::byte* rows[64];
    auto part = std::partition_point(keys.parts.begin(), keys.parts.end(),
                                     [&](const auto& p) { return p.begin + p.count() <= first * k.panel_tokens; });
    if (first >= end) return;
    float* floats = as_floats_ ? Scratch::fresh().floats(64 * width) : nullptr;
    std::uint64_t left = part->word;
    for (Index skip = first * k.panel_tokens - part->begin; skip > 0; --skip) left &= left - 1;
    for (Index panel = first; panel < end; ++panel) {
      const Index count = std::min(k.panel_tokens, keys.size - panel * k.panel_tokens);
      for (Index i = 0; i < count; ++i) {
        if (left == 0) left = (++part)->word;
        const Entry& e = keys.entry(*part);
        const Index slot = std::countr_zero(left);
        if (as_floats_) {
          SideOf(format(keys, *part), e.page, Side::keys)
              .read(k, {keys.pages->page_tokens, width}, slot, keys.pages->position(e, slot),
                    keys.pages->state_of(e).keys, floats + i * width);
          rows[i] = reinterpret_cast<const std::byte*>(floats + i * width);
        } else {
          rows[i] = format(keys, *part).key_row(e.page, slot);
        }
        left &= left - 1;
      }
      k.pack_panel(rows, count, width, type_, data() + panel * panel_bytes_);
    }
  }

  /// logits[i * stride + key] for keys of panels [0, end).
  void dot(const Kernels& k, const float* q, Index q_stride, Index count, Index width, Index end, float* logits,
           Index stride) const {
    for (Index panel = 0; panel < end; ++panel)
      k.dot_panel(q, q_stride, count, width, data() + panel * panel_bytes_, type_, logits + panel * k.panel_tokens,
                  stride);
  }

 private:
  static const PageGeometry& format(const ListedKeys& keys, const ListedKeys::Part& p) {
    return keys.pages->formats[keys.entry(p).format];
  }
  std::byte* data() { return reinterpret_cast<std::byte*>(round_up(reinterpret_cast<Index>(memory_.data()), 64)); }
  const std::byte* data() const { return const_cast<PackedKeys*>(this)->data(); }

  std::vector<std::byte> memory_;
  Index panel_bytes_ = 0;
  DType type_ = DType::f32;
  bool as_floats_ = false;
};

/// Logits of a few query vectors against the first `end` listed keys, read where they lie.
inline void dot_listed(const Kernels& k, const ListedKeys& keys, Index key_dim, const float* q, Index q_stride,
                       Index count, Index end, Scratch& scratch, float* logits, Index stride) {
  VisibleSlots now, next;
  PreparedQueries prepared(k, q, q_stride, count, key_dim);
  const auto geometry = [&](const ListedKeys::Part& p) -> const PageGeometry& {
    return keys.pages->formats[keys.entry(p).format];
  };
  for (std::size_t i = 0; i < keys.parts.size() && keys.parts[i].begin < end; ++i) {
    const ListedKeys::Part& part = keys.parts[i];
    const PageGeometry& g = geometry(part);
    const Entry& e = keys.entry(part);
    const bool more = i + 1 < keys.parts.size();
    now.list(part.word);
    if (const auto* ops = static_cast<const TileOps*>(g.key_codec); ops != nullptr) {
      AheadBytes ahead;
      if (more) {
        const PageGeometry& g_ahead = geometry(keys.parts[i + 1]);
        ahead = {g_ahead.key_row(keys.entry(keys.parts[i + 1]).page, 0), g_ahead.key_tile_bytes};
      }
      const float* state = keys.pages->state_of(e).keys;
      ops->score(k, prepared.of(e.format, *ops, state, scratch), count,
                 coded_rows(*keys.pages, e, *ops, g.key_row(e.page, 0), key_dim, state, now), ahead, logits + part.begin,
                 stride);
      continue;
    }
    RowSet ahead;
    if (more && geometry(keys.parts[i + 1]).key_codec == nullptr) {
      next.list(keys.parts[i + 1].word);
      ahead = key_rows(geometry(keys.parts[i + 1]), keys.entry(keys.parts[i + 1]), next);
    }
    k.dot(q, q_stride, count, key_dim, key_rows(g, e, now), ahead, logits + part.begin, stride);
  }
}

}  // namespace detail

template <class Logit, class EntryOf>
void attention_mass(const Team& team, const MassArguments<Logit, EntryOf>& a) {
  using namespace detail;
  const Kernels& k = *team.kernels;
  const LayerShape& shape = *a.shape;
  const Index heads = shape.kv_heads, group = shape.group(), parts = a.parts(), width = shape.key_dim;
  constexpr bool plain_logit = requires { Logit::plain; };
  constexpr bool plain_entry = requires { EntryOf::plain; };

  const Index row_total = a.row_list != nullptr ? *a.row_count : a.queries.rows;
  const auto row_at = [&](Index i) { return a.row_list != nullptr ? a.row_list[i] : i; };
  const auto weight_of = [&](Index row, Index q_head) {
    if (a.row_weights == nullptr) return 1.0f;
    return a.per_head_weights ? a.row_weights[row * shape.q_heads + q_head] : a.row_weights[row];
  };
  Index row_used = 0;
  for (Index i = 0; i < row_total; ++i) {
    bool any = false;
    for (Index h = 0; h < (a.per_head_weights ? shape.q_heads : 1) && !any; ++h) any = weight_of(row_at(i), h) != 0;
    row_used += any;
  }
  if (row_used == 0) return;

  // Partial outputs: [kv head][stripe][part][group member or 1][listed keys].
  const bool apart = a.heads == HeadGroups::query_head || a.take_max;  // a maximum is joined over heads only at the end
  const Index members = apart ? group : 1;
  const Index stripes =
      std::clamp<Index>(ceil_div(row_used * group, 4 * mass_tile), 1, std::max<Index>(1, mass_stripes / heads));
  const float joined = apart ? 1.0f : 1.0f / static_cast<float>(a.heads == HeadGroups::layer ? shape.q_heads : group);

  std::vector<ListedKeys> keys;
  for (std::size_t h = 0; h < static_cast<std::size_t>(heads); ++h)
    keys.emplace_back(a.keys[h], a.key_mask.empty() ? nullptr : a.key_mask[h],
                      a.column_of.empty() ? nullptr : a.column_of[h]);
  thread_local std::vector<PackedKeys> packed_memory;  // of the calling thread: kept for the next call
  std::vector<PackedKeys>& packed = packed_memory;
  const bool many = row_used * group > few_vectors;
  if (many) {
    packed.resize(std::max(packed.size(), keys.size()));
    for (std::size_t h = 0; h < keys.size(); ++h) packed[h].reserve(k, keys[h], width);
    PackedKeys* to = packed.data();
    team.run(heads * packing_pieces, [&](Index task) {
      const Index h = task / packing_pieces, piece = task % packing_pieces;
      const ListedKeys& listed = keys[static_cast<std::size_t>(h)];
      const Index panels = to[h].panels(k, listed);
      to[h].pack(k, listed, width, panels * piece / packing_pieces, panels * (piece + 1) / packing_pieces);
    });
  }

  std::vector<std::vector<float>> partial(static_cast<std::size_t>(heads * stripes));
  const PackedKeys* panels_of = packed.data();
  team.run(heads * stripes, [&](Index task) {
    const Index h = task / stripes, stripe = task % stripes;
    const ListedKeys& listed = keys[static_cast<std::size_t>(h)];
    const Index n = listed.size, stride = round_up(std::max<Index>(n, 1), 64), q_stride = round_up(width, 16);
    std::vector<float>& out = partial[static_cast<std::size_t>(task)];
    if (a.out != nullptr) out.assign(static_cast<std::size_t>(parts * members * n), 0.0f);
    std::vector<std::int32_t> columns;  // of the listed keys, where something asks for them
    if (!plain_logit || !plain_entry || parts == 2) {
      columns.resize(static_cast<std::size_t>(n));
      listed.for_each(
          [&](Index key, Index column) { columns[static_cast<std::size_t>(key)] = static_cast<std::int32_t>(column); });
    }

    std::vector<MassVector> vectors;
    for (Index i = row_total * stripe / stripes; i < row_total * (stripe + 1) / stripes; ++i)
      for (Index m = 0; m < group; ++m)
        if (const float w = weight_of(row_at(i), h * group + m); w != 0) vectors.push_back({row_at(i), m, w});

    Scratch& scratch = Scratch::fresh();
    float* q = scratch.floats(mass_tile * q_stride);
    float* logits = scratch.floats(mass_tile * stride);
    float* tanh_scratch = shape.softcap > 0 ? scratch.floats(stride) : nullptr;
    for (Index first = 0; first < static_cast<Index>(vectors.size()); first += mass_tile) {
      const Index count = std::min(mass_tile, static_cast<Index>(vectors.size()) - first);
      Position highest = std::numeric_limits<Position>::min();
      for (Index i = 0; i < count; ++i) {
        const MassVector& v = vectors[static_cast<std::size_t>(first + i)];
        k.to_float(static_cast<const std::byte*>(a.queries.at(v.row, h * group + v.member)), a.queries.dtype, width,
                   q + i * q_stride);
        k.multiply(q + i * q_stride, width, query_factor(shape));
        highest = std::max(highest, a.row_positions[v.row]);
      }
      const Index reach = listed.before(highest);
      if (many)
        panels_of[h].dot(k, q, q_stride, count, width, ceil_div(reach, k.panel_tokens), logits, stride);
      else
        dot_listed(k, listed, width, q, q_stride, count, reach, scratch, logits, stride);

      for (Index i = 0; i < count; ++i) {
        const MassVector& v = vectors[static_cast<std::size_t>(first + i)];
        const Index at = v.row * shape.q_heads + h * group + v.member;
        const Sight sight = sight_of(a.row_positions[v.row], shape.window);
        const Index to = listed.before(sight.high);
        const Index from = shape.window > 0 ? std::min(to, listed.before(sight.low)) : 0;
        float* x = logits + i * stride + from;
        const Index seen = to - from;
        if (shape.softcap > 0) cap_logits(k, x, seen, shape.softcap, tanh_scratch);
        if constexpr (!plain_logit)
          for (Index j = 0; j < seen; ++j)
            x[j] = log2_e * a.logit(x[j] * ln_2, v.row, columns[static_cast<std::size_t>(from + j)]);

        float lse2;       // log2 of the denominator
        float scale = 1;  // x * scale = p
        if (a.lse != nullptr) {
          lse2 = a.lse[at] * log2_e;
          k.exp2_shift_sum(x, seen, lse2);
        } else {
          const float extra = a.extra != nullptr ? a.extra[at] * log2_e : minus_infinity;
          const float peak = std::max(k.max_of(x, seen), extra);
          // Only -inf, or NaN, is left to be seen when there is no peak: a shift of 0 keeps both.
          const float sum = k.exp2_shift_sum(x, seen, peak == minus_infinity ? 0.0f : peak) +
                            (extra == minus_infinity ? 0.0f : std::exp2(extra - peak));
          lse2 = sum == 0 ? minus_infinity : (peak == minus_infinity ? 0.0f : peak) + std::log2(sum);
          if (sum != 0) scale = 1 / sum;
        }
        const bool nothing = seen == 0 || lse2 == minus_infinity;
        const bool wants_p = a.row_peak != nullptr || a.row_near_peak != nullptr || a.row_part_mass != nullptr ||
                             !plain_entry || parts == 2;
        if (wants_p && scale != 1) {
          k.multiply(x, seen, scale);
          scale = 1;
        }
        if (a.row_lse != nullptr) a.row_lse[at] = seen == 0 ? minus_infinity : lse2 * ln_2;
        if (a.row_peak != nullptr || a.row_near_peak != nullptr) {
          const float peak = nothing ? 0 : std::max(0.0f, k.max_of(x, seen));  // 0 when all is NaN
          if (a.row_peak != nullptr) a.row_peak[at] = peak;
          if (a.row_near_peak != nullptr)
            a.row_near_peak[at] =
                nothing ? 0 : std::count_if(x, x + seen, [&](float p) { return p >= a.peak_share * peak; });
        }
        const auto part_of = [&](Index j) -> Index {
          return parts == 1 || a.key_class[columns[static_cast<std::size_t>(from + j)]] == a.row_class[v.row] ? 0 : 1;
        };
        if (a.row_part_mass != nullptr) {
          float part_mass[2] = {0, 0};
          for (Index j = 0; j < seen && !nothing; ++j) part_mass[part_of(j)] += x[j];
          for (Index p = 0; p < parts; ++p) a.row_part_mass[p * a.queries.rows * shape.q_heads + at] = part_mass[p];
        }
        if (nothing || a.out == nullptr) continue;
        if constexpr (!plain_entry)
          for (Index j = 0; j < seen; ++j) x[j] = a.entry(x[j], v.row, columns[static_cast<std::size_t>(from + j)]);
        float* row_out = out.data() + (apart ? v.member : 0) * n + from;
        const float factor = v.weight * joined * scale;
        if (parts == 1) {
          if (a.take_max)
            k.max_scaled(x, seen, factor, row_out);
          else
            k.add_scaled(x, seen, factor, row_out);
        } else {
          for (Index j = 0; j < seen; ++j) {
            float& o = row_out[part_of(j) * members * n + j];
            o = a.take_max ? std::max(o, factor * x[j]) : o + factor * x[j];
          }
        }
      }
    }
  });

  if (a.seen != nullptr)
    team.run(heads, [&](Index h) {
      const ListedKeys& listed = keys[static_cast<std::size_t>(h)];
      std::vector<double> step(static_cast<std::size_t>(listed.size) + 1, 0.0);
      for (Index i = 0; i < row_total; ++i) {
        double w = 0;
        for (Index m = 0; m < group; ++m) w += weight_of(row_at(i), h * group + m);
        if (w == 0) continue;
        const Sight sight = sight_of(a.row_positions[row_at(i)], shape.window);
        const Index to = listed.before(sight.high),
                    from = shape.window > 0 ? std::min(to, listed.before(sight.low)) : 0;
        step[static_cast<std::size_t>(from)] += w / static_cast<double>(group);
        step[static_cast<std::size_t>(to)] -= w / static_cast<double>(group);
      }
      double running = 0;
      listed.for_each([&](Index key, Index column) {
        running += step[static_cast<std::size_t>(key)];
        a.seen[h * a.columns + column] += static_cast<float>(running);
      });
    });

  if (a.out == nullptr) return;
  const Index out_heads = a.out_heads();
  // Maxima of a layer are summed over its kv heads before they may meet what `out` held.
  std::vector<float> layer_peaks;
  if (a.take_max && a.heads == HeadGroups::layer) layer_peaks.assign(static_cast<std::size_t>(parts * a.columns), 0.0f);
  const auto add_head = [&](Index h) {  // partial outputs of one kv head into the caller's rows, stripe by stripe
    const ListedKeys& listed = keys[static_cast<std::size_t>(h)];
    const Index n = listed.size;
    const auto partial_row = [&](Index stripe, Index p, Index m) {
      return partial[static_cast<std::size_t>(h * stripes + stripe)].data() + (p * members + m) * n;
    };
    std::vector<float> joined_row;
    for (Index p = 0; p < parts; ++p)
      for (Index m = 0; m < (a.heads == HeadGroups::query_head ? group : 1); ++m) {
        const Index row = a.heads == HeadGroups::layer ? 0 : a.heads == HeadGroups::kv_head ? h : h * group + m;
        float* to = (layer_peaks.empty() ? a.out : layer_peaks.data()) + (p * out_heads + row) * a.columns;
        if (!a.take_max) {
          for (Index s = 0; s < stripes; ++s) listed.scatter_add(k, partial_row(s, p, m), to);
          continue;
        }
        // A maximum over the rows of each query head, then the mean over the heads joined.
        joined_row.assign(static_cast<std::size_t>(n), 0.0f);
        const Index first = a.heads == HeadGroups::query_head ? m : 0,
                    last = a.heads == HeadGroups::query_head ? m + 1 : group;
        for (Index g = first; g < last; ++g) {
          for (Index s = 1; s < stripes; ++s)
            k.max_scaled(partial_row(s, p, g), n, 1, const_cast<float*>(partial_row(0, p, g)));
          k.add_scaled(partial_row(0, p, g), n,
                       1.0f / static_cast<float>(a.heads == HeadGroups::layer ? shape.q_heads : last - first),
                       joined_row.data());
        }
        listed.for_each([&](Index key, Index column) {
          float& o = to[column];
          const float value = joined_row[static_cast<std::size_t>(key)];
          o = a.heads == HeadGroups::layer ? o + value : std::max(o, value);
        });
      }
  };
  if (a.heads != HeadGroups::layer) {
    team.run(heads, add_head);
    return;
  }
  for (Index h = 0; h < heads; ++h) add_head(h);
  for (std::size_t i = 0; i < layer_peaks.size(); ++i) a.out[i] = std::max(a.out[i], layer_peaks[i]);
}

}  // namespace kvpare::cpu

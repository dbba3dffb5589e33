// Attention probabilities of chosen rows, summed per key, on a CPU: the verb most scorers stand on.
//
// Per kv head, the keys that the mask lets through are listed once; query vectors (row × query head) then go through in
// tiles: logits of a tile against all listed keys, softmax over what each row sees, addition into the output row. Since
// positions ascend with the slot, what a row sees is one contiguous stretch of the list. Partial outputs are added in a
// fixed order, whatever the number of threads.
#pragma once

#include <algorithm>
#include <vector>

#include "../arguments.hpp"
#include "attend.hpp"
#include "team.hpp"

namespace kvpare::cpu {

namespace detail {

inline constexpr Index mass_tile = 32;       // query vectors per tile: their logits against 8k keys fill a level-2 cache
inline constexpr Index mass_stripes = 4;     // at least so many (kv head, stripe of rows) tasks, if there are rows enough

/// The keys of one head that the mask lets through, in order of position.
struct ListedKeys {
  struct Part {
    Index entry, begin;            // first of its keys in the list
    std::uint64_t word;
  };
  std::vector<Part> parts;
  std::vector<std::int32_t> columns;
  std::vector<Position> positions;

  Index size() const { return static_cast<Index>(positions.size()); }
  Index before(Index limit) const {  // keys at positions <= limit
    return std::upper_bound(positions.begin(), positions.end(), limit, [](Index l, Position p) { return l < p; }) - positions.begin();
  }
};

inline ListedKeys list_keys(const HeadPages& list, const std::uint64_t* mask, const std::int32_t* column_of) {
  ListedKeys keys;
  for (Index e = 0; e < static_cast<Index>(list.entries.size()); ++e) {
    const Entry& entry = list.entries[static_cast<std::size_t>(e)];
    const std::uint64_t word = mask != nullptr ? entry.live & mask[e] : entry.live;
    if (word == 0) continue;
    keys.parts.push_back({e, keys.size(), word});
    for_each_bit(word, [&](Index s) {
      const Index slot = e * list.page_tokens + s;
      keys.columns.push_back(column_of != nullptr ? column_of[slot] : static_cast<std::int32_t>(slot));
      keys.positions.push_back(list.position(entry, s));
    });
  }
  return keys;
}

/// One query vector at work: a row, a query head of the group, and its weight.
struct MassVector {
  Index row, member;
  float weight;
};

/// Logits (log2 units unless capped) of `count` prepared vectors against all listed keys up to position `highest`.
inline void tile_logits(const Kernels& k, const HeadPages& list, const ListedKeys& keys, Index key_dim, const float* q,
                        Index q_stride, Index count, Position highest, float* logits, Index stride) {
  VisibleSlots now, next;
  for (std::size_t i = 0; i < keys.parts.size(); ++i) {
    const auto& part = keys.parts[i];
    const Entry& e = list.entries[static_cast<std::size_t>(part.entry)];
    if (e.first > highest) break;
    if (i == 0) now.list(part.word);
    next.count = 0;
    const bool more = i + 1 < keys.parts.size();
    if (more) next.list(keys.parts[i + 1].word);
    const Entry& ahead = list.entries[static_cast<std::size_t>(keys.parts[more ? i + 1 : i].entry)];
    k.dot(q, q_stride, count, key_dim, key_rows(list.formats[e.format], e, now),
          key_rows(list.formats[ahead.format], ahead, next), logits + part.begin, stride);
    std::swap(now, next);
  }
}

}  // namespace detail

template <class Logit, class EntryOf>
void attention_mass(const Team& team, const MassArguments<Logit, EntryOf>& a) {
  using namespace detail;
  const Kernels& k = *team.kernels;
  const LayerShape& shape = *a.shape;
  const Index heads = shape.kv_heads, group = shape.group(), parts = a.parts();
  constexpr bool plain_logit = requires { Logit::plain; };
  constexpr bool plain_entry = requires { EntryOf::plain; };

  const Index row_total = a.row_list != nullptr ? *a.row_count : a.queries.rows;
  const auto row_at = [&](Index i) { return a.row_list != nullptr ? a.row_list[i] : i; };
  const auto weight_of = [&](Index row, Index q_head) {
    if (a.row_weights == nullptr) return 1.0f;
    return a.per_head_weights ? a.row_weights[row * shape.q_heads + q_head] : a.row_weights[row];
  };

  // Partial outputs: [kv head][stripe][part][group member or 1][listed keys].
  const bool apart = a.heads == HeadGroups::query_head || a.take_max;  // a maximum is joined over heads only at the end
  const Index members = apart ? group : 1;
  const Index stripes = std::clamp<Index>(ceil_div(row_total * group, 4 * mass_tile), 1, std::max<Index>(1, mass_stripes / heads));
  const float joined = apart ? 1.0f
                             : 1.0f / static_cast<float>(a.heads == HeadGroups::layer ? shape.q_heads : group);

  std::vector<ListedKeys> keys(static_cast<std::size_t>(heads));
  std::vector<std::vector<float>> partial(static_cast<std::size_t>(heads * stripes));
  team.run(heads, [&](Index h) {
    keys[static_cast<std::size_t>(h)] =
        list_keys(a.keys[static_cast<std::size_t>(h)], a.key_mask.empty() ? nullptr : a.key_mask[static_cast<std::size_t>(h)],
                  a.column_of.empty() ? nullptr : a.column_of[static_cast<std::size_t>(h)]);
  });

  team.run(heads * stripes, [&](Index task) {
    const Index h = task / stripes, stripe = task % stripes;
    const ListedKeys& listed = keys[static_cast<std::size_t>(h)];
    const HeadPages& list = a.keys[static_cast<std::size_t>(h)];
    const Index n = listed.size(), stride = round_up(std::max<Index>(n, 1), 16), q_stride = round_up(shape.key_dim, 16);
    std::vector<float>& out = partial[static_cast<std::size_t>(task)];
    if (a.out != nullptr) out.assign(static_cast<std::size_t>(parts * members * n), 0.0f);

    std::vector<MassVector> vectors;
    for (Index i = row_total * stripe / stripes; i < row_total * (stripe + 1) / stripes; ++i)
      for (Index m = 0; m < group; ++m)
        if (const float w = weight_of(row_at(i), h * group + m); w != 0) vectors.push_back({row_at(i), m, w});

    Scratch& scratch = Scratch::fresh();
    float* q = scratch.floats(mass_tile * q_stride);
    float* logits = scratch.floats(mass_tile * stride);
    float* extra_scratch = scratch.floats(stride);
    for (Index first = 0; first < static_cast<Index>(vectors.size()); first += mass_tile) {
      const Index count = std::min(mass_tile, static_cast<Index>(vectors.size()) - first);
      Position highest = std::numeric_limits<Position>::min();
      for (Index i = 0; i < count; ++i) {
        const MassVector& v = vectors[static_cast<std::size_t>(first + i)];
        k.to_float(static_cast<const std::byte*>(a.queries.at(v.row, h * group + v.member)), a.queries.dtype, shape.key_dim,
                   q + i * q_stride);
        k.multiply(q + i * q_stride, shape.key_dim, query_factor(shape));
        highest = std::max(highest, a.row_positions[v.row]);
      }
      tile_logits(k, list, listed, shape.key_dim, q, q_stride, count, highest, logits, stride);

      for (Index i = 0; i < count; ++i) {
        const MassVector& v = vectors[static_cast<std::size_t>(first + i)];
        const Index at = v.row * shape.q_heads + h * group + v.member;
        const Sight sight = sight_of(a.row_positions[v.row], shape.window);
        const Index to = listed.before(sight.high);
        const Index from = shape.window > 0 ? std::min(to, listed.before(sight.low)) : 0;
        float* x = logits + i * stride + from;
        const Index seen = to - from;
        if (shape.softcap > 0) cap_logits(k, x, seen, shape.softcap, extra_scratch);
        if constexpr (!plain_logit)
          for (Index j = 0; j < seen; ++j)
            x[j] = log2_e * a.logit(x[j] * ln_2, v.row, listed.columns[static_cast<std::size_t>(from + j)]);

        float lse2;  // log2 of the denominator
        if (a.lse != nullptr) {
          lse2 = a.lse[at] * log2_e;
          k.exp2_shift_sum(x, seen, lse2);
        } else {
          const float extra = a.extra != nullptr ? a.extra[at] * log2_e : minus_infinity;
          const float peak = std::max(k.max_of(x, seen), extra);
          const float sum = peak == minus_infinity ? 0.0f : k.exp2_shift_sum(x, seen, peak) + std::exp2(extra - peak);
          lse2 = sum == 0 ? minus_infinity : peak + std::log2(sum);
          if (sum != 0) k.multiply(x, seen, 1 / sum);
        }
        if (a.row_lse != nullptr) a.row_lse[at] = lse2 * ln_2;
        const bool nothing = seen == 0 || lse2 == minus_infinity;
        const float peak = nothing ? 0 : k.max_of(x, seen);
        if (a.row_peak != nullptr) a.row_peak[at] = peak;
        if (a.row_near_peak != nullptr)
          a.row_near_peak[at] = nothing ? 0 : std::count_if(x, x + seen, [&](float p) { return p >= a.peak_share * peak; });
        const auto part_of = [&](Index j) -> Index {
          return parts == 1 || a.key_class[listed.columns[static_cast<std::size_t>(from + j)]] == a.row_class[v.row] ? 0 : 1;
        };
        if (a.row_part_mass != nullptr) {
          float part_mass[2] = {0, 0};
          for (Index j = 0; j < seen && !nothing; ++j) part_mass[part_of(j)] += x[j];
          for (Index p = 0; p < parts; ++p) a.row_part_mass[p * a.queries.rows * shape.q_heads + at] = part_mass[p];
        }
        if (nothing || a.out == nullptr) continue;
        if constexpr (!plain_entry)
          for (Index j = 0; j < seen; ++j) x[j] = a.entry(x[j], v.row, listed.columns[static_cast<std::size_t>(from + j)]);
        float* row_out = out.data() + (apart ? v.member : 0) * n + from;
        const float factor = v.weight * joined;
        if (parts == 1) {
          if (a.take_max) k.max_scaled(x, seen, factor, row_out);
          else k.add_scaled(x, seen, factor, row_out);
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
      std::vector<double> step(static_cast<std::size_t>(listed.size()) + 1, 0.0);
      for (Index i = 0; i < row_total; ++i) {
        double w = 0;
        for (Index m = 0; m < group; ++m) w += weight_of(row_at(i), h * group + m);
        const Sight sight = sight_of(a.row_positions[row_at(i)], shape.window);
        const Index to = listed.before(sight.high), from = shape.window > 0 ? std::min(to, listed.before(sight.low)) : 0;
        step[static_cast<std::size_t>(from)] += w / static_cast<double>(group);
        step[static_cast<std::size_t>(to)] -= w / static_cast<double>(group);
      }
      double running = 0;
      for (Index j = 0; j < listed.size(); ++j) {
        running += step[static_cast<std::size_t>(j)];
        a.seen[h * a.columns + listed.columns[static_cast<std::size_t>(j)]] += static_cast<float>(running);
      }
    });

  if (a.out == nullptr) return;
  const Index out_heads = a.out_heads();
  const auto add_head = [&](Index h) {  // partial outputs of one kv head into the caller's rows
    const ListedKeys& listed = keys[static_cast<std::size_t>(h)];
    const Index n = listed.size();
    for (Index p = 0; p < parts; ++p)
      for (Index m = 0; m < (a.heads == HeadGroups::query_head ? group : 1); ++m) {
        const Index row = a.heads == HeadGroups::layer ? 0 : a.heads == HeadGroups::kv_head ? h : h * group + m;
        float* to = a.out + (p * out_heads + row) * a.columns;
        for (Index j = 0; j < n; ++j) {
          float value = 0;
          if (!a.take_max) {
            for (Index s = 0; s < stripes; ++s)
              value += partial[static_cast<std::size_t>(h * stripes + s)][static_cast<std::size_t>((p * members + m) * n + j)];
          } else {
            const Index first = a.heads == HeadGroups::query_head ? m : 0, last = a.heads == HeadGroups::query_head ? m + 1 : group;
            for (Index g = first; g < last; ++g) {
              float best = 0;
              for (Index s = 0; s < stripes; ++s)
                best = std::max(best, partial[static_cast<std::size_t>(h * stripes + s)][static_cast<std::size_t>((p * members + g) * n + j)]);
              value += best;
            }
            if (a.heads != HeadGroups::query_head)
              value /= static_cast<float>(a.heads == HeadGroups::layer ? shape.q_heads : group);
          }
          float& o = to[listed.columns[static_cast<std::size_t>(j)]];
          o = a.take_max && a.heads != HeadGroups::layer ? std::max(o, value) : o + value;
        }
      }
  };
  if (a.heads == HeadGroups::layer)
    for (Index h = 0; h < heads; ++h) add_head(h);
  else
    team.run(heads, add_head);
}

}  // namespace kvpare::cpu

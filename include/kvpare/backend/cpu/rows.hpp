// The verbs that walk over rows of K and V on a CPU: append, compact, gather, statistics; and the dense product.
#pragma once

#include <Eigen/Core>
#include <algorithm>
#include <cstring>
#include <limits>

#include "../arguments.hpp"
#include "team.hpp"

namespace kvpare::cpu {

namespace detail {

/// Writes `count` rows of one head, converting the element type when it differs.
inline void write_rows(const Kernels& k, const ConstTensor& from, Index head, Index row, Index count, std::byte* to,
                       Index row_bytes, DType type) {
  const Index dense_bytes = from.width * size_of(type);
  for (Index r = 0; r < count; ++r) {
    const auto* source = static_cast<const std::byte*>(from.at(row + r, head));
    if (from.dtype == type) {
      std::memcpy(to + r * row_bytes, source, static_cast<std::size_t>(dense_bytes));
    } else {
      float* values = Scratch::fresh().floats(from.width);
      k.to_float(source, from.dtype, from.width, values);
      k.from_float(values, from.width, type, to + r * row_bytes);
    }
  }
}

inline constexpr int move_lookahead = 8;  // rows to fetch ahead of a copy whose sources are scattered

inline void prefetch_row(const std::byte* row, Index bytes) {
  for (Index b = 0; b < bytes; b += 64) __builtin_prefetch(row + b, 0);
}

inline void carry_out(const CompactList& list) {
  for (std::size_t i = 0; i < list.moves.size(); ++i) {
    const Move& m = list.moves[i];
    const PageGeometry& g = list.formats[m.format];
    const Index key_bytes = list.key_dim * size_of(g.key_type), value_bytes = list.value_dim * size_of(g.value_type);
    if (i + move_lookahead < list.moves.size()) {
      const Move& ahead = list.moves[i + move_lookahead];
      const PageGeometry& ahead_g = list.formats[ahead.format];
      prefetch_row(ahead_g.key_row(ahead.from, ahead.from_slot), key_bytes * ahead.count);
      prefetch_row(ahead_g.value_row(ahead.from, ahead.from_slot), value_bytes * ahead.count);
    }
    const auto shift = [&](std::byte* to, const std::byte* from, Index stride, Index bytes) {
      if (stride == bytes)
        std::memmove(to, from, static_cast<std::size_t>(bytes * m.count));
      else
        for (Index r = 0; r < m.count; ++r)
          std::memmove(to + r * stride, from + r * stride, static_cast<std::size_t>(bytes));
    };
    shift(g.key_row(m.to, m.to_slot), g.key_row(m.from, m.from_slot), g.key_row_bytes, key_bytes);
    shift(g.value_row(m.to, m.to_slot), g.value_row(m.from, m.from_slot), g.value_row_bytes, value_bytes);
  }
}

/// Calls `f(slot, row, type)` for every token of a list that is live and in the mask.
template <class F>
void for_each_row(const HeadPages& list, Side side, const std::uint64_t* mask, F&& f) {
  for (Index e = 0; e < static_cast<Index>(list.entries.size()); ++e) {
    const Entry& entry = list.entries[static_cast<std::size_t>(e)];
    const PageGeometry& g = list.formats[entry.format];
    for_each_bit(mask != nullptr ? entry.live & mask[e] : entry.live, [&](Index s) {
      f(e * list.page_tokens + s, side == Side::keys ? g.key_row(entry.page, s) : g.value_row(entry.page, s),
        side == Side::keys ? g.key_type : g.value_type);
    });
  }
}

}  // namespace detail

inline void append(const Team& team, const AppendArguments& a) {
  constexpr Index worth_sharing = 64 * 1024;  // bytes; below, waking a thread costs more than it saves
  const auto write = [&](Index i) {
    const WriteRun& run = a.runs[static_cast<std::size_t>(i)];
    const PageGeometry& g = a.formats[run.format];
    detail::write_rows(*team.kernels, a.keys, run.head, run.row, run.count, g.key_row(run.page, run.slot),
                       g.key_row_bytes, g.key_type);
    detail::write_rows(*team.kernels, a.values, run.head, run.row, run.count, g.value_row(run.page, run.slot),
                       g.value_row_bytes, g.value_type);
  };
  const Index runs = static_cast<Index>(a.runs.size());
  if (a.keys.rows * a.keys.heads * (a.keys.width + a.values.width) * 4 < worth_sharing)
    for (Index i = 0; i < runs; ++i) write(i);
  else
    team.run(runs, write);
}

inline void compact(const Team& team, std::span<const CompactList> lists) {
  team.run(static_cast<Index>(lists.size()), [&](Index i) { detail::carry_out(lists[static_cast<std::size_t>(i)]); });
}

inline void gather(const Team& team, std::span<const GatherRow> rows) {
  team.run(static_cast<Index>(rows.size()), [&](Index i) {
    const GatherRow& g = rows[static_cast<std::size_t>(i)];
    Index n = 0;
    detail::for_each_row(g.pages, g.side, g.mask, [&](Index, const std::byte* row, DType type) {
      team.kernels->to_float(row, type, g.width, g.out + n++ * g.width);
    });
  });
}

inline void statistics(const Team& team, std::span<const StatisticsRow> rows) {
  team.run(static_cast<Index>(rows.size()), [&](Index i) {
    const StatisticsRow& s = rows[static_cast<std::size_t>(i)];
    float* x = Scratch::fresh().floats(s.width);
    const Index n = s.per_slot ? s.pages.slots() : s.width;
    const auto start = [&](float* to, float value) {
      if (to != nullptr) std::fill_n(to, n, value);
    };
    start(s.min, std::numeric_limits<float>::infinity()), start(s.max, -std::numeric_limits<float>::infinity());
    start(s.sum, 0), start(s.sum_squares, 0);
    detail::for_each_row(s.pages, s.side, s.mask, [&](Index slot, const std::byte* row, DType type) {
      team.kernels->to_float(row, type, s.width, x);
      if (s.per_slot) {
        float least = std::numeric_limits<float>::infinity(), most = -least, sum = 0, squares = 0;
        for (Index c = 0; c < s.width; ++c)
          least = std::min(least, x[c]), most = std::max(most, x[c]), sum += x[c], squares += x[c] * x[c];
        if (s.min != nullptr) s.min[slot] = least;
        if (s.max != nullptr) s.max[slot] = most;
        if (s.sum != nullptr) s.sum[slot] = sum;
        if (s.sum_squares != nullptr) s.sum_squares[slot] = squares;
        return;
      }
      if (s.min != nullptr)
        for (Index c = 0; c < s.width; ++c) s.min[c] = std::min(s.min[c], x[c]);
      if (s.max != nullptr)
        for (Index c = 0; c < s.width; ++c) s.max[c] = std::max(s.max[c], x[c]);
      if (s.sum != nullptr)
        for (Index c = 0; c < s.width; ++c) s.sum[c] += x[c];
      if (s.sum_squares != nullptr)
        for (Index c = 0; c < s.width; ++c) s.sum_squares[c] += x[c] * x[c];
    });
  });
}

inline void product(const Team& team, const ProductArguments& p) {
  using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  using In = Eigen::Map<const Matrix>;
  team.run(p.batch, [&](Index b) {
    const In a(p.a + b * p.m * p.k, p.m, p.k);
    Eigen::Map<Matrix> c(p.c + b * p.m * p.n, p.m, p.n);
    if (p.b_transposed)
      c.noalias() = a * In(p.b + b * p.n * p.k, p.n, p.k).transpose();
    else
      c.noalias() = a * In(p.b + b * p.k * p.n, p.k, p.n);
  });
}

}  // namespace kvpare::cpu

// Exact top-k per row, and full sorting of rows, on a CPU.
#pragma once

#include <algorithm>
#include <bit>
#include <vector>

#include "../arguments.hpp"
#include "team.hpp"

namespace kvpare::cpu {

namespace detail {

/// Maps a float to an integer that grows in the order we rank by: -inf < … < +inf, NaN below everything, -0 = +0.
inline std::uint32_t rank_key(float x) {
  if (x != x) return 0;
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

template <class F>
void for_each_candidate(const std::uint64_t* mask, Index columns, Index word_tokens, F&& f) {
  for (Index w = 0; w * word_tokens < columns; ++w) {
    std::uint64_t word = low_bits(std::min(word_tokens, columns - w * word_tokens));
    if (mask != nullptr) word &= mask[w];
    for_each_bit(word, [&](Index b) { f(w * word_tokens + b); });
  }
}

/// The k best of one row by the upper 16 bits first, then, among those equal to the k-th, by the lower 16: two counting
/// passes over the candidates, no sort. Ties at the threshold go to the lower column.
inline void top_of_row(const TopRow& row) {
  const Index words = ceil_div(row.columns, row.word_tokens);
  std::fill_n(row.chosen, words, std::uint64_t{0});
  Index left = std::max<Index>(0, *row.k);

  thread_local std::vector<std::uint32_t> keys, columns;
  thread_local std::vector<std::uint32_t> counts;
  keys.clear(), columns.clear();
  for_each_candidate(row.candidates, row.columns, row.word_tokens, [&](Index c) {
    keys.push_back(rank_key(row.scores[c]));
    columns.push_back(static_cast<std::uint32_t>(c));
  });
  if (row.nan_count != nullptr) *row.nan_count = std::count(keys.begin(), keys.end(), 0u);
  if (left == 0) return;
  const auto choose = [&](std::size_t i) {
    const Index c = columns[i];
    row.chosen[c / row.word_tokens] |= std::uint64_t{1} << (c % row.word_tokens);
  };
  if (left >= static_cast<Index>(keys.size())) {
    for (std::size_t i = 0; i < keys.size(); ++i) choose(i);
    return;
  }

  // Find the k-th largest key, 11 bits at a time from the top.
  std::uint32_t prefix = 0, prefix_mask = 0;
  for (int shift : {21, 10, 0}) {
    const int bits = shift == 0 ? 10 : 11;
    counts.assign(std::size_t{1} << bits, 0);
    const std::uint32_t digit_mask = (1u << bits) - 1;
    for (std::uint32_t key : keys)
      if ((key & prefix_mask) == prefix) ++counts[key >> shift & digit_mask];
    std::uint32_t digit = digit_mask;
    while (static_cast<Index>(counts[digit]) < left) left -= static_cast<Index>(counts[digit--]);
    prefix |= digit << shift;
    prefix_mask |= digit_mask << shift;
  }
  for (std::size_t i = 0; i < keys.size(); ++i)  // `left` of those equal to the threshold, lower columns first
    if (keys[i] > prefix || (keys[i] == prefix && left-- > 0)) choose(i);
}

inline void sort_row(const SortRow& s) {
  Index n = 0;
  for_each_candidate(s.row.mask, s.row.columns, s.row.word_tokens, [&](Index c) { s.columns[n++] = c; });
  std::stable_sort(s.columns, s.columns + n,
                   [&](Index a, Index b) { return rank_key(s.row.values[a]) > rank_key(s.row.values[b]); });
  if (s.count != nullptr) *s.count = n;
  double sum = 0;
  for (Index i = 0; i < n; ++i) {
    const float x = s.row.values[s.columns[i]];
    if (s.values != nullptr) s.values[i] = x;
    sum += x == x ? static_cast<double>(x) : 0.0;
    if (s.running_sum != nullptr) s.running_sum[i] = sum;
  }
}

inline RowSummary summary_of(const MaskedRow& row) {
  RowSummary s;
  for_each_candidate(row.mask, row.columns, row.word_tokens, [&](Index c) {
    const float x = row.values[c];
    if (x != x) {
      ++s.nan_count;
      return;
    }
    ++s.count;
    s.sum += static_cast<double>(x);
    s.min = std::min(s.min, x);
    if (s.argmax < 0 || x > s.max) s.max = x, s.argmax = c;
  });
  if (s.count == 0) return s;
  s.mean = s.sum / static_cast<double>(s.count);
  for_each_candidate(row.mask, row.columns, row.word_tokens, [&](Index c) {
    const double d = static_cast<double>(row.values[c]) - s.mean;
    if (d != d) return;
    s.moment2 += d * d;
    s.moment3 += d * d * d;
  });
  return s;
}

}  // namespace detail

inline void select_top(const Team& team, std::span<const TopRow> rows) {
  team.run(static_cast<Index>(rows.size()), [&](Index i) { detail::top_of_row(rows[static_cast<std::size_t>(i)]); });
}

inline void sort_rows(const Team& team, std::span<const SortRow> rows) {
  team.run(static_cast<Index>(rows.size()), [&](Index i) { detail::sort_row(rows[static_cast<std::size_t>(i)]); });
}

inline void reduce(const Team& team, std::span<const MaskedRow> rows, RowSummary* out) {
  team.run(static_cast<Index>(rows.size()),
           [&](Index i) { out[i] = detail::summary_of(rows[static_cast<std::size_t>(i)]); });
}

}  // namespace kvpare::cpu

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

/// rank_key without branches, so that loops over it are vectorised.
inline std::uint32_t rank_key_flat(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x + 0.0f);
  const std::uint32_t sign = static_cast<std::uint32_t>(static_cast<std::int32_t>(bits) >> 31);
  const std::uint32_t nan = static_cast<std::uint32_t>((bits & 0x7fffffffu) > 0x7f800000u);
  return (bits ^ (sign | 0x80000000u)) & (nan - 1);
}

inline constexpr Index few = 4;  // so many left out of a row cost one pass without lists of candidates

/// All candidates but the `out` worst, out <= few: an eviction between decode steps leaves out one. A pass over the words
/// of the row; only words that hold something as bad as the worst so far are looked at closely. Of equals the higher
/// columns are left out.
inline void leave_out_few(const TopRow& row, Index out) {
  struct Worst {
    std::uint32_t key;
    Index column;
  } worst[few];  // ascending by key, of equals the higher column first
  Index held = 0;
  Index nans = 0;
  const Index width = row.word_tokens;
  std::uint32_t keys[64];
  for (Index w = 0; w * width < row.columns; ++w) {
    const Index count = std::min(width, row.columns - w * width);
    const std::uint64_t here = (row.candidates != nullptr ? row.candidates[w] : ~std::uint64_t{0}) & low_bits(count);
    row.chosen[w] = here;
    if (here == 0) continue;
    const float* x = row.scores + w * width;
    std::uint32_t least = ~0u;
    if (here == low_bits(count)) {
      for (Index b = 0; b < count; ++b) keys[b] = rank_key_flat(x[b]);
      for (Index b = 0; b < count; ++b) least = std::min(least, keys[b]);
    } else {
      for_each_bit(here, [&](Index b) {
        keys[b] = rank_key_flat(x[b]);
        least = std::min(least, keys[b]);
      });
    }
    if (least != 0 && held == out && least > worst[held - 1].key) continue;
    for_each_bit(here, [&](Index b) {
      nans += keys[b] == 0;
      if (held == out && keys[b] > worst[held - 1].key) return;
      Index at = held < out ? held++ : held - 1;
      for (; at > 0 && worst[at - 1].key >= keys[b]; --at) worst[at] = worst[at - 1];
      worst[at] = {keys[b], w * width + b};
    });
  }
  for (Index i = 0; i < held; ++i)
    row.chosen[worst[i].column / width] &= ~(std::uint64_t{1} << (worst[i].column % width));
  if (row.nan_count != nullptr) *row.nan_count = nans;
}

/// The k best of one row by the upper 16 bits first, then, among those equal to the k-th, by the lower 16: two counting
/// passes over the candidates, no sort. Ties at the threshold go to the lower column.
inline void top_of_row(const TopRow& row) {
  const Index words = ceil_div(row.columns, row.word_tokens);
  Index left = std::max<Index>(0, *row.k), candidates = row.columns;
  if (row.candidates != nullptr) {
    candidates = 0;
    for (Index w = 0; w < words; ++w)
      candidates += std::popcount(row.candidates[w] & low_bits(row.columns - w * row.word_tokens));
  }
  if (const Index out = candidates - left; out >= 1 && out <= few) return leave_out_few(row, out);
  std::fill_n(row.chosen, words, std::uint64_t{0});

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

// The choice in rows of candidates: budgets are known, scores too; which tokens stay is what TopK says.
//
//   scores ──chunk means──► ──newest first──► select_top of k, less what goes to stand-ins or samples ──► bitmaps ──these──► bitmaps
//
// All of it stays in backend memory.
#pragma once

#include <algorithm>
#include <vector>

#include "../backend/backend.hpp"
#include "../cache/columns.hpp"
#include "../codec/rounding.hpp"
#include "../core/random.hpp"
#include "../policy/select/top_k.hpp"

namespace kvpare {

namespace detail {

/// Of how many candidates of a row a rule, asked by column, holds.
template <class Rule>
KVPARE_HD Index count_candidates(const std::uint64_t* candidates, Index columns, Index word_tokens, const Rule& holds) {
  Index count = 0;
  for (Index c = 0; c < columns; ++c) count += has_column(candidates, c, word_tokens) && holds(c);
  return count;
}

/// No more than the candidates whose score is above 0.
struct BoundByPositive {
  const float* scores;
  const std::uint64_t* candidates;
  Index columns, word_tokens;
  Index* k;
  KVPARE_HD void operator()(Index) const {
    const Index positive =
        count_candidates(candidates, columns, word_tokens, [this](Index c) { return scores[c] > 0; });
    if (*k > positive) *k = positive;
  }
};

/// No more than the candidates whose score, a budget with a minus sign, is within this one.
struct BoundByBudget {
  const float* scores;
  const std::uint64_t* candidates;
  Index columns, word_tokens;
  Index* k;
  KVPARE_HD void operator()(Index) const {
    const Index within = count_candidates(candidates, columns, word_tokens,
                                          [this](Index c) { return -scores[c] <= static_cast<float>(*k); });
    if (*k > within) *k = within;
  }
};

/// The newest share of a row's budget ranks above every score.
struct BoostNewest {
  const float* scores;
  const std::int32_t* newest_rank;  // [columns] 0 = the newest candidate
  const Index* k;
  double share;
  float* out;
  KVPARE_HD void operator()(Index c) const {
    const double wanted = product(share, static_cast<double>(*k));
    out[c] = newest_rank[c] >= 0 && static_cast<double>(newest_rank[c]) + 1 <= wanted + 1e-9 ? 0x1p100f : scores[c];
  }
};

/// Bounds the budget of a row.
template <Backend B>
void bound_by_positive(B& be, const TopRow& row, Index* k) {
  be.each(1, BoundByPositive{row.scores, row.candidates, row.columns, row.word_tokens, k});
}

/// Chunks of neighbouring candidates have their mean score, in a fixed order of summation.
struct ChunkMeans {
  const float* scores;
  const std::int32_t* candidates;  // their columns, ascending
  Index count, chunk;
  float* out;  // [columns]
  KVPARE_HD void operator()(Index i) const {
    const Index begin = i * chunk, end = begin + chunk < count ? begin + chunk : count;
    double sum = 0;
    for (Index j = begin; j < end; ++j) sum += static_cast<double>(scores[candidates[j]]);
    for (Index j = begin; j < end; ++j) out[candidates[j]] = static_cast<float>(sum / static_cast<double>(end - begin));
  }
};

/// What of a budget goes to the best: the rest is for stand-ins, or for samples of what goes.
struct BudgetOfBest {
  const Index* k;
  Index candidates;
  double represent;
  Index recover;
  Index* best;
  KVPARE_HD void operator()(Index) const {
    const Index budget = *k < candidates ? *k : candidates;
    *best = budget - static_cast<Index>(product(represent, static_cast<double>(budget)) + 1e-9);
    if (recover == 0 || budget == candidates) return;
    // The most for which best + ceil((candidates - best) / recover) <= budget.
    const Index room = budget * recover - candidates;
    *best = room > 0 ? room / (recover - 1) : 0;
    while (*best > 0 && *best + (candidates - *best + recover - 1) / recover > budget) --*best;
  }
};

/// How many tokens of a head have its bit.
struct SignatureCount {
  const Index* k;
  Index candidates;
  Signature signature;
  Index* count;
  KVPARE_HD void operator()(Index) const { *count = signature == Signature::half ? candidates / 2 : *k; }
};

/// A bit of the anchor; `majority`: that of the mean.
KVPARE_HD inline bool anchor_bit(Anchor anchor, std::uint64_t seed, Index place, bool majority) {
  if (anchor == Anchor::random) return (random_bits(seed, place) & 1u) != 0;
  if (anchor == Anchor::mean) return majority;
  return anchor == Anchor::ones || (anchor == Anchor::alternating && place % 2 != 0);
}

/// Minus the Hamming distance of each token's signature to the anchor.
struct NegativeDistance {
  const std::uint64_t* bits;  // [heads][words]
  Index heads, words, word_tokens;
  const Index* ones;  // how many tokens have a head's bit
  Index candidates;
  Anchor anchor;
  std::uint64_t seed;
  float* out;  // [columns]
  KVPARE_HD bool of_anchor(Index head) const {
    return anchor_bit(anchor, seed, head, 2 * *ones == candidates ? head % 2 != 0 : 2 * *ones > candidates);
  }
  KVPARE_HD void operator()(Index column) const {
    Index distance = 0;
    for (Index h = 0; h < heads; ++h) distance += has_column(bits + h * words, column, word_tokens) != of_anchor(h);
    out[column] = -static_cast<float>(distance);
  }
};

struct LeftOver {
  const std::uint64_t *candidates, *chosen;
  std::uint64_t* out;
  KVPARE_HD void operator()(Index w) const { out[w] = candidates[w] & ~chosen[w]; }
};

/// Where in the order of distance the i-th of so many stand-ins is, of n.
KVPARE_HD inline Index stand_in_at(Mode mode, Index i, Index wanted, Index n) {
  return wanted == 1 ? 0 : mode == Mode::paper ? i * (n - 1) / (wanted - 1) : i * (n / wanted);
}

/// Marks the i-th stand-in.
struct MarkStandIn {
  const Index* order;  // columns by distance
  const Index* count;
  const Index *k, *best;
  Mode mode;
  std::uint8_t* marked;
  KVPARE_HD void operator()(Index i) const {
    const Index n = *count, wanted = *k - *best < n ? *k - *best : n;
    if (i >= wanted) return;
    marked[order[stand_in_at(mode, i, wanted, n)]] = 1;
  }
};

/// Marks every so many-th of what is left over, as long as the budget lasts.
struct MarkSamples {
  const std::uint64_t* left;
  Index columns, word_tokens, every;
  const Index *k, *best;
  std::uint8_t* marked;
  KVPARE_HD void operator()(Index) const {
    Index n = 0, room = *k - *best;
    for (Index c = 0; c < columns && room > 0; ++c)
      if (has_column(left, c, word_tokens) && n++ % every == 0) marked[c] = 1, --room;
  }
};

struct AddMarked {
  const std::uint8_t* marked;
  Index columns, word_tokens;
  std::uint64_t* chosen;
  KVPARE_HD void operator()(Index w) const {
    for (Index c = w * word_tokens; c < (w + 1) * word_tokens && c < columns; ++c)
      if (marked[c] != 0) chosen[w] |= std::uint64_t{1} << (c - w * word_tokens);
  }
};

/// One row of the choice.
struct ChoiceRow {
  TopRow top;                         // with its budget as k, bounded by what is positive where the selector says so
  Index* k = nullptr;                 // [backend] the same
  std::vector<std::int32_t> columns;  // of the candidates, ascending
  const float* scores = nullptr;      // [backend] [heads, stride] of the layer's kv heads, for signatures
  Index heads = 0, stride = 0;
  bool within_budget = false;  // is a score a budget, with a minus sign?

  Index words() const { return ceil_div(top.columns, top.word_tokens); }
};

/// Scores as the selector wants them; the memory that they take is added to `memory`.
template <Backend B>
void prepare_scores(B& be, const TopK& selector, ChoiceRow& row, std::vector<Buffer<B, float>>& memory) {
  if (row.columns.empty()) return;
  const Index count = static_cast<Index>(row.columns.size());
  if (selector.chunk > 1) {
    const Buffer<B, std::int32_t> list(be, row.columns);
    memory.emplace_back(be, row.top.columns);
    fill(be, memory.back().data(), row.top.columns, 0.0f);
    be.each(ceil_div(count, selector.chunk),
            ChunkMeans{row.top.scores, list.data(), count, selector.chunk, memory.back().data()});
    row.top.scores = memory.back().data();
  }
  if (selector.only_positive) bound_by_positive(be, row.top, row.k);
  if (row.within_budget)
    be.each(1, BoundByBudget{row.top.scores, row.top.candidates, row.top.columns, row.top.word_tokens, row.k});
  if (selector.recent_share > 0) {
    std::vector<std::int32_t> rank(static_cast<std::size_t>(row.top.columns), -1);
    for (Index i = 0; i < count; ++i)
      rank[static_cast<std::size_t>(row.columns[static_cast<std::size_t>(i)])] =
          static_cast<std::int32_t>(count - 1 - i);
    const Buffer<B, std::int32_t> ranks(be, rank);
    memory.emplace_back(be, row.top.columns);
    be.each(row.top.columns,
            BoostNewest{row.top.scores, ranks.data(), row.k, selector.recent_share, memory.back().data()});
    row.top.scores = memory.back().data();
  }
}

/// Adds stand-ins, or samples, to what has been chosen. `best` [rows]: how many that is.
template <Backend B>
void add_others(B& be, const TopK& selector, std::span<const ChoiceRow> rows, const Index* best) {
  std::vector<Buffer<B, std::uint64_t>> left;
  std::vector<Buffer<B, std::uint8_t>> marked;
  for (const ChoiceRow& row : rows) {
    left.emplace_back(be, row.words());
    marked.emplace_back(be, row.top.columns);
    be.each(row.words(), LeftOver{row.top.candidates, row.top.chosen, left.back().data()});
    fill(be, marked.back().data(), row.top.columns, std::uint8_t{0});
  }
  const Buffer<B, Index> ones(be, static_cast<Index>(rows.size())), left_count(be, static_cast<Index>(rows.size()));
  std::vector<Buffer<B, std::uint64_t>> bits;
  std::vector<Buffer<B, float>> distances;
  std::vector<Buffer<B, Index>> orders;
  std::vector<TopRow> tops;
  std::vector<SortRow> sorts;
  for (std::size_t r = 0; r < rows.size() && selector.represent > 0; ++r) {
    const ChoiceRow& row = rows[r];
    const Index candidates = static_cast<Index>(row.columns.size());
    be.each(1, SignatureCount{row.k, candidates, selector.signature, ones.data() + static_cast<Index>(r)});
    bits.emplace_back(be, row.heads * row.words());
    for (Index h = 0; h < row.heads; ++h) {
      TopRow top = row.top;
      top.scores = row.scores + h * row.stride, top.k = ones.data() + static_cast<Index>(r);
      top.chosen = bits.back().data() + h * row.words(), top.nan_count = nullptr;
      tops.push_back(top);
    }
    distances.emplace_back(be, row.top.columns);
    orders.emplace_back(be, row.top.columns);
    sorts.push_back({{distances.back().data(), left[r].data(), row.top.columns, row.top.word_tokens},
                     orders.back().data(),
                     nullptr,
                     nullptr,
                     left_count.data() + static_cast<Index>(r)});
  }
  if (!tops.empty()) {
    be.select_top(tops);
    for (std::size_t r = 0; r < rows.size(); ++r)
      be.each(rows[r].top.columns,
              NegativeDistance{bits[r].data(), rows[r].heads, rows[r].words(), rows[r].top.word_tokens,
                               ones.data() + static_cast<Index>(r), static_cast<Index>(rows[r].columns.size()),
                               selector.anchor, static_cast<std::uint64_t>(selector.anchor_seed), distances[r].data()});
    be.sort_rows(sorts);
  }
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const ChoiceRow& row = rows[r];
    if (selector.represent > 0)
      be.each(row.top.columns, MarkStandIn{orders[r].data(), left_count.data() + static_cast<Index>(r), row.k,
                                           best + static_cast<Index>(r), selector.mode, marked[r].data()});
    else
      be.each(1, MarkSamples{left[r].data(), row.top.columns, row.top.word_tokens, selector.recover, row.k,
                             best + static_cast<Index>(r), marked[r].data()});
    be.each(row.words(), AddMarked{marked[r].data(), row.top.columns, row.top.word_tokens, row.top.chosen});
  }
}

/// Fills in `top.chosen` of every row. Launches only.
template <Backend B>
void choose(B& be, const TopK& selector, std::span<ChoiceRow> rows) {
  std::vector<Buffer<B, float>> memory;
  for (ChoiceRow& row : rows) prepare_scores(be, selector, row, memory);
  const bool others = selector.represent > 0 || selector.recover > 0;
  const Buffer<B, Index> best(be, static_cast<Index>(rows.size()));
  std::vector<TopRow> tops;
  for (const ChoiceRow& row : rows) {
    tops.push_back(row.top);
    if (!others) continue;
    Index* of_best = best.data() + static_cast<Index>(tops.size()) - 1;
    be.each(1,
            BudgetOfBest{row.k, static_cast<Index>(row.columns.size()), selector.represent, selector.recover, of_best});
    tops.back().k = of_best;
  }
  be.select_top(tops);
  if (others) add_others(be, selector, std::span<const ChoiceRow>(rows), best.data());
}

}  // namespace detail
}  // namespace kvpare

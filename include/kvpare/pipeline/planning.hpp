// From scores to a plan: budgets over the layers, then the choice in every head. Reads the cache, changes nothing.
//
//   scores ──mean over heads──► summaries ──allocate──► keep[layer] ──► k[row] ──select_top──► bitmaps ──one copy──► Plan
//
// Tokens with a budget of their own (a group, see TopK) go through this side by side: a *part* is a group's tokens in a layer, a
// row one head of a part. Rows hold just the words of the layer's bitmaps that the part has tokens in.
// Everything up to the bitmaps stays in backend memory; the one wait is for their copy.
#pragma once

#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <vector>

#include "../backend/derived/reduce_heads.hpp"
#include "../cache/plan.hpp"
#include "../policy/budget/apportion.hpp"
#include "choosing_pages.hpp"
#include "compressor.hpp"
#include "token_groups.hpp"

namespace kvpare {

/// One layer as planning sees it.
struct ScoredLayer {
  Index layer = 0;  // index in the plan
  std::span<const HeadPages> heads;
  const Columns* columns = nullptr;
  const float* scores = nullptr;   // [backend] [kv_heads, scored_columns]
  const float* density = nullptr;  // [backend] what the scorer measured, where the budget needs it
  Index scored_columns = 0;
  std::vector<Index> given;  // tokens of each group the layer was ever given: what a ratio is of
  Index frozen = 0;          // leading columns that must stay whatever the scores
  Index page_bytes = 0;      // of one kv head, for budgets in bytes
  int settled = -1;          // tokens in pages of this format take no part: nobody chooses, or counts, them
};

/// What pages shared by heads or layers ask of a plan.
struct PlanScope {
  bool heads_together = false;  // all heads of a layer keep the same tokens
  bool layers_alike = false;    // all layers keep the same number
};

namespace detail {

/// What budgets are made of.
struct LayersToAllocate {
  const RowSummary* rows;       // [parts] of mean scores; as what follows, null when the allocator needs none
  const double* const* curves;  // [parts] with how many numbers each has
  const Index* curve_counts;
  const float* const* densities;  // [layers]
  const Index* available;         // [parts] in units of the group's quantum
  const Index* available_tokens;
  const Index* stays;            // [parts] tokens that stay anyway
  double recent_share;
  const Index *totals, *quanta;  // [groups] quantum: tokens of a unit
  Index layers;
  bool alike;
  LayerSummary* summaries;  // [parts] as what follows; part = group * layers + layer
  double* scratch;
  Index* keep;
};

/// One group per call.
template <class A>
struct AllocateLayers {
  A allocator;
  LayersToAllocate of;
  KVPARE_HD void operator()(Index group) const {
    const auto& [rows, curves, curve_counts, densities, available, available_tokens, stays, recent_share, totals, quanta, layers,
                 alike, summaries, scratch, keep] = of;
    const Index first = group * layers, end = first + layers;
    for (Index p = first; p < end; ++p) {
      summaries[p] = {};
      if (rows != nullptr) summaries[p] = {rows[p].sum, rows[p].skewness(), rows[p].count};
      if (curves != nullptr) summaries[p].curve = curves[p], summaries[p].count = curve_counts[p];
      if (densities != nullptr) summaries[p].density = static_cast<double>(*densities[p - first]);
      summaries[p].stays = stays[p], summaries[p].recent_share = recent_share;
    }
    if (alike) {
      for (Index p = first; p < end; ++p) keep[p] = totals[group] / layers;
    } else {
      allocator.allocate(summaries + first, available + first, layers, totals[group], scratch + first, keep + first);
    }
    for (Index p = first; p < end; ++p) {
      keep[p] *= quanta[group];
      if (keep[p] > available_tokens[p]) keep[p] = available_tokens[p];
    }
  }
};

struct RowBudgets {
  const Index* keep;      // [parts]
  const Index* part_of;   // [rows]
  const Index* reserved;  // [rows] tokens of the group that stay anyway
  Index* k;               // [rows]
  KVPARE_HD void operator()(Index row) const {
    const Index left = keep[part_of[row]] - reserved[row];
    k[row] = left > 0 ? left : 0;
  }
};

/// Heads of a part side by side, each padded to whole words, so that one row of candidates spans them all.
struct SideBySide {
  const float* scores;  // [heads, stride], the part's first `columns` of each row
  Index stride, columns, padded;
  float* out;  // [heads, padded]
  KVPARE_HD void operator()(Index i) const {
    const Index column = i % padded;
    out[i] = column < columns ? scores[i / padded * stride + column] : 0.0f;
  }
};

/// One part per call: its heads' budgets after the part's best have been counted head by head.
struct ShareHeads {
  const Index* first_row;        // [parts] of k
  const Index* heads;            // [parts]
  const std::uint64_t* hits;     // bitmaps of the part's best, row by row
  const Index* hits_at;          // [rows + 1]
  const Index* candidate_count;  // [rows]
  double floor;
  Mode mode;
  const Index* first;  // [rows] with mode = reference: candidates that rank first
  double* wish;  // [rows]
  Index* k;      // [rows] even budgets before, shared ones after
  KVPARE_HD void operator()(Index part) const {
    const Index begin = first_row[part];
    Index total = 0;
    for (Index r = begin; r < begin + heads[part]; ++r) {
      Index count = 0;
      for (Index w = hits_at[r]; w < hits_at[r + 1]; ++w)
        for (std::uint64_t left = hits[w]; left != 0; left &= left - 1) ++count;
      if (mode == Mode::reference) {
        k[r] = as_released(first[r], count, k[r], candidate_count[r]);
        continue;
      }
      wish[r] = product(static_cast<double>(count), 1 - floor) + product(static_cast<double>(k[r]), floor);
      total += k[r];
    }
    if (mode == Mode::paper) apportion(wish + begin, candidate_count + begin, heads[part], total, 0, k + begin);
  }
  KVPARE_HD Index as_released(Index ranked, Index count, Index even, Index candidates) const {
    if (even >= candidates) return candidates;
    const Index own = ranked < even ? ranked : even, older = count > own ? count - own : 0;
    const double reserved = static_cast<double>(static_cast<Index>(product(static_cast<double>(even - own), floor)));
    const double x = product(static_cast<double>(older), 1 - floor) + reserved;
    const Index below = static_cast<Index>(x);
    const double rest = x - static_cast<double>(below);
    const Index share = own + below + (rest > 0.5 || (rest == 0.5 && below % 2 != 0));
    return share < candidates ? share : candidates;
  }
};

/// What budgets see of scores: not those that rank first by a rule.
struct LeaveOutRanks {
  const float* scores;
  float* out;
  KVPARE_HD void operator()(Index column) const {
    out[column] = ranks_first(scores[column]) ? std::numeric_limits<float>::quiet_NaN() : scores[column];
  }
};

/// How many candidates of a row rank first by a rule.
struct CountRanks {
  const float* scores;
  const std::uint64_t* candidates;
  Index columns, word_tokens;
  Index* count;
  KVPARE_HD void operator()(Index) const {
    *count = count_candidates(candidates, columns, word_tokens, [this](Index c) { return ranks_first(scores[c]); });
  }
};

struct AddUp {
  const Index* first_row;
  const Index* heads;
  const Index* k;
  Index* total;  // [parts]
  KVPARE_HD void operator()(Index part) const {
    total[part] = 0;
    for (Index r = first_row[part]; r < first_row[part] + heads[part]; ++r) total[part] += k[r];
  }
};

/// A group's tokens in one layer.
struct PlanPart {
  std::size_t layer = 0;                   // index into the layers given
  Index first_word = 0;                    // of the layer's bitmaps
  std::vector<std::uint64_t> tokens = {};  // bitmap from there on, as those of the part's rows
  std::size_t first_row = 0, rows = 0;     // a row for each head, or one for all

  /// Columns of the layer before the first of the part.
  Index before(const ScoredLayer& layer_of) const { return first_word * layer_of.columns->word_tokens; }
  /// Columns of the part that have scores.
  Index scored(const ScoredLayer& layer_of) const {
    return std::clamp<Index>(std::min(layer_of.scored_columns, layer_of.columns->count) - before(layer_of), 0,
                             std::ssize(tokens) * layer_of.columns->word_tokens);
  }
};

/// Of a layer's bitmap the words that have tokens, from one with scores on, so that pointers to its scores lie within them.
inline PlanPart plan_part(const ScoredLayer& layer, std::size_t index, const PositionSpans& at) {
  PlanPart part{.layer = index, .tokens = layer.columns->at(at)};
  std::vector<std::uint64_t>& words = part.tokens;
  while (words.size() > 1 && words.back() == 0) words.pop_back();
  const Index most = std::min(std::ssize(words), ceil_div(layer.scored_columns, layer.columns->word_tokens)) - 1;
  while (part.first_word < most && words[static_cast<std::size_t>(part.first_word)] == 0) ++part.first_word;
  words.erase(words.begin(), words.begin() + part.first_word);
  return part;
}

/// Per row of selection: a head of a part, or a whole part whose heads choose together.
struct PlanRow {
  std::vector<std::uint64_t> candidates = {};  // bitmap over the part's columns
  std::vector<std::uint64_t> members = {};     // of the group, candidates or not
  Index reserved = 0;                          // members that stay anyway
  Index candidate_count = 0;
  WholePages pages = {};  // of the candidates, where pages stay or go whole

  /// What the candidates take of a budget.
  Index room() const { return pages.most > 0 ? pages.room() : candidate_count; }
};

/// Columns of a head that may be chosen from: live, and not in pages that have settled.
inline std::vector<std::uint64_t> open_columns(const ScoredLayer& layer, Index head) {
  const Columns& columns = *layer.columns;
  const auto live = columns.live_in(head);
  std::vector<std::uint64_t> open(live.begin(), live.end());
  if (layer.settled < 0) return open;
  const HeadPages& list = layer.heads[static_cast<std::size_t>(head)];
  std::vector<std::uint64_t> slots;
  for (const Entry& e : list.entries) slots.push_back(e.format == layer.settled ? e.live : 0);
  const std::vector<std::uint64_t> settled = columns.from_slots(list, head, slots);
  for (std::size_t w = 0; w < open.size(); ++w) open[w] &= ~settled[w];
  return open;
}

/// `open`: of the whole layer.
inline PlanRow plan_row(const ScoredLayer& layer, const PlanPart& part, std::span<const std::uint64_t> open,
                        const TopK& selector) {
  const Columns& columns = *layer.columns;
  PlanRow row{.members = part.tokens};
  for (std::size_t w = 0; w < row.members.size(); ++w)
    row.members[w] &= open[static_cast<std::size_t>(part.first_word) + w];
  std::vector<std::uint64_t> between = row.members;
  const Index count = std::ssize(between) * columns.word_tokens;
  const auto take = [&](Index column) {
    const bool there = columns.has(between, column);
    if (there)
      between[static_cast<std::size_t>(column / columns.word_tokens)] &=
          ~(std::uint64_t{1} << (column % columns.word_tokens));
    return there;
  };
  Index first = selector.first, last = selector.last;
  for (Index c = 0; c < count && first > 0; ++c) first -= take(c);
  for (Index c = count; c-- > 0 && last > 0;) last -= take(c);
  for (std::size_t i = 0; i < row.members.size(); ++i) {
    const Index w = part.first_word + static_cast<Index>(i);
    const std::uint64_t scored =
        low_bits(std::clamp<Index>(layer.scored_columns - w * columns.word_tokens, 0, columns.word_tokens));
    const std::uint64_t thawed =
        ~low_bits(std::clamp<Index>(layer.frozen - w * columns.word_tokens, 0, columns.word_tokens));
    const std::uint64_t candidate = between[i] & scored & thawed & ~columns.is_protected[static_cast<std::size_t>(w)];
    row.candidates.push_back(candidate);
    row.candidate_count += std::popcount(candidate);
    row.reserved += std::popcount(row.members[i] & ~candidate);
  }
  return row;
}

/// Leaves only whole pages up for choice: those whose tokens are all candidates. `cost`: what a page takes of the budget, 0 =
/// as much as it holds tokens of the group.
inline void keep_to_whole_pages(const ScoredLayer& layer, const PlanPart& part, Index head, Index cost, PlanRow& row) {
  const Columns& columns = *layer.columns;
  const HeadPages& list = layer.heads[static_cast<std::size_t>(head)];
  const auto slots_of = [&](const std::vector<std::uint64_t>& of_part) {
    std::vector<std::uint64_t> all(static_cast<std::size_t>(columns.words()), 0);
    std::copy(of_part.begin(), of_part.end(), all.begin() + part.first_word);
    return columns.to_slots(list, head, all);
  };
  auto up = slots_of(row.candidates);
  const auto members = slots_of(row.members);
  row.candidate_count = row.reserved = 0;
  row.pages.page_tokens = list.page_tokens, row.pages.most = cost > 0 ? cost : list.page_tokens;
  for (std::size_t e = 0; e < up.size(); ++e) {
    if (members[e] == 0) continue;
    const Index takes = cost > 0 ? cost : std::popcount(members[e]);
    if (up[e] == list.entries[e].live) {
      row.candidate_count += std::popcount(up[e]);
      row.pages.add(columns, part.before(layer), list, head, e, takes);
    } else {
      up[e] = 0;
      row.reserved += takes;
    }
  }
  const auto whole = columns.from_slots(list, head, up);
  std::copy_n(whole.begin() + part.first_word, row.candidates.size(), row.candidates.begin());
}

/// A token of a group, when it is known who stays.
struct MergeToken {
  Position position;
  Index column;  // of the layer
  bool goes, absorbs;
};

/// By position. `chosen`: candidates that stay.
inline std::vector<MergeToken> merge_tokens(const ScoredLayer& layer, const PlanPart& part, const PlanRow& row,
                                            std::span<const std::uint64_t> chosen, bool ends_absorb) {
  const Columns& columns = *layer.columns;
  const Index before = part.before(layer);
  std::vector<MergeToken> tokens;
  for (Index c = 0; c < std::ssize(part.tokens) * columns.word_tokens; ++c)
    if (columns.has(row.members, c)) {
      const bool candidate = columns.has(row.candidates, c), stays = !candidate || columns.has(chosen, c);
      tokens.push_back({columns.positions[static_cast<std::size_t>(before + c)], before + c, !stays,
                        stays && (candidate || ends_absorb)});
    }
  return tokens;
}

/// Every token that goes, with the nearest that stays.
inline Merge merge_into_nearest(std::span<const MergeToken> tokens, MergeKeys keys) {
  std::vector<Index> absorbing;
  for (Index t = 0; t < std::ssize(tokens); ++t)
    if (tokens[static_cast<std::size_t>(t)].absorbs) absorbing.push_back(t);
  Merge merge;
  merge.rule = keys == MergeKeys::unrotated ? MergeRule::unrotated_mean : MergeRule::mean;
  Index t = 0;
  for (std::size_t a = 0; a < absorbing.size(); ++a) {
    const Index here = absorbing[a];
    // The last token of which this one is the nearest, ties to the older.
    const Index last = a + 1 < absorbing.size() ? (here + absorbing[a + 1]) / 2 : std::ssize(tokens) - 1;
    const Index before = static_cast<Index>(merge.from.size());
    for (; t <= last; ++t)
      if (tokens[static_cast<std::size_t>(t)].goes) merge.from.push_back(tokens[static_cast<std::size_t>(t)].position);
    if (static_cast<Index>(merge.from.size()) == before) continue;
    merge.into.push_back(tokens[static_cast<std::size_t>(here)].position);
    merge.begin.push_back(before), merge.end.push_back(static_cast<Index>(merge.from.size()));
  }
  return merge;
}

/// Means of several groups of one head as one: their ranges have nothing in common.
inline Merge joined(std::vector<Merge> groups) {
  if (groups.size() == 1) return std::move(groups[0]);
  Merge all;
  std::vector<std::pair<const Merge*, std::size_t>> order;
  for (const Merge& m : groups) {
    all.rule = m.rule;
    for (std::size_t i = 0; i < m.into.size(); ++i) order.emplace_back(&m, i);
  }
  std::sort(order.begin(), order.end(),
            [](const auto& a, const auto& b) { return a.first->into[a.second] < b.first->into[b.second]; });
  for (const auto& [m, i] : order) {
    all.into.push_back(m->into[i]);
    all.begin.push_back(std::ssize(all.from));
    all.from.insert(all.from.end(), m->from.begin() + m->begin[i], m->from.begin() + m->end[i]);
    all.end.push_back(std::ssize(all.from));
  }
  return all;
}

/// CaM: tokens that go and whose coin says so, with the next that stay. `scores`: the kv head's, by column; those beyond have
/// none.
inline Merge merge_values(std::span<const MergeToken> tokens, std::span<const float> scores, const TopK& selector,
                          Index layer, Index head) {
  const auto score_of = [&](const MergeToken& t) {
    const float score = scores[static_cast<std::size_t>(t.column)];
    return score < 0 ? 0.0 : static_cast<double>(score);
  };
  std::vector<MergeToken> absorbing;
  for (const MergeToken& t : tokens)
    if (t.absorbs && t.column < static_cast<Index>(scores.size())) absorbing.push_back(t);
  Merge merge;
  merge.rule = MergeRule::added_values;
  std::vector<Index> first, last;  // of `absorbing`, for every token that joins
  std::size_t next = 0;
  for (const MergeToken& t : tokens) {
    while (next < absorbing.size() && absorbing[next].position < t.position) ++next;
    const Index parts = std::min(selector.merge_into, static_cast<Index>(absorbing.size() - next));
    if (!t.goes || parts == 0) continue;
    double mean = 0;
    for (const MergeToken& a : std::span(absorbing).subspan(next, static_cast<std::size_t>(parts)))
      mean += score_of(a) / static_cast<double>(parts);
    const float coin = random_unit(static_cast<std::uint64_t>(selector.merge_seed), layer, head, t.position);
    if (!(static_cast<double>(coin) * mean < score_of(t))) continue;
    merge.from.push_back(t.position), merge.weights.push_back(1 / static_cast<double>(parts));
    first.push_back(static_cast<Index>(next)), last.push_back(static_cast<Index>(next) + parts - 1);
  }
  const Index joining = static_cast<Index>(merge.from.size());
  for (Index a = 0, begin = 0, end = 0; a < static_cast<Index>(absorbing.size()); ++a) {
    while (begin < joining && last[static_cast<std::size_t>(begin)] < a) ++begin;
    while (end < joining && first[static_cast<std::size_t>(end)] <= a) ++end;
    if (begin == end) continue;
    merge.into.push_back(absorbing[static_cast<std::size_t>(a)].position);
    merge.begin.push_back(begin), merge.end.push_back(end);
  }
  return merge;
}

/// Tokens (or pages) over all layers that a group's amount stands for.
inline Index total_of(const Keep& keep, std::size_t group, std::span<const ScoredLayer> layers) {
  if (keep.unit == Keep::Unit::ratio) {
    double given = 0;
    for (const ScoredLayer& l : layers) given += static_cast<double>(l.given[group]);
    return static_cast<Index>(std::floor(keep.amount * given + 0.5));
  }
  if (keep.unit != Keep::Unit::bytes) return static_cast<Index>(keep.amount);
  Index largest = 1;  // bytes of one page in every kv head of a layer
  for (const ScoredLayer& l : layers) largest = std::max(largest, l.page_bytes * static_cast<Index>(l.heads.size()));
  return static_cast<Index>(keep.amount) / largest;
}

/// Ada-KV: the heads of a part draw on one budget, each as much as it has of the part's best, and no less than a floor.
template <Backend B>
void share_heads(B& be, const TopK& selector, std::span<const ScoredLayer> layers, const std::vector<PlanPart>& parts,
                 const std::vector<PlanRow>& rows, const std::vector<Index>& words_at, Index* k) {
  const Index n = std::ssize(parts), row_count = std::ssize(rows);
  std::vector<Index> first_row, heads, counts;
  std::vector<std::uint64_t> candidates;
  for (const PlanPart& part : parts)
    first_row.push_back(static_cast<Index>(part.first_row)), heads.push_back(static_cast<Index>(part.rows));
  for (const PlanRow& row : rows) {
    counts.push_back(row.room());
    candidates.insert(candidates.end(), row.candidates.begin(), row.candidates.end());
  }
  const Buffer<B, Index> first(be, first_row), head_counts(be, heads), candidate_counts(be, counts), at(be, words_at),
      totals(be, n);
  const Buffer<B, std::uint64_t> up_for_choice(be, candidates), hits(be, static_cast<Index>(candidates.size()));
  const Buffer<B, double> wishes(be, row_count);
  be.each(n, AddUp{first.data(), head_counts.data(), k, totals.data()});
  std::vector<Buffer<B, float>> rows_of_heads;
  std::vector<TopRow> tops;
  for (const PlanPart& part : parts) {
    const ScoredLayer& layer = layers[part.layer];
    const Index padded = std::ssize(part.tokens) * layer.columns->word_tokens;
    const Index begin = words_at[part.first_row];
    rows_of_heads.emplace_back(be, static_cast<Index>(part.rows) * padded);
    be.each(rows_of_heads.back().size(), SideBySide{layer.scores + part.before(layer), layer.scored_columns,
                                                    part.scored(layer), padded, rows_of_heads.back().data()});
    tops.push_back({rows_of_heads.back().data(), up_for_choice.data() + begin,
                    totals.data() + static_cast<Index>(tops.size()), hits.data() + begin, nullptr,
                    rows_of_heads.back().size(), layer.columns->word_tokens});
  }
  const Buffer<B, Index> ranks(be, selector.mode == Mode::reference ? row_count : 0);
  for (std::size_t p = 0; p < parts.size() && ranks.size() > 0; ++p) {
    const ScoredLayer& layer = layers[parts[p].layer];
    for (std::size_t h = 0; h < parts[p].rows; ++h)
      be.each(1, CountRanks{layer.scores + static_cast<Index>(h) * layer.scored_columns + parts[p].before(layer),
                            up_for_choice.data() + words_at[parts[p].first_row + h], parts[p].scored(layer),
                            layer.columns->word_tokens, ranks.data() + static_cast<Index>(parts[p].first_row + h)});
  }
  be.select_top(tops);
  be.each(n, ShareHeads{first.data(), head_counts.data(), hits.data(), at.data(), candidate_counts.data(),
                        selector.floor, selector.mode, ranks.data(), wishes.data(), k});
}

/// Of each part the running sums of its scores, best first.
template <Backend B>
class LayerCurves {
 public:
  LayerCurves() = default;
  LayerCurves(B& be, std::span<const MaskedRow> parts) : counts_(be, static_cast<Index>(parts.size())) {
    std::vector<Buffer<B, Index>> columns;
    std::vector<SortRow> sorts;
    std::vector<const double*> of_parts;
    for (const MaskedRow& row : parts) {
      columns.emplace_back(be, row.columns);
      sums_.emplace_back(be, row.columns);
      of_parts.push_back(sums_.back().data());
      sorts.push_back({row, columns.back().data(), nullptr, sums_.back().data(),
                       counts_.data() + static_cast<Index>(sorts.size())});
    }
    be.sort_rows(sorts);
    pointers_ = Buffer<B, const double*>(be, std::span<const double* const>(of_parts));
  }
  const double* const* data() const { return pointers_.data(); }
  const Index* counts() const { return counts_.data(); }

 private:
  std::vector<Buffer<B, double>> sums_;
  Buffer<B, Index> counts_;
  Buffer<B, const double*> pointers_;
};

}  // namespace detail

namespace detail {

/// What planning asks of a method, whatever its policies.
template <Backend B>
struct PlanMethod {
  const TopK& selector;
  BudgetNeeds needs;
  bool budgets_scored;
  std::function<void(Index groups, const LayersToAllocate&)> allocate;
};
template <Backend B>
void plan_layers(B& be, const PlanMethod<B>& method, std::span<const TokenGroup> groups,
                 std::span<const ScoredLayer> layers, PlanScope scope, Plan& plan);

}  // namespace detail

/// Fills in `plan.layers` (indexed by ScoredLayer::layer) and its counts; `groups` are those that layers say `given` of. One
/// wait, none when nothing is up for choice.
template <Backend B, class C>
void plan_layers(B& be, const C& compressor, std::span<const TokenGroup> groups, std::span<const ScoredLayer> layers,
                 PlanScope scope, Plan& plan) {
  check(compressor.keep);
  if (layers.empty() || groups.empty() || !evicts(compressor)) return;
  with_policy(compressor.budget, [&](const auto& a) { check_layers_of(a, std::ssize(layers)); });
  const detail::PlanMethod<B> method{
      compressor.selector, needs_of(compressor.budget),
      with_policy(compressor.scorer, [](const auto& s) { return budgets_scored(s); }),
      [&](Index count, const detail::LayersToAllocate& of) {
        with_policy(compressor.budget, [&](const auto& allocator) {
          be.each(count, detail::AllocateLayers<std::remove_cvref_t<decltype(allocator)>>{allocator, of});
        });
      }};
  detail::plan_layers(be, method, groups, layers, scope, plan);
}

namespace detail {

template <Backend B>
void plan_layers(B& be, const PlanMethod<B>& method, std::span<const TokenGroup> groups,
                 std::span<const ScoredLayer> layers, PlanScope scope, Plan& plan) {
  TopK selector = method.selector;
  const bool together = selector.heads == SelectHeads::layer || scope.heads_together;
  const std::size_t n = layers.size();

  const auto in_pages = [](const Keep& keep) { return keep.unit == Keep::Unit::pages || keep.unit == Keep::Unit::bytes; };
  const auto quantum_of = [&](const Keep& keep) { return in_pages(keep) ? layers[0].columns->word_tokens : 1; };
  if (selector.mode == Mode::reference && selector.recent_share > 0) {  // of one group: released code knows no others
    const Index total = total_of(groups[0].keep, 0, layers) * quantum_of(groups[0].keep);
    selector.last = std::max(selector.last, newest_of_mean(selector.recent_share, total, static_cast<Index>(n)));
    selector.recent_share = 0;
  }

  // What is up for choice, and how much of it stays.
  const bool whole_pages = selector.granularity == Granularity::page;
  plan.in_place = whole_pages;
  std::vector<std::vector<std::vector<std::uint64_t>>> open(n);  // [layer][head]
  for (std::size_t l = 0; l < n; ++l) {
    const bool one = together && layers[l].columns->aligned;
    for (Index h = 0; h < (one ? 1 : std::ssize(layers[l].heads)); ++h)
      open[l].push_back(open_columns(layers[l], h));
  }
  std::vector<PlanPart> parts;  // group by group, layer by layer
  std::vector<PlanRow> rows;
  std::vector<Index> available_tokens, available, part_of, reserved, stays, totals, quanta;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    const Keep& keep = groups[g].keep;
    totals.push_back(total_of(keep, g, layers));
    quanta.push_back(quantum_of(keep));
    plan.dense = plan.dense || (in_pages(keep) && !whole_pages);
    for (std::size_t l = 0; l < n; ++l) {
      PlanPart& part = parts.emplace_back(plan_part(layers[l], l, groups[g].at));
      part.first_row = rows.size(), part.rows = open[l].size();
      Index most = 0, anyway = 0;
      for (const auto& of_head : open[l]) {
        rows.push_back(plan_row(layers[l], part, of_head, selector));
        if (whole_pages)
          keep_to_whole_pages(layers[l], part, std::ssize(rows) - 1 - static_cast<Index>(part.first_row),
                                      in_pages(keep) ? quanta.back() : 0, rows.back());
        most = std::max(most, rows.back().room() + rows.back().reserved);
        anyway = std::max(anyway, rows.back().reserved);
        part_of.push_back(std::ssize(parts) - 1);
        reserved.push_back(rows.back().reserved);
      }
      available_tokens.push_back(most), stays.push_back(anyway);
      available.push_back(ceil_div(most, quanta.back()));
    }
  }
  const Index row_count = std::ssize(rows), part_count = std::ssize(parts);

  // Mean over heads, where budgets or the choice need it.
  const BudgetNeeds needs = method.needs;
  std::vector<Buffer<B, float>> means;
  if (together || needs.summary || needs.curve)
    for (const ScoredLayer& l : layers) {
      means.emplace_back(be, l.scored_columns);
      reduce_heads(be, l.scores, static_cast<Index>(l.heads.size()), l.scored_columns, means.back().data());
    }
  Buffer<B, RowSummary> summary_rows;
  LayerCurves<B> curves;
  std::vector<Buffer<B, std::uint64_t>> candidate_bits;
  for (const PlanRow& row : rows) candidate_bits.emplace_back(be, std::span<const std::uint64_t>(row.candidates));
  if (needs.summary || needs.curve) {
    std::vector<Buffer<B, std::uint64_t>> unions;
    std::vector<Buffer<B, float>> seen;
    for (const Buffer<B, float>& mean : means) {
      seen.emplace_back(be, mean.size());
      be.each(mean.size(), LeaveOutRanks{mean.data(), seen.back().data()});
    }
    const auto of_any_head = [&](std::vector<std::uint64_t> PlanRow::*tokens) {
      std::vector<MaskedRow> masked;
      for (const PlanPart& part : parts) {
        const ScoredLayer& layer = layers[part.layer];
        std::vector<std::uint64_t> any(part.tokens.size(), 0);
        for (std::size_t r = part.first_row; r < part.first_row + part.rows; ++r)
          for (std::size_t w = 0; w < any.size(); ++w) any[w] |= (rows[r].*tokens)[w];
        unions.emplace_back(be, std::span<const std::uint64_t>(any));
        masked.push_back({seen[part.layer].data() + part.before(layer), unions.back().data(), part.scored(layer),
                          layer.columns->word_tokens});
      }
      return masked;
    };
    if (needs.summary) {
      summary_rows = Buffer<B, RowSummary>(be, part_count);
      be.reduce(of_any_head(&PlanRow::candidates), summary_rows.data());
    }
    if (needs.curve) curves = LayerCurves<B>(be, of_any_head(&PlanRow::members));
  }
  Buffer<B, const float*> densities;
  if (needs.density) {
    std::vector<const float*> of_layers;
    for (const ScoredLayer& l : layers) of_layers.push_back(l.density);
    densities = Buffer<B, const float*>(be, std::span<const float* const>(of_layers));
  }

  // Budgets.
  const Buffer<B, Index> available_units(be, available), available_in_tokens(be, available_tokens),
      stay_counts(be, stays), group_totals(be, totals), group_quanta(be, quanta), part_map(be, part_of),
      reserved_counts(be, reserved);
  const Buffer<B, LayerSummary> summaries(be, part_count);
  const Buffer<B, double> wishes(be, part_count);
  const Buffer<B, Index> keep(be, part_count), k(be, row_count), nan_counts(be, row_count);
  method.allocate(std::ssize(groups),
                  {summary_rows.data(), curves.data(), curves.counts(), densities.data(), available_units.data(),
                   available_in_tokens.data(), stay_counts.data(), method.selector.recent_share, group_totals.data(),
                   group_quanta.data(), static_cast<Index>(n), scope.layers_alike, summaries.data(), wishes.data(),
                   keep.data()});
  be.each(row_count, RowBudgets{keep.data(), part_map.data(), reserved_counts.data(), k.data()});

  std::vector<Index> chosen_at(rows.size() + 1, 0);
  for (std::size_t r = 0; r < rows.size(); ++r)
    chosen_at[r + 1] = chosen_at[r] + static_cast<Index>(rows[r].candidates.size());
  if (selector.heads == SelectHeads::shared && !together)
    share_heads(be, selector, layers, parts, rows, chosen_at, k.data());

  // The choice.
  const Buffer<B, std::uint64_t> chosen(be, chosen_at.back());
  fill(be, chosen.data(), chosen.size(), std::uint64_t{0});
  std::vector<ChoiceRow> choices(rows.size());
  for (const PlanPart& part : parts) {
    const ScoredLayer& layer = layers[part.layer];
    for (std::size_t r = part.first_row; r < part.first_row + part.rows; ++r) {
      ChoiceRow& choice = choices[r];
      choice.k = k.data() + r;
      choice.scores = layer.scores + part.before(layer), choice.heads = static_cast<Index>(layer.heads.size());
      choice.stride = layer.scored_columns;
      choice.within_budget = method.budgets_scored;
      const Index head = static_cast<Index>(r - part.first_row);
      choice.top = {together ? means[part.layer].data() + part.before(layer) : choice.scores + head * choice.stride,
                    candidate_bits[r].data(),
                    choice.k,
                    chosen.data() + chosen_at[r],
                    nan_counts.data() + r,
                    part.scored(layer),
                    layer.columns->word_tokens};
      for (Index c = 0; c < choice.top.columns; ++c)
        if (layer.columns->has(rows[r].candidates, c)) choice.columns.push_back(static_cast<std::int32_t>(c));
    }
  }
  if (whole_pages) {
    std::vector<PageChoice> of_pages;
    for (std::size_t r = 0; r < rows.size(); ++r) of_pages.push_back({choices[r].top, choices[r].k, &rows[r].pages});
    choose_pages<B>(be, selector, of_pages);
  } else {
    choose<B>(be, selector, choices);
  }

  std::vector<std::uint64_t> chosen_words;
  std::vector<Index> keep_counts, nans;
  std::vector<std::vector<float>> scores_on_host(selector.merge == MergeInto::values ? n : 0);
  for (std::size_t l = 0; l < scores_on_host.size(); ++l) {
    scores_on_host[l].resize(layers[l].heads.size() * static_cast<std::size_t>(layers[l].scored_columns));
    if (!scores_on_host[l].empty())
      be.to_host(scores_on_host[l].data(), layers[l].scores,
                 static_cast<Index>(scores_on_host[l].size() * sizeof(float)));
  }
  keep.to_host(keep_counts);
  nan_counts.to_host(nans);
  be.wait(chosen.to_host(chosen_words));

  for (std::size_t l = 0; l < n; ++l) {
    const ScoredLayer& layer = layers[l];
    LayerPlan& out = plan.layers[static_cast<std::size_t>(layer.layer)];
    out.touched = true;
    for (std::size_t p = l; p < parts.size(); p += n) out.budget += keep_counts[p];
    for (Index h = 0; h < std::ssize(layer.heads); ++h) {
      std::vector<std::uint64_t> stay(static_cast<std::size_t>(layer.columns->words()), ~std::uint64_t{0});
      std::vector<Merge> merges;
      for (std::size_t p = l; p < parts.size(); p += n) {
        const PlanPart& part = parts[p];
        const std::size_t r = part.first_row + (part.rows == 1 ? 0 : static_cast<std::size_t>(h));
        const PlanRow& row = rows[r];
        const auto of_row =
            std::span(chosen_words).subspan(static_cast<std::size_t>(chosen_at[r]), row.candidates.size());
        for (std::size_t w = 0; w < of_row.size(); ++w) {
          stay[static_cast<std::size_t>(part.first_word) + w] &= ~row.candidates[w] | of_row[w];
          plan.chosen += std::popcount(of_row[w]);
        }
        if (selector.merge != MergeInto::none) {
          const auto tokens = merge_tokens(layer, part, row, of_row, selector.ends_absorb);
          if (selector.merge == MergeInto::nearest)
            merges.push_back(merge_into_nearest(tokens, selector.merge_keys));
          else
            merges.push_back(
                merge_values(tokens,
                                     std::span(scores_on_host[l])
                                         .subspan(static_cast<std::size_t>(h * layer.scored_columns),
                                                  static_cast<std::size_t>(layer.scored_columns)),
                                     selector, layer.layer, h));
        }
        plan.candidates += row.candidate_count;
        plan.nan_scores += nans[r];
      }
      const HeadPages& list = layer.heads[static_cast<std::size_t>(h)];
      Selection selection(layer.columns->to_slots(list, h, stay));
      selection &= Selection::live(list.entries);
      out.keep.push_back(std::move(selection));
      if (!merges.empty()) out.merges.push_back(joined(std::move(merges)));
    }
  }
}

}  // namespace detail
}  // namespace kvpare

// From scores to a plan: budgets over the layers, then the choice in every head. Reads the cache, changes nothing.
//
//   scores ──mean over heads──► summaries ──allocate──► keep[layer] ──► k[row] ──select_top──► bitmaps ──one copy──► Plan
//
// Tokens with a budget of their own (a group, see TopK) go through this side by side: a *part* is a group's tokens in a layer, a
// row one head of a part. Rows hold just the words of the layer's bitmaps that the part has tokens in.
// Everything up to the bitmaps stays in backend memory; the one wait is for their copy.
#pragma once

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "../backend/derived/reduce_heads.hpp"
#include "../cache/plan.hpp"
#include "../policy/budget/apportion.hpp"
#include "choosing.hpp"
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

template <class A>
struct AllocateLayers {
  A allocator;
  const RowSummary* rows;       // [parts] of mean scores; as what follows, null when the allocator needs none
  const double* const* curves;  // [parts] with how many numbers each has
  const Index* curve_counts;
  const float* const* densities;  // [layers]
  const Index* available;         // [parts] in units of the group's quantum
  const Index* available_tokens;
  const Index *totals, *quanta;  // [groups] quantum: tokens of a unit
  Index layers;
  bool alike;
  LayerSummary* summaries;  // [parts] as what follows; part = group * layers + layer
  double* scratch;
  Index* keep;

  KVPARE_HD void operator()(Index group) const {
    const Index first = group * layers, end = first + layers;
    for (Index p = first; p < end; ++p) {
      summaries[p] = {};
      if (rows != nullptr) summaries[p] = {rows[p].sum, rows[p].skewness(), rows[p].count};
      if (curves != nullptr) summaries[p].curve = curves[p], summaries[p].count = curve_counts[p];
      if (densities != nullptr) summaries[p].density = static_cast<double>(*densities[p - first]);
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
  double* wish;  // [rows]
  Index* k;      // [rows] even budgets before, shared ones after
  KVPARE_HD void operator()(Index part) const {
    const Index first = first_row[part];
    Index total = 0;
    for (Index r = first; r < first + heads[part]; ++r) {
      Index count = 0;
      for (Index w = hits_at[r]; w < hits_at[r + 1]; ++w)
        for (std::uint64_t left = hits[w]; left != 0; left &= left - 1) ++count;
      wish[r] = product(static_cast<double>(count), 1 - floor) + product(static_cast<double>(k[r]), floor);
      total += k[r];
    }
    apportion(wish + first, candidate_count + first, heads[part], total, 0, k + first);
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

/// A token that stays, and those that go and have none nearer to join.
struct Absorbed {
  Position into;
  std::vector<Position> from;
};

/// Adds every token of a row that goes, with the nearest that stays. `chosen`: candidates that stay.
inline void merge_into_nearest(const ScoredLayer& layer, const PlanPart& part, const PlanRow& row,
                               std::span<const std::uint64_t> chosen, bool ends_absorb, std::vector<Absorbed>& out) {
  const Columns& columns = *layer.columns;
  struct Token {
    Position position;
    bool goes, absorbs;
  };
  std::vector<Token> tokens;
  const Index before = part.before(layer);
  for (Index c = 0; c < std::ssize(part.tokens) * columns.word_tokens; ++c)
    if (columns.has(row.members, c)) {
      const bool candidate = columns.has(row.candidates, c), stays = !candidate || columns.has(chosen, c);
      tokens.push_back(
          {columns.positions[static_cast<std::size_t>(before + c)], !stays, stays && (candidate || ends_absorb)});
    }
  std::vector<Index> absorbing;
  for (Index t = 0; t < std::ssize(tokens); ++t)
    if (tokens[static_cast<std::size_t>(t)].absorbs) absorbing.push_back(t);
  Index t = 0;
  for (std::size_t a = 0; a < absorbing.size(); ++a) {
    const Index here = absorbing[a];
    // The last token of which this one is the nearest, ties to the older.
    const Index last = a + 1 < absorbing.size() ? (here + absorbing[a + 1]) / 2 : std::ssize(tokens) - 1;
    Absorbed absorbed{tokens[static_cast<std::size_t>(here)].position, {}};
    for (; t <= last; ++t)
      if (tokens[static_cast<std::size_t>(t)].goes)
        absorbed.from.push_back(tokens[static_cast<std::size_t>(t)].position);
    if (!absorbed.from.empty()) out.push_back(std::move(absorbed));
  }
}

/// Of one head, whatever group it is from.
inline Merge merge_of(std::vector<Absorbed> absorbed) {
  std::sort(absorbed.begin(), absorbed.end(), [](const Absorbed& a, const Absorbed& b) { return a.into < b.into; });
  Merge merge;
  for (const Absorbed& a : absorbed) {
    merge.into.push_back(a.into);
    merge.from.insert(merge.from.end(), a.from.begin(), a.from.end());
    merge.begin.push_back(std::ssize(merge.from));
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
void share_heads(B& be, double floor, std::span<const ScoredLayer> layers, const std::vector<PlanPart>& parts,
                 const std::vector<PlanRow>& rows, const std::vector<Index>& words_at, Index* k) {
  const Index n = std::ssize(parts), row_count = std::ssize(rows);
  std::vector<Index> first_row, heads, counts;
  std::vector<std::uint64_t> candidates;
  for (const PlanPart& part : parts)
    first_row.push_back(static_cast<Index>(part.first_row)), heads.push_back(static_cast<Index>(part.rows));
  for (const PlanRow& row : rows) {
    counts.push_back(row.candidate_count);
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
  be.select_top(tops);
  be.each(n, ShareHeads{first.data(), head_counts.data(), hits.data(), at.data(), candidate_counts.data(), floor,
                        wishes.data(), k});
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

/// Fills in `plan.layers` (indexed by ScoredLayer::layer) and its counts; `groups` are those that layers say `given` of. One
/// wait, none when nothing is up for choice.
template <Backend B, class C>
void plan_layers(B& be, const C& compressor, std::span<const TokenGroup> groups, std::span<const ScoredLayer> layers,
                 PlanScope scope, Plan& plan) {
  using detail::PlanPart;
  using detail::PlanRow;
  check(compressor.keep);
  const TopK& selector = compressor.selector;
  const bool together = selector.heads == SelectHeads::layer || scope.heads_together;
  const std::size_t n = layers.size();
  if (n == 0 || groups.empty() || !evicts(compressor)) return;

  with_policy(compressor.budget, [&](const auto& a) { check_layers_of(a, static_cast<Index>(n)); });

  // What is up for choice, and how much of it stays.
  std::vector<std::vector<std::vector<std::uint64_t>>> open(n);  // [layer][head]
  for (std::size_t l = 0; l < n; ++l) {
    const bool one = together && layers[l].columns->aligned;
    for (Index h = 0; h < (one ? 1 : std::ssize(layers[l].heads)); ++h)
      open[l].push_back(detail::open_columns(layers[l], h));
  }
  std::vector<PlanPart> parts;  // group by group, layer by layer
  std::vector<PlanRow> rows;
  std::vector<Index> available_tokens, available, part_of, reserved, totals, quanta;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    const Keep& keep = groups[g].keep;
    const bool in_pages = keep.unit == Keep::Unit::pages || keep.unit == Keep::Unit::bytes;
    plan.dense = plan.dense || in_pages;
    totals.push_back(detail::total_of(keep, g, layers));
    quanta.push_back(in_pages ? layers[0].columns->word_tokens : 1);
    for (std::size_t l = 0; l < n; ++l) {
      PlanPart& part = parts.emplace_back(detail::plan_part(layers[l], l, groups[g].at));
      part.first_row = rows.size(), part.rows = open[l].size();
      Index most = 0;
      for (const auto& of_head : open[l]) {
        rows.push_back(detail::plan_row(layers[l], part, of_head, selector));
        most = std::max(most, rows.back().candidate_count + rows.back().reserved);
        part_of.push_back(std::ssize(parts) - 1);
        reserved.push_back(rows.back().reserved);
      }
      available_tokens.push_back(most);
      available.push_back(ceil_div(most, quanta.back()));
    }
  }
  const Index row_count = std::ssize(rows), part_count = std::ssize(parts);

  // Mean over heads, where budgets or the choice need it.
  const BudgetNeeds needs = needs_of(compressor.budget);
  std::vector<Buffer<B, float>> means;
  if (together || needs.summary || needs.curve)
    for (const ScoredLayer& l : layers) {
      means.emplace_back(be, l.scored_columns);
      reduce_heads(be, l.scores, static_cast<Index>(l.heads.size()), l.scored_columns, means.back().data());
    }
  Buffer<B, RowSummary> summary_rows;
  detail::LayerCurves<B> curves;
  std::vector<Buffer<B, std::uint64_t>> candidate_bits;
  for (const PlanRow& row : rows) candidate_bits.emplace_back(be, std::span<const std::uint64_t>(row.candidates));
  if (needs.summary || needs.curve) {
    std::vector<Buffer<B, std::uint64_t>> unions;
    const auto of_any_head = [&](std::vector<std::uint64_t> PlanRow::*tokens) {
      std::vector<MaskedRow> masked;
      for (const PlanPart& part : parts) {
        const ScoredLayer& layer = layers[part.layer];
        std::vector<std::uint64_t> any(part.tokens.size(), 0);
        for (std::size_t r = part.first_row; r < part.first_row + part.rows; ++r)
          for (std::size_t w = 0; w < any.size(); ++w) any[w] |= (rows[r].*tokens)[w];
        unions.emplace_back(be, std::span<const std::uint64_t>(any));
        masked.push_back({means[part.layer].data() + part.before(layer), unions.back().data(), part.scored(layer),
                          layer.columns->word_tokens});
      }
      return masked;
    };
    if (needs.summary) {
      summary_rows = Buffer<B, RowSummary>(be, part_count);
      be.reduce(of_any_head(&PlanRow::candidates), summary_rows.data());
    }
    if (needs.curve) curves = detail::LayerCurves<B>(be, of_any_head(&PlanRow::members));
  }
  Buffer<B, const float*> densities;
  if (needs.density) {
    std::vector<const float*> of_layers;
    for (const ScoredLayer& l : layers) of_layers.push_back(l.density);
    densities = Buffer<B, const float*>(be, std::span<const float* const>(of_layers));
  }

  // Budgets.
  const Buffer<B, Index> available_units(be, available), available_in_tokens(be, available_tokens),
      group_totals(be, totals), group_quanta(be, quanta), part_map(be, part_of), reserved_counts(be, reserved);
  const Buffer<B, LayerSummary> summaries(be, part_count);
  const Buffer<B, double> wishes(be, part_count);
  const Buffer<B, Index> keep(be, part_count), k(be, row_count), nan_counts(be, row_count);
  with_policy(compressor.budget, [&](const auto& allocator) {
    be.each(std::ssize(groups),
            detail::AllocateLayers<std::remove_cvref_t<decltype(allocator)>>{
                allocator, summary_rows.data(), curves.data(), curves.counts(), densities.data(),
                available_units.data(), available_in_tokens.data(), group_totals.data(), group_quanta.data(),
                static_cast<Index>(n), scope.layers_alike, summaries.data(), wishes.data(), keep.data()});
  });
  be.each(row_count, detail::RowBudgets{keep.data(), part_map.data(), reserved_counts.data(), k.data()});

  std::vector<Index> chosen_at(rows.size() + 1, 0);
  for (std::size_t r = 0; r < rows.size(); ++r)
    chosen_at[r + 1] = chosen_at[r] + static_cast<Index>(rows[r].candidates.size());
  if (selector.heads == SelectHeads::shared && !together)
    detail::share_heads(be, selector.floor, layers, parts, rows, chosen_at, k.data());

  // The choice.
  const Buffer<B, std::uint64_t> chosen(be, chosen_at.back());
  fill(be, chosen.data(), chosen.size(), std::uint64_t{0});
  std::vector<detail::ChoiceRow> choices(rows.size());
  for (const PlanPart& part : parts) {
    const ScoredLayer& layer = layers[part.layer];
    for (std::size_t r = part.first_row; r < part.first_row + part.rows; ++r) {
      detail::ChoiceRow& choice = choices[r];
      choice.k = k.data() + r;
      choice.scores = layer.scores + part.before(layer), choice.heads = static_cast<Index>(layer.heads.size());
      choice.stride = layer.scored_columns;
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
  detail::choose<B>(be, selector, choices);

  std::vector<std::uint64_t> chosen_words;
  std::vector<Index> keep_counts, nans;
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
      std::vector<detail::Absorbed> absorbed;
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
        if (selector.merge == MergeInto::nearest)
          detail::merge_into_nearest(layer, part, row, of_row, selector.ends_absorb, absorbed);
        plan.candidates += row.candidate_count;
        plan.nan_scores += nans[r];
      }
      const HeadPages& list = layer.heads[static_cast<std::size_t>(h)];
      Selection selection(layer.columns->to_slots(list, h, stay));
      selection &= Selection::live(list.entries);
      out.keep.push_back(std::move(selection));
      if (selector.merge == MergeInto::nearest) out.merges.push_back(detail::merge_of(std::move(absorbed)));
    }
  }
}

}  // namespace kvpare

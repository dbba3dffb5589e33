// From scores to a plan: budgets over the layers, then the choice in every head. Reads the cache, changes nothing.
//
//   scores ──mean over heads──► summaries ──allocate──► keep[layer] ──► k[row] ──select_top──► bitmaps ──one copy──► Plan
//
// Everything up to the bitmaps stays in backend memory; the one wait is for their copy.
#pragma once

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "../backend/derived/reduce_heads.hpp"
#include "../cache/plan.hpp"
#include "../policy/budget/apportion.hpp"
#include "choosing_pages.hpp"
#include "compressor.hpp"

namespace kvpare {

/// One layer as planning sees it.
struct ScoredLayer {
  Index layer = 0;  // index in the plan
  std::span<const HeadPages> heads;
  const Columns* columns = nullptr;
  const float* scores = nullptr;  // [backend] [kv_heads, scored_columns]
  const float* density = nullptr;  // [backend] what the scorer measured, where the budget needs it
  Index scored_columns = 0;
  Index given = 0;       // tokens of the selector's classes the layer was ever given: what a ratio is of
  Index frozen = 0;      // leading columns that must stay whatever the scores
  Index page_bytes = 0;  // of one kv head, for budgets in bytes
  int settled = -1;      // tokens in pages of this format take no part: nobody chooses, or counts, them
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
  const RowSummary* rows;       // of the layers' mean scores; as what follows, null when the allocator needs none
  const double* const* curves;  // with how many numbers each has
  const Index* curve_counts;
  const float* const* densities;
  const Index* available;  // in units of `quantum` tokens
  const Index* available_tokens;
  Index layers, total, quantum;
  bool alike;
  LayerSummary* summaries;
  double* scratch;
  Index* keep;

  KVPARE_HD void operator()(Index) const {
    for (Index l = 0; l < layers; ++l) {
      summaries[l] = {};
      if (rows != nullptr) summaries[l] = {rows[l].sum, rows[l].skewness(), rows[l].count};
      if (curves != nullptr) summaries[l].curve = curves[l], summaries[l].count = curve_counts[l];
      if (densities != nullptr) summaries[l].density = static_cast<double>(*densities[l]);
    }
    if (alike) {
      for (Index l = 0; l < layers; ++l) keep[l] = total / layers;
    } else {
      allocator.allocate(summaries, available, layers, total, scratch, keep);
    }
    for (Index l = 0; l < layers; ++l) {
      keep[l] *= quantum;
      if (keep[l] > available_tokens[l]) keep[l] = available_tokens[l];
    }
  }
};

struct RowBudgets {
  const Index* keep;      // [layers]
  const Index* layer_of;  // [rows]
  const Index* reserved;  // [rows] tokens of the class that stay anyway
  Index* k;               // [rows]
  KVPARE_HD void operator()(Index row) const {
    const Index left = keep[layer_of[row]] - reserved[row];
    k[row] = left > 0 ? left : 0;
  }
};

/// Heads of a layer side by side, each padded to whole words, so that one row of candidates spans them all.
struct SideBySide {
  const float* scores;  // [heads, columns]
  Index columns, padded;
  float* out;  // [heads, padded]
  KVPARE_HD void operator()(Index i) const {
    const Index column = i % padded;
    out[i] = column < columns ? scores[i / padded * columns + column] : 0.0f;
  }
};

/// One layer per call: its heads' budgets after the layer's best have been counted head by head.
struct ShareHeads {
  const Index* first_row;        // [layers] of k
  const Index* heads;            // [layers]
  const std::uint64_t* hits;     // bitmaps of the layer's best, row by row
  const Index* hits_at;          // [rows + 1]
  const Index* candidate_count;  // [rows]
  double floor;
  double* wish;  // [rows]
  Index* k;      // [rows] even budgets before, shared ones after
  KVPARE_HD void operator()(Index layer) const {
    const Index first = first_row[layer];
    Index total = 0;
    for (Index r = first; r < first + heads[layer]; ++r) {
      Index count = 0;
      for (Index w = hits_at[r]; w < hits_at[r + 1]; ++w)
        for (std::uint64_t left = hits[w]; left != 0; left &= left - 1) ++count;
      wish[r] = product(static_cast<double>(count), 1 - floor) + product(static_cast<double>(k[r]), floor);
      total += k[r];
    }
    apportion(wish + first, candidate_count + first, heads[layer], total, 0, k + first);
  }
};

struct AddUp {
  const Index* first_row;
  const Index* heads;
  const Index* k;
  Index* total;  // [layers]
  KVPARE_HD void operator()(Index layer) const {
    total[layer] = 0;
    for (Index r = first_row[layer]; r < first_row[layer] + heads[layer]; ++r) total[layer] += k[r];
  }
};

/// Per row of selection: a head of a layer, or a whole layer whose heads choose together.
struct PlanRow {
  std::size_t layer;  // index into the layers given
  Index head;         // kv head; 0 stands for all when `for_all_heads`
  bool for_all_heads;
  std::vector<std::uint64_t> candidates;  // bitmap over scored columns
  std::vector<std::uint64_t> members;     // of the selector's classes, candidates or not
  Index reserved = 0;                     // class members that stay anyway
  Index candidate_count = 0;
  WholePages pages = {};  // of the candidates, where pages stay or go whole

  /// What the candidates take of a budget.
  Index room() const { return pages.most > 0 ? pages.room() : candidate_count; }
};

/// Takes a column off a bitmap; was it there?
inline bool take_column(const Columns& columns, Index column, std::vector<std::uint64_t>& bitmap) {
  const bool there = columns.has(bitmap, column);
  if (there)
    bitmap[static_cast<std::size_t>(column / columns.word_tokens)] &= ~(std::uint64_t{1} << (column % columns.word_tokens));
  return there;
}

inline PlanRow plan_row(const ScoredLayer& layer, std::size_t index, Index head, bool for_all, const TopK& selector) {
  const Columns& columns = *layer.columns;
  auto members = columns.of_class(selector.among);
  const auto live = columns.live_in(head);
  PlanRow row{index, head, for_all, {}, {}, 0, 0};
  std::vector<std::uint64_t> settled(static_cast<std::size_t>(columns.words()), 0);
  if (layer.settled >= 0) {
    std::vector<std::uint64_t> words;
    for (const Entry& e : layer.heads[static_cast<std::size_t>(head)].entries)
      words.push_back(e.format == layer.settled ? e.live : 0);
    settled = columns.from_slots(layer.heads[static_cast<std::size_t>(head)], head, words);
  }
  for (std::size_t w = 0; w < members.size(); ++w) members[w] &= live[w] & ~settled[w];
  row.members = members;
  std::vector<std::uint64_t> between = members;
  Index first = selector.first, last = selector.last;
  for (Index c = 0; c < columns.count && first > 0; ++c) first -= take_column(columns, c, between);
  for (Index c = columns.count; c-- > 0 && last > 0;) last -= take_column(columns, c, between);
  for (Index w = 0; w < columns.words(); ++w) {
    const std::uint64_t member = members[static_cast<std::size_t>(w)];
    const std::uint64_t scored =
        low_bits(std::clamp<Index>(layer.scored_columns - w * columns.word_tokens, 0, columns.word_tokens));
    const std::uint64_t thawed =
        ~low_bits(std::clamp<Index>(layer.frozen - w * columns.word_tokens, 0, columns.word_tokens));
    const std::uint64_t candidate =
        between[static_cast<std::size_t>(w)] & scored & thawed & ~columns.is_protected[static_cast<std::size_t>(w)];
    row.candidates.push_back(candidate);
    row.candidate_count += std::popcount(candidate);
    row.reserved += std::popcount(member & ~candidate);
  }
  return row;
}

/// Leaves only whole pages up for choice: those whose tokens are all candidates. `cost`: what a page takes of the budget, 0 =
/// as much as it holds tokens of the selector's classes.
inline void keep_to_whole_pages(const ScoredLayer& layer, Index cost, PlanRow& row) {
  const Columns& columns = *layer.columns;
  const HeadPages& list = layer.heads[static_cast<std::size_t>(row.head)];
  auto up = columns.to_slots(list, row.head, row.candidates);
  const auto members = columns.to_slots(list, row.head, row.members);
  row.candidate_count = row.reserved = 0;
  row.pages.page_tokens = list.page_tokens, row.pages.most = cost > 0 ? cost : list.page_tokens;
  for (std::size_t e = 0; e < up.size(); ++e) {
    if (members[e] == 0) continue;
    const Index takes = cost > 0 ? cost : std::popcount(members[e]);
    if (up[e] == list.entries[e].live) {
      row.candidate_count += std::popcount(up[e]);
      row.pages.add(columns, list, row.head, e, takes);
    } else {
      up[e] = 0;
      row.reserved += takes;
    }
  }
  row.candidates = columns.from_slots(list, row.head, up);
}

/// Every token that goes, with the nearest that stays. `chosen`: candidates that stay.
inline Merge merge_into_nearest(const Columns& columns, const PlanRow& row, std::span<const std::uint64_t> chosen,
                                bool ends_absorb) {
  struct Token {
    Position position;
    bool goes, absorbs;
  };
  std::vector<Token> tokens;
  for (Index c = 0; c < columns.count; ++c)
    if (columns.has(row.members, c)) {
      const bool candidate = columns.has(row.candidates, c), stays = !candidate || columns.has(chosen, c);
      tokens.push_back({columns.positions[static_cast<std::size_t>(c)], !stays, stays && (candidate || ends_absorb)});
    }
  std::vector<Index> absorbing;
  for (Index t = 0; t < static_cast<Index>(tokens.size()); ++t)
    if (tokens[static_cast<std::size_t>(t)].absorbs) absorbing.push_back(t);
  Merge merge;
  Index t = 0;
  for (std::size_t a = 0; a < absorbing.size(); ++a) {
    const Index here = absorbing[a];
    // The last token of which this one is the nearest, ties to the older.
    const Index last = a + 1 < absorbing.size() ? (here + absorbing[a + 1]) / 2 : static_cast<Index>(tokens.size()) - 1;
    const std::size_t before = merge.from.size();
    for (; t <= last; ++t)
      if (tokens[static_cast<std::size_t>(t)].goes) merge.from.push_back(tokens[static_cast<std::size_t>(t)].position);
    if (merge.from.size() == before) continue;
    merge.into.push_back(tokens[static_cast<std::size_t>(here)].position);
    merge.begin.push_back(static_cast<Index>(merge.from.size()));
  }
  return merge;
}

/// Tokens (or pages) over all layers that an amount stands for.
inline Index total_of(const Keep& keep, std::span<const ScoredLayer> layers) {
  if (keep.unit == Keep::Unit::ratio) {
    double given = 0;
    for (const ScoredLayer& l : layers) given += static_cast<double>(l.given);
    return static_cast<Index>(std::floor(keep.amount * given + 0.5));
  }
  if (keep.unit != Keep::Unit::bytes) return static_cast<Index>(keep.amount);
  Index largest = 1;  // bytes of one page in every kv head of a layer
  for (const ScoredLayer& l : layers) largest = std::max(largest, l.page_bytes * static_cast<Index>(l.heads.size()));
  return static_cast<Index>(keep.amount) / largest;
}

/// Ada-KV: the heads of a layer draw on one budget, each as much as it has of the layer's best, and no less than a floor.
template <Backend B>
void share_heads(B& be, double floor, std::span<const ScoredLayer> layers, const std::vector<PlanRow>& rows,
                 const std::vector<Index>& words_at, Index* k) {
  const Index n = static_cast<Index>(layers.size()), row_count = static_cast<Index>(rows.size());
  std::vector<Index> first_row, heads, counts;
  std::vector<std::uint64_t> candidates;
  for (Index r = 0; r < row_count; ++r) {
    const PlanRow& row = rows[static_cast<std::size_t>(r)];
    if (first_row.size() == row.layer) first_row.push_back(r), heads.push_back(0);
    ++heads.back();
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
  for (Index l = 0; l < n; ++l) {
    const ScoredLayer& layer = layers[static_cast<std::size_t>(l)];
    const Index padded = layer.columns->words() * layer.columns->word_tokens;
    const Index begin = words_at[static_cast<std::size_t>(first_row[static_cast<std::size_t>(l)])];
    rows_of_heads.emplace_back(be, heads[static_cast<std::size_t>(l)] * padded);
    be.each(rows_of_heads.back().size(),
            SideBySide{layer.scores, layer.scored_columns, padded, rows_of_heads.back().data()});
    tops.push_back({rows_of_heads.back().data(), up_for_choice.data() + begin, totals.data() + l, hits.data() + begin,
                    nullptr, rows_of_heads.back().size(), layer.columns->word_tokens});
  }
  be.select_top(tops);
  be.each(n, ShareHeads{first.data(), head_counts.data(), hits.data(), at.data(), candidate_counts.data(), floor,
                        wishes.data(), k});
}

/// Of each layer the running sums of its scores, best first.
template <Backend B>
class LayerCurves {
 public:
  LayerCurves() = default;
  LayerCurves(B& be, std::span<const MaskedRow> layers) : counts_(be, static_cast<Index>(layers.size())) {
    std::vector<Buffer<B, Index>> columns;
    std::vector<SortRow> sorts;
    std::vector<const double*> of_layers;
    for (const MaskedRow& row : layers) {
      columns.emplace_back(be, row.columns);
      sums_.emplace_back(be, row.columns);
      of_layers.push_back(sums_.back().data());
      sorts.push_back({row, columns.back().data(), nullptr, sums_.back().data(),
                       counts_.data() + static_cast<Index>(sorts.size())});
    }
    be.sort_rows(sorts);
    pointers_ = Buffer<B, const double*>(be, std::span<const double* const>(of_layers));
  }
  const double* const* data() const { return pointers_.data(); }
  const Index* counts() const { return counts_.data(); }

 private:
  std::vector<Buffer<B, double>> sums_;
  Buffer<B, Index> counts_;
  Buffer<B, const double*> pointers_;
};

}  // namespace detail

/// Fills in `plan.layers` (indexed by ScoredLayer::layer) and its counts. One wait, none when nothing is up for choice.
template <Backend B, class C>
void plan_layers(B& be, const C& compressor, std::span<const ScoredLayer> layers, PlanScope scope, Plan& plan) {
  using detail::PlanRow;
  check(compressor.keep);
  const TopK& selector = compressor.selector;
  const bool together = selector.heads == SelectHeads::layer || scope.heads_together;
  const std::size_t n = layers.size();
  if (n == 0 || (compressor.keep == Keep::ratio(1) && !selector.only_positive)) return;

  with_policy(compressor.budget, [&](const auto& a) { check_layers_of(a, static_cast<Index>(n)); });

  // What is up for choice, and how much of it stays.
  std::vector<PlanRow> rows;
  std::vector<Index> available_tokens(n, 0), available(n), layer_of, reserved;
  const bool in_pages = compressor.keep.unit == Keep::Unit::pages || compressor.keep.unit == Keep::Unit::bytes;
  const Index quantum = in_pages ? layers[0].columns->word_tokens : 1;
  const bool whole_pages = selector.granularity == Granularity::page;
  plan.dense = in_pages && !whole_pages, plan.in_place = whole_pages;
  for (std::size_t l = 0; l < n; ++l) {
    const bool one = together && layers[l].columns->aligned;
    for (Index h = 0; h < (one ? 1 : static_cast<Index>(layers[l].heads.size())); ++h) {
      rows.push_back(detail::plan_row(layers[l], l, h, one, selector));
      if (whole_pages) detail::keep_to_whole_pages(layers[l], in_pages ? quantum : 0, rows.back());
      const PlanRow& row = rows.back();
      available_tokens[l] = std::max(available_tokens[l], row.room() + row.reserved);
      layer_of.push_back(static_cast<Index>(l));
      reserved.push_back(row.reserved);
    }
    available[l] = ceil_div(available_tokens[l], quantum);
  }
  const Index row_count = static_cast<Index>(rows.size());
  const Index total = detail::total_of(compressor.keep, layers);

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
      for (std::size_t l = 0, r = 0; l < n; ++l) {
        std::vector<std::uint64_t> any = rows[r].*tokens;
        for (; r < rows.size() && rows[r].layer == l; ++r)
          for (std::size_t w = 0; w < any.size(); ++w) any[w] |= (rows[r].*tokens)[w];
        unions.emplace_back(be, std::span<const std::uint64_t>(any));
        masked.push_back(
            {means[l].data(), unions.back().data(), layers[l].scored_columns, layers[l].columns->word_tokens});
      }
      return masked;
    };
    if (needs.summary) {
      summary_rows = Buffer<B, RowSummary>(be, static_cast<Index>(n));
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
      layer_map(be, layer_of), reserved_counts(be, reserved);
  const Buffer<B, LayerSummary> summaries(be, static_cast<Index>(n));
  const Buffer<B, double> wishes(be, static_cast<Index>(n));
  const Buffer<B, Index> keep(be, static_cast<Index>(n)), k(be, row_count), nan_counts(be, row_count);
  with_policy(compressor.budget, [&](const auto& allocator) {
    be.each(1, detail::AllocateLayers<std::remove_cvref_t<decltype(allocator)>>{
                   allocator, summary_rows.data(), curves.data(), curves.counts(), densities.data(),
                   available_units.data(), available_in_tokens.data(),
                   static_cast<Index>(n), total, quantum, scope.layers_alike, summaries.data(), wishes.data(),
                   keep.data()});
  });
  be.each(row_count, detail::RowBudgets{keep.data(), layer_map.data(), reserved_counts.data(), k.data()});

  std::vector<Index> chosen_at(rows.size() + 1, 0);
  for (std::size_t r = 0; r < rows.size(); ++r)
    chosen_at[r + 1] = chosen_at[r] + static_cast<Index>(rows[r].candidates.size());
  if (selector.heads == SelectHeads::shared && !together)
    detail::share_heads(be, selector.floor, layers, rows, chosen_at, k.data());

  // The choice.
  const Buffer<B, std::uint64_t> chosen(be, chosen_at.back());
  fill(be, chosen.data(), chosen.size(), std::uint64_t{0});
  std::vector<detail::ChoiceRow> choices(rows.size());
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const PlanRow& row = rows[r];
    const ScoredLayer& layer = layers[row.layer];
    detail::ChoiceRow& choice = choices[r];
    choice.k = k.data() + r;
    choice.top = {together ? means[row.layer].data() : layer.scores + row.head * layer.scored_columns,
                  candidate_bits[r].data(), choice.k, chosen.data() + chosen_at[r], nan_counts.data() + r,
                  std::min(layer.scored_columns, layer.columns->count), layer.columns->word_tokens};
    for (Index c = 0; c < choice.top.columns; ++c)
      if (layer.columns->has(row.candidates, c)) choice.columns.push_back(static_cast<std::int32_t>(c));
    choice.scores = layer.scores, choice.heads = static_cast<Index>(layer.heads.size());
    choice.stride = layer.scored_columns;
  }
  if (whole_pages) {
    std::vector<detail::PageChoice> of_pages;
    for (std::size_t r = 0; r < rows.size(); ++r) of_pages.push_back({choices[r].top, choices[r].k, &rows[r].pages});
    detail::choose_pages<B>(be, selector, of_pages);
  } else {
    detail::choose<B>(be, selector, choices);
  }

  std::vector<std::uint64_t> chosen_words;
  std::vector<Index> keep_counts, nans;
  keep.to_host(keep_counts);
  nan_counts.to_host(nans);
  be.wait(chosen.to_host(chosen_words));

  for (std::size_t r = 0; r < rows.size(); ++r) {
    const PlanRow& row = rows[r];
    const ScoredLayer& layer = layers[row.layer];
    LayerPlan& out = plan.layers[static_cast<std::size_t>(layer.layer)];
    out.touched = true;
    out.budget = keep_counts[row.layer];
    const Index heads = row.for_all_heads ? static_cast<Index>(layer.heads.size()) : 1;
    std::vector<std::uint64_t> stay(row.candidates.size());
    Index chosen_count = 0;
    for (std::size_t w = 0; w < stay.size(); ++w) {
      const std::uint64_t word = chosen_words[static_cast<std::size_t>(chosen_at[r]) + w];
      chosen_count += std::popcount(word);
      stay[w] = ~row.candidates[w] | word;  // what was not up for choice stays
    }
    for (Index h = 0; h < heads; ++h) {
      const HeadPages& list = layer.heads[static_cast<std::size_t>(row.head + h)];
      Selection selection(layer.columns->to_slots(list, row.head + h, stay));
      selection &= Selection::live(list.entries);
      out.keep.push_back(std::move(selection));
      if (selector.merge == MergeInto::nearest)
        out.merges.push_back(detail::merge_into_nearest(
            *layer.columns, row, std::span(chosen_words).subspan(static_cast<std::size_t>(chosen_at[r]), stay.size()),
            selector.ends_absorb));
    }
    plan.candidates += row.candidate_count * heads;
    plan.chosen += chosen_count * heads;
    plan.nan_scores += nans[r] * heads;
  }
}

}  // namespace kvpare

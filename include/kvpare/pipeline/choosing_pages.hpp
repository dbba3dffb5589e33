// The choice among whole pages of a head's list: the best by the mean of their scores, as long as the budget has room for
// the next, and stand-ins for those that go.
//
//   scores ──means──► ──newest first──► sort_rows ──as many as fit──► pages ──distances, sort_rows──► stand-ins ──► bitmaps
//
// All rows at once, all of it in backend memory.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "choosing.hpp"

namespace kvpare {

namespace detail {

/// Pages of one row that are up for choice, as they stand in the list.
struct WholePages {
  std::vector<std::int32_t> columns;  // of their tokens, page after page
  std::vector<std::uint8_t> slots;    // where in the page each of these is
  std::vector<Index> end;             // of each page, in `columns`
  std::vector<Index> cost;            // what each takes of the budget
  std::vector<Position> last;         // newest position of each
  Index page_tokens = 0;
  Index most = 0;  // that a page may take of the budget

  /// Entry e of a head's list; its columns are counted from `before` on.
  void add(const Columns& of, Index before, const HeadPages& list, Index head, std::size_t e, Index takes) {
    for_each_bit(list.entries[e].live, [&](Index s) {
      const auto slot = e * static_cast<std::size_t>(page_tokens) + static_cast<std::size_t>(s);
      const Index column =
          of.aligned ? static_cast<Index>(slot) : Index{of.of_slot[static_cast<std::size_t>(head)][slot]};
      columns.push_back(static_cast<std::int32_t>(column - before));
      slots.push_back(static_cast<std::uint8_t>(s));
    });
    end.push_back(static_cast<Index>(columns.size()));
    cost.push_back(takes);
    last.push_back(list.entries[e].last);
  }

  Index room() const { return std::accumulate(cost.begin(), cost.end(), Index{0}); }

  /// What each page and all newer ones take together.
  std::vector<Index> cost_from_newest() const {
    std::vector<std::size_t> order(cost.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return last[a] > last[b]; });
    std::vector<Index> sums(cost.size());
    Index sum = 0;
    for (const std::size_t p : order) sums[p] = sum += cost[p];
    return sums;
  }
};

/// One row of the choice in backend memory.
struct PageRow {
  const float* scores;  // [columns]
  Index* k;
  Index* nan_count;
  Index first, pages;  // among all pages
  Index tokens, room;  // of all its pages: how many, and what they take of the budget
  Index page_tokens;
  Index most;   // that a page may take of the budget
  Index marks;  // where its columns begin in `marked`
};

/// The pages of all rows, one row after the other.
struct PageTable {
  const PageRow* rows;
  const Index* row_of;          // [pages]
  const Index* begin;           // [pages + 1] in what follows
  const std::int32_t* columns;  // of the row
  const std::uint8_t* slots;
  const Index *cost, *newest;  // [pages]
  float* value;                // [pages]
  std::uint8_t* stays;         // [pages]
};

/// Mean score of a page, in a fixed order of summation.
struct PageMeans {
  PageTable pages;
  Index* nans;  // [pages]
  KVPARE_HD void operator()(Index p) const {
    const float* scores = pages.rows[pages.row_of[p]].scores;
    double sum = 0;
    Index nan_count = 0;
    for (Index i = pages.begin[p]; i < pages.begin[p + 1]; ++i) {
      const float x = scores[pages.columns[i]];
      nan_count += x != x;
      sum += static_cast<double>(x);
    }
    pages.value[p] = static_cast<float>(sum / static_cast<double>(pages.begin[p + 1] - pages.begin[p]));
    pages.stays[p] = 0;
    nans[p] = nan_count;
  }
};

struct CountNans {
  PageTable pages;
  const Index* nans;
  KVPARE_HD void operator()(Index r) const {
    const PageRow& row = pages.rows[r];
    *row.nan_count = 0;
    for (Index p = row.first; p < row.first + row.pages; ++p) *row.nan_count += nans[p];
  }
};

/// No more than the pages whose mean is above 0.
struct BoundByPositivePages {
  PageTable pages;
  KVPARE_HD void operator()(Index r) const {
    const PageRow& row = pages.rows[r];
    Index positive = 0;
    for (Index p = row.first; p < row.first + row.pages; ++p) positive += pages.value[p] > 0 ? pages.cost[p] : 0;
    if (*row.k > positive) *row.k = positive;
  }
};

/// The newest share of a row's budget ranks above every mean.
struct BoostNewestPages {
  PageTable pages;
  double share;
  KVPARE_HD void operator()(Index p) const {
    const double wanted = product(share, static_cast<double>(*pages.rows[pages.row_of[p]].k));
    if (static_cast<double>(pages.newest[p]) <= wanted + 1e-9) pages.value[p] = 0x1p100f;
  }
};

/// The best pages of a row stay, as long as there is room for the next. What is kept free for stand-ins is whole pages.
struct TakeBestPages {
  PageTable pages;
  const Index* order;  // [pages] best first, counted from the row's first
  double represent;
  Signature signature;
  Index* stand_ins;  // [rows] pages
  Index* left;       // [rows] pages that may be taken for that
  Index* ones;       // [rows] tokens that have a bit
  KVPARE_HD void operator()(Index r) const {
    const PageRow& row = pages.rows[r];
    const Index budget = *row.k < row.room ? *row.k : row.room;
    const Index in_pages = budget / row.most;
    stand_ins[r] =
        budget == row.room ? 0 : static_cast<Index>(product(represent, static_cast<double>(in_pages)) + 1e-9);
    left[r] = row.pages;
    Index free = budget - stand_ins[r] * row.most;
    for (Index i = 0; i < row.pages; ++i) {
      const Index p = row.first + order[row.first + i];
      if (pages.cost[p] > free) break;
      free -= pages.cost[p], pages.stays[p] = 1, --left[r];
    }
    SignatureCount{&budget, row.tokens, signature, ones + r}(0);
  }
};

/// Bit s of a page's signature: is the token in slot s among the row's best?
struct PageSignatures {
  PageTable pages;
  const std::uint64_t* const* bits;  // per row, over columns
  std::uint64_t* signatures;         // [pages]
  KVPARE_HD void operator()(Index p) const {
    std::uint64_t word = 0;
    const Index r = pages.row_of[p];
    for (Index i = pages.begin[p]; i < pages.begin[p + 1]; ++i)
      if (has_column(bits[r], pages.columns[i], pages.rows[r].page_tokens)) word |= std::uint64_t{1} << pages.slots[i];
    signatures[p] = word;
  }
};

/// One bit of one row's anchor per call.
struct PageAnchors {
  PageTable pages;
  const std::uint64_t* signatures;
  Anchor anchor;
  std::uint64_t seed;
  std::uint8_t* bits;  // [rows, 64]
  KVPARE_HD void operator()(Index i) const {
    const PageRow& row = pages.rows[i / 64];
    const Index slot = i % 64;
    Index having = 0;
    for (Index p = row.first; p < row.first + row.pages; ++p) having += static_cast<Index>(signatures[p] >> slot & 1u);
    bits[i] = anchor_bit(anchor, seed, slot, 2 * having > row.pages);
  }
};

/// Minus the Hamming distance of each page's signature to the anchor; those that stay come last.
struct NegativePageDistance {
  PageTable pages;
  const std::uint64_t* signatures;
  const std::uint8_t* anchors;
  KVPARE_HD void operator()(Index p) const {
    const Index r = pages.row_of[p];
    Index distance = 0;
    for (Index s = 0; s < pages.rows[r].page_tokens; ++s) distance += (signatures[p] >> s & 1u) != anchors[r * 64 + s];
    pages.value[p] = pages.stays[p] != 0 ? -0x1p100f : -static_cast<float>(distance);
  }
};

struct TakeStandInPages {
  PageTable pages;
  const Index* order;  // [pages] nearest first, counted from the row's first
  const Index *stand_ins, *left;
  Mode mode;
  KVPARE_HD void operator()(Index r) const {
    const Index n = left[r], wanted = stand_ins[r] < n ? stand_ins[r] : n, first = pages.rows[r].first;
    for (Index i = 0; i < wanted; ++i) pages.stays[first + order[first + stand_in_at(mode, i, wanted, n)]] = 1;
  }
};

struct MarkPages {
  PageTable pages;
  std::uint8_t* marked;  // per row, [columns]
  KVPARE_HD void operator()(Index p) const {
    for (Index i = pages.begin[p]; i < pages.begin[p + 1]; ++i)
      marked[pages.rows[pages.row_of[p]].marks + pages.columns[i]] = pages.stays[p];
  }
};

/// One row of the choice and its pages.
struct PageChoice {
  TopRow top;
  Index* k = nullptr;  // [backend] what `top.k` says
  const WholePages* pages = nullptr;
};

template <Backend B>
void sort_pages(B& be, std::span<const PageRow> rows, const float* values, Index* order) {
  std::vector<SortRow> sorts;
  for (const PageRow& row : rows)
    if (row.pages > 0)
      sorts.push_back({{values + row.first, nullptr, row.pages, 64}, order + row.first, nullptr, nullptr, nullptr});
  if (!sorts.empty()) be.sort_rows(sorts);
}

/// Adds pages that stand for those that go.
template <Backend B>
void add_stand_in_pages(B& be, const TopK& selector, std::span<const PageChoice> choices, std::span<const PageRow> rows,
                        const PageTable& table, Index pages, Index* order, const Index* stand_ins, const Index* left,
                        const Index* ones) {
  const Index n = static_cast<Index>(rows.size());
  std::vector<Buffer<B, std::uint64_t>> bits;
  std::vector<const std::uint64_t*> of_rows;
  std::vector<TopRow> tops;
  for (const PageChoice& choice : choices) {
    TopRow top = choice.top;
    bits.emplace_back(be, ceil_div(top.columns, top.word_tokens));
    top.k = ones + tops.size(), top.chosen = bits.back().data(), top.nan_count = nullptr;
    of_rows.push_back(top.chosen);
    tops.push_back(top);
  }
  const Buffer<B, const std::uint64_t*> bits_of(be, std::span<const std::uint64_t* const>(of_rows));
  const Buffer<B, std::uint64_t> signatures(be, pages);
  const Buffer<B, std::uint8_t> anchors(be, n * 64);
  be.select_top(tops);
  be.each(pages, PageSignatures{table, bits_of.data(), signatures.data()});
  be.each(anchors.size(), PageAnchors{table, signatures.data(), selector.anchor,
                                      static_cast<std::uint64_t>(selector.anchor_seed), anchors.data()});
  be.each(pages, NegativePageDistance{table, signatures.data(), anchors.data()});
  sort_pages(be, rows, table.value, order);
  be.each(n, TakeStandInPages{table, order, stand_ins, left, selector.mode});
}

/// Fills in `top.chosen` of every row, which is all zeros before. Launches only.
template <Backend B>
void choose_pages(B& be, const TopK& selector, std::span<const PageChoice> choices) {
  std::vector<PageRow> rows;
  std::vector<Index> row_of, begin{0}, cost, newest;
  std::vector<std::int32_t> columns;
  std::vector<std::uint8_t> slots;
  Index marks = 0;
  for (const PageChoice& choice : choices) {
    const WholePages& p = *choice.pages;
    rows.push_back({choice.top.scores, choice.k, choice.top.nan_count, static_cast<Index>(cost.size()),
                    static_cast<Index>(p.cost.size()), static_cast<Index>(p.columns.size()), p.room(), p.page_tokens,
                    p.most, marks});
    const auto from_newest = p.cost_from_newest();
    for (const Index end : p.end) begin.push_back(static_cast<Index>(columns.size()) + end);
    row_of.insert(row_of.end(), p.cost.size(), static_cast<Index>(rows.size()) - 1);
    columns.insert(columns.end(), p.columns.begin(), p.columns.end());
    slots.insert(slots.end(), p.slots.begin(), p.slots.end());
    cost.insert(cost.end(), p.cost.begin(), p.cost.end());
    newest.insert(newest.end(), from_newest.begin(), from_newest.end());
    marks += choice.top.columns;
  }
  const Index n = static_cast<Index>(rows.size()), pages = static_cast<Index>(cost.size());
  const Buffer<B, PageRow> row_table(be, rows);
  const Buffer<B, Index> rows_of_pages(be, row_of), begins(be, begin), costs(be, cost), newest_costs(be, newest);
  const Buffer<B, std::int32_t> column_list(be, columns);
  const Buffer<B, std::uint8_t> slot_list(be, slots), stays(be, pages), marked(be, marks);
  const Buffer<B, float> values(be, pages);
  const Buffer<B, Index> nans(be, pages), order(be, pages), stand_ins(be, n), left(be, n), ones(be, n);
  const PageTable table{row_table.data(), rows_of_pages.data(), begins.data(), column_list.data(), slot_list.data(),
                        costs.data(),     newest_costs.data(),  values.data(), stays.data()};
  be.each(pages, PageMeans{table, nans.data()});
  be.each(n, CountNans{table, nans.data()});
  if (selector.only_positive) be.each(n, BoundByPositivePages{table});
  if (selector.recent_share > 0) be.each(pages, BoostNewestPages{table, selector.recent_share});
  sort_pages(be, std::span<const PageRow>(rows), values.data(), order.data());
  be.each(n, TakeBestPages{table, order.data(), selector.represent, selector.signature, stand_ins.data(), left.data(),
                           ones.data()});
  if (selector.represent > 0)
    add_stand_in_pages(be, selector, choices, std::span<const PageRow>(rows), table, pages, order.data(),
                       stand_ins.data(), left.data(), ones.data());
  fill(be, marked.data(), marks, std::uint8_t{0});
  be.each(pages, MarkPages{table, marked.data()});
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const TopRow& top = choices[r].top;
    be.each(ceil_div(top.columns, top.word_tokens),
            AddMarked{marked.data() + rows[r].marks, top.columns, top.word_tokens, top.chosen});
  }
}

}  // namespace detail
}  // namespace kvpare

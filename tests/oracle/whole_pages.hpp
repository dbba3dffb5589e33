// Pages that stay or go whole, and pages that stand for those that go.
#pragma once

#include <limits>

#include "select_top.hpp"

namespace kvpare::oracle {

struct PageRule {
  double recent_share = 0;  // of the budget, newest pages first
  bool only_positive = false;
  double represent = 0;           // of the budget's pages
  std::vector<bool> anchor = {};  // [page_size]; empty = what more than half of the pages have
  bool kept_bits = false;         // a bit: among the budget's best tokens, else in the upper half
  bool even = true;               // spacing: index i (n - 1) / (b - 1), else i floor(n / b)
};

/// Token t is slot t % page_size of page t / page_size. A page of tokens that are no `candidates` stays whole; it takes its
/// `members` (candidates are some of them) from the budget. Of the others the best by mean score stay while they fit, and
/// stand-ins as KVCrush has them for blocks. Empty lists: every token.
/// Shapes  [tokens] -> indices, ascending
/// Source  KVCrush, arXiv 2503.00022, as in OpenVINO GenAI; its budget of blocks is counted within the whole here
inline std::vector<Index> whole_pages(const std::vector<double>& scores, Index page_size, Index budget,
                                      const PageRule& rule = {}, const std::vector<bool>& candidates = {},
                                      const std::vector<bool>& members = {}) {
  const Index tokens = count_of(scores);
  const auto up = [&](Index t) { return candidates.empty() || item(candidates, t); };
  struct Page {
    std::vector<Index> tokens;
    double mean = 0;
    std::vector<bool> bits;
  };
  std::vector<Page> pages;  // that may go, oldest first
  std::vector<Index> kept;
  std::vector<bool> may_go(scores.size(), false);
  Index candidate_count = 0;
  for (Index begin = 0; begin < tokens; begin += page_size) {
    Page page;
    bool whole = true;
    Index paid = 0;
    for (Index t = begin; t < std::min(begin + page_size, tokens); ++t) {
      page.tokens.push_back(t);
      page.mean += item(scores, t);
      whole = whole && up(t);
      paid += members.empty() || item(members, t);
    }
    page.mean /= static_cast<double>(count_of(page.tokens));
    if (!whole) {
      kept.insert(kept.end(), page.tokens.begin(), page.tokens.end());
      budget -= paid;
      continue;
    }
    for (const Index t : page.tokens) item(may_go, t) = true, ++candidate_count;
    pages.push_back(page);
  }
  const auto cost = [&](Index p) { return count_of(item(pages, p).tokens); };
  const Index n = count_of(pages);
  Index positive = 0;
  for (Index p = 0; p < n; ++p) positive += item(pages, p).mean > 0 ? cost(p) : 0;
  budget = std::clamp<Index>(budget, 0, rule.only_positive ? positive : candidate_count);

  std::vector<double> rank;
  for (const Page& page : pages) rank.push_back(page.mean);
  Index newest = 0;
  for (Index p = n - 1; p >= 0; --p) {
    newest += cost(p);
    if (static_cast<double>(newest) <= rule.recent_share * static_cast<double>(budget) + 1e-9)
      item(rank, p) = std::numeric_limits<double>::infinity();
  }
  const Index stand_ins =
      budget == candidate_count
          ? 0
          : static_cast<Index>(std::floor(rule.represent * static_cast<double>(budget / page_size) + 1e-9));
  std::vector<bool> stays(pages.size(), false);
  Index room = budget - stand_ins * page_size;
  for (const Index p : sort_row(rank).order) {
    if (cost(p) > room) break;
    room -= cost(p), item(stays, p) = true;
  }

  std::vector<bool> bit(scores.size(), false);
  for (const Index t : select_top(scores, rule.kept_bits ? budget : candidate_count / 2, may_go)) item(bit, t) = true;
  std::vector<double> mean_bit(static_cast<std::size_t>(page_size), 0);
  for (Page& page : pages)
    for (Index s = 0; s < page_size; ++s) {
      page.bits.push_back(s < count_of(page.tokens) && item(bit, item(page.tokens, s)));
      item(mean_bit, s) += item(page.bits, s) ? 1 / static_cast<double>(n) : 0;
    }
  std::vector<std::pair<Index, Index>> rest;  // distance, page
  for (Index p = 0; p < n; ++p) {
    if (item(stays, p)) continue;
    Index distance = 0;
    for (Index s = 0; s < page_size; ++s)
      distance +=
          item(item(pages, p).bits, s) != (rule.anchor.empty() ? item(mean_bit, s) > 0.5 + 1e-9 : item(rule.anchor, s));
    rest.emplace_back(distance, p);
  }
  std::sort(rest.begin(), rest.end());
  const Index b = std::min(stand_ins, count_of(rest));
  for (Index i = 0; i < b; ++i)
    item(stays, item(rest, b == 1      ? 0
                           : rule.even ? i * (count_of(rest) - 1) / (b - 1)
                                       : i * (count_of(rest) / b))
                    .second) = true;
  for (Index p = 0; p < n; ++p)
    if (item(stays, p)) kept.insert(kept.end(), item(pages, p).tokens.begin(), item(pages, p).tokens.end());
  std::sort(kept.begin(), kept.end());
  return kept;
}

}  // namespace kvpare::oracle

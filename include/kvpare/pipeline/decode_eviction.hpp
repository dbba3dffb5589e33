// Eviction between decode steps: how many tokens a layer may hold, and which of a list are up for choice.
#pragma once

#include <any>
#include <cmath>
#include <vector>

#include "planning.hpp"

namespace kvpare {

/// What `decode` gave back. Everything is counted over the kv heads of one layer.
struct EvictReport {
  Index evicted = 0;
  Index demoted = 0;  // took the form of the rest instead
  Index pages_freed = 0, bytes_freed = 0;    // really back in the pool
  Index pages_shared = 0, bytes_shared = 0;  // given up but not free: other sequences hold them
  Index rows_moved = 0;                      // by packing sparse pages
  Index nan_scores = 0;                      // candidates whose score was NaN; they go first
};

namespace detail {

/// Does the method's budget go on from what `compress` left?
template <class C>
bool follows_compress(const C& method) {
  return with_policy(method.budget, [](const auto& a) { return FollowsCompress<std::remove_cvref_t<decltype(a)>>; });
}

}  // namespace detail

/// Can a method act between decode steps? Its scorer must read the cache alone, or nothing but the attention of each step; its
/// budgets must not need scores of all layers; its heads must not share a budget, nor its selector choose by more than score or
/// give groups of tokens budgets of their own; `keep` must be tokens or a ratio.
template <class C>
bool acts_at_decode(const C& method) {
  const Reads reads = method.scorer.reads();
  return (reads.cache_only() || reads.attention) &&
         !needs_of(method.budget).any() &&
         method.selector.heads != SelectHeads::shared && !method.selector.refines() && !method.selector.splits() &&
         (method.selector.mode == Mode::paper || method.selector.recent_share == 0) &&
         (method.keep.unit == Keep::Unit::ratio ||
          (method.keep.unit == Keep::Unit::tokens && !detail::follows_compress(method)));
}

namespace detail {

/// Does the method's scorer carry its scores on by a rule of its own?
template <Backend B, class C>
bool takes_steps(const C& method) {
  return with_policy(method.scorer, [](const auto& s) { return TakesSteps<std::remove_cvref_t<decltype(s)>, B>; });
}

/// Live tokens of a list that a row of this position sees; window 0 = all up to it.
inline Index tokens_in_sight(const HeadPages& list, Position position, Index window) {
  Index count = 0;
  const Index first = window > 0 ? Index{position} - window + 1 : 0;
  for (const Entry& e : list.entries) {
    if (e.first >= first && e.last <= position)
      count += std::popcount(e.live);
    else
      for_each_bit(e.live, [&](Index s) {
        const Index p = list.position(e, s);
        count += p >= first && p <= position;
      });
  }
  return count;
}

/// Says why, where acts_at_decode says no.
template <class C>
void require_acts_at_decode(const C& method) {
  if (acts_at_decode(method)) return;
  const Reads reads = method.scorer.reads();
  require(!reads.features, "decode: ", policy_name(method.scorer),
          " scores features of a prompt's visual tokens and cannot act between decode steps; call observe_features and "
          "compress instead");
  require(reads.rows == Reads::Rows::none || reads.attention, "decode: ", policy_name(method.scorer),
          " scores rows of a prompt and cannot act between decode steps; observe and compress every few steps instead");
  require(method.selector.heads != SelectHeads::shared,
          "decode: heads = shared splits a budget over the heads at compress only, must be kv or layer");
  require(!method.selector.refines(),
          "decode: chunk, represent, recover, merge and granularity = page are for what a whole prompt has, at compress "
          "only");
  require(method.selector.mode == Mode::paper || method.selector.recent_share == 0,
          "decode: mode = reference takes recent_share of all layers' budgets, at compress only; must be paper");
  require(!method.selector.splits(),
          "decode: each and also give groups of tokens budgets of their own at compress only, must be none");
  require(method.keep.unit == Keep::Unit::ratio || !follows_compress(method), "decode: keep is in tokens, must be a ratio: ",
          policy_name(method.budget), " goes on from what compress left");
  require(method.keep.unit == Keep::Unit::ratio || method.keep.unit == Keep::Unit::tokens,
          "decode: keep is in pages or bytes, must be tokens or a ratio");
  fail("decode: this budget needs the scores of all layers; it can be shared out at compress only");
}

/// Tokens that each kv head of a layer may hold between decode steps, remembered while the method stays the same.
class DecodeBudget {
 public:
  /// A total in tokens is shared out once, as if every layer had enough; a ratio is of what this layer was given,
  /// taking the others for as long.
  template <class C>
  Index of(const C& method, Index layer, Index layers, Index given) {
    const bool ratio = method.keep.unit == Keep::Unit::ratio;
    const C* before = std::any_cast<C>(&method_);
    if (before == nullptr || !(*before == method) || (ratio && given != given_)) {
      const double n = static_cast<double>(layers);
      const Index total =
          ratio ? static_cast<Index>(std::floor(method.keep.amount * static_cast<double>(given) * n + 0.5))
                : static_cast<Index>(method.keep.amount);
      const std::vector<Index> available(static_cast<std::size_t>(layers), ratio ? given : Index{1} << 40);
      std::vector<double> scratch(static_cast<std::size_t>(layers));
      std::vector<Index> tokens(static_cast<std::size_t>(layers));
      with_policy(method.budget, [&](const auto& allocator) {
        check_layers_of(allocator, layers);
        allocator.allocate(nullptr, available.data(), layers, total, scratch.data(), tokens.data());
      });
      if (before == nullptr || !(*before == method)) method_ = method;
      given_ = given;
      tokens_ = std::move(tokens);
    }
    return tokens_[static_cast<std::size_t>(layer)];
  }
  Index bytes() const { return static_cast<Index>(tokens_.capacity() * sizeof(Index)); }

 private:
  std::any method_;
  Index given_ = 0;
  std::vector<Index> tokens_;
};

/// One list, or all lists of a layer whose heads choose together, with more tokens than its budget.
struct EvictionRow {
  std::vector<std::uint64_t> candidates;  // a word per entry
  Index keep = 0;                         // of these
};

/// Bits of an entry whose tokens are of these classes, and of those that are protected.
struct TaggedBits {
  std::uint64_t members = 0, is_protected = 0;
};

inline TaggedBits tagged_bits(const HeadPages& list, const Entry& e, const Tags& tags, ClassSet among) {
  TaggedBits bits{among.has(TokenClass::text) ? e.live : 0, 0};
  for (const TagSpan& span : tags.spans()) {
    if (span.end <= e.first) continue;
    if (span.begin > e.last) break;
    std::uint64_t inside = 0;
    if (span.begin <= e.first && e.last < span.end)
      inside = e.live;
    else
      for_each_bit(e.live, [&](Index s) {
        const Position p = list.position(e, s);
        if (span.begin <= p && p < span.end) inside |= std::uint64_t{1} << s;
      });
    bits.members = among.has(span.token_class) ? bits.members | inside : bits.members & ~inside;
    if (span.is_protected) bits.is_protected |= inside;
  }
  return bits;
}

enum class End : std::uint8_t { oldest, newest };

/// Takes so many of the oldest, or of the newest, tokens of a list off its bitmap.
inline void take_off(const HeadPages& list, End end, Index count, std::vector<std::uint64_t>& words) {
  if (count <= 0) return;
  if (list.ascends()) {
    for (std::size_t i = 0; i < words.size() && count > 0; ++i) {
      std::uint64_t& word = words[end == End::oldest ? i : words.size() - 1 - i];
      if (const Index here = std::popcount(word); here <= count) {
        count -= here;
        word = 0;
      } else {
        for (; count > 0; --count)
          word &= end == End::oldest ? word - 1 : ~(std::uint64_t{1} << (63 - std::countl_zero(word)));
      }
    }
    return;
  }
  std::vector<Position> at = positions_of(list, Selection(words));
  if (at.empty()) return;
  const Index n = static_cast<Index>(at.size()), taken = std::min(count, n);
  const auto border = at.begin() + (end == End::oldest ? taken - 1 : n - taken);
  std::nth_element(at.begin(), border, at.end());
  for (std::size_t e = 0; e < words.size(); ++e)
    for_each_bit(words[e], [&](Index slot) {
      const Position p = list.position(list.entries[e], slot);
      if (end == End::oldest ? p <= *border : p >= *border) words[e] &= ~(std::uint64_t{1} << slot);
    });
}

/// What of a list is up for eviction: tokens of the selector's classes, less the protected and those at its ends, less the
/// newest share of the budget; tokens in pages of format `settled` (-1 = none) take no part. False while the list is over
/// its budget by less than `least`, but for selectors with only_positive.
inline bool eviction_row(const HeadPages& list, const Tags& tags, const TopK& selector, Index budget, int settled,
                         Index least, EvictionRow& row) {
  row.candidates.clear();
  Index members = 0;
  std::vector<std::uint64_t> is_protected;
  for (const Entry& e : list.entries) {
    const TaggedBits bits = e.format == settled ? TaggedBits{} : tagged_bits(list, e, tags, selector.among);
    members += std::popcount(bits.members);
    row.candidates.push_back(bits.members);
    is_protected.push_back(bits.is_protected);
  }
  if (members < budget + least && !selector.only_positive) return false;
  take_off(list, End::oldest, selector.first, row.candidates);
  take_off(list, End::newest, selector.last, row.candidates);
  Index candidates = 0;
  for (std::size_t e = 0; e < row.candidates.size(); ++e)
    candidates += std::popcount(row.candidates[e] &= ~is_protected[e]);
  row.keep = std::max<Index>(0, budget - (members - candidates));
  const Index newest = static_cast<Index>(std::floor(selector.recent_share * static_cast<double>(row.keep) + 1e-9));
  row.keep -= newest;
  take_off(list, End::newest, newest, row.candidates);
  return true;
}

}  // namespace detail
}  // namespace kvpare

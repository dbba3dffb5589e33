// What a policy remembers of every token of one layer from one decode step to the next.
#pragma once

#include <algorithm>
#include <numeric>
#include <string>
#include <string_view>
#include <vector>

#include "../backend/backend.hpp"
#include "../cache/columns.hpp"

namespace kvpare {

namespace detail {

struct CopyScores {
  const float* from;
  float* to;
  KVPARE_HD void operator()(Index i) const { to[i] = from[i]; }
};

struct TakeScores {
  const float* from;
  Index from_stride;
  const std::int32_t* source;  // [heads, to_stride] which of the head's `from`, -1 = none
  float* to;
  Index to_stride;
  KVPARE_HD void operator()(Index i) const {
    to[i] = source[i] < 0 ? 0.0f : from[i / to_stride * from_stride + source[i]];
  }
};

/// One head per call: its scores slide to lower slots, in order.
struct SlideScores {
  float* rows;
  Index stride;
  const std::int32_t* slides;  // which heads · where each one's sources begin, and their end · sources: new slot -> old
                               // slot, never lower than the new one; -1 = none
  Index heads;
  KVPARE_HD void operator()(Index i) const {
    const std::int32_t *begin = slides + heads, *source = slides + 2 * heads + 1;
    float* row = rows + slides[i] * stride;
    for (Index s = begin[i]; s < begin[i + 1]; ++s) row[s - begin[i]] = source[s] < 0 ? 0.0f : row[source[s]];
  }
};

struct ClearScores {
  float* rows;
  Index stride;
  const Index* range;  // [heads][2]
  KVPARE_HD void operator()(Index head) const {
    for (Index s = range[2 * head]; s < range[2 * head + 1]; ++s) rows[head * stride + s] = 0;
  }
};

/// Slot of the new list -> slot of the old one, for lists that hold the same live tokens in the same order.
inline std::vector<std::int32_t> slots_before(std::span<const Entry> before, std::span<const Entry> after,
                                              Index page_tokens) {
  std::vector<std::int32_t> source(after.size() * static_cast<std::size_t>(page_tokens), -1);
  std::size_t e = 0;
  std::uint64_t left = before.empty() ? 0 : before[0].live;
  for (std::size_t to = 0; to < after.size(); ++to)
    for_each_bit(after[to].live, [&](Index slot) {
      while (left == 0) left = before[++e].live;
      source[to * static_cast<std::size_t>(page_tokens) + static_cast<std::size_t>(slot)] =
          static_cast<std::int32_t>(static_cast<Index>(e) * page_tokens + std::countr_zero(left));
      left &= left - 1;
    });
  return source;
}

/// Drops the end of a list whose tokens came after the last score: from slots `filled` on.
inline void cut_unscored(std::vector<std::int32_t>& source, Index filled) {
  std::size_t scored = 0;
  for (std::size_t s = 0; s < source.size(); ++s)
    if (source[s] >= 0 && source[s] < filled) scored = s + 1;
  source.resize(scored);
}

/// Slots of a list that have been written.
inline Index used_slots(std::span<const Entry> list, Index page_tokens) {
  return list.empty() ? 0 : (static_cast<Index>(list.size()) - 1) * page_tokens + list.back().used;
}

/// Scores that follow their tokens to lower slots, all of it known before any list changes.
struct ScoreSlide {
  std::vector<std::int32_t> slides;  // as SlideScores takes them
  std::vector<Index> heads, filled;  // which heads, and how many slots of each have scores afterwards
};

}  // namespace detail

/// A float per kv head and slot, in backend memory: accumulated attention, for example. Belongs to one scorer. A fork
/// copies it; it follows its tokens when rows move.
template <Backend B>
class RunningScores {
 public:
  bool empty() const { return slots_ == 0; }
  const std::string& scorer() const { return scorer_; }
  bool is_of(std::string_view scorer) const { return !empty() && scorer_ == scorer; }
  float* row(Index head) const { return scores_.data() + head * slots_; }
  float* data() const { return scores_.data(); }
  Index slots() const { return slots_; }  // room per head
  Index bytes() const { return scores_.bytes() + static_cast<Index>(filled_.capacity() * sizeof(Index)); }

  /// Slots below this one have scores; those from it on belong to tokens that came since.
  Index filled(Index head) const { return filled_[static_cast<std::size_t>(head)]; }

  /// Position of the newest query row that has been counted, -1 = none.
  Position last_row() const { return last_row_; }
  void count_rows_up_to(Position p) { last_row_ = p; }

  /// Starts with scores taken from `from` [heads, stride]: source[h][slot] says which, -1 = none (0). `room` slots more.
  /// Rows that this scorer has counted stay counted. Whatever throws, nothing has changed.
  void start(B& be, std::string_view scorer, const float* from, Index stride,
             const std::vector<std::vector<std::int32_t>>& source, Index room) {
    const Index heads = static_cast<Index>(source.size());
    Index longest = 0;
    for (const auto& s : source) longest = std::max(longest, static_cast<Index>(s.size()));
    RunningScores next;
    next.slots_ = longest + room;
    next.scorer_ = scorer;
    next.scores_ = Buffer<B, float>(be, heads * next.slots_);
    if (from == nullptr) {
      fill(be, next.scores_.data(), heads * next.slots_, 0.0f);
    } else {
      std::vector<std::int32_t> all(static_cast<std::size_t>(heads * next.slots_), -1);
      for (Index h = 0; h < heads; ++h)
        std::copy(source[static_cast<std::size_t>(h)].begin(), source[static_cast<std::size_t>(h)].end(),
                  all.begin() + h * next.slots_);
      const Buffer<B, std::int32_t> map(be, all);
      be.each(heads * next.slots_, detail::TakeScores{from, stride, map.data(), next.scores_.data(), next.slots_});
    }
    for (const auto& s : source) next.filled_.push_back(static_cast<Index>(s.size()));
    if (is_of(scorer)) next.last_row_ = last_row_;
    *this = std::move(next);
  }

  RunningScores copy(B& be) const {
    RunningScores c;
    if (empty()) return c;
    c.scorer_ = scorer_, c.slots_ = slots_, c.filled_ = filled_, c.last_row_ = last_row_;
    c.scores_ = Buffer<B, float>(be, scores_.size());
    be.each(scores_.size(), detail::CopyScores{scores_.data(), c.scores_.data()});
    return c;
  }

  /// Starts with host scores, [heads][slots].
  void start(B& be, std::string_view scorer, const std::vector<std::vector<float>>& scores, Index room,
             Position last_row) {
    std::vector<std::vector<std::int32_t>> source;
    std::size_t longest = 1;
    for (const auto& s : scores) {
      longest = std::max(longest, s.size());
      source.emplace_back(s.size());
      std::iota(source.back().begin(), source.back().end(), 0);
    }
    std::vector<float> all(scores.size() * longest, 0.0f);
    for (std::size_t h = 0; h < scores.size(); ++h)
      std::copy(scores[h].begin(), scores[h].end(), all.begin() + static_cast<std::ptrdiff_t>(h * longest));
    const Buffer<B, float> from(be, all);
    start(be, scorer, from.data(), static_cast<Index>(longest), source, room);
    last_row_ = last_row;
  }

  /// What `admit` takes, with all the memory it needs.
  struct Admission {
    RunningScores other;       // takes the place of these where they are another scorer's or short of room; else empty
    std::vector<Index> used;   // slots per head once admitted
    Buffer<B, Index> cleared;  // [heads][2] slots that become 0
  };

  /// For the tokens that came since to have score 0, and every head room for its list; with `all`, every score becomes 0.
  Admission to_admit(B& be, std::string_view scorer, std::span<const HeadPages> lists, bool all) const {
    const Index page_tokens = lists[0].page_tokens;
    const bool mine = is_of(scorer);
    Admission a;
    Index longest = 0;
    std::vector<std::vector<std::int32_t>> same(lists.size());
    std::vector<Index> ranges;
    for (std::size_t h = 0; h < lists.size(); ++h) {
      const Index used = detail::used_slots(lists[h].entries, page_tokens), scored = mine ? filled_[h] : 0;
      longest = std::max(longest, lists[h].slots());
      a.used.push_back(used);
      ranges.push_back(all ? 0 : std::min(scored, used));
      ranges.push_back(used);
      same[h].resize(static_cast<std::size_t>(scored));
      std::iota(same[h].begin(), same[h].end(), 0);
    }
    if (!mine) {
      a.other.start(be, scorer, nullptr, 0, same, longest + page_tokens);
    } else if (longest > slots_) {
      const Index filled = *std::max_element(filled_.begin(), filled_.end());
      a.other.start(be, scorer, scores_.data(), slots_, same, longest + longest / 2 + page_tokens - filled);
      a.other.last_row_ = last_row_;
    }
    a.cleared = Buffer<B, Index>(be, ranges);
    return a;
  }

  /// The scores that attention is to be added to, cleared where `a` says so. Until `admit`, nothing of these has changed
  /// but slots without a score (and all scores, where `all` was asked).
  std::vector<float*> rows_to_fill(B& be, Admission& a) {
    RunningScores& to = a.other.empty() ? *this : a.other;
    std::vector<float*> rows;
    for (Index h = 0; h < static_cast<Index>(a.used.size()); ++h) rows.push_back(to.row(h));
    be.each(static_cast<Index>(a.used.size()), detail::ClearScores{to.data(), to.slots(), a.cleared.data()});
    return rows;
  }

  /// The tokens of `a` have scores now, and query rows up to this position are counted. Cannot fail.
  void admit(Admission a, Position last_row) {
    if (!a.other.empty()) *this = std::move(a.other);
    filled_ = std::move(a.used);
    last_row_ = std::max(last_row_, last_row);
  }

  /// Tokens of one head at positions >= n are gone from its list. Needs no memory.
  void truncate(Index head, const HeadPages& list, Position n) {
    if (empty()) return;
    Index& filled = filled_[static_cast<std::size_t>(head)];
    filled = std::min(filled, detail::used_slots(list.entries, list.page_tokens));
    last_row_ = std::min(last_row_, n - 1);
  }

  /// For scores of some heads to follow their tokens: `source` as slots_before gives it.
  detail::ScoreSlide to_slide(std::vector<Index> heads, std::vector<std::vector<std::int32_t>> source) const {
    detail::ScoreSlide slide;
    if (empty() || heads.empty()) return slide;
    for (const Index h : heads) slide.slides.push_back(static_cast<std::int32_t>(h));
    slide.slides.push_back(0);
    for (std::size_t i = 0; i < heads.size(); ++i) {
      detail::cut_unscored(source[i], filled(heads[i]));  // another method's steps may have brought tokens since
      slide.filled.push_back(static_cast<Index>(source[i].size()));
      slide.slides.push_back(slide.slides.back() + static_cast<std::int32_t>(source[i].size()));
    }
    for (const auto& of_head : source) slide.slides.insert(slide.slides.end(), of_head.begin(), of_head.end());
    slide.heads = std::move(heads);
    return slide;
  }

  /// Most numbers that the slides of a layer with these lists take: memory for `slide`.
  Index most_slides(std::span<const HeadPages> lists) const {
    Index n = 2 * static_cast<Index>(lists.size()) + 1;
    for (const HeadPages& list : lists) n += list.slots();
    return empty() ? 0 : n;
  }

  /// `memory`: most_slides numbers. Cannot fail.
  void slide(B& be, const detail::ScoreSlide& slide, const Buffer<B, std::int32_t>& memory) {
    if (slide.heads.empty()) return;
    be.to_backend(memory.data(), slide.slides.data(),
                  static_cast<Index>(slide.slides.size() * sizeof(slide.slides[0])));
    const Index heads = static_cast<Index>(slide.heads.size());
    be.each(heads, detail::SlideScores{scores_.data(), slots_, memory.data(), heads});
    for (std::size_t i = 0; i < slide.heads.size(); ++i)
      filled_[static_cast<std::size_t>(slide.heads[i])] = slide.filled[i];
  }

 private:
  std::string scorer_;
  Buffer<B, float> scores_;
  Index slots_ = 0;
  std::vector<Index> filled_;
  Position last_row_ = -1;
};

}  // namespace kvpare

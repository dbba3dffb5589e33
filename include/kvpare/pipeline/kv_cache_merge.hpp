// Tokens that go become part of tokens that stay: means of keys and values, or values added up, on their way from the lists as
// they were to the lists as they will be.
#pragma once

#include "../backend/derived/rope.hpp"
#include "../codec/rounding.hpp"
#include "kv_cache.hpp"

namespace kvpare {

namespace detail {

/// The tokens of one head that absorb others, as rows of the head before, with the positions they were turned for.
struct JoinedRows {
  const float* rows;         // [tokens, width]
  const Index* own;          // [merged] their row
  const Position* own_at;    // [merged]
  const Index *begin, *end;  // [merged] of those that join
  const Index* joining;      // rows
  const Position* joining_at;
  const double* weights;  // of those that join, or null: the mean
};

/// One number of a merged row, added up in a fixed order. With a rope those that join are turned to its position first.
struct JoinRows {
  JoinedRows joined;
  RopeView rope;
  Index width, stride;  // stride: numbers from one merged row to the next
  DType type;           // of what is written
  void* out;
  KVPARE_HD void operator()(Index i) const {
    const Index m = i / width, c = i % width, begin = joined.begin[m], end = joined.end[m];
    double sum = static_cast<double>(joined.rows[joined.own[m] * width + c]);
    for (Index j = begin; j < end; ++j) {
      const double x =
          rope.rotated_channel(joined.rows + joined.joining[j] * width, c, joined.own_at[m] - joined.joining_at[j]);
      sum += joined.weights == nullptr ? x : product(joined.weights[j], x);
    }
    write(m * stride + c,
          static_cast<float>(joined.weights == nullptr ? sum / static_cast<double>(1 + end - begin) : sum));
  }
  KVPARE_HD void write(Index at, float x) const {
    if (type == DType::f32)
      static_cast<float*>(out)[at] = x;
    else if (type == DType::f16)
      static_cast<half*>(out)[at] = half(x);
    else
      static_cast<bfloat16*>(out)[at] = bfloat16(x);
  }
};

}  // namespace detail

/// The merges of one layer. Made before anything moves, it computes the merged rows, of the element type that raw pages have, so
/// that `write`, once rows have moved, has only to copy them to their place. Pages that others share get a page of their own
/// first, in `lists`.
template <Backend B>
class BasicKvCache<B>::Merging {
 public:
  Merging(BasicKvCache& cache, const Sequence& s, Index layer, std::span<const Merge> merges,
          std::span<CompactedList* const> lists, CompressReport& report)
      : cache_(&cache), layer_(layer) {
    const LayerShape& sh = cache.shape(layer);
    const LayerLists before(cache, s, layer);
    Index most = 0;
    std::vector<Joined> joined;
    for (std::size_t h = 0; h < merges.size(); ++h) {
      joined.push_back(places(static_cast<Index>(h), before.heads[h], merges[h], *lists[h], report));
      if (merges[h].rule == MergeRule::unrotated_mean && rope_.view().pairs == 0)
        rope_ = BackendRope<B>(*cache.be_, *sh.rope);
      most = std::max(most, static_cast<Index>(joined.back().own.size()));
    }
    if (most == 0) return;
    const PageGeometry& g = cache.geometry_[static_cast<std::size_t>(layer)][append_format];
    keys_ = Rows(*cache.be_, most, sh.kv_heads, sh.key_dim, g.key_codec == nullptr ? g.key_type : DType::f32);
    values_ = Rows(*cache.be_, most, sh.kv_heads, sh.value_dim, g.value_codec == nullptr ? g.value_type : DType::f32);
    for (std::size_t h = 0; h < merges.size(); ++h)
      for (const Side side : {Side::keys, Side::values})
        compute(before.heads[h], merges[h], joined[h], static_cast<Index>(h), side);
  }

  /// Before the lists are put in place: pages taken for them are theirs.
  void keep_pages() {
    for (FreshPages& f : fresh_) f.keep();
  }

  /// After: whatever happens here, the lists are whole.
  void write() {
    if (runs_.empty()) return;
    cache_->be_->append({.keys = keys_.tensor(),
                         .values = values_.tensor(),
                         .formats = cache_->geometry_[static_cast<std::size_t>(layer_)],
                         .runs = runs_,
                         .page_tokens = cache_->page_tokens_});
  }

 private:
  struct Joined {
    std::vector<Index> own, begin, end, joining;  // own, joining: rows of the head before
    std::vector<Position> own_at;
  };

  /// Merged rows of all heads.
  struct Rows {
    Buffer<B, std::byte> memory;
    Tensor like;
    Rows() = default;
    Rows(B& be, Index rows, Index heads, Index width, DType type) : memory(be, rows * heads * width * size_of(type)) {
      like.dtype = type, like.rows = rows, like.heads = heads, like.width = width;
      like.row_stride = heads * width, like.head_stride = width;
    }
    Tensor tensor() const {
      Tensor t = like;
      t.data = memory.data();
      return t;
    }
  };

  struct Token {
    Position position;
    Index entry, slot, row;  // row: among the live tokens of the list
  };
  /// By position.
  static std::vector<Token> tokens_of(const HeadPages& list) {
    std::vector<Token> tokens;
    for (Index e = 0; e < static_cast<Index>(list.entries.size()); ++e) {
      const Entry& entry = list.entries[static_cast<std::size_t>(e)];
      for_each_bit(entry.live, [&](Index slot) {
        tokens.push_back({list.position(entry, slot), e, slot, static_cast<Index>(tokens.size())});
      });
    }
    if (!list.ascends()) std::ranges::sort(tokens, {}, &Token::position);
    return tokens;
  }
  static const Token& at(const std::vector<Token>& tokens, Position position) {
    return *std::ranges::lower_bound(tokens, position, {}, &Token::position);
  }

  /// Where the merged rows come from and go to. What cannot be written is left out and counted.
  Joined places(Index head, const HeadPages& before, const Merge& merge, CompactedList& list, CompressReport& report) {
    HeadPages after = before;
    after.entries = list.entries, after.offsets = list.offsets.data();
    const std::vector<Token> were = tokens_of(before), are = tokens_of(after);
    Joined joined;
    std::vector<bool> lost(merge.from.size(), false);
    for (std::size_t next = 0; next < merge.into.size(); ++next) {
      const Token& stays = at(are, merge.into[next]);
      const std::size_t e = static_cast<std::size_t>(stays.entry);
      if (list.entries[e].format != append_format || !make_private(list, e)) {
        std::fill(lost.begin() + merge.begin[next], lost.begin() + merge.end[next], true);
        continue;
      }
      WriteRun run;
      run.head = head, run.row = static_cast<Index>(joined.own.size()), run.page = list.entries[e].page;
      run.format = append_format, run.slot = static_cast<std::uint16_t>(stays.slot), run.count = 1;
      runs_.push_back(run);
      joined.own.push_back(at(were, merge.into[next]).row);
      joined.own_at.push_back(merge.into[next]);
      joined.begin.push_back(merge.begin[next]), joined.end.push_back(merge.end[next]);
    }
    for (const Position p : merge.from) joined.joining.push_back(at(were, p).row);
    const Index not_merged = std::count(lost.begin(), lost.end(), true);
    report.tokens_not_merged += not_merged;
    report.tokens_merged += static_cast<Index>(merge.from.size()) - not_merged;
    return joined;
  }

  /// The entry gets a page of its own, and its rows the way there. False when the pool has none.
  bool make_private(CompactedList& list, std::size_t e) {
    Entry& entry = list.entries[e];
    if (cache_->pool_->references(entry.page) == 1) return true;
    FreshPages& fresh = fresh_.emplace_back(*cache_->pool_, 1);
    if (!fresh.take(cache_->size_class(layer_, entry.format))) {
      fresh_.pop_back();
      return false;
    }
    list.released.push_back(entry);
    for (std::uint64_t left = entry.live; left != 0;) {
      const Index slot = std::countr_zero(left), count = std::countr_one(left >> slot);
      list.moves.push_back({entry.page, fresh.pages()[0], entry.format, static_cast<std::uint8_t>(slot),
                            static_cast<std::uint8_t>(slot), static_cast<std::uint8_t>(count)});
      left &= ~(low_bits(count) << slot);
    }
    entry.page = fresh.pages()[0];
    return true;
  }

  void compute(const HeadPages& before, const Merge& merge, const Joined& joined, Index head, Side side) {
    if (joined.own.empty()) return;
    B& be = *cache_->be_;
    const Tensor out = side == Side::keys ? keys_.tensor() : values_.tensor();
    const Index width = out.width;
    const Index tokens = before.live_tokens(), merged = static_cast<Index>(joined.own.size());
    const Buffer<B, float> rows(be, tokens * width);
    const GatherRow gather{before, side, nullptr, width, rows.data()};
    be.gather(std::span(&gather, 1));
    const bool values_only = merge.rule == MergeRule::added_values, keys = side == Side::keys;
    const Buffer<B, Index> own(be, joined.own), begin(be, joined.begin), joining(be, joined.joining),
        end(be, keys && values_only ? joined.begin : joined.end);
    const Buffer<B, Position> own_at(be, joined.own_at), joining_at(be, merge.from);
    const Buffer<B, double> weights(be, merge.weights);
    be.each(merged * width,
            detail::JoinRows{{rows.data(), own.data(), own_at.data(), begin.data(), end.data(), joining.data(),
                              joining_at.data(), weights.data()},
                             keys && merge.rule == MergeRule::unrotated_mean ? rope_.view() : RopeView{},
                             width,
                             out.row_stride,
                             out.dtype,
                             out.at(0, head)});
  }

  BasicKvCache* cache_;
  Index layer_;
  std::deque<FreshPages> fresh_;
  std::vector<WriteRun> runs_;
  BackendRope<B> rope_;  // of the layer, where keys are turned
  Rows keys_, values_;
};

/// Throws unless every merge is of tokens that go into tokens that stay.
template <Backend B>
void BasicKvCache<B>::check_merges(const LayerPlan& lp, const Layer& at, Index layer) const {
  if (lp.merges.empty()) return;
  require(lp.touched && lp.merges.size() == at.heads.size(), "commit: layer ", layer, " has merges for ",
          lp.merges.size(), " heads, must be ", at.heads.size(), " and come with what stays");
  for (std::size_t h = 0; h < at.heads.size(); ++h) {
    const Merge& m = lp.merges[h];
    if (m.rule == MergeRule::unrotated_mean) plain_rope_of(shape(layer), layer, "commit: a merge of unrotated keys");
    const Index joining = static_cast<Index>(m.from.size());
    bool ranges = m.begin.size() == m.into.size() && m.end.size() == m.into.size();
    Index covered = 0;
    for (std::size_t i = 0; ranges && i < m.into.size(); ++i) {
      ranges = 0 <= m.begin[i] && m.begin[i] <= covered && covered <= m.end[i] && m.end[i] <= joining &&
               (i == 0 || (m.begin[i - 1] <= m.begin[i] && m.into[i - 1] < m.into[i]));
      covered = m.end[i];
    }
    require(ranges && covered == joining, "commit: layer ", layer, " head ", h,
            ": tokens that absorb others, and the ranges of those, must ascend and leave out none of ", joining);
    const bool weighted = m.rule == MergeRule::added_values;
    require(
        m.weights.size() == (weighted ? m.from.size() : 0) &&
            std::ranges::all_of(m.weights, [](double w) { return std::abs(w) <= std::numeric_limits<double>::max(); }),
        "commit: layer ", layer, " head ", h, ": ", m.weights.size(), " weights for ", joining,
        " merged tokens, must be ", weighted ? "one each, and finite" : "none: means take each once");
    const HeadPages list = list_of(at.heads[h], layer);
    const std::vector<Position> live = positions_of(list, Selection::live(list.entries));
    Selection kept = lp.keep[h];
    kept &= Selection::live(list.entries);
    const std::vector<Position> stays = positions_of(list, kept);
    const auto is_in = [](const std::vector<Position>& all, Position p) {
      return std::binary_search(all.begin(), all.end(), p);
    };
    for (const Position p : m.into)
      require(is_in(stays, p), "commit: layer ", layer, " head ", h, ": position ", p,
              " absorbs others but does not stay");
    std::vector<Position> once = m.from;
    std::ranges::sort(once);
    require(std::ranges::adjacent_find(once) == once.end(), "commit: layer ", layer, " head ", h,
            ": a token is merged from twice, must be once");
    for (const Position p : m.from)
      require(is_in(live, p) && !is_in(stays, p), "commit: layer ", layer, " head ", h, ": position ", p,
              " is merged but is no token that goes");
  }
}

}  // namespace kvpare

// What a sequence remembers of a layer between `observe` and `compress`: scores, or the query rows they will need.
#pragma once

#include <algorithm>
#include <any>
#include <numeric>
#include <string>
#include <vector>

#include "../policy/contracts.hpp"

namespace kvpare {

namespace detail {

/// Copies the denominators of one row per call.
struct CopyRowLse {
  const float* from;
  const Index* rows;  // [backend] which
  Index heads;
  float* to;
  KVPARE_HD void operator()(Index i) const {
    for (Index h = 0; h < heads; ++h) to[i * heads + h] = from[rows[i] * heads + h];
  }
};

/// Copies one row of one head per call: dense [rows, heads, width] from a strided tensor.
struct CopyRow {
  ConstTensor from;
  const Index* rows;  // [backend] which
  std::byte* to;
  KVPARE_HD void operator()(Index i) const {
    const Index row = rows[i / from.heads], head = i % from.heads, bytes = from.width * size_of(from.dtype);
    const auto* source = static_cast<const std::byte*>(from.at(row, head));
    for (Index b = 0; b < bytes; ++b) to[i * bytes + b] = source[b];
  }
};

struct CopyColumns {
  const float* from;
  Index from_columns;
  float* to;
  Index to_columns;
  KVPARE_HD void operator()(Index i) const { to[i / from_columns * to_columns + i % from_columns] = from[i]; }
};

}  // namespace detail

template <Backend B>
class ObservedLayer {
 public:
  bool scored() const { return scored_; }
  const float* scores() const { return scores_.data(); }
  const float* density() const { return density_.data(); }
  Index columns() const { return columns_; }  // when scored; later tokens have no score
  Index bytes() const { return scores_.bytes() + density_.bytes() + kept_.rows.bytes() + kept_.lse.bytes(); }

  void forget() { *this = ObservedLayer(); }

  /// Scores that were computed elsewhere.
  template <class S>
  void adopt(const S& scorer, Buffer<B, float> scores, Index columns) {
    forget();
    scorer_ = scorer, scores_ = std::move(scores), columns_ = columns, scored_ = true;
  }

  /// Throws when another scorer has begun to observe this layer.
  template <class S>
  void require_none_of_another(const S& scorer, Index layer, const char* verb = "observe") const {
    if (!scorer_.has_value()) return;
    const S* before = std::any_cast<S>(&scorer_);
    require(before != nullptr && *before == scorer, verb, ": layer ", layer,
            " was observed by another policy; compress first or use the same");
  }

  /// Throws unless these are scores of this very scorer.
  template <class S>
  void require_scores_of(const S& scorer, const char* verb, Index layer) const {
    require(scored_, verb, ": layer ", layer, " was not observed; call ",
            scorer.reads().features ? "observe_features first: the scorer reads features of visual tokens"
                                    : "observe first, final chunk included");
    const S* before = std::any_cast<S>(&scorer_);
    require(before != nullptr && *before == scorer, verb, ": layer ", layer, " was observed by another policy");
  }

  /// Takes the rows the scorer reads out of `queries`. The last chunk (`final`), and every chunk of a streaming scorer,
  /// is scored at once. Throws when a row's own token is not in the layer, or on rows that do not go with those of
  /// earlier chunks; whatever throws, nothing has changed. `lse` [backend] [rows, q_heads] or null.
  template <class S>
  void observe(B& be, const S& scorer, Observation<B> seen, ConstTensor queries, std::span<const Position> positions,
               bool final, const float* lse) {
    const Reads reads = scorer.reads();
    if (reads.rows == Reads::Rows::none) return;
    require_none_of_another(scorer, seen.layer);
    const std::vector<std::int32_t> own = columns_of_rows(seen, positions);

    std::vector<Index> rows;
    for (Index r = 0; r < static_cast<Index>(positions.size()); ++r)
      if (reads.of.has(static_cast<TokenClass>(
              seen.columns->classes[static_cast<std::size_t>(own[static_cast<std::size_t>(r)])])))
        rows.push_back(r);
    std::vector<Position> row_positions;
    for (Index r : rows) row_positions.push_back(positions[static_cast<std::size_t>(r)]);
    const Index unread = rows_before(reads, seen, row_positions);
    rows.erase(rows.begin(), rows.begin() + unread);
    row_positions.erase(row_positions.begin(), row_positions.begin() + unread);

    ObservedLayer next;  // made aside, put in place at the end
    next.scorer_ = scorer;
    const bool together = rows.empty() || rows.back() - rows.front() + 1 == static_cast<Index>(rows.size());
    if (!reads.streams && (!final || !kept_.positions.empty())) {
      KeptRows joined = join(be, reads, seen, queries, rows, row_positions, lse);
      if (final)
        next.score_rows(be, scorer, seen, joined.tensor(), joined.positions, joined.lse.data(), *this);
      else
        next.kept_ = std::move(joined);
    } else if (together) {
      const Index first = rows.empty() ? 0 : rows.front();
      next.score_rows(be, scorer, seen, queries.part(first, static_cast<Index>(rows.size())), row_positions,
                      lse != nullptr ? lse + first * queries.heads : nullptr, *this);
    } else {
      const KeptRows copy = join(be, reads, seen, queries, rows, row_positions, lse);
      next.score_rows(be, scorer, seen, copy.tensor(), row_positions, copy.lse.data(), *this);
    }
    if (!next.scored_ && scored_) {  // an earlier observation, complete in itself, counts until this one is
      next.scores_ = std::move(scores_), next.density_ = std::move(density_);
      next.columns_ = columns_;
      next.scored_ = true;
    }
    *this = std::move(next);
  }

  /// For scorers that read no rows.
  template <class S>
  void score_unobserved(B& be, const S& scorer, Observation<B> seen) {
    ObservedLayer next;
    next.scorer_ = scorer;
    next.score_rows(be, scorer, seen, {}, {}, nullptr, *this);
    *this = std::move(next);
  }

 private:
  /// Query rows of chunks so far, dense.
  struct KeptRows {
    Buffer<B, std::byte> rows;
    Buffer<B, float> lse;  // [rows, heads], empty when it was not given
    DType dtype = DType::f32;
    Index heads = 0, width = 0;
    std::vector<Position> positions;

    ConstTensor tensor() const {
      ConstTensor t;
      t.data = rows.data(), t.dtype = dtype;
      t.rows = static_cast<Index>(positions.size()), t.heads = heads, t.width = width;
      t.row_stride = heads * width, t.head_stride = width;
      return t;
    }
  };

  static std::vector<std::int32_t> columns_of_rows(const Observation<B>& seen, std::span<const Position> positions) {
    const Columns& columns = *seen.columns;
    const auto live = columns.live_in_any();
    std::vector<std::int32_t> own;
    own.reserve(positions.size());
    Index c = 0;
    for (std::size_t r = 0; r < positions.size(); ++r) {
      while (c < columns.count &&
             (columns.positions[static_cast<std::size_t>(c)] < positions[r] || !columns.has(live, c)))
        ++c;
      require(c < columns.count && columns.positions[static_cast<std::size_t>(c)] == positions[r], "observe: row ", r,
              " is of position ", positions[r], ", but layer ", seen.layer,
              " holds no such token (append first; rows in ascending order)");
      own.push_back(static_cast<std::int32_t>(c));
    }
    return own;
  }

  /// Sums of earlier chunks, which `before` holds, are where a scorer starts from.
  template <class S>
  void score_rows(B& be, const S& scorer, Observation<B> seen, ConstTensor queries, std::span<const Position> positions,
                  const float* lse, const ObservedLayer& before) {
    const Index heads = static_cast<Index>(seen.heads.size()), columns = seen.columns->count;
    Buffer<B, float> scores(be, heads * columns), density(be, 1);
    fill(be, scores.data(), heads * columns, 0.0f);
    fill(be, density.data(), 1, 0.0f);
    if (before.scored_ && before.columns_ > 0)
      be.each(heads * before.columns_,
              detail::CopyColumns{before.scores_.data(), before.columns_, scores.data(), columns});
    const std::vector<std::int32_t> own = columns_of_rows(seen, positions);
    seen.queries = queries;
    seen.row_positions = positions;
    seen.row_columns = own;
    seen.row_lse = lse;
    score(be, scorer, seen, Scores{scores.data(), heads, columns, density.data()});
    scores_ = std::move(scores), density_ = std::move(density);
    columns_ = columns;
    scored_ = true;
  }

  /// How many rows at the front the scorer does not read, of the rows so far.
  static Index rows_before(const Reads& reads, const Observation<B>& seen, std::span<const Position> positions) {
    const Index rows = static_cast<Index>(positions.size());
    const Index but_the_newest = std::max<Index>(0, rows - reads.count);
    if (reads.rows == Reads::Rows::last) return but_the_newest;
    if (reads.rows != Reads::Rows::after_visual) return 0;
    const Position image = last_visual(*seen.columns);
    if (image < 0) return but_the_newest;
    const auto first = std::upper_bound(positions.begin(), positions.end(), image);
    return std::min(but_the_newest, static_cast<Index>(first - positions.begin()));
  }

  /// Rows of earlier chunks and these, without those that are not read.
  KeptRows join(B& be, const Reads& reads, const Observation<B>& seen, const ConstTensor& queries,
                const std::vector<Index>& rows, const std::vector<Position>& positions, const float* lse) const {
    require(kept_.positions.empty() || kept_.dtype == queries.dtype, "observe: queries are ", name_of(queries.dtype),
            ", earlier chunks were ", name_of(kept_.dtype));
    require(kept_.positions.empty() || positions.empty() || positions.front() > kept_.positions.back(),
            "observe: a row of position ", positions.empty() ? 0 : positions.front(), " follows one of position ",
            kept_.positions.empty() ? 0 : kept_.positions.back(), " of an earlier chunk, rows must ascend");
    require(kept_.positions.empty() || rows.empty() || (lse != nullptr) == (kept_.lse.size() > 0), "observe: lse was ",
            lse != nullptr ? "not given" : "given", " with earlier chunks and is ",
            lse != nullptr ? "given" : "not given", " now, must be given with all of them or none");
    const Index before = static_cast<Index>(kept_.positions.size()), added = static_cast<Index>(rows.size());
    std::vector<Position> all = kept_.positions;
    all.insert(all.end(), positions.begin(), positions.end());
    const Index dropped = std::min(rows_before(reads, seen, all), before);
    const Index stay = before - dropped, row_bytes = queries.heads * queries.width * size_of(queries.dtype);
    KeptRows joined;
    joined.dtype = queries.dtype, joined.heads = queries.heads, joined.width = queries.width;
    joined.positions.assign(all.begin() + dropped, all.end());
    joined.rows = Buffer<B, std::byte>(be, (stay + added) * row_bytes);
    if (rows.empty() ? kept_.lse.size() > 0 : lse != nullptr)
      joined.lse = Buffer<B, float>(be, (stay + added) * queries.heads);
    const auto copy = [&](const ConstTensor& from, const float* from_lse, const std::vector<Index>& which,
                          Index to_row) {
      if (which.empty()) return;
      const Buffer<B, Index> list(be, which);
      be.each(static_cast<Index>(which.size()) * queries.heads,
              detail::CopyRow{from, list.data(), joined.rows.data() + to_row * row_bytes});
      if (from_lse != nullptr)
        be.each(static_cast<Index>(which.size()),
                detail::CopyRowLse{from_lse, list.data(), queries.heads, joined.lse.data() + to_row * queries.heads});
    };
    std::vector<Index> staying(static_cast<std::size_t>(stay));
    std::iota(staying.begin(), staying.end(), dropped);
    copy(kept_.tensor(), kept_.lse.data(), staying, 0);
    copy(queries, lse, rows, stay);
    return joined;
  }

  std::any scorer_;
  Buffer<B, float> scores_, density_;
  Index columns_ = 0;
  bool scored_ = false;
  KeptRows kept_;
};

}  // namespace kvpare

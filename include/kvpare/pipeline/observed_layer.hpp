// What a sequence remembers of a layer between `observe` and `compress`: scores, or the query rows they will need.
#pragma once

#include <algorithm>
#include <any>
#include <string>
#include <vector>

#include "../policy/contracts.hpp"

namespace kvpare {

namespace detail {

/// Copies one row of one head per call: dense [rows, heads, width] from a strided tensor.
struct CopyRow {
  ConstTensor from;
  const Index* rows;        // [backend] which
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
  Index columns() const { return columns_; }        // when scored; later tokens have no score
  const std::any& scorer() const { return scorer_; }
  Index bytes() const { return scores_.bytes() + kept_.bytes(); }

  void forget() { *this = ObservedLayer(); }

  /// Takes the rows the scorer reads out of `queries`. The last chunk (`final`), and every chunk of a streaming scorer,
  /// is scored at once. Throws before anything changes when a row's own token is not in the layer.
  template <class S>
  void observe(B& be, const S& scorer, Observation<B> seen, ConstTensor queries, std::span<const Position> positions, bool final) {
    const Reads reads = scorer.reads();
    if (reads.rows == Reads::Rows::none) return;
    if (scorer_.has_value()) {
      const S* before = std::any_cast<S>(&scorer_);
      require(before != nullptr && *before == scorer, "observe: layer ", seen.layer,
              " was observed by another policy; compress first or use the same");
    }
    const std::vector<std::int32_t> own = columns_of_rows(seen, positions);

    std::vector<Index> rows;
    for (Index r = 0; r < static_cast<Index>(positions.size()); ++r)
      if (reads.of.has(static_cast<TokenClass>(seen.columns->classes[static_cast<std::size_t>(own[static_cast<std::size_t>(r)])])))
        rows.push_back(r);
    if (reads.rows == Reads::Rows::last && static_cast<Index>(rows.size()) > reads.count) rows.erase(rows.begin(), rows.end() - reads.count);

    scorer_ = scorer;
    std::vector<Position> row_positions;
    for (Index r : rows) row_positions.push_back(positions[static_cast<std::size_t>(r)]);

    if (!reads.streams && (!final || !kept_positions_.empty())) {
      keep_rows(be, reads, queries, rows, row_positions);
      if (!final) return;
      score_rows(be, scorer, seen, kept_tensor(queries), kept_positions_);
      kept_ = {};
      kept_positions_.clear();
      return;
    }
    const bool together = rows.empty() || rows.back() - rows.front() + 1 == static_cast<Index>(rows.size());
    if (together) {
      score_rows(be, scorer, seen, queries.part(rows.empty() ? 0 : rows.front(), static_cast<Index>(rows.size())), row_positions);
    } else {
      const Buffer<B, std::byte> copy = gather_rows(be, queries, rows);
      score_rows(be, scorer, seen, dense_tensor(copy.data(), queries, static_cast<Index>(rows.size())), row_positions);
    }
  }

  /// For scorers that read no rows.
  template <class S>
  void score_unobserved(B& be, const S& scorer, Observation<B> seen) {
    scorer_ = scorer;
    score_rows(be, scorer, seen, {}, {});
  }

 private:
  static std::vector<std::int32_t> columns_of_rows(const Observation<B>& seen, std::span<const Position> positions) {
    const Columns& columns = *seen.columns;
    const auto live = columns.live_in_any();
    std::vector<std::int32_t> own;
    own.reserve(positions.size());
    Index c = 0;
    for (std::size_t r = 0; r < positions.size(); ++r) {
      while (c < columns.count && (columns.positions[static_cast<std::size_t>(c)] < positions[r] || !columns.has(live, c))) ++c;
      require(c < columns.count && columns.positions[static_cast<std::size_t>(c)] == positions[r], "observe: row ", r,
              " is of position ", positions[r], ", but layer ", seen.layer, " holds no such token (append first; rows in ascending order)");
      own.push_back(static_cast<std::int32_t>(c));
    }
    return own;
  }

  template <class S>
  void score_rows(B& be, const S& scorer, Observation<B> seen, ConstTensor queries, std::span<const Position> positions) {
    const Index heads = static_cast<Index>(seen.heads.size()), columns = seen.columns->count;
    if (!scored_ || columns_ != columns) {
      Buffer<B, float> grown(be, heads * columns);
      fill(be, grown.data(), heads * columns, 0.0f);
      if (scored_ && columns_ > 0)  // earlier chunks' sums stay
        be.each(heads * columns_, detail::CopyColumns{scores_.data(), columns_, grown.data(), columns});
      scores_ = std::move(grown);
      columns_ = columns;
    }
    const std::vector<std::int32_t> own = columns_of_rows(seen, positions);
    seen.queries = queries;
    seen.row_positions = positions;
    seen.row_columns = own;
    score(be, scorer, seen, Scores{scores_.data(), heads, columns});
    scored_ = true;
  }

  static ConstTensor dense_tensor(const std::byte* data, const ConstTensor& like, Index rows) {
    ConstTensor t = like;
    t.data = data, t.rows = rows;
    t.head_stride = like.width, t.row_stride = like.heads * like.width;
    return t;
  }
  ConstTensor kept_tensor(const ConstTensor& like) const {
    return dense_tensor(kept_.data(), like, static_cast<Index>(kept_positions_.size()));
  }

  static Buffer<B, std::byte> gather_rows(B& be, const ConstTensor& queries, const std::vector<Index>& rows) {
    const Index n = static_cast<Index>(rows.size());
    Buffer<B, std::byte> copy(be, n * queries.heads * queries.width * size_of(queries.dtype));
    const Buffer<B, Index> list(be, rows);
    be.each(n * queries.heads, detail::CopyRow{queries, list.data(), copy.data()});
    return copy;
  }

  /// Adds rows to those kept from earlier chunks, and drops the oldest when only the last are wanted.
  void keep_rows(B& be, const Reads& reads, const ConstTensor& queries, const std::vector<Index>& rows,
                 const std::vector<Position>& positions) {
    const Index row_bytes = queries.heads * queries.width * size_of(queries.dtype);
    require(kept_positions_.empty() || kept_row_bytes_ == row_bytes, "observe: rows of ", row_bytes, " bytes, earlier chunks had ",
            kept_row_bytes_);
    const Index before = static_cast<Index>(kept_positions_.size()), added = static_cast<Index>(rows.size());
    const Index dropped = reads.rows == Reads::Rows::last ? std::max<Index>(0, before + added - reads.count) : 0;
    Buffer<B, std::byte> joined(be, (before + added - dropped) * row_bytes);
    std::vector<Index> stay;
    for (Index r = std::min(dropped, before); r < before; ++r) stay.push_back(r);
    if (!stay.empty()) {
      const Buffer<B, Index> list(be, stay);
      be.each(static_cast<Index>(stay.size()) * queries.heads, detail::CopyRow{kept_tensor(queries), list.data(), joined.data()});
    }
    if (!rows.empty()) {
      const Buffer<B, Index> list(be, rows);
      be.each(added * queries.heads,
              detail::CopyRow{queries, list.data(), joined.data() + static_cast<Index>(stay.size()) * row_bytes});
    }
    kept_ = std::move(joined);
    kept_row_bytes_ = row_bytes;
    kept_positions_.erase(kept_positions_.begin(), kept_positions_.begin() + (before - static_cast<Index>(stay.size())));
    kept_positions_.insert(kept_positions_.end(), positions.begin(), positions.end());
  }

  std::any scorer_;
  Buffer<B, float> scores_;
  Index columns_ = 0;
  bool scored_ = false;
  Buffer<B, std::byte> kept_;           // query rows of earlier chunks, dense
  Index kept_row_bytes_ = 0;
  std::vector<Position> kept_positions_;
};

}  // namespace kvpare

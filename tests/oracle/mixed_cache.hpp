// A cache in which every token has its precision, as one writes it without a thought for memory: each token keeps what
// attention reads of it, and changes that once, when it is coded.
#pragma once

#include <functional>
#include <optional>

#include "cached_sequence.hpp"
#include "quantisers.hpp"
#include "zip_vl.hpp"

namespace kvpare::oracle {

/// What rows decode to once they are coded together. [n, width] -> [n, width]
using RowCoder = std::function<Array2(const Array2&)>;

inline Array2 as_they_are(const Array2& rows) { return rows; }

/// Tier 0 is raw; what the others mean is the user's.
struct MixedToken {
  CachedToken read;     // key and value as attention reads them
  int key_tier = 0, value_tier = 0;
  double gathered = 0;  // attention it has drawn, mean over the query group
};

/// One kv head, tokens by position. Keys and values change tier each for themselves.
class MixedHead {
 public:
  void append(const CachedToken& token) { tokens_.push_back({token, 0, 0, 0}); }

  /// The tokens at these places are coded together, from what is read of them now: raw numbers, or those of a finer
  /// tier, which is the second rounding that a demotion from a coded tier costs.
  void code_keys(const std::vector<Index>& places, int tier, const RowCoder& coder) {
    code(places, coder, [](MixedToken& token) -> std::vector<double>& { return token.read.key; });
    for (const Index i : places) item(tokens_, i).key_tier = tier;
  }
  void code_values(const std::vector<Index>& places, int tier, const RowCoder& coder) {
    code(places, coder, [](MixedToken& token) -> std::vector<double>& { return token.read.value; });
    for (const Index i : places) item(tokens_, i).value_tier = tier;
  }

  /// Only the tokens at these positions stay. What was coded together stays as it was coded.
  void keep(const std::vector<Index>& positions) {
    std::erase_if(tokens_, [&](const MixedToken& token) {
      return !std::binary_search(positions.begin(), positions.end(), token.read.position);
    });
  }
  void truncate(Index n) {
    std::erase_if(tokens_, [&](const MixedToken& token) { return token.read.position >= n; });
  }

  /// Places of the tokens whose keys (values) are of this tier, ascending.
  std::vector<Index> keys_of(int tier) const {
    return places_where([&](const MixedToken& token) { return token.key_tier == tier; });
  }
  std::vector<Index> values_of(int tier) const {
    return places_where([&](const MixedToken& token) { return token.value_tier == tier; });
  }
  std::vector<Index> positions_at(const std::vector<Index>& places) const {
    std::vector<Index> at;
    for (const Index i : places) at.push_back(item(tokens_, i).read.position);
    return at;
  }

  CachedHead as_read() const {
    CachedHead head;
    for (const MixedToken& token : tokens_) head.push_back(token.read);
    return head;
  }
  Array2 keys_at(const std::vector<Index>& places) const {
    return rows_at(places, [](const MixedToken& token) { return token.read.key; });
  }
  Array2 values_at(const std::vector<Index>& places) const {
    return rows_at(places, [](const MixedToken& token) { return token.read.value; });
  }
  Index size() const { return count_of(tokens_); }
  const MixedToken& at(Index i) const { return item(tokens_, i); }
  MixedToken& at(Index i) { return item(tokens_, i); }

 private:
  template <class Row>
  Array2 rows_at(const std::vector<Index>& places, Row&& row) const {
    Array2 rows;
    for (const Index i : places) {
      const std::vector<double> x = row(item(tokens_, i));
      if (rows.rows == 0) rows.columns = count_of(x);
      ++rows.rows;
      rows.values.insert(rows.values.end(), x.begin(), x.end());
    }
    return rows;
  }
  template <class Row>
  void code(const std::vector<Index>& places, const RowCoder& coder, Row&& row) {
    if (places.empty()) return;
    const Array2 decoded = coder(rows_at(places, [&](MixedToken token) { return row(token); }));
    require(decoded.rows == count_of(places), "oracle: a decoded row for each token");
    for (Index i = 0; i < count_of(places); ++i) row(item(tokens_, item(places, i))) = decoded.row(i);
  }
  template <class Which>
  std::vector<Index> places_where(Which&& which) const {
    std::vector<Index> places;
    for (Index i = 0; i < size(); ++i)
      if (which(item(tokens_, i))) places.push_back(i);
    return places;
  }

  std::vector<MixedToken> tokens_;
};

/// One softmax over the decoded numbers of all tiers.
/// Shapes  queries [rows, q_heads, width] -> out [rows, q_heads, value_width], lse [rows, q_heads]
inline AttendResult attend_mixed(const std::vector<MixedHead>& heads, const Array3& queries,
                                 const std::vector<Index>& positions, Index value_width, const AttentionSettings& how) {
  AttendInput in;
  in.queries = queries, in.positions = positions, in.value_width = value_width, in.how = how, in.sink = how.sink;
  for (const MixedHead& head : heads) in.heads.push_back(head.as_read());
  return attend(in);
}

/// p[kv head][row][place], the mean over the group's query heads; 0 where a row does not see.
inline std::vector<Array2> attention_of(const std::vector<MixedHead>& heads, const Array3& queries,
                                        const std::vector<Index>& positions, const AttentionSettings& how) {
  AttendInput in;
  in.queries = queries, in.positions = positions, in.how = how, in.sink = how.sink;
  for (const MixedHead& head : heads) in.heads.push_back(head.as_read());
  const Index group = queries.b / count_of(heads);
  std::vector<Array2> p;
  for (const MixedHead& head : heads) p.emplace_back(queries.a, head.size());
  for (Index row = 0; row < queries.a; ++row)
    for (Index head = 0; head < queries.b; ++head) {
      const std::vector<double> logits = attend_logits(in, row, head);
      const std::vector<double> of_row = softmax_given(logits, attend_lse(in, logits, head));
      for (Index j = 0; j < count_of(of_row); ++j)
        item(p, head / group).at(row, j) += item(of_row, j) / static_cast<double>(group);
    }
  return p;
}

inline void append_rows(std::vector<MixedHead>& heads, const std::vector<Index>& positions, const Array3& keys,
                        const Array3& values) {
  require(keys.a == count_of(positions) && values.a == keys.a && keys.b == count_of(heads) && values.b == keys.b,
          "oracle: a key and a value for each new token and kv head");
  for (Index h = 0; h < keys.b; ++h)
    for (Index t = 0; t < keys.a; ++t) {
      CachedToken token{item(positions, t), {}, {}};
      for (Index c = 0; c < keys.c; ++c) token.key.push_back(keys.at(t, h, c));
      for (Index c = 0; c < values.c; ++c) token.value.push_back(values.at(t, h, c));
      item(heads, h).append(token);
    }
}

// ---- KIVI ---------------------------------------------------------------------------------------------------------

/// When raw tokens are coded: while there are keep_raw + flush of them, the oldest `flush`.
///   paper: keys {0, R}, values {R, 1};   by pages: values {R, page_tokens}, so that never fewer than R are raw
/// After T tokens without eviction, floor((T - keep_raw) / flush) · flush are coded.
struct RawTail {
  Index keep_raw = 0, flush = 1;
};

struct KiviSettings {
  RawTail keys{0, 128}, values{128, 1};
  RowCoder code_key_lot, code_value_lot;  // given `flush` rows: keys by groups of tokens, values by groups of channels
};

inline RowCoder kivi_keys(Index group, const QuantiserSettings& how) {
  return [=](const Array2& rows) {
    return coded_along_tokens(rows, group, [=](const std::vector<double>& x) { return affine(x, how); }).decoded;
  };
}
inline RowCoder kivi_values(Index group, const QuantiserSettings& how) {
  return [=](const Array2& rows) {
    return coded_along_channels(rows, group, [=](const std::vector<double>& x) { return affine(x, how); }).decoded;
  };
}

/// Codes what has left the tails. Tokens are appended, attended to, then this is called: a prompt attends raw, and a
/// token whose arrival fills a tail is coded only after its step's attention.
inline void flush_tails(MixedHead& head, const KiviSettings& how) {
  for (;;) {
    std::vector<Index> raw = head.keys_of(0);
    if (count_of(raw) < how.keys.keep_raw + how.keys.flush) break;
    raw.resize(static_cast<std::size_t>(how.keys.flush));
    head.code_keys(raw, 1, how.code_key_lot);
  }
  for (;;) {
    std::vector<Index> raw = head.values_of(0);
    if (count_of(raw) < how.values.keep_raw + how.values.flush) break;
    raw.resize(static_cast<std::size_t>(how.values.flush));
    head.code_values(raw, 1, how.code_value_lot);
  }
}

// ---- MiKV ---------------------------------------------------------------------------------------------------------

struct MikvSettings {
  double ratio = 0.2;                 // r: the importance set is floor(r · T)
  double recent_share = 0.5;          // of the set: the newest, never demoted; floor
  bool count_follows_length = true;   // T is the length now; otherwise that of the prompt (as H2O has it)
  std::optional<QuantiserSettings> high;  // the importance set; nothing: raw
  QuantiserSettings low{.bits = 2};
  Index group = 0;                    // channels; 0: half of the width
  bool balance = true;                // coded keys, of both tiers, by the prompt's maxima; raw ones never
};

/// One layer. Tiers 0 (raw) and 1 (`high`) are the importance set, 2 the rest, in few bits. Nothing is ever deleted,
/// nothing is promoted. Each kv head chooses for itself. A token demoted from tier 1 is coded from what it decoded to.
/// Ties  of equal scores the newer token is demoted; NaN is demoted first
class MikvLayer {
 public:
  MikvLayer(const MikvSettings& settings, const AttentionSettings& how, Index kv_heads)
      : settings_(settings), how_(how), heads_(static_cast<std::size_t>(kv_heads)) {}

  /// Exact attention over the prompt, scores a = Σ_rows p, then the choice.
  Array3 prefill(const Array3& queries, const Array3& keys, const Array3& values) {
    factors_ = balancer(queries, keys);
    prompt_ = keys.a;
    std::vector<Index> positions;
    for (Index t = 0; t < keys.a; ++t) positions.push_back(t);
    return attend_and_demote(positions, queries, keys, values);
  }
  /// Attention over both tiers and the new tokens, which join the importance set; then the worst are demoted.
  Array3 step(const std::vector<Index>& positions, const Array3& queries, const Array3& keys, const Array3& values) {
    return attend_and_demote(positions, queries, keys, values);
  }

  const MixedHead& head(Index h) const { return item(heads_, h); }
  std::vector<Index> important(Index h) const { return head(h).positions_at(places_of_important(h)); }
  const Array2& factors() const { return factors_; }  // [kv_heads, width]

 private:
  Array3 attend_and_demote(const std::vector<Index>& positions, const Array3& queries, const Array3& keys,
                           const Array3& values) {
    append_rows(heads_, positions, keys, values);
    Array3 out = attend_mixed(heads_, queries, positions, values.c, how_).out;
    const std::vector<Array2> p = attention_of(heads_, queries, positions, how_);
    for (Index h = 0; h < count_of(heads_); ++h) {
      MixedHead& head = item(heads_, h);
      for (Index j = 0; j < head.size(); ++j)
        for (Index row = 0; row < queries.a; ++row) head.at(j).gathered += item(p, h).at(row, j);
      demote(h);
    }
    return out;
  }

  void demote(Index h) {
    MixedHead& head = item(heads_, h);
    const Index length = settings_.count_follows_length ? head.size() : prompt_;
    const auto floor_of = [](double x) { return static_cast<Index>(std::floor(x + 1e-9)); };
    const Index size = floor_of(settings_.ratio * static_cast<double>(length));
    const Index recent = floor_of(settings_.recent_share * static_cast<double>(size));
    std::vector<Index> important = places_of_important(h), gone;
    while (count_of(important) > size) {
      Index worst = 0;
      for (Index i = 0; i < count_of(important) - recent; ++i) {
        const double mine = head.at(item(important, i)).gathered, least = head.at(item(important, worst)).gathered;
        if (std::isnan(mine) || (!std::isnan(least) && mine <= least)) worst = i;
      }
      gone.push_back(item(important, worst));
      important.erase(important.begin() + worst);
    }
    std::sort(gone.begin(), gone.end());
    code(h, gone, 2, settings_.low);
    if (settings_.high) code(h, head.keys_of(0), 1, *settings_.high);  // nothing else is raw now
  }

  std::vector<Index> places_of_important(Index h) const {
    std::vector<Index> places = head(h).keys_of(0);
    for (const Index i : head(h).keys_of(1)) places.push_back(i);
    std::sort(places.begin(), places.end());
    return places;
  }

  void code(Index h, const std::vector<Index>& places, int tier, const QuantiserSettings& how) {
    const Quantiser quantise = [&](const std::vector<double>& x) { return affine(x, how); };
    const auto group_of = [&](const Array2& rows) { return settings_.group > 0 ? settings_.group : rows.columns / 2; };
    item(heads_, h).code_keys(places, tier, [&](const Array2& rows) {
      const std::vector<double> ones(static_cast<std::size_t>(rows.columns), 1.0);
      return balanced(rows, settings_.balance ? factors_.row(h) : ones, group_of(rows), quantise);
    });
    item(heads_, h).code_values(places, tier, [&](const Array2& rows) {
      return coded_along_channels(rows, group_of(rows), quantise).decoded;
    });
  }

  MikvSettings settings_;
  AttentionSettings how_;
  std::vector<MixedHead> heads_;
  Array2 factors_;
  Index prompt_ = 0;
};

/// Of 16 bits per number, with the importance set in `high` bits and the rest in `low`, scales included.
inline double mikv_cache_fraction(double ratio, double high, double low) {
  return (ratio * high + (1 - ratio) * low) / 16;
}

// ---- ZipVL --------------------------------------------------------------------------------------------------------

struct ZipvlSettings {
  double tau = 0.975;
  QuantiserSettings high{.bits = 4}, low{.bits = 2};
  Index interval = 100;               // generated tokens between two compressions
  bool factors_of_each_lot = false;   // the values' channel factors: the prompt's, or each lot's own
};

/// One layer: one count and one set for all its heads, by the mean over the query heads. Tier 1 is the important class,
/// 2 the rest; generated tokens are raw, 0, until `interval` of them are there. Older tokens never change class. Each
/// head has its own scales: per channel for the keys of a class and lot, per token for values.
/// Uncertain  the values' channel factors of later lots; the paper's scales of values go over all heads of a row
class ZipvlLayer {
 public:
  ZipvlLayer(const ZipvlSettings& settings, const AttentionSettings& how, Index kv_heads)
      : settings_(settings), how_(how), heads_(static_cast<std::size_t>(kv_heads)) {}

  /// All tokens of a prompt, its rows exact; `probes` are the rows that vote, ascending.
  Array3 prefill(const Array3& queries, const Array3& keys, const Array3& values, const std::vector<Index>& probes) {
    std::vector<Index> positions;
    for (Index t = 0; t < keys.a; ++t) positions.push_back(t);
    append_rows(heads_, positions, keys, values);
    Array3 out = attend_mixed(heads_, queries, positions, values.c, how_).out;
    const Array2 all = mean_over_heads(queries, positions);
    Array2 p(count_of(probes), keys.a);
    for (Index row = 0; row < p.rows; ++row)
      for (Index j = 0; j < p.columns; ++j) p.at(row, j) = all.at(item(probes, row), j);
    compress(positions, zipvl_important(zipvl_scores(p, probes), settings_.tau));
    return out;
  }

  /// One generated token; at each `interval`-th, the row's attention over the newest `interval` tokens divides them.
  Array3 step(Index position, const Array3& query, const Array3& key, const Array3& value) {
    require(query.a == 1 && key.a == 1, "oracle: one token at a time");
    append_rows(heads_, {position}, key, value);
    Array3 out = attend_mixed(heads_, query, {position}, value.c, how_).out;
    const std::vector<Index> raw = heads_.front().keys_of(0);
    if (count_of(raw) < settings_.interval) return out;
    const Array2 row = mean_over_heads(query, {position});
    ZipvlScores scores;
    for (const Index place : raw) scores.accumulated.push_back(row.at(0, place));
    scores.normalised = scores.accumulated;  // one row, which sees them all
    compress(raw, zipvl_important(scores, settings_.tau));
    return out;
  }

  const MixedHead& head(Index h) const { return item(heads_, h); }
  const std::vector<double>& factors(Index h) const { return item(factors_, h); }

 private:
  /// [rows, places], mean over all query heads.
  Array2 mean_over_heads(const Array3& queries, const std::vector<Index>& positions) const {
    const std::vector<Array2> p = attention_of(heads_, queries, positions, how_);
    Array2 mean(p.front().rows, p.front().columns);
    for (const Array2& of_head : p)
      for (std::size_t i = 0; i < mean.values.size(); ++i)
        mean.values[i] += of_head.values[i] / static_cast<double>(p.size());
    return mean;
  }

  /// `lot`: places; `chosen`: indices into it.
  void compress(const std::vector<Index>& lot, const std::vector<Index>& chosen) {
    std::vector<Index> important, rest;
    for (Index i = 0; i < count_of(lot); ++i)
      (std::binary_search(chosen.begin(), chosen.end(), i) ? important : rest).push_back(item(lot, i));
    const bool first = factors_.empty();
    if (first) factors_.resize(heads_.size());
    for (Index h = 0; h < count_of(heads_); ++h) {
      MixedHead& head = item(heads_, h);
      if (first || settings_.factors_of_each_lot) item(factors_, h) = channel_factors(head.values_at(lot));
      for (const bool high : {true, false}) {
        const std::vector<Index>& places = high ? important : rest;
        const QuantiserSettings& how = high ? settings_.high : settings_.low;
        head.code_keys(places, high ? 1 : 2, [&](const Array2& rows) { return zipcache_keys(rows, how).decoded; });
        head.code_values(places, high ? 1 : 2,
                         [&](const Array2& rows) { return zipcache_values(rows, item(factors_, h), how).decoded; });
      }
    }
  }

  ZipvlSettings settings_;
  AttentionSettings how_;
  std::vector<MixedHead> heads_;
  std::vector<std::vector<double>> factors_;  // [kv_heads][value_width]
};

}  // namespace kvpare::oracle

// Decode under a budget, as one writes it without a thought for memory: after each step the worst tokens are dropped
// until what is held fits.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>

#include "cached_sequence.hpp"
#include "reduce.hpp"

namespace kvpare::oracle {

enum class Evicts {
  least_attended,     // H2O: by the attention gathered so far, each kv head for itself
  least_of_last_row,  // TOVA: by the last row's attention, mean over all heads, one choice for the layer
  middle,             // StreamingLLM: all but the first and the newest
};

struct DecodeSettings {
  Evicts evicts = Evicts::least_attended;
  Index budget = 0;         // tokens a kv head holds after a step, of those that count
  double recent_share = 0;  // of the budget: the newest tokens that are not up for choice
  Index sinks = 0;          // first tokens that `middle` keeps
  std::function<bool(Index)> counts = [](Index) { return true; };  // by position; what does not count always stays
  std::function<bool(Index)> is_protected = [](Index) { return false; };  // stays, and is paid from the budget
};

/// What a step chose for one kv head.
struct EvictionChoice {
  std::vector<Index> kept;       // positions, ascending, all that is held
  double worst_kept = infinity;  // scores of the candidates on both sides of the cut; NaN does not show
  double best_gone = -infinity;
};

struct DecodeStep {
  Array3 out;                           // [rows, q_heads, value_width]
  std::vector<EvictionChoice> choices;  // [kv_heads]
};

/// One layer of one sequence; a fork is a copy.
class DecodeLayer {
 public:
  DecodeLayer(const AttentionSettings& how, Index q_heads, Index kv_heads, Index value_width,
              std::vector<double> sink = {})
      : how_(how), q_heads_(q_heads), value_width_(value_width), sink_(std::move(sink)),
        gathered_(static_cast<std::size_t>(kv_heads)) {
    require(kv_heads > 0 && q_heads % kv_heads == 0, "oracle: q_heads must be a multiple of kv_heads");
    cache_.heads.resize(static_cast<std::size_t>(kv_heads));
  }

  /// Tokens whose rows nobody has seen: they are held and have gathered nothing.
  void hold(const std::vector<Index>& positions, const Array3& keys, const Array3& values) {
    require(keys.a == count_of(positions) && values.a == keys.a, "oracle: a key and a value for each new token");
    cache_.append(positions, keys, values);
    for (auto& sum : gathered_) sum.resize(sum.size() + positions.size(), 0.0);
    last_row_.clear();
  }

  /// New tokens and what their rows attend to. Tokens are held, their attention adds up; nothing is evicted.
  /// Shapes  queries [rows, q_heads, width], keys and values [rows, kv_heads, width]
  Array3 attend(const std::vector<Index>& positions, const Array3& queries, const Array3& keys, const Array3& values) {
    require(queries.a == count_of(positions), "oracle: a query for each new token");
    hold(positions, keys, values);

    AttendInput in;
    in.queries = queries, in.positions = positions, in.heads = cache_.heads;
    in.value_width = value_width_, in.how = how_, in.sink = sink_;
    const Index group = q_heads_ / kv_heads();
    last_row_.assign(cache_.heads.size(), {});
    for (Index h = 0; h < kv_heads(); ++h) item(last_row_, h).assign(item(cache_.heads, h).size(), 0.0);
    for (Index row = 0; row < queries.a; ++row)
      for (Index head = 0; head < q_heads_; ++head) {
        const std::vector<double> logits = attend_logits(in, row, head);
        const std::vector<double> p = softmax_given(logits, attend_lse(in, logits, head));
        for (Index j = 0; j < count_of(p); ++j) {
          item(item(gathered_, head / group), j) += item(p, j) / static_cast<double>(group);
          if (row == queries.a - 1) item(item(last_row_, head / group), j) += item(p, j) / static_cast<double>(group);
        }
      }
    return oracle::attend(in).out;
  }

  /// What drops the worst until each kv head holds no more than its budget. Changes nothing.
  std::vector<EvictionChoice> choose(const DecodeSettings& s) const {
    std::vector<EvictionChoice> choices;
    const std::vector<std::vector<double>> scores = scores_of(s);
    for (Index h = 0; h < kv_heads(); ++h) choices.push_back(choose(h, item(scores, h), s));
    return choices;
  }

  std::vector<EvictionChoice> evict(const DecodeSettings& s) {
    const std::vector<EvictionChoice> choices = choose(s);
    for (Index h = 0; h < kv_heads(); ++h) keep(h, item(choices, h).kept);
    return choices;
  }

  DecodeStep step(const std::vector<Index>& positions, const Array3& queries, const Array3& keys, const Array3& values,
                  const DecodeSettings& s) {
    DecodeStep done;
    done.out = attend(positions, queries, keys, values);
    done.choices = evict(s);
    return done;
  }

  /// Of one head only these positions stay, for example another's choice between scores that are equal but for rounding.
  void keep(Index head, const std::vector<Index>& positions) {
    const auto stays = [&](const CachedToken& token) {
      return std::binary_search(positions.begin(), positions.end(), token.position);
    };
    drop_sums(head, stays);
    cache_.keep(head, positions);
  }

  void truncate(Index n) {
    for (Index h = 0; h < kv_heads(); ++h) drop_sums(h, [&](const CachedToken& token) { return token.position < n; });
    cache_.truncate(n);
  }

  const CachedLayer& cache() const { return cache_; }
  Index kv_heads() const { return count_of(cache_.heads); }
  std::vector<Index> positions(Index head) const { return cache_.positions(head); }
  const std::vector<double>& gathered(Index head) const { return item(gathered_, head); }  // H2O's sums, by place

 private:
  template <class Stays>
  void drop_sums(Index head, Stays&& stays) {
    std::vector<double> sums, row;
    const bool has_row = !last_row_.empty();
    for (Index i = 0; i < count_of(item(gathered_, head)); ++i) {
      if (!stays(item(item(cache_.heads, head), i))) continue;
      sums.push_back(item(item(gathered_, head), i));
      if (has_row) row.push_back(item(item(last_row_, head), i));
    }
    item(gathered_, head) = sums;
    if (has_row) item(last_row_, head) = row;
  }

  /// [kv_heads][held tokens], higher stays.
  std::vector<std::vector<double>> scores_of(const DecodeSettings& s) const {
    if (s.evicts == Evicts::least_attended) return gathered_;
    std::vector<std::vector<double>> scores;
    for (Index h = 0; h < kv_heads(); ++h) {
      scores.emplace_back(item(cache_.heads, h).size(), 0.0);
      for (Index i = 0; i < count_of(scores.back()); ++i) {
        double& score = item(scores.back(), i);
        if (s.evicts == Evicts::middle) {
          // The first before all others and in their order, then the newest.
          const auto place = static_cast<double>(i);
          score = i < s.sinks ? 2e9 - place : place;
          continue;
        }
        require(!last_row_.empty(), "oracle: no row has attended yet");
        for (Index other = 0; other < kv_heads(); ++other) {
          require(positions(other) == positions(h), "oracle: one choice for a layer whose heads hold the same tokens");
          score += item(item(last_row_, other), i) / static_cast<double>(kv_heads());
        }
      }
    }
    return scores;
  }

  EvictionChoice choose(Index head, const std::vector<double>& scores, const DecodeSettings& s) const {
    const std::vector<Index> at = positions(head);
    Index left = s.budget;  // for the candidates
    std::vector<Index> candidates;
    for (Index i = 0; i < count_of(at); ++i) {
      if (!s.counts(item(at, i))) continue;
      if (s.is_protected(item(at, i)))
        --left;
      else
        candidates.push_back(i);
    }
    left = std::max<Index>(left, 0);
    const auto recent = static_cast<Index>(std::floor(s.recent_share * static_cast<double>(left) + 1e-9));

    EvictionChoice choice;
    std::vector<bool> gone(at.size(), false);
    while (count_of(candidates) > left) {
      const Index up = std::max<Index>(count_of(candidates) - recent, 0);  // the older ones are up for choice
      require(up > 0, "oracle: the newest alone are above the budget");
      Index worst = 0;
      for (Index c = 0; c < up; ++c) {
        const double x = item(scores, item(candidates, c)), w = item(scores, item(candidates, worst));
        if (std::isnan(x) || (!std::isnan(w) && x <= w)) worst = c;  // of equals the newer goes
      }
      const double score = item(scores, item(candidates, worst));
      if (!std::isnan(score)) choice.best_gone = std::max(choice.best_gone, score);
      item(gone, item(candidates, worst)) = true;
      candidates.erase(candidates.begin() + worst);
    }
    for (Index c = 0; c < count_of(candidates) - recent; ++c)
      choice.worst_kept = std::min(choice.worst_kept, item(scores, item(candidates, c)));
    for (Index i = 0; i < count_of(at); ++i)
      if (!item(gone, i)) choice.kept.push_back(item(at, i));
    return choice;
  }

  AttentionSettings how_;
  Index q_heads_, value_width_;
  std::vector<double> sink_;
  CachedLayer cache_;
  std::vector<std::vector<double>> gathered_, last_row_;  // [kv_heads][held tokens], mean over the query group
};

}  // namespace kvpare::oracle

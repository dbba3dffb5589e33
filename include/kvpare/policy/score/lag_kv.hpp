// LagKV's importance: keys and values unlike what comes after them, without a look at attention.
#pragma once

#include <algorithm>
#include <cmath>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "../contracts.hpp"

namespace kvpare {

/// Scores a token by how unevenly its key and its value lie within the ranges of the tokens that follow.
///
/// Formula  what a head holds, without the first `sinks` tokens, is cut into partitions of `lag`; for x = keys, then values:
///          y[t, c] = (x[t, c] - min_c) / (max_c - min_c), min and max over the tokens of the next partition
///          d[t] = deviation of y[t, :] over the channels (n - 1);  part[t] = softmax of d over t's own partition
///          score[t] = rank of part_keys[t] + part_values[t] within t's partition, from 0 up, / lag: every partition gives
///          up as many. With `across` the sum itself: all compete
///          The last whole partition has nothing to be compared with: it and what fills none come above all that have a
///          score, the newest highest, and the sinks above these, the first highest
/// Shapes   keys and values through pages -> scores [kv_heads, columns]; tokens are ordered by position
/// Ties     within a partition the lower column ranks higher; equal ranks of two partitions are left to the selector. A
///          channel that is the same all over the reference counts 0. A NaN makes the scores of its partition and of the
///          one before NaN
/// Cost     reads keys and values once; `lag` comparisons per token; scratch a copy of one head's rows in floats and two
///          numbers per token
/// Source   LagKV (Liang et al. 2025, arXiv 2504.04704), section 3. Ours: `keep` counts all tokens, the paper's ratio only
///          those of compared partitions, so that a budget below sinks and last partitions is spent on these; a second
///          compression cuts what is left into partitions anew, where the released code leaves it alone
struct LagKv {
  static constexpr std::string_view name = "lag_kv";

  Index sinks = 4;      // tokens kept from the start
  Index lag = 128;      // tokens per partition
  bool across = false;  // tokens of all partitions compete

  static constexpr auto fields() {
    return std::tuple{Field<LagKv, Index>{"sinks", &LagKv::sinks, 0, 1 << 20, "tokens kept from the start"},
                      Field<LagKv, Index>{"lag", &LagKv::lag, 1, 1 << 14, "tokens per partition"},
                      Choice{"across", &LagKv::across, "do tokens of all partitions compete, or only those of each?"}};
  }
  constexpr Reads reads() const { return {}; }
  friend bool operator==(const LagKv&, const LagKv&) = default;
};

namespace detail {

/// Rows of one head, cut into partitions.
struct LagRows {
  const float* rows;          // [tokens, width] as gathered
  const std::int32_t* order;  // [tokens] the row of each token, by position
  Index width, first, lag;    // tokens before `first` are in no partition
  KVPARE_HD const float* row(Index partition, Index t) const {
    return rows + order[first + partition * lag + t] * width;
  }
};

/// Range of one channel over one reference.
struct LagRanges {
  LagRows x;
  float* low;       // [partitions, width] of the partition after each
  double* inverse;  // [partitions, width] 1 / (max - min), or 0 where they are the same
  KVPARE_HD void operator()(Index i) const {
    const Index partition = i / x.width, channel = i % x.width;
    float least = x.row(partition + 1, 0)[channel], most = least;
    for (Index t = 1; t < x.lag; ++t) {
      const float v = x.row(partition + 1, t)[channel];
      if (v < least || v != v) least = v;
      if (v > most || v != v) most = v;
    }
    const double range = static_cast<double>(most) - static_cast<double>(least);
    low[i] = least, inverse[i] = range == 0 ? 0 : 1 / range;
  }
};

struct LagDeviation {
  LagRows x;
  const float* low;
  const double* inverse;
  double* out;  // [partitions * lag]
  KVPARE_HD void operator()(Index i) const {
    const Index partition = i / x.lag;
    const float* row = x.row(partition, i % x.lag);
    double sum = 0, squares = 0;
    for (Index c = 0; c < x.width; ++c) sum += within(row[c], partition * x.width + c);
    const double mean = sum / static_cast<double>(x.width);
    for (Index c = 0; c < x.width; ++c) {
      const double apart = within(row[c], partition * x.width + c) - mean;
      squares += apart * apart;
    }
    out[i] = std::sqrt(squares / static_cast<double>(x.width > 1 ? x.width - 1 : 1));
  }
  KVPARE_HD double within(float value, Index channel) const {
    return (static_cast<double>(value) - static_cast<double>(low[channel])) * inverse[channel];
  }
};

/// Adds one partition's softmax.
struct AddLagSoftmax {
  const double* deviation;  // [partitions * lag]
  Index lag;
  double* sum;  // [partitions * lag]
  KVPARE_HD void operator()(Index partition) const {
    const double* d = deviation + partition * lag;
    double peak = d[0], total = 0;
    for (Index t = 1; t < lag; ++t)
      if (d[t] > peak || d[t] != d[t]) peak = d[t];
    for (Index t = 0; t < lag; ++t) total += std::exp(d[t] - peak);
    for (Index t = 0; t < lag; ++t) sum[partition * lag + t] += std::exp(d[t] - peak) / total;
  }
};

struct LagScore {
  const double* sum;            // [partitions * lag], each within [0, 2]
  const std::int32_t* columns;  // [tokens] by position
  Index tokens, first, lag, partitions;
  bool across;
  float* out;  // [columns]
  KVPARE_HD void operator()(Index token) const {
    const Index at = token - first, compared = partitions * lag;
    float& score = out[columns[token]];
    if (at < 0)
      score = static_cast<float>(4 + (tokens - first) - at);
    else if (at >= compared)
      score = static_cast<float>(4 + at - compared);
    else if (across || sum[at] != sum[at])
      score = static_cast<float>(sum[at]);
    else
      score = static_cast<float>(static_cast<double>(below(at)) / static_cast<double>(lag));
  }
  KVPARE_HD Index below(Index at) const {
    const Index begin = at / lag * lag;
    Index count = 0;
    for (Index t = begin; t < begin + lag; ++t) count += sum[t] < sum[at] || (sum[t] == sum[at] && t > at) ? 1 : 0;
    return count;
  }
};

}  // namespace detail

template <Backend B>
void score(B& be, const LagKv& policy, const Observation<B>& seen, Scores out) {
  fill(be, out.data, out.heads * out.columns, 0.0f);
  const Index widest = std::max(seen.shape->key_dim, seen.shape->value_dim);
  for (Index h = 0; h < out.heads; ++h) {
    std::vector<std::pair<std::int32_t, std::int32_t>> held;  // column, row as gathered
    for_each_token(seen, h, [&](Index, Index column) {
      held.emplace_back(static_cast<std::int32_t>(column), static_cast<std::int32_t>(held.size()));
    });
    if (held.empty()) continue;
    std::sort(held.begin(), held.end());
    std::vector<std::int32_t> columns, order;
    for (const auto& token : held) columns.push_back(token.first), order.push_back(token.second);
    const Index tokens = static_cast<Index>(held.size()), first = std::min(policy.sinks, tokens);
    const Index partitions = std::max<Index>((tokens - first) / policy.lag - 1, 0), compared = partitions * policy.lag;
    const Buffer<B, std::int32_t> column_of(be, columns), row_of(be, order);
    const Buffer<B, double> deviation(be, compared), sum(be, compared);
    if (compared > 0) {
      const Buffer<B, float> rows(be, tokens * widest), low(be, partitions * widest);
      const Buffer<B, double> inverse(be, partitions * widest);
      fill(be, sum.data(), compared, 0.0);
      for (const Side side : {Side::keys, Side::values}) {
        const Index width = side == Side::keys ? seen.shape->key_dim : seen.shape->value_dim;
        GatherRow gather;
        gather.pages = seen.heads[static_cast<std::size_t>(h)], gather.side = side, gather.width = width,
        gather.out = rows.data();
        be.gather(std::span(&gather, 1));
        const detail::LagRows x{rows.data(), row_of.data(), width, first, policy.lag};
        be.each(partitions * width, detail::LagRanges{x, low.data(), inverse.data()});
        be.each(compared, detail::LagDeviation{x, low.data(), inverse.data(), deviation.data()});
        be.each(partitions, detail::AddLagSoftmax{deviation.data(), policy.lag, sum.data()});
      }
    }
    be.each(tokens, detail::LagScore{sum.data(), column_of.data(), tokens, first, policy.lag, partitions, policy.across,
                                     out.data + h * out.columns});
  }
}

}  // namespace kvpare

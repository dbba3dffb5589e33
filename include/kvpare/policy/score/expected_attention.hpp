// Expected Attention's importance: what a query yet to come is expected to give, from how queries were so far.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>
#include <tuple>
#include <vector>

#include "../../backend/derived/rope.hpp"
#include "../contracts.hpp"

namespace kvpare {

/// Scores a token by the attention that it can expect of queries that are distributed like those observed, times the length
/// of its value.
///
/// Formula  mu, Sigma = mean and covariance (over their number) of a query head's rows;  s = the layer's scale
///          x[j] = s mu·k_j + s^2 / 2 k_j^T Sigma k_j, the logarithm of E exp(s q·k_j) for q ~ N(mu, Sigma)
///          p = softmax of x over the tokens of the head;  score[h, j] = (mean of p[j] over the query heads of kv head h
///          + epsilon) ||v_j||, or the mean alone
/// Future   with future = T, mu and Sigma are of the queries before RoPE, turned by the mean rotation R of the T positions after
///          the newest token: mu' = R mu, Sigma' = R Sigma R^T, as the paper has it, whose T is 512. Needs LayerShape::rope.
///          With 0 queries count as the engine gives them, after RoPE, so that mu and Sigma are over the positions that were
///          observed; that needs no rope, asks for none, and is the default whether the layer has one or not
///          The first `sinks` tokens have no part in any of this, as rows or as keys, and rank first
/// Shapes   queries [rows, q_heads, key_dim], keys and values through pages -> scores [kv_heads, columns]. Without a row
///          beyond the sinks' all observed ones count; without rows all scores are 0
/// Ties     none made here; the sinks are equal. A NaN key or value makes its own score NaN, a NaN query those of its kv head
/// Cost     per query head rows * key_dim^2 for Sigma and tokens * key_dim^2 for x; scratch a copy of one query head's rows and
///          two of one kv head's in floats, with `future` a rotation of rows * rotary_dim floats as well. All rows of a
///          chunked prompt are kept until its end, with `window` no more than that
/// Throws   with `future`, where the layer has no rope, or one whose axes ask for more than a position
/// Source   Expected Attention (Devoto et al. 2025, arXiv 2510.00636), section 3. Ours: future = 0, see there; every row of
///          every head of the group counts alike. Softcap, sliding window and sink logits of the layer are left out of x
struct ExpectedAttention {
  static constexpr std::string_view name = "expected_attention";

  Index sinks = 4;         // tokens kept from the start
  Index window = 0;        // query rows looked at, from the end; 0 = all
  bool covariance = true;  // false: x = s mu·k
  bool value_norm = true;  // times ||v||
  double epsilon = 0;      // added before that, so that long values count even where nothing is expected
  Index future = 0;        // positions to come that queries are expected at; 0 = where they were observed

  static constexpr auto fields() {
    return std::tuple{
        Field<ExpectedAttention, Index>{"sinks", &ExpectedAttention::sinks, 0, 1 << 20, "tokens kept from the start"},
        Field<ExpectedAttention, Index>{"window", &ExpectedAttention::window, 0, 1 << 20,
                                        "query rows looked at, from the end; 0 = all"},
        Choice{"covariance", &ExpectedAttention::covariance,
               "does the spread of the queries count, or only their mean?"},
        Choice{"value_norm", &ExpectedAttention::value_norm, "are scores multiplied by the length of the value?"},
        Field<ExpectedAttention, double>{"epsilon", &ExpectedAttention::epsilon, 0.0, 1.0,
                                         "added to what is expected before that"},
        Field<ExpectedAttention, Index>{
            "future", &ExpectedAttention::future, 0, 1 << 20,
            "positions to come that queries are expected at, 0 = where they were observed"}};
  }
  void check_layer(const LayerShape& shape, Index layer) const {
    if (future > 0) plain_rope_of(shape, layer, message(name, ": future = ", future));
  }
  constexpr Reads reads() const {
    return window > 0 ? Reads{.rows = Reads::Rows::last, .count = window} : Reads{.rows = Reads::Rows::all};
  }
  friend bool operator==(const ExpectedAttention&, const ExpectedAttention&) = default;
};

namespace detail {

/// Mean cosine and sine of a pair's angles at positions 0 to future - 1.
struct MeanTurn {
  RopeView rope;
  Index future;
  double* out;  // [pairs, 2]
  KVPARE_HD void operator()(Index pair) const {
    double cosine = 0, sine = 0;
    for (Index p = 0; p < future; ++p) {
      const double a = rope.angle(pair, static_cast<Position>(p));
      cosine += std::cos(a), sine += std::sin(a);
    }
    out[2 * pair] = cosine / static_cast<double>(future), out[2 * pair + 1] = sine / static_cast<double>(future);
  }
};

/// What carries a row's query on to the positions to come, on average: per pair the factors of a turn back by its own position,
/// forth to the next, and by the mean from there.
struct TurnsToCome {
  RopeView rope;
  const double* mean;         // [pairs, 2]
  const Position* positions;  // [count]
  Position next;              // the first to come
  Index count;
  float* out;  // [pairs, count, 2]
  KVPARE_HD void operator()(Index i) const {
    const Index pair = i / count;
    const double a = rope.angle(pair, next - positions[i % count]), x = std::cos(a), y = std::sin(a);
    const double u = mean[2 * pair], v = mean[2 * pair + 1];
    out[2 * i] = static_cast<float>(x * u - y * v), out[2 * i + 1] = static_cast<float>(x * v + y * u);
  }
};

/// The rows of one query head, channel by channel, carried on by `turns` where there are any.
struct QueryChannels {
  ConstTensor queries;
  const Index* rows;  // [count]
  Index count, head;
  RopeView rope;
  const float* turns;  // [pairs, count, 2], or null
  float* out;          // [width, count]
  KVPARE_HD void operator()(Index i) const {
    const Index channel = i / count, r = i % count;
    const void* row = queries.at(rows[r], head);
    if (turns == nullptr || channel >= rope.rotary_dim()) {
      out[i] = element(row, channel);
      return;
    }
    const Index pair = rope.pair_of(channel);
    const float* turn = turns + 2 * (pair * count + r);
    const float x = element(row, rope.first_of(pair)), y = element(row, rope.second_of(pair));
    out[i] = rope.is_second(channel) ? x * turn[1] + y * turn[0] : x * turn[0] - y * turn[1];
  }
  KVPARE_HD float element(const void* row, Index channel) const {
    return queries.dtype == DType::f32   ? static_cast<const float*>(row)[channel]
           : queries.dtype == DType::f16 ? static_cast<float>(static_cast<const half*>(row)[channel])
                                         : static_cast<float>(static_cast<const bfloat16*>(row)[channel]);
  }
};

/// TurnsToCome of some rows, in backend memory. With future = 0 there are none.
template <Backend B>
class FutureTurns {
 public:
  FutureTurns(B& be, const LayerShape& shape, Index future, Position next, std::span<const Position> positions) {
    if (future == 0) return;
    rope_ = BackendRope<B>(be, *shape.rope);
    const Index count = static_cast<Index>(positions.size());
    const Buffer<B, const Position> of_rows(be, positions);
    const Buffer<B, double> mean(be, rope().rotary_dim());
    turns_ = Buffer<B, float>(be, rope().rotary_dim() * count);
    be.each(rope().pairs, MeanTurn{rope(), future, mean.data()});
    be.each(rope().pairs * count, TurnsToCome{rope(), mean.data(), of_rows.data(), next, count, turns_.data()});
  }
  const RopeView& rope() const { return rope_.view(); }
  const float* data() const { return turns_.data(); }

 private:
  BackendRope<B> rope_;
  Buffer<B, float> turns_;
};

/// Means of the channels; one of them with a NaN has none.
struct ChannelMean {
  const RowSummary* channels;  // [width]
  float* mean;                 // [width]
  KVPARE_HD void operator()(Index c) const {
    mean[c] =
        channels[c].nan_count > 0 ? std::numeric_limits<float>::quiet_NaN() : static_cast<float>(channels[c].mean);
  }
};

struct SubtractMean {
  const float* mean;
  Index count;
  float* channels;  // [width, count]
  KVPARE_HD void operator()(Index i) const { channels[i] -= mean[i / count]; }
};

struct ExpectedExponent {
  const float *keys, *spread;  // [tokens, width] k, count * Sigma k (or null)
  const float* mean;           // [width]
  Index width;
  double scale, half_square;  // s, s^2 / 2 / count
  float* out;                 // [tokens]
  KVPARE_HD void operator()(Index t) const {
    const float* k = keys + t * width;
    double x = 0, squares = 0;
    for (Index c = 0; c < width; ++c) x += static_cast<double>(mean[c]) * static_cast<double>(k[c]);
    for (Index c = 0; spread != nullptr && c < width; ++c)
      squares += static_cast<double>(spread[t * width + c]) * static_cast<double>(k[c]);
    out[t] = static_cast<float>(scale * x + half_square * squares);
  }
};

/// exp(x - max): no overflow, and the largest is 1.
struct ExpBelowPeak {
  const RowSummary* peak;
  float* x;
  KVPARE_HD void operator()(Index t) const { x[t] = std::exp(x[t] - peak->max); }
};

struct AddShare {
  const float* weights;  // [tokens]
  const RowSummary* all;
  double heads;
  double* sum;  // [tokens]
  KVPARE_HD void operator()(Index t) const { sum[t] += static_cast<double>(weights[t]) / (all->sum * heads); }
};

struct ExpectedScore {
  const double* expected;  // [tokens]
  const float* values;     // [tokens, width], or null
  Index width;
  double epsilon;
  float* out;  // [tokens]
  KVPARE_HD void operator()(Index t) const {
    double squares = 0;
    for (Index c = 0; values != nullptr && c < width; ++c)
      squares += static_cast<double>(values[t * width + c]) * static_cast<double>(values[t * width + c]);
    out[t] = static_cast<float>(values == nullptr ? expected[t] : (expected[t] + epsilon) * std::sqrt(squares));
  }
};

/// To the columns; sinks above all others.
struct PlaceExpected {
  const float* scores;          // [tokens]
  const std::uint64_t* others;  // bitmap over tokens
  const RowSummary* best;       // of the others
  const std::int32_t* columns;  // [tokens]
  float* out;                   // [columns]
  KVPARE_HD void operator()(Index t) const {
    const bool is_other = (others[t / 64] >> (t % 64) & 1u) != 0;
    out[columns[t]] = is_other ? scores[t] : best->count > 0 ? best->max + 1 : 1.0f;
  }
};

}  // namespace detail

template <Backend B>
void score(B& be, const ExpectedAttention& policy, const Observation<B>& seen, Scores out) {
  const Columns& columns = *seen.columns;
  const LayerShape& shape = *seen.shape;
  const Index width = shape.key_dim, group = shape.group();
  policy.check_layer(shape, seen.layer);
  fill(be, out.data, out.heads * out.columns, 0.0f);
  if (seen.rows() == 0) return;

  // The sinks, and the rows of other tokens.
  Position last_sink = -1, newest = -1;
  const auto live = columns.live_in_any();
  for (Index c = 0, left = policy.sinks; c < columns.count && left > 0; ++c)
    if (columns.has(live, c)) last_sink = columns.positions[static_cast<std::size_t>(c)], --left;
  for (Index c = columns.count; c-- > 0 && newest < 0;)
    if (columns.has(live, c)) newest = columns.positions[static_cast<std::size_t>(c)];
  const bool only_sinks = seen.row_positions.back() <= last_sink;
  std::vector<Index> rows;
  std::vector<Position> positions;
  for (Index r = 0; r < seen.rows(); ++r)
    if (const Position p = seen.row_positions[static_cast<std::size_t>(r)]; only_sinks || p > last_sink)
      rows.push_back(r), positions.push_back(p);
  const Index count = static_cast<Index>(rows.size());
  const Buffer<B, Index> row_list(be, rows);
  const detail::FutureTurns<B> turns(be, shape, policy.future, newest + 1, positions);
  const Buffer<B, float> channels(be, width * count), mean(be, width), covariance(be, width * width);
  const Buffer<B, RowSummary> of_channels(be, width), of_tokens(be, 1);
  std::vector<MaskedRow> channel_rows;
  for (Index c = 0; c < width; ++c) channel_rows.push_back({channels.data() + c * count, nullptr, count, 64});

  for (Index h = 0; h < out.heads; ++h) {
    std::vector<std::int32_t> column_of;
    std::vector<std::uint64_t> others;
    for_each_token(seen, h, [&](Index, Index column) {
      const Index t = static_cast<Index>(column_of.size());
      if (t % 64 == 0) others.push_back(0);
      if (columns.positions[static_cast<std::size_t>(column)] > last_sink)
        others.back() |= std::uint64_t{1} << (t % 64);
      column_of.push_back(static_cast<std::int32_t>(column));
    });
    const Index tokens = static_cast<Index>(column_of.size());
    if (tokens == 0) continue;
    const Buffer<B, std::int32_t> token_columns(be, column_of);
    const Buffer<B, std::uint64_t> other_bits(be, others);
    const Buffer<B, float> held(be, tokens * std::max(width, shape.value_dim)), spread(be, tokens * width),
        weights(be, tokens);
    const Buffer<B, double> expected(be, tokens);
    fill(be, expected.data(), tokens, 0.0);
    const MaskedRow over_others{weights.data(), other_bits.data(), tokens, 64};
    GatherRow gather;
    gather.pages = seen.heads[static_cast<std::size_t>(h)], gather.width = width, gather.out = held.data();
    be.gather(std::span(&gather, 1));

    for (Index q = h * group; q < (h + 1) * group; ++q) {
      be.each(width * count, detail::QueryChannels{seen.queries, row_list.data(), count, q, turns.rope(), turns.data(),
                                                   channels.data()});
      be.reduce(channel_rows, of_channels.data());
      be.each(width, detail::ChannelMean{of_channels.data(), mean.data()});
      if (policy.covariance) {
        be.each(width * count, detail::SubtractMean{mean.data(), count, channels.data()});
        be.product({.a = channels.data(),
                    .b = channels.data(),
                    .c = covariance.data(),
                    .m = width,
                    .n = width,
                    .k = count,
                    .b_transposed = true});
        be.product({.a = held.data(), .b = covariance.data(), .c = spread.data(), .m = tokens, .n = width, .k = width});
      }
      const double scale = static_cast<double>(shape.scale);
      be.each(tokens,
              detail::ExpectedExponent{held.data(), policy.covariance ? spread.data() : nullptr, mean.data(), width,
                                       scale, scale * scale / 2 / static_cast<double>(count), weights.data()});
      be.reduce(std::span(&over_others, 1), of_tokens.data());
      be.each(tokens, detail::ExpBelowPeak{of_tokens.data(), weights.data()});
      be.reduce(std::span(&over_others, 1), of_tokens.data());
      be.each(tokens, detail::AddShare{weights.data(), of_tokens.data(), static_cast<double>(group), expected.data()});
    }

    if (policy.value_norm) {
      gather.side = Side::values, gather.width = shape.value_dim;
      be.gather(std::span(&gather, 1));
    }
    be.each(tokens, detail::ExpectedScore{expected.data(), policy.value_norm ? held.data() : nullptr, shape.value_dim,
                                          policy.epsilon, weights.data()});
    be.reduce(std::span(&over_others, 1), of_tokens.data());
    be.each(tokens, detail::PlaceExpected{weights.data(), other_bits.data(), of_tokens.data(), token_columns.data(),
                                          out.data + h * out.columns});
  }
}

}  // namespace kvpare

// Visual tokens by how much of a layer's visual output they can supply at low cost.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <string_view>
#include <tuple>
#include <vector>

#include "../contracts.hpp"

namespace kvpare {

/// Whose totals a transport plan keeps to: the targets' alone, or the sources' as well.
enum class TransportPlan : std::uint8_t { semi_relaxed, balanced };
inline constexpr std::string_view choices(TransportPlan*) { return "semi_relaxed|balanced"; }

/// Scores a visual token by its share in an entropic transport plan from what enters a layer (sources S) to what the layer
/// makes of it (targets T).
///
/// Formula  C[i, j] = alpha F[i, j] + beta G[i, j] + gamma E[i], each of F, G and E divided by its largest value (by nothing
///          where that is 0)
///          F[i, j] = ||S_i - T_j||, or its square;  G[i, j] = 1 - exp(-d(i, j)^2 / (2 sigma^2)), 1 across images;
///          E[i] = distance of i from the middle of its image's bounding box; d and E in units of the grid
///          semi_relaxed  P[i, j] = q exp(-C[i, j] / epsilon) / sum_i' exp(-C[i', j] / epsilon), q = 1 / tokens
///          balanced      Sinkhorn: `rounds` times the rows, then the columns of P are scaled to 1 / tokens each
///          score[i] = sum_j P[i, j]; over all tokens they sum to 1
/// Ending   on the column step. A plan that ended on the row step would score every token 1 / tokens, whatever the cost; a
///          balanced one comes near that as `rounds` grows, and E cancels in it. Hence semi_relaxed
/// Shapes   features [tokens, 1, width] of any element type, no queries, no keys -> scores [1, tokens], for all heads and layers
/// Ties     none made here. A NaN in a source makes its own score NaN, one in a target all of them
/// Cost     a product of tokens x width x tokens, twice (semi_relaxed) or rounds + 2 times. Scratch in floats: the sources
///          centred (tokens * width), and for each tile of 64 targets 64 * width + 128 * tokens. Logarithms throughout; F from
///          centred features, by the product where that is exact enough and by differences where S_i and T_j are close
/// Source   TopV (Yang et al. 2025, arXiv 2503.18278): S enters layer 2, T is the layer's visual output after the norm that
///          precedes its MLP. Ours: semi-relaxed, where the paper leaves the totals open; gamma 0.5, since under
///          semi_relaxed the 0.01 of a balanced re-implementation would hardly move a token: at epsilon 0.1 it is worth a
///          factor of at most 1.1 between the middle and a corner
struct Transport {
  static constexpr std::string_view name = "transport";

  double alpha = 1;      // weight of the distance between features
  double beta = 1;       // of the distance on the grid
  double gamma = 0.5;    // of the distance from the image's middle
  double sigma = 10;     // reach of the distance on the grid, in its units
  double epsilon = 0.1;  // entropy: large = all tokens alike, small = the cheapest source takes all
  TransportPlan plan = TransportPlan::semi_relaxed;
  Index rounds = 3;      // with balanced: of the row and the column step
  bool squared = false;  // F as a squared distance

  static constexpr auto fields() {
    return std::tuple{
        Field<Transport, double>{"alpha", &Transport::alpha, 0.0, 1e3, "weight of the distance between features"},
        Field<Transport, double>{"beta", &Transport::beta, 0.0, 1e3, "weight of the distance on the grid"},
        Field<Transport, double>{"gamma", &Transport::gamma, 0.0, 1e3,
                                 "weight of the distance from the image's middle"},
        Field<Transport, double>{"sigma", &Transport::sigma, 1e-3, 1e6, "reach of the distance on the grid"},
        Field<Transport, double>{"epsilon", &Transport::epsilon, 1e-4, 1e4, "entropy of the plan"},
        Choice{"plan", &Transport::plan, "whose totals the plan keeps to: the targets', or all"},
        Field<Transport, Index>{"rounds", &Transport::rounds, 1, 1000, "with balanced: of the row and the column step"},
        Choice{"squared", &Transport::squared, "the distance between features squared"}};
  }
  constexpr Reads reads() const { return {.features = true}; }
  friend bool operator==(const Transport&, const Transport&) = default;
};

namespace detail {

/// Mean of a channel over what is finite: distances do not depend on it, but products of what is left lose less.
struct FeatureCentre {
  ConstTensor sources, targets;
  float* centre;  // [width]
  KVPARE_HD void operator()(Index channel) const {
    double sum = 0;
    Index count = 0;
    for (Index r = 0; r < sources.rows; ++r) add(element(sources, r, channel), sum, count);
    for (Index r = 0; r < targets.rows; ++r) add(element(targets, r, channel), sum, count);
    centre[channel] = count > 0 ? static_cast<float>(sum / static_cast<double>(count)) : 0.0f;
  }
  KVPARE_HD static void add(float x, double& sum, Index& count) {
    if (x - x == 0) sum += static_cast<double>(x), ++count;
  }
};

struct CentredRows {
  ConstTensor from;
  const float* centre;
  float* to;  // [rows, width]
  KVPARE_HD void operator()(Index i) const {
    const Index channel = i % from.width;
    to[i] = element(from, i / from.width, channel) - centre[channel];
  }
};

struct CentredSquares {
  ConstTensor from;
  const float* centre;
  double* to;  // [rows]
  KVPARE_HD void operator()(Index row) const {
    double sum = 0;
    for (Index c = 0; c < from.width; ++c) {
      const double x = static_cast<double>(element(from, row, c) - centre[c]);
      sum += x * x;
    }
    to[row] = sum;
  }
};

/// Products of targets and sources, in place to distances.
struct FeatureDistance {
  const float *sources, *targets;                 // [tokens, width], [tile, width] centred
  const double *source_squares, *target_squares;  // [tokens], [tile]
  Index tokens, width;
  bool squared;
  float* tile;  // [tile, tokens]
  KVPARE_HD void operator()(Index i) const {
    const Index target = i / tokens, source = i % tokens;
    const double whole = source_squares[source] + target_squares[target];
    double distance = whole - 2 * static_cast<double>(tile[i]);
    if (distance <= whole / 64) {  // what the product's rounding would leave little of
      distance = 0;
      for (Index c = 0; c < width; ++c) {
        const double x =
            static_cast<double>(sources[source * width + c]) - static_cast<double>(targets[target * width + c]);
        distance += x * x;
      }
    }
    tile[i] = static_cast<float>(squared ? distance : std::sqrt(distance));
  }
};

struct FeaturePlace {
  float x, y;
  float off_centre;  // E, divided by its largest
  std::int32_t image;
};

KVPARE_HD inline float grid_distance(const FeaturePlace& a, const FeaturePlace& b, float falloff) {
  if (a.image != b.image) return 1.0f;
  const float dx = a.x - b.x, dy = a.y - b.y;
  return -std::expm1(-(dx * dx + dy * dy) * falloff);
}

struct GridDistance {
  const FeaturePlace* places;
  Index tokens, first_target;
  float falloff;  // 1 / (2 sigma^2)
  float* tile;    // [tile, tokens]
  KVPARE_HD void operator()(Index i) const {
    tile[i] = grid_distance(places[i % tokens], places[first_target + i / tokens], falloff);
  }
};

struct LargestOfRows {
  const RowSummary* rows;
  Index count;
  float* largest;
  KVPARE_HD void operator()(Index) const {
    for (Index r = 0; r < count; ++r)
      if (rows[r].max > *largest) *largest = rows[r].max;
  }
};

/// Distances between features, in place to row - C / epsilon.
struct TransportLogit {
  const FeaturePlace* places;
  const float* largest;  // of F and of G
  const double* row;     // [tokens] logarithm of a source's factor
  Index tokens, first_target;
  float falloff;
  double alpha, beta, gamma, epsilon;
  float* tile;  // [tile, tokens]
  KVPARE_HD void operator()(Index i) const {
    const Index source = i % tokens;
    const FeaturePlace &from = places[source], &to = places[first_target + i / tokens];
    const double f = static_cast<double>(tile[i]), g = static_cast<double>(grid_distance(from, to, falloff));
    const double cost = alpha * (largest[0] > 0 ? f / static_cast<double>(largest[0]) : f) +
                        beta * (largest[1] > 0 ? g / static_cast<double>(largest[1]) : g) +
                        gamma * static_cast<double>(from.off_centre);
    tile[i] = static_cast<float>(row[source] - cost / epsilon);
  }
};

struct BelowPeak {
  const float* logits;
  const RowSummary* peaks;  // per target
  Index tokens;
  float* out;
  KVPARE_HD void operator()(Index i) const { out[i] = std::exp(logits[i] - peaks[i / tokens].max); }
};

/// The column step: a target's factor such that its column sums to exp(log_share).
struct ScaleTarget {
  const RowSummary *peaks, *sums;
  double log_share;
  double* column;
  KVPARE_HD void operator()(Index target) const {
    column[target] = log_share - static_cast<double>(peaks[target].max) - std::log(sums[target].sum);
  }
};

/// A sum of exponentials, as exp(peak) * sum.
struct LogSum {
  float peak;
  double sum;
};

/// Adds a tile of the plan to the sums of its sources.
struct AddToSources {
  const float* logits;   // [tile, tokens]
  const double* column;  // [tile] logarithm of a target's factor, or null: not scaled
  Index tokens, targets;
  LogSum* to;  // [tokens]
  KVPARE_HD void operator()(Index source) const {
    LogSum total = to[source];
    for (Index t = 0; t < targets; ++t) {
      float x = logits[t * tokens + source];
      if (column != nullptr) x = static_cast<float>(static_cast<double>(x) + column[t]);
      if (x > total.peak) {
        total.sum *= static_cast<double>(std::exp(total.peak - x));
        total.peak = x;
      }
      total.sum += static_cast<double>(std::exp(x - total.peak));
    }
    to[source] = total;
  }
};

/// The row step: a source's factor such that its row sums to exp(log_share).
struct ScaleSource {
  const LogSum* sums;
  double log_share;
  double* row;
  KVPARE_HD void operator()(Index source) const {
    row[source] += log_share - static_cast<double>(sums[source].peak) - std::log(sums[source].sum);
  }
};

struct SumOfSource {
  const LogSum* sums;
  float* out;
  KVPARE_HD void operator()(Index source) const {
    out[source] = static_cast<float>(std::exp(static_cast<double>(sums[source].peak)) * sums[source].sum);
  }
};

/// Places of tokens on their images' grids. E is divided by its largest over all images.
inline std::vector<FeaturePlace> places_of(const Features& f) {
  struct Box {
    double left, right, top, bottom;
  };
  std::map<std::int32_t, Box> boxes;
  const std::size_t tokens = f.positions.size();
  for (std::size_t t = 0; t < tokens; ++t) {
    const double x = f.x[t], y = f.y[t];
    Box& box = boxes.try_emplace(f.image[t], Box{x, x, y, y}).first->second;
    box = {std::min(box.left, x), std::max(box.right, x), std::min(box.top, y), std::max(box.bottom, y)};
  }
  std::vector<double> off(tokens);
  double largest = 0;
  for (std::size_t t = 0; t < tokens; ++t) {
    const Box& box = boxes.at(f.image[t]);
    off[t] = std::hypot(f.x[t] - (box.left + box.right) / 2, f.y[t] - (box.top + box.bottom) / 2);
    largest = std::max(largest, off[t]);
  }
  std::vector<FeaturePlace> places(tokens);
  for (std::size_t t = 0; t < tokens; ++t) {
    const Box& box = boxes.at(f.image[t]);  // places relative to it, which floats hold exactly
    places[t] = {static_cast<float>(f.x[t] - box.left), static_cast<float>(f.y[t] - box.top),
                 static_cast<float>(largest > 0 ? off[t] / largest : 0), f.image[t]};
  }
  return places;
}

/// A transport plan, walked over in tiles of targets: nothing of size tokens x tokens is ever held.
template <Backend B>
class TransportPlan {
 public:
  static constexpr Index tile_targets = 64;

  TransportPlan(B& be, const Transport& policy, const Features& f)
      : be_(be), policy_(policy), targets_(f.targets), tokens_(f.tokens()), width_(f.sources.width),
        tile_(std::min(tile_targets, tokens_)), falloff_(static_cast<float>(1 / (2 * policy.sigma * policy.sigma))),
        centre_(be, width_), source_rows_(be, tokens_ * width_), target_rows_(be, tile_ * width_),
        logits_(be, tile_ * tokens_), exponentials_(be, tile_ * tokens_), largest_(be, 2), source_squares_(be, tokens_),
        target_squares_(be, tokens_), row_(be, tokens_), column_(be, tile_), sums_(be, tokens_), places_(be, places_of(f)),
        peak_of_(be, tile_), sum_of_(be, tile_) {
    be.each(width_, FeatureCentre{f.sources, f.targets, centre_.data()});
    be.each(tokens_ * width_, CentredRows{f.sources, centre_.data(), source_rows_.data()});
    be.each(tokens_, CentredSquares{f.sources, centre_.data(), source_squares_.data()});
    be.each(tokens_, CentredSquares{f.targets, centre_.data(), target_squares_.data()});
    fill(be, row_.data(), tokens_, 0.0);
    find_largest();
  }

  void columns_only(float* out) {
    walk(true);
    be_.each(tokens_, SumOfSource{sums_.data(), out});
  }

  void rows_then_columns(Index rounds, float* out) {
    const double log_share = -std::log(static_cast<double>(tokens_));
    walk(false);
    for (Index r = 0; r < rounds; ++r) {
      be_.each(tokens_, ScaleSource{sums_.data(), log_share, row_.data()});
      walk(true);
    }
    be_.each(tokens_, SumOfSource{sums_.data(), out});
  }

 private:
  /// Sums over the targets of the plan with the sources' present factors; `scaled`: after a column step.
  void walk(bool scaled) {
    fill(be_, sums_.data(), tokens_, LogSum{-std::numeric_limits<float>::infinity(), 0});
    const double log_share = -std::log(static_cast<double>(tokens_));
    for_each_tile([&](Index first, Index targets) {
      be_.each(targets * tokens_, TransportLogit{places_.data(), largest_.data(), row_.data(), tokens_, first, falloff_,
                                                 policy_.alpha, policy_.beta, policy_.gamma, policy_.epsilon,
                                                 logits_.data()});
      if (scaled) {
        summarise(logits_.data(), targets, peak_of_.data());
        be_.each(targets * tokens_, BelowPeak{logits_.data(), peak_of_.data(), tokens_, exponentials_.data()});
        summarise(exponentials_.data(), targets, sum_of_.data());
        be_.each(targets, ScaleTarget{peak_of_.data(), sum_of_.data(), log_share, column_.data()});
      }
      be_.each(tokens_, AddToSources{logits_.data(), scaled ? column_.data() : nullptr, tokens_, targets, sums_.data()});
    });
  }

  void find_largest() {
    fill(be_, largest_.data(), 2, 0.0f);
    for_each_tile([&](Index first, Index targets) {
      summarise(logits_.data(), targets, peak_of_.data());
      be_.each(1, LargestOfRows{peak_of_.data(), targets, largest_.data()});
      be_.each(targets * tokens_, GridDistance{places_.data(), tokens_, first, falloff_, logits_.data()});
      summarise(logits_.data(), targets, peak_of_.data());
      be_.each(1, LargestOfRows{peak_of_.data(), targets, largest_.data() + 1});
    });
  }

  /// Calls `f(first, targets)` with the distances of their features in the tile.
  template <class F>
  void for_each_tile(F&& f) {
    for (Index first = 0; first < tokens_; first += tile_targets) {
      const Index targets = std::min(tile_targets, tokens_ - first);
      be_.each(targets * width_, CentredRows{targets_.part(first, targets), centre_.data(), target_rows_.data()});
      be_.product({.a = target_rows_.data(), .b = source_rows_.data(), .c = logits_.data(), .m = targets, .n = tokens_,
                   .k = width_, .b_transposed = true});
      be_.each(targets * tokens_, FeatureDistance{source_rows_.data(), target_rows_.data(), source_squares_.data(),
                                                  target_squares_.data() + first, tokens_, width_, policy_.squared,
                                                  logits_.data()});
      f(first, targets);
    }
  }

  void summarise(const float* tile, Index targets, RowSummary* out) {
    std::vector<MaskedRow> rows;
    for (Index t = 0; t < targets; ++t) rows.push_back({.values = tile + t * tokens_, .columns = tokens_});
    be_.reduce(rows, out);
  }

  B& be_;
  Transport policy_;
  ConstTensor targets_;
  Index tokens_, width_, tile_;
  float falloff_;
  Buffer<B, float> centre_, source_rows_, target_rows_, logits_, exponentials_, largest_;
  Buffer<B, double> source_squares_, target_squares_, row_, column_;
  Buffer<B, LogSum> sums_;
  Buffer<B, const FeaturePlace> places_;
  Buffer<B, RowSummary> peak_of_, sum_of_;
};

}  // namespace detail

template <Backend B>
void score(B& be, const Transport& policy, const Observation<B>& seen, Scores out) {
  if (seen.features->tokens() == 0) return;
  detail::TransportPlan<B> plan(be, policy, *seen.features);
  if (policy.plan == TransportPlan::semi_relaxed)
    plan.columns_only(out.data);
  else
    plan.rows_then_columns(policy.rounds, out.data);
}

}  // namespace kvpare

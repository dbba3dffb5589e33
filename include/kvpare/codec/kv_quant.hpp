// KVQuant: codes of a learned codebook, ranges per channel for keys and per token for values, outliers beside them.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "folded.hpp"
#include "outliers.hpp"
#include "unrotated.hpp"

namespace kvpare {

namespace detail {

/// Medians of 2^b equally likely parts of a normal distribution, the largest one 1; the positive half.
template <int bits>
inline constexpr std::array<float, 1> normal_medians{};
template <>
inline constexpr std::array<float, 2> normal_medians<2> = {0.2769936f, 1.0f};
template <>
inline constexpr std::array<float, 4> normal_medians<3> = {0.1025413f, 0.3186037f, 0.578277f, 1.0f};
template <>
inline constexpr std::array<float, 8> normal_medians<4> = {0.0420954f, 0.127341f,  0.2159463f, 0.3109047f,
                                                           0.4168189f, 0.5422091f, 0.7075688f, 1.0f};

}  // namespace detail

/// A codebook of 2^b numbers, ascending: what codes are made with, and what they are read as.
///
/// State    made with [2^b] | read as [2^b]: the two differ by Q-Norm only. Null = quantiles of a normal distribution, as
///          NormalFloat has them, but symmetric and without 0
/// Codes    the entry nearest to x, a tie goes to the lower one. Of equal entries the last one below a number is taken;
///          entries that do not ascend still give some code
/// Reads    entries that are NaN count as 0, infinities as ±2^126
template <int bits>
struct Codebook {
  static_assert(bits >= 2 && bits <= 4, "there are codebooks for 2 to 4 bits");
  static constexpr Index entries = Index{1} << bits, floats = 2 * entries;
  static constexpr auto levels = [] {
    std::array<float, std::size_t{1} << bits> all{};
    for (std::size_t k = 0; k < all.size() / 2; ++k) {
      all[all.size() / 2 + k] = detail::normal_medians<bits>[k];
      all[all.size() / 2 - 1 - k] = -detail::normal_medians<bits>[k];
    }
    return all;
  }();

  static float made_with(const float* state, Index code) {
    return state != nullptr ? detail::as_coded(state[code]) : levels[static_cast<std::size_t>(code)];
  }
  static float read_as(const float* state, Index code) {
    return state != nullptr ? detail::as_coded(state[entries + code]) : levels[static_cast<std::size_t>(code)];
  }
  static void read_all(const float* state, float* to) {
    for (Index k = 0; k < entries; ++k) to[k] = read_as(state, k);
  }

  /// Codes of x[n] through thresholds midway between entries.
  static void nearest(const float* state, const float* x, Index n, std::uint8_t* codes) {
    float middle[entries];
    for (Index k = 0; k + 1 < entries; ++k)
      middle[k] = static_cast<float>(
          (static_cast<double>(made_with(state, k)) + static_cast<double>(made_with(state, k + 1))) / 2);
    for (Index i = 0; i < n; ++i) {
      int code = 0;
      for (Index k = 0; k + 1 < entries; ++k) code += x[i] > middle[k] ? 1 : 0;
      codes[i] = static_cast<std::uint8_t>(code);
    }
  }
};

/// How a codebook and the ranges of channels are learned.
struct KvQuantFit {
  float outside = 0.01f;   // share of a channel's numbers beyond its range, half of it on either side
  Index first_tokens = 1;  // positions before this are left out: attention sinks look like nothing else
  int iterations = 50;     // of k-means, at most
  bool q_norm = false;     // stretch what codes are read as to the data's mean and deviation
};

/// Learns a codebook from numbers in [-1, 1], weighted: one-dimensional k-means.
///
/// Method  Numbers fall into 16384 equal bins, each with its sums; k-means runs over the bins, so that a boundary between
///         clusters is off by 2^-13 at most and centres are exact means. Starts from quantiles; a cluster that loses its last
///         number stays where it is
/// Q-Norm  read as = L (σ1/σ2) + (μ1 - μ2 σ1/σ2), (μ1, σ1) of the numbers, (μ2, σ2) of their entries
/// Skips   NaN, numbers outside of [-1, 1], weights that are not positive
/// Source  KVQuant, sections 3.3 (weights: Fisher information, squared gradients of a calibration run) and 3.5 (Q-Norm)
class CodebookFit {
 public:
  void add(float x, float weight = 1) {
    if (!(x >= -1 && x <= 1) || !(weight > 0) || !(weight <= detail::largest_coded)) return;
    const auto bin = static_cast<std::size_t>(std::min(static_cast<int>((x + 1) * (bins / 2)), bins - 1));
    const double w = static_cast<double>(weight), y = static_cast<double>(x);
    weight_[bin] += w, sum_[bin] += w * y, square_ += w * y * y;
  }

  /// State of a Codebook; the one of the null state where no number was added.
  template <int bits>
  void make_state(const KvQuantFit& fit, float* state) const {
    using Book = Codebook<bits>;
    double centres[Book::entries];
    const double total = sum(weight_);
    if (!(total > 0)) {
      for (Index k = 0; k < Book::entries; ++k) state[k] = state[Book::entries + k] = Book::read_as(nullptr, k);
      return;
    }
    start(total, centres, Book::entries);
    for (int i = 0; i < fit.iterations && move(centres, Book::entries); ++i) {
    }
    double scale = 1, shift = 0;
    if (fit.q_norm) {
      double mean = 0, square = 0;
      each_cluster(centres, Book::entries, [&](Index k, double weight, double) {
        mean += weight * centres[k] / total, square += weight * centres[k] * centres[k] / total;
      });
      const double own_mean = sum(sum_) / total;
      const double own = std::sqrt(std::max(square_ / total - own_mean * own_mean, 0.0));
      const double codes = std::sqrt(std::max(square - mean * mean, 0.0));
      if (codes > 0) scale = own / codes, shift = own_mean - mean * scale;
    }
    for (Index k = 0; k < Book::entries; ++k) {
      state[k] = static_cast<float>(centres[k]);
      state[Book::entries + k] = static_cast<float>(centres[k] * scale + shift);
    }
  }

 private:
  static constexpr int bins = 16384;
  using Sums = std::vector<double>;

  static double sum(const Sums& x) {
    double all = 0;
    for (const double y : x) all += y;
    return all;
  }
  void start(double total, double* centres, Index count) const {
    double before = 0;
    Index k = 0;
    for (std::size_t b = 0; b < weight_.size() && k < count; ++b) {
      if (weight_[b] == 0) continue;
      before += weight_[b];
      for (; k < count && before >= total * (static_cast<double>(k) + 0.5) / static_cast<double>(count); ++k)
        centres[k] = sum_[b] / weight_[b];
    }
    for (; k < count; ++k) centres[k] = k > 0 ? centres[k - 1] : 0.0;  // what rounding of sums has left over
  }
  /// f(cluster, weight, sum) of each cluster that has numbers; of two equally near centres the lower one.
  template <class F>
  void each_cluster(const double* centres, Index count, const F& f) const {
    Index k = 0;
    double weight = 0, all = 0;
    for (std::size_t b = 0; b < weight_.size(); ++b) {
      if (weight_[b] == 0) continue;
      const double x = sum_[b] / weight_[b];
      Index nearest = k;
      while (nearest + 1 < count && x > (centres[nearest] + centres[nearest + 1]) / 2) ++nearest;
      if (nearest != k && weight > 0) f(k, weight, all);
      if (nearest != k) weight = all = 0, k = nearest;
      weight += weight_[b], all += sum_[b];
    }
    if (weight > 0) f(k, weight, all);
  }
  bool move(double* centres, Index count) const {
    bool moved = false;
    std::array<double, 16> next{};
    std::copy_n(centres, count, next.begin());
    each_cluster(centres, count,
                 [&](Index k, double weight, double all) { next[static_cast<std::size_t>(k)] = all / weight; });
    for (Index k = 0; k < count; ++k) {
      moved = moved || next[static_cast<std::size_t>(k)] != centres[k];
      centres[k] = next[static_cast<std::size_t>(k)];
    }
    return moved;
  }

  Sums weight_ = Sums(bins), sum_ = Sums(bins);
  double square_ = 0;
};

/// Rows to learn from, of one head.
struct KvQuantRows {
  const float* rows = nullptr;  // [tokens, width]; NaN are left out
  Index tokens = 0;
  const Position* positions = nullptr;  // [tokens]; null = 0, 1, 2, …
  const float* weights = nullptr;       // [tokens, width], or null = 1

  bool counts(Index token, Index first_tokens) const {
    return (positions != nullptr ? Index{positions[token]} : token) >= first_tokens;
  }
  float weight(Index i) const { return weights != nullptr ? weights[i] : 1.0f; }
};

namespace detail {

/// What a method's numbers say: {outside, first_tokens}, as far as they go.
inline KvQuantFit fit_of(const Measured& m, int bits) {
  KvQuantFit fit{.q_norm = bits == 2};
  if (m.numbers != nullptr && m.number_count > 0 && m.numbers[0] >= 0 && m.numbers[0] < 1) fit.outside = m.numbers[0];
  if (m.numbers != nullptr && m.number_count > 1 && m.numbers[1] >= 0 && m.numbers[1] <= 0x1p30f)
    fit.first_tokens = static_cast<Index>(m.numbers[1]);
  return fit;
}

/// The quantile q of x, which is put in another order: linear between neighbours.
inline float quantile(std::vector<float>& x, double q) {
  const double at = q * static_cast<double>(x.size() - 1);
  const auto low = static_cast<std::ptrdiff_t>(at);
  std::nth_element(x.begin(), x.begin() + low, x.end());
  const float a = x[static_cast<std::size_t>(low)];
  if (low + 1 >= static_cast<std::ptrdiff_t>(x.size())) return a;
  const float b = *std::min_element(x.begin() + low + 1, x.end());
  return static_cast<float>(static_cast<double>(a) +
                            (static_cast<double>(b) - static_cast<double>(a)) * (at - static_cast<double>(low)));
}

}  // namespace detail

/// Codes of a codebook for numbers of about [-1, 1], and nothing else: for ranges of channels to stretch.
///
/// Value     x' = read as[code]
/// Outliers  numbers beyond ±1 (by more than 2^-20, for what ranges round), the per_side furthest of each side; of equal
///           ones the lower channels. Others beyond ±1 saturate
/// Bytes     tile_bytes({T, W}) = T * W * bits / 8
/// Error     half the distance of two entries within them
/// NaN       counts as 0
/// State     a Codebook
template <int bits>
struct NuqCodes : detail::GroupTiles<NuqCodes<bits>, GroupForm{.bits = bits, .table = true, .scale = ScaleType::one}> {
 private:
  static constexpr ShortText text = [] { return ShortText("nuq") << Index{bits}; }();

 public:
  using Book = Codebook<bits>;
  static constexpr std::string_view name = text.view();
  static constexpr bool host_only = true, positive_scales = true;
  static constexpr auto levels = Book::levels;
  static constexpr Index state_floats(Index) { return Book::floats; }
  static void runtime_levels(const float* state, float* to) { Book::read_all(state, to); }
  static float scale_of(GroupBits, const float* = nullptr) { return 1.0f; }
  static float zero_of(GroupBits, const float* = nullptr) { return 0.0f; }
  static float level(std::uint8_t code, const float* state = nullptr) {
    return Book::read_as(state, code & (Book::entries - 1));
  }
  static GroupBits quantize(const float* x, Index stride, Index n, const float* state, std::uint8_t* codes,
                            Index code_stride) {
    float numbers[detail::max_coded_width];
    std::uint8_t own[detail::max_coded_width];
    for (Index i = 0; i < n; ++i) numbers[i] = detail::as_coded(x[i * stride]);
    Book::nearest(state, numbers, n, own);
    for (Index i = 0; i < n; ++i) codes[i * code_stride] = own[i];
    return {};
  }
  static Index pick(Index width, const float*, const float* row, Index per_side, std::uint16_t* channels) {
    constexpr float beyond = 1 + 0x1p-20f;
    std::uint16_t found[2][32];
    Index count[2] = {};
    for (Index c = 0; c < width; ++c) {
      if (!(std::abs(row[c]) > beyond)) continue;
      std::uint16_t* list = found[row[c] > 0];
      Index& have = count[row[c] > 0];
      Index at = have;
      while (at > 0 && std::abs(row[c]) > std::abs(row[list[at - 1]])) --at;
      if (at == per_side) continue;
      if (have < per_side) ++have;
      for (Index k = have - 1; k > at; --k) list[k] = list[k - 1];
      list[at] = static_cast<std::uint16_t>(c);
    }
    std::copy_n(found[0], count[0], channels);
    std::copy_n(found[1], count[1], channels + count[0]);
    return count[0] + count[1];
  }
};

/// Codes of a codebook over the range of a token: its numbers' middle and half their spread.
///
/// Value   x' = range * read as[code] + middle
/// Codes   the entry nearest to (x - middle) / range, both as they are stored
/// Layout  per row:  codes, least significant bit first | range, a half | middle, a half
/// Bytes   tile_bytes({T, W}) = T * (W * bits / 8 + 4)
/// Error   half the distance of two entries times the range, plus 2^-11 of range and middle
/// NaN     counts as 0, infinities as ±2^126; range and middle beyond 65504 are that; a range of 0 decodes to the middle
/// State   a Codebook
template <int bits>
struct NuqRange
    : detail::GroupTiles<NuqRange<bits>, GroupForm{.bits = bits, .table = true, .zero = ZeroType::minimum}> {
 private:
  static constexpr ShortText text = [] { return ShortText("nuq") << Index{bits} << "_range"; }();

 public:
  using Book = Codebook<bits>;
  static constexpr std::string_view name = text.view();
  static constexpr bool host_only = true, positive_scales = true, state_reads_rows = true;
  static constexpr auto levels = Book::levels;
  static constexpr Index state_floats(Index) { return Book::floats; }
  static void runtime_levels(const float* state, float* to) { Book::read_all(state, to); }
  /// The sign, which is never written, counts for nothing.
  static float scale_of(GroupBits b, const float* = nullptr) {
    return detail::half_to_float(static_cast<std::uint16_t>(b.scale & 0x7fffu));
  }
  static float zero_of(GroupBits b, const float* = nullptr) {
    return detail::half_to_float(static_cast<std::uint16_t>(b.zero));
  }
  static float level(std::uint8_t code, const float* state = nullptr) {
    return Book::read_as(state, code & (Book::entries - 1));
  }
  static GroupBits quantize(const float* x, Index stride, Index n, const float* state, std::uint8_t* codes,
                            Index code_stride) {
    float numbers[detail::max_coded_width];
    std::uint8_t own[detail::max_coded_width];
    for (Index i = 0; i < n; ++i) numbers[i] = detail::as_coded(x[i * stride]);
    const auto [low, high] = range(numbers, n);
    const GroupBits b{detail::saturated_half((high - low) / 2), detail::saturated_half((high + low) / 2)};
    const float inverse = detail::inverse_of(scale_of(b)), middle = zero_of(b);
    for (Index i = 0; i < n; ++i) numbers[i] = (numbers[i] - middle) * inverse;
    Book::nearest(state, numbers, n, own);
    for (Index i = 0; i < n; ++i) codes[i * code_stride] = own[i];
    return b;
  }

  /// A codebook from rows, each over its own range.
  static void calibrate(Index width, const KvQuantRows& rows, const KvQuantFit& fit, float* state) {
    CodebookFit book;
    std::vector<float> own(static_cast<std::size_t>(width));
    for (Index t = 0; t < rows.tokens; ++t) {
      if (!rows.counts(t, fit.first_tokens)) continue;
      const float* row = rows.rows + t * width;
      Index n = 0;
      for (Index c = 0; c < width; ++c)
        if (row[c] == row[c]) own[static_cast<std::size_t>(n++)] = detail::as_coded(row[c]);
      const auto [low, high] = range(own.data(), n);
      const float middle = (high + low) / 2, inverse = detail::inverse_of((high - low) / 2);
      if (!(inverse <= detail::largest_coded)) continue;
      for (Index c = 0; c < width; ++c)
        if (row[c] == row[c]) book.add((detail::as_coded(row[c]) - middle) * inverse, rows.weight(t * width + c));
    }
    book.make_state<bits>(fit, state);
  }
  static void make_state(Index width, const Measured& m, float* state) {
    calibrate(width, {.rows = m.rows, .tokens = m.rows != nullptr ? m.tokens : 0, .positions = m.positions},
              detail::fit_of(m, bits), state);
  }

 private:
  struct Range {
    float low = 0, high = 0;
  };
  static Range range(const float* x, Index n) {
    if (n <= 0) return {};
    Range r{x[0], x[0]};
    for (Index i = 1; i < n; ++i) r.low = x[i] < r.low ? x[i] : r.low, r.high = x[i] > r.high ? x[i] : r.high;
    return r;
  }
};

/// KVQuant's keys: a range per channel and a codebook, both learned; what lies outside of the ranges is listed.
///
/// Value     x' = range_c * (read as[code] + delta) + middle_c, delta 0 where a channel is not listed
/// Range     middle_c = (upper + lower) / 2, range_c = (upper - lower) / 2; lower and upper are quantiles of the channel's
///           numbers, half of `outside` on either side
/// Codes     nearest in units of the range. Listed: x < lower or x > upper, the `per_side` furthest of each side, in the same
///           units; deltas too are in these units. Numbers outside of the ranges beyond that many saturate
/// Bytes     tile_bytes({T, W}) = T * (W * bits / 8 + 6 per_side), 8 per_side for W > 256
/// Folds     as ChannelAffine
/// Error     listed: 2^-11 of the distance to the entry. Else half the distance of two entries, times the range. A channel whose
///           learnt range is 0 reads as its middle, whatever comes
/// NaN       counts as 0 where the range is stored: as ChannelAffine
/// State     range [W] | middle [W] | a Codebook; null = ranges 1, middles 0, the Codebook of the null state
/// Learned   by `calibrate` from rows of one's own, with Fisher weights where there are some; by `make_state` from the rows
///           about to be coded (the first tokens left out): prompt-calibrated. Q-Norm for 2 bits. Measured::numbers may say
///           {outside, first tokens}
/// Source    Hooper et al. 2024, "KVQuant", arXiv 2401.18079. There a codebook serves all heads of a layer, and a list all
///           heads of a token, of 1 % of their channels; here each head has its own. Deltas are there floats or halves of
///           numbers, to the entry that codes are made with; here of units, to the one that is read, which is exact with Q-Norm
template <int bits, Index per_side = 1>
struct KvQuantRanges : ChannelAffine<Outliers<NuqCodes<bits>, per_side>> {
 private:
  using Base = ChannelAffine<Outliers<NuqCodes<bits>, per_side>>;
  static constexpr ShortText text = [] { return ShortText("kv_quant_") << Outliers<NuqCodes<bits>, per_side>::name; }();

 public:
  static constexpr std::string_view name = text.view();
  static constexpr bool host_only = true, state_reads_rows = true, needs_query_peak = false, ranges_of_all = false;

  static void calibrate(Index width, const KvQuantRows& rows, const KvQuantFit& fit, float* state) {
    std::vector<float> column;
    for (Index c = 0; c < width; ++c) {
      column.clear();
      for (Index t = 0; t < rows.tokens; ++t) {
        const float x = rows.rows[t * width + c];
        if (x == x && rows.counts(t, fit.first_tokens)) column.push_back(detail::as_coded(x));
      }
      state[c] = 1, state[width + c] = 0;
      if (column.empty()) continue;
      const double side = static_cast<double>(fit.outside) / 2;
      const float upper = detail::quantile(column, 1 - side), lower = detail::quantile(column, side);
      state[c] = (upper - lower) / 2, state[width + c] = (upper + lower) / 2;
    }
    CodebookFit book;
    std::vector<float> row(static_cast<std::size_t>(width));
    for (Index t = 0; t < rows.tokens; ++t) {
      if (!rows.counts(t, fit.first_tokens)) continue;
      std::copy_n(rows.rows + t * width, width, row.begin());
      Base::forward(width, state, row.data());
      for (Index c = 0; c < width; ++c)
        if (state[c] >= detail::least_scale) book.add(row[static_cast<std::size_t>(c)], rows.weight(t * width + c));
    }
    book.make_state<bits>(fit, state + 2 * width);
  }
  static void make_state(Index width, const Measured& m, float* state) {
    calibrate(width, {.rows = m.rows, .tokens = m.rows != nullptr ? m.tokens : 0, .positions = m.positions},
              detail::fit_of(m, bits), state);
  }
};

/// Numbers listed per side and head: `share` of the width on both sides together.
constexpr Index outliers_per_side(Index width, double share = 0.01) {
  const double each = share * static_cast<double>(width) / 2;
  const auto whole = static_cast<Index>(each);
  return static_cast<double>(whole) < each ? whole + 1 : whole;
}

/// KVQuant as its paper has it: keys before RoPE, 1 % of the numbers listed (at width 128: one per side; 2 above 200).
template <int bits, Index per_side = 1>
using KvQuantKeys = Unrotated<KvQuantRanges<bits, per_side>>;
/// The same for keys as attention has them: faster, and ranges of channels hold less well.
template <int bits, Index per_side = 1>
using KvQuantRotatedKeys = KvQuantRanges<bits, per_side>;
/// Values: the range of each token from what is not listed, and a codebook learned from rows.
template <int bits, Index per_side = 1>
using KvQuantValues = Outliers<NuqRange<bits>, per_side>;

static_assert(GroupCodec<NuqCodes<4>> && GroupCodec<NuqRange<3>> && FoldedCodec<KvQuantRanges<2>>);

}  // namespace kvpare

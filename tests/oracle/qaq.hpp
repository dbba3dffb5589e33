// QAQ as its paper tells it, token by token, in doubles; and what one page makes of it: blocks of 16 tokens, a
// capacity.
//
// Decided here where the paper is silent: see `Page`. Numbers are those of one token of one head.
#pragma once

#include <map>
#include <numeric>
#include <optional>

#include "quantisers.hpp"

namespace kvpare::oracle::qaq {

/// σ_V <= σ_X / (√T |S|)
inline double value_sigma(double error, double tokens, double attention) {
  return error / (std::sqrt(tokens) * std::abs(attention));
}
/// σ_K² <= ln(T³ / (T - 1) σ_S² + 1) / Σ q²
inline double key_sigma(double error, double tokens, double norm) {
  return std::sqrt(std::log(tokens * tokens * tokens / (tokens - 1) * error * error + 1) / norm);
}
/// ceil(log2(range / (2√3 σ))), or the released code's ceil(log2(range / (2 √12 σ) + 1)); not clamped.
inline double bits(double range, double sigma, bool reference_code) {
  const double x = reference_code ? range / (2 * std::sqrt(12.0) * sigma) + 1 : range / (2 * std::sqrt(3.0) * sigma);
  return std::ceil(std::log2(x));
}

/// [low, high] in 2^bits cells, decoded to their middles.
struct Cells {
  double step = 0, first = 0;  // first: the middle of cell 0
  int count = 1;
  Cells(double low, double high, int bits)
      : step((high - low) / std::exp2(bits)), first(low + step / 2), count(1 << bits) {}
  /// As two halves keep them; one cell needs no step.
  Cells as_halves() const {
    Cells c = *this;
    c.step = count == 1 ? 0 : to_half(step), c.first = to_half(first);
    return c;
  }
  double steps(double x) const { return step > 0 ? (x - first) / step + 0.5 : 0; }
  int code(double x) const { return static_cast<int>(std::clamp(std::floor(steps(x)), 0.0, count - 1.0)); }
  double value(int code) const { return first + code * step; }
};

/// The channels of the n lowest, then of the n highest numbers; of equal ones the first.
inline std::vector<Index> extremes(const std::vector<double>& row, Index n) {
  std::vector<Index> found;
  for (const double sign : {1.0, -1.0})
    for (Index k = 0; k < n; ++k) {
      Index best = -1;
      for (Index c = 0; c < count_of(row); ++c)
        if (std::find(found.begin(), found.end(), c) == found.end() &&
            (best < 0 || sign * item(row, c) < sign * item(row, best)))
          best = c;
      found.push_back(best);
    }
  return found;
}

struct Settings {
  bool keys = true, reference_code = false;
  int capacity = 3;
  Index outliers = 1;
  double sigma = 0;  // of the keys, or σ_X / √T; 0: no target
  int b_min = 0, b_max = 8;
};

/// One page: what every token asks for, what it is given, and what becomes of its numbers.
///
/// Tokens lie by bits asked for, then by noise (range times attention; unknown attention counts as 1), then by slot.
/// A block of 16 wants what its first token asks for, and is given bits step by step: always to the block with the
/// largest noise / 2^bits among those whose next step fits.
struct Page {
  std::vector<int> asked, given;                 // [token]
  std::vector<int> blocks;                       // bits
  std::vector<Index> order;                      // tokens by place
  std::vector<std::vector<double>> rows;         // decoded
  std::vector<std::vector<double>> from_border;  // how far a number is from the border of a cell, in cells

  Page(const std::vector<std::vector<double>>& x, Index page_tokens,
       const std::vector<std::optional<double>>& attention, const Settings& s) {
    const Index tokens = count_of(x), width = count_of(x.front());
    std::vector<double> low, high, noise;
    std::vector<std::vector<Index>> out;
    for (Index t = 0; t < tokens; ++t) {
      out.push_back(extremes(item(x, t), s.outliers));
      double least = 1e300, most = -1e300;
      for (Index c = 0; c < width; ++c)
        if (std::find(out.back().begin(), out.back().end(), c) == out.back().end())
          least = std::min(least, item(item(x, t), c)), most = std::max(most, item(item(x, t), c));
      low.push_back(least), high.push_back(most);
      const std::optional<double> share = s.keys ? std::optional<double>(1.0) : item(attention, t);
      noise.push_back((most - least) * std::abs(share.value_or(1.0)));
      double b = s.sigma > 0 ? (share ? bits((most - least) * std::abs(*share), s.sigma, s.reference_code) : s.b_max)
                             : (noise.back() > 0 ? s.b_max : s.b_min);
      asked.push_back(static_cast<int>(std::clamp<double>(b, s.b_min, s.b_max)));
    }
    order.resize(static_cast<std::size_t>(tokens));
    std::iota(order.begin(), order.end(), Index{0});
    std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) {
      if (item(asked, a) != item(asked, b)) return item(asked, a) > item(asked, b);
      return item(noise, a) > item(noise, b);
    });

    std::vector<int> sizes = {0, 2, 4, 8};
    if (s.keys && width % 32 == 0) sizes = {0, 1, 2, 3, 4, 5, 8};
    const Index count = page_tokens / 16;
    std::vector<std::size_t> size(static_cast<std::size_t>(count), 0), want(size);
    std::vector<double> worst(static_cast<std::size_t>(count), 0.0);
    for (Index place = 0; place < tokens; ++place) {
      const Index token = item(order, place);
      while (sizes[item(want, place / 16)] < item(asked, token)) ++item(want, place / 16);
      item(worst, place / 16) = std::max(item(worst, place / 16), item(noise, token));
    }
    int used = 0;
    for (bool any = true; any;) {
      any = false;
      Index best = 0;
      for (Index b = 0; b < count; ++b) {
        if (item(size, b) >= item(want, b)) continue;
        if (used + sizes[item(size, b) + 1] - sizes[item(size, b)] > s.capacity * count) continue;
        const auto left = [&](Index i) { return item(worst, i) / std::exp2(sizes[item(size, i)]); };
        if (!any || left(b) > left(best)) best = b;
        any = true;
      }
      if (any) used += sizes[item(size, best) + 1] - sizes[item(size, best)], ++item(size, best);
    }
    for (const std::size_t n : size) blocks.push_back(sizes[n]);

    given.resize(static_cast<std::size_t>(tokens));
    rows.resize(static_cast<std::size_t>(tokens)), from_border.resize(static_cast<std::size_t>(tokens));
    for (Index place = 0; place < tokens; ++place) {
      const Index t = item(order, place);
      item(given, t) = item(blocks, place / 16);
      const Cells cells = Cells(item(low, t), item(high, t), item(given, t)).as_halves();
      for (Index c = 0; c < width; ++c) {
        const double v = item(item(x, t), c), steps = cells.steps(v);
        item(rows, t).push_back(cells.value(cells.code(v)));
        item(from_border, t).push_back(cells.count == 1 ? 0.5 : std::abs(steps - std::round(steps)));
      }
      for (const Index c : item(out, t))
        item(item(rows, t), c) += to_half(item(item(x, t), c) - item(item(rows, t), c));
    }
  }
};

}  // namespace kvpare::oracle::qaq

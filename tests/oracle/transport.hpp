// TopV: visual tokens by their part in a transport plan from a layer's inputs to its outputs.
#pragma once

#include <algorithm>
#include <cmath>

#include "dense.hpp"

namespace kvpare::oracle {

struct TransportCost {
  double alpha = 1, beta = 1, gamma = 0.5, sigma = 10;
  bool squared = false;
};

/// Where a token stands: on which image, and where on its grid.
struct GridPlace {
  Index image = 0, x = 0, y = 0;
};

/// Every number divided by the largest, where that is above 0.
inline void divide_by_largest(std::vector<double>& factor) {
  double largest = 0;
  for (const double f : factor) largest = std::max(largest, f);
  if (largest > 0)
    for (double& f : factor) f /= largest;
}

/// C[i][j] = alpha F + beta G + gamma E. sources and targets [tokens, width]
inline Array2 transport_cost(const Array2& sources, const Array2& targets, const std::vector<GridPlace>& places,
                             const TransportCost& s) {
  const Index n = sources.rows;
  Array2 f(n, n), g(n, n);
  std::vector<double> e;
  for (Index i = 0; i < n; ++i) {
    const GridPlace& from = item(places, i);
    for (Index j = 0; j < n; ++j) {
      double squares = 0;
      for (Index d = 0; d < sources.columns; ++d)
        squares += (sources.at(i, d) - targets.at(j, d)) * (sources.at(i, d) - targets.at(j, d));
      f.at(i, j) = s.squared ? squares : std::sqrt(squares);
      const GridPlace& to = item(places, j);
      const double dx = static_cast<double>(from.x - to.x), dy = static_cast<double>(from.y - to.y);
      g.at(i, j) = from.image != to.image ? 1 : 1 - std::exp(-(dx * dx + dy * dy) / (2 * s.sigma * s.sigma));
    }
    Index left = from.x, right = from.x, top = from.y, bottom = from.y;
    for (const GridPlace& other : places) {
      if (other.image != from.image) continue;
      left = std::min(left, other.x), right = std::max(right, other.x);
      top = std::min(top, other.y), bottom = std::max(bottom, other.y);
    }
    const double dx = static_cast<double>(2 * from.x - left - right) / 2;
    const double dy = static_cast<double>(2 * from.y - top - bottom) / 2;
    e.push_back(std::sqrt(dx * dx + dy * dy));
  }
  divide_by_largest(f.values), divide_by_largest(g.values), divide_by_largest(e);
  Array2 cost(n, n);
  for (Index i = 0; i < n; ++i)
    for (Index j = 0; j < n; ++j)
      cost.at(i, j) = s.alpha * f.at(i, j) + s.beta * g.at(i, j) + s.gamma * item(e, i);
  return cost;
}

inline Array2 plan_kernel(const Array2& cost, double epsilon) {
  Array2 k(cost.rows, cost.columns);
  for (std::size_t c = 0; c < k.values.size(); ++c) k.values[c] = std::exp(-cost.values[c] / epsilon);
  return k;
}

inline void scale_columns(Array2& plan) {
  for (Index j = 0; j < plan.columns; ++j) {
    double sum = 0;
    for (Index i = 0; i < plan.rows; ++i) sum += plan.at(i, j);
    for (Index i = 0; i < plan.rows; ++i) plan.at(i, j) /= sum * static_cast<double>(plan.columns);
  }
}

inline void scale_rows(Array2& plan) {
  for (Index i = 0; i < plan.rows; ++i) {
    double sum = 0;
    for (Index j = 0; j < plan.columns; ++j) sum += plan.at(i, j);
    for (Index j = 0; j < plan.columns; ++j) plan.at(i, j) /= sum * static_cast<double>(plan.rows);
  }
}

inline std::vector<double> row_sums(const Array2& plan) {
  std::vector<double> sums;
  for (Index i = 0; i < plan.rows; ++i) {
    sums.push_back(0);
    for (Index j = 0; j < plan.columns; ++j) sums.back() += plan.at(i, j);
  }
  return sums;
}

/// Only the targets' totals are kept to.
inline std::vector<double> semi_relaxed_importance(const Array2& cost, double epsilon) {
  Array2 plan = plan_kernel(cost, epsilon);
  scale_columns(plan);
  return row_sums(plan);
}

enum class LastStep { columns, rows };

/// Rows, then columns, so many times; or columns, then rows.
inline std::vector<double> balanced_importance(const Array2& cost, double epsilon, Index rounds,
                                               LastStep last = LastStep::columns) {
  Array2 plan = plan_kernel(cost, epsilon);
  for (Index r = 0; r < rounds; ++r) {
    if (last == LastStep::columns) scale_rows(plan);
    scale_columns(plan);
    if (last == LastStep::rows) scale_rows(plan);
  }
  return row_sums(plan);
}

}  // namespace kvpare::oracle

// Expected Attention: what queries distributed like those seen so far would give.
#pragma once

#include <cmath>

#include "rope.hpp"
#include "softmax.hpp"

namespace kvpare::oracle {

struct ExpectedAttentionSettings {
  double scale = 1;        // of q.k
  bool covariance = true;  // or the mean alone
  bool value_norm = true;  // times the length of the value
  double epsilon = 0;      // added before
  // With a future: queries are turned back by the positions of their rows, their distribution forth by the mean of the next ones.
  Index future = 0, next = 0;
  RopeSettings rope = {};
  std::vector<Index> row_positions = {};
};

/// Mean over rows, [width].
inline std::vector<double> mean_vector(const std::vector<std::vector<double>>& rows) {
  std::vector<double> mean(rows.at(0).size(), 0.0);
  for (const auto& row : rows)
    for (Index c = 0; c < count_of(mean); ++c) item(mean, c) += item(row, c) / static_cast<double>(rows.size());
  return mean;
}

/// Covariance over rows, divided by their number, [width, width].
inline Array2 covariance_of(const std::vector<std::vector<double>>& rows) {
  const std::vector<double> mean = mean_vector(rows);
  Array2 sigma(count_of(mean), count_of(mean));
  for (const auto& row : rows)
    for (Index i = 0; i < sigma.rows; ++i)
      for (Index j = 0; j < sigma.columns; ++j)
        sigma.at(i, j) +=
            (item(row, i) - item(mean, i)) * (item(row, j) - item(mean, j)) / static_cast<double>(rows.size());
  return sigma;
}

/// ln E exp(scale q.k) for q ~ N(mean, sigma).
inline double expected_exponent(const std::vector<double>& mean, const Array2& sigma, const std::vector<double>& key,
                                double scale) {
  double x = 0;
  for (Index i = 0; i < count_of(key); ++i) {
    x += scale * item(mean, i) * item(key, i);
    for (Index j = 0; j < count_of(key); ++j) x += scale * scale / 2 * item(key, i) * sigma.at(i, j) * item(key, j);
  }
  return x;
}

/// Scores of the tokens of one kv head, sinks left out by the caller everywhere.
/// Shapes  queries [query heads of the group][rows][width], keys, values [tokens][width] -> [tokens]
/// Source  Expected Attention, arXiv 2510.00636; queries as they are, or with a future as the paper has them
inline std::vector<double> expected_attention_of_head(const std::vector<std::vector<std::vector<double>>>& queries,
                                                      const std::vector<std::vector<double>>& keys,
                                                      const std::vector<std::vector<double>>& values,
                                                      const ExpectedAttentionSettings& settings) {
  require(keys.size() == values.size(), "oracle: a key and a value for each token");
  std::vector<double> scores(keys.size(), 0.0);
  for (auto head : queries) {
    const Index width = count_of(head.at(0));
    for (Index r = 0; settings.future > 0 && r < count_of(head); ++r)
      head[static_cast<std::size_t>(r)] =
          times(transposed(rotation_matrix(settings.rope, width, static_cast<double>(item(settings.row_positions, r)))),
                item(head, r));
    std::vector<double> mean = mean_vector(head);
    Array2 sigma = settings.covariance ? covariance_of(head) : Array2(width, width);
    if (settings.future > 0) {
      const Array2 to_come = mean_rotation(settings.rope, width, settings.next, settings.future);
      mean = times(to_come, mean), sigma = times(times(to_come, sigma), transposed(to_come));
    }
    std::vector<double> exponents;
    for (const auto& key : keys) exponents.push_back(expected_exponent(mean, sigma, key, settings.scale));
    const std::vector<double> p = softmax(exponents);
    for (Index j = 0; j < count_of(scores); ++j) item(scores, j) += item(p, j) / static_cast<double>(queries.size());
  }
  for (Index j = 0; settings.value_norm && j < count_of(scores); ++j) {
    double squares = 0;
    for (const double v : item(values, j)) squares += v * v;
    item(scores, j) = (item(scores, j) + settings.epsilon) * std::sqrt(squares);
  }
  return scores;
}

}  // namespace kvpare::oracle

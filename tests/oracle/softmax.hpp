// Softmax and its logarithmic sum. A logit of -infinity stands for "not there".
#pragma once

#include <cmath>
#include <limits>

#include "dense.hpp"

namespace kvpare::oracle {

inline constexpr double infinity = std::numeric_limits<double>::infinity();

/// ln sum_j exp(x_j), exact for large |x|; nothing there gives -infinity, any NaN gives NaN.
inline double log_sum_exp(const std::vector<double>& x) {
  double largest = -infinity;
  bool nan = false;
  for (double v : x) {
    if (std::isnan(v)) nan = true;
    if (v > largest) largest = v;
  }
  if (nan) return std::numeric_limits<double>::quiet_NaN();
  if (std::isinf(largest)) return largest;
  double sum = 0;
  for (double v : x) sum += std::exp(v - largest);
  return largest + std::log(sum);
}

/// p_j = exp(x_j - lse); what is not there gets 0, also when lse is -infinity.
inline std::vector<double> softmax_given(const std::vector<double>& x, double lse) {
  std::vector<double> p;
  for (double v : x) p.push_back(v == -infinity ? 0.0 : std::exp(v - lse));
  return p;
}

/// p_j = exp(x_j) / sum_i exp(x_i).
inline std::vector<double> softmax(const std::vector<double>& x) { return softmax_given(x, log_sum_exp(x)); }

/// One part of an attention that was split over its keys.
struct AttentionPart {
  std::vector<double> out;  // [value_width], softmax over this part alone
  double lse = -infinity;   // natural log
};

/// out = sum_i exp(lse_i - lse) out_i, lse = ln sum_i exp(lse_i); nothing seen gives zeros and -infinity.
inline AttentionPart merge_parts(const std::vector<AttentionPart>& parts) {
  AttentionPart all;
  std::vector<double> lses;
  for (const auto& part : parts) lses.push_back(part.lse);
  all.lse = log_sum_exp(lses);
  const std::vector<double> weight = softmax_given(lses, all.lse);
  if (!parts.empty()) all.out.assign(parts.front().out.size(), 0.0);
  for (Index i = 0; i < count_of(parts); ++i)
    if (item(lses, i) != -infinity)
      for (Index d = 0; d < count_of(all.out); ++d) item(all.out, d) += item(weight, i) * item(item(parts, i).out, d);
  return all;
}

}  // namespace kvpare::oracle

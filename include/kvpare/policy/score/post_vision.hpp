// VL-Cache's importance: attention from the text after the image, which also says how dense a layer is.
#pragma once

#include <algorithm>
#include <numeric>
#include <string_view>
#include <tuple>
#include <vector>

#include "../contracts.hpp"

namespace kvpare {

/// Scores all tokens, visual and text alike, by the attention they get from the rows after the last visual token.
///
/// Formula  score[h, j] = sum over these rows of softmax(q_r K^T)[j], mean over the query heads of kv head h
///          density     = mean over query heads of |{ (r, j) : A[r, j] >= p * max_j A[r, j] }| / |{ (r, j) : r sees j }|
///          which is 1 - sparsity: what the budget `density` follows
/// Shapes   queries of those rows [rows, q_heads, key_dim], keys through pages -> scores [kv_heads, columns], one density
/// Falls    back to the newest `fallback` rows where no row follows an image, or there is none
/// Ties     an entry equal to its threshold counts. A NaN logit makes its row NaN: no entry of it counts
/// Cost     those rows over all keys; nothing is stored per entry
/// Source   VL-Cache (Tu et al., arXiv 2410.23317, ICLR 2025), sections 4.1 to 4.3: post-vision attention, ThresholdFilter with
///          p = 1 %. Its speed experiment looks at the last 50 rows only: max_rows = 50
struct PostVision {
  static constexpr std::string_view name = "post_vision";
  static constexpr bool measures_density = true;

  double p = 0.01;      // share of its row's largest entry from which an entry counts
  Index max_rows = 0;   // newest so many of the rows after the image; 0 = all
  Index fallback = 50;  // newest rows, where none follows an image

  static constexpr auto fields() {
    return std::tuple{Field<PostVision, double>{"p", &PostVision::p, 0.0, 1.0,
                                                "share of its row's largest entry from which an entry counts"},
                      Field<PostVision, Index>{"max_rows", &PostVision::max_rows, 0, 1 << 20,
                                               "newest rows after the image that are looked at, 0 = all"},
                      Field<PostVision, Index>{"fallback", &PostVision::fallback, 1, 1 << 20,
                                               "newest rows looked at where none follows an image"}};
  }
  constexpr Reads reads() const { return {.rows = Reads::Rows::after_visual, .count = fallback}; }
  friend bool operator==(const PostVision&, const PostVision&) = default;
};

namespace detail {

struct DensityOfLayer {
  const Index* near_peak;  // [rows, q_heads]
  const double* entries;   // [kv_heads] entries that a query head of it has
  Index rows, q_heads, group;
  float* density;
  KVPARE_HD void operator()(Index) const {
    double sum = 0;
    for (Index q = 0; q < q_heads; ++q) {
      Index count = 0;
      for (Index r = 0; r < rows; ++r) count += near_peak[r * q_heads + q];
      if (entries[q / group] > 0) sum += static_cast<double>(count) / entries[q / group];
    }
    *density = static_cast<float>(sum / static_cast<double>(q_heads));
  }
};

}  // namespace detail

template <Backend B>
void score(B& be, const PostVision& policy, const Observation<B>& all, Scores out) {
  fill(be, out.data, out.heads * out.columns, 0.0f);
  const Position image = last_visual(*all.columns);
  Index after = 0;
  if (image >= 0)
    after = all.row_positions.end() - std::upper_bound(all.row_positions.begin(), all.row_positions.end(), image);
  if (policy.max_rows > 0) after = std::min(after, policy.max_rows);
  if (after == 0) after = std::min(all.rows(), policy.fallback);
  if (after == 0) return;
  const Observation<B> seen = newest_rows(all, after);

  const ObservedKeys<B> keys(be, seen);
  const Buffer<B, Index> near_peak(be, seen.rows() * seen.shape->q_heads);
  fill(be, near_peak.data(), near_peak.size(), Index{0});
  auto mass = keys.attention(seen);
  mass.out = out.data;
  mass.peak_share = static_cast<float>(policy.p);
  mass.row_near_peak = near_peak.data();
  be.attention_mass(mass);
  if (out.density == nullptr) return;
  std::vector<double> entries;
  for (Index h = 0; h < out.heads; ++h) {
    if (h > 0 && seen.columns->aligned) {
      entries.push_back(entries[0]);
    } else {
      const std::vector<Index> of_rows = tokens_seen(seen, h);
      entries.push_back(static_cast<double>(std::accumulate(of_rows.begin(), of_rows.end(), Index{0})));
    }
  }
  const Buffer<B, double> of_heads(be, entries);
  be.each(1, detail::DensityOfLayer{near_peak.data(), of_heads.data(), seen.rows(), seen.shape->q_heads,
                                    seen.shape->group(), out.density});
}

}  // namespace kvpare

// ZipVL's choice: as many tokens as a share of the attention takes, layer by layer.
#pragma once

#include <algorithm>
#include <string_view>
#include <tuple>
#include <vector>

#include "../../core/random.hpp"
#include "../contracts.hpp"

namespace kvpare {

/// Finds the smallest number of tokens that have a share tau of a layer's attention, and which these are by a score that does
/// not favour old tokens. Tokens that are in score above 0, the others below: for selectors with `only_positive`.
///
/// Formula  a[j] = sum over probe rows of softmax(q_r K^T)[j], mean over query heads;  seen[j] = probe rows that see j
///          p = min { p : the p largest a sum to >= tau * sum(a) };  s[j] = a[j] / seen[j];  T = top-p by s
///          score = 3 for the tokens of the newest `recent` rows, 1 + s in T, s - 2 elsewhere; all heads alike
///          Probes: the newest `recent` rows and `random` of the earlier ones, drawn by seed and position
/// Shapes   every query row [rows, q_heads, key_dim], keys through pages -> scores [kv_heads, columns]
/// Ties     of equal s the lower column is in T. Sums are compared with a tolerance of 1e-6 of the whole. A NaN logit makes
///          its probe, and so all scores it sees, NaN: in no set
/// Cost     the probe rows over all keys, one sort and one selection per layer. Under chunked prefill all rows are kept
/// Source   ZipVL (He et al., arXiv 2410.08584), section 3. Ours: 64 + 64 probes and the mean over heads, which the paper
///          leaves open; the newest rows' own tokens always are in T, so that the next token's row has its attention.
///          What is not in T is dropped, as in its second version; with a precision for the rest it is quantised, as in the
///          first
struct DynamicShare {
  static constexpr std::string_view name = "dynamic_share";

  double tau = 0.975;  // share of the attention that stays
  Index recent = 64;   // newest query rows that are probes
  Index random = 64;   // earlier rows that are
  Index seed = 0;      // of these

  static constexpr auto fields() {
    return std::tuple{
        Field<DynamicShare, double>{"tau", &DynamicShare::tau, 0.0, 1.0, "share of a layer's attention that stays"},
        Field<DynamicShare, Index>{"recent", &DynamicShare::recent, 1, 1 << 20, "newest query rows that are probes"},
        Field<DynamicShare, Index>{"random", &DynamicShare::random, 0, 1 << 20, "earlier query rows that are probes"},
        Field<DynamicShare, Index>{"seed", &DynamicShare::seed, 0, Index{1} << 40, "of the draw of earlier rows"}};
  }
  constexpr Reads reads() const { return {.rows = Reads::Rows::all}; }
  friend bool operator==(const DynamicShare&, const DynamicShare&) = default;
};

namespace detail {

/// How many of the best have the share.
struct CountOfShare {
  const double* running_sum;
  const Index* count;
  double tau;
  Index* p;
  KVPARE_HD void operator()(Index) const {
    *p = 0;
    if (*count == 0) return;
    const double whole = running_sum[*count - 1], wanted = tau * whole - 1e-6 * whole;
    while (*p + 1 < *count && running_sum[*p] < wanted) ++*p;
    ++*p;
  }
};

struct PerRowThatSees {
  const float *attention, *seen;  // [columns], [kv_heads, columns]
  Index heads, columns;
  float* out;
  KVPARE_HD void operator()(Index c) const {
    float rows = 0;
    for (Index h = 0; h < heads; ++h) rows = seen[h * columns + c] > rows ? seen[h * columns + c] : rows;
    out[c] = rows > 0 ? attention[c] / rows : attention[c];
  }
};

struct SignedByMembership {
  const float* score;             // [columns]
  const std::uint64_t* members;   // bitmap
  const std::uint8_t* is_recent;  // [columns]
  Index columns, word_tokens;
  float* out;
  KVPARE_HD void operator()(Index i) const {
    const Index c = i % columns;
    const bool in = has_column(members, c, word_tokens);
    out[i] = is_recent[c] != 0 ? 3.0f : in ? 1.0f + score[c] : score[c] - 2.0f;
  }
};

}  // namespace detail

template <Backend B>
void score(B& be, const DynamicShare& policy, const Observation<B>& seen, Scores out) {
  const Columns& columns = *seen.columns;
  const Index n = columns.count;
  fill(be, out.data, out.heads * n, 0.0f);
  if (seen.rows() == 0) return;

  // Probes, ascending.
  const Index first_recent = std::max<Index>(0, seen.rows() - policy.recent);
  std::vector<Index> probes;
  for (Index r = 0; r < first_recent; ++r) probes.push_back(r);
  if (policy.random < first_recent) {
    const auto draw = [&](Index r) {
      return random_bits(static_cast<std::uint64_t>(policy.seed), seen.layer,
                         seen.row_positions[static_cast<std::size_t>(r)]);
    };
    std::nth_element(probes.begin(), probes.begin() + policy.random, probes.end(),
                     [&](Index a, Index b) { return draw(a) < draw(b); });
    probes.resize(static_cast<std::size_t>(policy.random));
    std::sort(probes.begin(), probes.end());
  }
  std::vector<std::uint8_t> recent(static_cast<std::size_t>(n), 0);
  for (Index r = first_recent; r < seen.rows(); ++r) {
    probes.push_back(r);
    recent[static_cast<std::size_t>(seen.row_columns[static_cast<std::size_t>(r)])] = 1;
  }
  const Index probe_count = static_cast<Index>(probes.size());
  const Buffer<B, Index> probe_rows(be, probes), probe_total(be, std::span(&probe_count, 1));

  const Buffer<B, float> attention(be, n), seen_by(be, out.heads * n), normalised(be, n);
  fill(be, attention.data(), n, 0.0f);
  fill(be, seen_by.data(), out.heads * n, 0.0f);
  const ObservedKeys<B> keys(be, seen);
  auto mass = keys.attention(seen);
  mass.row_list = probe_rows.data(), mass.row_count = probe_total.data();
  mass.heads = HeadGroups::layer;
  mass.out = attention.data(), mass.seen = seen_by.data();
  be.attention_mass(mass);

  const auto live = columns.live_in_any();
  const Buffer<B, std::uint64_t> live_bits(be, std::span<const std::uint64_t>(live)), members(be, columns.words());
  const Buffer<B, Index> order(be, n), count(be, 1), p(be, 1);
  const Buffer<B, double> sums(be, n);
  const SortRow sorted{
      {attention.data(), live_bits.data(), n, columns.word_tokens}, order.data(), nullptr, sums.data(), count.data()};
  be.sort_rows(std::span(&sorted, 1));
  be.each(1, detail::CountOfShare{sums.data(), count.data(), policy.tau, p.data()});
  be.each(n, detail::PerRowThatSees{attention.data(), seen_by.data(), out.heads, n, normalised.data()});
  fill(be, members.data(), members.size(), std::uint64_t{0});
  const TopRow top{normalised.data(), live_bits.data(), p.data(), members.data(), nullptr, n, columns.word_tokens};
  be.select_top(std::span(&top, 1));
  const Buffer<B, std::uint8_t> recent_flags(be, recent);
  be.each(out.heads * n, detail::SignedByMembership{normalised.data(), members.data(), recent_flags.data(), n,
                                                    columns.word_tokens, out.data});
}

}  // namespace kvpare

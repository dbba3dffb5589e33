// SnapKV's importance: attention from the last rows of the prompt, smoothed over neighbours.
#pragma once

#include <string_view>
#include <tuple>
#include <vector>

#include "lengths.hpp"

namespace kvpare {

enum class Pooling : std::uint8_t { avg, max };
inline constexpr std::string_view choices(Pooling*) { return "avg|max"; }

/// Scores a token by the attention it gets from the last `window` query rows.
///
/// Formula  vote[h, j] = sum over the window's rows of softmax(q_r K^T)[j], mean over the query heads of kv head h
///          score = pooled vote: average (divided by `pool` at the borders too) or maximum over `pool` neighbours,
///          zero beyond the candidates; the window's own tokens rank first, newest first, and do not vote. Neighbours are
///          tokens that the head still holds, wherever their pages put them. With values = a a pooled vote counts
///          exp(a z) times: z = (ln ||v|| - mean) / deviation over the candidates that the head holds, so that what an
///          attended token adds to the output counts, not that it is attended to alone. A length of 0 counts as 1e-15, a
///          deviation as at least 0.001 (lengths that rounding alone tells apart), a z as at most 8 either way
/// Shapes   the window's queries [window, q_heads, key_dim], keys through pages -> scores [kv_heads, columns]
/// Ties     none made here; a NaN logit makes its row, and so every vote, NaN; a NaN value the score of its token
/// Cost     `window` rows over all keys, and with `values` all values once; scratch that of `attention_mass` and one more row
///          per head, two with `values`
/// Source   SnapKV (Li et al. 2024, arXiv 2404.14469), section 3. Ours: selection per kv head with the group's mean (the
///          released code repeats keys per query head and chooses for each, which a cache of kv heads cannot hold: there
///          is no mode for it), and rows may be confined to classes (`rows=text`).
///          `values` is ours; that attention alone misjudges tokens with short values is the finding of VATP (Guo et al.
///          2024, arXiv 2406.12335), which multiplies by ||v||_1
struct ObservationWindow {
  static constexpr std::string_view name = "observation_window";

  Index window = 32;  // query rows looked at, from the end
  Index pool = 5;     // neighbours joined, odd; 1 = none
  Pooling pooling = Pooling::avg;
  ClassSet rows = all_tokens;  // only rows of these classes count
  double values = 0;           // a: how much the length of a token's value counts

  static constexpr auto fields() {
    return std::tuple{Field<ObservationWindow, Index>{"window", &ObservationWindow::window, 1, 1 << 20,
                                                      "query rows looked at, from the end"},
                      Field<ObservationWindow, Index>{"pool", &ObservationWindow::pool, 1, 63,
                                                      "neighbouring tokens joined, odd; 1 = none"},
                      Choice{"pooling", &ObservationWindow::pooling, "how neighbours are joined"},
                      Choice{"rows", &ObservationWindow::rows, "classes whose query rows count"},
                      Field<ObservationWindow, double>{"values", &ObservationWindow::values, 0.0, 2.0,
                                                       "how much the length of a token's value counts"}};
  }
  void check() const { require(pool % 2 == 1, name, ".pool = ", pool, ", must be odd"); }
  constexpr Reads reads() const { return {.rows = Reads::Rows::last, .count = window, .of = rows}; }
  friend bool operator==(const ObservationWindow&, const ObservationWindow&) = default;
};

namespace detail {

struct PoolVotes {
  const float* votes;            // [heads, columns]
  const std::uint64_t* voters;   // bitmap per head of the columns whose votes count
  const std::uint64_t* present;  // bitmap per head of the tokens it holds: the others are nobody's neighbours
  const float* own;              // [columns] 0, or the rank of a window token
  Index columns, words, word_tokens, pool;
  bool take_max;
  float* out;

  KVPARE_HD void operator()(Index i) const {
    const Index head = i / columns, column = i % columns;
    if (own[column] > 0) {
      out[i] = own[column];
      return;
    }
    const std::uint64_t* held = present + head * words;
    Index begin = column;
    for (Index before = pool / 2; begin > 0 && before > 0;) before -= has_column(held, --begin, word_tokens);
    float joined = 0;
    for (Index c = begin, after = pool / 2; c < columns; ++c) {
      if (!has_column(held, c, word_tokens)) continue;
      if (c > column && after-- == 0) break;
      if (!has_column(voters + head * words, c, word_tokens)) continue;
      const float v = votes[head * columns + c];
      joined = take_max ? (v > joined || v != v ? v : joined) : joined + v;
    }
    out[i] = take_max ? joined : joined / static_cast<float>(pool);
  }
};

struct LogLength {
  KVPARE_HD static float of(float squares) {
    return 0.5f * std::log(squares > 1e-30f || squares != squares ? squares : 1e-30f);
  }
};

/// A pooled vote counts more the longer its token's value is; the window's own tokens stay as they are.
struct RaiseByLength {
  const float* log_lengths;     // [heads, columns]
  const RowSummary* summaries;  // [heads] of the candidates' log lengths
  const float* own;             // [columns] as in PoolVotes
  Index columns;
  double values;
  float* out;
  KVPARE_HD void operator()(Index i) const {
    const RowSummary& all = summaries[i / columns];
    if (own[i % columns] > 0 || all.count == 0) return;
    const double deviation = std::sqrt(all.moment2 / static_cast<double>(all.count));
    double z = (static_cast<double>(log_lengths[i]) - all.mean) / (deviation > 1e-3 ? deviation : 1e-3);
    z = z > 8 ? 8 : z < -8 ? -8 : z;
    out[i] = static_cast<float>(static_cast<double>(out[i]) * std::exp(values * z));
  }
};

}  // namespace detail

template <Backend B>
void score(B& be, const ObservationWindow& policy, const Observation<B>& seen, Scores out) {
  const Columns& columns = *seen.columns;
  const Index heads = out.heads, n = columns.count, words = columns.words();
  fill(be, out.data, heads * n, 0.0f);
  if (seen.rows() == 0) return;

  Buffer<B, float> votes(be, heads * n);
  fill(be, votes.data(), heads * n, 0.0f);
  const ObservedKeys<B> keys(be, seen);
  auto mass = keys.attention(seen);
  mass.out = votes.data();
  be.attention_mass(mass);

  // The window's tokens rank above all votes, the newest highest.
  std::vector<float> own(static_cast<std::size_t>(n), 0.0f);
  for (Index r = 0; r < seen.rows(); ++r)
    own[static_cast<std::size_t>(seen.row_columns[static_cast<std::size_t>(r)])] =
        score_of_rank(2 * seen.rows() + r);
  std::vector<std::uint64_t> voters, held;
  const std::vector<std::uint64_t> candidates = columns.of_class(seen.among);
  for (Index h = 0; h < heads; ++h)
    for (Index w = 0; w < words; ++w) {
      held.push_back(columns.live_in(h)[static_cast<std::size_t>(w)]);
      voters.push_back(candidates[static_cast<std::size_t>(w)] & held.back());
    }
  for (const std::int32_t c : seen.row_columns)
    for (Index h = 0; h < heads; ++h)
      voters[static_cast<std::size_t>(h * words + c / columns.word_tokens)] &=
          ~(std::uint64_t{1} << (c % columns.word_tokens));
  const Buffer<B, float> own_rank(be, own);
  const Buffer<B, std::uint64_t> voter_bits(be, voters), present(be, held);
  be.each(heads * n, detail::PoolVotes{votes.data(), voter_bits.data(), present.data(), own_rank.data(), n, words,
                                       columns.word_tokens, policy.pool, policy.pooling == Pooling::max, out.data});
  if (policy.values == 0) return;
  const Buffer<B, float> lengths(be, heads * n);
  detail::write_lengths<detail::LogLength>(be, Side::values, seen, Scores{lengths.data(), heads, n});
  std::vector<Buffer<B, std::uint64_t>> candidate_bits;
  std::vector<MaskedRow> of_candidates;
  for (Index h = 0; h < heads; ++h) {
    const auto first = voters.begin() + h * words;
    candidate_bits.emplace_back(be, std::span<const std::uint64_t>(first, first + words));
    of_candidates.push_back({lengths.data() + h * n, candidate_bits.back().data(), n, columns.word_tokens});
  }
  const Buffer<B, RowSummary> summaries(be, heads);
  be.reduce(of_candidates, summaries.data());
  be.each(heads * n,
          detail::RaiseByLength{lengths.data(), summaries.data(), own_rank.data(), n, policy.values, out.data});
}

}  // namespace kvpare

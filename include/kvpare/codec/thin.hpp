// A codec around another one that keeps only some channels of a head: those that matter to recent queries.
#pragma once

#include "folded.hpp"

namespace kvpare {

namespace detail {

/// A channel number that a state says, whatever floats it holds: within [0, width).
constexpr KVPARE_HD Index channel_in(float number, Index width) {
  if (!(number > 0)) return 0;
  return number < static_cast<float>(width - 1) ? static_cast<Index>(number) : width - 1;
}

/// Whether channel c is among the `most` largest scores; of equal ones the lower channels are.
template <class Score>
KVPARE_HD bool among_largest(Index width, Index most, Index c, const Score& score) {
  const auto mine = score(c);
  Index before = 0;
  for (Index j = 0; j < width; ++j) {
    const auto other = score(j);
    before += other > mine || (other == mine && j < c) ? 1 : 0;
  }
  return before < most;
}

}  // namespace detail

/// Channels that recent queries hardly look at are left out; Inner stores the others, next to each other.
///
/// Value    x'[kept[i]] = y'[i] of what Inner stores; 0 for every other channel
/// Keeps    inner_width(W) = W - floor(percent / 100 * W), rounded up to a multiple of `align`, at most W
/// Choice   score[c] = (sum of q_c^2 over the newest observed rows and the heads of the group) * (sum of k_c^2 over all tokens);
///          the lowest go, of equal ones the higher channel. Without queries by the keys alone. A NaN counts as 0.
/// Folds    keys: q[kept]·y', so a logit's scale stays that of the original width; values: Σ p y' goes to its channels
/// Bytes    tile_bytes({T, W}) = Inner's of {T, inner_width(W)}, nothing beside: which channels are kept is in the state
/// Fits     where Inner fits inner_width(W): codes of 4 bits along channels want it even, say by `align`
/// Error    Inner's; and all of x in a channel that is left out
/// State    own: kept channels [inner_width(W)], ascending, as floats; null = the first ones. Other floats count as the nearest
///          channel; what does not ascend then decodes to some floats.
/// NaN      as Inner; in a channel that is left out it is never seen
/// Source   Xu et al. 2024, "ThinK: Thinner Key Cache by Query-Driven Pruning", arXiv 2407.21018. There a head's mask is made
///          once from the prompt (`align` 1) and the newest 32 keys stay whole: the method's raw tail. `align` is ours: loops
///          over codes want whole vectors of channels.
template <Codec InnerCodec, int percent, Index align = 1>
struct Thin : detail::Around<Thin<InnerCodec, percent, align>, InnerCodec> {
  static_assert(percent >= 0 && percent < 100, "percent of the channels that go: 0 to 99");
  static_assert(align >= 1, "kept channels are a multiple of align");

 private:
  static constexpr ShortText text = [] {
    ShortText t("thin");
    t << Index{percent};
    if (align > 1) t << "a" << align;
    return t << "_" << InnerCodec::name;
  }();

 public:
  static constexpr std::string_view name = text.view();
  static constexpr bool host_only = true;  // kernels take it that Inner is as wide as the head
  static constexpr KVPARE_HD Index inner_width(Index width) {
    const Index kept = round_up(width - width * percent / 100, align);
    return kept < width ? kept : width;
  }
  static constexpr KVPARE_HD Index own_state_floats(Index width) { return inner_width(width); }

  static constexpr bool needs_query_window = true, ranges_of_all = true;
  static KVPARE_HD void make_state(Index width, const Measured& m,
                                   float* state) requires(kvpare::state_floats<InnerCodec>(1) == 0) {
    const auto score = [&m](Index c) {
      const double q = m.query_squares != nullptr ? static_cast<double>(m.query_squares[c]) : 1.0;
      const double k = m.sum_squares != nullptr ? static_cast<double>(m.sum_squares[c]) : 0.0;
      const double product = q * k;
      return product > 0 ? product : 0.0;
    };
    const Index most = inner_width(width);
    for (Index c = 0, kept = 0; c < width; ++c)
      if (detail::among_largest(width, most, c, score)) state[kept++] = static_cast<float>(c);
  }

  static KVPARE_HD void forward(Index width, const float* state, float* x) {
    if (state == nullptr) return;
    const Index kept = inner_width(width);
    for (Index i = 0; i < kept; ++i) x[i] = x[detail::channel_in(state[i], width)];  // never in front of i
  }
  static KVPARE_HD void backward(Index width, const float* state, float* x) {
    Index kept = inner_width(width);
    for (Index c = width; c-- > 0;) {
      const bool here = kept > 0 && (state == nullptr ? kept - 1 : detail::channel_in(state[kept - 1], width)) == c;
      x[c] = here ? x[--kept] : 0.0f;
    }
  }
  static KVPARE_HD float fold_query(Index width, const float* state, float* q) {
    forward(width, state, q);
    return 0.0f;
  }
  static KVPARE_HD void fold_output(Index width, const float* state, float, float* out) { backward(width, state, out); }
};

/// KIVI around ThinK, as the authors stack them: channels go first, then the rest is coded along tokens.
template <int bits, int percent, Index align = 16>
using ThinKivi = Thin<KiviKeys<bits>, percent, align>;

static_assert(FoldedCodec<Thin<Int4, 50>> && MakesState<Thin<Int4, 50>>);
static_assert(Thin<Int4, 40>::inner_width(128) == 77 && Thin<Int4, 40, 8>::inner_width(128) == 80);

}  // namespace kvpare

// The selector: the best of one class of tokens, the rest untouched.
#pragma once

#include <string_view>
#include <tuple>

#include "../contracts.hpp"

namespace kvpare {

/// Who chooses: each kv head for itself, from the same budget; all heads of a layer together, by their mean score; or each
/// for itself, from a budget that the heads of a layer share.
enum class SelectHeads : std::uint8_t { kv, layer, shared };
inline constexpr std::string_view choices(SelectHeads*) { return "kv|layer|shared"; }

/// What stays or goes: each token for itself, or a page of a head's list with all that it holds.
enum class Granularity : std::uint8_t { token, page };
inline constexpr std::string_view choices(Granularity*) { return "token|page"; }

/// Where representatives are counted from (KVCrush): a signature of one bit per head, or per slot of a page.
enum class Anchor : std::uint8_t { alternating, random, zeros, ones, mean };
inline constexpr std::string_view choices(Anchor*) { return "alternating|random|zeros|ones|mean"; }
/// A token's bit of a head: is its score in the upper half of the head's, or among those that its budget would keep?
enum class Signature : std::uint8_t { half, kept };
inline constexpr std::string_view choices(Signature*) { return "half|kept"; }
/// How representatives are taken of tokens in order of distance: index i (n - 1) / (b - 1), or i floor(n / b).
enum class Spacing : std::uint8_t { even, step };
inline constexpr std::string_view choices(Spacing*) { return "even|step"; }

/// What becomes of tokens that go: nothing, or part of the nearest that stays.
enum class MergeInto : std::uint8_t { none, nearest };
inline constexpr std::string_view choices(MergeInto*) { return "none|nearest"; }

/// Keeps, per kv head, the `k` best-scored tokens among some classes; everything else stays as it is.
///
/// The budget counts all tokens of those classes. Protected ones take their part of it first (and stay even if there are
/// more of them than the budget allows), then the newest `recent_share` of what is left, then the best by score.
/// Tokens that have no score yet (appended after the last observation) count as protected, and so do the `first` oldest and
/// the `last` newest of those classes.
/// Rules    with only_positive, tokens whose score is not above 0 go even where the budget has room: the way of methods
///          whose scorer decides by a rule of its own (ZipVL); the budget is then a bound
/// Shared   with heads = shared a head's budget is B_h = c_h (1 - floor) + B floor, apportioned so that a layer's budgets
///          sum to what they would be if they were even: B is the even budget, c_h how many of the layer's best heads * B
///          scores are head h's. Ties there go to the lower head, and between equal remainders as well. Heads then differ
///          in length, and their pages are freed. Ada-KV (Feng et al. 2024, arXiv 2407.11550), algorithm 1; the released
///          code rounds each B_h for itself and may miss the sum. `recent_share` is of each head's own B_h
/// Chunks   with chunk = c, c neighbouring candidates have the mean of their scores, so that they stay or go together; where
///          the budget ends within a chunk, its first tokens stay. ChunkKV (Liu et al. 2025, arXiv 2502.00299)
/// Stand-ins  with represent = s, floor(s * budget) of it are tokens that stand for those that go. A token's signature has a
///          bit per kv head; what is not among the best is sorted by Hamming distance to the anchor, ties to the lower
///          position, and taken evenly spaced. KVCrush (Jha et al. 2025, arXiv 2503.00022), at token level: any method with
///          it is "KVCrush on that method". The mean anchor has a head's bit where more than half of the tokens have it, and
///          alternates where just half do. `spacing = step` is what the released code does, which never gets to the far end
/// Samples  with recover = s, every s-th token that goes, counted from the first, stays after all; the best make room for
///          them, so that the budget holds. TopV (Yang et al. 2025, arXiv 2503.18278)
/// Merging  with merge = nearest, keys and values of a token that goes are averaged into those of the nearest token that was
///          chosen, counted in tokens of those classes, ties to the older; each has weight 1, the position is the chosen
///          one's. Keys are averaged as they are, after RoPE. Tokens that stay anyway absorb only with ends_absorb. Rows that
///          are coded absorb nothing, and pages that others share are copied first; what finds no page for that goes without
///          a trace and is counted. Elastic Cache (Liu et al. 2024, arXiv 2407.18121), section 3.2
/// Pages    with granularity = page, pages stay or go whole, so that no row is copied and every page that goes is free (unless
///          others share it). A page's score is the mean of its tokens' scores, NaN where one of them is; the best stay as long
///          as they fit, and where the next does not, that is all: what is left of the budget is less than that one takes, and
///          is not used. A page with a token that must stay, of another class or without a score stays, and takes its tokens
///          of those classes from the budget; a budget in pages or bytes counts a whole page for it, as for any other. The
///          newest share is whole pages as well. Heads that hold different tokens have pages of their own to choose among,
///          with heads = layer by the mean scores
/// Stand-ins of pages   floor(represent * pages of the budget) pages. A page's signature has a bit per slot: is the token's
///          score in the upper half of all that are up for choice (or kept)? A slot without a token has none. The mean
///          anchor has a slot's bit where more than half of the pages have it. KVCrush at block level, as OpenVINO GenAI
///          has it; that puts stand-ins on top of its budget, which is a budget that counts them and a `represent` of
///          their share
/// Ties     to the lower position, or page; NaN scores rank last and are counted
/// Cost     that of `select_top`, plus one mean over heads with heads = layer, twice that with heads = shared; of pages,
///          a scan of the scores and a sort of the means
struct TopK {
  static constexpr std::string_view name = "top_k";

  ClassSet among = all_tokens;  // up for eviction, and counted by the budget
  SelectHeads heads = SelectHeads::kv;
  double recent_share = 0;  // share of the budget that goes to the newest tokens
  double floor = 0.2;       // with heads = shared: share of the even budget that every head keeps
  Index first = 0, last = 0;   // so many of the oldest and of the newest tokens stay anyway, within the budget
  Index skip_layers = 0;       // so many of the first layers stay whole and are no part of the budget
  bool only_positive = false;  // tokens whose score is not above 0 go even where there is room
  Index chunk = 1;             // neighbouring candidates that stay or go together
  Granularity granularity = Granularity::token;
  double represent = 0;        // share of the budget that goes to tokens that stand for those that go
  Anchor anchor = Anchor::alternating;
  Index anchor_seed = 0;
  Signature signature = Signature::half;
  Spacing spacing = Spacing::even;
  Index recover = 0;           // every so many-th of the tokens that go stays; 0 = none
  MergeInto merge = MergeInto::none;
  bool ends_absorb = false;    // do tokens that stay anyway take part in merging?

  static constexpr auto fields() {
    return std::tuple{Choice{"among", &TopK::among, "classes up for eviction, counted by the budget"},
                      Choice{"heads", &TopK::heads,
                             "who chooses: each kv head, all of a layer together, or each from a shared budget"},
                      Field<TopK, double>{"recent_share", &TopK::recent_share, 0.0, 1.0,
                                          "share of the budget that goes to the newest tokens"},
                      Field<TopK, double>{"floor", &TopK::floor, 0.0, 1.0,
                                          "with heads = shared: share of the even budget that every head keeps"},
                      Field<TopK, Index>{"first", &TopK::first, 0, 1 << 20, "oldest tokens that stay anyway"},
                      Field<TopK, Index>{"last", &TopK::last, 0, 1 << 20, "newest tokens that stay anyway"},
                      Field<TopK, Index>{"skip_layers", &TopK::skip_layers, 0, 1 << 20, "first layers that stay whole"},
                      Choice{"only_positive", &TopK::only_positive,
                             "tokens whose score is not above 0 go even where there is room"},
                      Field<TopK, Index>{"chunk", &TopK::chunk, 1, 1 << 20, "neighbours that stay or go together"},
                      Choice{"granularity", &TopK::granularity, "do tokens stay or go, or whole pages?"},
                      Field<TopK, double>{"represent", &TopK::represent, 0.0, 1.0,
                                          "share of the budget that goes to tokens that stand for those that go"},
                      Choice{"anchor", &TopK::anchor, "what their distance is counted from"},
                      Field<TopK, Index>{"anchor_seed", &TopK::anchor_seed, 0, Index{1} << 40, "of the random anchor"},
                      Choice{"signature", &TopK::signature, "a token's bit: in the upper half, or kept"},
                      Choice{"spacing", &TopK::spacing, "how they are taken along that distance"},
                      Field<TopK, Index>{"recover", &TopK::recover, 0, 1 << 20,
                                         "every so many-th token that goes stays after all, 0 = none"},
                      Choice{"merge", &TopK::merge, "what becomes of tokens that go"},
                      Choice{"ends_absorb", &TopK::ends_absorb, "do tokens that stay anyway take part in merging?"}};
  }
  void check() const {
    require(recover != 1, name, ".recover = 1 keeps everything, must be 0 or at least 2");
    require(recover == 0 || represent == 0, name, ": recover = ", recover, " and represent = ", represent,
            " both choose among what goes, one must be 0");
    if (granularity == Granularity::token) return;
    require(chunk == 1, name, ".chunk = ", chunk, " does not go with granularity = page, must be 1");
    require(recover == 0, name, ".recover = ", recover, " takes single tokens, with granularity = page it must be 0");
    require(merge == MergeInto::none, name,
            ".merge = nearest writes to pages that granularity = page leaves as they are, must be none");
  }
  /// Does it choose by more than the score of each token?
  bool refines() const {
    return chunk > 1 || represent > 0 || recover > 0 || merge != MergeInto::none || granularity == Granularity::page;
  }
  friend bool operator==(const TopK&, const TopK&) = default;
};

static_assert(Policy<TopK>);

}  // namespace kvpare

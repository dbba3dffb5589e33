// The selector: the best of one class of tokens, the rest untouched.
#pragma once

#include <string_view>
#include <tuple>

#include "../contracts.hpp"
#include "class_keeps.hpp"

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

/// What becomes of tokens that go: nothing, part of the nearest that stays, or, of their values, part of the next that stay.
enum class MergeInto : std::uint8_t { none, nearest, values };
inline constexpr std::string_view choices(MergeInto*) { return "none|nearest|values"; }
/// Which keys are averaged: as they are, after RoPE, or turned back by their positions and then to the absorbing token's.
enum class MergeKeys : std::uint8_t { rotated, unrotated };
inline constexpr std::string_view choices(MergeKeys*) { return "rotated|unrotated"; }

/// Which of the tokens that `among` names have a `keep` of their own: none, so that they share one; every class; every image.
enum class Each : std::uint8_t { none, token_class, image };
inline constexpr std::string_view choices(Each*) { return "none|class|image"; }

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
///          in length, and their pages are freed. Ada-KV (Feng et al. 2024, arXiv 2407.11550), algorithm 1. `recent_share` is
///          of each head's own B_h
/// Chunks   with chunk = c, c neighbouring candidates have the mean of their scores, so that they stay or go together; where
///          the budget ends within a chunk, its first tokens stay. ChunkKV (Liu et al. 2025, arXiv 2502.00299)
/// Stand-ins  with represent = s, floor(s * budget) of it are tokens that stand for those that go. A token's signature has a
///          bit per kv head; what is not among the best is sorted by Hamming distance to the anchor, ties to the lower
///          position, and taken evenly spaced. KVCrush (Jha et al. 2025, arXiv 2503.00022), at token level: any method with
///          it is "KVCrush on that method". The mean anchor has a head's bit where more than half of the tokens have it, and
///          alternates where just half do. Evenly: the i-th of b among n is the i (n - 1) / (b - 1)-th
/// Samples  with recover = s, every s-th token that goes, counted from the first, stays after all; the best make room for
///          them, so that the budget holds. TopV (Yang et al. 2025, arXiv 2503.18278)
/// Merging  with merge = nearest, keys and values of a token that goes are averaged into those of the nearest token that was
///          chosen, counted in tokens of those classes, ties to the older; each has weight 1, the position is the chosen
///          one's. Keys are averaged as they are, after RoPE; with merge_keys = unrotated before it, so that tokens which say
///          the same at different places add up to what they say at the chosen one's. That needs LayerShape::rope in every
///          layer that takes part, and is refused without. Tokens that stay anyway absorb only with ends_absorb. Rows that
///          are coded absorb nothing, and pages that others share are copied first; what finds no page for that goes without
///          a trace and is counted. Elastic Cache (Liu et al. 2024, arXiv 2407.18121), section 3.2; merge_keys is ours
/// Values   with merge = values, the value of a token i that goes is added, a 1 / m each, to those of the next m = merge_into
///          tokens that were chosen (by ends_absorb as above, of those that have a score; where fewer follow, to these in as
///          many parts), if a coin seeded by merge_seed, layer, head and position says so. The coin's probability is
///          score_i / mean score of those m, at least 0 and at most 1: where scores are attention, all of what i would have
///          given the output is then expected of them. Keys stay (a coded append form codes them again). Scores are the
///          kv head's own, whoever chooses; below 0 they count as 0, and with a NaN among them nothing is added. Of pages
///          and coded rows as with nearest, but a token counts as not merged where any of its parts found no place. CaM (Zhang et al., ICML 2024). There a token goes at every decode
///          step and joins the m that follow then; here all go at once, at compress. Released code divides by the largest or
///          the mean attention of sinks and newest tokens instead, and by m where fewer follow
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
/// Groups   with each = class every class of `among`, with each = image every image has `keep` of its own tokens, so that a
///          picture of few tokens, or an old one, does not lose them to others. `also` has further classes, with amounts of
///          their own: "text:50%". All that is said above is then said of one group: its ratio is of what was ever given of
///          it, it is shared out over the layers by the group's own scores (a density is of the layer's whole attention),
///          first, last, recent_share, chunk, represent, recover and only_positive count its tokens alone, heads share the
///          group's budget, and what goes merges into the nearest of its group (merge = values and mode = reference go with
///          one group only); pages and bytes round down for each. skip_layers is for all. An image is what TagSpans of one
///          class and number cover; without a number each span is one. Text that no span covers is one group. A page that
///          has tokens of two groups is not whole in either, and stays. Scores are made once for all groups, and a scorer
///          that looks at some classes only (elite_window, transport: visual) gives the others none: of these the oldest
///          stay, after the recent_share
/// Mode     reference, where released code goes its own way:
///          shared      B_h = w + round((c_h - w) (1 - floor) + trunc((B - w) floor)), halves to even, w the candidates that the
///                      scorer ranks first (SnapKV's window), all of a head at most: Ada-KV's code. A layer's sum may be
///                      missed by half a token per head either way, and by what trunc takes
///          represent   the i-th of b among n is the i floor(n / b)-th, so that the far end is seldom reached: OpenVINO's
///          recent_share  of the mean of the layers' budgets, at least one token, as many in each layer: EffiVLM-Bench's
///                      VL-Cache, CSP's code. Goes with budgets or scorers that have such a mode, too
/// Ties     to the lower position, or page; NaN scores rank last and are counted
/// Cost     that of `select_top`, plus one mean over heads with heads = layer, twice that with heads = shared; with merge =
///          values a copy of the scores to the host, and as many additions per number of a value as tokens join it; of pages,
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
  Index recover = 0;           // every so many-th of the tokens that go stays; 0 = none
  MergeInto merge = MergeInto::none;
  MergeKeys merge_keys = MergeKeys::rotated;
  Index merge_into = 32;       // with merge = values: so many tokens share a value that goes
  Index merge_seed = 0;
  bool ends_absorb = false;    // do tokens that stay anyway take part in merging?
  Each each = Each::none;      // which tokens of `among` have a budget of their own
  ClassKeeps also = {};        // further classes, not of `among`, each with an amount of its own
  Mode mode = Mode::paper;

  static constexpr auto fields() {
    return std::tuple{
        Choice{"among", &TopK::among, "classes up for eviction, counted by the budget"},
        Choice{"heads", &TopK::heads,
               "who chooses: each kv head, all of a layer together, or each from a shared budget"},
        Field<TopK, double>{"recent_share", &TopK::recent_share, 0.0, 1.0,
                            "share of the budget that goes to the newest tokens"},
        Field<TopK, double>{"floor", &TopK::floor, 0.0, 1.0,
                            "with heads = shared: share of the even budget that every head keeps"},
        Field<TopK, Index>{"first", &TopK::first, 0, 1 << 20, "oldest tokens that stay anyway"},
        Field<TopK, Index>{"last", &TopK::last, 0, 1 << 20, "newest tokens that stay anyway"},
        Field<TopK, Index>{"skip_layers", &TopK::skip_layers, 0, 1 << 20, "first layers that stay whole"},
        Choice{"only_positive", &TopK::only_positive, "tokens whose score is not above 0 go even where there is room"},
        Field<TopK, Index>{"chunk", &TopK::chunk, 1, 1 << 20, "neighbours that stay or go together"},
        Choice{"granularity", &TopK::granularity, "do tokens stay or go, or whole pages?"},
        Field<TopK, double>{"represent", &TopK::represent, 0.0, 1.0,
                            "share of the budget that goes to tokens that stand for those that go"},
        Choice{"anchor", &TopK::anchor, "what their distance is counted from"},
        Field<TopK, Index>{"anchor_seed", &TopK::anchor_seed, 0, Index{1} << 40, "of the random anchor"},
        Choice{"signature", &TopK::signature, "a token's bit of a head: in the upper half, or kept"},
        Field<TopK, Index>{"recover", &TopK::recover, 0, 1 << 20,
                           "every so many-th token that goes stays after all, 0 = none"},
        Choice{"merge", &TopK::merge, "what becomes of tokens that go"},
        Choice{"merge_keys", &TopK::merge_keys, "with merge = nearest: keys averaged after RoPE, or before it"},
        Field<TopK, Index>{"merge_into", &TopK::merge_into, 1, 4096,
                           "with merge = values: tokens that share a value that goes"},
        Field<TopK, Index>{"merge_seed", &TopK::merge_seed, 0, Index{1} << 40, "of the coins it takes"},
        Choice{"ends_absorb", &TopK::ends_absorb, "do tokens that stay anyway take part in merging?"},
        Choice{"each", &TopK::each, "do classes, or images, have budgets of their own?"},
        Choice{"also", &TopK::also, "further classes with amounts of their own"},
        Choice{"mode", &TopK::mode, "shared budgets, stand-ins and the newest as here, or as in released code"}};
  }
  void check() const {
    require(recover != 1, name, ".recover = 1 keeps everything, must be 0 or at least 2");
    require(recover == 0 || represent == 0, name, ": recover = ", recover, " and represent = ", represent,
            " both choose among what goes, one must be 0");
    require(merge_keys == MergeKeys::rotated || merge == MergeInto::nearest, name,
            ": merge_keys = unrotated is for merge = nearest, which averages keys");
    require(merge != MergeInto::values || !splits(), name,
            ": merge = values spreads a value over the tokens that follow, of whatever group; each and also must be none");
    if (granularity == Granularity::page) {
      require(chunk == 1, name, ".chunk = ", chunk, " does not go with granularity = page, must be 1");
      require(recover == 0, name, ".recover = ", recover, " takes single tokens, with granularity = page it must be 0");
      require(merge == MergeInto::none, name,
              ".merge writes to pages that granularity = page leaves as they are, must be none");
    }
    ClassSet taken = among;
    for (const ClassKeep& part : also) {
      require(part.classes.bits != 0, name, ".also: an amount for no class");
      require((taken.bits & part.classes.bits) == 0, name, ".also = ", print_setting(also), ": ",
              print_setting(part.classes), " has a budget already, in among = ", print_setting(among),
              " or earlier in the list; classes must be in one place");
      kvpare::check(part.keep);
      taken = taken | part.classes;
    }
  }
  /// Every class that is up for eviction.
  ClassSet classes() const {
    ClassSet all = among;
    for (const ClassKeep& part : also) all = all | part.classes;
    return all;
  }
  /// Have groups of tokens budgets of their own?
  bool splits() const { return each != Each::none || !also.empty(); }
  /// Alone, without a budget that has one.
  constexpr bool has_reference() const { return heads == SelectHeads::shared || represent > 0; }
  /// Does it choose by more than the score of each token?
  bool refines() const {
    return chunk > 1 || represent > 0 || recover > 0 || merge != MergeInto::none || granularity == Granularity::page;
  }
  friend bool operator==(const TopK&, const TopK&) = default;
};

static_assert(Policy<TopK>);

}  // namespace kvpare

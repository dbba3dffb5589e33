// What a policy decided, as data. Making a plan changes nothing; only `commit` carries one out.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "selection.hpp"
#include "tags.hpp"

namespace kvpare {

using SequenceId = std::uint32_t;

/// What becomes of a layer's tokens as they grow old, now and at every append to come. Counts are of live tokens of one
/// head, newest first; -1 as a format: none.
///
/// Keys     while at least keep_raw_keys + flush_keys tokens have keys as appended, the oldest flush_keys of them change to
///          `keys_first` (values stay as appended)
/// Values   while at least keep_raw_values + flush_values tokens have values as appended, the oldest flush_values of them
///          change to `format`
/// Without `keys_first` keys and values change together, by the rule for values. Forms whose rows do not move take whole
/// pages: tokens that do not fill one wait.
struct Aging {
  int format = -1, keys_first = -1;
  Index keep_raw_keys = 0, flush_keys = 1;
  Index keep_raw_values = 0, flush_values = 1;
  ClassSet classes = all_tokens;  // only tokens of these classes change
  Index sinks = 0;                // the first positions never change
  /// Forms that go by the attention of tokens (TokenFacts) are coded anew at every commit, from the rows as they were: these are
  /// kept in host memory as tokens take such a form. Codes alone would lose at each time and gain nothing.
  bool recode = false;
  std::vector<float> numbers = {};  // what codecs' states are made of beside the tokens, see Measured::numbers
  friend bool operator==(const Aging&, const Aging&) = default;
};

/// Tokens of a layer that take another form.
struct Tier {
  int format = 0;
  std::vector<Selection> tokens = {};  // per kv head; tokens that do not stay are left out
  bool fresh_state = false;       // the codec's state is made of these tokens, even if the layer has one for the format
  friend bool operator==(const Tier&, const Tier&) = default;
};

/// What becomes of the rows of a token that absorbs others.
enum class MergeRule : std::uint8_t {
  mean,            // keys and values: the mean of its own and theirs, each with weight 1
  unrotated_mean,  // the same, each key turned first from its token's position to the absorbing one's (LayerShape::rope)
  added_values,    // values: its own and theirs times their weights; its key stays
};

/// Tokens of one head that go and become part of others that stay: `into[i]` absorbs `from[begin[i]]` to `from[end[i] - 1]`.
/// Ranges ascend and leave nothing out; they may overlap.
struct Merge {
  std::vector<Position> into;  // ascending
  std::vector<Index> begin, end;
  std::vector<Position> from;
  MergeRule rule = MergeRule::mean;
  std::vector<double> weights = {};  // of `from`, with added_values
  friend bool operator==(const Merge&, const Merge&) = default;
};

/// One layer of a plan.
struct LayerPlan {
  bool touched = false;         // false: all tokens stay and `keep` is empty
  Index budget = 0;             // candidates granted per kv head
  std::vector<Selection> keep;  // per kv head: every token that stays, chosen or not up for choice
  std::vector<Merge> merges = {};  // per kv head, or empty: what goes leaves nothing
  std::vector<Tier> tiers;      // disjoint
  std::optional<Aging> aging;   // set for the layer; none = as before
  friend bool operator==(const LayerPlan&, const LayerPlan&) = default;
};

/// Survivors of one sequence. `epoch` is the sequence's at the time of planning: `commit` refuses a stale plan.
struct Plan {
  SequenceId sequence = 0;
  std::uint64_t epoch = 0;
  std::vector<LayerPlan> layers;
  Index candidates = 0;  // tokens that were up for choice, over all layers and kv heads
  Index chosen = 0;      // of these, how many stay
  Index promised_bytes = -1;  // of pages, once carried out, in layers that policies may touch; -1 = no promise
  bool dense = false;    // pack survivors without holes: the budget was said in pages or bytes
  bool in_place = false;  // no row moves: pages stay or go whole
  Index nan_scores = 0;  // candidates whose score was NaN; they rank last
  std::vector<std::string> notes = {};  // what a guard found, for people
  friend bool operator==(const Plan&, const Plan&) = default;
};

}  // namespace kvpare

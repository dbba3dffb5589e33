// What a policy decided, as data. Making a plan changes nothing; only `commit` carries one out.
#pragma once

#include <vector>

#include "selection.hpp"

namespace kvpare {

using SequenceId = std::uint32_t;

/// One layer of a plan.
struct LayerPlan {
  bool touched = false;         // false: the layer stays as it is and `keep` is empty
  Index budget = 0;             // candidates granted per kv head
  std::vector<Selection> keep;  // per kv head: every token that stays, chosen or not up for choice
  friend bool operator==(const LayerPlan&, const LayerPlan&) = default;
};

/// Survivors of one sequence. `epoch` is the sequence's at the time of planning: `commit` refuses a stale plan.
struct Plan {
  SequenceId sequence = 0;
  std::uint64_t epoch = 0;
  std::vector<LayerPlan> layers;
  Index candidates = 0;  // tokens that were up for choice, over all layers and kv heads
  Index chosen = 0;      // of these, how many stay
  bool dense = false;    // pack survivors without holes: the budget was said in pages or bytes
  Index nan_scores = 0;  // candidates whose score was NaN; they rank last
  friend bool operator==(const Plan&, const Plan&) = default;
};

}  // namespace kvpare

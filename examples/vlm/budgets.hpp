// How many visual tokens policies leave to each layer and kv head.
#pragma once

#include <array>
#include <iosfwd>
#include <vector>

#include "evaluate.hpp"

namespace vlm {

/// Visual tokens left after the prompt: [layer][kv head], mean over the scenes.
using LayerBudgets = std::array<std::array<double, kv_heads>, layer_count>;

/// Mean over layers and kv heads, as a share of all visual tokens.
double share_of(const LayerBudgets& budgets);

/// One per setting, from the first prompt of the dialogues of `options.tasks.front()`. Throws what the library throws.
std::vector<LayerBudgets> measure_budgets(const Decoder& decoder, const EvaluationSet& set,
                                          const std::vector<Setting>& settings, const EvaluateOptions& options);

void print_budgets(std::ostream& out, const std::vector<Setting>& settings, const std::vector<LayerBudgets>& budgets,
                   const EvaluateOptions& options);

}  // namespace vlm

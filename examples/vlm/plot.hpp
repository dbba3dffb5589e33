// The pictures of an evaluation.
#pragma once

#include <string>
#include <vector>

#include "budgets.hpp"
#include "evaluate.hpp"

namespace vlm {

/// Right answers over what is kept: one panel per task, one line per policy, a row of panels per family where there are many.
void plot_accuracy(const std::string& path, const std::vector<Setting>& settings, const std::vector<Result>& results,
                   const EvaluateOptions& options);

/// Right answers over the bytes in use as an answer begins: one panel per task; all of one policy a line.
void plot_accuracy_over_bytes(const std::string& path, const std::vector<Setting>& settings,
                              const std::vector<Result>& results, const EvaluateOptions& options);

/// A row per policy, a column per layer: how many visual tokens it leaves there, by kv head where these differ.
void plot_budgets(const std::string& path, const std::vector<Setting>& settings,
                  const std::vector<LayerBudgets>& budgets, const EvaluateOptions& options);

/// What one policy leaves of one picture under several budgets.
struct Survival {
  std::string policy;
  std::vector<std::vector<double>> layers;  // [layer][patch]: how many budgets the patch survives, mean over kv heads
};

/// The picture, and beside it, layer by layer, how small the budget may be before a patch is lost.
/// `keeps` are the budgets, descending; `caption` stands under the title.
void plot_survival(const std::string& path, const Scene& scene, const std::string& title, const std::string& caption,
                   const std::vector<double>& keeps, const std::vector<Survival>& rows);

}  // namespace vlm

#include "budgets.hpp"

#include <algorithm>
#include <iomanip>
#include <ostream>

#include "each_dialogue.hpp"

namespace vlm {

double share_of(const LayerBudgets& budgets) {
  double tokens = 0;
  for (const auto& layer : budgets)
    for (const double head : layer) tokens += head;
  return tokens / static_cast<double>(layer_count * kv_heads * visual_tokens);
}

std::vector<LayerBudgets> measure_budgets(const Decoder& decoder, const EvaluationSet& set,
                                          const std::vector<Setting>& settings, const EvaluateOptions& options) {
  kvpare::require(options.scenes > 0, "measure_budgets: scenes = ", options.scenes, ", must be at least 1");
  std::vector<LayerBudgets> parts(settings.size() * static_cast<std::size_t>(options.scenes));
  for_each_dialogue(
      set, settings, options, [&](Engine& engine, const Scene& scene, const Setting& setting, std::size_t i) {
        const auto kept =
            engine.kept_patches(decoder, scene, first_turn(scene, options.tasks.front()), setting.compressor);
        for (std::size_t l = 0; l < kept.size(); ++l)
          for (std::size_t h = 0; h < kept[l].size(); ++h) parts[i][l][h] = static_cast<double>(kept[l][h].size());
      });
  std::vector<LayerBudgets> budgets(settings.size());
  for (std::size_t i = 0; i < parts.size(); ++i)
    for (std::size_t l = 0; l < layer_count; ++l)
      for (std::size_t h = 0; h < kv_heads; ++h) budgets[i % settings.size()][l][h] += parts[i][l][h];
  for (LayerBudgets& of_setting : budgets)
    for (auto& layer : of_setting)
      for (double& head : layer) head /= static_cast<double>(options.scenes);
  return budgets;
}

void print_budgets(std::ostream& out, const std::vector<Setting>& settings, const std::vector<LayerBudgets>& budgets,
                   const EvaluateOptions& options) {
  std::size_t widest = 6;
  for (const Setting& setting : settings) widest = std::max(widest, setting.policy.size());
  const int first = static_cast<int>(widest), head = 7;
  out << '\n' << std::left << std::setw(first) << "" << std::right;
  for (Index l = 0; l < layer_count; ++l)
    out << std::setw(head * static_cast<int>(kv_heads)) << kvpare::message("layer ", l);
  out << std::setw(10) << "kept" << '\n' << std::fixed << std::setprecision(1);
  for (std::size_t s = 0; s < settings.size(); ++s) {
    out << std::left << std::setw(first) << settings[s].policy << std::right;
    for (const auto& layer : budgets[s])
      for (const double tokens : layer) out << std::setw(head) << tokens;
    out << std::setw(8) << 100 * share_of(budgets[s]) << " %\n";
  }
  out << "\nvisual tokens of " << visual_tokens << " that stay, a column per kv head; mean of " << options.scenes
      << " scenes.\n";
}

}  // namespace vlm

#include "budgets.hpp"

#include <algorithm>
#include <atomic>
#include <iomanip>
#include <mutex>
#include <ostream>

#include "support/threads.hpp"

namespace vlm {

double share_of(const LayerBudgets& budgets) {
  double tokens = 0;
  for (const auto& layer : budgets)
    for (const double head : layer) tokens += head;
  return tokens / static_cast<double>(layer_count * kv_heads * visual_tokens);
}

std::vector<LayerBudgets> measure_budgets(const Decoder& decoder, const EvaluationSet& set,
                                          const std::vector<Setting>& settings, const EvaluateOptions& options) {
  kvpare::require(options.scenes > 0 && options.scenes <= std::ssize(set.scenes),
                  "measure_budgets: scenes = ", options.scenes, ", the set has ", set.scenes.size());
  std::vector<std::array<std::array<Index, kv_heads>, layer_count>> tokens(settings.size());  // over the scenes
  const Index total = std::ssize(settings) * options.scenes;
  std::atomic<Index> next{0};
  Index done = 0;
  std::mutex mutex;
  example::run_on_threads(options.threads, [&] {
    const auto engine = make_engine(options.device, options.page_tokens);
    for (Index i; (i = next.fetch_add(1)) < total;) {
      const Scene& scene = set.scenes[static_cast<std::size_t>(i / std::ssize(settings))];
      const auto setting = static_cast<std::size_t>(i % std::ssize(settings));
      const auto kept =
          engine->kept_patches(decoder, scene, first_turn(scene, options.tasks.front()), settings[setting].compressor);
      const std::lock_guard lock(mutex);
      for (std::size_t l = 0; l < kept.size(); ++l)
        for (std::size_t h = 0; h < kept[l].size(); ++h) tokens[setting][l][h] += std::ssize(kept[l][h]);
      ++done;
      if (options.progress) options.progress(done, total);
    }
  });

  std::vector<LayerBudgets> budgets(settings.size());
  for (std::size_t s = 0; s < settings.size(); ++s)
    for (std::size_t l = 0; l < layer_count; ++l)
      for (std::size_t h = 0; h < kv_heads; ++h)
        budgets[s][l][h] = static_cast<double>(tokens[s][l][h]) / static_cast<double>(options.scenes);
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

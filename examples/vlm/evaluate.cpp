#include "evaluate.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "each_dialogue.hpp"

namespace vlm {

const Turn& first_turn(const Scene& scene, Task task) { return task == Task::desc ? scene.describe : scene.first; }

std::vector<Result> evaluate(const Decoder& decoder, const EvaluationSet& set, const std::vector<Setting>& settings,
                             const EvaluateOptions& options) {
  std::vector<Result> parts(settings.size() * static_cast<std::size_t>(options.scenes));
  for_each_dialogue(set, settings, options,
                    [&](Engine& engine, const Scene& scene, const Setting& setting, std::size_t i) {
                      parts[i] = engine.converse(decoder, scene, setting.compressor, options.tasks);
                    });
  std::vector<Result> results(settings.size());
  for (std::size_t i = 0; i < parts.size(); ++i) results[i % settings.size()] += parts[i];
  return results;
}

Verification verify(const Decoder& decoder, const EvaluationSet& set, Index scenes, Index page_tokens, Device device) {
  const auto engine = make_engine(device, page_tokens);
  const kvpare::AnyCompressor full = kvpare::make_compressor("full");
  Verification found;
  for (Index i = 0; i < scenes; ++i)
    for (const Turn* turn :
         {&set.scenes[static_cast<std::size_t>(i)].describe, &set.scenes[static_cast<std::size_t>(i)].first})
      kvpare::require(!turn->reference.empty(), "scene ", i,
                      " has no references to compare with (see train/README.md)");
  for (Index i = 0; i < scenes; ++i) {
    const Visit visit = [&](const Given& given) {
      ++found.turns;
      if (given.tokens == given.turn.reference)
        ++found.identical;
      else
        found.differences.push_back(kvpare::message("scene ", i, ", ", name_of(given.task), ", a '", given.turn.kind,
                                                    "' question: not the reference's answer"));
      for (std::size_t w = 0; w < given.turn.logits.size(); ++w)
        found.largest_logit_difference =
            std::max(found.largest_logit_difference,
                     std::abs(static_cast<double>(given.first_logits[static_cast<Index>(w)]) - given.turn.logits[w]));
    };
    engine->converse(decoder, set.scenes[static_cast<std::size_t>(i)], full,
                     {Task::desc, Task::turn1, Task::same, Task::other}, visit);
  }
  return found;
}

}  // namespace vlm

// Runs the evaluation set's dialogues under many compression settings and counts right answers, bytes and time.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "engine.hpp"

namespace vlm {

/// One policy with one budget.
struct Setting {
  std::string policy;          // as the user wrote it
  std::optional<double> keep;  // share of the visual tokens; none when the policy says its own budget, or has none
  kvpare::AnyCompressor compressor;

  bool keeps_all() const { return !kvpare::evicts(compressor); }
};

/// The first question of the dialogues of a task.
const Turn& first_turn(const Scene& scene, Task task);

struct EvaluateOptions {
  std::vector<Task> tasks = {Task::desc, Task::same, Task::other, Task::turn1};
  Index scenes = 0;
  Device device = Device::cpu;
  Index threads = 1;  // each has an engine of its own
  Index page_tokens = 16;
  std::vector<example::States> states = {};  // what codecs have learnt of the model
  std::function<void(Index done, Index total)> progress;  // called from any thread, one at a time
};

/// One result per setting. Every (setting, scene) is a dialogue of its own, prefill included; the results do not depend
/// on the number of threads. Throws what the library throws.
std::vector<Result> evaluate(const Decoder& decoder, const EvaluationSet& set, const std::vector<Setting>& settings,
                             const EvaluateOptions& options);

/// How the full cache compares with the references of the evaluation set.
struct Verification {
  Index turns = 0, identical = 0;
  double largest_logit_difference = 0;
  std::vector<std::string> differences;  // one sentence each
};

Verification verify(const Decoder& decoder, const EvaluationSet& set, Index scenes, Index page_tokens,
                    Device device = Device::cpu);

}  // namespace vlm

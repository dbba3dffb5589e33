// Runs the evaluation set's dialogues under many compression settings and counts right answers, bytes and time.
#pragma once

#include <array>
#include <cstddef>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "dialogue.hpp"
#include "evaluation_set.hpp"

namespace vlm {

/// Which answers are counted; data/README.md describes the dialogues.
enum class Task { desc, same, other, turn1 };
inline constexpr std::array task_names = {std::string_view("desc"), std::string_view("same"), std::string_view("other"),
                                          std::string_view("turn1")};
inline constexpr std::size_t task_count = task_names.size();
constexpr std::string_view name_of(Task task) { return task_names[static_cast<std::size_t>(task)]; }

/// One policy with one budget.
struct Setting {
  std::string policy;          // as the user wrote it
  std::optional<double> keep;  // share of the visual tokens; none when the policy says its own budget, or has none
  kvpare::AnyCompressor compressor;
};

struct Score {
  Index right = 0, answers = 0;        // whole answers
  Index right_tokens = 0, tokens = 0;  // <eos> left out
  Index bytes = 0;                     // of pages and codec states in use as the answers began
  double exact() const { return answers > 0 ? static_cast<double>(right) / static_cast<double>(answers) : 0; }
  double by_token() const { return tokens > 0 ? static_cast<double>(right_tokens) / static_cast<double>(tokens) : 0; }
  double answer_bytes() const { return answers > 0 ? static_cast<double>(bytes) / static_cast<double>(answers) : 0; }
  void operator+=(const Score& more);
};

/// Sums over the dialogues run under one setting.
struct Result {
  std::array<Score, task_count> scores;
  Index prompts = 0;      // compressed dialogues
  Index kept_visual = 0;  // visual tokens, summed over layers and kv heads
  Cost cost;
  void operator+=(const Result& more);

  /// Mean per layer and kv head.
  double kept_visual_tokens() const;
  /// Of the cache as an answer begins: mean over answers, and per live token of a layer and kv head.
  double answer_bytes() const;
  double token_bytes() const;
  const Score& operator[](Task task) const { return scores[static_cast<std::size_t>(task)]; }
};

struct EvaluateOptions {
  std::vector<Task> tasks = {Task::desc, Task::same, Task::other, Task::turn1};
  Index scenes = 0;
  Index threads = 1;
  Index page_tokens = 16;
  std::function<void(Index done, Index total)> progress;  // called from any thread, one at a time
};

/// Pages for the dialogues about one scene, of which three are alive at once.
kvpare::CacheOptions cache_options(Index page_tokens);

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

Verification verify(const Decoder& decoder, const EvaluationSet& set, Index scenes, Index page_tokens);

}  // namespace vlm

// How answers are judged, and what is counted of them.
#pragma once

#include <array>
#include <cstddef>
#include <functional>
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

/// An answer on its way to being judged.
struct Given {
  Task task;
  const Turn& turn;
  const std::vector<int>& tokens;
  const Row& first_logits;  // from which the first token was taken
};

using Visit = std::function<void(const Given&)>;

/// An answer is right when it begins with the true one, whose last token is <eos>.
Score judge(const std::vector<int>& got, const std::vector<int>& truth);

}  // namespace vlm

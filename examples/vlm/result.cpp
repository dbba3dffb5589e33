#include "result.hpp"

#include <algorithm>

namespace vlm {

Score judge(const std::vector<int>& got, const std::vector<int>& truth) {
  Score score{.answers = 1, .tokens = std::ssize(truth) - 1};
  for (std::size_t i = 0; i + 1 < truth.size(); ++i) score.right_tokens += i < got.size() && got[i] == truth[i];
  score.right = got.size() >= truth.size() && std::equal(truth.begin(), truth.end(), got.begin());
  return score;
}

void Score::operator+=(const Score& more) {
  right += more.right, answers += more.answers;
  right_tokens += more.right_tokens, tokens += more.tokens;
  bytes += more.bytes;
}

void Result::operator+=(const Result& more) {
  for (std::size_t t = 0; t < task_count; ++t) scores[t] += more.scores[t];
  prompts += more.prompts, kept_visual += more.kept_visual;
  cost += more.cost;
}

double Result::kept_visual_tokens() const {
  return static_cast<double>(kept_visual) / static_cast<double>(std::max<Index>(prompts, 1) * layer_count * kv_heads);
}

double Result::answer_bytes() const {
  return static_cast<double>(cost.answer_bytes) / static_cast<double>(std::max<Index>(cost.answers, 1));
}

double Result::token_bytes() const {
  return static_cast<double>(cost.answer_bytes) / static_cast<double>(std::max<Index>(cost.answer_tokens, 1));
}

}  // namespace vlm

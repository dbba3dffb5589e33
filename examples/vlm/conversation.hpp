// The evaluation set's dialogues about one scene.
#pragma once

#include <algorithm>
#include <vector>

#include "dialogue.hpp"
#include "result.hpp"

namespace vlm {

/// The dialogues about one scene under one compressor, as data/README.md has them: the description; the first question;
/// and after that question two chains of follow-ups, which share its pages.
template <kvpare::Backend B>
class Conversation {
 public:
  Conversation(const Decoder& decoder, Cache<B>& cache, const Scene& scene, const kvpare::AnyCompressor& compressor)
      : decoder_(decoder), cache_(cache), scene_(scene), compressor_(compressor) {}

  Result run(const std::vector<Task>& tasks, const Visit& visit = {}) {
    visit_ = visit;
    const auto wanted = [&](Task task) { return std::find(tasks.begin(), tasks.end(), task) != tasks.end(); };
    if (wanted(Task::desc)) {
      Dialogue<B> dialogue = begin(scene_.describe);
      answer(Task::desc, dialogue, scene_.describe);
      result_.cost += dialogue.cost();
    }
    if (wanted(Task::turn1) || wanted(Task::same) || wanted(Task::other)) {
      Dialogue<B> first = begin(scene_.first);
      answer(Task::turn1, first, scene_.first);
      if (wanted(Task::same)) follow_up(Task::same, first.fork(), scene_.same);
      if (wanted(Task::other)) follow_up(Task::other, first.fork(), scene_.other);
      result_.cost += first.cost();
    }
    return result_;
  }

 private:
  Dialogue<B> begin(const Turn& turn) {
    Dialogue<B> dialogue(decoder_, cache_, scene_.image, turn.prompt, compressor_);
    ++result_.prompts;
    for (Index l = 0; l < layer_count; ++l)
      for (Index h = 0; h < kv_heads; ++h) result_.kept_visual += std::ssize(dialogue.kept_patches(l, h));
    return dialogue;
  }

  void follow_up(Task task, Dialogue<B> dialogue, const std::vector<Turn>& turns) {
    for (const Turn& turn : turns) {
      dialogue.read(turn.prompt);
      answer(task, dialogue, turn);
    }
    result_.cost += dialogue.cost();
  }

  void answer(Task task, Dialogue<B>& dialogue, const Turn& turn) {
    const Row logits = dialogue.logits();
    const Index bytes_before = dialogue.cost().answer_bytes;
    const std::vector<int> tokens = dialogue.answer(turn.longest_answer());
    Score score = judge(tokens, turn.answer);
    score.bytes = dialogue.cost().answer_bytes - bytes_before;
    result_.scores[static_cast<std::size_t>(task)] += score;
    if (visit_) visit_({task, turn, tokens, logits});
  }

  const Decoder& decoder_;
  Cache<B>& cache_;
  const Scene& scene_;
  const kvpare::AnyCompressor& compressor_;
  Visit visit_;
  Result result_;
};

}  // namespace vlm

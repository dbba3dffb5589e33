#include "evaluate.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>
#include <utility>

#include "support/threads.hpp"

namespace vlm {
namespace {

/// An answer on its way to being judged.
struct Given {
  Task task;
  const Turn& turn;
  const std::vector<int>& tokens;
  const Row& first_logits;  // from which the first token was taken
};

using Visit = std::function<void(const Given&)>;

/// An answer is right when it begins with the true one, whose last token is <eos>.
Score judge(const std::vector<int>& got, const std::vector<int>& truth) {
  Score score{.answers = 1, .tokens = std::ssize(truth) - 1};
  for (std::size_t i = 0; i + 1 < truth.size(); ++i) score.right_tokens += i < got.size() && got[i] == truth[i];
  score.right = got.size() >= truth.size() && std::equal(truth.begin(), truth.end(), got.begin());
  return score;
}

/// The dialogues about one scene under one compressor, as data/README.md has them: the description; the first question;
/// and after that question two chains of follow-ups, which share its pages.
class Conversation {
 public:
  Conversation(const Decoder& decoder, Cache& cache, const Scene& scene, const kvpare::AnyCompressor& compressor)
      : decoder_(decoder), cache_(cache), scene_(scene), compressor_(compressor) {}

  Result run(const std::vector<Task>& tasks, const Visit& visit = {}) {
    visit_ = visit;
    const auto wanted = [&](Task task) { return std::find(tasks.begin(), tasks.end(), task) != tasks.end(); };
    if (wanted(Task::desc)) {
      Dialogue dialogue = begin(scene_.describe);
      answer(Task::desc, dialogue, scene_.describe);
      result_.cost += dialogue.cost();
    }
    if (wanted(Task::turn1) || wanted(Task::same) || wanted(Task::other)) {
      Dialogue first = begin(scene_.first);
      answer(Task::turn1, first, scene_.first);
      if (wanted(Task::same)) follow_up(Task::same, first.fork(), scene_.same);
      if (wanted(Task::other)) follow_up(Task::other, first.fork(), scene_.other);
      result_.cost += first.cost();
    }
    return result_;
  }

 private:
  Dialogue begin(const Turn& turn) {
    Dialogue dialogue(decoder_, cache_, scene_.image, turn.prompt, compressor_);
    ++result_.prompts;
    for (Index l = 0; l < layer_count; ++l)
      for (Index h = 0; h < kv_heads; ++h) result_.kept_visual += std::ssize(dialogue.kept_patches(l, h));
    return dialogue;
  }

  void follow_up(Task task, Dialogue dialogue, const std::vector<Turn>& turns) {
    for (const Turn& turn : turns) {
      dialogue.read(turn.prompt);
      answer(task, dialogue, turn);
    }
    result_.cost += dialogue.cost();
  }

  void answer(Task task, Dialogue& dialogue, const Turn& turn) {
    const Row logits = dialogue.logits();
    const Index bytes_before = dialogue.cost().answer_bytes;
    const std::vector<int> tokens = dialogue.answer(turn.longest_answer());
    Score score = judge(tokens, turn.answer);
    score.bytes = dialogue.cost().answer_bytes - bytes_before;
    result_.scores[static_cast<std::size_t>(task)] += score;
    if (visit_) visit_({task, turn, tokens, logits});
  }

  const Decoder& decoder_;
  Cache& cache_;
  const Scene& scene_;
  const kvpare::AnyCompressor& compressor_;
  Visit visit_;
  Result result_;
};

}  // namespace

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

kvpare::CacheOptions cache_options(Index page_tokens) {
  constexpr Index dialogues = 4, longest = 320;  // tokens; the longest dialogue of the set has fewer than 300
  constexpr Index token_bytes = layer_count * kv_heads * 2 * head_dim * static_cast<Index>(sizeof(float));
  return example::with_room_for_forms<Formats>(
      {.page_tokens = page_tokens, .pool_bytes = dialogues * (longest + page_tokens) * token_bytes}, attention_shapes());
}

std::vector<Result> evaluate(const Decoder& decoder, const EvaluationSet& set, const std::vector<Setting>& settings,
                             const EvaluateOptions& options) {
  kvpare::require(options.scenes <= std::ssize(set.scenes), "evaluate: scenes = ", options.scenes, ", the set has ",
                  set.scenes.size());
  const Index total = std::ssize(settings) * options.scenes;
  std::vector<Result> parts(
      static_cast<std::size_t>(total));  // [scene, setting]: what disturbs the clock hits all alike
  std::atomic<Index> next{0};
  Index done = 0;
  std::mutex mutex;

  example::run_on_threads(options.threads, [&] {
    kvpare::cpu::Backend backend({.threads = 1});
    Cache cache(backend, attention_shapes(), cache_options(options.page_tokens));
    for (Index i; (i = next.fetch_add(1)) < total;) {
      const Scene& scene = set.scenes[static_cast<std::size_t>(i / std::ssize(settings))];
      const Setting& setting = settings[static_cast<std::size_t>(i % std::ssize(settings))];
      parts[static_cast<std::size_t>(i)] = Conversation(decoder, cache, scene, setting.compressor).run(options.tasks);
      const std::lock_guard lock(mutex);
      ++done;
      if (options.progress) options.progress(done, total);
    }
  });

  std::vector<Result> results(settings.size());
  for (std::size_t i = 0; i < parts.size(); ++i) results[i % settings.size()] += parts[i];
  return results;
}

Verification verify(const Decoder& decoder, const EvaluationSet& set, Index scenes, Index page_tokens) {
  kvpare::cpu::Backend backend({.threads = 1});
  Cache cache(backend, attention_shapes(), cache_options(page_tokens));
  const kvpare::AnyCompressor full = kvpare::make_compressor("full");
  Verification found;
  for (Index i = 0; i < scenes; ++i) {
    Conversation conversation(decoder, cache, set.scenes[static_cast<std::size_t>(i)], full);
    conversation.run({Task::desc, Task::turn1, Task::same, Task::other}, [&](const Given& given) {
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
    });
  }
  return found;
}

}  // namespace vlm

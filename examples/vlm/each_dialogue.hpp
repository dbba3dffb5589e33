// Every setting on every scene, on several threads.
#pragma once

#include <atomic>
#include <mutex>

#include "evaluate.hpp"
#include "support/threads.hpp"

namespace vlm {

/// Calls `visit(engine, scene, setting, i)` for i = 0 to scenes * settings - 1, in no order, at the same time on the options'
/// threads, each with an engine of its own; i counts the settings of a scene one after the other, so that what disturbs the
/// clock hits all alike. Tells `options.progress`.
template <class Visit>
void for_each_dialogue(const EvaluationSet& set, const std::vector<Setting>& settings, const EvaluateOptions& options,
                       const Visit& visit) {
  kvpare::require(options.scenes <= std::ssize(set.scenes), "evaluate: scenes = ", options.scenes, ", the set has ",
                  set.scenes.size());
  const Index total = std::ssize(settings) * options.scenes;
  std::atomic<Index> next{0};
  Index done = 0;
  std::mutex mutex;
  example::run_on_threads(options.threads, [&] {
    const auto engine = make_engine(options.device, options.page_tokens);
    for (const example::States& states : options.states) engine->share_states(states);
    for (Index i; (i = next.fetch_add(1)) < total;) {
      visit(*engine, set.scenes[static_cast<std::size_t>(i / std::ssize(settings))],
            settings[static_cast<std::size_t>(i % std::ssize(settings))], static_cast<std::size_t>(i));
      const std::lock_guard lock(mutex);
      ++done;
      if (options.progress) options.progress(done, total);
    }
  });
}

}  // namespace vlm

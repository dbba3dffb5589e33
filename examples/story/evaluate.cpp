#include "evaluate.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>

#include "support/threads.hpp"

namespace story {
namespace {

bool says(const std::string& policy, std::string_view setting) { return policy.find(setting) != std::string::npos; }

/// -log softmax(logits)[token]
double nats_of(const Eigen::Ref<const Row>& logits, int token) {
  const double largest = logits.maxCoeff();
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - largest);
  return largest + std::log(sum) - logits[token];
}

}  // namespace

kvpare::Keep parse_budget(const std::string& words) {
  kvpare::Keep budget;
  const bool parsed = kvpare::parse_setting(words, budget);
  kvpare::require(parsed && (budget.unit == kvpare::Keep::Unit::tokens || budget.unit == kvpare::Keep::Unit::ratio),
                  "budget '", words,
                  "', must be tokens per kv head of each layer (16t) or a share of the tokens so far (0.25, 25%)");
  kvpare::check(budget);
  return budget;
}

kvpare::Keep over_layers(kvpare::Keep budget, Index layers) {
  if (budget.unit == kvpare::Keep::Unit::tokens) budget.amount *= static_cast<double>(layers);
  return budget;
}

std::vector<Setting> make_settings(const std::vector<std::string>& policies, const std::vector<kvpare::Keep>& budgets,
                                   Index layers, Index block, AtDecode at_decode) {
  std::vector<Setting> settings;
  for (const std::string& policy : policies) {
    kvpare::AnyCompressor compressor = kvpare::make_compressor(policy);
    if (!says(policy, "among")) compressor.selector.among = kvpare::all_tokens;
    if (compressor.keep == kvpare::Keep::ratio(1) || says(policy, "keep")) {
      settings.push_back({policy, {}, make_method(compressor, block, at_decode)});
      continue;
    }
    for (const kvpare::Keep& budget : budgets) {
      compressor.keep = over_layers(budget, layers);
      settings.push_back({policy, budget, make_method(compressor, block, at_decode)});
    }
  }
  return settings;
}

void Result::operator+=(const Result& more) {
  nats += more.nats, tokens += more.tokens, seen += more.seen, evicted += more.evicted;
  peak_page_bytes = std::max(peak_page_bytes, more.peak_page_bytes);
  bytes += more.bytes, held += more.held;
  support = std::min(support, more.support);
  seconds += more.seconds;
}

Result measure(const Decoder& decoder, kvpare::cpu::Backend& backend, const std::vector<int>& story,
               const Method& method, Index page_tokens, std::span<const example::States> states) {
  const auto start = std::chrono::steady_clock::now();
  const Index count = std::ssize(story) - 1;
  Context context(decoder, backend, method, {.most_tokens = count, .page_tokens = page_tokens, .states = states});
  const Matrix logits = decoder.logits(context.read(std::span(story).first(static_cast<std::size_t>(count))));
  Result result;
  for (Index t = 0; t < count; ++t) result.nats += nats_of(logits.row(t), story[static_cast<std::size_t>(t) + 1]);
  const Usage usage = context.usage();
  result.tokens = count, result.seen = usage.seen, result.evicted = usage.evicted;
  result.peak_page_bytes = usage.peak_page_bytes;
  result.bytes = usage.bytes, result.held = usage.held, result.support = usage.support;
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

std::vector<Result> evaluate(const Decoder& decoder, const std::vector<std::vector<int>>& stories,
                             const std::vector<Setting>& settings, const EvaluateOptions& options) {
  const std::size_t total = settings.size() * stories.size();
  std::vector<Result> parts(total);  // [story, setting]: what disturbs the clock hits all alike
  std::atomic<std::size_t> next{0};
  example::run_on_threads(options.threads, [&] {
    kvpare::cpu::Backend backend({.threads = 1});
    for (std::size_t i; (i = next.fetch_add(1)) < total;)
      parts[i] = measure(decoder, backend, stories[i / settings.size()], settings[i % settings.size()].method,
                         options.page_tokens, options.states);
  });
  std::vector<Result> results(settings.size());
  for (std::size_t i = 0; i < parts.size(); ++i) results[i % settings.size()] += parts[i];
  return results;
}

}  // namespace story

// How well the model predicts a text while a policy evicts: negative log-likelihood per token, in nats.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "context.hpp"

namespace story {

/// How much stays: tokens per kv head of each layer ("16t"), or a share of the tokens read so far ("0.25", "25%").
/// Throws InvalidArgument on other words.
kvpare::Keep parse_budget(const std::string& words);

/// What the library calls the same: its tokens are a total over all layers.
kvpare::Keep over_layers(kvpare::Keep budget, Index layers);

/// One policy with one budget.
struct Setting {
  std::string policy;                  // as the user wrote it
  std::optional<kvpare::Keep> budget;  // none when the policy says its own, or has none
  Method method;
};

/// Every policy with every budget; one that keeps everything (full), or says `keep=` itself, comes once. Policies evict
/// among all tokens, unless they say `among=`. Throws InvalidArgument.
std::vector<Setting> make_settings(const std::vector<std::string>& policies, const std::vector<kvpare::Keep>& budgets,
                                   Index layers, Index block, AtDecode at_decode = AtDecode::each_token);

/// Sums over the stories read under one setting.
struct Result {
  double nats = 0;
  Index tokens = 0;  // predicted
  double seen = 0;   // tokens that a query saw in a kv head, itself included: mean over heads, summed over queries
  Index evicted = 0;
  Index peak_page_bytes = 0;  // of whole pages in use, of the largest story
  double bytes = 0;           // in use as a token was attended, codec states included, summed over tokens
  double held = 0;            // tokens of layers and kv heads in these, likewise
  kvpare::Support support = kvpare::Support::fused;  // the least of the formats in use
  double seconds = 0;

  double nats_per_token() const { return nats / count(); }
  double seen_per_token() const { return seen / count(); }
  double bytes_in_use() const { return bytes / count(); }
  double bytes_per_held_token() const { return held > 0 ? bytes / held : 0; }
  double us_per_token() const { return seconds * 1e6 / count(); }
  void operator+=(const Result& more);

 private:
  double count() const { return static_cast<double>(tokens > 0 ? tokens : 1); }
};

/// Nats of the story's tokens after the first, each predicted from those before it.
Result measure(const Decoder& decoder, kvpare::cpu::Backend& backend, const std::vector<int>& story,
               const Method& method, Index page_tokens, std::span<const example::States> states = {});

struct EvaluateOptions {
  Index threads = 1;
  Index page_tokens = 16;
  std::vector<example::States> states = {};  // what codecs have learnt of the model
};

/// One result per setting; all but the seconds do not depend on the number of threads.
std::vector<Result> evaluate(const Decoder& decoder, const std::vector<std::vector<int>>& stories,
                             const std::vector<Setting>& settings, const EvaluateOptions& options);

}  // namespace story

// kvpare_story: writes stories with a llama2.c model, and measures what eviction costs its predictions.
#include <CLI/CLI.hpp>
#include <chrono>
#include <cmath>
#include <fstream>
#include <iostream>
#include <thread>

#include "plot.hpp"
#include "record.hpp"
#include "support/bad_file.hpp"
#include "support/picture.hpp"
#include "support/policies.hpp"
#include "writer.hpp"

namespace {

using namespace story;

struct Arguments {
  std::string model, tokenizer;
  std::string prompt, text, nll;
  Index steps = 256;
  Sampling sampling;
  std::vector<std::string> policies, budgets;
  Index block = 16;
  bool all_in_blocks = false;
  TextRule rule;
  Index threads = std::max<Index>(1, std::thread::hardware_concurrency());
  Index page_tokens = 16;
  std::string json, plot, dump;
  bool list = false;
};

const std::vector<std::string> measured_policies = {"full",     "streaming_llm", "h2o",     "tova",       "key_norm",
                                                    "key_diff", "random",        "snap_kv", "pyramid_kv", "ada_kv"};
const std::vector<std::string> measured_budgets = {"8t", "16t", "32t", "64t", "128t", "256t"};

std::vector<kvpare::Keep> budgets_of(const std::vector<std::string>& words) {
  std::vector<kvpare::Keep> budgets;
  for (const std::string& word : words) budgets.push_back(parse_budget(word));
  return budgets;
}

AtDecode at_decode_of(const Arguments& a) { return a.all_in_blocks ? AtDecode::each_block : AtDecode::each_token; }

/// The one policy with the one budget that a text is written under.
Method method_of(const Arguments& a, Index layers) {
  const std::vector<std::string> policies = a.policies.empty() ? std::vector<std::string>{"full"} : a.policies;
  const std::vector<Setting> settings =
      make_settings(policies, budgets_of(a.budgets), layers, a.block, at_decode_of(a));
  if (policies.size() == 1 && settings.empty())
    throw CLI::ValidationError("--policy", policies[0] + " needs a budget, e.g. --keep 32t");
  if (settings.size() > 1) throw CLI::ValidationError("--policy", "a text is written under one policy and one budget");
  return settings[0].method;
}

/// Tokens of the prompt, no more than the model can read.
std::vector<int> prompt_of(const Arguments& a, const Tokenizer& tokenizer, const Shape& shape) {
  std::vector<int> tokens = tokenizer.encode(a.text.empty() ? a.prompt : example::read_bytes(a.text));
  tokens.insert(tokens.begin(), begin_of_text);
  if (std::ssize(tokens) > shape.longest) {
    std::cerr << "kvpare_story: the prompt has " << tokens.size() << " tokens, the first " << shape.longest
              << " are read: more is beyond the model's longest sequence\n";
    tokens.resize(static_cast<std::size_t>(shape.longest));
  }
  return tokens;
}

int dump_text(const Decoder& decoder, const Tokenizer& tokenizer, const Arguments& a) {
  if (!a.policies.empty()) throw CLI::ValidationError("--policy", "--dump records the full cache");
  const example::Trace trace = record_text(decoder, prompt_of(a, tokenizer, decoder.shape()));
  example::write_trace(a.dump, trace);
  std::cout << "wrote " << a.dump << ": " << trace.layers.size() << " layers, " << trace.tokens() << " tokens\n";
  return 0;
}

int write_text(const Decoder& decoder, const Tokenizer& tokenizer, const Arguments& a) {
  const Shape& shape = decoder.shape();
  kvpare::cpu::Backend backend({.threads = 1});
  Draft draft{.tokens = prompt_of(a, tokenizer, shape), .sampling = a.sampling};
  Context context(decoder, backend, method_of(a, shape.layers),
                  {.most_tokens = shape.longest, .page_tokens = a.page_tokens});

  const auto start = std::chrono::steady_clock::now();
  const auto say = [&](int previous, int token) { std::cout << tokenizer.decode(previous, token) << std::flush; };
  for (std::size_t i = 1; i < draft.tokens.size(); ++i) say(draft.tokens[i - 1], draft.tokens[i]);
  const Index written = write(decoder, context, draft, a.steps, say);
  std::cout << '\n';
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();

  const kvpare::SequenceStats stats = context.stats();
  std::cerr << "read " << context.length() << " tokens, wrote " << written << ", "
            << std::llround(static_cast<double>(context.length()) / seconds) << " tokens/s; in the cache "
            << static_cast<double>(stats.live_tokens) / static_cast<double>(shape.layers * shape.kv_heads)
            << " tokens per kv head, " << stats.pages << " pages, " << stats.page_bytes << " bytes\n";
  return 0;
}

int measure_text(const Decoder& decoder, const Tokenizer& tokenizer, const Arguments& a) {
  const Shape& shape = decoder.shape();
  if (a.rule.most_tokens > shape.longest)
    throw CLI::ValidationError("--story-tokens", "the model's longest sequence is " + std::to_string(shape.longest));
  Measured measured{.text = a.nll, .rule = a.rule, .options = {.threads = a.threads, .page_tokens = a.page_tokens}};
  const std::vector<std::vector<int>> stories = read_stories(example::read_bytes(a.nll), tokenizer, a.rule);
  example::expect(!stories.empty(), a.nll, "no story of at least ", a.rule.shortest, " characters among the first ",
                  a.rule.stories);
  measured.stories = std::ssize(stories);
  for (const std::vector<int>& story : stories) measured.tokens += std::ssize(story) - 1;

  const std::vector<kvpare::Keep> budgets = budgets_of(a.budgets.empty() ? measured_budgets : a.budgets);
  if (!a.plot.empty()) check_one_axis(budgets);
  const std::vector<Setting> settings = make_settings(a.policies.empty() ? measured_policies : a.policies, budgets,
                                                      shape.layers, a.block, at_decode_of(a));
  const std::vector<Result> results = evaluate(decoder, stories, settings, measured.options);
  print_table(std::cout, measured, settings, results);
  if (!a.json.empty()) {
    write_json(a.json, measured, settings, results);
    std::cout << "wrote " << a.json << '\n';
  }
  if (!a.plot.empty()) {
    plot_nats(a.plot, measured, settings, results);
    std::cout << "drew " << a.plot << '\n';
  }
  return 0;
}

void declare(CLI::App& app, Arguments& a) {
  app.add_option("--model", a.model, "a llama2.c model file (legacy, version 0)");
  app.add_option("--tokenizer", a.tokenizer, "its tokenizer file");
  auto* task = app.add_option_group("task", "what to do, one of");
  task->add_option("--prompt", a.prompt, "write this text on (\"\" for a new one)");
  task->add_option("--text", a.text, "write the text of this file on");
  auto* nll = task->add_option("--nll", a.nll, "measure how well the text of this file is predicted");
  task->add_flag("--list", a.list, "show the policies with their settings and sources");
  task->require_option(1);

  app.add_option("--policy", a.policies,
                 "a policy with its settings, e.g. \"h2o(recent_share=0.25)\"; may be repeated with --nll")
      ->allow_extra_args(false);
  app.add_option("--keep", a.budgets,
                 "budgets: tokens per kv head of each layer (32t), or a share of the tokens read so far (0.25, 25%)")
      ->delimiter(',');
  app.add_option("--every", a.block, "tokens per block, for policies that evict after a block of tokens")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  app.add_flag("--all-in-blocks", a.all_in_blocks,
               "let policies that could evict after each token do so in blocks too");
  app.add_option("--steps", a.steps, "tokens to write, at most")
      ->excludes(nll)
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--temperature", a.sampling.temperature, "0 = the likeliest token, 1 = as the model says")
      ->excludes(nll)
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str();
  app.add_option("--seed", a.sampling.seed, "of the choice of tokens")->excludes(nll)->capture_default_str();
  app.add_option("--dump", a.dump,
                 "write no text on, but what attention is given for it into this file, for kvpare_inspect")
      ->excludes(nll);

  app.add_option("--story-tokens", a.rule.most_tokens, "with --nll: tokens of each story, at most")
      ->needs(nll)
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--stories", a.rule.stories, "with --nll: the file's first stories")
      ->needs(nll)
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--threads", a.threads, "with --nll: stories at the same time")
      ->needs(nll)
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app.add_option("--page-tokens", a.page_tokens, "tokens per page of the cache")
      ->check(CLI::IsMember({16, 32, 64}))
      ->capture_default_str();
  app.add_option("--json", a.json, "with --nll: write the results to this file")->needs(nll);
  app.add_option("--plot", a.plot, "with --nll: draw a picture into this file, .svg or .png (needs gnuplot)")
      ->needs(nll);
}

int run(const Arguments& a) {
  if (a.list) {
    example::print_policies(std::cout);
    return 0;
  }
  for (const auto& [option, file] : {std::pair("--model", &a.model), std::pair("--tokenizer", &a.tokenizer)})
    if (file->empty()) throw CLI::RequiredError(option);
  if (!a.plot.empty()) example::check_plot(a.plot);
  for (const std::string& path : {a.json, a.plot, a.dump})
    if (!path.empty() && !std::ofstream(path, std::ios::app)) throw std::runtime_error(path + ": cannot be written");
  const Decoder decoder(parse_model(example::read_bytes(a.model), a.model));
  const Tokenizer tokenizer =
      Tokenizer::parse(example::read_bytes(a.tokenizer), a.tokenizer, decoder.shape().vocabulary);
  if (!a.dump.empty()) return dump_text(decoder, tokenizer, a);
  return a.nll.empty() ? write_text(decoder, tokenizer, a) : measure_text(decoder, tokenizer, a);
}

}  // namespace

int main(int count, char** words) {
  CLI::App app("Writes stories with a llama2.c model, and measures what eviction costs its predictions.");
  Arguments arguments;
  declare(app, arguments);
  try {
    app.parse(count, words);
    return run(arguments);
  } catch (const CLI::ParseError& error) {
    return app.exit(error);
  } catch (const std::exception& error) {
    std::cerr << "kvpare_story: " << error.what() << '\n';
    return 1;
  }
}

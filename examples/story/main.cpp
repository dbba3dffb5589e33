// kvpare_story: writes stories with a llama2.c model, and measures what eviction costs its predictions.
#include <CLI/CLI.hpp>
#include <chrono>
#include <cmath>
#include <fstream>
#include <iostream>
#include <optional>
#include <thread>

#include "plot.hpp"
#include "record.hpp"
#include "saved.hpp"
#include "support/bad_file.hpp"
#include "support/picture.hpp"
#include "support/policies.hpp"
#include "support/program.hpp"

namespace {

using namespace story;

struct Arguments {
  std::string model, tokenizer;
  std::string prompt, text, nll;
  Index steps = 256;
  Sampling sampling;
  std::vector<std::string> policies, budgets, states;
  Index block = 16;
  bool all_in_blocks = false;
  TextRule rule;
  Index threads = std::max<Index>(1, std::thread::hardware_concurrency());
  Index page_tokens = 16;
  std::string json, plot, dump, save, load;
  bool list = false, bytes = false;
};

const std::vector<std::string> measured_policies = {"full",     "streaming_llm", "h2o",     "tova",       "key_norm",
                                                    "key_diff", "random",        "snap_kv", "pyramid_kv", "ada_kv"};
/// Eviction, fewer bits, both, and one budget for the two, of stories260K: groups are a head's 8 channels.
std::vector<std::string> policies_over_bytes() {
  std::vector<std::string> policies = {"full", "h2o", "snap_kv"};
  for (const char* bits : {"8", "4", "3", "2"})
    policies.push_back("kivi(bits=" + std::string(bits) + ", group=8, residual=16)");
  for (const char* form : {"half", "int8", "int4_g8_min"})
    policies.push_back("in_form(form=" + std::string(form) + ", residual=16)");
  for (const char* low : {"int4", "int3", "int2"})
    policies.push_back("mikv(keep=160t, low=" + std::string(low) + ")");  // 32 in each of five layers
  policies.push_back("think(recent=16)");
  for (const char* percent : {"75", "50"})
    policies.push_back("vid_kv(percent=" + std::string(percent) + ", group=8, residual=32)");
  for (const char* bits : {"4", "3", "2"}) policies.push_back("kv_quant(bits=" + std::string(bits) + ", residual=16)");
  for (const char* bits : {"4", "2"})
    policies.push_back("h2o + kivi(bits=" + std::string(bits) + ", group=8, residual=16)");
  for (const char* kib : {"24", "32", "48", "64", "96"}) {
    policies.push_back("joint(keep=" + std::string(kib) + "KiB, forms=int8+int4_g8_min)");
    policies.push_back("h2o(keep=" + std::string(kib) + "KiB) + joint(forms=int8+int4_g8_min)");
  }
  return policies;
}

const std::vector<std::string> measured_budgets = {"8t", "16t", "32t", "64t", "128t", "256t"};

std::vector<kvpare::Keep> budgets_of(const std::vector<std::string>& words) {
  std::vector<kvpare::Keep> budgets;
  for (const std::string& word : words) budgets.push_back(parse_budget(word));
  return budgets;
}

/// What pages of a model's cache can hold; without a model, of one as small as stories260K.
void print_formats(std::ostream& out, const std::string& model, Index page_tokens) {
  kvpare::Model shapes{{{.q_heads = 8, .kv_heads = 4, .key_dim = 8, .value_dim = 8, .scale = 1}}};
  if (!model.empty()) shapes = Decoder(parse_model(example::read_bytes(model), model)).attention_shapes();
  kvpare::cpu::Backend backend({.threads = 1});
  example::print_formats(
      out, Cache(backend, shapes, example::with_room_for_forms<Formats>({.page_tokens = page_tokens}, shapes)));
}

std::vector<example::States> states_of(const Arguments& a) {
  std::vector<example::States> states;
  for (const std::string& path : a.states) states.push_back(example::read_states(path));
  return states;
}

/// The one policy with the one budget that a text is written under.
Terms terms_of(const Arguments& a) {
  if (a.policies.size() > 1 || a.budgets.size() > 1)
    throw CLI::ValidationError("--policy", "a text is written under one policy and one budget");
  Terms terms{.block = a.block, .all_in_blocks = a.all_in_blocks, .page_tokens = a.page_tokens};
  if (!a.policies.empty()) terms.policy = a.policies[0];
  if (!a.budgets.empty()) terms.budget = a.budgets[0];
  return terms;
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

int dump_text(const Decoder& decoder, const std::vector<int>& prompt, const Arguments& a) {
  if (!a.policies.empty()) throw CLI::ValidationError("--policy", "--dump records the full cache");
  const example::Trace trace = record_text(decoder, prompt);
  example::write_trace(a.dump, trace);
  std::cout << "wrote " << a.dump << ": " << trace.layers.size() << " layers, " << trace.tokens() << " tokens\n";
  return 0;
}

/// Writes a text on, from where it is, and puts it aside where that is asked for.
int write_text(const Decoder& decoder, const Tokenizer& tokenizer, Saved saved, const Arguments& a) {
  const Shape& shape = decoder.shape();
  const std::vector<example::States> states = states_of(a);
  const ContextOptions options{.most_tokens = shape.longest, .page_tokens = saved.terms.page_tokens, .states = states};
  const Method method = method_of(saved.terms, shape.layers);
  kvpare::cpu::Backend backend({.threads = 1});
  std::optional<Context> context;
  if (saved.image.tokens > 0)
    context.emplace(decoder, backend, method, options, saved.image);
  else
    context.emplace(decoder, backend, method, options);

  Draft& draft = saved.draft;
  const auto say = [&](int previous, int token) { std::cout << tokenizer.decode(previous, token) << std::flush; };
  for (std::size_t i = 1; i < draft.tokens.size(); ++i) say(draft.tokens[i - 1], draft.tokens[i]);
  const auto start = std::chrono::steady_clock::now();
  const Index written = write(decoder, *context, draft, a.steps, say), read = context->length() - saved.image.tokens;
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::cout << '\n';

  const kvpare::SequenceStats stats = context->stats();
  std::cerr << "read " << read << " tokens, wrote " << written << ", "
            << std::llround(static_cast<double>(read) / std::max(seconds, 1e-9)) << " tokens/s; in the cache "
            << static_cast<double>(stats.live_tokens) / static_cast<double>(shape.layers * shape.kv_heads)
            << " tokens per kv head, " << stats.pages << " pages, " << stats.page_bytes << " bytes\n";
  if (!a.save.empty()) {
    saved.image = context->image();
    const std::string bytes = print_saved(saved);
    example::write_bytes(a.save, bytes);
    std::cerr << "wrote " << a.save << ": " << bytes.size() << " bytes, go on with --load\n";
  }
  return 0;
}

int measure_text(const Decoder& decoder, const Tokenizer& tokenizer, const Arguments& a) {
  const Shape& shape = decoder.shape();
  if (a.rule.most_tokens > shape.longest)
    throw CLI::ValidationError("--story-tokens", "the model's longest sequence is " + std::to_string(shape.longest));
  Measured measured{.text = a.nll, .rule = a.rule, .options = {.threads = a.threads, .page_tokens = a.page_tokens, .states = states_of(a)},
                    .numbers = 2 * shape.head_dim()};
  const std::vector<std::vector<int>> stories = read_stories(example::read_bytes(a.nll), tokenizer, a.rule);
  example::expect(!stories.empty(), a.nll, "no story of at least ", a.rule.shortest, " characters among the first ",
                  a.rule.stories);
  measured.stories = std::ssize(stories);
  for (const std::vector<int>& story : stories) measured.tokens += std::ssize(story) - 1;

  const std::vector<kvpare::Keep> budgets = budgets_of(a.budgets.empty() ? measured_budgets : a.budgets);
  if (!a.plot.empty() && !a.bytes) check_one_axis(budgets);
  const std::vector<Setting> settings =
      make_settings(a.policies.empty() ? a.bytes ? policies_over_bytes() : measured_policies : a.policies, budgets, shape.layers, a.block,
                    a.all_in_blocks ? AtDecode::each_block : AtDecode::each_token);
  const std::vector<Result> results = evaluate(decoder, stories, settings, measured.options);
  print_table(std::cout, measured, settings, results);
  if (!a.json.empty()) {
    write_json(a.json, measured, settings, results);
    std::cout << "wrote " << a.json << '\n';
  }
  if (!a.plot.empty()) {
    (a.bytes ? plot_nats_over_bytes : plot_nats)(a.plot, measured, settings, results);
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
  auto* load = task->add_option("--load", a.load, "write on what --save put aside, on the same terms");
  task->add_flag("--list", a.list, "show the policies and precisions with their settings and sources, and the page formats (of the --model)");
  task->require_option(1);

  app.add_option("--policy", a.policies,
                 "a policy with its settings, a precision, or both: \"h2o(recent_share=0.25)\", \"kivi(bits=4, group=8)\", "
                 "\"h2o + kivi(bits=4, group=8)\"; may be repeated with --nll")
      ->excludes(load)
      ->allow_extra_args(false);
  app.add_option("--keep", a.budgets,
                 "budgets: tokens per kv head of each layer (32t), or a share of the tokens read so far (0.25, 25%)")
      ->excludes(load)
      ->delimiter(',');
  auto* states = app.add_option("--states", a.states, "what codecs have learnt of the model (kvpare_tune --learn); may be repeated")
                     ->allow_extra_args(false);
  app.add_option("--every", a.block, "tokens per block, for policies that evict after a block of tokens")
      ->excludes(load)
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  app.add_flag("--all-in-blocks", a.all_in_blocks, "let policies that could evict after each token do so in blocks too")
      ->excludes(load);
  app.add_option("--steps", a.steps, "tokens to write, at most")
      ->excludes(nll)
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--temperature", a.sampling.temperature, "0 = the likeliest token, 1 = as the model says")
      ->excludes(nll)
      ->excludes(load)
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str();
  app.add_option("--seed", a.sampling.seed, "of the choice of tokens")
      ->excludes(nll)
      ->excludes(load)
      ->capture_default_str();
  auto* dump = app.add_option("--dump", a.dump,
                              "write no text on, but what attention is given for it into this file, for kvpare_inspect")
                   ->excludes(nll)
                   ->excludes(load)
                   ->excludes(states);
  app.add_option("--save", a.save, "put the text and its cache aside into this file, for --load")
      ->excludes(nll)
      ->excludes(dump);

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
      ->excludes(load)
      ->check(CLI::IsMember({16, 32, 64}))
      ->capture_default_str();
  app.add_flag("--bytes", a.bytes,
               "with --nll: let the picture show the bytes in use; without --policy: eviction, fewer bits, and both")
      ->needs(nll);
  app.add_option("--json", a.json, "with --nll: write the results to this file")->needs(nll);
  app.add_option("--plot", a.plot, "with --nll: draw a picture into this file, .svg or .png (needs gnuplot)")
      ->needs(nll);
}

int run(Arguments& a) {
  if (a.list) {
    example::print_policies(std::cout);
    print_formats(std::cout, a.model, a.page_tokens);
    return 0;
  }
  for (const auto& [option, file] : {std::pair("--model", &a.model), std::pair("--tokenizer", &a.tokenizer)})
    if (file->empty()) throw CLI::RequiredError(option);
  if (!a.plot.empty()) example::check_plot(a.plot);
  for (const std::string& path : {a.json, a.plot, a.dump, a.save})
    if (!path.empty() && !std::ofstream(path, std::ios::app)) throw std::runtime_error(path + ": cannot be written");
  const std::string model = example::read_bytes(a.model);
  const Decoder decoder(parse_model(model, a.model));
  const Shape& shape = decoder.shape();
  const Tokenizer tokenizer = Tokenizer::parse(example::read_bytes(a.tokenizer), a.tokenizer, shape.vocabulary);
  if (!a.nll.empty()) return measure_text(decoder, tokenizer, a);
  if (!a.load.empty())
    return write_text(decoder, tokenizer, parse_saved(example::read_bytes(a.load), a.load, shape, fingerprint(model)),
                      a);
  const std::vector<int> prompt = prompt_of(a, tokenizer, shape);
  if (!a.dump.empty()) return dump_text(decoder, prompt, a);
  return write_text(
      decoder, tokenizer,
      {.draft = {.tokens = prompt, .sampling = a.sampling}, .terms = terms_of(a), .model = fingerprint(model)}, a);
}

}  // namespace

int main(int count, char** words) {
  return example::run_program("kvpare_story",
                              "Writes stories with a llama2.c model, and measures what eviction costs its predictions.",
                              count, words, declare, run);
}

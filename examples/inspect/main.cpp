// kvpare_inspect: what a compression policy does to the KV cache of a recorded prompt.
#include <CLI/CLI.hpp>
#include <filesystem>
#include <fstream>
#include <iostream>

#include "inspect.hpp"
#include "plot.hpp"
#include "report.hpp"
#include "support/picture.hpp"
#include "support/policies.hpp"
#include "support/program.hpp"

namespace {

struct Arguments {
  std::string trace, json, plot;
  std::vector<std::string> states;
  std::vector<std::string> policies = {"snap_kv"};
  inspect::Options options;
  bool list = false;
};

void declare(CLI::App& app, Arguments& a) {
  app.add_option("--trace", a.trace, "the recorded prompt (see README.md)");
  app.add_option("--policy", a.policies,
                 "a policy with its settings, a precision, or both: \"air_cache(keep=0.1, alpha=0.2)\", \"kivi(bits=4)\", "
                 "\"air_cache(keep=0.1) + kivi(bits=4)\"; may be repeated")
      ->allow_extra_args(false)
      ->capture_default_str();
  app.add_option("--states", a.states, "what codecs have learnt of the model (kvpare_tune --learn); may be repeated")
      ->allow_extra_args(false);
  app.add_option("--rows", a.options.rows, "compare the attention outputs of the last so many rows")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--page-tokens", a.options.page_tokens, "tokens per page of the cache")
      ->check(CLI::IsMember({16, 32, 64}))
      ->capture_default_str();
  app.add_option("--json", a.json, "write what was found to this file");
  app.add_flag("--scores", a.options.scores, "put every token's score into the JSON too");
  app.add_option("--plot", a.plot, "draw a picture into this file, .svg or .png (needs gnuplot)");
  app.add_flag("--list", a.list, "show the policies and precisions with their settings and sources; with --trace also the page formats");
}

int run(Arguments& arguments) {
  if (arguments.list) {
    example::print_policies(std::cout);
    if (!arguments.trace.empty())
      inspect::print_formats(std::cout, example::read_trace(arguments.trace), arguments.options.page_tokens);
    return 0;
  }
  if (arguments.trace.empty()) throw std::invalid_argument("--trace FILE is missing: which recorded prompt?");
  if (arguments.options.scores && arguments.json.empty())
    throw std::invalid_argument("--scores needs --json FILE, that is where they go");
  if (!arguments.plot.empty()) example::check_plot(arguments.plot);
  for (const std::string& path : {arguments.plot, arguments.json})
    if (!path.empty() && !std::ofstream(path, std::ios::app)) throw std::runtime_error(path + ": cannot be written");

  for (const std::string& path : arguments.states) arguments.options.states.push_back(example::read_states(path));
  const example::Trace trace = example::read_trace(arguments.trace);
  const auto results = inspect::run(trace, arguments.policies, arguments.options);
  const std::string name = std::filesystem::path(arguments.trace).filename().string();
  inspect::print_tables(std::cout, name, trace, results, arguments.options);
  if (!arguments.json.empty()) {
    example::write_bytes(arguments.json, inspect::print_json(name, trace, results, arguments.options));
    std::cout << "wrote " << arguments.json << '\n';
  }
  if (!arguments.plot.empty()) {
    const std::string title = "What stays of " + name + ": " + inspect::print_tokens(trace);
    inspect::plot(arguments.plot, title, trace, results, arguments.options);
    std::cout << "drew " << arguments.plot << '\n';
  }
  return 0;
}

}  // namespace

int main(int count, char** words) {
  return example::run_program("kvpare_inspect", "What a compression policy does to the KV cache of a recorded prompt.",
                              count, words, declare, run);
}

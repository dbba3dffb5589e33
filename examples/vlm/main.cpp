// kvpare_vlm: how many right answers a vision-language model keeps when the visual part of its KV cache shrinks.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <optional>
#include <string_view>
#include <thread>

#include "budgets.hpp"
#include "evaluate.hpp"
#include "plot.hpp"
#include "record.hpp"
#include "report.hpp"
#include "support/picture.hpp"
#include "support/policies.hpp"
#include "support/program.hpp"

namespace {

using namespace vlm;
namespace fs = std::filesystem;

/// All methods that act at the end of a prefill, with settings that suit this model; some with what is known to matter here.
const std::vector<std::string> compared_policies = {
    "full",
    "pare",
    "snap_kv(rows=text)",
    "snap_kv(rows=text, pool=1)",
    "pyramid_kv(rows=text, pool=1)",
    "ada_kv(rows=text, pool=1)",
    "kv_crush(rows=text, pool=1)",
    "chunk_kv(rows=text, chunk=4)",
    "tova",
    "h2o",
    "h2o(recent_share=0)",
    "prefix_kv",
    "elastic_cache",
    "cam",
    "expected_attention",
    "corm(w=16, last=16)",
    "air_cache",
    "air_cache(alpha=0.2)",
    "csp",
    "vl_cache",
    "zip_vl",
    "zip_vl(tau=0.7)",
    "top_v",
    "top_v(skip_layers=0)",
    "cross_modal",
    "random",
    "streaming_llm",
    "key_norm",
    "key_diff",
    "lag_kv(lag=16)",
};

/// An unguided one, and two that choose by kv head and by layer.
const std::vector<std::string> shown_policies = {"random", "snap_kv(rows=text, pool=1)", "air_cache(alpha=0.2)"};

/// Every rule that gives layers or heads other budgets, after an even one.
const std::vector<std::string> policies_with_budgets = {
    "snap_kv(rows=text, pool=1)",
    "pyramid_kv(rows=text, pool=1)",
    "snap_kv(rows=text, pool=1, budget=strength_skewness)",
    "air_cache",
    "air_cache(alpha=0.2)",
    "pare",
    "vl_cache",
    "prefix_kv",
    "top_v",
    "ada_kv(rows=text, pool=1)",
    "zip_vl(tau=0.7)",
    "corm(w=16, last=16)",
};

/// Eviction, fewer bits, both, and one budget for the two.
std::vector<std::string> policies_over_bytes() {
  const std::string window = "snap_kv(rows=text, pool=1)";
  std::vector<std::string> policies = {"full", window, "h2o(recent_share=0)"};
  for (const char* bits : {"8", "4", "3", "2"}) policies.push_back("kivi(bits=" + std::string(bits) + ", residual=32)");
  for (const char* form : {"half", "int8", "int4", "hadamard_lloyd3", "int2_g32_min", "ternary"})
    policies.push_back("in_form(form=" + std::string(form) + ")");
  for (const char* low : {"int4", "int3", "int2"}) policies.push_back("mikv(keep=0.2, low=" + std::string(low) + ")");
  policies.push_back("think(percent=50, align=8, keys=int4_channel_g32_min, values=int4_g32_min)");
  for (const char* percent : {"75", "50"}) policies.push_back("vid_kv(percent=" + std::string(percent) + ", residual=32)");
  for (const char* bits : {"4", "3", "2"}) {
    policies.push_back("qaq(capacity=" + std::string(bits) + ")");
    policies.push_back("kv_quant(bits=" + std::string(bits) + ")");
  }
  for (const char* atoms : {"4", "2"}) policies.push_back("csr(nonzeros=" + std::string(atoms) + ", dictionary=online256)");
  for (const char* form : {"half", "int4", "hadamard_lloyd3"})
    policies.push_back(window + " + in_form(form=" + std::string(form) + ")");
  for (const char* kib : {"16", "20", "24", "28", "32", "36", "40", "44", "48", "64", "96", "128"}) {
    const std::string keep = "keep=" + std::string(kib) + "KiB, among=all";
    policies.push_back("joint(" + keep + ")");
    policies.push_back("snap_kv(rows=text, pool=1, " + keep + ") + joint(forms=int8+int4+int2_g32_min)");
  }
  return policies;
}

struct Arguments {
  std::vector<std::string> policies, states;
  std::vector<double> keeps;  // none: those of `default_keeps`
  std::vector<std::string> tasks = {"desc", "same", "other", "turn1"};
  std::optional<Index> scenes;  // none: all for --verify, fewer for the rest
  Index threads = std::max<Index>(1, std::thread::hardware_concurrency());
  Index page_tokens = 32;  // which groups of 32 tokens fill
  std::string device = "cpu", data, json, plot, dump;
  Index show = -1, scene = 0;
  bool list = false, verify = false, demo = false, bytes = false, budgets = false;
};

Device device_of(const Arguments& arguments) { return arguments.device == "cuda" ? Device::cuda : Device::cpu; }

constexpr Index default_scenes = 48;  // with all policies less than two minutes on two cores

fs::path program_folder() {
  std::error_code ignored;
  return fs::read_symlink("/proc/self/exe", ignored).parent_path();
}

/// The folder with the model: the one named, else where the sources were when this was built, else beside the program.
std::string find_data(const std::string& named) {
  if (!named.empty()) return named;
  std::error_code ignored;
  const std::vector<fs::path> places = {KVPARE_VLM_DATA, program_folder() / "data"};
  for (const fs::path& place : places)
    if (fs::exists(place / "vlm.safetensors", ignored)) return place.string();
  throw BadFile("the model is neither in " + places[0].string() + " nor in " + places[1].string() +
                "; say where with --data DIR");
}

bool says(const std::string& policy, std::string_view setting) { return policy.find(setting) != std::string::npos; }

/// A policy as this program runs it: it evicts visual tokens only, unless it says `among=` itself.
kvpare::AnyCompressor compressor_of(const std::string& policy) {
  kvpare::AnyCompressor compressor = kvpare::make_compressor(policy);
  if (!says(policy, "among")) compressor.selector.among = kvpare::visual;
  return compressor;
}

/// Every policy with every budget; one that keeps everything (full), or says `keep=` itself, comes once.
std::vector<Setting> make_settings(const Arguments& arguments) {
  std::vector<Setting> settings;
  for (const std::string& policy : arguments.policies) {
    kvpare::AnyCompressor compressor = compressor_of(policy);
    if (compressor.keep == kvpare::Keep::ratio(1) || says(policy, "keep")) {  // full, or a rule of its own
      settings.push_back({policy, {}, compressor});
      continue;
    }
    for (const double keep : arguments.keeps) {
      compressor.keep = kvpare::Keep::ratio(keep);
      settings.push_back({policy, keep, compressor});
    }
  }
  return settings;
}

Index scenes_of(const EvaluationSet& set, Index wanted) { return std::min<Index>(wanted, std::ssize(set.scenes)); }

int run_verification(const Decoder& decoder, const EvaluationSet& set, const Arguments& arguments) {
  const Index scenes = scenes_of(set, arguments.scenes.value_or(std::ssize(set.scenes)));
  const Verification found = verify(decoder, set, scenes, arguments.page_tokens, device_of(arguments));
  for (const std::string& difference : found.differences) std::cout << difference << '\n';
  constexpr double tolerance = 1e-3;
  const bool good = found.identical == found.turns && found.largest_logit_difference <= tolerance;
  std::cout << found.identical << " of " << found.turns
            << " answers identical to the references, token for token; logits differ by at most "
            << found.largest_logit_difference << " (allowed: " << tolerance
            << "): " << (good ? "as it should be" : "WRONG") << '\n';
  return good ? 0 : 1;
}

const Scene& scene_of(const EvaluationSet& set, Index number, const char* option) {
  if (number >= std::ssize(set.scenes))
    throw CLI::ValidationError(option, "the last scene is " + std::to_string(set.scenes.size() - 1));
  return set.scenes[static_cast<std::size_t>(number)];
}

std::vector<Task> tasks_of(const Arguments& arguments) {
  std::vector<Task> tasks;
  for (std::size_t t = 0; t < task_count; ++t)
    if (std::find(arguments.tasks.begin(), arguments.tasks.end(), task_names[t]) != arguments.tasks.end())
      tasks.push_back(static_cast<Task>(t));
  return tasks;
}

Task first_task(const Arguments& arguments) {
  const auto named = std::find(task_names.begin(), task_names.end(), arguments.tasks.front());
  return static_cast<Task>(named - task_names.begin());
}

/// What an evaluation is run with, but for its progress.
EvaluateOptions options_of(const EvaluationSet& set, const Arguments& arguments) {
  EvaluateOptions options;
  options.tasks = tasks_of(arguments);
  options.scenes = scenes_of(set, arguments.scenes.value_or(default_scenes));
  options.device = device_of(arguments), options.threads = arguments.threads;
  options.page_tokens = arguments.page_tokens;
  for (const std::string& path : arguments.states) options.states.push_back(example::read_states(path));
  return options;
}

/// The first question asked in the dialogues of the first task.
const Turn& first_question(const Scene& scene, const Arguments& arguments) {
  return first_turn(scene, first_task(arguments));
}

std::string words_of(const EvaluationSet& set, const Turn& turn) {
  std::string words;
  for (std::size_t i = 0; i + 1 < turn.prompt.size(); ++i)  // <ans> left out
    words += (i > 0 ? " " : "") + set.vocabulary[static_cast<std::size_t>(turn.prompt[i])];
  return words;
}

/// The trace of one scene's prompt, for kvpare_inspect.
int dump_scene(const Decoder& decoder, const EvaluationSet& set, const Arguments& arguments) {
  const Scene& scene = scene_of(set, arguments.scene, "--scene");
  const Turn& asked = first_question(scene, arguments);
  const example::Trace trace = record_prompt(
      decoder, scene.image, asked.prompt,
      {{"model", "kvpare_vlm"}, {"scene", std::to_string(arguments.scene)}, {"asked", words_of(set, asked)}},
      device_of(arguments));
  example::write_trace(arguments.dump, trace);
  std::cout << "wrote " << arguments.dump << ": " << trace.layers.size() << " layers, " << trace.tokens()
            << " tokens, asked: " << words_of(set, asked) << '\n';
  return 0;
}

/// The picture of one scene: what each policy keeps of it after the first question asked.
int show_scene(const Decoder& decoder, const EvaluationSet& set, const Arguments& arguments) {
  if (arguments.plot.empty()) throw CLI::ValidationError("--show", "needs --plot FILE for the picture");
  const Scene& scene = scene_of(set, arguments.show, "--show");
  const Turn& asked = first_question(scene, arguments);
  std::vector<double> keeps;
  for (const double keep : arguments.keeps)
    if (keep < 1) keeps.push_back(keep);
  std::sort(keeps.begin(), keeps.end(), std::greater<>());
  if (keeps.empty()) throw CLI::ValidationError("--keep", "--show needs budgets below 1");

  const auto engine = make_engine(device_of(arguments), arguments.page_tokens, arguments.threads);
  std::vector<Survival> rows;
  for (const std::string& policy : arguments.policies) {
    kvpare::AnyCompressor compressor = compressor_of(policy);
    if (says(policy, "keep")) throw CLI::ValidationError("--policy", policy + ": --show varies the budget itself");
    if (!kvpare::evicts(compressor)) continue;
    if (compressor.keep == kvpare::Keep::ratio(1))
      throw CLI::ValidationError("--policy", policy + " has no budget for --show to vary");
    Survival row{policy, std::vector<std::vector<double>>(layer_count, std::vector<double>(visual_tokens, 0.0))};
    for (const double keep : keeps) {
      compressor.keep = kvpare::Keep::ratio(keep);
      const auto kept = engine->kept_patches(decoder, scene, asked, compressor);
      for (std::size_t l = 0; l < kept.size(); ++l)
        for (const std::vector<Index>& of_head : kept[l])
          for (const Index patch : of_head) row.layers[l][static_cast<std::size_t>(patch)] += 1.0 / kv_heads;
    }
    rows.push_back(std::move(row));
  }
  plot_survival(arguments.plot, scene, "Scene " + std::to_string(arguments.show) + ": which visual tokens stay",
                "asked: " + words_of(set, asked), keeps, rows);
  std::cout << "drew " << arguments.plot << '\n';
  return 0;
}

/// The picture of what each layer keeps.
int show_budgets(const Decoder& decoder, const EvaluationSet& set, const Arguments& arguments) {
  if (arguments.keeps.size() > 1) throw CLI::ValidationError("--keep", "--budgets shows one budget");
  EvaluateOptions options = options_of(set, arguments);
  options.tasks = {first_task(arguments)};
  const std::vector<Setting> settings = make_settings(arguments);
  Progress progress(std::to_string(settings.size()) + " settings, " + std::to_string(options.scenes) + " scenes");
  options.progress = [&](Index done, Index total) { progress(done, total); };
  const std::vector<LayerBudgets> budgets = measure_budgets(decoder, set, settings, options);
  print_budgets(std::cout, settings, budgets, options);
  if (!arguments.plot.empty()) {
    plot_budgets(arguments.plot, settings, budgets, options);
    std::cout << "drew " << arguments.plot << '\n';
  }
  return 0;
}

int run_evaluation(const Decoder& decoder, const EvaluationSet& set, const Arguments& arguments) {
  EvaluateOptions options = options_of(set, arguments);
  const std::vector<Setting> settings = make_settings(arguments);
  Progress progress(std::to_string(settings.size()) + " settings, " + std::to_string(options.scenes) + " scenes");
  options.progress = [&](Index done, Index total) { progress(done, total); };
  const std::vector<Result> results = evaluate(decoder, set, settings, options);

  print_table(std::cout, settings, results, options);
  if (!arguments.json.empty()) {
    write_json(arguments.json, settings, results, options);
    std::cout << "wrote " << arguments.json << '\n';
  }
  if (!arguments.plot.empty()) {
    (arguments.bytes ? plot_accuracy_over_bytes : plot_accuracy)(arguments.plot, settings, results, options);
    std::cout << "drew " << arguments.plot << '\n';
  }
  return 0;
}

void declare(CLI::App& app, Arguments& a) {
  app.add_option("--policy", a.policies,
                 "a policy with its settings, a precision, or both: \"air_cache(alpha=0.5)\", \"kivi(bits=4)\", "
                 "\"air_cache + kivi(bits=4)\"; may be repeated. It evicts visual tokens only, unless it says among=")
      ->allow_extra_args(false);
  app.add_option("--keep", a.keeps,
                 "shares of the visual tokens to keep (default: 0.5,0.2,0.1,0.05,0.02,0.01; with --budgets 0.2)")
      ->delimiter(',')
      ->check(CLI::Range(0.0, 1.0));
  auto* states = app.add_option("--states", a.states, "what codecs have learnt of the model (kvpare_tune --learn); may be repeated")
                     ->allow_extra_args(false);
  app.add_option("--task", a.tasks, "which answers to count")
      ->delimiter(',')
      ->check(CLI::IsMember({"desc", "same", "other", "turn1"}))
      ->capture_default_str();
  app.add_option("--scenes", a.scenes,
                 "how many scenes, from the first (default: " + std::to_string(default_scenes) + "; with --verify all)")
      ->check(CLI::PositiveNumber);
  app.add_option("--device", a.device,
                 "where the cache is, policies choose and attention runs; cuda needs a build with KVPARE_CUDA=ON")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  app.add_option("--threads", a.threads, "dialogues at the same time; with --device cuda each on a stream of its own")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app.add_option("--page-tokens", a.page_tokens, "tokens per page of the cache")
      ->check(CLI::IsMember({16, 32, 64}))
      ->capture_default_str();
  auto* json = app.add_option("--json", a.json, "write the results to this file");
  app.add_option("--plot", a.plot, "draw a picture into this file, .svg or .png (needs gnuplot)");
  app.add_option("--show", a.show, "draw what each policy keeps of this scene instead (with --plot)")
      ->excludes(states)
      ->check(CLI::NonNegativeNumber);
  auto* dump = app.add_option("--dump", a.dump,
                              "write what attention is given for a scene's prompt (that of the first --task) to this "
                              "file instead, for kvpare_inspect")
                   ->excludes(states);
  app.add_option("--scene", a.scene, "with --dump: which scene")
      ->needs(dump)
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--data", a.data, "folder with the model and the evaluation set");
  app.add_flag("--bytes", a.bytes,
               "let the picture show the bytes in use; without --policy: eviction, fewer bits, and both");
  app.add_flag("--budgets", a.budgets,
               "show how many visual tokens each layer keeps after the prompt of the first --task instead")
      ->excludes(json, dump);
  app.add_flag("--demo", a.demo, "write accuracy.svg (where gnuplot is found) and results.json beside this program");
  app.add_flag("--verify", a.verify, "compare the full cache with the reference answers, token for token")->excludes(states);
  app.add_flag("--list", a.list,
               "show the policies and precisions with their settings and sources, and the page formats");
}

/// The demo is an evaluation whose files go beside the program, with a picture where one can be drawn.
void fill_in_demo(Arguments& arguments) {
  if (arguments.json.empty()) arguments.json = program_folder() / "results.json";
  if (!arguments.plot.empty()) return;
  if (example::gnuplot_found())
    arguments.plot = program_folder() / "accuracy.svg";
  else
    std::cout << "There will be no picture: gnuplot was not found (Debian, Ubuntu: apt install gnuplot-nox).\n";
}

std::vector<double> default_keeps(const Arguments& arguments) {
  if (arguments.budgets) return {0.2};
  return {0.5, 0.2, 0.1, 0.05, 0.02, 0.01};
}

std::vector<std::string> default_policies(const Arguments& arguments) {
  if (arguments.bytes) return policies_over_bytes();
  if (arguments.budgets) return policies_with_budgets;
  return arguments.show >= 0 ? shown_policies : compared_policies;
}

int run(Arguments& arguments) {
  check_device(device_of(arguments));
  if (arguments.list) {
    const auto engine = make_engine(device_of(arguments), arguments.page_tokens);
    example::print_policies(std::cout);
    engine->print_formats(std::cout);
    return 0;
  }
  if (arguments.policies.empty()) arguments.policies = default_policies(arguments);
  if (arguments.keeps.empty()) arguments.keeps = default_keeps(arguments);
  if (arguments.demo) fill_in_demo(arguments);
  if (!arguments.plot.empty()) example::check_plot(arguments.plot);
  for (const std::string& path : {arguments.plot, arguments.json})
    if (!path.empty() && !std::ofstream(path, std::ios::app)) throw std::runtime_error(path + ": cannot be written");
  const std::string data = find_data(arguments.data);
  const Decoder decoder(Safetensors::open(data + "/vlm.safetensors"));
  const EvaluationSet set = read_evaluation_set(data);
  if (arguments.verify) return run_verification(decoder, set, arguments);
  if (!arguments.dump.empty()) return dump_scene(decoder, set, arguments);
  if (arguments.show >= 0) return show_scene(decoder, set, arguments);
  if (arguments.budgets) return show_budgets(decoder, set, arguments);
  return run_evaluation(decoder, set, arguments);
}

}  // namespace

int main(int count, char** words) {
  return example::run_program(
      "kvpare_vlm",
      "How many right answers a vision-language model keeps when the visual part of its KV cache shrinks.", count,
      words, declare, run);
}

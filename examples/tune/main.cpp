// kvpare_tune: what codecs do to attention, which widths and budgets each layer should have, and what codecs learn of a model.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <sstream>

#include "learn.hpp"
#include "ratios.hpp"
#include "search.hpp"
#include "support/program.hpp"
#include "support/safetensors.hpp"

namespace {

struct Arguments {
  std::vector<std::string> traces;
  std::string search, learn, out, only;
  double bits = 4, distance = 0.3, ratios = 0;
  std::vector<kvpare::Index> widths{8, 4, 2};
  kvpare::Index rows = 64, group = 32, page_tokens = 64, share = 1, rounds = 12;
};

void declare(CLI::App& app, Arguments& a) {
  app.add_option("--trace", a.traces, "a recorded prompt (see examples/inspect); may be repeated")->allow_extra_args(false);
  app.add_option("--search", a.search, "search widths layer by layer for this mode, kivi or token, on the traces")
      ->check(CLI::IsMember({"kivi", "token"}));
  app.add_option("--bits", a.bits, "with --search: most bits per number, mean over keys, values and layers")
      ->capture_default_str();
  app.add_option("--widths", a.widths, "with --search: widths to choose among")
      ->check(CLI::IsMember({8, 4, 3, 2}))
      ->capture_default_str();
  app.add_option("--distance", a.distance, "with --search: layers whose errors differ less, relatively, choose together")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--ratios", a.ratios, "find how much of each layer PrefixKV keeps of the traces, at this keep ratio")
      ->check(CLI::Range(0.0, 1.0));
  app.add_option("--learn", a.learn,
                 "learn what this policy's codecs share, from the traces: \"kv_quant(bits=3)\", "
                 "\"csr(nonzeros=4, dictionary=n1024)\"");
  app.add_option("--share", a.share, "with --learn, for dictionaries: so many layers in a row have one")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--rounds", a.rounds, "with --learn, for dictionaries: rounds of learning")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--out", a.out, "with --search, --ratios or --learn: write the result to this file");
  app.add_option("--codec", a.only, "without --search, --ratios and --learn: this codec only");
  app.add_option("--rows", a.rows, "without --ratios and --learn: the last so many rows of a prompt ask")->check(CLI::PositiveNumber)->capture_default_str();
  app.add_option("--group", a.group, "numbers per group, for codecs that have groups")
      ->check(CLI::IsMember({8, 32}))
      ->capture_default_str();
  app.add_option("--page-tokens", a.page_tokens, "tokens per page")->check(CLI::IsMember({16, 32, 64}))->capture_default_str();
}

struct DataSet {
  std::string name;
  std::vector<tune::Trial> heads;
};

/// Means over the heads; the largest of the largest.
tune::Difference measure(const DataSet& data, const tune::FormEntry& form, kvpare::Index page_tokens) {
  tune::Difference mean;
  const double n = static_cast<double>(data.heads.size());
  for (const tune::Trial& trial : data.heads) {
    const tune::HeadData& head = trial.data();
    const tune::Difference d =
        trial.compare(form.keys.round_trip(head.keys, head.key_dim, page_tokens, head.facts(kvpare::Side::keys)),
                      form.values.round_trip(head.values, head.value_dim, page_tokens, head.facts(kvpare::Side::values)));
    mean.key_snr += d.key_snr / n, mean.value_snr += d.value_snr / n;
    mean.relative += d.relative / n, mean.cosine += d.cosine / n;
    mean.largest = std::max(mean.largest, d.largest);
  }
  return mean;
}

int print_errors(const Arguments& a) {
  std::vector<DataSet> sets;
  sets.push_back({"normal", {}});
  sets.back().heads.emplace_back(tune::normal_data(512, 128, 4, 16, 0, 1));
  sets.push_back({"4 key channels x20", {}});
  sets.back().heads.emplace_back(tune::normal_data(512, 128, 4, 16, 4, 2));
  for (const std::string& path : a.traces) {
    sets.push_back({path.substr(path.find_last_of('/') + 1), {}});
    for (auto& heads : tune::trace_data(example::read_trace(path), a.rows))
      for (auto& head : heads) sets.back().heads.emplace_back(std::move(head));
  }
  for (const DataSet& set : sets) {
    const tune::HeadData& shape = set.heads[0].data();
    std::printf("\n%s: keys of %ld channels, values of %ld; bits a number of pages, states aside\n\n", set.name.c_str(),
                static_cast<long>(shape.key_dim), static_cast<long>(shape.value_dim));
    std::printf("| codec | bits | keys dB | values dB | output error | 1 - cosine | largest error |\n");
    std::printf("|---|---|---|---|---|---|---|\n");
    for (const tune::FormEntry& form : tune::known_forms(a.group)) {
      const std::string name = form.name();
      if (!a.only.empty() && name != a.only) continue;
      const kvpare::TileShape keys{a.page_tokens, shape.key_dim}, values{a.page_tokens, shape.value_dim};
      if (!form.fits(keys, values)) {
        std::printf("| %s | no tiles of this shape | | | | | |\n", name.c_str());
        continue;
      }
      const tune::Difference d = measure(set, form, a.page_tokens);
      std::printf("| %s | %.2f | %.1f | %.1f | %.2e | %.1e | %.2e |\n", name.c_str(), form.bits(keys, values), d.key_snr,
                  d.value_snr, d.relative, 1 - d.cosine, d.largest);
    }
  }
  return 0;
}

/// To the terminal, and to a file where one is named.
void put(const Arguments& a, const std::string& text) {
  std::cout << text;
  if (a.out.empty()) return;
  std::ofstream file(a.out);
  file << text;
  if (!file.flush()) throw std::runtime_error(a.out + ": cannot be written");
  std::cout << "wrote " << a.out << '\n';
}

int search(const Arguments& a) {
  if (a.traces.empty()) throw std::invalid_argument("--search needs --trace FILE: what should it measure on?");
  const auto mode = a.search == "kivi" ? kvpare::TunedMode::kivi : kvpare::TunedMode::token;
  std::vector<std::vector<tune::HeadData>> layers;
  for (const std::string& path : a.traces) {
    auto of_trace = tune::trace_data(example::read_trace(path), a.rows);
    kvpare::require(layers.empty() || layers.size() == of_trace.size(), path, ": ", of_trace.size(),
                    " layers, the traces before have ", layers.size());
    layers.resize(of_trace.size());
    for (std::size_t l = 0; l < layers.size(); ++l)
      for (auto& head : of_trace[l]) layers[l].push_back(std::move(head));
  }
  const auto all = tune::sensitivities(layers, mode, a.widths, a.group, a.page_tokens);
  std::vector<std::vector<tune::Choice>> surviving;
  std::printf("e_o of keys/values bits; pairs that others beat in bits and error are in brackets\n");
  for (std::size_t l = 0; l < all.size(); ++l) {
    surviving.push_back(tune::pareto(all[l]));
    std::printf("layer %zu:", l);
    for (const tune::Choice& c : all[l]) {
      const bool stays = std::find(surviving[l].begin(), surviving[l].end(), c) != surviving[l].end();
      std::printf(stays ? "  %ld/%ld %.4f" : "  [%ld/%ld %.4f]", static_cast<long>(c.bits.keys),
                  static_cast<long>(c.bits.values), c.e_o);
    }
    std::printf("\n");
  }
  const auto groups = tune::group_layers(surviving, a.distance);
  const auto front = tune::front(surviving, groups);
  const tune::Found& chosen = tune::choose(front, a.bits);
  std::ostringstream text;
  tune::write_result(text, chosen, front, mode, groups);
  std::cout << '\n';
  put(a, text.str());
  return 0;
}

int find_ratios(const Arguments& a) {
  if (a.traces.empty()) throw std::invalid_argument("--ratios needs --trace FILE: what should it measure on?");
  std::vector<std::vector<double>> samples;
  for (const std::string& path : a.traces) samples.push_back(tune::layer_ratios(example::read_trace(path), a.ratios));
  std::ostringstream text;
  tune::write_ratios(text, kvpare::Ratios::mean_of(samples), a.ratios, samples.size());
  put(a, text.str());
  return 0;
}

int learn(const Arguments& a) {
  if (a.out.empty()) throw std::invalid_argument("--learn needs --out FILE: where should it go?");
  std::vector<example::Trace> traces;
  for (const std::string& path : a.traces) traces.push_back(example::read_trace(path));
  const tune::Learnt learnt = tune::learn_states(a.learn, traces, {.share = a.share, .rounds = a.rounds, .page_tokens = a.page_tokens});
  std::cout << print_setting(learnt.states.form) << ": power of what was learnt from over that of the error, dB\n";
  std::printf("| layer | keys | values |\n|---|---|---|\n");
  for (std::size_t l = 0; l < learnt.states.layers.size(); ++l)
    std::printf("| %zu | %.1f | %.1f |\n", l, learnt.key_snr[l], learnt.value_snr[l]);
  example::write_states(a.out, learnt.states);
  std::printf("wrote %s\n", a.out.c_str());
  return 0;
}

int run(Arguments& a) {
  if ((!a.search.empty()) + (a.ratios > 0) + (!a.learn.empty()) > 1)
    throw std::invalid_argument("--search, --ratios and --learn: one at a time");
  if (!a.learn.empty()) return learn(a);
  return a.ratios > 0 ? find_ratios(a) : a.search.empty() ? print_errors(a) : search(a);
}

}  // namespace

int main(int count, char** words) {
  return example::run_program("kvpare_tune", "What codecs do to attention, which widths and budgets each layer should have, and what codecs learn of a model.", count,
                              words, declare, run);
}

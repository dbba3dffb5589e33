#include "report.hpp"

#include <algorithm>
#include <cmath>
#include <iomanip>
#include <nlohmann/json.hpp>
#include <sstream>

#include "support/bad_file.hpp"

namespace story {
namespace {

std::string fixed(double value, int digits) {
  std::ostringstream out;
  out << std::fixed << std::setprecision(digits) << value;
  return out.str();
}

double bits(const Result& result, const Measured& measured) {
  return 8 * result.bytes_per_held_token() / static_cast<double>(measured.numbers);
}

std::string print_acts(const Method& method) {
  if (method.acts != Acts::each_block) return name_of(method.acts);
  return "blocks of " + std::to_string(method.block);
}

}  // namespace

std::string print_budget(const std::optional<kvpare::Keep>& budget) {
  if (!budget) return "-";
  if (budget->unit == kvpare::Keep::Unit::ratio) return kvpare::message(budget->amount * 100, "%");
  return kvpare::print_setting(*budget);
}

void print_table(std::ostream& out, const Measured& measured, const std::vector<Setting>& settings,
                 const std::vector<Result>& results) {
  std::size_t widest = 6;
  for (const Setting& setting : settings) widest = std::max(widest, setting.policy.size());
  const int first = static_cast<int>(widest);
  out << std::left << std::setw(first) << "policy" << std::right << std::setw(8) << "keep"
      << "  " << std::left << std::setw(16) << "acts" << std::right << std::setw(10) << "nats/token" << std::setw(12)
      << "perplexity" << std::setw(9) << "seen" << std::setw(8) << "KiB" << std::setw(7) << "peak" << std::setw(9) << "bytes/t" << std::setw(7)
      << "bits" << std::setw(13) << "attention" << std::setw(10) << "us/token" << '\n';
  for (std::size_t i = 0; i < settings.size(); ++i) {
    const Setting& setting = settings[i];
    const Result& result = results[i];
    if (i > 0 && setting.policy != settings[i - 1].policy) out << '\n';
    out << std::left << std::setw(first) << setting.policy << std::right << std::setw(8) << print_budget(setting.budget)
        << "  " << std::left << std::setw(16) << print_acts(setting.method) << std::right << std::setw(10)
        << fixed(result.nats_per_token(), 4) << std::setw(12) << fixed(std::exp(result.nats_per_token()), 3)
        << std::setw(9) << fixed(result.seen_per_token(), 1) << std::setw(8) << fixed(result.bytes_in_use() / 1024, 1)
        << std::setw(7) << fixed(static_cast<double>(result.peak_page_bytes) / 1024, 0) << std::setw(9)
        << fixed(result.bytes_per_held_token(), 1) << std::setw(7) << fixed(bits(result, measured), 2) << std::setw(13)
        << name_of(result.support) << std::setw(10)
        << fixed(result.us_per_token(), 0) << '\n';
  }
  out << '\n'
      << measured.text << ": " << measured.tokens << " tokens of " << measured.stories
      << (measured.stories == 1 ? " story" : " stories") << ", at most " << measured.rule.most_tokens << " of each.\n"
      << "keep: tokens per kv head of each layer (t), or a share of those read so far. acts: after each token, or\n"
         "after each block of tokens, by the queries of that block, or as tokens grow old. seen: tokens that a query saw in a kv head, "
         "itself\n"
         "included, on average. KiB: whole pages and codec states in use as a token is attended, on average; bytes a\n"
         "token of a layer and kv head, and bits per number, come of that. peak: of pages, of the largest story. "
         "attention:\nthe least of the formats in use. Pages of "
      << measured.options.page_tokens << " tokens. " << measured.options.threads
      << (measured.options.threads == 1 ? " thread.\n" : " threads.\n");
}

void write_json(const std::string& path, const Measured& measured, const std::vector<Setting>& settings,
                const std::vector<Result>& results) {
  using Json = nlohmann::ordered_json;
  Json all = {{"text", measured.text},
              {"stories", measured.stories},
              {"tokens", measured.tokens},
              {"most_tokens_of_a_story", measured.rule.most_tokens},
              {"page_tokens", measured.options.page_tokens},
              {"threads", measured.options.threads},
              {"results", Json::array()}};
  for (std::size_t i = 0; i < settings.size(); ++i) {
    const Setting& setting = settings[i];
    const Result& result = results[i];
    Json keep;
    if (setting.budget)
      keep = setting.budget->unit == kvpare::Keep::Unit::ratio
                 ? Json{{"ratio", setting.budget->amount}}
                 : Json{{"tokens_per_head", static_cast<Index>(setting.budget->amount)}};
    Json entry = {{"policy", setting.policy},
                  {"keep", keep},
                  {"evicts", name_of(setting.method.acts)},
                  {"block_tokens", setting.method.acts == Acts::each_block ? Json(setting.method.block) : Json()},
                  {"nats_per_token", result.nats_per_token()},
                  {"perplexity", std::exp(result.nats_per_token())},
                  {"seen_tokens_per_head", result.seen_per_token()},
                  {"evicted", result.evicted},
                  {"peak_page_bytes", result.peak_page_bytes},
                  {"bytes_in_use", result.bytes_in_use()},
                  {"bytes_per_token", result.bytes_per_held_token()},
                  {"bits_per_number", bits(result, measured)},
                  {"attention", name_of(result.support)},
                  {"us_per_token", result.us_per_token()}};
    all["results"].push_back(std::move(entry));
  }
  example::write_bytes(path, all.dump(1, ' ', false, Json::error_handler_t::replace) + "\n");
}

}  // namespace story

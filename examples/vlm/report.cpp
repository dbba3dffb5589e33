#include "report.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <nlohmann/json.hpp>
#include <sstream>

namespace vlm {
namespace {

std::string fixed(double value, int digits) {
  std::ostringstream out;
  out << std::fixed << std::setprecision(digits) << value;
  return out.str();
}

std::string minutes(double seconds) {
  const auto whole = static_cast<long>(seconds);
  std::ostringstream out;
  out << whole / 60 << ':' << std::setw(2) << std::setfill('0') << whole % 60;
  return out.str();
}

/// Means of what a result sums up.
struct Means {
  explicit Means(const Result& r)
      : kept_visual(r.kept_visual_tokens()), kib_before(static_cast<double>(r.cost.bytes_before) / 1024 / prompts(r)),
        kib_after(static_cast<double>(r.cost.bytes_after) / 1024 / prompts(r)),
        step_us(r.cost.decode_us / static_cast<double>(std::max<Index>(r.cost.decode_steps, 1))),
        prefill_us(r.cost.prefill_us / prompts(r)), compress_us(r.cost.compress_us / prompts(r)),
        kib_answer(r.answer_bytes() / 1024), token_bytes(r.token_bytes()), bits(8 * token_bytes / (2 * head_dim)) {}

  double kept_visual, kib_before, kib_after, step_us, prefill_us, compress_us;
  double kib_answer;         // as an answer begins
  double token_bytes, bits;  // per live token of a kv head, and per number of it

 private:
  static double prompts(const Result& r) { return static_cast<double>(std::max<Index>(r.prompts, 1)); }
};

}  // namespace

Progress::Progress(std::string what)
    : what_(std::move(what)), terminal_(isatty(STDERR_FILENO) == 1), start_(Clock::now()), shown_(start_) {}

void Progress::operator()(Index done, Index total) {
  const auto now = Clock::now();
  const std::chrono::duration<double> since_shown = now - shown_, since_start = now - start_;
  const bool last = done == total;
  const Index tenth = 10 * done / total;
  if (!last && (terminal_ ? since_shown.count() < 0.1 : tenth == shown_tenth_)) return;
  shown_ = now, shown_tenth_ = tenth;
  const double left = since_start.count() * static_cast<double>(total - done) / static_cast<double>(done);
  std::ostringstream line;
  line << what_ << ": " << std::setw(3) << done * 100 / total << " %, " << minutes(since_start.count()) << " gone";
  if (!last) line << ", about " << minutes(left) << " to go";
  std::cerr << (terminal_ ? "\r" : "") << line.str() << (terminal_ ? "\033[K" : "") << (last || !terminal_ ? "\n" : "")
            << std::flush;
}

std::string print_keep(const Setting& setting) {
  if (!setting.keep) return "-";
  std::ostringstream out;
  out << *setting.keep * 100 << '%';
  return out.str();
}

void print_table(std::ostream& out, const std::vector<Setting>& settings, const std::vector<Result>& results,
                 const EvaluateOptions& options) {
  std::size_t widest = 6;
  for (const Setting& setting : settings) widest = std::max(widest, setting.policy.size());
  const int first = static_cast<int>(widest);

  out << '\n' << std::left << std::setw(first) << "" << std::right << std::setw(7) << "";
  out << std::setw(7 * static_cast<int>(options.tasks.size())) << "right answers" << std::setw(10) << "visual"
      << std::setw(24) << "KiB of pages" << std::setw(8) << "bytes" << std::setw(9) << "bits per" << std::setw(13) << "attention"
      << std::setw(8) << "us per" << std::setw(12) << "compress" << '\n';
  out << std::left << std::setw(first) << "policy" << std::right << std::setw(7) << "keep";
  for (const Task task : options.tasks) out << std::setw(7) << name_of(task);
  out << std::setw(10) << "kept" << std::setw(8) << "before" << std::setw(8) << "after" << std::setw(8) << "answer"
      << std::setw(8) << "a token" << std::setw(9) << "number" << std::setw(13) << "runs" << std::setw(8) << "step"
      << std::setw(12) << "of prefill" << '\n';
  for (std::size_t i = 0; i < settings.size(); ++i) {
    const Means mean(results[i]);
    if (i > 0 && settings[i].policy != settings[i - 1].policy) out << '\n';
    out << std::left << std::setw(first) << settings[i].policy << std::right << std::setw(7) << print_keep(settings[i]);
    for (const Task task : options.tasks) {
      const Score& score = results[i][task];
      out << std::setw(7) << fixed(task == Task::desc ? score.by_token() : score.exact(), 3);
    }
    out << std::setw(10) << fixed(mean.kept_visual, 1) << std::setw(8) << fixed(mean.kib_before, 0) << std::setw(8)
        << fixed(mean.kib_after, 0) << std::setw(8) << fixed(mean.kib_answer, 1) << std::setw(8)
        << fixed(mean.token_bytes, 1) << std::setw(9) << fixed(mean.bits, 2) << std::setw(13)
        << name_of(results[i].cost.support) << std::setw(8) << fixed(mean.step_us, 0) << std::setw(10)
        << fixed(100 * mean.compress_us / std::max(mean.prefill_us, 1e-9), 1) << " %\n";
  }
  out << "\ndesc: share of right words; others: share of right answers. visual kept: tokens of " << visual_tokens
      << " per layer and kv head.\nKiB: all pages in use of a dialogue, text included, before and after compressing. "
         "answer: the mean over answers of what is in use as they begin, codec states included; bytes a token of a layer "
         "and kv\nhead, and bits per number, come of that. attention runs: the least of the formats then in use. compress: "
         "watching the\nprefill, scoring, evicting, coding.\n"
      << options.scenes << " scenes, pages of " << options.page_tokens << " tokens, " << options.threads
      << (options.threads == 1 ? " thread.\n" : " threads.\n");
}

void write_json(const std::string& path, const std::vector<Setting>& settings, const std::vector<Result>& results,
                const EvaluateOptions& options) {
  using Json = nlohmann::ordered_json;
  Json all = {{"scenes", options.scenes},
              {"page_tokens", options.page_tokens},
              {"threads", options.threads},
              {"visual_tokens", visual_tokens},
              {"results", Json::array()}};
  for (std::size_t i = 0; i < settings.size(); ++i) {
    const Means mean(results[i]);
    Json tasks = Json::object();
    for (const Task task : options.tasks) {
      const Score& score = results[i][task];
      tasks[std::string(name_of(task))] = {{"answers", score.answers},
                                           {"exact", score.exact()},
                                           {"tokens", score.tokens},
                                           {"by_token", score.by_token()},
                                           {"answer_bytes", score.answer_bytes()}};
    }
    Json entry = {{"policy", settings[i].policy},
                  {"keep", settings[i].keep ? Json(*settings[i].keep) : Json()},
                  {"tasks", tasks},
                  {"kept_visual_tokens", mean.kept_visual},
                  {"bytes_before", mean.kib_before * 1024},
                  {"bytes_after", mean.kib_after * 1024},
                  {"answer_bytes", mean.kib_answer * 1024},
                  {"bytes_per_token", mean.token_bytes},
                  {"bits_per_number", mean.bits},
                  {"attention", name_of(results[i].cost.support)},
                  {"decode_step_us", mean.step_us},
                  {"prefill_us", mean.prefill_us},
                  {"compress_us", mean.compress_us}};
    all["results"].push_back(std::move(entry));
  }
  std::ofstream file(path);
  file << all.dump(1) << '\n';
  file.close();
  if (!file) throw std::runtime_error(path + ": cannot be written");
}

}  // namespace vlm

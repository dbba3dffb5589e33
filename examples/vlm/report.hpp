// What comes out of an evaluation: progress on the way, a table for people, a JSON file for programs.
#pragma once

#include <chrono>
#include <ostream>
#include <string>
#include <vector>

#include "evaluate.hpp"

namespace vlm {

/// Shows how far a long work is: one line that renews itself on a terminal, a line per tenth elsewhere.
class Progress {
 public:
  explicit Progress(std::string what);
  void operator()(Index done, Index total);

 private:
  using Clock = std::chrono::steady_clock;
  std::string what_;
  bool terminal_;
  Clock::time_point start_, shown_;
  Index shown_tenth_ = 0;
};

/// "keep" of a setting in the words of the table: "10%", or "-".
std::string print_keep(const Setting& setting);

void print_table(std::ostream& out, const std::vector<Setting>& settings, const std::vector<Result>& results,
                 const EvaluateOptions& options);

/// Throws std::runtime_error when the file cannot be written.
void write_json(const std::string& path, const std::vector<Setting>& settings, const std::vector<Result>& results,
                const EvaluateOptions& options);

}  // namespace vlm

// What comes out of a measurement: a table for people, a JSON file for programs.
#pragma once

#include <ostream>

#include "evaluate.hpp"
#include "text.hpp"

namespace story {

/// "16t", "25%", or "-" for none.
std::string print_budget(const std::optional<kvpare::Keep>& budget);

/// What was measured, in words of the report.
struct Measured {
  std::string text;  // the file
  Index stories = 0, tokens = 0;
  TextRule rule;
  EvaluateOptions options;
  Index numbers = 16;  // of one token in a kv head: key and value channels
};

void print_table(std::ostream& out, const Measured& measured, const std::vector<Setting>& settings,
                 const std::vector<Result>& results);

/// Throws BadFile when the file cannot be written.
void write_json(const std::string& path, const Measured& measured, const std::vector<Setting>& settings,
                const std::vector<Result>& results);

}  // namespace story

// What an inspection found: a table for people, a JSON file for programs (its form: README.md).
#pragma once

#include <ostream>
#include <string>
#include <vector>

#include "inspect.hpp"

namespace inspect {

/// Consecutive tokens of one class.
struct ClassRun {
  std::string name;  // "text", "image", ..., "class 7" of the recorder's own
  std::uint8_t token_class = 0;
  Index begin = 0, end = 0;  // indices of tokens
};
std::vector<ClassRun> class_runs(const example::Trace& trace);

/// "166 tokens (22 text, 144 image)"
std::string print_tokens(const example::Trace& trace);

void print_tables(std::ostream& out, const std::string& file, const example::Trace& trace,
                  const std::vector<Result>& results, const Options& options);

/// Raised whenever a program that reads the JSON would have to change.
inline constexpr int json_version = 1;

std::string print_json(const std::string& file, const example::Trace& trace, const std::vector<Result>& results,
                       const Options& options);

}  // namespace inspect

// The one error that files give, and whole files as bytes.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace example {

/// A file is missing, is not what it should be, or cannot be written. The message says which file, what is wrong and what was wanted.
struct BadFile : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// `expect(size == 12, file, "header is ", size, " bytes, must be 12")` throws BadFile unless the condition holds.
template <class... Parts>
void expect(bool holds, const std::string& file, const Parts&... parts) {
  if (holds) return;
  std::ostringstream out;
  out << file << ": ";
  (out << ... << parts);
  throw BadFile(out.str());
}

/// All bytes of a file. Throws BadFile when it cannot be read.
std::string read_bytes(const std::string& path);

/// Makes a file of these bytes. Throws BadFile when it cannot be written.
void write_bytes(const std::string& path, const std::string& bytes);

}  // namespace example

#include "bad_file.hpp"

#include <filesystem>
#include <fstream>
#include <iterator>

namespace example {

std::string read_bytes(const std::string& path) {
  std::error_code unreadable;
  std::ifstream in(path, std::ios::binary);
  expect(in.good() && std::filesystem::is_regular_file(path, unreadable), path, "cannot be opened");
  std::string bytes{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  expect(!in.bad(), path, "cannot be read");
  return bytes;
}

void write_bytes(const std::string& path, const std::string& bytes) {
  std::ofstream out(path, std::ios::binary);
  out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  out.close();
  expect(!out.fail(), path, "cannot be written");
}

}  // namespace example

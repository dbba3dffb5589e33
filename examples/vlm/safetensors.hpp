// Reads safetensors files: named arrays in one file.
//
//   8 bytes     n, the length of the header, little-endian
//   n bytes     JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ..., "__metadata__": {...}}
//   the rest    the arrays, row by row, little-endian; offsets count from here and leave neither holes nor overlaps
//
// A file is checked as a whole when it is opened, so that nothing read from it later can be out of bounds.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "bad_file.hpp"

namespace vlm {

class Safetensors {
 public:
  struct Array {
    std::string dtype;
    std::vector<std::uint64_t> shape;
    std::uint64_t begin = 0, end = 0;  // bytes within the data; end - begin is exactly what dtype and shape say
  };

  static constexpr std::uint64_t max_header_bytes = 100'000'000;  // as the format's own reader has it

  /// Throws BadFile.
  static Safetensors open(const std::string& path) { return parse(read_bytes(path), path); }

  /// `name` stands for the file in messages. Throws BadFile.
  static Safetensors parse(std::string bytes, std::string name);

  const std::map<std::string, Array>& arrays() const { return arrays_; }

  /// The values of an F32 array that must have this shape. Throws BadFile.
  std::vector<float> floats(const std::string& array, const std::vector<std::uint64_t>& shape) const;

 private:
  std::string file_;
  std::string bytes_;
  std::uint64_t data_begin_ = 0;
  std::map<std::string, Array> arrays_;
};

}  // namespace vlm

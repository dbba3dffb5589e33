// Reads and writes safetensors files: named arrays in one file.
//
//   8 bytes     n, the length of the header, little-endian
//   n bytes     JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ..., "__metadata__": {...}}
//   the rest    the arrays, row by row, little-endian; offsets count from here and leave neither holes nor overlaps
//
// "__metadata__", where there is one, holds texts by name. A file is checked as a whole when it is opened, so that
// nothing read from it later can be out of bounds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "bad_file.hpp"

namespace example {

class Safetensors {
 public:
  using Shape = std::vector<std::uint64_t>;
  using Metadata = std::map<std::string, std::string>;

  struct Array {
    std::string dtype;
    Shape shape;
    std::uint64_t begin = 0, end = 0;  // bytes within the data; end - begin is exactly what dtype and shape say
  };

  static constexpr std::uint64_t max_header_bytes = 100'000'000;  // as the format's own reader has it

  /// Throws BadFile.
  static Safetensors open(const std::string& path) { return parse(read_bytes(path), path); }

  /// `name` stands for the file in messages. Throws BadFile.
  static Safetensors parse(std::string bytes, std::string name);

  const std::string& file() const { return file_; }
  const std::map<std::string, Array>& arrays() const { return arrays_; }
  const Metadata& metadata() const { return metadata_; }

  /// These throw BadFile when the array is missing, of another type or of another shape.
  const Array& array(const std::string& name) const;
  /// The values of an F32, F16 or BF16 array, which convert exactly.
  std::vector<float> floats(const std::string& name, const Shape& shape) const;
  /// U8.
  std::vector<std::uint8_t> bytes(const std::string& name, const Shape& shape) const;
  /// I32.
  std::vector<std::int32_t> integers(const std::string& name, const Shape& shape) const;

  /// The values of an array of any type as they stand in the file, at any address. Valid as long as this is.
  std::span<const std::byte> raw(const std::string& name) const;

 private:
  const Array& array(const std::string& name, const char* types, const Shape& shape) const;
  template <class T>
  std::vector<T> copy(const std::string& name) const;

  std::string file_;
  std::string bytes_;
  std::uint64_t data_begin_ = 0;
  std::map<std::string, Array> arrays_;
  Metadata metadata_;
};

/// "[2, 3]"
std::string print(const Safetensors::Shape& shape);

/// Collects arrays and writes them. The same arrays and texts give the same bytes, in whatever order they were added;
/// every array starts at a multiple of its type's size.
class SafetensorsWriter {
 public:
  Safetensors::Metadata metadata;

  /// A dtype of the format, and as many bytes as it and the shape say, which must live until `bytes` or `write`.
  /// Throws std::invalid_argument on anything else, or a name that is already there.
  void add(const std::string& name, const std::string& dtype, Safetensors::Shape shape,
           std::span<const std::byte> values);
  void add(const std::string& name, Safetensors::Shape shape, std::span<const float> values) {
    add(name, "F32", std::move(shape), std::as_bytes(values));
  }
  void add(const std::string& name, Safetensors::Shape shape, std::span<const std::uint8_t> values) {
    add(name, "U8", std::move(shape), std::as_bytes(values));
  }
  void add(const std::string& name, Safetensors::Shape shape, std::span<const std::int32_t> values) {
    add(name, "I32", std::move(shape), std::as_bytes(values));
  }

  /// The whole file. Throws std::invalid_argument when names or texts are not UTF-8.
  std::string bytes() const;

  /// Throws BadFile when the file cannot be written.
  void write(const std::string& path) const { write_bytes(path, bytes()); }

 private:
  struct Array {
    std::string dtype;
    Safetensors::Shape shape;
    std::span<const std::byte> values;
  };
  std::map<std::string, Array> arrays_;
};

}  // namespace example

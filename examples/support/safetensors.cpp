#include "safetensors.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <kvpare/core/dtype.hpp>
#include <nlohmann/json.hpp>
#include <set>
#include <stdexcept>
#include <string_view>

namespace example {
namespace {

using nlohmann::json;

constexpr const char* metadata_name = "__metadata__";

std::uint64_t little_endian(std::string_view eight) {
  std::uint64_t value = 0;
  for (int i = 7; i >= 0; --i) value = value << 8 | static_cast<unsigned char>(eight[static_cast<std::size_t>(i)]);
  return value;
}

/// Bytes per value, 0 for a type that the format does not have.
std::uint64_t value_bytes(std::string_view dtype) {
  static constexpr std::pair<std::string_view, std::uint64_t> known[] = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E5M2", 1}, {"F8_E4M3", 1}, {"I16", 2}, {"U16", 2}, {"F16", 2},
      {"BF16", 2}, {"I32", 4}, {"U32", 4}, {"F32", 4},     {"F64", 8},     {"I64", 8}, {"U64", 8}};
  for (const auto& [name, bytes] : known)
    if (name == dtype) return bytes;
  return 0;
}

/// Refuses what no header has: names that occur twice (a reader would silently take one) and deep nesting.
class HeaderGuard {
 public:
  explicit HeaderGuard(const std::string& file) : file_(file) {}

  bool operator()(int depth, json::parse_event_t event, json& value) {
    if (event == json::parse_event_t::object_start || event == json::parse_event_t::array_start) {
      expect(depth < deepest, file_, "header is nested deeper than ", deepest, " levels");
      names_[depth].clear();
    }
    if (event == json::parse_event_t::key) {
      const auto& name = value.get_ref<const std::string&>();
      expect(names_[depth - 1].insert(name).second, file_, "header has '", name, "' twice");
    }
    return true;
  }

 private:
  static constexpr int deepest = 3;  // the header, an array in it, its shape
  const std::string& file_;
  std::set<std::string> names_[deepest];
};

json parse_header(const std::string& file, std::string_view text) {
  HeaderGuard guard(file);
  try {
    return json::parse(text.begin(), text.end(), std::ref(guard));
  } catch (const json::exception& error) {
    throw BadFile(file + ": header is not JSON: " + error.what());
  }
}

Safetensors::Metadata parse_metadata(const std::string& file, const json& texts) {
  expect(texts.is_object(), file, "__metadata__ is ", texts.type_name(), ", must be an object of texts");
  Safetensors::Metadata metadata;
  for (const auto& [name, text] : texts.items()) {
    expect(text.is_string(), file, "__metadata__: '", name, "' is ", text.type_name(), ", must be a text");
    metadata[name] = text.get<std::string>();
  }
  return metadata;
}

std::vector<std::uint64_t> numbers(const std::string& file, const std::string& array, const json& entry,
                                   const char* field) {
  const auto found = entry.find(field);
  expect(found != entry.end() && found->is_array(), file, "array '", array, "': ", field, " is missing or no list");
  std::vector<std::uint64_t> out;
  for (const json& number : *found) {
    expect(number.is_number_unsigned(), file, "array '", array, "': ", field, " holds ", number.dump(),
           ", must be whole numbers from 0 to 2^64 - 1");
    out.push_back(number.get<std::uint64_t>());
  }
  return out;
}

Safetensors::Array parse_array(const std::string& file, const std::string& name, const json& entry,
                               std::uint64_t data_bytes) {
  expect(entry.is_object(), file, "array '", name, "' is described by ", entry.type_name(), ", must be an object");
  const auto dtype = entry.find("dtype");
  expect(dtype != entry.end() && dtype->is_string(), file, "array '", name, "': dtype is missing or no text");

  Safetensors::Array array;
  array.dtype = dtype->get<std::string>();
  array.shape = numbers(file, name, entry, "shape");
  std::uint64_t bytes = value_bytes(array.dtype);
  expect(bytes > 0, file, "array '", name, "': dtype '", array.dtype, "' is unknown");
  for (const std::uint64_t extent : array.shape)
    expect(!__builtin_mul_overflow(bytes, extent, &bytes), file, "array '", name, "': shape ", print(array.shape),
           " is more than 2^64 bytes");

  const auto offsets = numbers(file, name, entry, "data_offsets");
  expect(offsets.size() == 2 && offsets[0] <= offsets[1] && offsets[1] <= data_bytes, file, "array '", name,
         "': data_offsets ", print(offsets), ", must be [begin, end] with begin <= end <= ", data_bytes,
         ", the bytes after the header");
  array.begin = offsets[0], array.end = offsets[1];
  expect(array.end - array.begin == bytes, file, "array '", name, "': ", array.end - array.begin, " bytes, ",
         array.dtype, " of shape ", print(array.shape), " takes ", bytes);
  return array;
}

void check_covered(const std::string& file, const std::map<std::string, Safetensors::Array>& arrays,
                   std::uint64_t data_bytes) {
  std::vector<std::pair<std::uint64_t, std::uint64_t>> spans;
  for (const auto& [name, array] : arrays) spans.emplace_back(array.begin, array.end);
  std::sort(spans.begin(), spans.end());
  std::uint64_t covered = 0;
  for (const auto& [begin, end] : spans) {
    expect(begin == covered, file, "arrays ", begin < covered ? "overlap" : "leave a hole", " at byte ",
           std::min(begin, covered), " of the data");
    covered = end;
  }
  expect(covered == data_bytes, file, data_bytes - covered, " bytes at the end belong to no array");
}

}  // namespace

std::string print(const Safetensors::Shape& shape) {
  std::string out = "[";
  for (std::size_t d = 0; d < shape.size(); ++d) out += (d > 0 ? ", " : "") + std::to_string(shape[d]);
  return out + "]";
}

Safetensors Safetensors::parse(std::string bytes, std::string name) {
  Safetensors file;
  file.file_ = std::move(name);
  file.bytes_ = std::move(bytes);
  const std::string_view all = file.bytes_;
  expect(all.size() >= 8, file.file_, all.size(), " bytes, too short for the length of a header (8 bytes)");
  const std::uint64_t header_bytes = little_endian(all.substr(0, 8));
  expect(header_bytes <= max_header_bytes, file.file_, "header of ", header_bytes, " bytes, must be at most ",
         max_header_bytes);
  expect(header_bytes <= all.size() - 8, file.file_, "header of ", header_bytes, " bytes, only ", all.size() - 8,
         " follow its length");
  file.data_begin_ = 8 + header_bytes;
  const std::uint64_t data_bytes = all.size() - file.data_begin_;

  const json header = parse_header(file.file_, all.substr(8, header_bytes));
  expect(header.is_object(), file.file_, "header is ", header.type_name(), ", must be an object");
  for (const auto& [array, entry] : header.items()) {
    if (array == metadata_name)
      file.metadata_ = parse_metadata(file.file_, entry);
    else
      file.arrays_[array] = parse_array(file.file_, array, entry, data_bytes);
  }
  check_covered(file.file_, file.arrays_, data_bytes);
  return file;
}

const Safetensors::Array& Safetensors::array(const std::string& name) const {
  const auto found = arrays_.find(name);
  expect(found != arrays_.end(), file_, "array '", name, "' is missing");
  return found->second;
}

const Safetensors::Array& Safetensors::array(const std::string& name, const char* types, const Shape& shape) const {
  const Array& found = array(name);
  // `types` is a list of names, none of which is part of another.
  expect(std::string_view(types).find(found.dtype) != std::string_view::npos, file_, "array '", name, "': dtype ",
         found.dtype, ", must be ", types);
  expect(found.shape == shape, file_, "array '", name, "': shape ", print(found.shape), ", must be ", print(shape));
  return found;
}

std::span<const std::byte> Safetensors::raw(const std::string& name) const {
  const Array& found = array(name);
  return std::as_bytes(std::span(bytes_)).subspan(data_begin_ + found.begin, found.end - found.begin);
}

template <class T>
std::vector<T> Safetensors::copy(const std::string& name) const {
  static_assert(std::endian::native == std::endian::little, "values are copied as they stand in the file");
  const auto from = raw(name);
  std::vector<T> values(from.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), from.data(), from.size());
  return values;
}

std::vector<float> Safetensors::floats(const std::string& name, const Shape& shape) const {
  const Array& found = array(name, "F32, F16 or BF16", shape);
  if (found.dtype == "F32") return copy<float>(name);
  const auto widened = [&](const auto& narrow) {
    std::vector<float> values;
    values.reserve(narrow.size());
    for (const auto value : narrow) values.push_back(static_cast<float>(value));
    return values;
  };
  return found.dtype == "F16" ? widened(copy<kvpare::half>(name)) : widened(copy<kvpare::bfloat16>(name));
}

std::vector<std::uint8_t> Safetensors::bytes(const std::string& name, const Shape& shape) const {
  array(name, "U8", shape);
  return copy<std::uint8_t>(name);
}

std::vector<std::int32_t> Safetensors::integers(const std::string& name, const Shape& shape) const {
  array(name, "I32", shape);
  return copy<std::int32_t>(name);
}

void SafetensorsWriter::add(const std::string& name, const std::string& dtype, Safetensors::Shape shape,
                            std::span<const std::byte> values) {
  const auto refuse = [&](const std::string& what) { throw std::invalid_argument("array '" + name + "': " + what); };
  std::uint64_t bytes = value_bytes(dtype);
  if (bytes == 0) refuse("dtype '" + dtype + "' is unknown");
  for (const std::uint64_t extent : shape)
    if (__builtin_mul_overflow(bytes, extent, &bytes)) refuse("shape " + print(shape) + " is more than 2^64 bytes");
  if (bytes != values.size())
    refuse(std::to_string(values.size()) + " bytes, " + dtype + " of shape " + print(shape) + " takes " +
           std::to_string(bytes));
  if (name == metadata_name) refuse("the name stands for the texts of the file");
  if (!arrays_.try_emplace(name, Array{dtype, std::move(shape), values}).second) refuse("is already there");
}

std::string SafetensorsWriter::bytes() const {
  static_assert(std::endian::native == std::endian::little, "values are written as they stand in memory");
  // The largest types first, so that each array is aligned behind the one before.
  std::vector<const std::pair<const std::string, Array>*> sorted;
  for (const auto& array : arrays_) sorted.push_back(&array);
  std::stable_sort(sorted.begin(), sorted.end(), [](const auto* a, const auto* b) {
    return value_bytes(a->second.dtype) > value_bytes(b->second.dtype);
  });

  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header[metadata_name] = metadata;
  std::uint64_t begin = 0;
  for (const auto* array : sorted) {
    const auto& [name, described] = *array;
    const std::uint64_t end = begin + described.values.size();
    header[name] = {{"dtype", described.dtype}, {"shape", described.shape}, {"data_offsets", {begin, end}}};
    begin = end;
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const json::exception& error) {
    throw std::invalid_argument(std::string("safetensors: ") + error.what());
  }
  text.resize((text.size() + 7) / 8 * 8, ' ');

  std::string all;
  all.reserve(8 + text.size() + begin);
  for (int i = 0; i < 8; ++i) all += static_cast<char>(text.size() >> (8 * i) & 0xff);
  all += text;
  for (const auto* array : sorted) {
    const auto& values = array->second.values;
    if (!values.empty()) all.append(reinterpret_cast<const char*>(values.data()), values.size());
  }
  return all;
}

}  // namespace example

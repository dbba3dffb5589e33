#include "trace.hpp"

#include <charconv>
#include <cmath>
#include <cstring>
#include <kvpare/cache/tags.hpp>
#include <limits>
#include <set>

namespace example {
namespace {

using kvpare::DType;

const char* dtype_name(DType type) { return type == DType::f32 ? "F32" : type == DType::f16 ? "F16" : "BF16"; }

Safetensors::Shape shape_of(const TraceArray& a) {
  return {static_cast<std::uint64_t>(a.rows), static_cast<std::uint64_t>(a.heads), static_cast<std::uint64_t>(a.width)};
}

std::string array_name(std::size_t layer, char which) { return "layers." + std::to_string(layer) + "." + which; }

TraceArray read_array(const Safetensors& file, const std::string& name) {
  const Safetensors::Array& found = file.array(name);
  TraceArray array;
  if (found.dtype == "F16")
    array.dtype = DType::f16;
  else if (found.dtype == "BF16")
    array.dtype = DType::bf16;
  else
    expect(found.dtype == "F32", file.file(), "array '", name, "': dtype ", found.dtype, ", must be F32, F16 or BF16");
  expect(found.shape.size() == 3, file.file(), "array '", name, "': shape ", print(found.shape),
         ", must be [tokens, heads, width]");
  // An extent may be huge where another is 0; those are refused below, here they must only not overflow.
  for (const std::uint64_t extent : found.shape)
    expect(extent <= std::numeric_limits<std::int32_t>::max(), file.file(), "array '", name, "': shape ",
           print(found.shape), ", no extent may exceed ", std::numeric_limits<std::int32_t>::max());
  array.rows = static_cast<Index>(found.shape[0]);
  array.heads = static_cast<Index>(found.shape[1]);
  array.width = static_cast<Index>(found.shape[2]);
  const auto raw = file.raw(name);
  array.values.assign(raw.begin(), raw.end());
  return array;
}

/// A positive number below the largest float. Throws BadFile.
float read_scale(const std::string& file, const std::string& text) {
  float scale = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), scale);
  expect(error == std::errc{} && end == text.data() + text.size(), file, "softmax_scale is '", text,
         "', must be a number");
  return scale;
}

/// How the texts say that queries and keys were rotated. Throws BadFile.
std::optional<kvpare::Rope> read_rope(const std::string& file, const std::map<std::string, std::string>& texts,
                                      Index key_dim) {
  const auto text = [&](const char* name) {
    const auto found = texts.find(name);
    return found == texts.end() ? std::string() : found->second;
  };
  const std::string theta = text("rope_theta"), pairing = text("rope_pairing"), type = text("rope_type");
  if (theta.empty() || pairing.empty() || !text("rope_sections").empty() || (!type.empty() && type != "default")) return {};
  const auto number = [&](const char* name, const std::string& words) {
    double value = 0;
    const auto [end, error] = std::from_chars(words.data(), words.data() + words.size(), value);
    expect(error == std::errc{} && end == words.data() + words.size() && value > 1 && std::isfinite(value), file, name,
           " is '", words, "', must be a number above 1");
    return value;
  };
  const double base = number("rope_theta", theta);
  const double dim = text("rope_dim").empty() ? static_cast<double>(key_dim) : number("rope_dim", text("rope_dim"));
  expect(pairing == "halves" || pairing == "interleaved", file, "rope_pairing is '", pairing,
         "', must be halves or interleaved");
  expect(dim <= static_cast<double>(key_dim) && dim == 2 * std::floor(dim / 2), file, "rope_dim is ", dim,
         ", must be even and at most the width of the keys, ", key_dim);
  return kvpare::rope_of_base(static_cast<Index>(dim), base,
                              pairing == "halves" ? kvpare::RopePairing::halves : kvpare::RopePairing::interleaved);
}

std::string print_scale(float scale) {
  char text[32];
  return {text, std::to_chars(text, text + sizeof text, scale).ptr};
}

/// Refuses arrays that belong to no layer and nothing else: a misspelt name would be silently ignored.
std::size_t count_layers(const Safetensors& file) {
  std::set<std::size_t> layers;
  for (const auto& [name, array] : file.arrays()) {
    if (name == "positions" || name == "token_class") continue;
    std::size_t layer = 0;
    const char* begin = name.data() + 7;
    const char* end = name.data() + name.size();
    bool known = name.rfind("layers.", 0) == 0;
    if (known) {
      const auto [after, error] = std::from_chars(begin, end, layer);
      const std::string which(after, end);
      known = error == std::errc{} && (which == ".q" || which == ".k" || which == ".v") &&
              name == array_name(layer, which[1]);
    }
    expect(known, file.file(), "array '", name,
           "' is no part of a trace; known: layers.N.q, layers.N.k, layers.N.v, positions, token_class");
    layers.insert(layer);
  }
  expect(!layers.empty(), file.file(), "no layers: array 'layers.0.q' is missing");
  std::size_t next = 0;
  for (const std::size_t layer : layers) {
    expect(layer == next, file.file(), "layer ", next, " is missing although there is a layer ", *layers.rbegin(),
           ", layers must be numbered from 0 without a gap");
    ++next;
  }
  return next;
}

/// Everything that the pieces of a trace promise each other.
void check(const std::string& file, const Trace& trace) {
  expect(!trace.layers.empty(), file, "no layers");
  expect(trace.tokens() > 0, file, "no tokens");
  for (std::size_t t = 0; t < trace.positions.size(); ++t) {
    const Position before = t > 0 ? trace.positions[t - 1] : -1, here = trace.positions[t];
    expect(here > before && here<std::numeric_limits<Position>::max(), file, "positions: ", here, " of token ", t, t> 0
               ? " follows " + std::to_string(before)
               : std::string(" comes first"),
           ", must ascend from 0 on and stay below ", std::numeric_limits<Position>::max());
  }
  expect(trace.token_class.empty() || trace.token_class.size() == trace.positions.size(), file,
         "token_class: ", trace.token_class.size(), " tokens, positions: ", trace.positions.size(),
         ", must be the same");
  for (std::size_t t = 0; t < trace.token_class.size(); ++t)
    expect(trace.token_class[t] < kvpare::token_classes, file, "token_class: ", int{trace.token_class[t]}, " of token ",
           t, ", must be below ", kvpare::token_classes);
  if (trace.softmax_scale)
    expect(*trace.softmax_scale > 0 && std::isfinite(*trace.softmax_scale), file, "softmax_scale is ",
           *trace.softmax_scale, ", must be positive and finite");
  expect(trace.metadata.count("softmax_scale") == 0, file, "softmax_scale is among the other texts too");

  for (std::size_t l = 0; l < trace.layers.size(); ++l) {
    const auto& [q, k, v] = trace.layers[l];
    for (const auto& [array, which] : {std::pair(&q, 'q'), std::pair(&k, 'k'), std::pair(&v, 'v')}) {
      const std::string name = array_name(l, which);
      expect(array->rows == trace.tokens(), file, "array '", name, "': ", array->rows,
             " tokens, positions: ", trace.tokens(), ", must be the same");
      expect(array->heads >= 1 && array->width >= 1 && array->width <= 4096, file, "array '", name, "': shape ",
             print(shape_of(*array)), ", must have a head and a width within [1, 4096]");
      expect(array->values.size() ==
                 static_cast<std::size_t>(array->rows * array->heads * array->width * size_of(array->dtype)),
             file, "array '", name, "': ", array->values.size(), " bytes do not fill shape ", print(shape_of(*array)));
    }
    expect(q.heads % k.heads == 0, file, "layer ", l, ": ", q.heads, " query heads, must be a multiple of its ",
           k.heads, " kv heads");
    expect(v.heads == k.heads, file, "layer ", l, ": values have ", v.heads, " heads, keys ", k.heads,
           ", must be the same");
    expect(q.width == k.width, file, "layer ", l, ": queries are ", q.width, " wide, keys ", k.width,
           ", must be the same");
    read_rope(file, trace.metadata, k.width);
  }
}

}  // namespace

kvpare::ConstTensor TraceArray::tensor() const {
  return with_type(dtype, [&](auto* type) {
    return kvpare::ConstTensor(reinterpret_cast<decltype(type)>(const_cast<std::byte*>(values.data())), rows, heads,
                               width);
  });
}

void TraceArray::append(const kvpare::ConstTensor& more) {
  if (rows == 0) dtype = more.dtype, heads = more.heads, width = more.width;
  kvpare::require(more.dtype == dtype && more.heads == heads && more.width == width, "trace: rows of [", more.heads,
                  ", ", more.width, "] ", name_of(more.dtype), ", must be [", heads, ", ", width, "] ", name_of(dtype),
                  " like those before");
  const auto row_bytes = static_cast<std::size_t>(width * size_of(dtype));
  std::size_t at = values.size();
  values.resize(at + static_cast<std::size_t>(more.rows * heads) * row_bytes);
  for (Index r = 0; r < more.rows; ++r)
    for (Index h = 0; h < heads; ++h, at += row_bytes) std::memcpy(values.data() + at, more.at(r, h), row_bytes);
  rows += more.rows;
}

void Trace::append(Index layer, const kvpare::ConstTensor& queries, const kvpare::ConstTensor& keys,
                   const kvpare::ConstTensor& values) {
  kvpare::require(layer >= 0, "trace: layer = ", layer, ", must not be negative");
  if (layer >= std::ssize(layers)) layers.resize(static_cast<std::size_t>(layer) + 1);
  TraceLayer& at = layers[static_cast<std::size_t>(layer)];
  at.queries.append(queries);
  at.keys.append(keys);
  at.values.append(values);
}

std::optional<DType> Trace::common_dtype() const {
  const DType first = layers.front().keys.dtype;
  for (const TraceLayer& layer : layers)
    for (const TraceArray* array : {&layer.queries, &layer.keys, &layer.values})
      if (array->dtype != first) return {};
  return first;
}

kvpare::Model Trace::model() const {
  kvpare::Model model;
  for (const auto& [q, k, v] : layers) {
    const float scale = softmax_scale.value_or(1 / std::sqrt(static_cast<float>(k.width)));
    model.layers.push_back({.q_heads = q.heads, .kv_heads = k.heads, .key_dim = k.width, .value_dim = v.width,
                            .scale = scale, .rope = read_rope("trace", metadata, k.width)});
  }
  return model;
}

Trace parse_trace(const Safetensors& file) {
  Trace trace;
  trace.metadata = file.metadata();
  if (const auto scale = trace.metadata.extract("softmax_scale"))
    trace.softmax_scale = read_scale(file.file(), scale.mapped());
  trace.layers.resize(count_layers(file));
  const auto tokens = [&](const std::string& name) {
    const Safetensors::Shape& shape = file.array(name).shape;
    expect(shape.size() == 1, file.file(), "array '", name, "': shape ", print(shape), ", must be [tokens]");
    return shape;
  };
  trace.positions = file.integers("positions", tokens("positions"));
  if (file.arrays().count("token_class") > 0) {
    trace.token_class = file.bytes("token_class", tokens("token_class"));
    expect(trace.token_class.size() == trace.positions.size(), file.file(), "token_class: ", trace.token_class.size(),
           " tokens, positions: ", trace.positions.size(), ", must be the same");
  }
  for (std::size_t l = 0; l < trace.layers.size(); ++l)
    trace.layers[l] = {read_array(file, array_name(l, 'q')), read_array(file, array_name(l, 'k')),
                       read_array(file, array_name(l, 'v'))};
  check(file.file(), trace);
  return trace;
}

Trace read_trace(const std::string& path) { return parse_trace(Safetensors::open(path)); }

std::string print_trace(const Trace& trace, const std::string& name) {
  check(name, trace);
  SafetensorsWriter out;
  out.metadata = trace.metadata;
  if (trace.softmax_scale) out.metadata["softmax_scale"] = print_scale(*trace.softmax_scale);
  out.add("positions", {trace.positions.size()}, std::span(trace.positions));
  if (!trace.token_class.empty()) out.add("token_class", {trace.token_class.size()}, std::span(trace.token_class));
  for (std::size_t l = 0; l < trace.layers.size(); ++l) {
    const auto& [q, k, v] = trace.layers[l];
    for (const auto& [array, which] : {std::pair(&q, 'q'), std::pair(&k, 'k'), std::pair(&v, 'v')})
      out.add(array_name(l, which), dtype_name(array->dtype), shape_of(*array), array->values);
  }
  return out.bytes();
}

void write_trace(const std::string& path, const Trace& trace) { write_bytes(path, print_trace(trace, path)); }

}  // namespace example

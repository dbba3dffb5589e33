// Snapshots taken apart and put together by hand, as the first lines of runtime/snapshot.hpp describe them: a second
// writer beside the library's, and one that also writes nonsense, checksums correct.
#pragma once

#include <cstring>
#include <kvpare/cache/sequence_image.hpp>
#include <kvpare/core/shape.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kvpare::test {

/// CRC-32 of IEEE 802.3, bit by bit.
inline std::uint32_t crc32(std::string_view bytes) {
  std::uint32_t crc = 0xffffffffu;
  for (const char byte : bytes) {
    crc ^= static_cast<unsigned char>(byte);
    for (int bit = 0; bit < 8; ++bit) crc = (crc & 1u) != 0 ? (crc >> 1) ^ 0xedb88320u : crc >> 1;
  }
  return ~crc;
}

/// Little-endian numbers one after another.
class ByteWriter {
 public:
  template <class T>
  ByteWriter& number(T value) {
    if constexpr (std::is_floating_point_v<T>) {
      static_assert(sizeof(T) == 4);
      std::uint32_t bits;
      std::memcpy(&bits, &value, 4);
      return number(bits);
    } else {
      auto rest = static_cast<std::uint64_t>(value);
      for (std::size_t i = 0; i < sizeof(T); ++i, rest >>= 8) bytes.push_back(static_cast<char>(rest & 255));
      return *this;
    }
  }
  ByteWriter& name(std::string_view text) {
    number(static_cast<std::uint16_t>(text.size()));
    bytes += text;
    return *this;
  }
  ByteWriter& rows(const std::vector<std::byte>& raw) {
    for (const std::byte b : raw) bytes.push_back(static_cast<char>(b));
    return *this;
  }

  std::string bytes;
};

struct SnapshotSection {
  std::string tag, content;
};

inline std::string section_bytes(const SnapshotSection& s) {
  ByteWriter w;
  w.bytes = s.tag;
  w.number(static_cast<std::uint64_t>(s.content.size()));
  w.bytes += s.content;
  w.number(crc32(w.bytes));
  return w.bytes;
}

inline std::string snapshot_bytes(const std::vector<SnapshotSection>& sections, std::uint32_t version = 5) {
  ByteWriter w;
  w.bytes = "kvpareSQ";
  w.number(version);
  for (const SnapshotSection& s : sections) w.bytes += section_bytes(s);
  return w.bytes;
}

/// Takes apart what is whole.
inline std::vector<SnapshotSection> sections_of(std::string_view bytes) {
  const auto number = [&](std::size_t at, std::size_t size) {
    std::uint64_t n = 0;
    for (std::size_t i = size; i-- > 0;) n = n << 8 | static_cast<unsigned char>(bytes.at(at + i));
    return n;
  };
  std::vector<SnapshotSection> sections;
  for (std::size_t at = 12; at < bytes.size();) {
    const std::size_t length = number(at + 4, 8);
    sections.push_back({std::string(bytes.substr(at, 4)), std::string(bytes.substr(at + 12, length))});
    if (number(at + 12 + length, 4) != crc32(bytes.substr(at, 12 + length)))
      throw std::logic_error("test: a section's checksum is wrong");
    at += length + 16;
  }
  return sections;
}

using FormatNames = std::vector<std::pair<std::string, std::string>>;

inline std::string model_content(const Model& model, Index page_tokens, const FormatNames& formats) {
  ByteWriter w;
  w.number(static_cast<std::uint32_t>(page_tokens)).number(static_cast<std::uint32_t>(formats.size()));
  for (const auto& [keys, values] : formats) w.name(keys).name(values);
  w.number(static_cast<std::uint32_t>(model.layers.size()));
  for (const LayerShape& s : model.layers) {
    w.number(s.q_heads).number(s.kv_heads).number(s.key_dim).number(s.value_dim).number(s.window);
    w.number(s.scale).number(s.softcap).number(static_cast<std::uint32_t>(s.sink_logits.size()));
    for (const float x : s.sink_logits) w.number(x);
  }
  return w.bytes;
}

inline std::string tags_content(const std::vector<TagSpan>& tags) {
  ByteWriter w;
  w.number(static_cast<std::uint32_t>(tags.size()));
  for (const TagSpan& t : tags)
    w.number(t.begin)
        .number(t.end)
        .number(static_cast<std::uint8_t>(t.token_class))
        .number(static_cast<std::uint8_t>(t.is_protected))
        .number(t.image)
        .number(t.grid_rows)
        .number(t.grid_cols);
  return w.bytes;
}

inline std::string layer_content(const SequenceImage::Layer& layer) {
  ByteWriter w;
  w.number(static_cast<std::uint32_t>(layer.given.size()));
  for (const auto& [begin, end] : layer.given) w.number(begin).number(end);
  w.name(layer.scorer).number(layer.last_row).number(layer.compressed_to).number(layer.compressed_from);
  const Aging& a = layer.aging;
  w.number(static_cast<std::int32_t>(a.format)).number(static_cast<std::int32_t>(a.keys_first));
  w.number(a.keep_raw_keys).number(a.flush_keys).number(a.keep_raw_values).number(a.flush_values);
  w.number(a.classes.bits).number(a.sinks);
  w.number(static_cast<std::uint8_t>(a.recode));
  w.number(static_cast<std::uint32_t>(a.numbers.size()));
  for (const float x : a.numbers) w.number(x);
  w.number(static_cast<std::uint32_t>(layer.states.size()));
  for (const SequenceImage::State& state : layer.states) {
    w.number(state.format).number(static_cast<std::uint32_t>(state.values.size()));
    for (const float x : state.values) w.number(x);
  }
  w.number(static_cast<std::uint32_t>(layer.heads.size()));
  for (const SequenceImage::Head& head : layer.heads) {
    w.number(static_cast<std::uint32_t>(head.pages.size()));
    for (const SequenceImage::Page& page : head.pages) {
      w.number(page.format).number(static_cast<std::uint16_t>(page.offsets.size()));
      w.number(page.state).number(page.first).number(page.live);
      for (const std::uint16_t offset : page.offsets) w.number(offset);
      w.rows(page.keys).rows(page.values);
    }
    w.number(static_cast<std::uint32_t>(head.running.size()));
    for (const float x : head.running) w.number(x);
  }
  return w.bytes;
}

inline std::vector<SnapshotSection> sections_of(const Model& model, const FormatNames& formats,
                                                const SequenceImage& image) {
  std::vector<SnapshotSection> sections{{"MODL", model_content(model, image.page_tokens, formats)},
                                        {"TAGS", tags_content(image.tags)}};
  for (const SequenceImage::Layer& layer : image.layers) sections.push_back({"LAYR", layer_content(layer)});
  sections.push_back({"END ", ""});
  return sections;
}

}  // namespace kvpare::test

// A sequence in a stream of bytes: to offload it, and to resume it later, elsewhere.
//
//   "kvpareSQ"   8 bytes
//   version      u32, now 5
//   sections     each:  tag, 4 letters · length of the content, u64 · content · CRC-32 of all that, u32
//
//   "MODL"  page_tokens u32 · formats u32, each two names (keys, values) · layers u32, each q_heads, kv_heads, key_dim,
//           value_dim, window i64 · scale, softcap f32 · sink logits: u32, f32 …
//   "TAGS"  spans u32, each begin, end i32 · class u8 · protected u8 · image, grid_rows, grid_cols i64
//   "LAYR"  one per layer: given spans u32, each begin, end i32 · scorer's name · last row i32 · compressed to, of: i64
//           aging: format, keys_first i32 · keep_raw_keys, flush_keys, keep_raw_values, flush_values i64 · classes u32 · sinks
//             i64 · recode u8 · numbers u32, f32 …
//           codec states u32, each format u16 · floats u32, f32 …
//           heads u32, each:
//             pages u32, each format u16 · slots u16 · state u32 · first position i32 · live mask u64 · offset from the first
//               position u16 per slot · keys, then values: rows of live slots, or the tile in the codec's canonical bytes
//             running scores u32, f32 …
//   "END "  empty
//
// Numbers are little-endian, names a u16 length and letters. Nothing follows the last section that is read.
#pragma once

#include <array>
#include <bit>
#include <cstring>
#include <istream>
#include <optional>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

#include "../pipeline/kv_cache.hpp"

namespace kvpare {

namespace detail::snapshot {

static_assert(std::endian::native == std::endian::little, "snapshots are written as the numbers lie in memory");

inline constexpr std::string_view magic = "kvpareSQ";
inline constexpr std::uint32_t version = 5;

/// CRC-32 (IEEE 802.3), sixteen bytes at a time.
class Crc32 {
 public:
  void add(const void* data, std::size_t size) {
    const auto* p = static_cast<const unsigned char*>(data);
    for (; size >= 16; size -= 16, p += 16) {
      std::uint32_t words[4], next = 0;
      std::memcpy(words, p, 16);
      words[0] ^= state_;
      for (std::size_t w = 0; w < 4; ++w)
        next ^= table[15 - 4 * w][words[w] & 255] ^ table[14 - 4 * w][words[w] >> 8 & 255] ^
                table[13 - 4 * w][words[w] >> 16 & 255] ^ table[12 - 4 * w][words[w] >> 24];
      state_ = next;
    }
    for (; size > 0; --size) state_ = state_ >> 8 ^ table[0][(state_ ^ *p++) & 255];
  }
  std::uint32_t value() const { return ~state_; }

 private:
  static constexpr auto table = [] {
    std::array<std::array<std::uint32_t, 256>, 16> t{};
    for (std::uint32_t i = 0; i < 256; ++i) {
      std::uint32_t c = i;
      for (int bit = 0; bit < 8; ++bit) c = c >> 1 ^ (c & 1u ? 0xedb88320u : 0u);
      t[0][i] = c;
    }
    for (std::size_t k = 1; k < 16; ++k)
      for (std::size_t i = 0; i < 256; ++i) t[k][i] = t[k - 1][i] >> 8 ^ t[0][t[k - 1][i] & 255];
    return t;
  }();
  std::uint32_t state_ = ~0u;
};

/// The content of one section.
class Content {
 public:
  template <class T>
    requires std::is_arithmetic_v<T>
  void put(T value) { put_bytes(&value, sizeof value); }
  void put_bytes(const void* data, std::size_t size) { bytes_.append(static_cast<const char*>(data), size); }
  void put_name(std::string_view name) {
    put(static_cast<std::uint16_t>(name.size()));
    put_bytes(name.data(), name.size());
  }
  std::string_view bytes() const { return bytes_; }
  void clear() { bytes_.clear(); }

 private:
  std::string bytes_;
};

inline void write_section(std::ostream& out, std::string_view tag, std::string_view content) {
  const std::uint64_t length = content.size();
  Crc32 crc;
  crc.add(tag.data(), 4), crc.add(&length, 8), crc.add(content.data(), content.size());
  const std::uint32_t check = crc.value();
  out.write(tag.data(), 4);
  out.write(reinterpret_cast<const char*>(&length), 8);
  out.write(content.data(), static_cast<std::streamsize>(content.size()));
  out.write(reinterpret_cast<const char*>(&check), 4);
}

/// Reads a section's content; every read is within it.
class Reader {
 public:
  Reader(std::string_view content, std::string_view section) : content_(content), section_(section) {}

  template <class T>
    requires std::is_arithmetic_v<T> T get() {
      T value;
      std::memcpy(&value, take(sizeof value), sizeof value);
      return value;
    }
  bool get_flag(const char* what) {
    const int flag = get<std::uint8_t>();
    require(flag <= 1, "snapshot: ", what, " = ", flag, ", must be 0 or 1");
    return flag == 1;
  }
  std::string get_name() {
    const auto size = get<std::uint16_t>();
    return {take(size), size};
  }
  template <class T>
  std::vector<T> get_many(std::size_t count) {
    require(count <= left() / sizeof(T), "snapshot: section ", section_, " announces ", count, " elements of ",
            sizeof(T), " bytes, but has only ", left(), " bytes left");
    std::vector<T> values(count);
    if (count > 0) std::memcpy(values.data(), take(count * sizeof(T)), count * sizeof(T));
    return values;
  }
  /// How many of something that takes at least `least_bytes` each.
  std::size_t get_count(std::size_t least_bytes) {
    const std::size_t count = get<std::uint32_t>();
    require(count <= left() / least_bytes, "snapshot: section ", section_, " announces ", count,
            " elements of at least ", least_bytes, " bytes, but has only ", left(), " bytes left");
    return count;
  }
  bool holds(std::string_view bytes) const { return content_ == bytes; }
  void expect_end() const {
    require(left() == 0, "snapshot: section ", section_, " has ", left(), " bytes more than it should");
  }

 private:
  std::size_t left() const { return content_.size() - at_; }
  const char* take(std::size_t size) {
    require(size <= left(), "snapshot: section ", section_, " ends where ", size, " more bytes should be");
    at_ += size;
    return content_.data() + at_ - size;
  }
  std::string_view content_, section_;
  std::size_t at_ = 0;
};

inline void read_exactly(std::istream& in, char* to, std::size_t size, const char* what) {
  in.read(to, static_cast<std::streamsize>(size));
  require(static_cast<std::size_t>(in.gcount()) == size, "snapshot: the stream ends in ", what);
}

/// The next section, which must have this tag; its content lies in `content`. Memory grows with what the stream has, not with what it announces.
inline Reader read_section(std::istream& in, std::string_view tag, std::string& content) {
  char found[4];
  std::uint64_t length = 0;
  read_exactly(in, found, 4, "the tag of a section");
  read_exactly(in, reinterpret_cast<char*>(&length), 8, "the length of a section");
  Crc32 crc;
  crc.add(found, 4), crc.add(&length, 8);
  content.clear();
  constexpr std::uint64_t piece = 1 << 20;
  for (std::uint64_t left = length; left > 0;) {
    const std::size_t now = static_cast<std::size_t>(std::min(left, piece)), at = content.size();
    content.resize(at + now);
    read_exactly(in, content.data() + at, now, "a section");
    left -= now;
  }
  crc.add(content.data(), content.size());
  std::uint32_t check = 0;
  read_exactly(in, reinterpret_cast<char*>(&check), 4, "the checksum of a section");
  require(check == crc.value(), "snapshot: a section is damaged: its checksum is ", check, ", its bytes give ",
          crc.value());
  require(std::string_view(found, 4) == tag, "snapshot: section '", std::string_view(found, 4), "' where '", tag,
          "' should be");
  return Reader(content, tag);
}

/// What a snapshot must agree on with the cache it is read into, as text: equal texts, equal bytes of attention.
template <Backend B>
std::string shape_of(const BasicKvCache<B>& cache) {
  Content c;
  c.put(static_cast<std::uint32_t>(cache.page_tokens()));
  c.put(static_cast<std::uint32_t>(cache.formats().size()));
  for (const auto& format : cache.formats()) {
    c.put_name(format.keys.name);
    c.put_name(format.values.name);
  }
  c.put(static_cast<std::uint32_t>(cache.layers()));
  for (const LayerShape& s : cache.model().layers) {
    for (const Index n : {s.q_heads, s.kv_heads, s.key_dim, s.value_dim, s.window}) c.put(n);
    c.put(s.scale), c.put(s.softcap);
    c.put(static_cast<std::uint32_t>(s.sink_logits.size()));
    for (const float x : s.sink_logits) c.put(x);
  }
  return std::string(c.bytes());
}

/// Throws with the first thing that differs.
template <Backend B>
void require_same_shape(Reader& in, const BasicKvCache<B>& cache) {
  if (in.holds(shape_of(cache))) return;
  const auto same = [](const auto& got, const auto& wanted, const auto&... what) {
    require(got == wanted, "snapshot: ", what..., " = ", got, ", the cache's is ", wanted);
  };
  same(in.get<std::uint32_t>(), static_cast<std::uint32_t>(cache.page_tokens()), "page_tokens");
  same(in.get<std::uint32_t>(), static_cast<std::uint32_t>(cache.formats().size()), "number of page formats");
  for (std::size_t f = 0; f < cache.formats().size(); ++f) {
    same(in.get_name(), std::string(cache.formats()[f].keys.name), "keys of format ", f);
    same(in.get_name(), std::string(cache.formats()[f].values.name), "values of format ", f);
  }
  same(in.get<std::uint32_t>(), static_cast<std::uint32_t>(cache.layers()), "number of layers");
  for (Index l = 0; l < cache.layers(); ++l) {
    const LayerShape& s = cache.model().layers[static_cast<std::size_t>(l)];
    same(in.get<Index>(), s.q_heads, "layer ", l, ": q_heads");
    same(in.get<Index>(), s.kv_heads, "layer ", l, ": kv_heads");
    same(in.get<Index>(), s.key_dim, "layer ", l, ": key_dim");
    same(in.get<Index>(), s.value_dim, "layer ", l, ": value_dim");
    same(in.get<Index>(), s.window, "layer ", l, ": window");
    same(in.get<float>(), s.scale, "layer ", l, ": scale");
    same(in.get<float>(), s.softcap, "layer ", l, ": softcap");
    const auto sinks = in.get_many<float>(in.get<std::uint32_t>());
    require(sinks == s.sink_logits, "snapshot: layer ", l, " has other sink logits than the cache");
  }
  in.expect_end();
}

}  // namespace detail::snapshot

/// Writes a sequence. The sequence stays as it is. What it takes: the live rows, about 20 bytes per page and 4 per running
/// score. Host memory: the sequence once. Throws when the stream fails.
template <Backend B>
void save(std::ostream& out, const BasicKvCache<B>& cache, SequenceId id) {
  using namespace detail::snapshot;
  const SequenceImage image = cache.image(id);
  out.write(magic.data(), static_cast<std::streamsize>(magic.size()));
  out.write(reinterpret_cast<const char*>(&version), 4);
  write_section(out, "MODL", shape_of(cache));

  Content tags;
  tags.put(static_cast<std::uint32_t>(image.tags.size()));
  for (const TagSpan& t : image.tags) {
    tags.put(t.begin), tags.put(t.end);
    tags.put(static_cast<std::uint8_t>(t.token_class)), tags.put(static_cast<std::uint8_t>(t.is_protected));
    tags.put(t.image), tags.put(t.grid_rows), tags.put(t.grid_cols);
  }
  write_section(out, "TAGS", tags.bytes());

  Content c;  // one for all layers: its memory is asked for once
  for (const SequenceImage::Layer& layer : image.layers) {
    c.clear();
    c.put(static_cast<std::uint32_t>(layer.given.size()));
    for (const auto& [begin, end] : layer.given) c.put(begin), c.put(end);
    c.put_name(layer.scorer);
    c.put(layer.last_row);
    c.put(layer.compressed_to), c.put(layer.compressed_from);
    const Aging& aging = layer.aging;
    c.put(static_cast<std::int32_t>(aging.format)), c.put(static_cast<std::int32_t>(aging.keys_first));
    for (const Index n : {aging.keep_raw_keys, aging.flush_keys, aging.keep_raw_values, aging.flush_values}) c.put(n);
    c.put(aging.classes.bits), c.put(aging.sinks);
    c.put(static_cast<std::uint8_t>(aging.recode));
    c.put(static_cast<std::uint32_t>(aging.numbers.size()));
    c.put_bytes(aging.numbers.data(), aging.numbers.size() * 4);
    c.put(static_cast<std::uint32_t>(layer.states.size()));
    for (const SequenceImage::State& state : layer.states) {
      c.put(state.format), c.put(static_cast<std::uint32_t>(state.values.size()));
      c.put_bytes(state.values.data(), state.values.size() * 4);
    }
    c.put(static_cast<std::uint32_t>(layer.heads.size()));
    for (const SequenceImage::Head& head : layer.heads) {
      c.put(static_cast<std::uint32_t>(head.pages.size()));
      for (const SequenceImage::Page& page : head.pages) {
        c.put(page.format), c.put(static_cast<std::uint16_t>(page.offsets.size())), c.put(page.state);
        c.put(page.first), c.put(page.live);
        c.put_bytes(page.offsets.data(), page.offsets.size() * 2);
        c.put_bytes(page.keys.data(), page.keys.size());
        c.put_bytes(page.values.data(), page.values.size());
      }
      c.put(static_cast<std::uint32_t>(head.running.size()));
      c.put_bytes(head.running.data(), head.running.size() * 4);
    }
    write_section(out, "LAYR", c.bytes());
  }
  write_section(out, "END ", {});
  out.flush();
  require(static_cast<bool>(out), "snapshot: the stream did not take all bytes");
}

/// Reads what `save` wrote, as a new sequence; none when the pool has no room for it. Throws InvalidArgument on bytes that
/// are damaged, of another version or no snapshot at all, and on one of another model, page size or list of formats: the
/// message says which. The cache is then as it was.
template <Backend B>
std::optional<SequenceId> load(std::istream& in, BasicKvCache<B>& cache) {
  using namespace detail::snapshot;
  char found[8];
  in.read(found, 8);
  require(in.gcount() == 8 && std::string_view(found, 8) == magic, "snapshot: these are no bytes of a snapshot");
  std::uint32_t of_version = 0;
  read_exactly(in, reinterpret_cast<char*>(&of_version), 4, "the version");
  require(of_version == version, "snapshot: version ", of_version, ", this library reads ", version);
  std::string content;  // one for all sections: its memory is asked for once
  Reader model = read_section(in, "MODL", content);
  require_same_shape(model, cache);

  SequenceImage image;
  image.page_tokens = cache.page_tokens();
  Reader tags = read_section(in, "TAGS", content);
  image.tags.resize(tags.get_count(34));
  for (TagSpan& t : image.tags) {
    t.begin = tags.get<Position>(), t.end = tags.get<Position>();
    t.token_class = static_cast<TokenClass>(tags.get<std::uint8_t>());
    t.is_protected = tags.get_flag("protected");
    t.image = tags.get<Index>(), t.grid_rows = tags.get<Index>(), t.grid_cols = tags.get<Index>();
  }
  tags.expect_end();

  for (Index l = 0; l < cache.layers(); ++l) {
    Reader c = read_section(in, "LAYR", content);
    SequenceImage::Layer& layer = image.layers.emplace_back();
    layer.given.resize(c.get_count(8));
    for (auto& [begin, end] : layer.given) begin = c.get<Position>(), end = c.get<Position>();
    layer.scorer = c.get_name();
    layer.last_row = c.get<Position>();
    layer.compressed_to = c.get<Index>(), layer.compressed_from = c.get<Index>();
    Aging& aging = layer.aging;
    aging.format = c.get<std::int32_t>(), aging.keys_first = c.get<std::int32_t>();
    for (Index* n : {&aging.keep_raw_keys, &aging.flush_keys, &aging.keep_raw_values, &aging.flush_values})
      *n = c.get<Index>();
    aging.classes = ClassSet(c.get<std::uint32_t>()), aging.sinks = c.get<Index>();
    aging.recode = c.get_flag("recode");
    aging.numbers = c.get_many<float>(c.get<std::uint32_t>());
    layer.states.resize(c.get_count(6));
    for (SequenceImage::State& state : layer.states) {
      state.format = c.get<std::uint16_t>();
      state.values = c.get_many<float>(c.get<std::uint32_t>());
    }
    layer.heads.resize(c.get_count(8));
    for (SequenceImage::Head& head : layer.heads) {
      head.pages.resize(c.get_count(20));
      for (SequenceImage::Page& page : head.pages) {
        page.format = c.get<std::uint16_t>();
        require(page.format < cache.formats().size(), "snapshot: a page of format ", page.format, ", must be below ",
                cache.formats().size());
        const auto slots = c.get<std::uint16_t>();
        page.state = c.get<std::uint32_t>();
        page.first = c.get<Position>();
        page.live = c.get<std::uint64_t>();
        page.offsets = c.get_many<std::uint16_t>(slots);
        const auto [key_bytes, value_bytes] = cache.image_bytes(l, page.format, std::popcount(page.live));
        page.keys = c.get_many<std::byte>(static_cast<std::size_t>(key_bytes));
        page.values = c.get_many<std::byte>(static_cast<std::size_t>(value_bytes));
      }
      head.running = c.get_many<float>(c.get<std::uint32_t>());
    }
    c.expect_end();
  }
  read_section(in, "END ", content).expect_end();
  return cache.restore(image);
}

}  // namespace kvpare

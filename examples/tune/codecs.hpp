// The codecs by name, for measuring what each does to keys and values. No cache and no attention kernels: rows go through
// encode and decode as the codec's canonical bytes.
#pragma once

#include <kvpare/codec/round_trip.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace tune {

using kvpare::Index;

struct CodecEntry {
  std::string_view name;
  bool (*fits)(kvpare::TileShape);
  Index (*tile_bytes)(kvpare::TileShape);
  std::vector<float> (*round_trip)(const std::vector<float>& rows, Index width, Index page_tokens,
                                   const kvpare::RoundTripFacts& facts);

  /// Bits per number of a page, scales and zeros included.
  double bits(kvpare::TileShape shape) const {
    return 8 * static_cast<double>(tile_bytes(shape)) / static_cast<double>(shape.tokens * shape.width);
  }
};

/// All that the library has, raw ones first, with groups of `group` numbers where a codec has groups (8 or 32).
const std::vector<CodecEntry>& known_codecs(Index group);

/// Codecs that go together, keys and values, where they are not the same: those that exist for one side, and the forms they come in.
struct FormEntry {
  CodecEntry keys, values;

  std::string name() const {
    return keys.name == values.name ? std::string(keys.name) : std::string(keys.name) + '/' + std::string(values.name);
  }
  bool fits(kvpare::TileShape of_keys, kvpare::TileShape of_values) const {
    return keys.fits(of_keys) && values.fits(of_values);
  }
  double bits(kvpare::TileShape of_keys, kvpare::TileShape of_values) const {
    const double channels = static_cast<double>(of_keys.width + of_values.width);
    return (keys.bits(of_keys) * static_cast<double>(of_keys.width) +
            values.bits(of_values) * static_cast<double>(of_values.width)) / channels;
  }
};

/// Every codec on both sides, then the forms of two.
std::vector<FormEntry> known_forms(Index group);

/// Throws InvalidArgument with the names that there are.
const CodecEntry& find_codec(std::string_view name, Index group);

}  // namespace tune

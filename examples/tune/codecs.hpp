// The codecs by name, for measuring what each does to keys and values. No cache and no attention kernels: rows go through
// encode and decode as the codec's canonical bytes.
#pragma once

#include <kvpare/codec/codec.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace tune {

using kvpare::Index;

struct CodecEntry {
  std::string_view name;
  bool (*fits)(kvpare::TileShape);
  Index (*tile_bytes)(kvpare::TileShape);
  /// Rows [tokens, width] coded page by page and decoded; state, where the codec takes one, is made of these rows and of
  /// `query_peak` [width], the largest |q| per channel (may be empty).
  std::vector<float> (*round_trip)(const std::vector<float>& rows, Index width, Index page_tokens,
                                   const std::vector<float>& query_peak);

  /// Bits per number of a page, scales and zeros included.
  double bits(kvpare::TileShape shape) const {
    return 8 * static_cast<double>(tile_bytes(shape)) / static_cast<double>(shape.tokens * shape.width);
  }
};

/// All that the library has, raw ones first, with groups of `group` numbers where a codec has groups (8 or 32).
const std::vector<CodecEntry>& known_codecs(Index group);

/// Throws InvalidArgument with the names that there are.
const CodecEntry& find_codec(std::string_view name, Index group);

}  // namespace tune

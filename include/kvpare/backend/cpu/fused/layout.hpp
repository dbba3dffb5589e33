// How the CPU keeps group-quantised tiles, and what the loops over them are told.
//
// A tile is  codes | scales | zeros,  in exactly the bytes of the canonical one (ternary: perhaps fewer, the last ones unused).
//
// Codes    Sixteen lanes by a depth: keys have 16 tokens as lanes and channels as depth, values 16 channels as lanes and
//          tokens as depth. Four steps of the depth are a quad: 64 bytes when a code is a byte, lane l's four in bytes
//          [4 l, 4 l + 4). So one instruction that multiplies and adds four bytes in each 32-bit lane gives 16 scores, or 16
//          channels of the output, and no sum ever crosses lanes. Below 8 bits consecutive quads share the 64 bytes, the
//          first one in the lowest bits of each byte:
//
//            bits              8    4    2    1    3 = 2 + 1          5 = 4 + 1
//            quads per unit    1    2    4    8    8                  8
//            vectors per unit  1    1    1    1    2 of 2 bits, 1     4 of 4 bits, 1 of 1 bit
//
//          Units follow each other along the depth, then block by block of 16 lanes.
//          Ternary codes: quads in that same order, five to 64 bytes and a digit of base 3 each, see TernaryBytes. The last
//          0 to 4 quads of the tile have 16 bytes each: a lane's byte holds its four codes. The loops first unpack the tile to
//          codes of 2 bits, on the stack.
//          Codes of values that have neither a table of levels nor scales of both signs are kept with their highest bit
//          inverted: shifted to the top of a byte they are then signed numbers around 0.
// Scales   along channels [groups of a row][tokens]; along tokens [groups of tokens][width]. Zeros likewise.
//
// What fits (everything else runs generic, in canonical order):
//
// |                          | keys                                    | values                                       |
// |--------------------------|-----------------------------------------|----------------------------------------------|
// | tokens                   | 16, 32, 64                              | multiple of the tokens of a unit: 4, 8, 16, 32 for |
// |                          |                                         | 8, 4, 2 and the other bits                   |
// | width                    | at most 256, multiple of a unit's channels:   | at most 256, multiple of 16            |
// |                          | 4, 8, 16, 32 for 8, 4, 2 and the other bits |                                          |
// | group along channels     | a unit's channels divide it, at most 16 in a row | 16 divides it                       |
// | group along tokens       | 16 divides it, and the width            | a unit's tokens divide it                    |
// | ternary codes            | as 2 bits                               | as 2 bits                                    |
// | 8 or 5 bits with scales of both signs | fused                      | generic with 8 bits                          |
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../../../codec/codec.hpp"
#include "../../arguments.hpp"

namespace kvpare::cpu {

/// Some slots of one coded tile. Slots not listed may hold anything: nothing of them may reach a result.
struct TileRows {
  const std::byte* tile = nullptr;
  TileShape shape;
  const float* state = nullptr;
  const std::uint8_t* slots = nullptr;  // ascending
  int count = 0;                        // 0..64
  bool gapless = true;                  // slots 0, 1, 2, … count - 1
  const Position* positions = nullptr;  // [count] where the codec reads them
};

/// Bytes that will be read after this: to be prefetched, spread over the loop.
struct AheadBytes {
  const std::byte* data = nullptr;
  Index bytes = 0;
};

namespace fused {

/// Bit s: slot s is listed.
inline std::uint64_t listed_slots(const TileRows& rows) {
  if (rows.gapless) return rows.count >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << rows.count) - 1;
  std::uint64_t bits = 0;
  for (int t = 0; t < rows.count; ++t) bits |= std::uint64_t{1} << rows.slots[t];
  return bits;
}

/// How the commonest forms find their scale, and round: as Fit and Ties of codec/group.hpp.
enum class Rule { amax, extreme, min_max };
enum class Rounding { even, away, up };

inline constexpr Index max_width = 256, max_groups = 16, max_tokens = 64, max_listed = 64;

/// How a signed level comes out of the bits of a code; see `Codes` above.
enum class Levels : std::uint8_t {
  plain,    // code - centre
  table,    // looked up among up to 16 signed bytes
  flipped,  // code - centre, or its negative where the token's scale is negative
  flipped_table
};

/// Where codes lie inside a unit.
struct Units {
  int bits = 8;
  constexpr int low_bits() const { return bits == 3 ? 2 : bits == 5 ? 4 : bits; }
  constexpr int quads() const { return bits == 3 || bits == 5 ? 8 : 8 / bits; }
  constexpr int vectors() const { return bits == 3 ? 3 : bits == 5 ? 5 : 1; }
  constexpr Index depth() const { return 4 * quads(); }
  constexpr Index bytes() const { return 64 * vectors(); }
};

/// Five codes 0, 1, 2 in a byte, made to be unpacked by few instructions on whole vectors of bytes, all modulo 256:
///
///   code of step k = (average(b_k, b_k / 2 + 128) >> 6) - 1,   b_0 the byte,   b_{k+1} = 3 b_k, of step 2: 3 b_1 + 107
///
/// average rounds up, as vector instructions do: a code is 1 from b = 85 on, 2 from 170 on. So b / 256 is nearly a number in
/// base 3, of which every step takes the first digit. Nearly: 256 / 3 is no integer, and without the 107 (which was searched
/// for) four fives had no byte. 13 bytes are not written; they mean some five as well.
struct TernaryBytes {
  static constexpr int added(int step) { return step == 2 ? 107 : 0; }
  static constexpr int powers[5] = {1, 3, 9, 27, 81};
  std::uint8_t codes[5][256] = {};   // of each step
  std::uint8_t others[5][256] = {};  // the number less that of this step
  std::uint8_t byte[243] = {};       // the largest one of a number: code of step 0 + 3 * that of step 1 + …

  constexpr TernaryBytes() {
    for (int b = 0; b < 256; ++b) {
      int number = 0, rest = b;
      for (int step = 0; step < 5; ++step) {
        if (step > 0) rest = (3 * rest + added(step)) & 255;
        const int code_here = ((rest + (rest / 2 | 128) + 1) / 2 >> 6) - 1;
        codes[step][b] = static_cast<std::uint8_t>(code_here), number += code_here * powers[step];
      }
      for (int step = 0; step < 5; ++step)
        others[step][b] = static_cast<std::uint8_t>(number - codes[step][b] * powers[step]);
      byte[number] = static_cast<std::uint8_t>(b);
    }
  }
  /// Whether every number has a byte.
  constexpr bool complete() const {
    for (int n = 0; n < 243; ++n)
      for (int step = 0; step < 5; ++step)
        if (codes[step][byte[n]] != n / powers[step] % 3) return false;
    return true;
  }
  constexpr std::uint8_t code(std::byte b, int step) const { return codes[step][std::to_integer<unsigned>(b)]; }
  constexpr std::byte with_code(std::byte b, int step, std::uint8_t code_of_step) const {
    return std::byte{byte[others[step][std::to_integer<unsigned>(b)] + code_of_step * powers[step]]};
  }
};
inline constexpr TernaryBytes ternary_bytes{};
static_assert(ternary_bytes.complete());

/// One side of one tile.
struct Layout {
  Side side = Side::keys;
  TileShape shape;
  Units units{};
  int flip = 0;  // what codes are kept xored with
  Along along = Along::channels;
  Index group = 0;
  ScaleType scale = ScaleType::f16;
  ZeroType zero = ZeroType::none;
  bool ternary = false;  // `units`, `flip` and block_bytes are then those of the codes once unpacked, which are code + 1

  constexpr Index depth() const { return side == Side::keys ? shape.width : shape.tokens; }
  constexpr Index lanes() const { return side == Side::keys ? shape.tokens : shape.width; }
  constexpr Index block_bytes() const { return depth() / units.depth() * units.bytes(); }  // of 16 lanes
  constexpr Index quads() const { return shape.tokens * shape.width / 64; }
  constexpr Index code_bytes() const {
    return ternary ? quads() / 5 * 64 + quads() % 5 * 16 : shape.tokens * shape.width * units.bits / 8;
  }
  constexpr Index groups() const { return shape.tokens * shape.width / group; }
  /// Groups of one row (along channels), or of one channel (along tokens).
  constexpr Index row_groups() const { return (along == Along::channels ? shape.width : shape.tokens) / group; }
  constexpr Index scale_bytes() const { return bytes_of(scale); }
  constexpr Index zero_bytes() const {
    return zero == ZeroType::none ? 0 : zero == ZeroType::integer ? 2 : scale_bytes();
  }
  constexpr Index bytes() const { return code_bytes() + groups() * (scale_bytes() + zero_bytes()); }

  static constexpr Index bytes_of(ScaleType type) {
    return type == ScaleType::one ? 0 : type == ScaleType::f16 ? 2 : type == ScaleType::f32 ? 4 : 1;
  }

  /// Whether the loops can run it.
  constexpr bool fits() const {
    if (shape.width > max_width || shape.tokens > max_tokens || shape.tokens % 16 != 0) return false;
    if (depth() % units.depth() != 0 || lanes() % 16 != 0 || group < 1) return false;
    if (along == Along::channels)
      return shape.width % group == 0 && group % (side == Side::keys ? units.depth() : 16) == 0 &&
             row_groups() <= max_groups;
    return shape.tokens % group == 0 && group % (side == Side::keys ? 16 : units.depth()) == 0 && shape.width % 16 == 0;
  }

  // ---- single codes: the slow way, for everything that is no loop ----

  constexpr void place(Index slot, Index channel, Index& unit, int& quad, int& byte) const {
    const Index lane = side == Side::keys ? slot : channel, step = side == Side::keys ? channel : slot;
    unit = lane / 16 * block_bytes() + step / units.depth() * units.bytes();
    quad = static_cast<int>(step % units.depth() / 4);
    byte = static_cast<int>(lane % 16 * 4 + step % 4);
  }
  /// Ternary: the byte, and the step in it, of byte `byte` of a quad.
  constexpr Index ternary_place(Index quad, int byte, int& step) const {
    const Index whole = quads() / 5 * 5;
    step = static_cast<int>(quad < whole ? quad % 5 : byte % 4);
    return quad < whole ? quad / 5 * 64 + byte : whole / 5 * 64 + (quad - whole) * 16 + byte / 4;
  }
  std::uint8_t code(const std::byte* tile, Index slot, Index channel) const {
    Index unit = 0;
    int quad = 0, byte = 0;
    place(slot, channel, unit, quad, byte);
    if (ternary) {
      int step = 0;
      const Index at = ternary_place(unit / 16 + quad, byte, step);  // four quads to a unit of 64 bytes
      return ternary_bytes.code(tile[at], step);
    }
    const int low = units.low_bits(), per = 8 / low;
    unsigned code =
        std::to_integer<unsigned>(tile[unit + quad / per * 64 + byte]) >> quad % per * low & ((1u << low) - 1);
    if (low != units.bits)
      code |= (std::to_integer<unsigned>(tile[unit + (units.vectors() - 1) * 64 + byte]) >> quad & 1u) << low;
    return static_cast<std::uint8_t>(code ^ static_cast<unsigned>(flip));
  }
  void put_code(std::byte* tile, Index slot, Index channel, std::uint8_t value) const {
    Index unit = 0;
    int quad = 0, byte = 0;
    place(slot, channel, unit, quad, byte);
    if (ternary) {
      int step = 0;
      const Index at = ternary_place(unit / 16 + quad, byte, step);  // four quads to a unit of 64 bytes
      tile[at] = ternary_bytes.with_code(tile[at], step, value);
      return;
    }
    const unsigned code = value ^ static_cast<unsigned>(flip);
    const int low = units.low_bits(), per = 8 / low;
    const auto put = [](std::byte& at, int shift, unsigned mask, unsigned bits) {
      at = static_cast<std::byte>((std::to_integer<unsigned>(at) & ~(mask << shift)) | (bits & mask) << shift);
    };
    put(tile[unit + quad / per * 64 + byte], quad % per * low, (1u << low) - 1, code);
    if (low != units.bits) put(tile[unit + (units.vectors() - 1) * 64 + byte], quad, 1u, code >> low);
  }

  /// Ternary: the codes of one token. Those of other tokens stay.
  void put_ternary_row(std::byte* tile, Index slot, const std::uint8_t* row) const {
    int step = 0;
    const Index whole = quads() / 5 * 5;
    if (side == Side::keys) {
      const Index first = slot / 16 * shape.width / 4, count = shape.width / 4;
      const int lane = static_cast<int>(slot % 16) * 4;
      for (Index i = 0; i < count;) {
        const Index quad = first + i;
        if (quad % 5 == 0 && quad < whole && i + 5 <= count) {  // whole bytes, four at a time
          std::uint32_t number = 0;
          for (Index k = 5; k-- > 0;) {
            std::uint32_t four;
            std::memcpy(&four, row + 4 * (i + k), 4);
            number = number * 3 + four;
          }
          for (int k = 0; k < 4; ++k)
            tile[quad / 5 * 64 + lane + k] = std::byte{ternary_bytes.byte[number >> 8 * k & 255]};
          i += 5;
          continue;
        }
        for (int k = 0; k < 4; ++k) {
          std::byte& at = tile[ternary_place(quad, lane + k, step)];
          at = ternary_bytes.with_code(at, step, row[4 * i + k]);
        }
        ++i;
      }
      return;
    }
    for (Index c = 0; c < shape.width; c += 16) {
      const Index quad = (c / 16 * shape.tokens + slot) / 4;
      std::byte* at = tile + ternary_place(quad, static_cast<int>(slot % 4), step);
      for (Index l = 0; l < 16; ++l, at += quad < whole ? 4 : 1) *at = ternary_bytes.with_code(*at, step, row[c + l]);
    }
  }

  /// Number of the group of a slot and channel, as scales are ordered here.
  constexpr Index group_at(Index slot, Index channel) const {
    return along == Along::channels ? channel / group * shape.tokens + slot : slot / group * shape.width + channel;
  }
  GroupBits bits(const std::byte* tile, Index at) const {
    GroupBits b;
    const std::byte* s = tile + code_bytes();
    std::memcpy(&b.scale, s + at * scale_bytes(), static_cast<std::size_t>(scale_bytes()));
    std::memcpy(&b.zero, s + groups() * scale_bytes() + at * zero_bytes(), static_cast<std::size_t>(zero_bytes()));
    return b;
  }
  void put_bits(std::byte* tile, Index at, GroupBits b) const {
    std::byte* s = tile + code_bytes();
    std::memcpy(s + at * scale_bytes(), &b.scale, static_cast<std::size_t>(scale_bytes()));
    std::memcpy(s + groups() * scale_bytes() + at * zero_bytes(), &b.zero, static_cast<std::size_t>(zero_bytes()));
  }
};

/// How codes become numbers: x' = scale * unit * (signed level) + zero, scale and zero of the group.
struct Values {
  float unit = 1;                      // what a signed level of 1 stands for
  float shift = 0;                     // plain, flipped: unit * (signed level) = code - offset - shift
  const std::int8_t* table = nullptr;  // 16 signed levels
  const float* scales = nullptr;       // the 256 scales of a type of one byte
  float factor = 1;                    // of all scales: the codec's state
};

/// A query row, ready for the loops over keys with groups along channels.
///
/// Integers q' with q ≈ scale * q' in each float block (a group, or 32 channels), held to 8 or 16 bits.
struct alignas(64) QueryRow {
  std::uint32_t q[2][max_width / 4];  // per quad; what the two planes are: see the set
  float scale[max_groups];            // times `unit`
  std::int32_t start[max_groups];     // what accumulators begin with, so that codes count from their centre
  float sum[max_groups];              // of the q of a group
};

/// Floats of a query row for keys with groups along tokens: it meets their scales group by group.
inline constexpr Index entering_floats = max_width + 16;

struct KeyCall {
  Layout layout;
  Values values;
  const std::byte* prepared = nullptr;  // along channels: QueryRow[rows]; along tokens: floats [rows][entering_floats]
  Index rows = 0;
  TileRows keys;
  AheadBytes ahead;
  float* out = nullptr;
  Index out_stride = 0;
  const std::byte* codes = nullptr;  // where codes that had to be unpacked are; null: in the tile
};

struct ValueCall {
  Layout layout;
  Values values;
  const float* p = nullptr;
  Index p_stride = 0;
  const float* alpha = nullptr;
  Index rows = 0;
  TileRows tile;
  AheadBytes ahead;
  float* acc = nullptr;
  Index acc_stride = 0;
  const std::byte* codes = nullptr;  // as in KeyCall
};

/// Numbers beside the codes of a tile, channels of one byte.
struct ListedNumbers {
  Index slots = 0, tokens = 0;          // slots: even
  const std::byte* deltas = nullptr;    // halves [slots][tokens]
  const std::byte* channels = nullptr;  // [slots][tokens]
};

/// Floats of a query row for keys that turn: first channels of pairs [max_width / 2], second ones [max_width / 2], and the
/// row as it is [max_width], for channels that do not turn.
inline constexpr Index turned_floats = 2 * max_width;

/// A prepared query for keys that are stored before their rotation. Behind it: rows, floats [rows][turned_floats].
struct alignas(64) TurnedQuery {
  Index pairs, width;
  Index first_step, partner;             // pair i: channels i * first_step and that + partner
  std::uint64_t phases[max_width / 2];   // 0 from pairs on; see Rotation
  float cosines[max_width / 2 * 16];     // of 0 … 15 positions further on: [pairs][16]
  float sines[max_width / 2 * 16];
  float step_cosines[max_width / 2], step_sines[max_width / 2];  // of 16 positions further on
  bool stretched;
  float gain[max_width], shift[max_width];  // of channels, where stretched
};

}  // namespace fused
}  // namespace kvpare::cpu

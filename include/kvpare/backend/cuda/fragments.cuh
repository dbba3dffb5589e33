// Keys and values as operands of mma, straight from memory into registers: a tile is 16 tokens of one page.
//
// Scores are S^T [16 tokens, 8 query rows] = K [16, D] Q^T, outputs O^T [D, 8] += V^T [D, 16] P^T: tokens or channels
// are the rows of the first operand, so that up to 8 query rows of a group share every key and value that is loaded.
// Neither sum minds the order of what it adds, and no output channel minds its place: a thread takes 16 bytes where
// they lie and calls the numbers in them what the fragment wants. Queries are laid out to match; output channels are
// named when written.
//
//   g = lane / 4, t = lane % 4
//   keys     lane holds tokens g and g + 8, of each D / 4 channels; 4 lanes load 64 bytes of a row
//   values   lane holds tokens 2t, 2t + 1, 2t + 8, 2t + 9, of each D / 8 channels
//   register r of a lane's row or pair of tokens: two numbers of 16 bits
//   Where a lane's share is not whole words (D = 80, 4 bits: two and a half), two lanes halve the last one's registers.
//
// A code of up to 8 bits in the low bits of an f16 whose exponent is 0 is code * 2^-24, exactly, wherever it lies below
// bit 10: an AND makes two operands. Of 3 bits the highest comes from a plane of its own, shifted to where the others
// are. Of ternary codes a multiplication by 3 moves the next digits of two bytes there. Small floats move their bits
// into those of an f16, again a power of two off. Tables of up to 16 levels are in registers: codes select their bytes,
// the two of an f16, or one of an integer that becomes an f16. `gain(r)` is the power of two that mends numbers, on the
// query's side or the output's. Zeros and offsets are of rank 1: a token's zero times the sum of the query, a sum of
// zeros by probabilities on the output.
//
// Bytes per token and kv head (keys and values, D = 128, a scale per token): f16 512, 8 bits 260, 4 bits 132, 3 bits
// 100, 2 bits 68, ternary 56. Instructions per tile of 16 tokens and warp (sm_90, D = 128): f16 390, 4 bits 310, or
// 3.0 and 2.4 a lane and number. While memory brings a tile at 4.3 TB/s, a multiprocessor of an H200 can issue 1770 of
// them, and 460 at 4 bits.
#pragma once

#include <bit>
#include <type_traits>

#include "../../codec/raw.hpp"
#include "../../codec/small_float.hpp"
#include "attend_kernel.cuh"

namespace kvpare::cuda::detail {

template <int bytes>
struct alignas(bytes) LaneWords {
  std::uint32_t w[bytes / 4];
};

/// The widest load that divides what a lane has, within `most` bytes; 0: none.
constexpr int lane_load(int bytes, int most) {
  for (int load = 16; load >= 4; load /= 2)
    if (load <= most && bytes % load == 0) return load;
  return 0;
}

constexpr KVPARE_HD float power_of_two(int k) {
  return kvpare::detail::power_of_two(k < -126 ? -126 : k > 127 ? 127 : k);
}

enum class CodeKind {
  none,
  linear,
  e4m3,
  e5m2,
  e2m1,
  integers,  // a table of integers within a signed byte
  halves     // a table of levels that are halves, or are rounded to such: 2^-11 of each
};

/// How codes become 16-bit numbers.
template <class C>
struct CodeNumbers {
  static constexpr GroupForm form = C::form;
  static constexpr int bits = form.bits, low_bits = bits == 3 ? 2 : bits;
  static constexpr int per_word = 16 / low_bits;  // registers that a word of codes becomes

 private:
  template <class Float>
  static constexpr bool is_table_of() {
    if (form.bits != Float::bits) return false;
    if constexpr (form.bits == Float::bits && form.table) {
      for (std::size_t c = 0; c < (std::size_t{1} << form.bits) / 2 - 4; ++c)
        if (C::levels[c] != Float::values[c]) return false;
    }
    return true;
  }
  static constexpr CodeKind find_kind() {
    if (!has_fragment_order<C>()) return CodeKind::none;
    if (!form.table || form.bits == 1) return CodeKind::linear;
    if (is_table_of<kvpare::detail::E4M3>()) return CodeKind::e4m3;
    if (is_table_of<kvpare::detail::E5M2>()) return CodeKind::e5m2;
    if (is_table_of<kvpare::detail::E2M1>()) return CodeKind::e2m1;
    return form.bits <= 4 ? kind_of_levels() : CodeKind::none;
  }
  static constexpr CodeKind kind_of_levels() {
    bool integers = true, halves = true;
    for (std::size_t code = 0; code < std::size_t{1} << (form.bits & 7); ++code) {
      const float x = level(code), size = x < 0 ? -x : x;
      const bool in_byte = x >= -128 && x <= 127;
      integers = integers && in_byte && x == static_cast<float>(static_cast<int>(in_byte ? x : 0));
      halves = halves && (x == 0 || (size >= 0x1p-14f && size <= 65504));
    }
    return integers ? CodeKind::integers : halves ? CodeKind::halves : CodeKind::none;
  }
  static constexpr float level(std::size_t code) {
    if constexpr (form.table)
      return C::levels[code];
    else
      return static_cast<float>(static_cast<int>(code) - form.offset);
  }

 public:
  static constexpr CodeKind kind = find_kind();
  /// Whether levels are looked up in registers. Code 0 is no zero then.
  static constexpr bool looked_up = kind == CodeKind::integers || kind == CodeKind::halves;
  static constexpr int table_registers = !looked_up ? 0 : (kind == CodeKind::halves ? 2 : 1) * (bits == 4 ? 4 : 2);
  /// level = factor * (the number, mended) + offset
  static constexpr float factor = kind == CodeKind::linear ? level(1) - level(0) : 1.0f;
  static constexpr float offset = kind == CodeKind::linear ? level(0) : 0.0f;
  /// The middle of the codes. What a query or a probability loses when it is rounded is multiplied with codes that
  /// count from here, not from 0: else all tokens or channels would shift together.
  static constexpr float middle = form.ternary               ? 1.0f
                                  : kind == CodeKind::linear ? 0.5f * static_cast<float>(1 << bits)
                                                             : 0.0f;
  static constexpr int most_gain = kind == CodeKind::linear ? 24
                                   : kind == CodeKind::e4m3 ? 8
                                   : kind == CodeKind::e2m1 ? 14
                                                            : 0;

  /// Codes i and i + per_word of a word. In place: 2^24 / gain(i) times the code; else all codes are where code 0 is.
  /// `high_bits` has their highest bits, where these have a plane, in the low byte of each half.
  template <class Block, bool in_place = true>
  static KVPARE_DEVICE std::uint32_t pair(std::uint32_t word, std::uint32_t high_bits, int i) {
    const int at = i * low_bits;
    if constexpr (kind == CodeKind::linear) {
      const int up = in_place ? at & 7 : 0;
      return codes_at(word, high_bits, i, up);
    } else if constexpr (kind == CodeKind::integers) {
      const std::uint32_t levels = look_up<Block, 0>(selectors<Block>(word, high_bits, i & ~1));
      const std::uint32_t x = Block::permute(levels, 0x64646464u, i % 2 == 0 ? 0x4240 : 0x4341);  // 1024 + 128 + level
      return Block::fma2(x, 0x3c003c00u, 0xe480e480u, F16{});
    } else if constexpr (kind == CodeKind::halves) {
      const std::uint32_t codes = selectors<Block>(word, high_bits, i & ~1);
      return Block::permute(look_up<Block, 0>(codes), look_up<Block, 1>(codes), i % 2 == 0 ? 0x6240 : 0x7351);
    } else {
      const std::uint32_t high = word << (16 - bits - at);  // each code at the top of its half
      if constexpr (kind == CodeKind::e5m2) return high & 0xff00ff00u;
      if constexpr (kind == CodeKind::e4m3) return (high & 0x80008000u) | (high >> 1 & 0x3f803f80u);
      return (high & 0x80008000u) | (high & 0x70007000u) >> 3;
    }
  }
  template <bool in_place = true>
  static constexpr KVPARE_HD int gain(int i) {
    if (form.ternary) return most_gain - 8;
    return kind == CodeKind::linear && in_place ? most_gain - (i * low_bits & 7) : most_gain;
  }

 private:
  /// Selectors of `permute` for registers i and i + 1: their low codes, then their high ones, a nibble each.
  template <class Block>
  static KVPARE_DEVICE std::uint32_t selectors(std::uint32_t word, std::uint32_t high_bits, int i) {
    if constexpr (bits == 4)
      return Block::permute(word, 0, i == 0 ? 0x0020 : 0x0031);
    else
      return Block::permute(codes_at(word, high_bits, i, 0) | codes_at(word, high_bits, i + 1, 4), 0, 0x0020);
  }
  /// Byte `plane` of the levels of four codes: of halves, or of level + 128. Sixteen levels are two tables of eight,
  /// from which the top bits of the codes choose.
  template <class Block, int plane>
  static KVPARE_DEVICE std::uint32_t look_up(std::uint32_t codes) {
    constexpr std::uint32_t t0 = table_word(plane, 0), t1 = table_word(plane, 1);
    if constexpr (bits < 4) {
      return Block::permute(t0, t1, codes);
    } else {
      constexpr std::uint32_t t2 = table_word(plane, 2), t3 = table_word(plane, 3);
      const std::uint32_t within = codes & 0x7777u;
      return Block::permute(Block::permute(t0, t1, within), Block::permute(t2, t3, within),
                            (codes & 0x8888u) >> 1 | 0x3210u);
    }
  }
  static constexpr std::uint32_t table_word(int plane, std::size_t word) {
    std::uint32_t bytes = 0;
    for (std::size_t k = 0; k < 4; ++k) {
      const std::size_t code = word * 4 + k;
      if (code >= std::size_t{1} << (bits & 7)) break;
      const float x = level(code);
      const auto number = kind == CodeKind::integers ? static_cast<std::uint32_t>(static_cast<int>(x) + 128)
                                                     : std::uint32_t{kvpare::detail::float_to_half(x)};
      bytes |= (number >> 8 * plane & 255u) << 8 * k;
    }
    return bytes;
  }
  static KVPARE_DEVICE std::uint32_t moved(std::uint32_t word, int from, int to) {
    return from < to ? word << (to - from) : word >> (from - to);
  }
  /// Both codes from bit `up` of their halves on, zeros around them.
  static KVPARE_DEVICE std::uint32_t codes_at(std::uint32_t word, std::uint32_t high_bits, int i, int up) {
    std::uint32_t two = moved(word, i * low_bits, up) & (((1u << low_bits) - 1u) * 0x00010001u) << up;
    if constexpr (bits != low_bits)
      two |= moved(high_bits, FragmentLayout<C, Side::keys>::high_bit(i), up + low_bits) &
             0x00010001u << (up + low_bits);
    return two;
  }
};

/// Where a tile of 16 tokens is.
struct TilePlace {
  const std::byte* page = nullptr;  // keys or values of the page
  Index row_bytes = 0;              // of raw rows
  int first = 0;                    // slot of its first token
  Index page_tokens = 0;
};

/// What a lane has of a row of keys, or of the rows of a pair of tokens of values: words of codes, as loaded.
template <int load_bytes, int loads, bool has_high>
struct CodeWords {
  LaneWords<load_bytes> low[loads];
};
template <int load_bytes, int loads>
struct CodeWords<load_bytes, loads, true> {
  LaneWords<load_bytes> low[loads];
  LaneWords<load_bytes == 4 ? 4 : load_bytes / 2> high[loads];  // of one word of low bits: shared with a neighbour
};
struct NoHalfWord {};
struct HalfWord {
  std::uint32_t last;  // a word that two lanes share: each has half of its registers
};
template <class C, Side side, int D, int load_bytes>
struct CodeRow : CodeWords<load_bytes, D * FragmentLayout<C, side>::low_bits / 32 / load_bytes,
                           FragmentLayout<C, side>::has_high>,
                 std::conditional_t<D * FragmentLayout<C, side>::low_bits / 32 % 4 == 2, HalfWord, NoHalfWord> {
  using Layout = FragmentLayout<C, side>;
  using Numbers = CodeNumbers<C>;
  static constexpr int words = load_bytes / 4, loads = D * Layout::low_bits / 32 / load_bytes;
  static constexpr int lanes = side == Side::keys ? 4 : 8;  // that share a row
  static constexpr bool has_half = D * Layout::low_bits / 32 % 4 == 2;
  static_assert(!(has_half && Layout::has_high));

  /// The channel of half `half` of register r of a lane; of values both halves are of one channel.
  static constexpr KVPARE_HD int channel(int lane, int r, int half) {
    constexpr int per_word = Numbers::per_word;
    return side == Side::keys ? word_of(lane, r) * 2 * per_word + place_of(lane, r) + half * per_word
                              : word_of(lane, r) * per_word + place_of(lane, r);
  }
  /// Which word of the row register r of a lane is from, and which of that word's registers it is.
  static constexpr KVPARE_HD int word_of(int lane, int r) {
    const int word = r / Numbers::per_word;
    return word < loads * words ? (word / words * lanes + lane) * words + word % words
                                : loads * words * lanes + lane / 2;
  }
  static constexpr KVPARE_HD int place_of(int lane, int r) {
    const int place = r % Numbers::per_word;
    return r / Numbers::per_word < loads * words ? place : place + lane % 2 * (Numbers::per_word / 2);
  }

  /// Row `row` of keys, or pair `row` of tokens of values.
  template <class Block>
  KVPARE_DEVICE void load(Block& b, const TilePlace& at, int row, int lane) {
    constexpr Index rows = side == Side::keys ? 1 : 2;
    const TileShape shape{at.page_tokens, D};
    const auto* from =
        reinterpret_cast<const LaneWords<load_bytes>*>(at.page + row * (rows * Layout::row_bytes(shape)));
    KVPARE_DEVICE_UNROLL for (int j = 0; j < loads; ++j) this->low[j] = b.load(from + j * lanes + lane);
    if constexpr (has_half)
      this->last = b.load(reinterpret_cast<const std::uint32_t*>(from + loads * lanes) + lane / 2);
    if constexpr (Layout::has_high) {
      const std::byte* bytes = at.page + Layout::high_at(shape) + row * (rows * Layout::high_row_bytes(shape));
      KVPARE_DEVICE_UNROLL for (int j = 0; j < loads; ++j) {
        const int place = j * lanes + lane;
        this->high[j] = b.load(reinterpret_cast<const std::remove_reference_t<decltype(this->high[0])>*>(bytes) +
                               (words == 1 ? place / 2 : place));
      }
    }
  }
  /// Register r; zeros where it is not `wanted`.
  template <class Block, bool in_place = true>
  KVPARE_DEVICE std::uint32_t pair(int r, int lane, bool wanted = true) const {
    const int word = r / Numbers::per_word, j = word / words, w = word % words;
    std::uint32_t high_bits = 0;
    if constexpr (Layout::has_high) {
      high_bits = this->high[j].w[w / 2] >> (words == 1 ? lane % 2 * 8 : w % 2 * 8);
      if constexpr (!Numbers::looked_up) high_bits = wanted ? high_bits : 0u;
    }
    std::uint32_t low_bits = this->low[j < loads ? j : 0].w[w];
    if constexpr (has_half)
      if (j == loads) low_bits = this->last >> lane % 2 * 8;  // its own registers are where the first ones are
    if (!wanted && !Numbers::looked_up) low_bits = 0;
    const std::uint32_t two = Numbers::template pair<Block, in_place>(low_bits, high_bits, r % Numbers::per_word);
    return wanted || !Numbers::looked_up ? two : 0u;
  }
};

/// The same of ternary codes, 128 channels: digits of two bytes at a time are in bits 8 and 9 of each half.
template <class C, Side side>
struct TernaryRow {
  using Layout = FragmentLayout<C, side>;
  static constexpr bool keys = side == Side::keys;
  static constexpr int lanes = keys ? 4 : 8;
  std::uint32_t first, second, last;  // registers 0 to 9, 10 to 14, 15

  static constexpr KVPARE_HD int channel(int lane, int r, int half) {
    return keys ? lane * 32 + half * 16 + r : lane * 16 + r;
  }
  template <class Block>
  KVPARE_DEVICE void load(Block& b, const TilePlace& at, int row, int lane) {
    const auto* from = reinterpret_cast<const std::uint32_t*>(at.page) + row * Index{keys ? 4 : 8};
    const std::byte* rest = at.page + Layout::high_at({at.page_tokens, 128}) + row * Index{keys ? 10 : 20};
    first = b.load(from + lane);
    if constexpr (keys) {
      second = b.load(reinterpret_cast<const std::uint16_t*>(rest) + lane);
      last = b.load(reinterpret_cast<const std::uint16_t*>(rest) + 4);
    } else {
      second = b.load(reinterpret_cast<const std::uint32_t*>(rest) + lane / 2);
      last = b.load(reinterpret_cast<const std::uint32_t*>(rest) + 4);
    }
  }
  template <class Block, bool in_place = true>
  KVPARE_DEVICE std::uint32_t pair(int r, int lane, bool = true) const {
    constexpr std::uint32_t bytes = 0x00ff00ffu;
    std::uint32_t two = 0;
    if (r < 10) {
      two = (r < 5 ? first : first >> 8) & bytes;
    } else {
      const std::uint32_t of_both = r < 15 ? second : last;
      two = keys ? Block::permute(of_both, 0, 0x4140) : of_both >> lane % 2 * 8 & bytes;
      if (r == 15) two = two * power_of_three(keys ? lane : lane / 2) & bytes;
    }
    KVPARE_DEVICE_UNROLL for (int k = 0; k < 4; ++k)
      if (k < r % 5 && r < 15) two = two * 3 & bytes;
    return two * 3 & 0x03000300u;
  }

 private:
  static KVPARE_DEVICE std::uint32_t power_of_three(int k) { return 0x1b090301u >> 8 * k & 255u; }
};

template <class T>
struct KindOf {
  using type = F16;
};
template <>
struct KindOf<bfloat16> {
  using type = BF16;
};

/// What a number of 16 bits says, and whether it is an infinity or a NaN.
KVPARE_DEVICE bool all_finite(std::uint32_t x, F16) {
  return (x & 0x7c00u) != 0x7c00u && (x & 0x7c000000u) != 0x7c000000u;
}
KVPARE_DEVICE bool all_finite(std::uint32_t x, BF16) {
  return (x & 0x7f80u) != 0x7f80u && (x & 0x7f800000u) != 0x7f800000u;
}

/// Query rows of a task as the second operand, and what is known of them.
struct QueryFragments {
  const std::uint32_t* high;  // [D / 16][lane][2]
  const std::uint32_t* low;   // what f16 or bf16 lack; with `split`
  bool split;
  float factor[2];      // of columns 2t, 2t + 1: from sums of products to units of log2
  const float* sums;    // [groups][8] of the rows, in units of log2
  const float* starts;  // [groups][8] what sums of products start with
};

// Keys: what `score` leaves in s[2h + j] is the logit of token g + 8h and query row 2t + j.

/// Raw keys of 16 bits.
template <Element T, int D>
struct RawKeys {
  using Kind = typename KindOf<T>::type;
  static constexpr int load_bytes = lane_load(D / 2, 16), words = load_bytes / 4, loads = D / 2 / load_bytes;
  static constexpr bool fits = D % 16 == 0, may_split = true, has_sums = false;
  static constexpr int temporaries = 0;  // registers beside those that are held
  static constexpr int groups = 1, most_gain = 0, norm = 12;
  static constexpr float code_factor = 1;
  static constexpr DType type = dtype_of<T>();
  static bool fits_tokens(Index) { return true; }
  static KVPARE_DEVICE float state_factor(const float*) { return 1; }

  struct Registers {
    LaneWords<load_bytes> row[2][loads];
  };

  static constexpr KVPARE_HD int channel(int t, int r, int half) {
    return ((r / words * 4 + t) * words + r % words) * 2 + half;
  }
  static constexpr KVPARE_HD int gain(int) { return 0; }

  template <class Block>
  static KVPARE_DEVICE void load(Block& b, const TilePlace& at, Registers& k) {
    const int g = b.lane() >> 2, t = b.lane() & 3;
    KVPARE_DEVICE_UNROLL for (int h = 0; h < 2; ++h) {
      const auto* row = reinterpret_cast<const LaneWords<load_bytes>*>(at.page + (at.first + g + 8 * h) * at.row_bytes);
      KVPARE_DEVICE_UNROLL for (int j = 0; j < loads; ++j) k.row[h][j] = b.load(row + j * 4 + t);
    }
  }
  template <class Block>
  static KVPARE_DEVICE void score(Block& b, const Registers& k, const QueryFragments& q, const TilePlace&, const float*,
                                  float (&s)[4]) {
    float c[4] = {};
    KVPARE_DEVICE_UNROLL for (int r = 0; r < D / 8; r += 2) {
      const std::uint32_t a[4] = {k.row[0][r / words].w[r % words], k.row[1][r / words].w[r % words],
                                  k.row[0][(r + 1) / words].w[(r + 1) % words],
                                  k.row[1][(r + 1) / words].w[(r + 1) % words]};
      const auto high = *reinterpret_cast<const LaneWords<8>*>(q.high + (r / 2 * 32 + b.lane()) * 2);
      b.mma(c, a, high.w, Kind{});
      if (q.split) {
        const auto low = *reinterpret_cast<const LaneWords<8>*>(q.low + (r / 2 * 32 + b.lane()) * 2);
        b.mma(c, a, low.w, Kind{});
      }
    }
    KVPARE_DEVICE_UNROLL for (int i = 0; i < 4; ++i) s[i] = c[i] * q.factor[i & 1];
  }
};

/// `bytes` bytes of scales or zeros of a token, as they are stored.
template <int bytes>
struct PackedNumbers {
  std::uint32_t w[bytes < 4 ? 1 : (bytes + 3) / 4];

  template <class Block>
  KVPARE_DEVICE void load(Block& b, const std::byte* from) {
    constexpr int once = lane_load(bytes, 16);
    if constexpr (once > 0) {
      KVPARE_DEVICE_UNROLL for (int i = 0; i < bytes / once; ++i) {
        const auto words = b.load(reinterpret_cast<const LaneWords<once>*>(from) + i);
        KVPARE_DEVICE_UNROLL for (int x = 0; x < once / 4; ++x) w[i * (once / 4) + x] = words.w[x];
      }
    } else if constexpr (bytes % 2 == 0) {
      KVPARE_DEVICE_UNROLL for (int i = 0; i < bytes / 2; ++i) {
        const std::uint32_t two = b.load(reinterpret_cast<const std::uint16_t*>(from) + i);
        w[i / 2] = i % 2 == 0 ? two : w[i / 2] | two << 16;
      }
    } else {
      KVPARE_DEVICE_UNROLL for (int i = 0; i < bytes; ++i) {
        const std::uint32_t one = b.load(reinterpret_cast<const std::uint8_t*>(from) + i);
        w[i / 4] = i % 4 == 0 ? one : w[i / 4] | one << i % 4 * 8;
      }
    }
  }
  /// The i-th number of `size` bytes.
  template <int size>
  KVPARE_DEVICE std::uint32_t number(int i) const {
    if constexpr (size == 4) return w[i];
    return w[i * size / 4] >> (i * size % 4 * 8) & ((1u << (size & 3) * 8) - 1u);
  }
};

/// Codes with scales per token, or per group of a token's channels.
template <GroupCodec C, Side side, int D>
struct CodedSide {
  using Numbers = CodeNumbers<C>;
  using Layout = FragmentLayout<C, side>;
  using Kind = F16;
  static constexpr GroupForm form = C::form;
  static constexpr int bits = Layout::low_bits;
  static constexpr int group = static_cast<int>(form.along == Along::tokens ? D
                                                : form.group > 0            ? form.group
                                                                            : D / form.parts);
  static constexpr int groups = D / group;
  /// A load of four (eight) lanes is within one group; or is 128 bits of a row, in which there are `span` groups: then
  /// every group has its lanes, and products of its own in which the others' codes are zeros.
  static constexpr int per_word = Layout::per_unit;
  static constexpr int span = group * bits >= 128 ? 1 : 128 / (group * bits);
  /// What is left over by whole words: half of one, of a whole row of one group.
  static constexpr int half_word = D * bits / 32 % 4 == 2 && groups == 1 && per_word == 4 ? 2 : 0;
  static constexpr int load_bytes =
      form.ternary ? (D == 128 && groups == 1 ? 4 : 0)
      : (D * bits / 32 - half_word) % 4 != 0 || D * bits % 32 != 0 || D % group != 0
          ? 0
          : lane_load(D * bits / 32 - half_word, span > 1 ? 4 : group * bits / 32);
  static constexpr bool scaled = form.scale != ScaleType::one;
  static constexpr bool has_zero = form.zero != ZeroType::none || Numbers::offset != 0;
  static constexpr bool fits = Numbers::kind != CodeKind::none && load_bytes > 0 && form.along == Along::channels &&
                               (scaled || !has_zero) && groups <= 16 && (span == 1 || span == 2 || span == 4);
  using Row = std::conditional_t<form.ternary, TernaryRow<C, side>, CodeRow<C, side, D, load_bytes>>;

  static constexpr int temporaries = (span > 1 && has_zero ? 20 : 0) + Numbers::table_registers;
  /// Registers of a row (a pair of tokens) that belong to a group, and the first of them.
  static constexpr int registers = span > 1 ? per_word : D / 8 / groups;
  static constexpr KVPARE_HD int first_register(int part) { return part / span * registers; }
  /// Register r of a row, for group `part`; `lane` of `lanes` that share a load.
  template <class Block>
  static KVPARE_DEVICE std::uint32_t operand(const Row& row, int r, int part, int lane) {
    return row.template pair<Block>(r, lane, span == 1 || lane * span / Row::lanes == part % span);
  }

  static constexpr int scale_bytes = static_cast<int>(Layout::scale_bytes),
                       zero_bytes = static_cast<int>(Layout::zero_bytes);
  struct Scales {  // of tokens g and g + 8
    PackedNumbers<scale_bytes * groups> scale[2];
    PackedNumbers<zero_bytes * groups> zero[2];
  };
  template <class Block>
  static KVPARE_DEVICE void load_scales(Block& b, const TilePlace& at, Scales& to) {
    const TileShape shape{at.page_tokens, D};
    KVPARE_DEVICE_UNROLL for (int h = 0; h < 2; ++h) {
      const Index first = (at.first + (b.lane() >> 2) + 8 * h) * Index{groups};
      if constexpr (scale_bytes > 0) to.scale[h].load(b, at.page + Layout::scales_at(shape) + first * scale_bytes);
      if constexpr (zero_bytes > 0) to.zero[h].load(b, at.page + Layout::zeros_at(shape) + first * zero_bytes);
    }
  }
  static KVPARE_DEVICE GroupBits bits_of(const Scales& from, int h, int i) {
    GroupBits all;
    if constexpr (scale_bytes > 0) all.scale = from.scale[h].template number<scale_bytes>(i);
    if constexpr (zero_bytes > 0) all.zero = from.zero[h].template number<zero_bytes>(i);
    return all;
  }
};

/// Coded keys.
template <GroupCodec C, int D>
struct CodedKeys : CodedSide<C, Side::keys, D> {
  using Base = CodedSide<C, Side::keys, D>;
  using Base::bits, Base::groups, Base::group, Base::per_word, Base::scaled;
  using typename Base::Kind;
  using typename Base::Numbers;
  static constexpr bool may_split = false, has_sums = Base::has_zero;
  static constexpr float middle = Numbers::middle;
  static constexpr int most_gain = Numbers::most_gain, norm = 12;
  static constexpr float code_factor = Numbers::factor;
  static bool fits_tokens(Index) { return true; }
  static KVPARE_DEVICE float state_factor(const float* state) {
    if constexpr (scaled)
      return 1;
    else
      return C::scale_of(GroupBits{}, state);
  }

  struct Registers {
    typename Base::Row row[2];  // tokens g, g + 8
    typename Base::Scales scales;
  };

  static constexpr KVPARE_HD int channel(int t, int r, int half) {
    return Base::Row::channel(t, r, half);
  }
  static constexpr KVPARE_HD int gain(int r) { return Numbers::gain(r % per_word); }

  template <class Block>
  static KVPARE_DEVICE void load(Block& b, const TilePlace& at, Registers& k) {
    const int g = b.lane() >> 2, t = b.lane() & 3;
    KVPARE_DEVICE_UNROLL for (int h = 0; h < 2; ++h) k.row[h].load(b, at, at.first + g + 8 * h, t);
    Base::load_scales(b, at, k.scales);
  }
  template <class Block>
  static KVPARE_DEVICE void score(Block& b, const Registers& k, const QueryFragments& q, const TilePlace&,
                                  const float* state, float (&s)[4]) {
    KVPARE_DEVICE_UNROLL for (int i = 0; i < 4; ++i) s[i] = 0;
    const int t = b.lane() & 3;
    KVPARE_DEVICE_UNROLL for (int part = 0; part < groups; ++part) {
      float c[4] = {};
      if constexpr (has_sums)
        KVPARE_DEVICE_UNROLL for (int i = 0; i < 4; ++i) c[i] = q.starts[part * 8 + t * 2 + (i & 1)];
      KVPARE_DEVICE_UNROLL for (int x = 0; x < Base::registers; x += 2) {
        const int r = Base::first_register(part) + x;
        const auto operand = [&](int h, int of) { return Base::template operand<Block>(k.row[h], of, part, t); };
        const std::uint32_t a[4] = {operand(0, r), operand(1, r), operand(0, r + 1), operand(1, r + 1)};
        const auto high = *reinterpret_cast<const LaneWords<8>*>(q.high + (r / 2 * 32 + b.lane()) * 2);
        b.mma(c, a, high.w, Kind{});
      }
      KVPARE_DEVICE_UNROLL for (int h = 0; h < 2; ++h) {
        const GroupBits stored = Base::bits_of(k.scales, h, part);
        const float scale = scaled ? C::scale_of(stored, state) : 1.0f;
        KVPARE_DEVICE_UNROLL for (int j = 0; j < 2; ++j) {
          s[2 * h + j] += scale * (c[2 * h + j] * q.factor[j]);
          if constexpr (has_sums)
            s[2 * h + j] += (scale * Numbers::offset + C::zero_of(stored, state)) * q.sums[part * 8 + t * 2 + j];
        }
      }
    }
  }
};

/// Coded keys with scales per channel over groups of tokens (KIVI): scales go into the query, zeros times the query are
/// one more product whose rows are all alike. D * 4 bytes more per group of tokens.
template <GroupCodec C, int D>
struct ChannelKeys {
  using Numbers = CodeNumbers<C>;
  using Layout = FragmentLayout<C, Side::keys>;
  using Kind = F16;
  static constexpr GroupForm form = C::form;
  static constexpr int bits = Layout::low_bits, per_word = Layout::per_unit;
  static constexpr int load_bytes = D * bits % 128 != 0 ? 0 : lane_load(D * bits / 32, 16);
  static constexpr int words = load_bytes > 0 ? load_bytes / 4 : 1,
                       loads = load_bytes > 0 ? D *bits / 32 / load_bytes : 1;
  static constexpr int numbers = words * 32 / bits;  // channels of a load
  static constexpr int scale_loads = numbers < 8 ? 1 : numbers / 8;
  static constexpr bool has_zero = form.zero != ZeroType::none || Numbers::offset != 0;
  static constexpr bool fits = Numbers::kind == CodeKind::linear && load_bytes > 0 && numbers % 8 == 0 &&
                               form.along == Along::tokens&& form.scale == ScaleType::f16&& form.zero !=
                                   ZeroType::integer&& Numbers::factor == 1;
  static constexpr bool may_split = false, has_sums = false;
  static constexpr int temporaries = 16;
  static constexpr int groups = 1, group = D, most_gain = 24, norm = 2;
  static constexpr float code_factor = 1;
  static bool fits_tokens(Index tokens) { return FragmentLayout<C, Side::keys>::group({tokens, D}) % 16 == 0; }
  static KVPARE_DEVICE float state_factor(const float*) { return 1; }

  struct Registers {
    CodeRow<C, Side::keys, D, load_bytes> row[2];
    LaneWords<16> scale[loads][scale_loads], zero[form.zero == ZeroType::none ? 1 : loads][scale_loads];
  };

  static constexpr KVPARE_HD int channel(int t, int r, int half) {
    const int word = r / per_word;
    return ((word / words * 4 + t) * words + word % words) * (32 / bits) + r % per_word + half * per_word;
  }
  static constexpr KVPARE_HD int gain(int) { return 24; }

  template <class Block>
  static KVPARE_DEVICE void load(Block& b, const TilePlace& at, Registers& k) {
    const int g = b.lane() >> 2, t = b.lane() & 3;
    const TileShape shape{at.page_tokens, D};
    KVPARE_DEVICE_UNROLL for (int h = 0; h < 2; ++h) k.row[h].load(b, at, at.first + g + 8 * h, t);
    const Index first = at.first / Layout::group(shape) * D;
    KVPARE_DEVICE_UNROLL for (int j = 0; j < loads; ++j) {
      const Index channel = first + (j * 4 + t) * numbers;
      const auto* scales = reinterpret_cast<const LaneWords<16>*>(at.page + Layout::scales_at(shape) + channel * 2);
      KVPARE_DEVICE_UNROLL for (int i = 0; i < scale_loads; ++i) k.scale[j][i] = b.load(scales + i);
      if constexpr (form.zero != ZeroType::none) {
        const auto* zeros = reinterpret_cast<const LaneWords<16>*>(at.page + Layout::zeros_at(shape) + channel * 2);
        KVPARE_DEVICE_UNROLL for (int i = 0; i < scale_loads; ++i) k.zero[j][i] = b.load(zeros + i);
      }
    }
  }
  /// Halves of channels c and c + per_word of a lane's run.
  template <class Block>
  static KVPARE_DEVICE std::uint32_t two(const LaneWords<16> (&run)[scale_loads], int c) {
    const int d = c + per_word;
    return Block::permute(run[c / 8].w[c % 8 / 2], run[d / 8].w[d % 8 / 2], c % 2 == 0 ? 0x5410u : 0x7632u);
  }
  template <class Block>
  static KVPARE_DEVICE void score(Block& b, const Registers& k, const QueryFragments& q, const TilePlace&, const float*,
                                  float (&s)[4]) {
    const int t = b.lane() & 3;
    float c[4] = {}, bias[4] = {};
    KVPARE_DEVICE_UNROLL for (int r = 0; r < D / 8; r += 2) {
      const auto plain = *reinterpret_cast<const LaneWords<8>*>(q.high + (r / 2 * 32 + b.lane()) * 2);
      std::uint32_t a[4], scaled[2], zeros[4];
      KVPARE_DEVICE_UNROLL for (int x = 0; x < 2; ++x) {
        const int word = (r + x) / per_word, i = (r + x) % per_word, j = word / words;
        const int place = word % words * (32 / bits) + i;
        a[2 * x] = k.row[0].template pair<Block, false>(r + x, t);
        a[2 * x + 1] = k.row[1].template pair<Block, false>(r + x, t);
        const std::uint32_t scale = two<Block>(k.scale[j], place);
        scaled[x] = Block::mul2(plain.w[x], scale, F16{});
        if constexpr (form.zero != ZeroType::none) {
          std::uint32_t zero = two<Block>(k.zero[j], place);
          if constexpr (Numbers::offset != 0)
            zero = Block::fma2(scale, Block::pack(Numbers::offset, Numbers::offset, F16{}), zero, F16{});
          zeros[2 * x] = zeros[2 * x + 1] = zero;
        } else if constexpr (has_zero) {
          zeros[2 * x] = zeros[2 * x + 1] =
              Block::mul2(scale, Block::pack(Numbers::offset, Numbers::offset, F16{}), F16{});
        }
      }
      b.mma(c, a, scaled, Kind{});
      if constexpr (has_zero) b.mma(bias, zeros, plain.w, Kind{});
    }
    KVPARE_DEVICE_UNROLL for (int i = 0; i < 4; ++i) s[i] = (c[i] + bias[i] * 0x1p-24f) * q.factor[i & 1];
  }
};

// Values: `accumulate` adds p[h][j], token g + 8h of query row 2t + j, times the tile to acc[m][2h + j]: channel
// channel(g, 2m + h) of query row 2t + j.

/// Raw values of 16 bits. Probabilities are split in two numbers of 16 bits.
template <Element T, int D>
struct RawValues {
  using Kind = typename KindOf<T>::type;
  static constexpr int load_bytes = lane_load(D / 4, 16), words = load_bytes / 4, loads = D / 4 / load_bytes;
  static constexpr bool fits = D % 16 == 0, coded = false, may_be_nan = true, scaled = false, has_zero = false;
  static constexpr int groups = 1, temporaries = 0;
  static constexpr DType type = dtype_of<T>();

  struct Registers {
    LaneWords<load_bytes> row[4][loads];  // tokens 2t, 2t + 1, 2t + 8, 2t + 9
  };
  static constexpr KVPARE_HD int channel(int g, int r) {
    return ((r / 2 / words * 8 + g) * words + r / 2 % words) * 2 + r % 2;
  }
  static constexpr KVPARE_HD float output_factor(int) { return 1; }
  static KVPARE_DEVICE float state_factor(const float*) { return 1; }
  static KVPARE_DEVICE int token(int t, int i) { return 2 * t + (i & 1) + (i & 2) * 4; }

  template <class Block>
  static KVPARE_DEVICE void load(Block& b, const TilePlace& at, Registers& v) {
    const int g = b.lane() >> 2, t = b.lane() & 3;
    KVPARE_DEVICE_UNROLL for (int i = 0; i < 4; ++i) {
      const auto* row =
          reinterpret_cast<const LaneWords<load_bytes>*>(at.page + (at.first + token(t, i)) * at.row_bytes);
      KVPARE_DEVICE_UNROLL for (int j = 0; j < loads; ++j) v.row[i][j] = b.load(row + j * 8 + g);
    }
  }
  /// Tokens whose bit is 0 become zeros: nobody sees them, and they may hold anything.
  static KVPARE_DEVICE void clear(int t, std::uint32_t seen, Registers& v) {
    KVPARE_DEVICE_UNROLL for (int i = 0; i < 4; ++i) {
      const std::uint32_t keep = (seen >> token(t, i) & 1u) != 0 ? ~0u : 0u;
      KVPARE_DEVICE_UNROLL for (int j = 0; j < loads; ++j)
        KVPARE_DEVICE_UNROLL for (int w = 0; w < words; ++w) v.row[i][j].w[w] &= keep;
    }
  }
  static KVPARE_DEVICE bool finite(const Registers& v) {
    bool all = true;
    KVPARE_DEVICE_UNROLL for (int i = 0; i < 4; ++i)
      KVPARE_DEVICE_UNROLL for (int j = 0; j < loads; ++j)
        KVPARE_DEVICE_UNROLL for (int w = 0; w < words; ++w) all = all && all_finite(v.row[i][j].w[w], Kind{});
    return all;
  }
  /// Probabilities as the second operand: what 16 bits hold, and the rest.
  template <class Block>
  static KVPARE_DEVICE void columns(Block& b, const float (&p)[2][2], std::uint32_t (&high)[2],
                                    std::uint32_t (&low)[2]) {
    KVPARE_DEVICE_UNROLL for (int h = 0; h < 2; ++h) {
      const std::uint32_t rounded = Block::pack(p[h][0], p[h][1], Kind{});
      low[h] = b.transpose(Block::pack(p[h][0] - Block::unpack_low(rounded, Kind{}),
                                       p[h][1] - Block::unpack_high(rounded, Kind{}), Kind{}));
      high[h] = b.transpose(rounded);
    }
  }
  template <class Block>
  static KVPARE_DEVICE void accumulate(Block& b, const Registers& v, const float (&p)[2][2], const float*,
                                       float (&acc)[D / 16][4], float (&)[1][2]) {
    std::uint32_t high[2], low[2];
    columns(b, p, high, low);
    KVPARE_DEVICE_UNROLL for (int m = 0; m < D / 16; ++m) {
      const int j = m / words, w = m % words;
      const std::uint32_t a[4] = {Block::permute(v.row[0][j].w[w], v.row[1][j].w[w], 0x5410),
                                  Block::permute(v.row[0][j].w[w], v.row[1][j].w[w], 0x7632),
                                  Block::permute(v.row[2][j].w[w], v.row[3][j].w[w], 0x5410),
                                  Block::permute(v.row[2][j].w[w], v.row[3][j].w[w], 0x7632)};
      b.mma(acc[m], a, high, Kind{});
      b.mma(acc[m], a, low, Kind{});
    }
  }
  /// The same for one query row at a time, whose tokens are bits of `seen_by(row)`: what it does not see is zeros, and
  /// what becomes of the other rows is dropped. The same sums in the same order.
  template <class Block, class SeenBy>
  static KVPARE_DEVICE void accumulate_apart(Block& b, const Registers& v, const float (&p)[2][2],
                                             const SeenBy& seen_by, float (&acc)[D / 16][4]) {
    const int t = b.lane() & 3;
    std::uint32_t high[2], low[2];
    columns(b, p, high, low);
    KVPARE_DEVICE_ROLL for (int column = 0; column < 8; ++column) {
      const std::uint32_t seen = seen_by(column);
      std::uint32_t keep[4];
      KVPARE_DEVICE_UNROLL for (int i = 0; i < 4; ++i) keep[i] = (seen >> token(t, i) & 1u) != 0 ? ~0u : 0u;
      KVPARE_DEVICE_UNROLL for (int m = 0; m < D / 16; ++m) {
        const int j = m / words, w = m % words;
        const std::uint32_t x[4] = {v.row[0][j].w[w] & keep[0], v.row[1][j].w[w] & keep[1], v.row[2][j].w[w] & keep[2],
                                    v.row[3][j].w[w] & keep[3]};
        const std::uint32_t a[4] = {Block::permute(x[0], x[1], 0x5410), Block::permute(x[0], x[1], 0x7632),
                                    Block::permute(x[2], x[3], 0x5410), Block::permute(x[2], x[3], 0x7632)};
        float c[4] = {acc[m][0], acc[m][1], acc[m][2], acc[m][3]};
        b.mma(c, a, high, Kind{});
        b.mma(c, a, low, Kind{});
        KVPARE_DEVICE_UNROLL for (int i = 0; i < 4; ++i) acc[m][i] = column == 2 * t + (i & 1) ? c[i] : acc[m][i];
      }
    }
  }
};

/// Coded values: a token's scale goes into its probabilities.
template <GroupCodec C, int D>
struct CodedValues : CodedSide<C, Side::values, D> {
  using Base = CodedSide<C, Side::values, D>;
  using Base::groups, Base::group, Base::per_word, Base::scaled, Base::has_zero;
  using typename Base::Kind;
  using typename Base::Numbers;
  static constexpr bool coded = true, may_be_nan = Numbers::kind == CodeKind::e5m2;

  struct Registers {
    typename Base::Row row[2];     // tokens 2t, 2t + 1; 2t + 8, 2t + 9
    typename Base::Scales scales;  // tokens g, g + 8
  };
  static constexpr KVPARE_HD int channel(int g, int r) {
    return Base::Row::channel(g, r, 0);
  }
  /// What zeros add to register r of a lane.
  static KVPARE_DEVICE float zero_of(const float (&zeros)[has_zero ? groups : 1][2], int g, int r, int j) {
    float x = 0;
    if constexpr (has_zero)
      KVPARE_DEVICE_UNROLL for (int lanes = 0; lanes < Base::span; ++lanes) {
        const float zero = zeros[channel(0, r) / group + lanes][j];
        x = Base::span == 1 || g * Base::span / 8 == lanes ? zero : x;
      }
    return x;
  }
  static constexpr KVPARE_HD float output_factor(int r) {
    return power_of_two(Numbers::gain(r % per_word)) * Numbers::factor;
  }
  static KVPARE_DEVICE float state_factor(const float* state) {
    if constexpr (scaled)
      return 1;
    else
      return C::scale_of(GroupBits{}, state);
  }

  template <class Block>
  static KVPARE_DEVICE void load(Block& b, const TilePlace& at, Registers& v) {
    const int g = b.lane() >> 2, t = b.lane() & 3;
    KVPARE_DEVICE_UNROLL for (int i = 0; i < 2; ++i) v.row[i].load(b, at, at.first / 2 + t + 4 * i, g);
    Base::load_scales(b, at, v.scales);
  }
  static KVPARE_DEVICE void clear(int t, std::uint32_t seen, Registers& v) {
    KVPARE_DEVICE_UNROLL for (int i = 0; i < 2; ++i) {
      const std::uint32_t two = seen >> (2 * t + 8 * i);
      const std::uint32_t keep = ((two & 1u) != 0 ? 0xffffu : 0u) | ((two & 2u) != 0 ? 0xffff0000u : 0u);
      KVPARE_DEVICE_UNROLL for (auto& load : v.row[i].low)
        KVPARE_DEVICE_UNROLL for (auto& word : load.w) word &= keep;
    }
  }
  /// A power of two above the largest scale of token g + 8h, as an exponent.
  static KVPARE_DEVICE float exponent(const Registers& v, int h, const float* state) {
    std::uint32_t most = 0;
    KVPARE_DEVICE_UNROLL for (int i = 0; i < groups; ++i) {
      const std::uint32_t scale =
          std::bit_cast<std::uint32_t>(C::scale_of(Base::bits_of(v.scales, h, i), state)) & 0x7fffffffu;
      most = scale > most ? scale : most;
    }
    const int e = static_cast<int>(most >> 23) - 126;
    return static_cast<float>(e < -60 ? -60 : e);
  }
  template <class Block>
  static KVPARE_DEVICE void accumulate(Block& b, const Registers& v, const float (&p)[2][2], const float* state,
                                       float (&acc)[D / 16][4], float (&zeros)[has_zero ? groups : 1][2]) {
    const int g = b.lane() >> 2;
    KVPARE_DEVICE_UNROLL for (int part = 0; part < groups; ++part) {
      std::uint32_t columns[2];
      KVPARE_DEVICE_UNROLL for (int h = 0; h < 2; ++h) {
        const GroupBits stored = Base::bits_of(v.scales, h, part);
        const float scale = scaled ? C::scale_of(stored, state) : 1.0f;
        // What nobody sees may have any bytes for a scale.
        const float weight[2] = {p[h][0] == 0 ? 0.0f : p[h][0] * scale, p[h][1] == 0 ? 0.0f : p[h][1] * scale};
        const std::uint32_t rounded = Block::pack(weight[0], weight[1], Kind{});
        columns[h] = b.transpose(rounded);
        if constexpr (has_zero) {
          constexpr float middle = Numbers::middle * Numbers::factor;
          zeros[part][0] -= Block::unpack_low(rounded, Kind{}) * middle;
          zeros[part][1] -= Block::unpack_high(rounded, Kind{}) * middle;
          if constexpr (Base::form.zero != ZeroType::none || Numbers::offset + middle != 0) {
            const float zero = scale * (Numbers::offset + middle) + C::zero_of(stored, state);
            KVPARE_DEVICE_UNROLL for (int j = 0; j < 2; ++j) zeros[part][j] += p[h][j] == 0 ? 0.0f : p[h][j] * zero;
          }
        }
      }
      KVPARE_DEVICE_UNROLL for (int x = 0; x < Base::registers; x += 2) {
        const int r = Base::first_register(part) + x, m = r / 2;
        const auto operand = [&](int i, int of) { return Base::template operand<Block>(v.row[i], of, part, g); };
        const std::uint32_t a[4] = {operand(0, r), operand(0, r + 1), operand(1, r), operand(1, r + 1)};
        b.mma(acc[m], a, columns, Kind{});
      }
    }
  }
};

/// Operands of a codec at a width; `fits` says whether there are any.
struct NoFragments {
  static constexpr bool fits = false;
  static bool fits_tokens(Index) { return false; }
};
template <class C, int D>
struct KeysOf {
  using type = NoFragments;
};
template <class C, int D>
struct ValuesOf {
  using type = NoFragments;
};
template <GroupCodec C, int D>
struct KeysOf<C, D> {
  using type =
      std::conditional_t<!has_fragment_order<C>(), NoFragments,
                         std::conditional_t<C::form.along == Along::tokens, ChannelKeys<C, D>, CodedKeys<C, D>>>;
};
template <GroupCodec C, int D>
struct ValuesOf<C, D> {
  using type =
      std::conditional_t<has_fragment_order<C>() && C::form.along == Along::channels, CodedValues<C, D>, NoFragments>;
};
template <FoldedCodec C, int D>
struct KeysOf<C, D> : KeysOf<typename DeviceTiles<C, Side::keys>::Stored, D> {};
template <FoldedCodec C, int D>
struct ValuesOf<C, D> : ValuesOf<typename DeviceTiles<C, Side::values>::Stored, D> {};
template <Element T, int D>
  requires(sizeof(T) == 2)
struct KeysOf<Raw<T>, D> {
  using type = RawKeys<T, D>;
};
template <Element T, int D>
  requires(sizeof(T) == 2)
struct ValuesOf<Raw<T>, D> {
  using type = RawValues<T, D>;
};

}  // namespace kvpare::cuda::detail

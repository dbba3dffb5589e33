// What a codec is: the form of a tile, the keys or the values of up to 64 tokens of one head.
//
// | expression                                             | gives    | promises                                           |
// |--------------------------------------------------------|----------|----------------------------------------------------|
// | `C::name`                                              | text     | unique among the codecs of a cache; stable: snapshots hold it |
// | `C::rows_move`                                         | `bool`   | each token is coded by itself: rows may be written one by one |
// |                                                        |          | and move to other slots and pages without a second rounding   |
// | `C::fits(shape)`                                       | `bool`   | whether there is such a tile; nothing below is called otherwise |
// | `C::tile_bytes(shape)`                                 | `Index`  | constexpr, exact: bytes of a whole tile              |
// | `C::encode(shape, rows, first, count, state, tile)`    | –        | codes `count` rows of floats [count, width] into slots |
// |                                                        |          | [first, first + count); where rows do not move, `first` is 0 and the |
// |                                                        |          | call writes the whole tile, empty slots included    |
// | `C::decode(shape, tile, slot, state, row)`             | –        | one row back; any bytes at all give some floats     |
// | `C::state_floats(width)`                               | `Index`  | optional, 0 without: floats of state, see below      |
// | `C::reads_facts`                                       | `bool`   | optional: `encode(shape, rows, first, count, facts, state, tile)`, |
// |                                                        |          | see TokenFacts                                       |
// | `C::reads_attention`                                   | `bool`   | optional, with reads_facts: false where positions are all it reads |
// | `C::reads_positions`                                   | `bool`   | optional, with reads_facts: `decode(shape, tile, slot, position, state, row)` |
// | `C::host_only`                                         | `bool`   | optional: no kernel can call it; a device refuses the format       |
//
// Neither throws, allocates, or touches a byte outside of the tile and the rows. NaN and infinities: said at each codec.
// Device  KVPARE_HD, or constexpr, lets kernels call them, as those of kvpare's codecs; a backend on the host does not ask.
//
// State    What tokens of one (sequence, layer, kv head) share and no page holds: a channel balancer, channel ranges, a
//          calibrated scale. Null stands for the neutral state (factors 1, shifts 0). Made before the first page that uses
//          it, then constant.
//          | `C::make_state(width, measured, state)` | KVPARE_HD unless host_only, optional: see Measured                 |
//          | `C::needs_query_peak`                 | optional `bool`: make_state reads query_peak                       |
//          | `C::needs_query_window`               | optional `bool`: make_state reads query_squares                    |
//          | `C::needs_rope`                       | optional `bool`: make_state reads rope                             |
//          | `C::ranges_of_all`                    | optional `bool`: what is measured are all tokens of the head, also |
//          |                                       | those that are not about to be coded (the evicted left out)        |
//          | `C::state_reads_rows`                 | optional `bool`: make_state reads rows and positions               |
//          | `C::state_of_layer`                   | optional `bool`: all kv heads of a layer share one state; then      |
//          |                                       | make_state sees the rows of all heads, head by head, and ranges    |
//          |                                       | over all of them, and neither squares nor queries                  |
//          | `C::needs_state`                      | optional `bool`: there is no neutral state, the cache refuses to code |
//          |                                       | without one                                                        |
//          | `C::given_floats(width)`              | optional `Index`, with state_of_layer: so many floats of the state  |
//          |                                       | are the caller's (`KvCache::share_state`), make_state copies them   |
//          |                                       | from Measured::given and makes the rest of rows                    |
//          A codec that takes state but makes none gets it from the caller (`KvCache::set_state`), or the neutral one.
// Order    The bytes written here are the canonical ones: what snapshots hold and tests compare. A backend may keep the same
//          codes and scales in another order inside its pages, in just as many bytes.
//
// Some codecs say more, so that a backend can attend to the codes as they are:
//
// | what                | says                                                                          | where      |
// |---------------------|-------------------------------------------------------------------------------|------------|
// | `C::form`           | x' = scale * level(code) + zero, scale and zero per group: see GroupForm      | GroupCodec |
// | `C::Inner`, folds   | a linear transform around another codec, folded into q and the output         | FoldedCodec |
//
// The smallest codec, which keeps the sign and nothing else:
//
//   struct Signs {
//     static constexpr std::string_view name = "signs";
//     static constexpr bool rows_move = true;
//     static constexpr bool fits(TileShape s) { return s.width % 8 == 0; }
//     static constexpr Index tile_bytes(TileShape s) { return s.tokens * s.width / 8; }
//     static KVPARE_HD void encode(TileShape s, const float* rows, Index first, Index count, const float*,
//                                  std::byte* tile) {
//       for (Index i = 0; i < count * s.width; ++i) {
//         const Index bit = first * s.width + i;
//         const std::byte mask{static_cast<unsigned char>(1u << bit % 8)};
//         tile[bit / 8] = rows[i] < 0 ? tile[bit / 8] | mask : tile[bit / 8] & ~mask;
//       }
//     }
//     static KVPARE_HD void decode(TileShape s, const std::byte* tile, Index slot, const float*, float* row) {
//       for (Index c = 0, bit = slot * s.width; c < s.width; ++c, ++bit)
//         row[c] = (tile[bit / 8] >> bit % 8 & std::byte{1}) != std::byte{0} ? -1.0f : 1.0f;
//     }
//   };
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "../core/config.hpp"
#include "../core/rope.hpp"

namespace kvpare {

/// Slots of a page (16, 32 or 64) and channels of a head.
struct TileShape {
  Index tokens = 0, width = 0;
  friend bool operator==(const TileShape&, const TileShape&) = default;
};

/// What is known of tokens beside their rows.
struct TokenFacts {
  const Position* positions = nullptr;  // [count], or null where nobody knows them
  const float* attention = nullptr;     // [count] the largest share of attention of late, NaN = unknown; or null

  /// The same of tokens [first, …).
  constexpr KVPARE_HD TokenFacts from(Index first) const {
    return {positions != nullptr ? positions + first : nullptr, attention != nullptr ? attention + first : nullptr};
  }
};

/// How many of the newest observed query rows count towards Measured::query_squares.
inline constexpr Index query_window = 32;

/// What a codec's state is made of: the keys or values of one head's tokens that are about to be coded, or of all of them.
struct Measured {
  const float *min = nullptr, *max = nullptr;  // [width] of each channel; NaN are left out
  const float* query_peak = nullptr;           // [width] largest |q| of the observed query rows of the head's group; or null
  const float* sum_squares = nullptr;          // [width]; or null
  Index tokens = 0;                            // that were measured
  const float* query_squares = nullptr;        // [width] sum of q^2 over the newest observed rows and the group; or null
  Index query_vectors = 0;                     // rows times query heads in these sums
  const float *layer_min = nullptr, *layer_max = nullptr;  // [width] over all kv heads of the layer; or null
  RopeView rope = {};                                      // no pairs: none, or this is the side of the values
  const float* rows = nullptr;          // [tokens, width] with state_reads_rows, in the order of the list
  const Position* positions = nullptr;  // [tokens] with state_reads_rows
  const float* numbers = nullptr;       // what the method says to its codecs, see Precision::numbers
  Index number_count = 0;
  const float* given = nullptr;  // [given_floats of the codec] the caller's part of the state; or null

  /// The largest magnitude of all channels; 0 where there is no number.
  constexpr KVPARE_HD float peak(Index width) const {
    float most = 0;
    for (Index c = 0; c < width; ++c) {
      if (!(min[c] <= max[c])) continue;
      const float amax = -min[c] > max[c] ? -min[c] : max[c];
      if (amax > most) most = amax;
    }
    return most;
  }
};

namespace detail {

// Each way to have them is a concept of its own: clang 14 evaluates all of a nested `requires a || b`.
template <class C>
concept EncodesRows = requires(TileShape shape, const float* rows, Index n, const float* state, std::byte* tile) {
  { C::encode(shape, rows, n, n, state, tile) } -> std::same_as<void>;
};
template <class C>
concept EncodesByFacts = requires(TileShape shape, const float* rows, Index n, TokenFacts facts, const float* state,
                                  std::byte* tile) {
  requires C::reads_facts;
  { C::encode(shape, rows, n, n, facts, state, tile) } -> std::same_as<void>;
};
template <class C>
concept DecodesRows = requires(TileShape shape, const std::byte* tile, Index n, const float* state, float* row) {
  { C::decode(shape, tile, n, state, row) } -> std::same_as<void>;
};
template <class C>
concept DecodesByPosition = requires(TileShape shape, const std::byte* tile, Index n, Position position,
                                     const float* state, float* row) {
  requires C::reads_positions;
  { C::decode(shape, tile, n, position, state, row) } -> std::same_as<void>;
};

}  // namespace detail

template <class C>
concept Codec = requires(TileShape shape) {
  { C::name } -> std::convertible_to<std::string_view>;
  { C::rows_move } -> std::convertible_to<bool>;
  { C::fits(shape) } -> std::same_as<bool>;
  { C::tile_bytes(shape) } -> std::same_as<Index>;
} && (detail::EncodesRows<C> || detail::EncodesByFacts<C>) && (detail::DecodesRows<C> || detail::DecodesByPosition<C>);

/// Does its encode take TokenFacts?
template <Codec C>
constexpr KVPARE_HD bool reads_facts() {
  if constexpr (requires { C::reads_facts; })
    return C::reads_facts;
  else
    return false;
}
/// And does it go by their attention? It does unless `C::reads_attention` is false.
template <Codec C>
constexpr KVPARE_HD bool reads_attention() {
  if constexpr (requires { C::reads_attention; })
    return C::reads_attention;
  else
    return reads_facts<C>();
}
/// Does its decode take the position of the token?
template <Codec C>
constexpr KVPARE_HD bool reads_positions() {
  if constexpr (requires { C::reads_positions; })
    return C::reads_positions;
  else
    return false;
}
/// Is it out of reach of kernels?
template <Codec C>
constexpr KVPARE_HD bool host_only() {
  if constexpr (requires { C::host_only; })
    return C::host_only;
  else
    return false;
}

/// C::encode, whichever it has.
template <Codec C>
KVPARE_HD void encode_rows(TileShape shape, const float* rows, Index first, Index count, const TokenFacts& facts,
                           const float* state, std::byte* tile) {
  if constexpr (reads_facts<C>())
    C::encode(shape, rows, first, count, facts, state, tile);
  else
    C::encode(shape, rows, first, count, state, tile);
}
/// C::decode, whichever it has.
template <Codec C>
KVPARE_HD void decode_row(TileShape shape, const std::byte* tile, Index slot, Position position, const float* state,
                          float* row) {
  if constexpr (reads_positions<C>())
    C::decode(shape, tile, slot, position, state, row);
  else
    C::decode(shape, tile, slot, state, row);
}

/// Floats of state that a codec takes; 0 for most.
template <Codec C>
constexpr KVPARE_HD Index state_floats(Index width) {
  if constexpr (requires { C::state_floats(width); })
    return C::state_floats(width);
  else
    return 0;
}

/// Floats that the caller gives of a state whose rest the codec makes; 0 for most, which have all from one of the two.
template <class C>
constexpr KVPARE_HD Index given_floats(Index width) {
  if constexpr (requires { C::given_floats(width); })
    return C::given_floats(width);
  else
    return 0;
}

/// Can a codec make its state itself?
template <class C>
concept MakesState = requires(Index width, const Measured& measured, float* state) {
  { C::make_state(width, measured, state) } -> std::same_as<void>;
};

/// Does it need to have seen the queries for that?
template <Codec C>
constexpr KVPARE_HD bool needs_query_peak() {
  if constexpr (requires { C::needs_query_peak; })
    return C::needs_query_peak;
  else
    return false;
}

/// Does it need the newest of them?
template <class C>
constexpr KVPARE_HD bool needs_query_window() {
  if constexpr (requires { C::needs_query_window; })
    return C::needs_query_window;
  else
    return false;
}

/// Does it need to know how the layer's keys were turned?
template <class C>
constexpr KVPARE_HD bool needs_rope() {
  if constexpr (requires { C::needs_rope; })
    return C::needs_rope;
  else
    return false;
}

/// Does making the state take the rows themselves?
template <class C>
constexpr KVPARE_HD bool state_reads_rows() {
  if constexpr (requires { C::state_reads_rows; })
    return C::state_reads_rows;
  else
    return false;
}

/// Is its state the same for all kv heads of a layer?
template <class C>
constexpr KVPARE_HD bool state_of_layer() {
  if constexpr (requires { C::state_of_layer; })
    return C::state_of_layer;
  else
    return false;
}

/// Is it nothing without a state?
template <class C>
constexpr KVPARE_HD bool needs_state() {
  if constexpr (requires { C::needs_state; })
    return C::needs_state;
  else
    return false;
}

/// Are the ranges those of all tokens of the head?
template <Codec C>
constexpr KVPARE_HD bool ranges_of_all() {
  if constexpr (requires { C::ranges_of_all; })
    return C::ranges_of_all;
  else
    return false;
}

/// What the numbers of one group have in common: a token, or a channel.
enum class Along : std::uint8_t {
  channels,  // a group is some channels of one token
  tokens     // a group is some tokens of one channel
};

/// How a group's scale is stored.
enum class ScaleType : std::uint8_t { one, f16, f32, e8m0, e4m3 };

/// What is added to scale * level.
enum class ZeroType : std::uint8_t {
  none,
  minimum,  // a number of the scale's type: the group's least value
  integer   // an int16 z: x' = scale * (level + z)
};

/// Group quantisation in one value: every number has a code, every group of numbers a scale and perhaps a zero.
///
///   x' = scale * level(code) + zero,   level(code) = code - offset, or levels[code] where there is a table
struct GroupForm {
  int bits = 8;          // 8, 5, 4, 3, 2 or 1: codes 0 … 2^bits - 1
  bool ternary = false;  // codes 0, 1, 2, five to a byte; `bits` is 2 then
  bool table = false;    // levels come from C::levels, a constexpr array of 2^bits floats
  int offset = 0;
  Along along = Along::channels;
  Index group = 0;  // numbers per group; 0 = all channels of the token, or all slots of the page,
  Index parts = 1;  // in this many equal groups
  ScaleType scale = ScaleType::f16;
  ZeroType zero = ZeroType::none;

  constexpr KVPARE_HD int codes() const { return ternary ? 3 : 1 << bits; }
  /// Numbers per group of a tile.
  constexpr KVPARE_HD Index group_of(TileShape s) const {
    return group > 0 ? group : (along == Along::channels ? s.width : s.tokens) / parts;
  }
  /// Groups of a tile: [tokens][width / group], or [tokens / group][width].
  constexpr KVPARE_HD Index groups(TileShape s) const { return s.tokens * s.width / group_of(s); }
  friend bool operator==(const GroupForm&, const GroupForm&) = default;
};

/// What one group's scale and zero look like in memory: the low bytes of the stored type.
struct GroupBits {
  std::uint32_t scale = 0;
  std::uint32_t zero = 0;  // minimum: bits of the scale's type; integer: those of an int16
  friend bool operator==(const GroupBits&, const GroupBits&) = default;
};

/// A codec that is nothing but group quantisation. `state`, where it takes one, is a single float: a global factor on all
/// scales (null = 1).
///
/// | expression                                            | gives       |                                               |
/// |-------------------------------------------------------|-------------|-----------------------------------------------|
/// | `C::form`                                             | `GroupForm` |                                               |
/// | `C::quantize(x, stride, n, state, codes, code_stride)`| `GroupBits` | codes of the n numbers x[i * stride]          |
/// | `C::scale_of(bits, state)`                            | `float`     |                                               |
/// | `C::zero_of(bits, state)`                             | `float`     | 0 where there is none                         |
/// | `C::level(code)`                                      | `float`     |                                               |
template <class C>
concept GroupCodec = Codec<C> && requires(const float* x, Index n, const float* state, std::uint8_t* codes, GroupBits bits) {
  { C::form } -> std::convertible_to<GroupForm>;
  { C::quantize(x, n, n, state, codes, n) } -> std::same_as<GroupBits>;
  { C::scale_of(bits, state) } -> std::same_as<float>;
  { C::zero_of(bits, state) } -> std::same_as<float>;
  { C::level(std::uint8_t{}) } -> std::same_as<float>;
};

/// A linear transform around another codec: what is stored is T x (+ shift), by `Inner`. Attention needs no transform per token:
///
///   keys     q·k' = fold_query(q)·(what Inner stores) + the bias it returns
///   values   Σ p v' = fold_output(Σ p (what Inner stores), Σ p)
///
/// | expression                                | promises                                                            |
/// |-------------------------------------------|---------------------------------------------------------------------|
/// | `C::Inner`                                | a codec, which may be folded itself; its state follows C's own      |
/// | `C::own_state_floats(width)`              | the first floats of the state are C's, the rest is Inner's          |
/// | `C::inner_width(width)`                   | optional: channels that Inner stores, at most `width`; the first so many floats of |
/// |                                           | what forward and fold_query leave, and backward and fold_output begin with  |
/// | `C::forward(width, state, x)`             | one row, in place, before Inner codes it                            |
/// | `C::backward(width, state, x)`            | one row, in place, after Inner has decoded it                       |
/// | `C::fold_query(width, state, q)`          | one query, in place; gives the bias (0 without shift)               |
/// | `C::fold_output(width, state, sum, out)`  | one accumulator, in place; `sum` is the sum of its probabilities    |
/// | `C::encode_over(…)`                       | optional: encode of rows that may be written over, for kernels      |
template <class C>
concept FoldedCodec = Codec<C> && Codec<typename C::Inner> &&
    requires(Index width, const float* state, float* x, float sum) {
  { C::own_state_floats(width) } -> std::same_as<Index>;
  { C::forward(width, state, x) } -> std::same_as<void>;
  { C::backward(width, state, x) } -> std::same_as<void>;
  { C::fold_query(width, state, x) } -> std::same_as<float>;
  { C::fold_output(width, state, sum, x) } -> std::same_as<void>;
};

/// Channels that the codec inside stores.
template <FoldedCodec C>
constexpr KVPARE_HD Index inner_width(Index width) {
  if constexpr (requires { C::inner_width(width); })
    return C::inner_width(width);
  else
    return width;
}

/// How well a backend runs a codec for one side (keys or values) of a shape.
enum class Support : std::uint8_t {
  unsupported,  // no such tile: a block is larger than the head, …
  generic,      // right, at the cost of decoding every row to floats
  fused         // attention on the codes as they lie
};
constexpr std::string_view name_of(Support s) {
  return s == Support::fused ? "fused" : s == Support::generic ? "generic" : "unsupported";
}

}  // namespace kvpare

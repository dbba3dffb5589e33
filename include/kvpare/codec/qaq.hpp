// QAQ: bits for every token by how much noise attention bears from it, in pages of one size.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../core/text.hpp"
#include "codec.hpp"
#include "packing.hpp"
#include "rounding.hpp"

namespace kvpare {

enum class QaqSide : std::uint8_t { keys, values };

/// Bits of a token whose numbers have the range r and may be off by σ. Both are 0 at least.
enum class QaqRule : std::uint8_t {
  paper,          // ceil(log2(r / (2√3 σ)))
  reference_code  // ceil(log2(r / (4√3 σ) + 1)): mostly one bit less
};

namespace detail {

inline constexpr Index qaq_block = 16, qaq_most_tokens = 64, qaq_most_blocks = qaq_most_tokens / qaq_block;

/// How a tile's tokens are coded: who is where, in how many bits.
struct QaqPlan {
  std::uint8_t slot_of[qaq_most_tokens] = {};  // [place]
  std::uint8_t asked[qaq_most_tokens] = {};    // [slot] bits, before blocks and capacity
  std::uint8_t bits[qaq_most_blocks] = {};     // of 16 places
};

/// Calls f.template operator()<bits>() for the bits of a block; not for 0.
template <class F>
void with_qaq_bits(int bits, const F& f) {
  switch (bits) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    case 4:
      return f.template operator()<4>();
    case 5:
      return f.template operator()<5>();
    case 8:
      return f.template operator()<8>();
    default:
      return;
  }
}

}  // namespace detail

/// Tokens of one page in different numbers of bits, `capacity_bits` on average at most, and the most extreme numbers
/// of every token beside them.
///
/// Value    x' = scale * code + zero, code 0 … 2^b - 1, per token; outliers: plus their delta. With 0 bits x' = zero.
///          [low, high], the range of a token without its outliers, is cut into 2^b cells and x' is the middle of one:
///          scale = half((high - low) / 2^b), zero = half(low + (high - low) / 2^(b + 1)); 0 bits: scale 0.
///          Codes are made with these two as they are stored; a number midway between two codes takes the upper one.
/// Outliers the `outliers` lowest and highest numbers of every token (of equal ones the first channels): not in the
///          range. delta = half(x - what its code stands for)
/// Bits     What a token asks for, by its target σ: see QaqRule, then clamped to [b_min, b_max].
///            keys    σ of the state, the same for all tokens
///            values  σ of the state / |S|, S = facts.attention: the largest share of attention of late. Unknown
///            (NaN, null): b_max
///          Without a target: b_max, and b_min where low = high or S = 0.
/// Blocks   Tokens are sorted by the bits they ask for (most first; then by high - low times |S|, unknown S = 1; then
///          by slot) and cut into blocks of 16. A block has as many bits as its first token asks for, rounded up to
///            keys    0, 1, 2, 3, 4, 5, 8 (width % 32 == 0), else 0, 2, 4, 8
///            values  0, 2, 4, 8
/// Capacity All blocks together have at most capacity_bits * tokens / 16. While they do not have what they want, the
///          one with the largest (high - low) |S| / 2^bits of those whose next step still fits is given it (of equal
///          ones the first): the noise over its target is as small as the page allows, for all blocks alike. `demand`
///          tells what was asked.
/// Layout   codes, place by place, rows of width * b / 8 bytes, least significant bit first; then zeros up to
///          tokens * width * capacity_bits / 8 | scales [tokens], by place | zeros [tokens], by place |
///          deltas [2 outliers][tokens], by slot, the lowest numbers first | channels [2 outliers][tokens], bytes, by
///          slot | places [tokens], bytes, by slot | bits of the blocks [tokens / 16], bytes
/// Bytes    tile_bytes({T, W}) = T * W * capacity_bits / 8 + T * (5 + 6 outliers) + T / 16
///          bits per number: capacity_bits + (40.5 + 48 outliers) / W; W = 128, one outlier per side: + 0.69
/// Fits     16, 32, 48 or 64 tokens, width a multiple of 16 up to 256, 2 outliers < width
/// Error    |x - x'| <= scale / 2 + 2^-10 max(|low|, |high|); outliers 2^-11 |delta|. scale / (2√3) <= σ for a token
///          whose block has what it asked for.
/// NaN      counts as 0; infinities, and all above 2^126, as ±2^126. Scales, zeros and deltas above 65504 are 65504.
/// State    {σ, b_min, b_max}, see make_state; σ 0 or NaN, or null: no targets, the page is filled, bits 0 … 8
/// Empty    slots decode to 0 and ask for nothing
/// Again    A tile with other facts is encode of its decoded rows (fewer bits: the second rounding is one of whole
///          cells), or of the rows themselves where they are kept.
/// Source   Dong et al. 2024, "QAQ: Quality Adaptive Quantization for LLM KV Cache", arXiv 2403.04643. Ours: a page
///          has a size, so targets are met as far as it goes; neighbours in noise share bits; a list of outliers per
///          token, as deltas, in place of one per tensor; query heads of a group count by their maximum.
template <int capacity_bits, QaqSide side, int outliers = 1, QaqRule rule = QaqRule::paper>
struct Qaq {
  static_assert(capacity_bits >= 1 && capacity_bits <= 8, "1 to 8 bits on average");
  static_assert(outliers >= 0 && outliers <= 8, "up to 8 outliers on each side of a token");

 private:
  static constexpr ShortText text = [] {
    ShortText t("qaq");
    t << Index{capacity_bits} << (side == QaqSide::keys ? "_keys" : "_values");
    if (outliers != 1) t << "_o" << Index{outliers};
    if (rule == QaqRule::reference_code) t << "_code";
    return t;
  }();
  static constexpr Index block = detail::qaq_block, most_tokens = detail::qaq_most_tokens;

 public:
  static constexpr std::string_view name = text.view();
  static constexpr bool rows_move = false, host_only = true, reads_facts = true, ranges_of_all = true,
                        needs_query_window = side == QaqSide::keys;
  static constexpr Index listed = 2 * outliers;  // outliers of a token
  static constexpr QaqSide coded_side = side;

  static constexpr bool fits(TileShape t) {
    return t.tokens >= block && t.tokens <= most_tokens && t.tokens % block == 0 && t.width >= 16 && t.width <= 256 &&
           t.width % 16 == 0 && listed < t.width;
  }
  static constexpr Index tile_bytes(TileShape t) { return Parts(t).end; }

  /// Where a tile has what.
  struct Parts {
    Index scales, zeros, deltas, channels, places, bits, end;
    constexpr explicit Parts(TileShape t)
        : scales(t.tokens * t.width * capacity_bits / 8), zeros(scales + 2 * t.tokens), deltas(zeros + 2 * t.tokens),
          channels(deltas + 2 * listed * t.tokens), places(channels + listed * t.tokens), bits(places + t.tokens),
          end(bits + t.tokens / block) {}
  };

  /// The fewest bits that a block of this width may have, from `bits` on.
  static constexpr int rounded_bits(Index width, int bits) {
    const bool all = side == QaqSide::keys && width % 32 == 0;
    if (bits > (all ? 5 : 4)) return 8;
    return all || bits <= 0 ? (bits > 0 ? bits : 0) : bits <= 2 ? 2 : 4;
  }

  /// The bits that a range asks for, unclamped; `sigma` > 0.
  static int bits_for(double range, double sigma) {
    const double cells = range / (std::sqrt(12.0) * sigma);
    const double x = rule == QaqRule::paper ? cells : cells / 2 + 1;
    int bits = 0;
    for (double most = 1; bits < 64 && most < x; most *= 2) ++bits;
    return bits;
  }

  static constexpr Index state_floats(Index) { return 3; }
  /// numbers = {σ_S (error of a share of attention), σ_X (error of an attention output), |q|^2, b_min, b_max}; those
  /// that are missing: 0, 0, 0, 0, 8. |q|^2 of 0 is the mean of the queries observed. T: the tokens measured.
  ///
  /// Formula  keys    σ = √(ln(T³ / (T - 1) σ_S² + 1) / |q|²)
  ///          values  σ = σ_X / √T
  static void make_state(Index width, const Measured& measured, float* state) {
    const auto number = [&](Index i, double without) {
      return measured.numbers != nullptr && i < measured.number_count ? static_cast<double>(measured.numbers[i])
                                                                      : without;
    };
    const double tokens = static_cast<double>(std::max<Index>(measured.tokens, 2));
    double sigma = 0;
    if (side == QaqSide::keys) {
      double norm = number(2, 0);
      if (!(norm > 0) && measured.query_squares != nullptr && measured.query_vectors > 0) {
        norm = 0;
        for (Index c = 0; c < width; ++c) norm += static_cast<double>(measured.query_squares[c]);
        norm /= static_cast<double>(measured.query_vectors);
      }
      const double error = number(0, 0);
      if (norm > 0 && error > 0)
        sigma = std::sqrt(std::log1p(tokens * tokens * tokens / (tokens - 1) * error * error) / norm);
    } else {
      sigma = number(1, 0) / std::sqrt(tokens);
    }
    state[0] = sigma > 0 ? static_cast<float>(std::min(sigma, double{detail::largest_coded})) : 0.0f;
    state[1] = static_cast<float>(number(3, 0)), state[2] = static_cast<float>(number(4, 8));
  }

  static void encode(TileShape t, const float* rows, Index, Index count, const TokenFacts& facts, const float* state,
                     std::byte* tile) {
    std::fill_n(tile, Parts(t).end, std::byte{0});
    Index first[detail::qaq_most_blocks] = {};
    encode_with(
        t, rows, count, facts, state, tile, [&](const std::uint8_t* bits) { starts(t, bits, first); },
        [&](Index place, int bits, const std::uint8_t* codes) {
          put_row(t, tile + first[place / block], place, bits, codes);
        });
  }
  /// The same where no facts are known.
  static void encode(TileShape t, const float* rows, Index first, Index count, const float* state, std::byte* tile) {
    encode(t, rows, first, count, TokenFacts{}, state, tile);
  }

  static void decode(TileShape t, const std::byte* tile, Index slot, const float*, float* row) {
    decode_with(t, tile, slot, row, [&](Index place, Index first, int bits, std::uint8_t* codes) {
      get_row(t, tile + first, place, bits, codes);
    });
  }

  /// Average bits of the `count` tokens' numbers: what their targets ask for, and what the page gives.
  struct Demand {
    double asked = 0, given = 0;
  };
  static Demand demand(TileShape t, const float* rows, Index count, const TokenFacts& facts, const float* state) {
    Token tokens[most_tokens];
    for (Index s = 0; s < count; ++s) tokens[s] = look_at(t.width, rows + s * t.width);
    const detail::QaqPlan plan = arrange(t, tokens, count, facts, state);
    Demand d;
    for (Index s = 0; s < count; ++s) {
      d.asked += static_cast<double>(plan.asked[s]) / static_cast<double>(count);
      d.given += static_cast<double>(plan.bits[s / block]) / static_cast<double>(count);  // s is a place here
    }
    return d;
  }

  // For backends that keep the codes in an order of their own: block by block in as many bytes, and all else as it is
  // here.

  /// `begin(bits of the blocks)`, then `row(place, bits, codes)` for every place; all that is not codes is written
  /// here.
  template <class Begin, class Row>
  static void encode_with(TileShape t, const float* rows, Index count, const TokenFacts& facts, const float* state,
                          std::byte* tile, const Begin& begin, const Row& row) {
    const Parts at(t);
    Token tokens[most_tokens];
    for (Index s = 0; s < count; ++s) tokens[s] = look_at(t.width, rows + s * t.width);
    const detail::QaqPlan plan = arrange(t, tokens, count, facts, state);
    begin(plan.bits);
    for (Index b = 0; b < t.tokens / block; ++b) tile[at.bits + b] = std::byte{plan.bits[b]};
    std::uint8_t codes[256];
    for (Index place = 0; place < t.tokens; ++place) {
      const Index slot = plan.slot_of[place];
      tile[at.places + slot] = static_cast<std::byte>(place);
      for (Index k = 0; k < listed; ++k) {
        detail::put_bytes(tile + at.deltas + 2 * (k * t.tokens + slot), 0, 2);
        tile[at.channels + k * t.tokens + slot] = std::byte{0};
      }
      const int bits = plan.bits[place / block];
      if (slot >= count) {
        detail::put_bytes(tile + at.scales + 2 * place, 0, 2), detail::put_bytes(tile + at.zeros + 2 * place, 0, 2);
        std::fill_n(codes, t.width, std::uint8_t{0});
        row(place, bits, codes);
        continue;
      }
      const float* x = rows + slot * t.width;
      const Token& token = tokens[slot];
      const float range = token.high - token.low;
      float step = bits == 0 ? 0.0f : range / static_cast<float>(1 << bits);
      if (step < detail::least_scale) step = 0;
      const std::uint16_t scale = detail::saturated_half(step);
      const std::uint16_t zero = detail::saturated_half(token.low + range / static_cast<float>(2 << bits));
      detail::put_bytes(tile + at.scales + 2 * place, scale, 2),
          detail::put_bytes(tile + at.zeros + 2 * place, zero, 2);
      quantize(x, t.width, bits, detail::half_to_float(scale), detail::half_to_float(zero), codes);
      for (Index k = 0; k < listed; ++k) {
        const Index c = token.channels[k];
        const float dense = value(detail::half_to_float(scale), codes[c], detail::half_to_float(zero));
        detail::put_bytes(tile + at.deltas + 2 * (k * t.tokens + slot),
                          detail::saturated_half(detail::as_coded(x[c]) - dense), 2);
        tile[at.channels + k * t.tokens + slot] = static_cast<std::byte>(c);
      }
      row(place, bits, codes);
    }
  }

  /// One row; `get(place, where the codes of its block begin, bits, codes)` where there are any.
  template <class Get>
  static void decode_with(TileShape t, const std::byte* tile, Index slot, float* row, const Get& get) {
    const Parts at(t);
    std::uint8_t bits[detail::qaq_most_blocks] = {}, codes[256] = {};
    Index first[detail::qaq_most_blocks] = {};
    read_bits(t, tile, bits);
    starts(t, bits, first);
    const Index place = place_of(t, tile, slot);
    const int here = bits[place / block];
    if (here > 0) get(place, first[place / block], here, codes);
    const float scale = half_at(tile + at.scales + 2 * place), zero = half_at(tile + at.zeros + 2 * place);
    for (Index c = 0; c < t.width; ++c) row[c] = here == 0 ? zero : value(scale, codes[c], zero);
    for (Index k = 0; k < listed; ++k) {
      const Index i = k * t.tokens + slot, c = std::to_integer<Index>(tile[at.channels + i]);
      row[std::min(c, t.width - 1)] += half_at(tile + at.deltas + 2 * i);
    }
  }
  /// One row of codes in its block.
  static void put_row(TileShape t, std::byte* codes_of_block, Index place, int bits, const std::uint8_t* codes) {
    std::byte* row = codes_of_block + place % block * t.width * bits / 8;
    detail::with_qaq_bits(bits, [&]<int b>() { detail::pack_codes<b>(codes, t.width, row); });
  }
  static void get_row(TileShape t, const std::byte* codes_of_block, Index place, int bits, std::uint8_t* codes) {
    const std::byte* row = codes_of_block + place % block * t.width * bits / 8;
    detail::with_qaq_bits(bits, [&]<int b>() { detail::unpack_codes<b>(row, t.width, codes); });
  }
  /// Where the codes end.
  static Index code_end(TileShape t, const std::byte* tile) {
    std::uint8_t bits[detail::qaq_most_blocks] = {};
    read_bits(t, tile, bits);
    Index all = 0;
    for (const std::uint8_t b : bits) all += block * t.width * b / 8;
    return all;
  }
  /// The bits of a tile's blocks. Of bytes that nobody encoded: what could be.
  static void read_bits(TileShape t, const std::byte* tile, std::uint8_t* bits) {
    const std::byte* stored = tile + Parts(t).bits;
    int all = 0;
    for (Index b = 0; b < t.tokens / block; ++b) {
      const int here = std::to_integer<int>(stored[b]);
      const bool may_be = here <= 8 && rounded_bits(t.width, here) == here &&
                          all + here <= capacity_bits * static_cast<int>(t.tokens / block);
      bits[b] = static_cast<std::uint8_t>(may_be ? here : 0);
      all += bits[b];
    }
  }
  /// Where the codes of blocks begin.
  static void starts(TileShape t, const std::uint8_t* bits, Index* first) {
    Index at = 0;
    for (Index b = 0; b < t.tokens / block; ++b) first[b] = at, at += block * t.width * bits[b] / 8;
  }
  static Index place_of(TileShape t, const std::byte* tile, Index slot) {
    return std::min<Index>(std::to_integer<Index>(tile[Parts(t).places + slot]), t.tokens - 1);
  }
  static float value(float scale, std::uint8_t code, float zero) {
    return detail::product(scale, static_cast<float>(code)) + zero;
  }

 private:
  struct Token {
    float low = 0, high = 0;  // without outliers
    std::uint8_t channels[listed > 0 ? listed : 1] = {};
  };

  static float half_at(const std::byte* from) {
    return detail::half_to_float(static_cast<std::uint16_t>(detail::get_bytes(from, 2)));
  }

  /// Words in the order of the numbers: their extremes are found without a branch.
  static Token look_at(Index width, const float* x) {
    std::int32_t words[256];
    for (Index c = 0; c < width; ++c) words[c] = detail::ordered(detail::as_coded(x[c]) + 0.0f);
    constexpr std::int32_t none = std::numeric_limits<std::int32_t>::min();
    Token token;
    const auto extreme = [&] {
      std::int32_t most = none;
      for (Index c = 0; c < width; ++c) most = words[c] > most ? words[c] : most;
      return most;
    };
    const auto take = [&](int first) {
      for (int k = 0; k < outliers; ++k) {
        const std::int32_t most = extreme();
        Index c = 0;
        while (c + 1 < width && words[c] != most) ++c;
        token.channels[first + k] = static_cast<std::uint8_t>(c), words[c] = none;
      }
    };
    // The lowest numbers are the highest ones of the inverse.
    for (Index c = 0; c < width; ++c) words[c] = ~words[c];
    take(0);
    token.low = detail::from_ordered(~extreme());
    for (Index c = 0; c < width; ++c) words[c] = words[c] == none ? none : ~words[c];
    take(outliers);
    token.high = detail::from_ordered(extreme());
    return token;
  }

  static int stated_bits(float x, int otherwise) { return x >= 0 && x <= 8 ? static_cast<int>(x) : otherwise; }

  static detail::QaqPlan arrange(TileShape t, const Token* tokens, Index count, const TokenFacts& facts,
                                 const float* state) {
    const float sigma = state == nullptr ? 0.0f : state[0];
    const int b_min = state == nullptr ? 0 : stated_bits(state[1], 0);
    const int b_max = std::max(b_min, state == nullptr ? 8 : stated_bits(state[2], 8));

    detail::QaqPlan plan;
    double noise[most_tokens] = {};  // of a token without bits, by what attention makes of it
    for (Index s = 0; s < count; ++s) {
      noise[s] = static_cast<double>(tokens[s].high) - static_cast<double>(tokens[s].low);
      bool known = true;
      if (side == QaqSide::values) {
        known = facts.attention != nullptr && facts.attention[s] == facts.attention[s];
        if (known) noise[s] *= std::abs(static_cast<double>(detail::as_coded(facts.attention[s])));
      }
      int bits = noise[s] > 0 ? b_max : b_min;
      if (sigma > 0) bits = known ? bits_for(noise[s], static_cast<double>(sigma)) : b_max;
      plan.asked[s] = static_cast<std::uint8_t>(std::clamp(bits, b_min, b_max));
    }
    for (Index s = 0; s < t.tokens; ++s) plan.slot_of[s] = static_cast<std::uint8_t>(s);
    std::sort(plan.slot_of, plan.slot_of + count, [&](std::uint8_t a, std::uint8_t b) {
      if (plan.asked[a] != plan.asked[b]) return plan.asked[a] > plan.asked[b];
      return noise[a] != noise[b] ? noise[a] > noise[b] : a < b;
    });

    const Index blocks = t.tokens / block;
    int wanted[detail::qaq_most_blocks] = {}, left = capacity_bits * static_cast<int>(blocks);
    double block_noise[detail::qaq_most_blocks] = {};
    for (Index b = 0; b * block < count; ++b) {
      wanted[b] = rounded_bits(t.width, plan.asked[plan.slot_of[b * block]]);
      for (Index place = b * block; place < std::min((b + 1) * block, count); ++place)
        block_noise[b] = std::max(block_noise[b], noise[plan.slot_of[place]]);
    }
    for (;;) {
      Index best = blocks;
      int step = 0;
      for (Index b = 0; b < blocks; ++b) {
        const int more = rounded_bits(t.width, plan.bits[b] + 1) - plan.bits[b];
        if (plan.bits[b] >= wanted[b] || more > left) continue;
        if (best < blocks && block_noise[b] / (1 << plan.bits[b]) <= block_noise[best] / (1 << plan.bits[best]))
          continue;
        best = b, step = more;
      }
      if (best == blocks) return plan;
      plan.bits[best] = static_cast<std::uint8_t>(plan.bits[best] + step), left -= step;
    }
  }

  static void quantize(const float* x, Index width, int bits, float scale, float zero, std::uint8_t* codes) {
    const float inverse = detail::inverse_of(scale), top = static_cast<float>((1 << bits) - 1);
    for (Index c = 0; c < width; ++c) {
      const float cell = detail::rounded((detail::as_coded(x[c]) - zero) * inverse) + 0.5f;
      const float not_low = cell > 0 ? cell : 0.0f;
      codes[c] = static_cast<std::uint8_t>(static_cast<int>(not_low < top ? not_low : top));
    }
  }
};

static_assert(Codec<Qaq<3, QaqSide::keys>> && Codec<Qaq<3, QaqSide::values, 0, QaqRule::reference_code>>);

}  // namespace kvpare

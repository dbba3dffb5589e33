// Quantisers of groups of numbers, as KIVI, MiKV, KVTuner and ZipCache write them, in doubles.
//
// A library that computes in single precision may choose the neighbouring code where a number lies close to the middle
// of two. `from_tie` says how close, in steps: compare codes where it is not tiny, and decoded values everywhere.
#pragma once

#include <functional>
#include <string>

#include "number_formats.hpp"

namespace kvpare::oracle {

enum class Rounding : std::uint8_t {
  half_even,
  half_away,  // from zero
  half_up     // floor(x + 1/2)
};
inline double rounded(double x, Rounding how) {
  if (how == Rounding::half_away) return std::round(x);
  if (how == Rounding::half_up) return std::floor(x + 0.5);
  const double down = std::floor(x), over = x - down;
  if (over != 0.5) return over < 0.5 ? down : down + 1;
  return std::fmod(down, 2) == 0 ? down : down + 1;
}

/// How a scale, and a minimum beside it, are kept.
enum class Stored : std::uint8_t { exact, f16, f32 };
inline double stored(double x, Stored as) {
  return as == Stored::f16 ? to_half(x) : as == Stored::f32 ? static_cast<double>(static_cast<float>(x)) : x;
}

/// One group: x' = scale (code + shift) + zero.
struct Coded {
  std::vector<int> codes;
  double scale = 0, zero = 0;    // as stored
  Index shift = 0;               // an integer zero point; large where all numbers are alike and far from 0
  std::vector<double> from_tie;  // |distance of x / scale to the nearest half step|, 0 … 0.5; 0.5 where scale is 0
  double value(Index i) const { return scale * static_cast<double>(item(codes, i) + shift) + zero; }
  std::vector<double> values() const {
    std::vector<double> x;
    for (Index i = 0; i < count_of(codes); ++i) x.push_back(value(i));
    return x;
  }
};

inline double distance_from_tie(double steps) { return std::abs(steps - std::floor(steps) - 0.5); }

/// How a group is rounded. Uncertain in all specifications: whether codes are formed with the scale and the minimum as
/// stored or before they are rounded; `codes_from_stored` chooses. KIVI's reference computes in the stored type
/// throughout.
struct QuantiserSettings {
  int bits = 4;
  Stored scale = Stored::f16;
  bool codes_from_stored = true;
  Rounding rounding = Rounding::half_even;
};
using Quantiser = std::function<Coded(const std::vector<double>&)>;

/// z = min, s = (max - z) / (2^b - 1), c = clamp(round((x - z) / s), 0, 2^b - 1), x' = c s + z.
/// Zeros   s = 0: codes 0, and every x' is z exactly as stored
/// Source  KIVI, arXiv 2402.02750; MiKV, arXiv 2402.18096 (α, β)
inline Coded affine(const std::vector<double>& x, const QuantiserSettings& how) {
  require(!x.empty(), "oracle: a group has numbers");
  const double last = std::ldexp(1.0, how.bits) - 1;
  const auto [least, most] = std::minmax_element(x.begin(), x.end());
  Coded coded;
  coded.zero = stored(*least, how.scale);
  coded.scale = stored((*most - *least) / last, how.scale);
  const double zero = how.codes_from_stored ? coded.zero : *least;
  const double scale = how.codes_from_stored ? coded.scale : (*most - *least) / last;
  for (const double v : x) {
    const double steps = scale == 0 ? 0 : (v - zero) / scale;
    coded.codes.push_back(static_cast<int>(std::clamp(rounded(steps, how.rounding), 0.0, last)));
    coded.from_tie.push_back(steps <= 0 || steps >= last ? 0.5 : distance_from_tie(steps));
  }
  return coded;
}

/// s = max|x| / (2^(b-1) - 1), c = round(x / s) within ±(2^(b-1) - 1), x' = c s.
/// Uncertain  the tie rule and, below 8 bits, the divisor are not printed; taken from the 8-bit rule, max|x| / 127
inline Coded symmetric(const std::vector<double>& x, const QuantiserSettings& how) {
  require(how.bits >= 2, "oracle: a sign and a bit at least");
  const double last = std::ldexp(1.0, how.bits - 1) - 1, amax = largest_magnitude(x);
  Coded coded;
  coded.scale = stored(amax / last, how.scale);
  const double scale = how.codes_from_stored ? coded.scale : amax / last;
  for (const double v : x) {
    const double steps = scale == 0 ? 0 : v / scale;
    coded.codes.push_back(static_cast<int>(std::clamp(rounded(steps, how.rounding), -last, last)));
    coded.from_tie.push_back(std::abs(steps) >= last ? 0.5 : distance_from_tie(steps));
  }
  return coded;
}

/// KVTuner's "vanilla": signed codes and an integer zero point, so that the minimum is not exact.
///   qmin = -2^(b-1), qmax = 2^(b-1) - 1, s = max(max - min, 1e-5) / (qmax - qmin), z = round(min / s) - qmin,
///   c = clip(round(x / s - z), qmin, qmax), x' = (c + z) s
/// Source  KVTuner, arXiv 2502.04420, as released
inline Coded vanilla(const std::vector<double>& x, const QuantiserSettings& how) {
  require(!x.empty(), "oracle: a group has numbers");
  const double qmin = -std::ldexp(1.0, how.bits - 1), qmax = -qmin - 1;
  const auto [least, most] = std::minmax_element(x.begin(), x.end());
  Coded coded;
  const double exact = std::max(*most - *least, 1e-5) / (qmax - qmin);
  coded.scale = stored(exact, how.scale);
  const double scale = how.codes_from_stored ? coded.scale : exact;
  coded.shift = static_cast<Index>(rounded(*least / scale, how.rounding) - qmin);
  for (const double v : x) {
    const double steps = v / scale - static_cast<double>(coded.shift);
    coded.codes.push_back(static_cast<int>(std::clamp(rounded(steps, how.rounding), qmin, qmax)));
    coded.from_tie.push_back(distance_from_tie(steps));
  }
  // The zero point may sit on the other side of a tie as well, and moves all codes with it.
  for (double& tie : coded.from_tie) tie = std::min(tie, distance_from_tie(*least / scale));
  return coded;
}

/// Three levels -d, 0, d by codes 0, 1, 2: d = max|x|, c = clamp(round(x / d) + 1, 0, 2), x' = (c - 1) d. All zeros:
/// codes 1.
/// Uncertain  the specification prints this rule for ggml's q2_0, whose fourth level its encoder never writes, and none
///            for a ternary format of a cache; another d (the mean of |x|, a refit) is as good a reading
inline Coded ternary(const std::vector<double>& x, const QuantiserSettings& how) {
  const double amax = largest_magnitude(x);
  Coded coded;
  coded.scale = stored(amax, how.scale);
  coded.shift = -1;
  const double scale = how.codes_from_stored ? coded.scale : amax;
  for (const double v : x) {
    const double steps = scale == 0 ? 0 : v / scale;
    coded.codes.push_back(static_cast<int>(std::clamp(rounded(steps, how.rounding) + 1, 0.0, 2.0)));
    coded.from_tie.push_back(distance_from_tie(steps));
  }
  return coded;
}

/// One bit: d = mean |x|, code 1 where x >= 0 (-0 is), x' = ±d. As ggml's q1_0; Coded's scale is 2 d, its zero -d.
inline Coded signs_of(const std::vector<double>& x, const QuantiserSettings& how) {
  double sum = 0;
  for (const double v : x) sum += std::abs(v);
  const double d = stored(sum / static_cast<double>(x.size()), how.scale);
  Coded coded;
  coded.scale = 2 * d, coded.zero = -d;
  for (const double v : x) {
    coded.codes.push_back(v >= 0 ? 1 : 0);
    coded.from_tie.push_back(0.5);
  }
  return coded;
}

// ---- groups of a tile ---------------------------------------------------------------------------------------------

/// Rows [tokens, width], number by number: its code, what it decodes to, its group's scale, and how far it is from a
/// tie.
struct CodedRows {
  Array2 codes, decoded, scales, from_tie;
};

namespace detail {
inline CodedRows empty_like(const Array2& rows) {
  const Array2 none(rows.rows, rows.columns);
  return {none, none, none, none};
}
inline void put(CodedRows& out, const Coded& group, Index i, Index row, Index column) {
  out.codes.at(row, column) = item(group.codes, i);
  out.decoded.at(row, column) = group.value(i);
  out.scales.at(row, column) = group.scale;
  out.from_tie.at(row, column) = item(group.from_tie, i);
}
}  // namespace detail

/// A group is `group` neighbouring channels of one token; 0: all of them.
inline CodedRows coded_along_channels(const Array2& rows, Index group, const Quantiser& quantise) {
  if (group == 0) group = rows.columns;
  require(group > 0 && rows.columns % group == 0, "oracle: whole groups of channels");
  CodedRows out = detail::empty_like(rows);
  for (Index t = 0; t < rows.rows; ++t)
    for (Index c = 0; c < rows.columns; c += group) {
      std::vector<double> x;
      for (Index i = c; i < c + group; ++i) x.push_back(rows.at(t, i));
      const Coded coded = quantise(x);
      for (Index i = 0; i < group; ++i) detail::put(out, coded, i, t, c + i);
    }
  return out;
}

/// A group is `group` successive tokens of one channel; 0: all of them. The last group may be shorter.
inline CodedRows coded_along_tokens(const Array2& rows, Index group, const Quantiser& quantise) {
  if (group == 0) group = rows.rows;
  CodedRows out = detail::empty_like(rows);
  for (Index c = 0; c < rows.columns; ++c)
    for (Index t = 0; t < rows.rows; t += group) {
      std::vector<double> x;
      for (Index i = t; i < std::min(t + group, rows.rows); ++i) x.push_back(rows.at(i, c));
      const Coded coded = quantise(x);
      for (Index i = 0; i < count_of(x); ++i) detail::put(out, coded, i, t + i, c);
    }
  return out;
}

// ---- packing ------------------------------------------------------------------------------------------------------

/// Codes one after the other in a stream of bits, lowest bit first: 2-bit codes sit at bits 2i, 8 codes of 3 bits fill
/// 24 little-endian bits. In words of 32 bits, little-endian, this is the same for 1, 2, 4 and 8 bits.
inline Bytes packed_bits(const std::vector<int>& codes, int bits) {
  Bytes bytes((codes.size() * static_cast<std::size_t>(bits) + 7) / 8, 0);
  for (Index i = 0; i < count_of(codes); ++i)
    for (int b = 0; b < bits; ++b) {
      const Index at = i * bits + b;
      if (item(codes, i) >> b & 1) item(bytes, at / 8) = static_cast<std::uint8_t>(item(bytes, at / 8) | 1 << at % 8);
    }
  return bytes;
}
inline std::vector<int> unpacked_bits(const Bytes& bytes, int bits, Index count) {
  std::vector<int> codes;
  for (Index i = 0; i < count; ++i) {
    codes.push_back(0);
    for (int b = 0; b < bits; ++b) {
      const Index at = i * bits + b;
      codes.back() |= (item(bytes, at / 8) >> at % 8 & 1) << b;
    }
  }
  return codes;
}

/// Five codes of three values to a byte, c_0 + 3 c_1 + 9 c_2 + 27 c_3 + 81 c_4 <= 242; a last byte of fewer has zeros
/// above.
/// Uncertain  the order of the five within a byte is not printed
inline Bytes packed_trits(const std::vector<int>& codes) {
  Bytes bytes((codes.size() + 4) / 5, 0);
  for (Index i = count_of(codes) - 1; i >= 0; --i)
    item(bytes, i / 5) = static_cast<std::uint8_t>(item(bytes, i / 5) * 3 + item(codes, i));
  return bytes;
}
inline std::vector<int> unpacked_trits(const Bytes& bytes, Index count) {
  std::vector<int> codes;
  for (Index i = 0; i < count; ++i) {
    int byte = item(bytes, i / 5);
    for (Index k = 0; k < i % 5; ++k) byte /= 3;
    codes.push_back(byte % 3);
  }
  return codes;
}

/// ZipCache's order: byte j holds element j in its low bits and above it j + n/2 (4 bits), or j + n/4, j + n/2, j +
/// 3n/4.
inline Bytes packed_apart(const std::vector<int>& codes, int bits) {
  const Index per_byte = 8 / bits, bytes_count = count_of(codes) / per_byte;
  require(8 % bits == 0 && bytes_count * per_byte == count_of(codes), "oracle: whole bytes");
  Bytes bytes;
  for (Index j = 0; j < bytes_count; ++j) {
    int byte = 0;
    for (Index k = 0; k < per_byte; ++k) byte |= item(codes, j + k * bytes_count) << k * bits;
    bytes.push_back(static_cast<std::uint8_t>(byte));
  }
  return bytes;
}

/// Bits per number when a group of `group` shares `shared_bits` of scales and zeros.
inline double bits_per_number(double bits, double shared_bits, double group) { return bits + shared_bits / group; }

// ---- MiKV's balancer ----------------------------------------------------------------------------------------------

/// b = sqrt(max_t |q_t| / max_t |k_t|) per kv head and channel, |q| the largest of the group's query heads; 1 where
/// either maximum is 0; within [1e-4, 1e4]. Keys are stored as k ⊙ b; a query that meets them is q ⊘ b.
/// Shapes     queries [tokens, q_heads, width], keys [tokens, kv_heads, width] -> [kv_heads, width]
/// Uncertain  the maximum over the query group, the 1 and the clamp are reconstructed
/// Source     MiKV, arXiv 2402.18096
inline Array2 balancer(const Array3& queries, const Array3& keys) {
  require(keys.b > 0 && queries.b % keys.b == 0 && queries.c == keys.c, "oracle: queries that fit the keys");
  const Index group = queries.b / keys.b;
  Array2 b(keys.b, keys.c);
  for (Index h = 0; h < keys.b; ++h)
    for (Index c = 0; c < keys.c; ++c) {
      double q = 0, k = 0;
      for (Index t = 0; t < queries.a; ++t)
        for (Index head = h * group; head < (h + 1) * group; ++head) q = std::max(q, std::abs(queries.at(t, head, c)));
      for (Index t = 0; t < keys.a; ++t) k = std::max(k, std::abs(keys.at(t, h, c)));
      b.at(h, c) = q == 0 || k == 0 ? 1 : std::clamp(std::sqrt(q / k), 1e-4, 1e4);
    }
  return b;
}

/// k' = I(k ⊙ b) ⊘ b: what an unchanged query meets. rows [tokens, width], b [width]
inline Array2 balanced(const Array2& rows, const std::vector<double>& b, Index group, const Quantiser& quantise) {
  require(count_of(b) == rows.columns, "oracle: a factor per channel");
  Array2 scaled = rows;
  for (Index t = 0; t < rows.rows; ++t)
    for (Index c = 0; c < rows.columns; ++c) scaled.at(t, c) *= item(b, c);
  Array2 decoded = coded_along_channels(scaled, group, quantise).decoded;
  for (Index t = 0; t < rows.rows; ++t)
    for (Index c = 0; c < rows.columns; ++c) decoded.at(t, c) /= item(b, c);
  return decoded;
}

// ---- ZipCache -----------------------------------------------------------------------------------------------------

/// c = sqrt(max_t |v|) per channel over all tokens of both classes; 1 where all are 0.
/// Source  ZipCache, arXiv 2405.14256
inline std::vector<double> channel_factors(const Array2& values) {
  std::vector<double> c;
  for (Index d = 0; d < values.columns; ++d) {
    double amax = 0;
    for (Index t = 0; t < values.rows; ++t) amax = std::max(amax, std::abs(values.at(t, d)));
    c.push_back(amax == 0 ? 1 : std::sqrt(amax));
  }
  return c;
}

/// v' = v / c, one minimum and scale per token over all channels given, decoded c (code s + min).
/// The paper's channels are those of all heads in a row; given one head's, that head has its own scales.
inline CodedRows zipcache_values(const Array2& values, const std::vector<double>& c, const QuantiserSettings& how) {
  require(count_of(c) == values.columns, "oracle: a factor per channel");
  Array2 scaled = values;
  for (Index t = 0; t < values.rows; ++t)
    for (Index d = 0; d < values.columns; ++d) scaled.at(t, d) /= item(c, d);
  CodedRows out = coded_along_channels(scaled, 0, [&](const std::vector<double>& x) { return affine(x, how); });
  for (Index t = 0; t < values.rows; ++t)
    for (Index d = 0; d < values.columns; ++d) out.decoded.at(t, d) *= item(c, d), out.scales.at(t, d) *= item(c, d);
  return out;
}

/// One minimum and scale per channel over all tokens of a class.
inline CodedRows zipcache_keys(const Array2& keys, const QuantiserSettings& how) {
  return coded_along_tokens(keys, 0, [&](const std::vector<double>& x) { return affine(x, how); });
}

// ---- KVTuner: which precision for a layer -------------------------------------------------------------------------

struct BitPair {
  int key = 0, value = 0;
  double mean() const { return 0.5 * (key + value); }
  friend bool operator==(const BitPair&, const BitPair&) = default;
};
struct PairError {
  BitPair bits;
  double error = 0;  // e_o
};

/// What no other pair beats: none has as few bits and as little error, and less of one of them. Order kept; of pairs
/// equal in both the first.
inline std::vector<BitPair> pareto(const std::vector<PairError>& pairs) {
  std::vector<BitPair> kept;
  for (Index i = 0; i < count_of(pairs); ++i) {
    const PairError& mine = item(pairs, i);
    bool beaten = false;
    for (Index j = 0; j < count_of(pairs); ++j) {
      const PairError& other = item(pairs, j);
      const double bits = other.bits.mean() - mine.bits.mean(), error = other.error - mine.error;
      beaten |= bits <= 0 && error <= 0 && (bits < 0 || error < 0 || j < i);
    }
    if (!beaten) kept.push_back(mine.bits);
  }
  return kept;
}

/// Layers whose surviving pairs are the same, in order of their first layer.
inline std::vector<std::vector<Index>> layers_alike(const std::vector<std::vector<BitPair>>& survivors) {
  std::vector<std::vector<Index>> groups;
  for (Index l = 0; l < count_of(survivors); ++l) {
    const auto same = [&](const std::vector<Index>& group) {
      return item(survivors, group.front()) == item(survivors, l);
    };
    const auto found = std::find_if(groups.begin(), groups.end(), same);
    if (found == groups.end())
      groups.push_back({l});
    else
      found->push_back(l);
  }
  return groups;
}

/// f_m = Σ (K bits + V bits) / (2 L): payload only.
inline double mean_bits(const std::vector<BitPair>& layers) {
  double sum = 0;
  for (const BitPair& pair : layers) sum += pair.mean();
  return sum / static_cast<double>(layers.size());
}

struct SearchPoint {
  std::vector<BitPair> layers;
  double bits = 0, loss = 0;
};
/// The front of (mean bits, loss) over one choice per group, by trying all of them: min (f_m, f_a) with f_m <=
/// most_bits and f_a <= most_loss. Fewest bits first; of equal points the one whose first groups take their earlier
/// choices.
inline std::vector<SearchPoint> search_front(const std::vector<std::vector<Index>>& groups,
                                             const std::vector<std::vector<BitPair>>& choices,
                                             const std::function<double(const std::vector<BitPair>&)>& loss_of,
                                             double most_bits, double most_loss) {
  require(groups.size() == choices.size(), "oracle: choices for each group");
  Index layers = 0;
  for (const auto& group : groups) layers += count_of(group);
  std::vector<SearchPoint> points;
  std::vector<Index> at(groups.size(), 0);
  for (bool more = true; more;) {
    SearchPoint point{std::vector<BitPair>(static_cast<std::size_t>(layers)), 0, 0};
    for (Index g = 0; g < count_of(groups); ++g)
      for (const Index l : item(groups, g)) item(point.layers, l) = item(item(choices, g), item(at, g));
    point.bits = mean_bits(point.layers), point.loss = loss_of(point.layers);
    if (point.bits <= most_bits && point.loss <= most_loss) points.push_back(point);
    Index g = count_of(groups) - 1;
    while (g >= 0 && ++item(at, g) == count_of(item(choices, g))) item(at, g--) = 0;
    more = g >= 0;
  }
  std::stable_sort(points.begin(), points.end(), [](const SearchPoint& a, const SearchPoint& b) {
    return a.bits != b.bits ? a.bits < b.bits : a.loss < b.loss;
  });
  std::vector<SearchPoint> front;
  for (const SearchPoint& point : points)
    if (front.empty() || point.loss < front.back().loss) front.push_back(point);
  return front;
}

/// "2/2 4/4 …", layer 0 first.
inline std::vector<BitPair> bit_table(const std::string& text) {
  std::vector<BitPair> layers;
  for (std::size_t at = 0; at < text.size(); at += 4) {
    require(at + 3 <= text.size() && text[at + 1] == '/' && (at + 3 == text.size() || text[at + 3] == ' '),
            "oracle: K/V pairs of one digit each");
    layers.push_back({text[at] - '0', text[at + 2] - '0'});
  }
  return layers;
}

/// e_a = mean |a - â|, e_o = mean (|o - ô| / |o|), element by element.
/// Uncertain  where o is 0: not counted here
inline double mean_absolute_error(const std::vector<double>& exact, const std::vector<double>& got) {
  require(exact.size() == got.size() && !exact.empty(), "oracle: as many numbers of both");
  double sum = 0;
  for (Index i = 0; i < count_of(exact); ++i) sum += std::abs(item(exact, i) - item(got, i));
  return sum / static_cast<double>(exact.size());
}
inline double mean_relative_error(const std::vector<double>& exact, const std::vector<double>& got) {
  require(exact.size() == got.size(), "oracle: as many numbers of both");
  double sum = 0;
  Index counted = 0;
  for (Index i = 0; i < count_of(exact); ++i)
    if (item(exact, i) != 0) sum += std::abs((item(exact, i) - item(got, i)) / item(exact, i)), ++counted;
  return counted == 0 ? 0 : sum / static_cast<double>(counted);
}

}  // namespace kvpare::oracle

// Number formats by their definition: a code is read field by field, and written by looking for the nearest of them
// all.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "dense.hpp"

namespace kvpare::oracle {

using Bytes = std::vector<std::uint8_t>;

/// What the largest codes of a small float stand for.
enum class Top : std::uint8_t {
  finite,   // numbers like all others
  one_nan,  // only all ones is NaN, there is no infinity
  ieee      // the largest exponent holds infinity (mantissa 0) and NaN
};

/// sign · (1 + mantissa / 2^m) · 2^(exponent - bias), or sign · mantissa / 2^m · 2^(1 - bias) where the exponent is 0.
/// Layout  sign in the highest bit, then the exponent, then the mantissa
struct SmallFloat {
  int exponent_bits = 0, mantissa_bits = 0, bias = 0;
  Top top = Top::finite;

  int sign_bit() const { return 1 << (exponent_bits + mantissa_bits); }
  int codes() const { return 2 * sign_bit(); }
};

inline constexpr SmallFloat half_precision{5, 10, 15, Top::ieee};  // 65504 is the largest
inline constexpr SmallFloat e4m3fn{4, 3, 7, Top::one_nan};         // 448; the FNUZ variant, not this one, ends at 240
inline constexpr SmallFloat e5m2{5, 2, 15, Top::ieee};             // 57344
inline constexpr SmallFloat e2m1{2, 1, 1, Top::finite};            // 0 0.5 1 1.5 2 3 4 6

inline double value_of(const SmallFloat& f, int code) {
  require(code >= 0 && code < f.codes(), "oracle: no such code");
  const double sign = code >= f.sign_bit() ? -1 : 1;
  const int magnitude = code % f.sign_bit();
  const int exponent = magnitude >> f.mantissa_bits, mantissa = magnitude % (1 << f.mantissa_bits);
  const int last_exponent = (1 << f.exponent_bits) - 1;
  if (f.top == Top::one_nan && magnitude == f.sign_bit() - 1) return std::numeric_limits<double>::quiet_NaN();
  if (f.top == Top::ieee && exponent == last_exponent)
    return mantissa == 0 ? sign * std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - f.bias - f.mantissa_bits);
  return sign * std::ldexp((1 << f.mantissa_bits) + mantissa, exponent - f.bias - f.mantissa_bits);
}

/// Who wins when two codes are equally near.
enum class Ties : std::uint8_t {
  even,  // the even code, the last bit of the mantissa being 0: what hardware does
  first  // the lower code, counted from +0: the smaller magnitude, and +0 instead of -0 (ggml's 4-bit floats)
};

/// Code of the finite number nearest to x, found by trying all of them; beyond the largest the largest (saturation),
/// for infinities too. -0, and with Ties::even what rounds to it, keeps its sign. NaN gives the largest code, which is
/// NaN where the format has one; E2M1 has none and gives +0.
inline int code_of(const SmallFloat& f, double x, Ties ties = Ties::even) {
  if (std::isnan(x)) return f.top == Top::finite ? 0 : f.sign_bit() - 1;
  const bool negative = std::signbit(x);
  const double target = std::clamp(x, -1e6, 1e6);  // beyond them all, and near enough for distances to differ
  int best = -1;
  double best_distance = 0;
  for (int code = 0; code < f.codes(); ++code) {
    const double value = value_of(f, code);
    if (!std::isfinite(value)) continue;
    if (ties == Ties::even && (code >= f.sign_bit()) != negative) continue;  // rounding never crosses zero
    const double distance = std::abs(value - target);
    const bool nearer = best < 0 || distance < best_distance;
    const bool wins_tie = best >= 0 && distance == best_distance && ties == Ties::even && code % 2 == 0;
    if (nearer || wins_tie) best = code, best_distance = distance;
  }
  return best;
}

/// x as half precision stores it, ties to even; 65520 and above is infinity.
inline int half_code(double x) {
  if (std::isnan(x)) return 0x7e00;
  const int sign = std::signbit(x) ? 0x8000 : 0;
  int below = 0, above = 0x7c00;  // positive codes ascend with their values; 0x7c00 stands for 65536 while rounding
  const auto value = [](int code) { return code == 0x7c00 ? 65536.0 : value_of(half_precision, code); };
  if (std::abs(x) >= 65536) return sign | 0x7c00;
  while (above - below > 1) (value((below + above) / 2) <= std::abs(x) ? below : above) = (below + above) / 2;
  const double down = std::abs(x) - value(below), up = value(above) - std::abs(x);
  return sign | (down < up || (down == up && below % 2 == 0) ? below : above);
}
inline double half_value(int code) { return value_of(half_precision, code); }
inline double to_half(double x) { return half_value(half_code(x)); }

/// 2^(code - 127); 255 is NaN.
inline double e8m0_value(int code) {
  require(code >= 0 && code < 256, "oracle: no such code");
  return code == 255 ? std::numeric_limits<double>::quiet_NaN() : std::ldexp(1.0, code - 127);
}

inline double largest_magnitude(const std::vector<double>& x) {
  double amax = 0;
  for (const double v : x) amax = std::max(amax, std::abs(v));
  return amax;
}

// ---- fp8 with one scale -------------------------------------------------------------------------------------------

/// Codes of x / scale, saturating. `scale` is of a tensor or of a head; amax / 448 or amax / 57344 when it is
/// calibrated.
inline std::vector<int> fp8_codes(const SmallFloat& f, const std::vector<double>& x, double scale = 1) {
  std::vector<int> codes;
  for (const double v : x) codes.push_back(code_of(f, v / scale));
  return codes;
}
inline double fp8_scale(const SmallFloat& f, double amax) {
  require(f.top != Top::finite, "oracle: an fp8 format");
  return amax / (f.top == Top::one_nan ? 448 : 57344);
}

// ---- MXFP4 --------------------------------------------------------------------------------------------------------

/// A run of 4-bit codes with one scale.
struct Float4Block {
  int scale = 0;           // MXFP4: E8M0; NVFP4: E4M3
  double effective = 0;    // what E2M1 is multiplied by, global factor included
  std::vector<int> codes;  // E2M1
  double value(Index i) const { return value_of(e2m1, item(codes, i)) * effective; }
};

/// 32 numbers, one E8M0 scale e = floor(log2(amax)) - 2 + 127; e = 0 when all are 0. What lies above 6 · 2^(e - 127)
/// saturates. `ties`: OCP says to even, ggml takes the first of its list.
/// Uncertain  amax below 2^-125 would need e < 0: taken as 0 here (ggml's unsigned byte wraps); NaN and infinity: not
///            for this oracle
/// Source     OCP Microscaling v1.0; ggml
inline Float4Block mxfp4_block(const std::vector<double>& x, Ties ties) {
  require(count_of(x) == 32, "oracle: 32 numbers to a block");
  const double amax = largest_magnitude(x);
  require(std::isfinite(amax), "oracle: finite numbers only");
  Float4Block block;
  block.scale = amax > 0 ? std::clamp(std::ilogb(amax) - 2 + 127, 0, 254) : 0;
  block.effective = e8m0_value(block.scale);
  for (const double v : x) block.codes.push_back(code_of(e2m1, v / block.effective, ties));
  return block;
}

/// { e, 16 bytes: low nibble element j, high nibble element j + 16 } = 17 bytes, as ggml has it.
inline Bytes mxfp4_bytes(const Float4Block& block) {
  Bytes bytes{static_cast<std::uint8_t>(block.scale)};
  for (Index j = 0; j < 16; ++j)
    bytes.push_back(static_cast<std::uint8_t>(item(block.codes, j) | item(block.codes, j + 16) << 4));
  return bytes;
}
inline std::vector<double> mxfp4_values(const Bytes& bytes) {
  require(count_of(bytes) == 17, "oracle: 17 bytes to a block");
  std::vector<double> x(32);
  for (Index j = 0; j < 16; ++j) {
    item(x, j) = value_of(e2m1, item(bytes, 1 + j) % 16) * e8m0_value(item(bytes, 0));
    item(x, j + 16) = value_of(e2m1, item(bytes, 1 + j) / 16) * e8m0_value(item(bytes, 0));
  }
  return x;
}

// ---- NVFP4 --------------------------------------------------------------------------------------------------------

/// What is multiplied onto all block scales of a tensor.
enum class Nvfp4Global : std::uint8_t {
  standard,    // g = amax / (448 · 6): block scales reach 448
  flashinfer,  // g = amax / 448: block scales stay below 74.7
  none         // g = 1, as ggml has it
};

inline double nvfp4_global(Nvfp4Global how, double amax_of_tensor) {
  if (how == Nvfp4Global::none) return 1;
  if (amax_of_tensor == 0) return 1;  // uncertain: nothing to scale, any factor will do
  return amax_of_tensor / (how == Nvfp4Global::standard ? 448.0 * 6 : 448.0);
}

/// 16 numbers, one E4M3 scale sf = e4m3(amax / (6 g)), x' = e2m1 · sf · g. A scale that rounds to 0 gives +0 for all.
inline Float4Block nvfp4_block(const std::vector<double>& x, double global, Ties ties = Ties::even) {
  require(count_of(x) == 16, "oracle: 16 numbers to a block");
  Float4Block block;
  block.scale = code_of(e4m3fn, largest_magnitude(x) / (6 * global));
  block.effective = value_of(e4m3fn, block.scale) * global;
  for (const double v : x)
    block.codes.push_back(block.effective == 0 ? 0 : code_of(e2m1, v / block.effective, ties));
  return block;
}

/// Two neighbours to a byte, the even element in the low nibble.
inline Bytes neighbours_packed(const std::vector<int>& codes) {
  require(count_of(codes) % 2 == 0, "oracle: two codes to a byte");
  Bytes bytes;
  for (Index j = 0; j < count_of(codes); j += 2)
    bytes.push_back(static_cast<std::uint8_t>(item(codes, j) | item(codes, j + 1) << 4));
  return bytes;
}

/// Scales of values in a FlashInfer page, by 4 tokens: out[(t / 4) 4 S + s 4 + t % 4] = in[t S + s], S = D / 16.
inline std::vector<int> interleaved_by_four_tokens(const std::vector<int>& scales, Index per_token) {
  const Index tokens = count_of(scales) / per_token;
  require(tokens % 4 == 0 && count_of(scales) == tokens * per_token, "oracle: a multiple of 4 tokens");
  std::vector<int> out(scales.size());
  for (Index t = 0; t < tokens; ++t)
    for (Index s = 0; s < per_token; ++s)
      item(out, t / 4 * 4 * per_token + s * 4 + t % 4) = item(scales, t * per_token + s);
  return out;
}

/// Unsigned E4M3 as ggml rounds it: halves up. What would round to 256 or more, from 248 on, becomes 448 (code 0x7e):
/// no other code has exponent 15. Below the least normal number 2^-6 the code is at most 7. Not above 0, or NaN: 0.
/// Uncertain  the specification says only "rounds mantissa half-up"; the rest is what ggml's encoder does
inline int ggml_ue4m3_code(double x) {
  if (!(x > 0)) return 0;
  if (x < 0x1p-6) return static_cast<int>(std::min(7.0, std::floor(x * 512 + 0.5)));
  if (x >= 248) return 0x7e;
  const int exponent = std::ilogb(x);
  const auto mantissa = static_cast<int>(std::floor(std::ldexp(x, 3 - exponent) + 0.5));  // 8 … 16
  return ((exponent + 7) << 3) + mantissa - 8;  // 16 carries into the exponent
}
/// 0x7f is 0; otherwise the sign bit is not read and there is no NaN.
inline double ggml_ue4m3_value(int code) {
  return code == 0x7f ? 0 : value_of(SmallFloat{4, 3, 7, Top::finite}, code % 128);
}

/// 64 numbers: { 4 scales, 32 bytes: of each run of 16, low nibble j, high nibble j + 8 } = 36 bytes; no global factor.
inline Bytes ggml_nvfp4_row(const std::vector<double>& x) {
  require(count_of(x) % 64 == 0, "oracle: 64 numbers to a block");
  Bytes bytes;
  for (Index b = 0; b < count_of(x); b += 64) {
    Bytes codes;
    for (Index run = b; run < b + 64; run += 16) {
      const std::vector<double> part(x.begin() + run, x.begin() + run + 16);
      // Single precision on purpose: the quotient decides the rounding of the scale.
      const int scale = ggml_ue4m3_code(static_cast<float>(largest_magnitude(part)) / 6.0f);
      const double d = ggml_ue4m3_value(scale);
      bytes.push_back(static_cast<std::uint8_t>(scale));
      const auto code = [&](Index i) { return d == 0 ? 0 : code_of(e2m1, item(part, i) / d, Ties::first); };
      for (Index j = 0; j < 8; ++j) codes.push_back(static_cast<std::uint8_t>(code(j) | code(j + 8) << 4));
    }
    bytes.insert(bytes.end(), codes.begin(), codes.end());
  }
  return bytes;
}
inline std::vector<double> ggml_nvfp4_values(const Bytes& bytes) {
  require(count_of(bytes) % 36 == 0, "oracle: 36 bytes to a block");
  std::vector<double> x;
  for (Index b = 0; b < count_of(bytes); b += 36)
    for (Index i = 0; i < 64; ++i) {
      const Index run = i / 16, j = i % 16;
      const int pair = item(bytes, b + 4 + run * 8 + j % 8);
      x.push_back(value_of(e2m1, j < 8 ? pair % 16 : pair / 16) * ggml_ue4m3_value(item(bytes, b + run)));
    }
  return x;
}

}  // namespace kvpare::oracle

// The vector type of the baseline: 16 bytes, in the vector extensions of GCC and clang, so SSE2 and NEON alike.
// What each function does is listed at the top of kernels.inl.

static_assert(std::endian::native == std::endian::little, "half and bfloat16 vectors are widened by interleaving");

using Vec = float __attribute__((vector_size(16)));
using Bits = std::int32_t __attribute__((vector_size(16)));
using Unsigned = std::uint32_t __attribute__((vector_size(16)));  // for sums of lanes that may wrap: they are masked out
using Halves = std::uint16_t __attribute__((vector_size(16)));

inline constexpr int lanes = 4;
#if defined(__aarch64__)
inline constexpr int dot_unroll = 1;
inline constexpr int dot_rows = 4, sum_rows = 4, sum_vectors = 4, panel_rows = 4, panel_vectors = 4;
#else
inline constexpr int dot_unroll = 1;
inline constexpr int dot_rows = 2, sum_rows = 2, sum_vectors = 4, panel_rows = 2, panel_vectors = 4;  // 16 registers
#endif

// Widening a half takes ten instructions of SSE2, so panels hold floats.
template <class T>
using InPanel = float;

KVPARE_INLINE Vec zero() { return Vec{}; }
KVPARE_INLINE Vec broadcast(float x) { return Vec{x, x, x, x}; }

KVPARE_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
KVPARE_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

KVPARE_INLINE Vec add(Vec a, Vec b) { return a + b; }
KVPARE_INLINE Vec mul(Vec a, Vec b) { return a * b; }
KVPARE_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
KVPARE_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

// Up to four elements of 16 bits. Through an integer register: a vector in memory would be read before it is written.
KVPARE_INLINE Halves load_halves(const void* p, int n) {
  using Words = std::int64_t __attribute__((vector_size(16)));
  std::int64_t bits = 0;
  std::memcpy(&bits, p, static_cast<std::size_t>(n) * 2);
  return (Halves)Words{bits, 0};
}

#if defined(__aarch64__)
KVPARE_INLINE Vec widen_low(Halves x, const half*) {
  return (Vec)vcvt_f32_f16(vget_low_f16(vreinterpretq_f16_u16((uint16x8_t)x)));
}
#else
// core's half_to_float, four at a time.
KVPARE_INLINE Vec widen_low(Halves x, const half*) {
  const Halves none = {};
  const Bits bits = (Bits)__builtin_shufflevector(x, none, 0, 8, 1, 9, 2, 10, 3, 11);
  const Bits magnitude = bits & 0x7fff;
  const Vec value = (Vec)(magnitude << 13) * 0x1p112f;
  const Bits not_finite = (magnitude > 0x7bff) & 0x7f800000;
  return (Vec)((Bits)value | not_finite | (bits & 0x8000) << 16);
}
#endif
KVPARE_INLINE Vec widen_low(Halves x, const bfloat16*) {
  const Halves none = {};
  return (Vec)__builtin_shufflevector(none, x, 0, 8, 1, 9, 2, 10, 3, 11);
}
KVPARE_INLINE Vec load(const half* p) { return widen_low(load_halves(p, 4), p); }
KVPARE_INLINE Vec load(const bfloat16* p) { return widen_low(load_halves(p, 4), p); }

KVPARE_INLINE Vec load_part(const float* p, int n, float rest = 0) {
  Vec v = broadcast(rest);
  std::memcpy(&v, p, static_cast<std::size_t>(n) * 4);
  return v;
}
KVPARE_INLINE Vec load_part(const half* p, int n) { return widen_low(load_halves(p, n), p); }
KVPARE_INLINE Vec load_part(const bfloat16* p, int n) { return widen_low(load_halves(p, n), p); }
KVPARE_INLINE void store_part(float* p, Vec v, int n) { std::memcpy(p, &v, static_cast<std::size_t>(n) * 4); }

KVPARE_INLINE Bits choose(Bits where, Bits yes, Bits no) { return (where & yes) | (~where & no); }

// core's float_to_half and float_to_bfloat16, four at a time.
KVPARE_INLINE Bits narrow(Vec v, half*) {
  const Bits bits = (Bits)v;
  const Bits magnitude = bits & 0x7fffffff;
  const Unsigned rounded = (Unsigned)magnitude - 0x38000000u + 0xfffu + (Unsigned)(magnitude >> 13 & 1);
  const Bits normal = (Bits)(rounded >> 13);
  const Bits small = (Bits)((Unsigned)((Vec)magnitude + 0.5f) - 0x3f000000u);
  Bits result = choose(magnitude < 0x38800000, small, normal);
  result = choose(magnitude >= 0x477ff000, Bits{} + 0x7c00, result);
  result = choose(magnitude > 0x7f800000, Bits{} + 0x7e00, result);
  return result | (bits >> 16 & 0x8000);
}
KVPARE_INLINE Bits narrow(Vec v, bfloat16*) {
  const Bits bits = (Bits)v;
  const Bits upper = bits >> 16 & 0xffff;
  const Bits rounded = (Bits)(((Unsigned)bits + 0x7fffu + (Unsigned)(upper & 1)) >> 16);
  return choose((bits & 0x7fffffff) > 0x7f800000, upper | 0x40, rounded);
}
template <class T>
KVPARE_INLINE void store_part(T* p, Vec v, int n) {
  const Halves wide = (Halves)narrow(v, p);
  const Halves packed = __builtin_shufflevector(wide, wide, 0, 2, 4, 6, 0, 2, 4, 6);
  std::memcpy(static_cast<void*>(p), &packed, static_cast<std::size_t>(n) * 2);
}
KVPARE_INLINE void store(half* p, Vec v) { store_part(p, v, 4); }
KVPARE_INLINE void store(bfloat16* p, Vec v) { store_part(p, v, 4); }

KVPARE_INLINE float sum_of(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
KVPARE_INLINE float max_of_lanes(Vec v) {
  const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}
KVPARE_INLINE void sum_four(Vec a, Vec b, Vec c, Vec d, float* out) {
  const Vec ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Vec cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  store(out, __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
}

KVPARE_INLINE void max_four(Vec a, Vec b, Vec c, Vec d, float* out) {
  const Vec ab = max(__builtin_shufflevector(a, b, 0, 4, 1, 5), __builtin_shufflevector(a, b, 2, 6, 3, 7));
  const Vec cd = max(__builtin_shufflevector(c, d, 0, 4, 1, 5), __builtin_shufflevector(c, d, 2, 6, 3, 7));
  store(out, max(__builtin_shufflevector(ab, cd, 0, 1, 4, 5), __builtin_shufflevector(ab, cd, 2, 3, 6, 7)));
}

KVPARE_INLINE Vec sub(Vec a, Vec b) { return a - b; }
KVPARE_INLINE Vec nearest(Vec x) { return (x + 0x1.8p23f) - 0x1.8p23f; }  // leaves no room for a fraction
KVPARE_INLINE Vec times_power(Vec p, Vec n, Vec x) {
  const Bits scaled = (Bits)((Unsigned)p + ((Unsigned)(n + 0x1.8p23f) << 23));  // the integer n is in the low bits of the sum
  const Bits is_nan = (Bits)(x != x);
  return (Vec)((scaled & (Bits)(x >= -126.0f)) | (is_nan & (Bits)x));
}

using Tiles = Halves;
KVPARE_INLINE Tiles load_tiles(const std::byte* const* p, Index, Index offset) {
  Tiles x;
  std::memcpy(&x, p[0] + offset, sizeof x);
  return x;
}
template <int Bytes>
KVPARE_INLINE Tiles interleave_low(Tiles a, Tiles b) {
  if constexpr (Bytes == 2) return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  else return __builtin_shufflevector(a, b, 0, 1, 8, 9, 2, 3, 10, 11);
}
template <int Bytes>
KVPARE_INLINE Tiles interleave_high(Tiles a, Tiles b) {
  if constexpr (Bytes == 2) return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  else return __builtin_shufflevector(a, b, 4, 5, 12, 13, 6, 7, 14, 15);
}

// Integers of the baseline: 16 bytes, in the vector extensions of GCC and clang. What each function does is listed at the
// top of loops.inl.

using Ints = Bits;
using Shorts = std::int16_t __attribute__((vector_size(16)));
using Bytes = std::uint8_t __attribute__((vector_size(16)));

KVPARE_INLINE Ints load_ints(const void* p) {
  Ints x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
KVPARE_INLINE void store_ints(void* p, Ints x) { std::memcpy(p, &x, sizeof x); }
KVPARE_INLINE Ints each_int(std::int32_t x) { return Ints{x, x, x, x}; }
KVPARE_INLINE Ints each_byte(int x) { return (Ints)(Bytes{} + static_cast<std::uint8_t>(x)); }
KVPARE_INLINE Ints each_lane(const std::int8_t* table) { return load_ints(table); }
KVPARE_INLINE Ints bits_and(Ints a, Ints b) { return a & b; }
KVPARE_INLINE Ints bits_or(Ints a, Ints b) { return a | b; }
KVPARE_INLINE Ints bits_xor(Ints a, Ints b) { return a ^ b; }
KVPARE_INLINE Ints add_ints(Ints a, Ints b) { return (Ints)((Unsigned)a + (Unsigned)b); }
KVPARE_INLINE Ints sub_bytes(Ints a, Ints b) { return (Ints)((Bytes)a - (Bytes)b); }
KVPARE_INLINE Ints add_bytes(Ints a, Ints b) { return (Ints)((Bytes)a + (Bytes)b); }
KVPARE_INLINE Ints average_bytes(Ints a, Ints b) {
#if defined(__SSE2__)
  return (Ints)_mm_avg_epu8((__m128i)a, (__m128i)b);
#else
  return (Ints)((Bytes)(a | b) - ((Bytes)(a ^ b) >> 1));
#endif
}
KVPARE_INLINE Ints bits_and_or(Ints a, Ints b, Ints c) { return (a & b) | c; }
template <int left>
KVPARE_INLINE Ints shift16(Ints x) {
  if constexpr (left >= 0) return (Ints)((Halves)x << left);
  else return (Ints)((Halves)x >> -left);
}
KVPARE_INLINE Ints times_256(Ints x) { return (Ints)((Unsigned)x << 8); }
KVPARE_INLINE Ints shift_left32(Ints x, int n) { return (Ints)((Unsigned)x << n); }
KVPARE_INLINE Ints shift_right32(Ints x, int n) { return (Ints)((Unsigned)x >> n); }
KVPARE_INLINE Ints look_up(Ints table, Ints at) {
#if defined(__aarch64__)
  return (Ints)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)at);
#else
  std::uint8_t from[16], where[16];
  store_ints(from, table), store_ints(where, at);
  for (int i = 0; i < 16; ++i) where[i] = from[where[i]];
  return load_ints(where);
#endif
}
KVPARE_INLINE Ints widen_bytes(const std::uint8_t* p) { return Ints{p[0], p[1], p[2], p[3]}; }
KVPARE_INLINE Vec to_floats(Ints x) { return __builtin_convertvector(x, Vec); }
KVPARE_INLINE Ints nearest_ints(Vec x) {
#if defined(__SSE2__)
  return (Ints)_mm_cvtps_epi32((__m128)x);
#else
  return __builtin_convertvector(nearest(x), Ints);  // |x| < 2^22; NaN is not asked for
#endif
}
KVPARE_INLINE Vec absolute(Vec x) { return (Vec)((Ints)x & 0x7fffffff); }

KVPARE_INLINE void store_bytes(std::uint8_t* p, Ints x) {
  for (int l = 0; l < lanes; ++l) p[l] = static_cast<std::uint8_t>(x[l]);
}
KVPARE_INLINE Ints whole_ints(Vec x) { return __builtin_convertvector(x, Ints); }
KVPARE_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
KVPARE_INLINE Vec divide(Vec a, Vec b) { return a / b; }
KVPARE_INLINE Vec negative(Vec x) { return -x; }
KVPARE_INLINE void keep(Vec& x) { asm("" : "+m"(x)); }
KVPARE_INLINE Vec normal_or_zero(Vec x) { return (Vec)((Ints)x & (Ints)(absolute(x) >= 0x1p-126f)); }
KVPARE_INLINE Vec pick_greater(Vec a, Vec b, Vec x, Vec y) { return a > b ? x : y; }

// 16 floats, looked up by 32-bit lanes of 0 … 15; and floats anywhere.
struct FloatTable {
  const float* all;
};
KVPARE_INLINE FloatTable float_table(const float* p) { return {p}; }
KVPARE_INLINE Vec pick_floats(const float* p, Ints at) { return Vec{p[at[0]], p[at[1]], p[at[2]], p[at[3]]}; }
template <int>
KVPARE_INLINE Vec look_up_floats(const FloatTable& table, Ints at) {
  return pick_floats(table.all, at & 15);
}
template <int n>
KVPARE_INLINE Ints shift_down(Ints x) {
  return (Ints)((Unsigned)x >> n);
}

// Floats of 8 bits: `lanes` from p and as many from p + step. As floats with too small an exponent, which one product mends,
// subnormals included; E4M3 and E5M2 alike.
template <bool e5m2>
KVPARE_INLINE Vec load_small(const std::byte* p) {
  const std::uint8_t* bytes = reinterpret_cast<const std::uint8_t*>(p);
  const Ints x = {bytes[0], bytes[1], bytes[2], bytes[3]};
  const Ints sign = (Ints)((Unsigned)x >> 7 << 31);
  return (Vec)((Ints)((Vec)((x & 0x7f) << (e5m2 ? 21 : 20)) * (e5m2 ? 0x1p112f : 0x1p120f)) | sign);
}
template <bool e5m2>
KVPARE_INLINE void load_small(const std::byte* p, Index step, Vec& a, Vec& b) {
  a = load_small<e5m2>(p), b = load_small<e5m2>(p + step);
}
inline constexpr float e4m3_unit = 1;

KVPARE_INLINE Vec only(std::uint64_t bits, Vec x) {
  const Ints bit = {1, 2, 4, 8};
  return (Vec)((Ints)x & ((each_int(static_cast<std::int32_t>(bits & 15)) & bit) == bit));
}
KVPARE_INLINE void store_listed(float* to, Vec x, std::uint64_t bits) {
  for (int l = 0; l < lanes; ++l)
    if ((bits >> l & 1) != 0) *to++ = x[l];
}
KVPARE_INLINE Vec load_listed(const float* from, std::uint64_t bits) {
  if ((bits & 15) == 15) return load(from);
  float all[lanes] = {};
  for (int l = 0; l < lanes; ++l)
    if ((bits >> l & 1) != 0) all[l] = *from++;
  return load(all);
}
KVPARE_INLINE Vec pick(const float* table, const std::uint8_t* at) {
  return Vec{table[at[0]], table[at[1]], table[at[2]], table[at[3]]};
}
KVPARE_INLINE Vec divide_or_zero(Vec a, Vec b) { return (Vec)((Ints)(a / b) & (Ints)(b != 0)); }

inline constexpr bool has_dots = false;

struct KeyCodes {
  Ints even, odd;
};
using ValueCodes = KeyCodes;
KVPARE_INLINE KeyCodes key_codes(Ints x) { return {x & 0x00ff00ff, (Ints)((Unsigned)x >> 8) & 0x00ff00ff}; }
KVPARE_INLINE ValueCodes value_codes(Ints x) {
  return {(Ints)((Shorts)((Halves)x << 8) >> 8), (Ints)((Shorts)x >> 8)};
}
KVPARE_INLINE Ints multiply_pairs(Ints a, Ints b) {
#if defined(__SSE2__)
  return (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}
KVPARE_INLINE Ints dot_pairs(Ints sum, KeyCodes codes, Ints even, Ints odd) {
  return add_ints(add_ints(sum, multiply_pairs(codes.even, even)), multiply_pairs(codes.odd, odd));
}
// Numbers of ±32767: of each four the first and the third, and the second and the fourth.
KVPARE_INLINE Ints pairs_of(Ints a, Ints b, Ints c, Ints d, int first) {
  const Ints low = {a[first], b[first], c[first], d[first]}, high = {a[first + 2], b[first + 2], c[first + 2], d[first + 2]};
  return (low & 0xffff) | times_256(times_256(high));
}
KVPARE_INLINE void split_pairs(Ints a, Ints b, Ints c, Ints d, Ints& even, Ints& odd) {
  even = pairs_of(a, b, c, d, 0), odd = pairs_of(a, b, c, d, 1);
}
template <bool>
KVPARE_INLINE void split_signed(Ints a, Ints b, Ints c, Ints d, Ints& even, Ints& odd) {
  split_pairs(a, b, c, d, even, odd);
}
template <bool>
KVPARE_INLINE void split_unsigned(Ints a, Ints b, Ints c, Ints d, Ints& even, Ints& odd) {
  split_pairs(a, b, c, d, even, odd);
}

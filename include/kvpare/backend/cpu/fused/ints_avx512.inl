// Integers of AVX-512 F, BW, DQ, VL, with VNNI where KVPARE_DOTS is 1. What each function does is listed at the top of
// loops.inl.

using Ints = __m512i;

KVPARE_INLINE Ints load_ints(const void* p) { return _mm512_loadu_si512(p); }
KVPARE_INLINE void store_ints(void* p, Ints x) { _mm512_storeu_si512(p, x); }
KVPARE_INLINE Ints each_int(std::int32_t x) { return _mm512_set1_epi32(x); }
KVPARE_INLINE Ints each_byte(int x) { return _mm512_set1_epi8(static_cast<char>(x)); }
KVPARE_INLINE Ints each_lane(const std::int8_t* table) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
}
KVPARE_INLINE Ints bits_and(Ints a, Ints b) { return _mm512_and_si512(a, b); }
KVPARE_INLINE Ints bits_or(Ints a, Ints b) { return _mm512_or_si512(a, b); }
KVPARE_INLINE Ints bits_xor(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
KVPARE_INLINE Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
KVPARE_INLINE Ints sub_bytes(Ints a, Ints b) { return _mm512_sub_epi8(a, b); }
KVPARE_INLINE Ints add_bytes(Ints a, Ints b) { return _mm512_add_epi8(a, b); }
KVPARE_INLINE Ints average_bytes(Ints a, Ints b) { return _mm512_avg_epu8(a, b); }
KVPARE_INLINE Ints bits_and_or(Ints a, Ints b, Ints c) { return _mm512_ternarylogic_epi32(a, b, c, 0xea); }
template <int left>
KVPARE_INLINE Ints shift16(Ints x) {
  if constexpr (left > 0) return _mm512_slli_epi16(x, left);
  else if constexpr (left < 0) return _mm512_srli_epi16(x, -left);
  else return x;
}
KVPARE_INLINE Ints times_256(Ints x) { return _mm512_slli_epi32(x, 8); }
KVPARE_INLINE Ints shift_left32(Ints x, int n) { return _mm512_sll_epi32(x, _mm_cvtsi32_si128(n)); }
KVPARE_INLINE Ints shift_right32(Ints x, int n) { return _mm512_srl_epi32(x, _mm_cvtsi32_si128(n)); }
KVPARE_INLINE Ints look_up(Ints table, Ints at) { return _mm512_shuffle_epi8(table, at); }
KVPARE_INLINE Ints widen_bytes(const std::uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
KVPARE_INLINE Vec to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
KVPARE_INLINE Ints nearest_ints(Vec x) { return _mm512_cvtps_epi32(x); }
KVPARE_INLINE Vec absolute(Vec x) { return _mm512_abs_ps(x); }
KVPARE_INLINE Vec as_floats(Ints x) { return _mm512_castsi512_ps(x); }

KVPARE_INLINE void store_bytes(std::uint8_t* p, Ints x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}
KVPARE_INLINE Ints whole_ints(Vec x) { return _mm512_cvttps_epi32(x); }
KVPARE_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
KVPARE_INLINE Vec divide(Vec a, Vec b) { return _mm512_div_ps(a, b); }
KVPARE_INLINE Vec negative(Vec x) { return _mm512_xor_ps(x, _mm512_set1_ps(-0.0f)); }
KVPARE_INLINE void keep(Vec& x) { asm("" : "+v"(x)); }
KVPARE_INLINE Vec normal_or_zero(Vec x) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(absolute(x), _mm512_set1_ps(0x1p-126f), _CMP_GE_OQ), x);
}
KVPARE_INLINE Vec pick_greater(Vec a, Vec b, Vec x, Vec y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
}

// 16 floats, looked up by 32-bit lanes of 0 … 15; and floats anywhere.
using FloatTable = Vec;
KVPARE_INLINE FloatTable float_table(const float* p) { return load(p); }
template <int>
KVPARE_INLINE Vec look_up_floats(const FloatTable& table, Ints at) {
  return _mm512_permutexvar_ps(at, table);
}
template <int n>
KVPARE_INLINE Ints shift_down(Ints x) {
  return _mm512_srli_epi32(x, n);
}
KVPARE_INLINE Vec pick_floats(const float* p, Ints at) { return _mm512_i32gather_ps(at, p, 4); }

// Floats of 8 bits: `lanes` from p and as many from p + 16, as halves that are 2^-8 of E4M3, or E5M2 itself.
template <bool e5m2>
KVPARE_INLINE void load_small(const std::byte* p, Index, Vec& a, Vec& b) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  __m512i x;
  if constexpr (e5m2) x = _mm512_slli_epi16(_mm512_cvtepu8_epi16(bytes), 8);
  else x = bits_and(_mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 7), _mm512_set1_epi16(static_cast<short>(0xbf80)));
  a = _mm512_cvtph_ps(_mm512_castsi512_si256(x)), b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1));
}
inline constexpr float e4m3_unit = 256;

// Lanes of x whose bit is 0 become 0.
KVPARE_INLINE Vec only(std::uint64_t bits, Vec x) {
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), x);
}
KVPARE_INLINE Vec pick(const float* table, const std::uint8_t* at) {
  const Ints where = widen_bytes(at);
  const Vec low = _mm512_permutex2var_ps(load(table), where, load(table + 16));
  const Vec high = _mm512_permutex2var_ps(load(table + 32), where, load(table + 48));
  return _mm512_mask_blend_ps(_mm512_test_epi32_mask(where, _mm512_set1_epi32(32)), low, high);
}
// The lanes of x whose bit is 1, one behind the other.
KVPARE_INLINE void store_listed(float* to, Vec x, std::uint64_t bits) {
  const __mmask16 listed = static_cast<__mmask16>(bits);
  store_part(to, _mm512_maskz_compress_ps(listed, x), __builtin_popcount(listed));
}
// From one behind the other to the lanes whose bit is 1; the others become 0.
KVPARE_INLINE Vec load_listed(const float* from, std::uint64_t bits) {
  const __mmask16 listed = static_cast<__mmask16>(bits);
  return _mm512_maskz_expand_ps(listed, _mm512_maskz_loadu_ps(first_lanes(__builtin_popcount(listed)), from));
}
KVPARE_INLINE Vec divide_or_zero(Vec a, Vec b) {
  return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(b, zero(), _CMP_NEQ_UQ), a, b);
}

// Packing keeps to lanes of 16 bytes; this puts the 32-bit pieces of four vectors back in order.
KVPARE_INLINE Ints in_order(Ints x) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x);
}

#if KVPARE_DOTS
inline constexpr bool has_dots = true;

using KeyCodes = Ints;
using ValueCodes = Ints;
KVPARE_INLINE KeyCodes key_codes(Ints x) { return x; }
KVPARE_INLINE ValueCodes value_codes(Ints x) { return x; }
// Four unsigned bytes times four signed ones, added to `sum`, in each 32-bit lane.
KVPARE_INLINE Ints dot(Ints sum, Ints unsigned_bytes, Ints signed_bytes) {
#if defined(__clang__)
  return _mm512_dpbusd_epi32(sum, unsigned_bytes, signed_bytes);
#else
  // g++ 12 copies the sum before and after its own intrinsic.
  asm("vpdpbusd\t%2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
  return sum;
#endif
}
KVPARE_INLINE Ints dot_key(Ints sum, KeyCodes codes, Ints q) { return dot(sum, codes, q); }
KVPARE_INLINE Ints dot_value(Ints sum, ValueCodes codes, Ints p) { return dot(sum, p, codes); }

// Numbers of 0 … 65535 (65536 counts as 65535) as 256 * high + low; or of 0 … 255, in `high`.
template <bool wide>
KVPARE_INLINE void split_unsigned(Ints a, Ints b, Ints c, Ints d, Ints& high, Ints& low) {
  if constexpr (!wide) {
    high = in_order(_mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)));
    return;
  }
  const Ints ab = _mm512_packus_epi32(a, b), cd = _mm512_packus_epi32(c, d), byte = _mm512_set1_epi16(0xff);
  high = in_order(_mm512_packus_epi16(_mm512_srli_epi16(ab, 8), _mm512_srli_epi16(cd, 8)));
  low = in_order(_mm512_packus_epi16(bits_and(ab, byte), bits_and(cd, byte)));
}
// Numbers of ±32639 as 256 * high + low, both signed; or of ±127, in `high`.
template <bool wide>
KVPARE_INLINE void split_signed(Ints a, Ints b, Ints c, Ints d, Ints& high, Ints& low) {
  if constexpr (!wide) {
    high = in_order(_mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)));
    return;
  }
  const Ints half = _mm512_set1_epi16(128), byte = _mm512_set1_epi16(0xff);
  const Ints ab = _mm512_add_epi16(_mm512_packs_epi32(a, b), half), cd = _mm512_add_epi16(_mm512_packs_epi32(c, d), half);
  high = in_order(_mm512_packs_epi16(_mm512_srai_epi16(ab, 8), _mm512_srai_epi16(cd, 8)));
  low = in_order(_mm512_packus_epi16(bits_and(ab, byte), bits_and(cd, byte)));
  low = bits_xor(low, each_byte(128));
}
#else
inline constexpr bool has_dots = false;

struct KeyCodes {
  Ints even, odd;
};
using ValueCodes = KeyCodes;
KVPARE_INLINE KeyCodes key_codes(Ints x) { return {bits_and(x, _mm512_set1_epi16(0xff)), _mm512_srli_epi16(x, 8)}; }
KVPARE_INLINE ValueCodes value_codes(Ints x) {
  return {_mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), _mm512_srai_epi16(x, 8)};
}
KVPARE_INLINE Ints dot_pairs(Ints sum, KeyCodes codes, Ints even, Ints odd) {
  return add_ints(add_ints(sum, _mm512_madd_epi16(codes.even, even)), _mm512_madd_epi16(codes.odd, odd));
}
// Numbers of ±32767: of each four the first and the third, and the second and the fourth.
KVPARE_INLINE void split_pairs(Ints a, Ints b, Ints c, Ints d, Ints& even, Ints& odd) {
  const Vec ab = as_floats(_mm512_packs_epi32(a, b)), cd = as_floats(_mm512_packs_epi32(c, d));
  const Ints first = _mm512_castps_si512(_mm512_shuffle_ps(ab, cd, 0x88));   // numbers 0 and 1 of each four
  const Ints second = _mm512_castps_si512(_mm512_shuffle_ps(ab, cd, 0xdd));  // 2 and 3
  even = in_order(_mm512_mask_blend_epi16(0xaaaaaaaau, first, _mm512_slli_epi32(second, 16)));
  odd = in_order(_mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(first, 16), second));
}
template <bool>
KVPARE_INLINE void split_signed(Ints a, Ints b, Ints c, Ints d, Ints& even, Ints& odd) {
  split_pairs(a, b, c, d, even, odd);
}
template <bool>
KVPARE_INLINE void split_unsigned(Ints a, Ints b, Ints c, Ints d, Ints& even, Ints& odd) {
  split_pairs(a, b, c, d, even, odd);
}
#endif

// Integers of AVX2, with AVX-VNNI where KVPARE_DOTS is 1. What each function does is listed at the top of loops.inl.

using Ints = __m256i;

KVPARE_INLINE Ints load_ints(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
KVPARE_INLINE void store_ints(void* p, Ints x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
KVPARE_INLINE Ints each_int(std::int32_t x) { return _mm256_set1_epi32(x); }
KVPARE_INLINE Ints each_byte(int x) { return _mm256_set1_epi8(static_cast<char>(x)); }
KVPARE_INLINE Ints each_lane(const std::int8_t* table) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
}
KVPARE_INLINE Ints bits_and(Ints a, Ints b) { return _mm256_and_si256(a, b); }
KVPARE_INLINE Ints bits_or(Ints a, Ints b) { return _mm256_or_si256(a, b); }
KVPARE_INLINE Ints bits_xor(Ints a, Ints b) { return _mm256_xor_si256(a, b); }
KVPARE_INLINE Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
KVPARE_INLINE Ints sub_bytes(Ints a, Ints b) { return _mm256_sub_epi8(a, b); }
KVPARE_INLINE Ints add_bytes(Ints a, Ints b) { return _mm256_add_epi8(a, b); }
KVPARE_INLINE Ints average_bytes(Ints a, Ints b) { return _mm256_avg_epu8(a, b); }
KVPARE_INLINE Ints bits_and_or(Ints a, Ints b, Ints c) { return bits_or(bits_and(a, b), c); }
template <int left>
KVPARE_INLINE Ints shift16(Ints x) {
  if constexpr (left > 0) return _mm256_slli_epi16(x, left);
  else if constexpr (left < 0) return _mm256_srli_epi16(x, -left);
  else return x;
}
KVPARE_INLINE Ints times_256(Ints x) { return _mm256_slli_epi32(x, 8); }
KVPARE_INLINE Ints shift_left32(Ints x, int n) { return _mm256_sll_epi32(x, _mm_cvtsi32_si128(n)); }
KVPARE_INLINE Ints shift_right32(Ints x, int n) { return _mm256_srl_epi32(x, _mm_cvtsi32_si128(n)); }
KVPARE_INLINE Ints look_up(Ints table, Ints at) { return _mm256_shuffle_epi8(table, at); }
KVPARE_INLINE Ints widen_bytes(const std::uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
KVPARE_INLINE Vec to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
KVPARE_INLINE Ints nearest_ints(Vec x) { return _mm256_cvtps_epi32(x); }
KVPARE_INLINE Vec absolute(Vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
KVPARE_INLINE Vec as_floats(Ints x) { return _mm256_castsi256_ps(x); }

KVPARE_INLINE void store_bytes(std::uint8_t* p, Ints x) {
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
}
KVPARE_INLINE Ints whole_ints(Vec x) { return _mm256_cvttps_epi32(x); }
KVPARE_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
KVPARE_INLINE Vec divide(Vec a, Vec b) { return _mm256_div_ps(a, b); }
KVPARE_INLINE Vec negative(Vec x) { return _mm256_xor_ps(x, _mm256_set1_ps(-0.0f)); }
KVPARE_INLINE void keep(Vec& x) { asm("" : "+x"(x)); }
KVPARE_INLINE Vec normal_or_zero(Vec x) {
  return _mm256_and_ps(_mm256_cmp_ps(absolute(x), _mm256_set1_ps(0x1p-126f), _CMP_GE_OQ), x);
}
KVPARE_INLINE Vec pick_greater(Vec a, Vec b, Vec x, Vec y) {
  return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}

// 16 floats, looked up by 32-bit lanes of 0 … 15; and floats anywhere.
struct FloatTable {
  Vec low, high;
};
KVPARE_INLINE FloatTable float_table(const float* p) { return {load(p), load(p + 8)}; }
template <int n>
KVPARE_INLINE Ints shift_down(Ints x) {
  return _mm256_srli_epi32(x, n);
}
template <int bits>
KVPARE_INLINE Vec look_up_floats(const FloatTable& table, Ints at) {
  if constexpr (bits < 4) return _mm256_permutevar8x32_ps(table.low, at);
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, at), _mm256_permutevar8x32_ps(table.high, at),
                          _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
}
KVPARE_INLINE Vec pick_floats(const float* p, Ints at) { return _mm256_i32gather_ps(p, at, 4); }

// Floats of 8 bits: `lanes` from p and as many from p + step, as halves that are 2^-8 of E4M3, or E5M2 itself.
template <bool e5m2>
KVPARE_INLINE Vec load_small(const std::byte* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  if constexpr (e5m2) return _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(bytes), 8));
  else
    return _mm256_cvtph_ps(
        _mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7), _mm_set1_epi16(static_cast<short>(0xbf80))));
}
template <bool e5m2>
KVPARE_INLINE void load_small(const std::byte* p, Index step, Vec& a, Vec& b) {
  a = load_small<e5m2>(p), b = load_small<e5m2>(p + step);
}
inline constexpr float e4m3_unit = 256;

KVPARE_INLINE Ints lanes_of(std::uint64_t bits) {
  const Ints bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits & 255)), bit), bit);
}
KVPARE_INLINE Vec only(std::uint64_t bits, Vec x) { return _mm256_and_ps(_mm256_castsi256_ps(lanes_of(bits)), x); }
KVPARE_INLINE void store_listed(float* to, Vec x, std::uint64_t bits) {
  float all[lanes];
  store(all, x);
  for (bits &= 255; bits != 0; bits &= bits - 1) *to++ = all[__builtin_ctzll(bits)];
}
KVPARE_INLINE Vec load_listed(const float* from, std::uint64_t bits) {
  if ((bits & 255) == 255) return load(from);
  float all[lanes] = {};
  for (bits &= 255; bits != 0; bits &= bits - 1) all[__builtin_ctzll(bits)] = *from++;
  return load(all);
}
KVPARE_INLINE Vec pick(const float* table, const std::uint8_t* at) {
  return _mm256_i32gather_ps(table, widen_bytes(at), 4);
}
KVPARE_INLINE Vec divide_or_zero(Vec a, Vec b) {
  return _mm256_and_ps(_mm256_cmp_ps(b, zero(), _CMP_NEQ_UQ), _mm256_div_ps(a, b));
}

// Packing keeps to lanes of 16 bytes; this puts the 32-bit pieces of four vectors back in order.
KVPARE_INLINE Ints in_order(Ints x) {
  return _mm256_permutevar8x32_epi32(x, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
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
  return _mm256_dpbusd_avx_epi32(sum, unsigned_bytes, signed_bytes);
#else
  // g++ 12 copies the sum before and after its own intrinsic.
  asm("%{vex%} vpdpbusd\t%2, %1, %0" : "+x"(sum) : "x"(unsigned_bytes), "x"(signed_bytes));
  return sum;
#endif
}
KVPARE_INLINE Ints dot_key(Ints sum, KeyCodes codes, Ints q) { return dot(sum, codes, q); }
KVPARE_INLINE Ints dot_value(Ints sum, ValueCodes codes, Ints p) { return dot(sum, p, codes); }

// Numbers of 0 … 65535 (65536 counts as 65535) as 256 * high + low; or of 0 … 255, in `high`.
template <bool wide>
KVPARE_INLINE void split_unsigned(Ints a, Ints b, Ints c, Ints d, Ints& high, Ints& low) {
  if constexpr (!wide) {
    high = in_order(_mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d)));
    return;
  }
  const Ints ab = _mm256_packus_epi32(a, b), cd = _mm256_packus_epi32(c, d), byte = _mm256_set1_epi16(0xff);
  high = in_order(_mm256_packus_epi16(_mm256_srli_epi16(ab, 8), _mm256_srli_epi16(cd, 8)));
  low = in_order(_mm256_packus_epi16(bits_and(ab, byte), bits_and(cd, byte)));
}
// Numbers of ±32639 as 256 * high + low, both signed; or of ±127, in `high`.
template <bool wide>
KVPARE_INLINE void split_signed(Ints a, Ints b, Ints c, Ints d, Ints& high, Ints& low) {
  if constexpr (!wide) {
    high = in_order(_mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d)));
    return;
  }
  const Ints half = _mm256_set1_epi16(128), byte = _mm256_set1_epi16(0xff);
  const Ints ab = _mm256_add_epi16(_mm256_packs_epi32(a, b), half), cd = _mm256_add_epi16(_mm256_packs_epi32(c, d), half);
  high = in_order(_mm256_packs_epi16(_mm256_srai_epi16(ab, 8), _mm256_srai_epi16(cd, 8)));
  low = in_order(_mm256_packus_epi16(bits_and(ab, byte), bits_and(cd, byte)));
  low = bits_xor(low, each_byte(128));
}
#else
inline constexpr bool has_dots = false;

struct KeyCodes {
  Ints even, odd;
};
using ValueCodes = KeyCodes;
KVPARE_INLINE KeyCodes key_codes(Ints x) { return {bits_and(x, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(x, 8)}; }
KVPARE_INLINE ValueCodes value_codes(Ints x) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), _mm256_srai_epi16(x, 8)};
}
KVPARE_INLINE Ints dot_pairs(Ints sum, KeyCodes codes, Ints even, Ints odd) {
  return add_ints(add_ints(sum, _mm256_madd_epi16(codes.even, even)), _mm256_madd_epi16(codes.odd, odd));
}
// Numbers of ±32767: of each four the first and the third, and the second and the fourth.
KVPARE_INLINE void split_pairs(Ints a, Ints b, Ints c, Ints d, Ints& even, Ints& odd) {
  const Vec ab = as_floats(_mm256_packs_epi32(a, b)), cd = as_floats(_mm256_packs_epi32(c, d));
  const Ints first = _mm256_castps_si256(_mm256_shuffle_ps(ab, cd, 0x88));   // numbers 0 and 1 of each four
  const Ints second = _mm256_castps_si256(_mm256_shuffle_ps(ab, cd, 0xdd));  // 2 and 3
  even = in_order(_mm256_blend_epi16(first, _mm256_slli_epi32(second, 16), 0xaa));
  odd = in_order(_mm256_blend_epi16(_mm256_srli_epi32(first, 16), second, 0xaa));
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

// The vector type of AVX-512 F, BW, DQ, VL. What each function does is listed at the top of kernels.inl.

using Vec = __m512;

inline constexpr int lanes = 16;
inline constexpr int dot_unroll = 8;
inline constexpr int dot_rows = 6, sum_rows = 6, sum_vectors = 4, panel_rows = 12, panel_vectors = 2;

template <class T>
using InPanel = T;

KVPARE_INLINE Vec zero() { return _mm512_setzero_ps(); }
KVPARE_INLINE Vec broadcast(float x) { return _mm512_set1_ps(x); }
KVPARE_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
KVPARE_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
KVPARE_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
KVPARE_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }

KVPARE_INLINE Vec widen(__m256i x, const half*) { return _mm512_cvtph_ps(x); }
KVPARE_INLINE Vec widen(__m256i x, const bfloat16*) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
KVPARE_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
KVPARE_INLINE Vec load(const half* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p); }
KVPARE_INLINE Vec load(const bfloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p); }

KVPARE_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
KVPARE_INLINE Vec load_part(const float* p, int n, float rest = 0) {
  return _mm512_mask_loadu_ps(broadcast(rest), first_lanes(n), p);
}
template <class T>
KVPARE_INLINE Vec load_part(const T* p, int n) {
  return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p), p);
}

KVPARE_INLINE __m256i narrow(Vec v, half*) {
  const __m256i x = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  // The instruction keeps the payload of a NaN; core/dtype.hpp has one NaN per sign.
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m256i sign = _mm256_and_si256(x, _mm256_set1_epi16(-0x8000));
  return _mm256_mask_blend_epi16(is_nan, x, _mm256_or_si256(sign, _mm256_set1_epi16(0x7e00)));
}
KVPARE_INLINE __m256i narrow(Vec v, bfloat16*) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i upper = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, is_nan, upper, _mm512_set1_epi32(0x40)));
}
KVPARE_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
KVPARE_INLINE void store(half* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, p)); }
KVPARE_INLINE void store(bfloat16* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, p)); }
KVPARE_INLINE void store_part(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
template <class T>
KVPARE_INLINE void store_part(T* p, Vec v, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(v, p));
}

KVPARE_INLINE float sum_of(Vec v) { return _mm512_reduce_add_ps(v); }
KVPARE_INLINE float max_of_lanes(Vec v) { return _mm512_reduce_max_ps(v); }
KVPARE_INLINE void sum_four(Vec a, Vec b, Vec c, Vec d, float* out) {
  const Vec ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Vec cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const Vec x = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
}

KVPARE_INLINE void max_four(Vec a, Vec b, Vec c, Vec d, float* out) {
  const Vec ab = _mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Vec cd = _mm512_max_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const Vec x = _mm512_max_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 y = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
}

KVPARE_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
KVPARE_INLINE Vec nearest(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
KVPARE_INLINE Vec times_power(Vec p, Vec n, Vec x) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), p, n);
}

using Tiles = __m512i;
KVPARE_INLINE __m128i load_tile(const std::byte* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
KVPARE_INLINE Tiles load_tiles(const std::byte* const* p, Index step, Index offset) {
  __m512i x = _mm512_castsi128_si512(load_tile(p[0] + offset));
  x = _mm512_inserti32x4(x, load_tile(p[step] + offset), 1);
  x = _mm512_inserti32x4(x, load_tile(p[2 * step] + offset), 2);
  return _mm512_inserti32x4(x, load_tile(p[3 * step] + offset), 3);
}
template <int Bytes>
KVPARE_INLINE Tiles interleave_low(Tiles a, Tiles b) {
  if constexpr (Bytes == 2) return _mm512_unpacklo_epi16(a, b);
  else return _mm512_unpacklo_epi32(a, b);
}
template <int Bytes>
KVPARE_INLINE Tiles interleave_high(Tiles a, Tiles b) {
  if constexpr (Bytes == 2) return _mm512_unpackhi_epi16(a, b);
  else return _mm512_unpackhi_epi32(a, b);
}

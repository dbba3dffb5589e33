// The vector type of AVX2 with FMA and F16C. What each function does is listed at the top of kernels.inl.

using Vec = __m256;

inline constexpr int lanes = 8;
inline constexpr int dot_unroll = 8;
inline constexpr int dot_rows = 2, sum_rows = 2, sum_vectors = 4, panel_rows = 6, panel_vectors = 2;

template <class T>
using InPanel = T;

KVPARE_INLINE Vec zero() { return _mm256_setzero_ps(); }
KVPARE_INLINE Vec broadcast(float x) { return _mm256_set1_ps(x); }
KVPARE_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
KVPARE_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
KVPARE_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
KVPARE_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }

KVPARE_INLINE Vec widen(__m128i x, const half*) { return _mm256_cvtph_ps(x); }
KVPARE_INLINE Vec widen(__m128i x, const bfloat16*) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
KVPARE_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
KVPARE_INLINE Vec load(const half* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), p); }
KVPARE_INLINE Vec load(const bfloat16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), p); }

KVPARE_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
KVPARE_INLINE Vec load_part(const float* p, int n, float rest = 0) {
  const __m256i mask = first_lanes(n);
  return _mm256_blendv_ps(broadcast(rest), _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask));
}
template <class T>
KVPARE_INLINE Vec load_part(const T* p, int n) {
  __m128i x = _mm_setzero_si128();
  std::memcpy(&x, p, static_cast<std::size_t>(n) * 2);
  return widen(x, p);
}

KVPARE_INLINE __m128i narrow(Vec v, half*) {
  const __m128i x = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  // The instruction keeps the payload of a NaN; core/dtype.hpp has one NaN per sign.
  const __m128i is_nan = _mm_cmpgt_epi16(_mm_and_si128(x, _mm_set1_epi16(0x7fff)), _mm_set1_epi16(0x7c00));
  const __m128i one_nan = _mm_or_si128(_mm_and_si128(x, _mm_set1_epi16(-0x8000)), _mm_set1_epi16(0x7e00));
  return _mm_blendv_epi8(x, one_nan, is_nan);
}
KVPARE_INLINE __m128i narrow(Vec v, bfloat16*) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i upper = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i x = _mm256_blendv_epi8(rounded, _mm256_or_si256(upper, _mm256_set1_epi32(0x40)), is_nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}
KVPARE_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
KVPARE_INLINE void store(half* p, Vec v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v, p)); }
KVPARE_INLINE void store(bfloat16* p, Vec v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v, p)); }
KVPARE_INLINE void store_part(float* p, Vec v, int n) { _mm256_maskstore_ps(p, first_lanes(n), v); }
template <class T>
KVPARE_INLINE void store_part(T* p, Vec v, int n) {
  const __m128i x = narrow(v, p);
  std::memcpy(static_cast<void*>(p), &x, static_cast<std::size_t>(n) * 2);
}

KVPARE_INLINE float sum_of(Vec v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
KVPARE_INLINE float max_of_lanes(Vec v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
KVPARE_INLINE void sum_four(Vec a, Vec b, Vec c, Vec d, float* out) {
  const Vec ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const Vec cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const Vec x = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}

KVPARE_INLINE void max_four(Vec a, Vec b, Vec c, Vec d, float* out) {
  const Vec ab = _mm256_max_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const Vec cd = _mm256_max_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const Vec x = _mm256_max_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}

KVPARE_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
KVPARE_INLINE Vec nearest(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
KVPARE_INLINE Vec times_power(Vec p, Vec n, Vec x) {
  // NaN converts to 0x80000000, whose shift is 0, and stays NaN.
  const __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23));
  return _mm256_and_ps(_mm256_castsi256_ps(scaled), _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ));
}

using Tiles = __m256i;
KVPARE_INLINE __m128i load_tile(const std::byte* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
KVPARE_INLINE Tiles load_tiles(const std::byte* const* p, Index step, Index offset) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(load_tile(p[0] + offset)), load_tile(p[step] + offset), 1);
}
template <int Bytes>
KVPARE_INLINE Tiles interleave_low(Tiles a, Tiles b) {
  if constexpr (Bytes == 2) return _mm256_unpacklo_epi16(a, b);
  else return _mm256_unpacklo_epi32(a, b);
}
template <int Bytes>
KVPARE_INLINE Tiles interleave_high(Tiles a, Tiles b) {
  if constexpr (Bytes == 2) return _mm256_unpackhi_epi16(a, b);
  else return _mm256_unpackhi_epi32(a, b);
}

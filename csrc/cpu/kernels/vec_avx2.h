// The lanes of vec.h, two ymm; only vec.h includes it.
#pragma once

namespace pbm::PBM_TIER {

struct Vec {
  __m256 lo, hi;
};
struct IVec {
  __m256i lo, hi;
};
PBM_INLINE __m256i tail_mask(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
PBM_INLINE Vec zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
PBM_INLINE IVec izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
PBM_INLINE Vec set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
PBM_INLINE IVec iset1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
PBM_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
PBM_INLINE IVec iload(const void* p) {
  const __m256i* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
PBM_INLINE void store(float* p, Vec a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
PBM_INLINE void istore(void* p, IVec a) {
  __m256i* q = static_cast<__m256i*>(p);
  _mm256_storeu_si256(q, a.lo);
  _mm256_storeu_si256(q + 1, a.hi);
}
PBM_INLINE void stream(float* p, Vec a) {
  _mm256_stream_ps(p, a.lo);
  _mm256_stream_ps(p + 8, a.hi);
}
PBM_INLINE void streams_end() { _mm_sfence(); }
PBM_INLINE Vec load_n(const float* p, int n) {
  return {_mm256_maskload_ps(p, tail_mask(n)), _mm256_maskload_ps(p + 8, tail_mask(n - 8))};
}
PBM_INLINE void store_n(float* p, Vec a, int n) {
  _mm256_maskstore_ps(p, tail_mask(n), a.lo);
  _mm256_maskstore_ps(p + 8, tail_mask(n - 8), a.hi);
}
#define PBM_F2(name, op) \
  PBM_INLINE Vec name(Vec a, Vec b) { return {op(a.lo, b.lo), op(a.hi, b.hi)}; }
PBM_F2(add, _mm256_add_ps)
PBM_F2(sub, _mm256_sub_ps)
PBM_F2(mul, _mm256_mul_ps)
PBM_F2(div, _mm256_div_ps)
PBM_F2(vmin, _mm256_min_ps)
PBM_F2(vmax, _mm256_max_ps)
#undef PBM_F2
PBM_INLINE Vec fmadd(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
PBM_INLINE Vec fnmadd(Vec a, Vec b, Vec c) {
  return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)};
}
PBM_INLINE Vec vabs(Vec a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
PBM_INLINE Vec round_even(Vec a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kMode), _mm256_round_ps(a.hi, kMode)};
}
PBM_INLINE float reduce8(__m256 a, bool take_max, bool take_min) {
  __m128 x = _mm256_castps256_ps128(a), y = _mm256_extractf128_ps(a, 1);
  x = take_max ? _mm_max_ps(x, y) : take_min ? _mm_min_ps(x, y) : _mm_add_ps(x, y);
  y = _mm_movehl_ps(x, x);
  x = take_max ? _mm_max_ps(x, y) : take_min ? _mm_min_ps(x, y) : _mm_add_ps(x, y);
  y = _mm_shuffle_ps(x, x, 1);
  x = take_max ? _mm_max_ps(x, y) : take_min ? _mm_min_ps(x, y) : _mm_add_ps(x, y);
  return _mm_cvtss_f32(x);
}
PBM_INLINE float reduce_add(Vec a) { return reduce8(_mm256_add_ps(a.lo, a.hi), false, false); }
PBM_INLINE float reduce_max(Vec a) { return reduce8(_mm256_max_ps(a.lo, a.hi), true, false); }
PBM_INLINE float reduce_min(Vec a) { return reduce8(_mm256_min_ps(a.lo, a.hi), false, true); }
PBM_INLINE Vec where_negative(Vec x, Vec a, Vec b) {
  const __m256 z = _mm256_setzero_ps();
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_cmp_ps(x.lo, z, _CMP_LT_OQ)),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_cmp_ps(x.hi, z, _CMP_LT_OQ))};
}
PBM_INLINE Vec where_hidden(Vec x, Vec a, Vec b) {
  const __m256 hidden = _mm256_set1_ps(-__builtin_inff());
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_cmp_ps(x.lo, hidden, _CMP_EQ_OQ)),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_cmp_ps(x.hi, hidden, _CMP_EQ_OQ))};
}
PBM_INLINE IVec to_int(Vec a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
PBM_INLINE Vec to_float(IVec a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
#define PBM_I2(name, op) \
  PBM_INLINE IVec name(IVec a, IVec b) { return {op(a.lo, b.lo), op(a.hi, b.hi)}; }
PBM_I2(iadd, _mm256_add_epi32)
PBM_I2(isub, _mm256_sub_epi32)
PBM_I2(imul, _mm256_mullo_epi32)
PBM_I2(iand, _mm256_and_si256)
PBM_I2(ior, _mm256_or_si256)
PBM_I2(ixor, _mm256_xor_si256)
#undef PBM_I2
template <int S>
PBM_INLINE IVec shl(IVec a) {
  return {_mm256_slli_epi32(a.lo, S), _mm256_slli_epi32(a.hi, S)};
}
template <int S>
PBM_INLINE IVec shr(IVec a) {
  return {_mm256_srli_epi32(a.lo, S), _mm256_srli_epi32(a.hi, S)};
}
PBM_INLINE Vec as_float(IVec a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
PBM_INLINE IVec as_int(Vec a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
// Two halves, so that results between 2^-149 and 2^-126 round once, as scalef does.
PBM_INLINE Vec scale_by_pow2(Vec a, Vec n) {
  const IVec k = to_int(vmin(vmax(n, set1(-252.f)), set1(252.f)));
  const IVec half = {_mm256_srai_epi32(k.lo, 1), _mm256_srai_epi32(k.hi, 1)};
  const IVec rest = isub(k, half), bias = iset1(127);
  return mul(mul(a, as_float(shl<23>(iadd(half, bias)))), as_float(shl<23>(iadd(rest, bias))));
}
PBM_INLINE Vec vfloor(Vec a) { return {_mm256_floor_ps(a.lo), _mm256_floor_ps(a.hi)}; }
PBM_INLINE IVec widen_u8(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
PBM_INLINE void multiply_wide8(__m256i a, __m256i factor, __m256i* high, __m256i* low) {
  const __m256i even = _mm256_mul_epu32(a, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), factor);
  *high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  *low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
}
PBM_INLINE void multiply_wide(IVec a, uint32_t m, IVec* high, IVec* low) {
  const __m256i factor = _mm256_set1_epi64x(m);
  multiply_wide8(a.lo, factor, &high->lo, &low->lo);
  multiply_wide8(a.hi, factor, &high->hi, &low->hi);
}
PBM_INLINE IVec widen_u16(const uint16_t* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), _mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1))};
}
PBM_INLINE __m256i pack_u16(IVec a) {  // values in [0, 65535]
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(a.lo, a.hi), 0xd8);
}
PBM_INLINE void narrow_u16(uint16_t* p, IVec a) {
  const IVec low = iand(a, iset1(0xffff));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack_u16(low));
}
PBM_INLINE void narrow_u8(uint8_t* p, IVec a) {
  const __m256i w = pack_u16(iand(a, iset1(0xff)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi16(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1)));
}
PBM_INLINE Vec widen_f16(const uint16_t* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
PBM_INLINE void narrow_f16(uint16_t* p, Vec a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  __m128i* q = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(q, _mm256_cvtps_ph(a.lo, kMode));
  _mm_storeu_si128(q + 1, _mm256_cvtps_ph(a.hi, kMode));
}

}  // namespace pbm::PBM_TIER

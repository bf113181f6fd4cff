// The lanes of vec.h, one zmm; only vec.h includes it.
#pragma once

namespace pbm::PBM_TIER {

struct Vec {
  __m512 v;
};
struct IVec {
  __m512i v;
};
PBM_INLINE __mmask16 lanes_mask(int n) { return static_cast<__mmask16>((1u << n) - 1); }

PBM_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
PBM_INLINE IVec izero() { return {_mm512_setzero_si512()}; }
PBM_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
PBM_INLINE IVec iset1(int32_t x) { return {_mm512_set1_epi32(x)}; }
PBM_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
PBM_INLINE IVec iload(const void* p) { return {_mm512_loadu_si512(p)}; }
PBM_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
PBM_INLINE void istore(void* p, IVec a) { _mm512_storeu_si512(p, a.v); }
// To a whole cache line, past the caches; other threads see it after streams_end.
PBM_INLINE void stream(float* p, Vec a) { _mm512_stream_ps(p, a.v); }
PBM_INLINE void streams_end() { _mm_sfence(); }
PBM_INLINE Vec load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(lanes_mask(n), p)}; }
PBM_INLINE void store_n(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, lanes_mask(n), a.v); }
PBM_INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
PBM_INLINE Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
PBM_INLINE Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
PBM_INLINE Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
PBM_INLINE Vec fmadd(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
PBM_INLINE Vec fnmadd(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c − a·b
PBM_INLINE Vec vmin(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
PBM_INLINE Vec vmax(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
PBM_INLINE Vec vabs(Vec a) { return {_mm512_abs_ps(a.v)}; }
PBM_INLINE Vec round_even(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
PBM_INLINE Vec scale_by_pow2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// a·2^⌊x⌋ and x − ⌊x⌋, which of −∞ are 0 and 0: two instructions for what takes six elsewhere.
PBM_INLINE Vec scale_by_pow2_floor(Vec a, Vec x) { return {_mm512_scalef_ps(a.v, x.v)}; }
PBM_INLINE Vec fraction(Vec x) { return {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
// a where x < 0, b elsewhere (NaN: b).
PBM_INLINE Vec where_negative(Vec x, Vec a, Vec b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_LT_OQ), b.v, a.v)};
}
// a where x is −∞, b elsewhere.
PBM_INLINE Vec where_hidden(Vec x, Vec a, Vec b) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-__builtin_inff()), _CMP_EQ_OQ), b.v, a.v)};
}
PBM_INLINE float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
PBM_INLINE float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
PBM_INLINE float reduce_min(Vec a) { return _mm512_reduce_min_ps(a.v); }
PBM_INLINE IVec to_int(Vec a) { return {_mm512_cvtps_epi32(a.v)}; }  // to nearest even
PBM_INLINE Vec to_float(IVec a) { return {_mm512_cvtepi32_ps(a.v)}; }
PBM_INLINE IVec iadd(IVec a, IVec b) { return {_mm512_add_epi32(a.v, b.v)}; }
PBM_INLINE IVec isub(IVec a, IVec b) { return {_mm512_sub_epi32(a.v, b.v)}; }
PBM_INLINE IVec imul(IVec a, IVec b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
PBM_INLINE IVec iand(IVec a, IVec b) { return {_mm512_and_si512(a.v, b.v)}; }
PBM_INLINE IVec ior(IVec a, IVec b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int S>
PBM_INLINE IVec shl(IVec a) {
  return {_mm512_slli_epi32(a.v, S)};
}
template <int S>
PBM_INLINE IVec shr(IVec a) {
  return {_mm512_srli_epi32(a.v, S)};
}
PBM_INLINE Vec as_float(IVec a) { return {_mm512_castsi512_ps(a.v)}; }
PBM_INLINE IVec as_int(Vec a) { return {_mm512_castps_si512(a.v)}; }
PBM_INLINE IVec widen_u16(const uint16_t* p) {
  return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
PBM_INLINE IVec widen_u8(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
// The 64-bit products of unsigned lanes with m: upper and lower halves.
PBM_INLINE void multiply_wide(IVec a, uint32_t m, IVec* high, IVec* low) {
  const __m512i factor = _mm512_set1_epi64(m);
  const __m512i even = _mm512_mul_epu32(a.v, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), factor);
  high->v = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  low->v = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
}
PBM_INLINE IVec ixor(IVec a, IVec b) { return {_mm512_xor_si512(a.v, b.v)}; }
PBM_INLINE void narrow_u16(uint16_t* p, IVec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v));
}
PBM_INLINE void narrow_u8(uint8_t* p, IVec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
PBM_INLINE Vec widen_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
PBM_INLINE void narrow_f16(uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

}  // namespace pbm::PBM_TIER

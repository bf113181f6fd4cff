// Sixteen 32-bit lanes, the same operations on every ISA tier: one zmm, two ymm, or an array for the portable tier.
// Kernels are written once against this file; PBM_TIER names the namespace that they are compiled into, so that no
// inline function of one tier can be linked into another.
#pragma once

#include <cstdint>
#include <cstring>

#if PBM_TIER_LEVEL >= 1
#include <immintrin.h>
#endif

#define PBM_UNROLL _Pragma("GCC unroll 16")  // without it register tiles live on the stack: see docs/design.md
#define PBM_INLINE static inline __attribute__((always_inline))

namespace pbm::PBM_TIER {

constexpr int kWidth = 16;

// ---------------------------------------------------------------------------------------------------- AVX-512 ---
#if PBM_TIER_LEVEL >= 2
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

// ------------------------------------------------------------------------------------------------------- AVX2 ---
#elif PBM_TIER_LEVEL == 1
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

// --------------------------------------------------------------------------------------------------- portable ---
#else
struct Vec {
  float v[16];
};
struct IVec {
  int32_t v[16];
};
#define PBM_MAP(R, expr)                      \
  R r;                                        \
  for (int i = 0; i < 16; i++) r.v[i] = expr; \
  return r;
PBM_INLINE Vec set1(float x){PBM_MAP(Vec, x)} PBM_INLINE IVec iset1(int32_t x){PBM_MAP(IVec, x)} PBM_INLINE Vec zero() {
  return set1(0.f);
}
PBM_INLINE IVec izero() { return iset1(0); }
PBM_INLINE Vec load_n(const float* p, int n){PBM_MAP(Vec, i < n ? p[i] : 0.f)} PBM_INLINE Vec load(const float* p) {
  Vec r;
  std::memcpy(r.v, p, 64);
  return r;
}
PBM_INLINE IVec iload(const void* p) {
  IVec r;
  std::memcpy(r.v, p, 64);
  return r;
}
PBM_INLINE void store(float* p, Vec a) { std::memcpy(p, a.v, 64); }
PBM_INLINE void istore(void* p, IVec a) { std::memcpy(p, a.v, 64); }
PBM_INLINE void stream(float* p, Vec a) { store(p, a); }
PBM_INLINE void streams_end() {}
PBM_INLINE void store_n(float* p, Vec a, int n) { std::memcpy(p, a.v, n * 4); }
PBM_INLINE Vec add(Vec a, Vec b){PBM_MAP(Vec, a.v[i] + b.v[i])} PBM_INLINE Vec
    sub(Vec a, Vec b){PBM_MAP(Vec, a.v[i] - b.v[i])} PBM_INLINE Vec
    mul(Vec a, Vec b){PBM_MAP(Vec, a.v[i] * b.v[i])} PBM_INLINE Vec
    div(Vec a, Vec b){PBM_MAP(Vec, a.v[i] / b.v[i])} PBM_INLINE Vec
    vmin(Vec a, Vec b){PBM_MAP(Vec, a.v[i] < b.v[i] ? a.v[i] : b.v[i])} PBM_INLINE Vec
    vmax(Vec a, Vec b){PBM_MAP(Vec, a.v[i] > b.v[i] ? a.v[i] : b.v[i])} PBM_INLINE Vec
    vabs(Vec a){PBM_MAP(Vec, __builtin_fabsf(a.v[i]))}
// Not fused: the portable tier rounds twice, and its tests allow for it.
PBM_INLINE Vec fmadd(Vec a, Vec b, Vec c){PBM_MAP(Vec, a.v[i] * b.v[i] + c.v[i])} PBM_INLINE Vec
    fnmadd(Vec a, Vec b, Vec c){PBM_MAP(Vec, c.v[i] - a.v[i] * b.v[i])} PBM_INLINE Vec
    round_even(Vec a){PBM_MAP(Vec, __builtin_nearbyintf(a.v[i]))} PBM_INLINE Vec scale_by_pow2(Vec a, Vec n){
        PBM_MAP(Vec, __builtin_ldexpf(a.v[i], n.v[i] > -300 ? static_cast<int>(n.v[i] < 300 ? n.v[i] : 300)
                                                            : -300))} PBM_INLINE Vec
    where_negative(Vec x, Vec a, Vec b){PBM_MAP(Vec, x.v[i] < 0 ? a.v[i] : b.v[i])} PBM_INLINE float reduce_add(Vec a) {
  float s = 0;
  for (float x : a.v) s += x;
  return s;
}
PBM_INLINE Vec where_hidden(Vec x, Vec a, Vec b){PBM_MAP(Vec, x.v[i] == -__builtin_inff() ? a.v[i] : b.v[i])}

PBM_INLINE float reduce_max(Vec a) {
  float s = a.v[0];
  for (float x : a.v) s = x > s ? x : s;
  return s;
}
PBM_INLINE float reduce_min(Vec a) {
  float s = a.v[0];
  for (float x : a.v) s = x < s ? x : s;
  return s;
}
// Out of range and NaN give INT32_MIN, as cvtps does.
PBM_INLINE int32_t round_to_int(float x) {
  const float r = __builtin_nearbyintf(x);
  return r >= -2147483648.f && r < 2147483648.f ? static_cast<int32_t>(r) : INT32_MIN;
}
PBM_INLINE IVec to_int(Vec a){PBM_MAP(IVec, round_to_int(a.v[i]))} PBM_INLINE Vec
    to_float(IVec a){PBM_MAP(Vec, static_cast<float>(a.v[i]))} PBM_INLINE int32_t wrap(uint32_t x) {
  return static_cast<int32_t>(x);
}
#define PBM_U(a) static_cast<uint32_t>(a.v[i])
PBM_INLINE IVec iadd(IVec a, IVec b){PBM_MAP(IVec, wrap(PBM_U(a) + PBM_U(b)))} PBM_INLINE IVec
    isub(IVec a, IVec b){PBM_MAP(IVec, wrap(PBM_U(a) - PBM_U(b)))} PBM_INLINE IVec
    imul(IVec a, IVec b){PBM_MAP(IVec, wrap(PBM_U(a) * PBM_U(b)))} PBM_INLINE IVec
    iand(IVec a, IVec b){PBM_MAP(IVec, a.v[i] & b.v[i])} PBM_INLINE IVec ior(IVec a, IVec b) {
  PBM_MAP(IVec, a.v[i] | b.v[i])
}
template <int S>
PBM_INLINE IVec shl(IVec a) {
  PBM_MAP(IVec, wrap(PBM_U(a) << S))
}
template <int S>
PBM_INLINE IVec shr(IVec a){PBM_MAP(IVec, wrap(PBM_U(a) >> S))}
#undef PBM_U
PBM_INLINE Vec as_float(IVec a) {
  Vec r;
  std::memcpy(r.v, a.v, 64);
  return r;
}
PBM_INLINE IVec as_int(Vec a) {
  IVec r;
  std::memcpy(r.v, a.v, 64);
  return r;
}
PBM_INLINE Vec vfloor(Vec a){PBM_MAP(Vec, __builtin_floorf(a.v[i]))} PBM_INLINE IVec
    ixor(IVec a, IVec b){PBM_MAP(IVec, a.v[i] ^ b.v[i])} PBM_INLINE IVec
    widen_u8(const uint8_t* p){PBM_MAP(IVec, p[i])} PBM_INLINE
    void multiply_wide(IVec a, uint32_t m, IVec* high, IVec* low) {
  for (int i = 0; i < 16; i++) {
    const uint64_t product = uint64_t{static_cast<uint32_t>(a.v[i])} * m;
    high->v[i] = wrap(static_cast<uint32_t>(product >> 32));
    low->v[i] = wrap(static_cast<uint32_t>(product));
  }
}
PBM_INLINE IVec widen_u16(const uint16_t* p){PBM_MAP(IVec, p[i])} PBM_INLINE void narrow_u16(uint16_t* p, IVec a) {
  for (int i = 0; i < 16; i++) p[i] = static_cast<uint16_t>(a.v[i]);
}
PBM_INLINE void narrow_u8(uint8_t* p, IVec a) {
  for (int i = 0; i < 16; i++) p[i] = static_cast<uint8_t>(a.v[i]);
}
PBM_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, bits = h & 0x7fff;
  uint32_t u;
  if (bits >= 0x7c00) {  // inf, NaN
    u = 0x7f800000u | (bits & 0x3ff) << 13;
  } else if (bits >= 0x400) {
    u = (bits << 13) + (112u << 23);
  } else {  // subnormal: exact in fp32
    const float f = static_cast<float>(bits) * 0x1p-24f;
    std::memcpy(&u, &f, 4);
  }
  u |= sign;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
PBM_INLINE uint16_t float_to_half(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000);
  u &= 0x7fffffff;
  if (u > 0x7f800000) return sign | 0x7e00 | ((u >> 13) & 0x1ff);
  if (u >= 0x477ff000) return sign | 0x7c00;  // rounds to or beyond 65536
  if (u < 0x38800000) {                       // subnormal in half: let fp32 addition round to a multiple of 2^-24
    float a;
    std::memcpy(&a, &u, 4);
    a += 0.5f;
    std::memcpy(&u, &a, 4);
    return sign | static_cast<uint16_t>(u - 0x3f000000);
  }
  u += 0xfff + ((u >> 13) & 1);
  return sign | static_cast<uint16_t>((u - (112u << 23)) >> 13);
}
PBM_INLINE Vec widen_f16(const uint16_t* p){PBM_MAP(Vec, half_to_float(p[i]))} PBM_INLINE
    void narrow_f16(uint16_t* p, Vec a) {
  for (int i = 0; i < 16; i++) p[i] = float_to_half(a.v[i]);
}
#undef PBM_MAP
#endif

#if PBM_TIER_LEVEL < 2
// Both for x above −2³¹; −∞ is the caller's to keep out.
PBM_INLINE Vec scale_by_pow2_floor(Vec a, Vec x) { return scale_by_pow2(a, vfloor(x)); }
PBM_INLINE Vec fraction(Vec x) { return sub(x, vfloor(x)); }
#endif
PBM_INLINE Vec iota() {
  static constexpr float kLanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(kLanes);
}

// 64 integers to bytes, saturated: to [0, 255], or [-128, 127] if Signed.
template <bool Signed>
PBM_INLINE void saturate_bytes(uint8_t* p, const IVec (&a)[4]) {
#if PBM_TIER_LEVEL >= 2
  const __m512i low = _mm512_packs_epi32(a[0].v, a[1].v), high = _mm512_packs_epi32(a[2].v, a[3].v);
  const __m512i bytes = Signed ? _mm512_packs_epi16(low, high) : _mm512_packus_epi16(low, high);
  // The packs work within 128-bit lanes: word 4l + i holds lane l of a[i].
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, bytes));
#elif PBM_TIER_LEVEL == 1
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int i = 0; i < 4; i += 2) {
    const __m256i low = _mm256_packs_epi32(a[i].lo, a[i].hi), high = _mm256_packs_epi32(a[i + 1].lo, a[i + 1].hi);
    const __m256i bytes = Signed ? _mm256_packs_epi16(low, high) : _mm256_packus_epi16(low, high);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16 * i), _mm256_permutevar8x32_epi32(bytes, order));
  }
#else
  constexpr int32_t kLow = Signed ? -128 : 0, kHigh = Signed ? 127 : 255;
  for (int i = 0; i < 64; i++) {
    const int32_t v = a[i / 16].v[i % 16];
    p[i] = static_cast<uint8_t>(v < kLow ? kLow : v > kHigh ? kHigh : v);
  }
#endif
}

#if PBM_TIER_LEVEL >= 2
PBM_INLINE void transpose16(IVec (&r)[16]) {
  __m512i t[16];
  PBM_UNROLL for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i].v, r[2 * i + 1].v);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i].v, r[2 * i + 1].v);
  }
  __m512i u[16];  // u[4i + j], 128-bit lane l: rows 4i .. 4i+3 of column 4l + j
  PBM_UNROLL for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  PBM_UNROLL for (int j = 0; j < 4; j++) {
    const __m512i even01 = _mm512_shuffle_i32x4(u[j], u[4 + j], 0x88);
    const __m512i even23 = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0x88);
    const __m512i odd01 = _mm512_shuffle_i32x4(u[j], u[4 + j], 0xdd);
    const __m512i odd23 = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0xdd);
    r[j].v = _mm512_shuffle_i32x4(even01, even23, 0x88);
    r[4 + j].v = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
    r[8 + j].v = _mm512_shuffle_i32x4(even01, even23, 0xdd);
    r[12 + j].v = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
  }
}
#else
// Through memory: the compiler turns the inner loop into what the tier has.
PBM_INLINE void transpose16(IVec (&r)[16]) {
  int32_t in[16][16], out[16][16];
  for (int i = 0; i < 16; i++) istore(in[i], r[i]);
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) out[i][j] = in[j][i];
  for (int i = 0; i < 16; i++) r[i] = iload(out[i]);
}
#endif

}  // namespace pbm::PBM_TIER

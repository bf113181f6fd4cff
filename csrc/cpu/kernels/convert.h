// Sixteen elements of a floating dtype from and to memory, as fp32 lanes.
#pragma once

#include "cpu/kernels/types.h"
#include "cpu/kernels/vec.h"

namespace pbm::PBM_TIER {

// Round to nearest even; a NaN stays a (quiet) NaN.
PBM_INLINE IVec bf16_bits(Vec x) {
  const IVec u = as_int(x);
  const IVec odd = iand(shr<16>(u), iset1(1));
  const IVec rounded = shr<16>(iadd(iadd(u, iset1(0x7fff)), odd));
#if PBM_TIER_LEVEL >= 2
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return {_mm512_mask_or_epi32(rounded.v, nan, _mm512_srli_epi32(u.v, 16), _mm512_set1_epi32(0x40))};
#elif PBM_TIER_LEVEL == 1
  const IVec quiet = ior(shr<16>(u), iset1(0x40));
  const __m256 lo = _mm256_cmp_ps(x.lo, x.lo, _CMP_UNORD_Q), hi = _mm256_cmp_ps(x.hi, x.hi, _CMP_UNORD_Q);
  return as_int({_mm256_blendv_ps(as_float(rounded).lo, as_float(quiet).lo, lo),
                 _mm256_blendv_ps(as_float(rounded).hi, as_float(quiet).hi, hi)});
#else
  IVec r = rounded;
  for (int i = 0; i < 16; i++)
    if (x.v[i] != x.v[i]) r.v[i] = static_cast<int32_t>((static_cast<uint32_t>(u.v[i]) >> 16) | 0x40);
  return r;
#endif
}

PBM_INLINE void store_bf16(uint16_t* p, Vec x) {
#if PBM_TIER_LEVEL >= 3
  const __m256bh h = _mm512_cvtneps_pbh(x.v);  // subnormals become zero, as in the products themselves
  std::memcpy(p, &h, 32);
#else
  narrow_u16(p, bf16_bits(x));
#endif
}

// Thirty-two of them, the second sixteen of which are b; past the caches to a whole cache line.
PBM_INLINE void store_bf16_pair(uint16_t* p, Vec a, Vec b, bool past_caches) {
#if PBM_TIER_LEVEL >= 3
  const __m512bh pair = _mm512_cvtne2ps_pbh(b.v, a.v);
  __m512i bits;
  std::memcpy(&bits, &pair, 64);
  past_caches ? _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits) : _mm512_storeu_si512(p, bits);
#else
  (void)past_caches;
  store_bf16(p, a);
  store_bf16(p + kWidth, b);
#endif
}

template <DType T>
PBM_INLINE Vec load16(const void* base, int64_t i) {
  if constexpr (T == DType::f32) return load(static_cast<const float*>(base) + i);
  const uint16_t* p = static_cast<const uint16_t*>(base) + i;
  if constexpr (T == DType::bf16) return as_float(shl<16>(widen_u16(p)));
  return widen_f16(p);
}

// The first n of sixteen; the rest zero. Nothing beyond them is read.
template <DType T>
PBM_INLINE Vec load16_n(const void* base, int64_t i, int n) {
  if (n >= 16) return load16<T>(base, i);
  if constexpr (T == DType::f32) return load_n(static_cast<const float*>(base) + i, n);
  uint16_t buffer[16] = {};
  std::memcpy(buffer, static_cast<const uint16_t*>(base) + i, n * 2);
  return load16<T>(buffer, 0);
}

// The first n of sixteen lanes: a mask, where there are masks.
#if PBM_TIER_LEVEL >= 2
using Lanes = __mmask16;
PBM_INLINE Lanes first_lanes(int n) { return lanes_mask(n); }
#else
using Lanes = int;
PBM_INLINE Lanes first_lanes(int n) { return n; }
#endif

// Those lanes, the rest zero. Nothing else is read: of no lanes the place need not exist.
template <DType T>
PBM_INLINE Vec load16_lanes(const void* base, int64_t i, Lanes lanes) {
#if PBM_TIER_LEVEL >= 2
  if constexpr (T == DType::f32) return {_mm512_maskz_loadu_ps(lanes, static_cast<const float*>(base) + i)};
  const __m256i half = _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(base) + i);
  if constexpr (T == DType::bf16) return as_float(shl<16>(IVec{_mm512_cvtepu16_epi32(half)}));
  return {_mm512_cvtph_ps(half)};
#else
  return lanes == 0 ? zero() : load16_n<T>(base, i, lanes);
#endif
}

template <DType T>
PBM_INLINE void store16(void* base, int64_t i, Vec x) {
  if constexpr (T == DType::f32) {
    store(static_cast<float*>(base) + i, x);
  } else if constexpr (T == DType::bf16) {
    narrow_u16(static_cast<uint16_t*>(base) + i, bf16_bits(x));
  } else {
    narrow_f16(static_cast<uint16_t*>(base) + i, x);
  }
}

template <DType T>
PBM_INLINE void store16_n(void* base, int64_t i, Vec x, int n) {
  if (n >= 16) return store16<T>(base, i, x);
  if constexpr (T == DType::f32) return store_n(static_cast<float*>(base) + i, x, n);
  uint16_t buffer[16];
  store16<T>(buffer, 0, x);
  std::memcpy(static_cast<uint16_t*>(base) + i, buffer, n * 2);
}

// Calls f with the dtype as a template argument: f.template operator()<DType::bf16>().
template <class F>
PBM_INLINE auto with_float_dtype(DType t, F&& f) {
  if (t == DType::f32) return f.template operator()<DType::f32>();
  if (t == DType::bf16) return f.template operator()<DType::bf16>();
  return f.template operator()<DType::f16>();
}

}  // namespace pbm::PBM_TIER

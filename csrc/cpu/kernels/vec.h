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

#if PBM_TIER_LEVEL >= 2
#include "cpu/kernels/vec_avx512.h"
#elif PBM_TIER_LEVEL == 1
#include "cpu/kernels/vec_avx2.h"
#else
#include "cpu/kernels/vec_portable.h"
#endif

namespace pbm::PBM_TIER {

constexpr int kWidth = 16;

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

// The register tile: a few rows of A times a few panels of B, one lane of k at a time, in the three flavours.
#pragma once

#include "cpu/kernels/impl.h"
#include "cpu/kernels/vec.h"

namespace pbm::PBM_TIER {

PBM_INLINE int32_t lane_at(const char* p) {
  int32_t lane;
  std::memcpy(&lane, p, 4);
  return lane;
}

// How one lane of A, broadcast, and one group of B are multiplied into the accumulator: in kParts steps, since both
// parts of an operand that must be taken apart would not leave registers for the accumulators.
template <Flavour F>
struct Dot;

template <>
struct Dot<Flavour::f32> {
  static constexpr int kParts = 1;
  using Acc = Vec;
  using A = Vec;
  using B = Vec;
  PBM_INLINE Acc zero() { return PBM_TIER::zero(); }
  template <int>
  PBM_INLINE A broadcast(const char* p) {
    return as_float(iset1(lane_at(p)));
  }
  template <int>
  PBM_INLINE B load_b(const char* p) {
    return as_float(iload(p));
  }
  PBM_INLINE Acc step(Acc c, A a, B b) { return fmadd(a, b, c); }
  PBM_INLINE void put(void* p, Acc c, bool accumulate) {
    float* f = static_cast<float*>(p);
    store(f, accumulate ? add(load(f), c) : c);
  }
};

template <>
struct Dot<Flavour::bf16> {
  using Acc = Vec;
  PBM_INLINE Acc zero() { return PBM_TIER::zero(); }
  PBM_INLINE void put(void* p, Acc c, bool accumulate) { Dot<Flavour::f32>::put(p, c, accumulate); }
#if PBM_TIER_LEVEL >= 3
  static constexpr int kParts = 1;
  using A = __m512bh;
  using B = __m512bh;
  template <int>
  PBM_INLINE A broadcast(const char* p) {
    return (__m512bh)_mm512_set1_epi32(lane_at(p));
  }
  template <int>
  PBM_INLINE B load_b(const char* p) {
    return (__m512bh)_mm512_loadu_si512(p);
  }
  PBM_INLINE Acc step(Acc c, A a, B b) { return {_mm512_dpbf16_ps(c.v, a, b)}; }
#else
  // A bf16 is the upper half of an fp32: even elements by a shift, odd ones by a mask.
  static constexpr int kParts = 2;
  using A = Vec;
  using B = Vec;
  template <int Part>
  PBM_INLINE Vec part_of(IVec x) {
    return as_float(Part == 0 ? shl<16>(x) : iand(x, iset1(static_cast<int32_t>(0xffff0000))));
  }
  template <int Part>
  PBM_INLINE A broadcast(const char* p) {
    return part_of<Part>(iset1(lane_at(p)));
  }
  template <int Part>
  PBM_INLINE B load_b(const char* p) {
    return part_of<Part>(iload(p));
  }
  PBM_INLINE Acc step(Acc c, A a, B b) { return fmadd(a, b, c); }
#endif
};

template <>
struct Dot<Flavour::u8s8> {
  using Acc = IVec;
  PBM_INLINE Acc zero() { return izero(); }
  PBM_INLINE void put(void* p, Acc c, bool accumulate) { istore(p, accumulate ? iadd(iload(p), c) : c); }
#if PBM_TIER_LEVEL >= 2
  static constexpr int kParts = 1;
  using A = __m512i;
  using B = __m512i;
  template <int>
  PBM_INLINE A broadcast(const char* p) {
    return _mm512_set1_epi32(lane_at(p));
  }
  template <int>
  PBM_INLINE B load_b(const char* p) {
    return _mm512_loadu_si512(p);
  }
  PBM_INLINE Acc step(Acc c, A a, B b) { return {_mm512_dpbusd_epi32(c.v, a, b)}; }
#elif PBM_TIER_LEVEL == 1
  // vpmaddubsw would saturate (255·127·2 > 32767); vpmaddwd on even and odd bytes as 16 bits is exact. A comes so.
  static constexpr int kParts = 2;
  using A = __m256i;
  using B = IVec;
  template <int Part>
  PBM_INLINE A broadcast(const char* p) {
    return _mm256_set1_epi32(lane_at(p + 4 * Part));
  }
  template <int Part>
  PBM_INLINE B load_b(const char* p) {
    const IVec b = iload(p);
    if (Part == 1) return {_mm256_srai_epi16(b.lo, 8), _mm256_srai_epi16(b.hi, 8)};
    return {_mm256_srai_epi16(_mm256_slli_epi16(b.lo, 8), 8), _mm256_srai_epi16(_mm256_slli_epi16(b.hi, 8), 8)};
  }
  PBM_INLINE Acc step(Acc c, A a, B b) {
    c = {_mm256_add_epi32(c.lo, _mm256_madd_epi16(a, b.lo)), _mm256_add_epi32(c.hi, _mm256_madd_epi16(a, b.hi))};
    asm("" : "+x"(c.lo), "+x"(c.hi));  // else gcc adds the products of both parts first and spills accumulators for it
    return c;
  }
#else
  static constexpr int kParts = 1;
  using A = uint32_t;
  struct B {
    int8_t v[64];
  };
  template <int>
  PBM_INLINE A broadcast(const char* p) {
    return static_cast<A>(lane_at(p));
  }
  template <int>
  PBM_INLINE B load_b(const char* p) {
    B b;
    std::memcpy(b.v, p, 64);
    return b;
  }
  PBM_INLINE Acc step(Acc c, A a, const B& b) {
    for (int i = 0; i < 16; i++)
      for (int q = 0; q < 4; q++) c.v[i] += static_cast<int32_t>((a >> (8 * q)) & 0xff) * b.v[4 * i + q];
    return c;
  }
#endif
};

template <class D, int Part, int MR, int NV>
PBM_INLINE void multiply_part(typename D::Acc (&acc)[MR][NV], const char* a, int64_t lda, const char* b,
                              int64_t b_panel) {
  typename D::B bv[NV];
  PBM_UNROLL for (int j = 0; j < NV; j++) bv[j] = D::template load_b<Part>(b + j * b_panel);
  PBM_UNROLL for (int r = 0; r < MR; r++) {
    const typename D::A av = D::template broadcast<Part>(a + r * lda);
    PBM_UNROLL for (int j = 0; j < NV; j++) acc[r][j] = D::step(acc[r][j], av, bv[j]);
  }
}

// One lane of every row of A times one group of every panel of B.
template <class D, int MR, int NV>
PBM_INLINE void multiply(typename D::Acc (&acc)[MR][NV], const char* a, int64_t lda, const char* b, int64_t b_panel) {
  multiply_part<D, 0, MR, NV>(acc, a, lda, b, b_panel);
  if constexpr (D::kParts == 2) multiply_part<D, 1, MR, NV>(acc, a, lda, b, b_panel);
}

// The same with rows that lie anywhere, from byte `at` of each.
template <class D, int Part, int MR, int NV>
PBM_INLINE void multiply_rows_part(typename D::Acc (&acc)[MR][NV], const char* const (&a)[MR], int64_t at,
                                   const char* b, int64_t b_panel) {
  typename D::B bv[NV];
  PBM_UNROLL for (int j = 0; j < NV; j++) bv[j] = D::template load_b<Part>(b + j * b_panel);
  PBM_UNROLL for (int r = 0; r < MR; r++) {
    const typename D::A av = D::template broadcast<Part>(a[r] + at);
    PBM_UNROLL for (int j = 0; j < NV; j++) acc[r][j] = D::step(acc[r][j], av, bv[j]);
  }
}

template <class D, int MR, int NV>
PBM_INLINE void multiply_rows(typename D::Acc (&acc)[MR][NV], const char* const (&a)[MR], int64_t at, const char* b,
                              int64_t b_panel) {
  multiply_rows_part<D, 0, MR, NV>(acc, a, at, b, b_panel);
  if constexpr (D::kParts == 2) multiply_rows_part<D, 1, MR, NV>(acc, a, at, b, b_panel);
}

}  // namespace pbm::PBM_TIER

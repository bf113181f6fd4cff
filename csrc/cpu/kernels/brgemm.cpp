#include "cpu/kernels/brgemm.h"

#include "cpu/kernels/impl.h"
#include "cpu/kernels/vec.h"

namespace pbm::PBM_TIER {
namespace {

// How one lane of A, broadcast, and one group of B are multiplied into the accumulator.
template <Flavour F>
struct Dot;

template <>
struct Dot<Flavour::f32> {
  using Acc = Vec;
  using A = Vec;
  using B = Vec;
  PBM_INLINE Acc zero() { return PBM_TIER::zero(); }
  PBM_INLINE A broadcast(uint32_t lane) { return as_float(iset1(static_cast<int32_t>(lane))); }
  PBM_INLINE B load_b(const char* p) { return as_float(iload(p)); }
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
  using A = __m512bh;
  using B = __m512bh;
  PBM_INLINE A broadcast(uint32_t lane) { return (__m512bh)_mm512_set1_epi32(static_cast<int>(lane)); }
  PBM_INLINE B load_b(const char* p) { return (__m512bh)_mm512_loadu_si512(p); }
  PBM_INLINE Acc step(Acc c, A a, B b) { return {_mm512_dpbf16_ps(c.v, a, b)}; }
#else
  // A bf16 is the upper half of an fp32: even elements by a shift, odd ones by a mask.
  struct Pair {
    Vec even, odd;
  };
  using A = Pair;
  using B = Pair;
  PBM_INLINE Pair split(IVec x) {
    return {as_float(shl<16>(x)), as_float(iand(x, iset1(static_cast<int32_t>(0xffff0000))))};
  }
  PBM_INLINE A broadcast(uint32_t lane) { return split(iset1(static_cast<int32_t>(lane))); }
  PBM_INLINE B load_b(const char* p) { return split(iload(p)); }
  PBM_INLINE Acc step(Acc c, A a, B b) { return fmadd(a.odd, b.odd, fmadd(a.even, b.even, c)); }
#endif
};

template <>
struct Dot<Flavour::u8s8> {
  using Acc = IVec;
  PBM_INLINE Acc zero() { return izero(); }
  PBM_INLINE void put(void* p, Acc c, bool accumulate) { istore(p, accumulate ? iadd(iload(p), c) : c); }
#if PBM_TIER_LEVEL >= 2
  using A = __m512i;
  using B = __m512i;
  PBM_INLINE A broadcast(uint32_t lane) { return _mm512_set1_epi32(static_cast<int>(lane)); }
  PBM_INLINE B load_b(const char* p) { return _mm512_loadu_si512(p); }
  PBM_INLINE Acc step(Acc c, A a, B b) { return {_mm512_dpbusd_epi32(c.v, a, b)}; }
#elif PBM_TIER_LEVEL == 1
  // vpmaddubsw would saturate (255·127·2 > 32767): widen even and odd bytes to 16 bits and use vpmaddwd, which is exact.
  struct A {
    __m256i even, odd;
  };
  struct B {
    __m256i lo_even, lo_odd, hi_even, hi_odd;
  };
  PBM_INLINE A broadcast(uint32_t lane) {
    const __m256i x = _mm256_set1_epi32(static_cast<int>(lane));
    return {_mm256_and_si256(x, _mm256_set1_epi32(0x00ff00ff)), _mm256_srli_epi16(x, 8)};
  }
  PBM_INLINE B load_b(const char* p) {
    const IVec b = iload(p);
    return {_mm256_srai_epi16(_mm256_slli_epi16(b.lo, 8), 8), _mm256_srai_epi16(b.lo, 8),
            _mm256_srai_epi16(_mm256_slli_epi16(b.hi, 8), 8), _mm256_srai_epi16(b.hi, 8)};
  }
  PBM_INLINE Acc step(Acc c, A a, B b) {
    c.lo = _mm256_add_epi32(c.lo, _mm256_madd_epi16(a.even, b.lo_even));
    c.hi = _mm256_add_epi32(c.hi, _mm256_madd_epi16(a.even, b.hi_even));
    c.lo = _mm256_add_epi32(c.lo, _mm256_madd_epi16(a.odd, b.lo_odd));
    c.hi = _mm256_add_epi32(c.hi, _mm256_madd_epi16(a.odd, b.hi_odd));
    return c;
  }
#else
  using A = uint32_t;
  struct B {
    int8_t v[64];
  };
  PBM_INLINE A broadcast(uint32_t lane) { return lane; }
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

PBM_INLINE uint32_t lane_of(const char* p, int64_t bytes) {
  uint32_t lane = 0;
  std::memcpy(&lane, p, bytes);
  return lane;
}

// How far ahead B is fetched: 32 groups are 100 to 400 cycles, what L2 or L3 take to answer. Without it the hardware's
// prefetchers fall behind at every page; 16 and 64 groups were slower (docs/design.md).
constexpr int64_t kPrefetch = 32 * kGroupBytes;

template <Flavour F, int MR, int NV>
void tile(const Brgemm& p) {
  using D = Dot<F>;
  typename D::Acc acc[MR][NV];
  PBM_UNROLL for (int i = 0; i < MR; i++) PBM_UNROLL for (int j = 0; j < NV; j++) acc[i][j] = D::zero();

  constexpr int64_t kPerLane = k_per_lane(F);
  const int64_t lanes = p.k / kPerLane, tail_bytes = p.k % kPerLane * (4 / kPerLane);
  const int64_t lda = p.lda, b_panel = p.b_panel;
  for (int64_t i = 0; i < p.batch; i++) {
    const char* a = p.a + (p.a_offset ? p.a_offset[i] : 0);
    const char* b = p.b + (p.b_offset ? p.b_offset[i] : 0);
    for (int64_t l = 0; l < lanes; l++) {
      typename D::B bv[NV];
      PBM_UNROLL for (int j = 0; j < NV; j++) {
        bv[j] = D::load_b(b + j * b_panel);
        __builtin_prefetch(b + j * b_panel + kPrefetch, 0, 3);
      }
      PBM_UNROLL for (int r = 0; r < MR; r++) {
        const typename D::A av = D::broadcast(lane_of(a + r * lda, 4));
        PBM_UNROLL for (int j = 0; j < NV; j++) acc[r][j] = D::step(acc[r][j], av, bv[j]);
      }
      a += 4;
      b += kGroupBytes;
    }
    if (tail_bytes) {  // the rest of a lane, read without touching what lies behind A
      PBM_UNROLL for (int j = 0; j < NV; j++) {
        const typename D::B bv = D::load_b(b + j * b_panel);
        PBM_UNROLL for (int r = 0; r < MR; r++)
          acc[r][j] = D::step(acc[r][j], D::broadcast(lane_of(a + r * lda, tail_bytes)), bv);
      }
    }
  }
  PBM_UNROLL for (int i = 0; i < MR; i++) PBM_UNROLL for (int j = 0; j < NV; j++)
    D::put(static_cast<char*>(p.c) + (i * p.ldc + j * 16) * 4, acc[i][j], p.accumulate);
}

using TileFn = void (*)(const Brgemm&);

template <Flavour F, int MR, int NV>
constexpr TileFn tile_or_null() {
  if constexpr (MR <= (NV <= kTile.panels ? kTile.max_rows : kTile.wide_rows)) return tile<F, MR, NV>;
  return nullptr;
}

#define PBM_ROW(F, MR) \
  {tile_or_null<F, MR, 1>(), tile_or_null<F, MR, 2>(), tile_or_null<F, MR, 3>(), tile_or_null<F, MR, 4>()}
#define PBM_TILES(F)                                                                                  \
  {PBM_ROW(F, 1), PBM_ROW(F, 2), PBM_ROW(F, 3), PBM_ROW(F, 4), PBM_ROW(F, 5), PBM_ROW(F, 6), PBM_ROW(F, 7), \
   PBM_ROW(F, 8)}
static_assert(kTile.max_rows <= 8 && kTile.wide_panels <= 4);

}  // namespace

void brgemm(const Brgemm& p, Flavour flavour, int rows, int panels) {
  static const TileFn tiles[3][8][4] = {PBM_TILES(Flavour::f32), PBM_TILES(Flavour::bf16),
                                        PBM_TILES(Flavour::u8s8)};
  tiles[static_cast<int>(flavour)][rows - 1][panels - 1](p);
}

}  // namespace pbm::PBM_TIER

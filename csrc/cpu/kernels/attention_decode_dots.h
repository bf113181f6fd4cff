// What attention_decode's tiles do with each dtype of a cache: products with queries and with weights, sums of lanes.
//
// Products are of fp32; of bf16 on the tier with VDPBF16PS; or, for s8 caches, of 16-bit integers, whose int32 sums are
// exact. Elsewhere the cache is converted as it is loaded.
#pragma once

#include "cpu/kernels/convert.h"

namespace pbm::PBM_TIER {

// A tile has up to kTileRows rows; the scores of a tile are one accumulator each.
#if PBM_TIER_LEVEL >= 2
constexpr int kTileRows = 4, kTileScores = 16;
#else
constexpr int kTileRows = 2, kTileScores = 4;
#endif

PBM_INLINE Vec plus(Vec a, Vec b) { return add(a, b); }
PBM_INLINE IVec plus(IVec a, IVec b) { return iadd(a, b); }
PBM_INLINE Vec as_vec(Vec a) { return a; }
PBM_INLINE Vec as_vec(IVec a) { return to_float(a); }

// --- sums of lanes ---------------------------------------------------------------------------------------------------

#if PBM_TIER_LEVEL >= 2
PBM_INLINE __m512 bits(Vec a) { return a.v; }
PBM_INLINE __m512 bits(IVec a) { return _mm512_castsi512_ps(a.v); }
PBM_INLINE void set_bits(Vec* a, __m512 v) { a->v = v; }
PBM_INLINE void set_bits(IVec* a, __m512 v) { a->v = _mm512_castps_si512(v); }

template <class A>
PBM_INLINE A plus_bits(__m512 x, __m512 y) {
  A a, b;
  set_bits(&a, x);
  set_bits(&b, y);
  return plus(a, b);
}

// Lane i is the sum of a[i]'s lanes: 15 additions and 30 shuffles for 16 of them.
template <class A>
PBM_INLINE A sums_of(const A (&a)[16]) {
  A b[8], c[4], d[2];  // of each accumulator: two lanes of every four; one of every four; one of every eight
  PBM_UNROLL for (int i = 0; i < 8; i++) {
    const __m512 x = bits(a[2 * i]), y = bits(a[2 * i + 1]);
    b[i] = plus_bits<A>(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
  }
  PBM_UNROLL for (int i = 0; i < 4; i++) {
    const __m512d x = _mm512_castps_pd(bits(b[2 * i])), y = _mm512_castps_pd(bits(b[2 * i + 1]));
    c[i] = plus_bits<A>(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  PBM_UNROLL for (int i = 0; i < 2; i++) {
    const __m512 x = bits(c[2 * i]), y = bits(c[2 * i + 1]);
    d[i] = plus_bits<A>(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
  }
  const __m512 x = bits(d[0]), y = bits(d[1]);
  return plus_bits<A>(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
}

// acc[r·KT + j], the score of row r and key j, to s[r·pitch + j].
template <int R, class A>
PBM_INLINE void put_scores(const A (&acc)[16], float* s, int64_t pitch) {
  const __m512 x = as_vec(sums_of(acc)).v;
  if constexpr (R == 1) {
    _mm512_storeu_ps(s, x);
  } else if constexpr (R == 2) {
    _mm256_storeu_ps(s, _mm512_castps512_ps256(x));
    _mm256_storeu_ps(s + pitch, _mm512_extractf32x8_ps(x, 1));
  } else {
    _mm_storeu_ps(s, _mm512_castps512_ps128(x));
    _mm_storeu_ps(s + pitch, _mm512_extractf32x4_ps(x, 1));
    _mm_storeu_ps(s + 2 * pitch, _mm512_extractf32x4_ps(x, 2));
    _mm_storeu_ps(s + 3 * pitch, _mm512_extractf32x4_ps(x, 3));
  }
}
#else
#if PBM_TIER_LEVEL == 1
PBM_INLINE __m128 sums_of(const Vec (&a)[4]) {
  __m256 h[4];
  for (int i = 0; i < 4; i++) h[i] = _mm256_add_ps(a[i].lo, a[i].hi);
  const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(h[0], h[1]), _mm256_hadd_ps(h[2], h[3]));
  return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
}
PBM_INLINE __m128 sums_of(const IVec (&a)[4]) {
  __m256i h[4];
  for (int i = 0; i < 4; i++) h[i] = _mm256_add_epi32(a[i].lo, a[i].hi);
  const __m256i x = _mm256_hadd_epi32(_mm256_hadd_epi32(h[0], h[1]), _mm256_hadd_epi32(h[2], h[3]));
  return _mm_cvtepi32_ps(_mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}
PBM_INLINE void put4(float* p, __m128 x) { _mm_storeu_ps(p, x); }
#else
struct Four {
  float v[4];
};
PBM_INLINE Four sums_of(const Vec (&a)[4]) {
  return {{reduce_add(a[0]), reduce_add(a[1]), reduce_add(a[2]), reduce_add(a[3])}};
}
PBM_INLINE Four sums_of(const IVec (&a)[4]) {
  Four f;
  for (int i = 0; i < 4; i++) {
    int32_t s = 0;
    for (int32_t x : a[i].v) s += x;
    f.v[i] = static_cast<float>(s);
  }
  return f;
}
PBM_INLINE void put4(float* p, Four x) { std::memcpy(p, x.v, 16); }
#endif
template <int R, class A>
PBM_INLINE void put_scores(const A (&acc)[4], float* s, int64_t pitch) {
  float four[4];
  put4(four, sums_of(acc));
  constexpr int kKeys = 4 / R;
  for (int r = 0; r < R; r++) std::memcpy(s + r * pitch, four + r * kKeys, kKeys * 4);
}
#endif

// --- elements of a cache times elements of a row ----------------------------------------------------------------------

// kChunk elements of a key, 64 bytes of the row of queries.
template <DType T>
struct KeyDot {
  static constexpr DType kQuery = DType::f32;
  static constexpr int kChunk = 16;
  using Acc = Vec;
  using X = Vec;
  PBM_INLINE Acc none() { return zero(); }
  PBM_INLINE X query(const char* q) { return load(reinterpret_cast<const float*>(q)); }
  PBM_INLINE X key(const char* k) { return load16<T>(k, 0); }
  PBM_INLINE X key_n(const char* k, int n) { return load16_n<T>(k, 0, n); }
  PBM_INLINE Acc step(Acc c, X q, X k) { return fmadd(q, k, c); }
};

// kKeys keys at once of kColumns columns, which make kVecs accumulators.
template <DType T>
struct ValueDot {
  static constexpr DType kWeight = DType::f32;
  static constexpr int kKeys = 1, kVecs = 1;
  using Acc = Vec;
  using X = Vec;
  PBM_INLINE Acc acc(const float* p) { return load(p); }
  PBM_INLINE void put(float* p, Acc a) { store(p, a); }
  PBM_INLINE void values(const char* v, const char*, X* x) { x[0] = load16<T>(v, 0); }
  PBM_INLINE void values_n(const char* v, const char*, X* x, int n) { x[0] = n > 0 ? load16_n<T>(v, 0, n) : zero(); }
  PBM_INLINE X weight(const char* p, bool) {
    float w;
    std::memcpy(&w, p, 4);
    return set1(w);
  }
  PBM_INLINE Acc step(Acc c, X w, X v) { return fmadd(w, v, c); }
  // kVecs accumulators' columns in order, as fp32 times `scale`.
  PBM_INLINE void finish(const float* p, Vec, float* out) { store(out, load(p)); }
};

PBM_INLINE int32_t weight_pair(const char* p, bool first_only) {
  int32_t pair;
  std::memcpy(&pair, p, 4);
  return first_only ? pair & 0xffff : pair;
}

#if PBM_TIER_LEVEL >= 2
PBM_INLINE __mmask32 mask32(int n) { return n >= 32 ? ~__mmask32{0} : n <= 0 ? 0 : (__mmask32{1} << n) - 1; }

// Thirty-two 16-bit elements of two keys, as pairs for the accumulators of columns 8l + 0..3 and 8l + 4..7 in lanes
// 4l .. 4l + 3.
PBM_INLINE void pairs_of(__m512i a, __m512i b, __m512i* x) {
  x[0] = _mm512_unpacklo_epi16(a, b);
  x[1] = _mm512_unpackhi_epi16(a, b);
}
PBM_INLINE void in_order(__m512i low, __m512i high, __m512i* first, __m512i* second) {
  const __m512i halves = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), rest = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  *first = _mm512_permutex2var_epi64(low, halves, high);
  *second = _mm512_permutex2var_epi64(low, rest, high);
}
#endif

#if PBM_TIER_LEVEL >= 3
template <>
struct KeyDot<DType::bf16> {
  static constexpr DType kQuery = DType::bf16;
  static constexpr int kChunk = 32;
  using Acc = Vec;
  using X = __m512bh;
  PBM_INLINE Acc none() { return zero(); }
  PBM_INLINE X query(const char* q) { return (__m512bh)_mm512_loadu_si512(q); }
  PBM_INLINE X key(const char* k) { return (__m512bh)_mm512_loadu_si512(k); }
  PBM_INLINE X key_n(const char* k, int n) { return (__m512bh)_mm512_maskz_loadu_epi16(mask32(n), k); }
  PBM_INLINE Acc step(Acc c, X q, X k) { return {_mm512_dpbf16_ps(c.v, q, k)}; }
};

template <>
struct ValueDot<DType::bf16> {
  static constexpr DType kWeight = DType::bf16;
  static constexpr int kKeys = 2, kVecs = 2;
  using Acc = Vec;
  using X = __m512i;
  PBM_INLINE Acc acc(const float* p) { return load(p); }
  PBM_INLINE void put(float* p, Acc a) { store(p, a); }
  PBM_INLINE void values(const char* v0, const char* v1, X* x) {
    pairs_of(_mm512_loadu_si512(v0), _mm512_loadu_si512(v1), x);
  }
  PBM_INLINE void values_n(const char* v0, const char* v1, X* x, int n) {
    pairs_of(_mm512_maskz_loadu_epi16(mask32(n), v0), _mm512_maskz_loadu_epi16(mask32(n), v1), x);
  }
  PBM_INLINE X weight(const char* p, bool first_only) { return _mm512_set1_epi32(weight_pair(p, first_only)); }
  PBM_INLINE Acc step(Acc c, X w, X v) { return {_mm512_dpbf16_ps(c.v, (__m512bh)w, (__m512bh)v)}; }
  PBM_INLINE void finish(const float* p, Vec scale, float* out) {
    __m512i first, second;
    in_order(iload(p).v, iload(p + 16).v, &first, &second);
    store(out, mul({_mm512_castsi512_ps(first)}, scale));
    store(out + 16, mul({_mm512_castsi512_ps(second)}, scale));
  }
};
#endif

// s8 caches: products of 16-bit integers in pairs (VPDPWSSD, or VPMADDWD and an addition), exact in int32.
#if PBM_TIER_LEVEL >= 2
struct Words {
  __m512i v;
};
PBM_INLINE Words words(const char* p) {
  return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
PBM_INLINE Words words_n(const char* p, int n) { return {_mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(mask32(n), p))}; }
PBM_INLINE Words load_words(const char* p) { return {_mm512_loadu_si512(p)}; }
// In assembly: from the intrinsic gcc 12 copies accumulators about, and keeps some of them on the stack.
PBM_INLINE IVec dot_words(IVec c, Words a, Words b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(c.v) : "v"(a.v), "v"(b.v));
  return c;
}
#elif PBM_TIER_LEVEL == 1
struct Words {
  __m256i lo, hi;
};
PBM_INLINE Words words(const char* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(q)), _mm256_cvtepi8_epi16(_mm_loadu_si128(q + 1))};
}
PBM_INLINE Words load_words(const char* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
PBM_INLINE IVec dot_words(IVec c, Words a, Words b) {
  return {_mm256_add_epi32(c.lo, _mm256_madd_epi16(a.lo, b.lo)), _mm256_add_epi32(c.hi, _mm256_madd_epi16(a.hi, b.hi))};
}
#else
struct Words {
  int16_t v[32];
};
PBM_INLINE Words words(const char* p) {
  Words w;
  for (int i = 0; i < 32; i++) w.v[i] = static_cast<int8_t>(p[i]);
  return w;
}
PBM_INLINE Words load_words(const char* p) {
  Words w;
  std::memcpy(w.v, p, 64);
  return w;
}
PBM_INLINE IVec dot_words(IVec c, Words a, Words b) {
  for (int i = 0; i < 16; i++) c.v[i] += a.v[2 * i] * b.v[2 * i] + a.v[2 * i + 1] * b.v[2 * i + 1];
  return c;
}
#endif
#if PBM_TIER_LEVEL < 2
PBM_INLINE Words words_n(const char* p, int n) {
  char buffer[32] = {};
  if (n > 0) std::memcpy(buffer, p, n < 32 ? n : 32);
  return words(buffer);
}
#endif

template <>
struct KeyDot<DType::s8> {
  static constexpr DType kQuery = DType::s8;  // stands for 16-bit integers
  static constexpr int kChunk = 32;
  using Acc = IVec;
  using X = Words;
  PBM_INLINE Acc none() { return izero(); }
  PBM_INLINE X query(const char* q) { return load_words(q); }
  PBM_INLINE X key(const char* k) { return words(k); }
  PBM_INLINE X key_n(const char* k, int n) { return words_n(k, n); }
  PBM_INLINE Acc step(Acc c, X q, X k) { return dot_words(c, q, k); }
};

template <>
struct ValueDot<DType::s8> {
  static constexpr DType kWeight = DType::s8;
  static constexpr int kKeys = 2, kVecs = 2;
  using Acc = IVec;
  using X = Words;
  PBM_INLINE Acc acc(const float* p) { return iload(p); }
  PBM_INLINE void put(float* p, Acc a) { istore(p, a); }
  PBM_INLINE Acc step(Acc c, X w, X v) { return dot_words(c, w, v); }
  PBM_INLINE void values(const char* v0, const char* v1, X* x) { interleave(words(v0), words(v1), x); }
  PBM_INLINE void values_n(const char* v0, const char* v1, X* x, int n) {
    interleave(words_n(v0, n), words_n(v1, n), x);
  }
#if PBM_TIER_LEVEL >= 2
  PBM_INLINE X weight(const char* p, bool first_only) { return {_mm512_set1_epi32(weight_pair(p, first_only))}; }
  PBM_INLINE void interleave(Words a, Words b, X* x) {
    __m512i pairs[2];
    pairs_of(a.v, b.v, pairs);
    x[0].v = pairs[0];
    x[1].v = pairs[1];
  }
  PBM_INLINE void finish(const float* p, Vec scale, float* out) {
    IVec first, second;
    in_order(iload(p).v, iload(p + 16).v, &first.v, &second.v);
    store(out, mul(to_float(first), scale));
    store(out + 16, mul(to_float(second), scale));
  }
#elif PBM_TIER_LEVEL == 1
  PBM_INLINE X weight(const char* p, bool first_only) {
    const __m256i pair = _mm256_set1_epi32(weight_pair(p, first_only));
    return {pair, pair};
  }
  // Within 128-bit lanes: columns 0..3, 8..11 and 4..7, 12..15 of each sixteen.
  PBM_INLINE void interleave(Words a, Words b, X* x) {
    x[0] = {_mm256_unpacklo_epi16(a.lo, b.lo), _mm256_unpackhi_epi16(a.lo, b.lo)};
    x[1] = {_mm256_unpacklo_epi16(a.hi, b.hi), _mm256_unpackhi_epi16(a.hi, b.hi)};
  }
  PBM_INLINE void finish(const float* p, Vec scale, float* out) {
    for (int i = 0; i < 2; i++) {
      const IVec a = iload(p + 16 * i);
      const IVec ordered = {_mm256_permute2x128_si256(a.lo, a.hi, 0x20), _mm256_permute2x128_si256(a.lo, a.hi, 0x31)};
      store(out + 16 * i, mul(to_float(ordered), scale));
    }
  }
#else
  PBM_INLINE X weight(const char* p, bool first_only) {
    int16_t pair[2];
    std::memcpy(pair, p, 4);
    Words w;
    for (int i = 0; i < 32; i++) w.v[i] = i % 2 == 0 ? pair[0] : first_only ? int16_t{0} : pair[1];
    return w;
  }
  PBM_INLINE void interleave(const Words& a, const Words& b, X* x) {
    for (int i = 0; i < 32; i++) {
      x[i / 16].v[2 * (i % 16)] = a.v[i];
      x[i / 16].v[2 * (i % 16) + 1] = b.v[i];
    }
  }
  PBM_INLINE void finish(const float* p, Vec scale, float* out) {
    for (int i = 0; i < 2; i++) store(out + 16 * i, mul(to_float(iload(p + 16 * i)), scale));
  }
#endif
};

}  // namespace pbm::PBM_TIER

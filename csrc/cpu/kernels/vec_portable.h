// The lanes of vec.h, an array; only vec.h includes it.
#pragma once

namespace pbm::PBM_TIER {

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

}  // namespace pbm::PBM_TIER

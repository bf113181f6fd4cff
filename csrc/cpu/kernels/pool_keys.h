// 64 bytes of values as integers in the same order, so that the greater one is found by comparing integers of the
// values' own width: −∞ is the least of floats, and NaN, of either sign, comes after +∞, so that it stays.
#pragma once

#include "cpu/kernels/types.h"
#include "cpu/kernels/vec.h"

namespace pbm::PBM_TIER {

// Of lanes of 1 (unsigned), 2 and 4 bytes (signed): the sign in every bit, a difference that wraps, the greater.
#if PBM_TIER_LEVEL >= 2
template <int64_t Size>
PBM_INLINE IVec lane_signs(IVec a) {
  return {Size == 2 ? _mm512_srai_epi16(a.v, 15) : _mm512_srai_epi32(a.v, 31)};
}
template <int64_t Size>
PBM_INLINE IVec lane_sub(IVec a, IVec b) {
  return {Size == 2 ? _mm512_sub_epi16(a.v, b.v) : _mm512_sub_epi32(a.v, b.v)};
}
template <int64_t Size>
PBM_INLINE IVec lane_max(IVec a, IVec b) {
  if constexpr (Size == 1) return {_mm512_max_epu8(a.v, b.v)};
  return {Size == 2 ? _mm512_max_epi16(a.v, b.v) : _mm512_max_epi32(a.v, b.v)};
}
#elif PBM_TIER_LEVEL == 1
#define PBM_BOTH(f) {f(a.lo, b.lo), f(a.hi, b.hi)}
template <int64_t Size>
PBM_INLINE IVec lane_signs(IVec a) {
  if constexpr (Size == 2) return {_mm256_srai_epi16(a.lo, 15), _mm256_srai_epi16(a.hi, 15)};
  return {_mm256_srai_epi32(a.lo, 31), _mm256_srai_epi32(a.hi, 31)};
}
template <int64_t Size>
PBM_INLINE IVec lane_sub(IVec a, IVec b) {
  if constexpr (Size == 2) return PBM_BOTH(_mm256_sub_epi16);
  return PBM_BOTH(_mm256_sub_epi32);
}
template <int64_t Size>
PBM_INLINE IVec lane_max(IVec a, IVec b) {
  if constexpr (Size == 1) return PBM_BOTH(_mm256_max_epu8);
  if constexpr (Size == 2) return PBM_BOTH(_mm256_max_epi16);
  return PBM_BOTH(_mm256_max_epi32);
}
#undef PBM_BOTH
#else
template <class Int, class F>
PBM_INLINE IVec each_lane(IVec a, IVec b, F&& f) {
  Int x[64 / sizeof(Int)], y[64 / sizeof(Int)];
  std::memcpy(x, &a, 64);
  std::memcpy(y, &b, 64);
  for (size_t i = 0; i < 64 / sizeof(Int); i++) x[i] = static_cast<Int>(f(x[i], y[i]));
  std::memcpy(&a, x, 64);
  return a;
}
template <int64_t Size>
PBM_INLINE IVec lane_signs(IVec a) {
  const auto sign = [](int32_t x, int32_t) { return x < 0 ? -1 : 0; };
  if constexpr (Size == 2) return each_lane<int16_t>(a, a, sign);
  return each_lane<int32_t>(a, a, sign);
}
template <int64_t Size>
PBM_INLINE IVec lane_sub(IVec a, IVec b) {
  const auto sub = [](uint32_t x, uint32_t y) { return x - y; };
  if constexpr (Size == 2) return each_lane<uint16_t>(a, b, sub);
  return each_lane<uint32_t>(a, b, sub);
}
template <int64_t Size>
PBM_INLINE IVec lane_max(IVec a, IVec b) {
  const auto greater = [](int32_t x, int32_t y) { return x > y ? x : y; };
  if constexpr (Size == 1) return each_lane<uint8_t>(a, b, greater);
  if constexpr (Size == 2) return each_lane<int16_t>(a, b, greater);
  return each_lane<int32_t>(a, b, greater);
}
#endif

template <DType T>
struct Keys {
  static constexpr int64_t kSize = size_of(T);

  // The bits as sign and magnitude become two's complement; then the NaN below −∞ wrap around to above the others.
  PBM_INLINE IVec of(IVec bits) {
    if constexpr (T == DType::u8) return bits;
    return lane_sub<kSize>(folded(bits), nans());
  }
  PBM_INLINE IVec value(IVec key) {
    if constexpr (T == DType::u8) return key;
    return folded(lane_sub<kSize>(key, lane_sub<kSize>(izero(), nans())));
  }
  PBM_INLINE IVec greater(IVec a, IVec b) { return lane_max<kSize>(a, b); }
  // Of −∞, and of the code 0.
  PBM_INLINE IVec least() {
    if constexpr (T == DType::u8) return izero();
    return iset1(kSize == 2 ? static_cast<int32_t>(0x80008000u) : INT32_MIN);
  }

 private:
  PBM_INLINE IVec folded(IVec x) {
    return ixor(x, iand(lane_signs<kSize>(x), iset1(kSize == 2 ? 0x7fff7fff : 0x7fffffff)));
  }
  // How many NaN of a sign there are.
  PBM_INLINE IVec nans() { return iset1(T == DType::f32 ? 0x7fffff : T == DType::bf16 ? 0x007f007f : 0x03ff03ff); }
};

// 64 bytes, or the first of them; the rest is anything.
PBM_INLINE IVec load_bytes(const char* p, int64_t bytes) {
  if (bytes >= 64) return iload(p);
#if PBM_TIER_LEVEL >= 2
  return {_mm512_maskz_loadu_epi8((uint64_t{1} << bytes) - 1, p)};
#else
  alignas(64) char buffer[64] = {};
  std::memcpy(buffer, p, static_cast<size_t>(bytes));
  return iload(buffer);
#endif
}

PBM_INLINE void store_bytes(char* p, IVec a, int64_t bytes) {
  if (bytes >= 64) return istore(p, a);
#if PBM_TIER_LEVEL >= 2
  _mm512_mask_storeu_epi8(p, (uint64_t{1} << bytes) - 1, a.v);
#else
  alignas(64) char buffer[64];
  istore(buffer, a);
  std::memcpy(p, buffer, static_cast<size_t>(bytes));
#endif
}

}  // namespace pbm::PBM_TIER

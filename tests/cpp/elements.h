// Elements of every dtype from and to double, written without the kernels' conversions: half by the compiler's own
// _Float16, bfloat16 by integer rounding.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"
#include "common/isa.h"
#include "cpu/kernels/types.h"

namespace pbm::test {

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

// To nearest even; a NaN keeps its upper bits and becomes quiet.
inline uint16_t to_bf16(float x) {
  const uint32_t u = bits_of(x);
  if (std::isnan(x)) return static_cast<uint16_t>((u >> 16) | 0x40);
  const uint32_t rest = u & 0xffff, kept = u >> 16;
  return static_cast<uint16_t>(kept + (rest > 0x8000 || (rest == 0x8000 && (kept & 1))));
}

inline float from_bf16(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

inline uint16_t to_f16(float x) {
  const _Float16 h = static_cast<_Float16>(x);
  uint16_t u;
  std::memcpy(&u, &h, 2);
  return u;
}

inline float from_f16(uint16_t u) {
  _Float16 h;
  std::memcpy(&h, &u, 2);
  return static_cast<float>(h);
}

inline double get(DType t, const void* base, int64_t i) {
  switch (t) {
    case DType::f32: return static_cast<const float*>(base)[i];
    case DType::bf16: return from_bf16(static_cast<const uint16_t*>(base)[i]);
    case DType::f16: return from_f16(static_cast<const uint16_t*>(base)[i]);
    case DType::u8: return static_cast<const uint8_t*>(base)[i];
    case DType::s8: return static_cast<const int8_t*>(base)[i];
    case DType::s32: return static_cast<const int32_t*>(base)[i];
  }
  return 0;
}

inline void put(DType t, void* base, int64_t i, float x) {
  switch (t) {
    case DType::f32: static_cast<float*>(base)[i] = x; break;
    case DType::bf16: static_cast<uint16_t*>(base)[i] = to_bf16(x); break;
    case DType::f16: static_cast<uint16_t*>(base)[i] = to_f16(x); break;
    case DType::u8: static_cast<uint8_t*>(base)[i] = static_cast<uint8_t>(x); break;
    case DType::s8: static_cast<int8_t*>(base)[i] = static_cast<int8_t>(x); break;
    case DType::s32: static_cast<int32_t*>(base)[i] = static_cast<int32_t>(x); break;
  }
}

// Half a unit in the last place of x in dtype t.
inline double rounding(DType t, double x) {
  x = std::fabs(x);
  if (t == DType::f32) return x * 0x1p-24 + 0x1p-150;
  if (t == DType::bf16) return x * 0x1p-8 + 0x1p-126;
  return x * 0x1p-11 + 0x1p-25;
}

inline const char* name(DType t) {
  static const char* const names[] = {"f32", "bf16", "f16", "u8", "s8", "s32"};
  return names[static_cast<int>(t)];
}

inline const char* name(Flavour f) {
  static const char* const names[] = {"f32", "bf16", "u8s8"};
  return names[static_cast<int>(f)];
}

// `count` elements, random in [-1, 1) (s8: all values), in a block of exactly their size.
inline Exact random_elements(Rng& rng, DType t, int64_t count) {
  Exact block(count * size_of(t), rng.chance(2) ? size_of(t) : 0);
  for (int64_t i = 0; i < count; i++) {
    if (t == DType::s8 || t == DType::u8) {
      block.as<uint8_t>()[i] = static_cast<uint8_t>(rng.bits());
    } else {
      put(t, block.data(), i, rng.value());
    }
  }
  return block;
}

inline std::vector<Isa> tiers() {
  std::vector<Isa> all;
  for (int i = 0; i <= static_cast<int>(best_isa()); i++) all.push_back(static_cast<Isa>(i));
  return all;
}

}  // namespace pbm::test

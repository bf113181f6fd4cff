// Dynamic quantisation of one row, as arithmetic on its extremes; the contract of pybigmodel::quantize_per_token.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "cuda/kernels/host_device.h"

namespace pbm::cuda {

// low = min(0, min x), high = max(0, max x); a NaN makes high infinite, so that it is not lost in the reduction.
struct RowRange {
  float low = 0.0f;
  float high = 0.0f;

  PBM_HOST_DEVICE void include(float x) {
    low = fminf(low, x);  // a NaN leaves it
    high = fmaxf(high, x == x ? x : INFINITY);
  }
  PBM_HOST_DEVICE void merge(float other_low, float other_high) {
    low = fminf(low, other_low);
    high = fmaxf(high, other_high);
  }
};

// x ≈ scale·(q − zero_point). scale is NaN, and every q 0, if the row holds a NaN or an infinity: what is computed from
// such a row is NaN and not a plausible number.
struct RowQuantization {
  float scale;
  float inverse;  // 1 / scale; 0 if scale is NaN
  int32_t zero_point;
};

// The same fp32 operations in the same order as csrc/cpu/kernels/quantize.cpp, so that all devices agree to the bit. No
// product is followed by a sum: nothing that the compiler could contract.
template <bool kSymmetric>
PBM_HOST_DEVICE RowQuantization quantize_row(const RowRange& range) {
  if (!(range.high <= FLT_MAX && range.low >= -FLT_MAX)) return {NAN, 0.0f, 0};
  const float largest = fmaxf(range.high, -range.low);
  if (largest == 0.0f) return {1.0f, 1.0f, 0};
  // Divided before subtracting: high − low may exceed the largest float.
  const float quotient = kSymmetric ? largest / 127.0f : range.high / 255.0f - range.low / 255.0f;
  const float scale = fmaxf(quotient, FLT_MIN);  // 1 / scale must stay finite
  const float inverse = 1.0f / scale;
  const float zero_point = kSymmetric ? 0.0f : fminf(rintf(-range.low * inverse), 255.0f);
  return {scale, inverse, static_cast<int32_t>(zero_point)};
}

// The byte of q: int8 in [-127, 127] if symmetric, else uint8.
template <bool kSymmetric>
PBM_HOST_DEVICE uint8_t quantize_value(float x, const RowQuantization& row) {
  if (row.scale != row.scale) return 0;
  const int32_t q = static_cast<int32_t>(rintf(x * row.inverse)) + row.zero_point;  // |x·inverse| < 256
  const int32_t low = kSymmetric ? -127 : 0;
  const int32_t high = kSymmetric ? 127 : 255;
  return static_cast<uint8_t>(q < low ? low : q > high ? high : q);
}

}  // namespace pbm::cuda

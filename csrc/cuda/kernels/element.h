// The floating-point element types of kernel inputs and outputs, with conversions that round to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/kernels/host_device.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace pbm::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// kCount elements moved by one instruction of at most 16 bytes.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Packet {
  T values[kCount];
};

PBM_HOST_DEVICE float to_float(float value) { return value; }

PBM_HOST_DEVICE float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  memcpy(&result, &bits, sizeof(result));
  return result;
}

PBM_HOST_DEVICE float to_float(Float16 value) {
#if defined(__CUDACC__)
  return __half2float(__half(__half_raw{value.bits}));
#else
  _Float16 half;
  memcpy(&half, &value.bits, sizeof(half));
  return static_cast<float>(half);
#endif
}

template <typename T>
PBM_HOST_DEVICE T from_float(float value);

template <>
PBM_HOST_DEVICE float from_float<float>(float value) {
  return value;
}

template <>
PBM_HOST_DEVICE BFloat16 from_float<BFloat16>(float value) {
#if defined(__CUDACC__)
  return {static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(value)).x};
#else
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  if (value != value) return {0x7fff};  // cvt.rn.bf16.f32's NaN
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
#endif
}

template <>
PBM_HOST_DEVICE Float16 from_float<Float16>(float value) {
#if defined(__CUDACC__)
  return {static_cast<__half_raw>(__float2half_rn(value)).x};
#else
  const auto half = static_cast<_Float16>(value);
  Float16 result;
  memcpy(&result.bits, &half, sizeof(result.bits));
  return result;
#endif
}

}  // namespace pbm::cuda

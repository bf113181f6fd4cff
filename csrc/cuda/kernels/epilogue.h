// From an exact int32 sum to an output value: y = act((Σ q·w − zero_point·Σ w)·w_scale·x_scale + bias) + residual, in fp32.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/types.h"
#include "cuda/kernels/host_device.h"

namespace pbm::cuda {

PBM_HOST_DEVICE float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::none: return x;
    case Activation::relu: return x < 0.0f ? 0.0f : x;  // this way round a NaN stays
    case Activation::gelu_erf: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case Activation::gelu_tanh: return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case Activation::silu: return x / (1.0f + expf(-x));
    case Activation::relu6:
    case Activation::hardswish:
    case Activation::leaky_relu: break;  // convolutions alone have these; check_activation refuses them
  }
  return x;
}

// Exact: with K ≤ kMaxInt8K both terms and their difference fit in int32.
PBM_HOST_DEVICE int32_t remove_zero_point(int32_t sum, int32_t zero_point, int32_t column_sum) {
  return sum - zero_point * column_sum;
}

// One by one and w_scale first, as in csrc/cpu/kernels/epilogue.cpp: w_scale·x_scale may be subnormal and sum·x_scale
// infinite where y is neither.
PBM_HOST_DEVICE float dequantize(int32_t sum, float x_scale, float w_scale) {
  return static_cast<float>(sum) * w_scale * x_scale;
}

}  // namespace pbm::cuda

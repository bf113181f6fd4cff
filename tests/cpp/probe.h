// The inline functions of vec.h, convert.h and vecmath.h over arrays, compiled once per tier.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "cpu/kernels/types.h"

namespace pbm::test {

struct Probe {
  // n is a multiple of 16.
  void (*exp)(const float* x, float* y, int64_t n);
  void (*exp2)(const float* x, float* y, int64_t n);
  void (*exp2_bf16)(const float* x, float* y, int64_t n);
  void (*log2)(const float* x, float* y, int64_t n);
  void (*tanh)(const float* x, float* y, int64_t n);
  void (*tanh_sech2)(const float* x, float* tanh, float* sech2, int64_t n);
  void (*quotient)(const float* x, const float* y, float* reciprocal, float* sum, int64_t n);  // 1/y, 1 + x/y
  void (*normal_tail)(const float* x, float* y, int64_t n);
  void (*activate)(Activation, const float* x, float* y, int64_t n);
  // Any count; nothing is read or written beyond it.
  void (*convert)(DType from, DType to, const void* x, void* y, int64_t count);
  void (*store_bf16)(const float* x, uint16_t* y, int64_t n);
  void (*transpose)(const int32_t* x, int32_t* y);  // 16×16
};

const Probe& probe_of(Isa isa);

}  // namespace pbm::test

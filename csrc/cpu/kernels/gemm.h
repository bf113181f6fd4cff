// A whole product C = act(A·B·scale + bias) + residual around brgemm: cache blocking, preparing A, packing B, epilogue.
// Knows pointers, sizes and strides; threads are the caller's (csrc/cpu/run_gemm.h), one call a thread and block.
#pragma once

#include <cstdint>

#include "cpu/kernels/types.h"

namespace pbm {

// What is done to the rows of A before the product.
enum class APrepare : int {
  none,        // A's rows are read where they lie: contiguous, in the flavour's own dtype
  convert,     // copied into the flavour's dtype (fp32 or bf16); any dtype, any strides
  symmetric,   // quantised per row to s8, stored as u8 with zero point 128
  asymmetric,  // quantised per row to u8 with its own zero point
  digits,      // per row fixed point of 24 bits, as three u8 rows (base 256, the highest biased by 128)
};

struct Gemm {
  int64_t m, n, k;
  Flavour flavour;

  // A(i, p) = a[i·a_row + p·a_col]; strides in elements.
  const void* a;
  DType a_dtype;
  int64_t a_row, a_col;
  APrepare prepare;

  // B: packed panels, or a matrix B(p, j) = b[p·b_row + j·b_col] that each block packs for itself.
  const void* b;
  bool b_packed;
  DType b_dtype;
  int64_t b_row, b_col;

  // C(i, j) = c[i·c_row + j]
  void* c;
  DType c_dtype;
  int64_t c_row;
  // With C in u8: q = round(c·c_inverse_scale) + c_zero_point, saturated to [0, 255]; NaN becomes 0.
  float c_inverse_scale;
  int32_t c_zero_point;

  // Epilogue, applied in this order; null pointers are skipped.
  const float* col_scale;  // n, with u8s8 only (there it is required)
  const void* bias;        // n
  DType bias_dtype;
  Activation activation;
  float slope;           // of leaky_relu
  bool residual_first;   // the residual is added before the activation
  const void* residual;  // like C, with its dtype, or fp32 where C is u8
  int64_t residual_row;
  // u8s8: the residual is u8 and stands for (r − residual_zero)·residual_scale, where the scale is not 0.
  float residual_scale;
  int32_t residual_zero;
};

// How a product is cut over threads: rows into m parts, panels of columns into n parts.
struct Grid {
  int64_t m, n;
};
Grid partition(const Gemm& g, int64_t threads);

// The i-th of `parts` ranges over `total`, cut at multiples of `unit`.
struct Range {
  int64_t begin, end;
};
Range part(int64_t total, int64_t unit, int64_t parts, int64_t i);

// Bytes of B (k×n) packed, and the packing itself. With column_sums (u8s8) each panel ends in a group of int32 sums.
struct PackB {
  int64_t n, k;
  Flavour flavour;
  const void* b;
  DType b_dtype;
  int64_t b_row, b_col;
  bool column_sums;
  void* out;
};

}  // namespace pbm

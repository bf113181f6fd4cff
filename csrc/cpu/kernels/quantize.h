// Rows of activations to integers.
#pragma once

#include <cstdint>

#include "cpu/kernels/types.h"

namespace pbm {

enum class QuantKind : int {
  symmetric_s8,  // q in [-127, 127]
  symmetric_u8,  // the same plus 128: what u8·s8 products eat
  asymmetric,    // q in [0, 255] with a zero point
  digits,        // three rows of u8 for one row of input
};

struct QuantizeRows {
  int64_t k;
  QuantKind kind;
  const void* x;  // x[i·row + p]
  DType dtype;
  int64_t row;
  void* q;        // row i at q + i·q_row (digits: rows 3i, 3i+1, 3i+2)
  int64_t q_row;  // bytes; the bytes from k up to q_padded are zeroed
  int64_t q_padded;
  float* scale;         // per input row
  int32_t* zero_point;  // per input row; may be null for symmetric_s8
};

struct ColumnSum {
  int64_t rows, columns;
  const void* x;
  DType dtype;
  int64_t row;  // elements; columns are contiguous
  void* out;
  DType out_dtype;
};

}  // namespace pbm

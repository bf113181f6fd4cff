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

// Of values in [low, high], which hold 0: scale and zero point of u8.
struct ByteScale {
  float scale;
  int32_t zero_point;
};

inline ByteScale byte_scale(float low, float high) {
  // Divided before subtracting: high - low may exceed the largest float.
  float scale = high / 255.f - low / 255.f;
  if (scale < 0x1p-126f) scale = high == low ? 1.f : 0x1p-126f;  // 1/scale must stay finite
  const int32_t zero = static_cast<int32_t>(__builtin_nearbyintf(-low * (1.f / scale)));
  return {scale, zero > 255 ? 255 : zero};
}

// The least and the largest value of x[begin, end) and 0; low is NaN where one of them is not finite.
struct ValueRange {
  float low, high;
};

// An image to u8, for products: q = clamp(round(x·inverse_scale) + zero_point, 0, 255), NaN to 0. A pixel of out is the
// lanes of one group after another, filled up with anything; rows of w have pixels of zero points before and after.
struct QuantizeImage {
  int64_t batch, groups, c, size[3];  // channels of a group
  const void* x;
  DType x_dtype;  // u8 is taken as it is
  int64_t x_batch, x_channel, x_stride[3];
  float inverse_scale;
  int32_t zero_point;
  char* out;
  int64_t before, after;
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

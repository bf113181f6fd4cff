// The greatest value, or the average, of each channel over windows of an image.
#pragma once

#include <cstdint>

#include "cpu/kernels/types.h"

namespace pbm {

// What a window has along one axis: `count` pixels of the image from `begin` on, a step apart.
struct PoolSpan {
  int64_t begin, count;
  int64_t divisor;  // by how many of this axis an average is divided
};

struct Pool {
  bool average;
  DType dtype;  // of x and out; u8 has no averages
  int64_t channels, out_size[2], step[2];
  const PoolSpan *rows, *columns;  // one for each row and each column of outputs
  bool shared;                     // whether a pixel is in several windows along w
  float divisor;                   // of all averages; 0: the spans say
  const void* x;                   // x[n·x_batch + h·x_row + w·x_pixel + c]
  int64_t x_batch, x_row, x_pixel;
  void* out;  // the same, without gaps
};

}  // namespace pbm

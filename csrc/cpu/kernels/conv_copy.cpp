// Images between layouts and dtypes.
#include "cpu/kernels/convert.h"
#include "cpu/kernels/impl.h"

namespace pbm::PBM_TIER {
namespace {

// A matrix to another: out(i, j) at i·out_row + j, from rows of x or from its columns.
struct Matrix {
  const void* x;
  int64_t x_row;  // from one i to the next where j is contiguous, from one j to the next where i is
  void* out;
  int64_t out_row;
  int64_t rows, columns;
};

template <DType X, DType Out>
void copy_rows(const Matrix& m) {
  for (int64_t i = 0; i < m.rows; i++)
    for (int64_t j = 0; j < m.columns; j += kWidth) {
      const int n = static_cast<int>(min64(kWidth, m.columns - j));
      store16_n<Out>(m.out, i * m.out_row + j, load16_n<X>(m.x, i * m.x_row + j, n), n);
    }
}

template <DType X, DType Out>
void transpose(const Matrix& m) {
  for (int64_t i = 0; i < m.rows; i += kWidth) {
    const int rows = static_cast<int>(min64(kWidth, m.rows - i));
    for (int64_t j = 0; j < m.columns; j += kWidth) {
      const int columns = static_cast<int>(min64(kWidth, m.columns - j));
      IVec r[kWidth];
      if (rows == kWidth && columns == kWidth) {
  PBM_UNROLL for (int q = 0; q < kWidth; q++) r[q] = as_int(load16<X>(m.x, (j + q) * m.x_row + i));
        transpose16(r);
        PBM_UNROLL for (int q = 0; q < kWidth; q++) store16<Out>(m.out, (i + q) * m.out_row + j, as_float(r[q]));
      } else {
        for (int q = 0; q < kWidth; q++)
          r[q] = q < columns ? as_int(load16_n<X>(m.x, (j + q) * m.x_row + i, rows)) : izero();
        transpose16(r);
        for (int q = 0; q < rows; q++) store16_n<Out>(m.out, (i + q) * m.out_row + j, as_float(r[q]), columns);
      }
    }
  }
}

// Bytes, whichever way; layouts that no model of ours comes with.
void copy_bytes(const Matrix& m, bool turned) {
  const int64_t i_step = turned ? 1 : m.x_row, j_step = turned ? m.x_row : 1;
  for (int64_t i = 0; i < m.rows; i++)
    for (int64_t j = 0; j < m.columns; j++)
      static_cast<uint8_t*>(m.out)[i * m.out_row + j] = static_cast<const uint8_t*>(m.x)[i * i_step + j * j_step];
}

using CopyFn = void (*)(const Matrix&);

#define PBM_TO(f, X) {f<X, DType::f32>, f<X, DType::bf16>, f<X, DType::f16>}
#define PBM_FROM(f) {PBM_TO(f, DType::f32), PBM_TO(f, DType::bf16), PBM_TO(f, DType::f16)}

}  // namespace

// Rows (batch, d, h) [begin, end).
void conv_copy(const ConvCopy& p, int64_t begin, int64_t end) {
  static const CopyFn copies[2][3][3] = {PBM_FROM(copy_rows), PBM_FROM(transpose)};
  const int64_t x_size = size_of(p.x_dtype), out_size = size_of(p.out_dtype);
  // Rows of the matrix are pixels where the output's channels are contiguous, else channels.
  const bool pixels = p.out_channel == 1;
  const bool turned = pixels ? p.x_channel != 1 : p.x_stride[2] != 1;
  Matrix m;
  m.rows = pixels ? p.size[2] : p.channels;
  m.columns = pixels ? p.channels : p.size[2];
  m.out_row = pixels ? p.out_stride[2] : p.out_channel;
  m.x_row = pixels == turned ? p.x_channel : p.x_stride[2];
  if (pixels && !turned && p.x_stride[2] == p.channels && p.out_stride[2] == p.channels) {
    m.columns *= m.rows;  // pixels touch: a row of them is one run
    m.rows = 1;
  }
  const bool bytes = p.x_dtype == DType::u8;
  const CopyFn copy = bytes ? nullptr : copies[turned][static_cast<int>(p.x_dtype)][static_cast<int>(p.out_dtype)];
  for (int64_t row = begin; row < end; row++) {
    const int64_t h = row % p.size[1], d = row / p.size[1] % p.size[0], n = row / (p.size[1] * p.size[0]);
    m.x = static_cast<const char*>(p.x) + (n * p.x_batch + d * p.x_stride[0] + h * p.x_stride[1]) * x_size;
    char* out = static_cast<char*>(p.out) + (n * p.out_batch + d * p.out_stride[0] + h * p.out_stride[1]) * out_size;
    m.out = out;
    bytes ? copy_bytes(m, turned) : copy(m);
    const int64_t pixel = p.out_stride[2] * out_size;
    if (p.zeros_before) std::memset(out - p.zeros_before * pixel, 0, p.zeros_before * pixel);
    if (p.zeros_after) std::memset(out + p.size[2] * pixel, 0, p.zeros_after * pixel);
  }
}

}  // namespace pbm::PBM_TIER

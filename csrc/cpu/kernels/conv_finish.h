// What is done to a tile of accumulators of a convolution while it is in registers: the common epilogues, those that
// cut off; the others go through memory (epilogue.cpp).
#pragma once

#include "cpu/kernels/convert.h"
#include "cpu/kernels/impl.h"

namespace pbm::PBM_TIER {

enum class Operand : int { none, f32, bf16, u8 };
constexpr int64_t bytes_of(Operand t) {
  return t == Operand::f32 ? 4 : t == Operand::bf16 ? 2 : t == Operand::u8 ? 1 : 0;
}

// What is the same for all tiles of a call.
struct Finish {
  Operand out_type, residual_type;
  int64_t out_row, residual_row;  // elements
  float low, high;                // what the activation cuts off
  // u8s8: y = (acc − x_zero·sum)·col_scale·x_scale, and all of it times out_inverse, which is 1 for floats.
  float x_scale, residual_scale, out_inverse;
  int32_t x_zero, residual_zero, out_zero;
  int64_t sums_panel;
  bool streams;  // the output goes past the caches
};

// Where a tile's first value is.
struct FinishAt {
  char* out;
  const char* residual;
  const float *bias, *col_scale;
  const int32_t* sums;
  int64_t columns;  // that exist, from here on

  void move(const Finish& f, int64_t rows, int64_t cols, int64_t panels) {
    out += (rows * f.out_row + cols) * bytes_of(f.out_type);
    residual += (rows * f.residual_row + cols) * bytes_of(f.residual_type);
    if (bias) bias += cols;
    if (col_scale) col_scale += cols;
    sums += panels * f.sums_panel;
    columns -= cols;
  }
};

// The last panel of a tile may have fewer columns than lanes; the others have not.
template <int NV>
PBM_INLINE int lanes_of(const FinishAt& at, int j) {
  const int64_t left = at.columns - (NV - 1) * kWidth;
  return j < NV - 1 || left >= kWidth ? kWidth : static_cast<int>(left);
}

PBM_INLINE Vec load_some(const float* p, int n) { return n == kWidth ? load(p) : load_n(p, n); }

PBM_INLINE Vec with_residual(const Finish& f, Vec y, const char* at, int64_t i, int n) {
  if (f.residual_type == Operand::none) return y;
  if (f.residual_type == Operand::bf16) return add(y, load16_n<DType::bf16>(at, i, n));
  return add(y, load_some(reinterpret_cast<const float*>(at) + i, n));
}

PBM_INLINE Vec finished(const Finish& f, const FinishAt& at, Vec sum, Vec bias, int64_t row, int64_t col, int n) {
  const Vec y = with_residual(f, add(sum, bias), at.residual, row * f.residual_row + col, n);
  return vmin(set1(f.high), vmax(set1(f.low), y));  // NaN stays: the second operand
}

// Whole panels of bf16 by twos, which are as long as a cache line.
template <int MR, int NV>
PBM_INLINE void finish_pairs(const Finish& f, const FinishAt& at, Vec (&acc)[MR][NV], const float* before,
                             int64_t ldc) {
  uint16_t* out = reinterpret_cast<uint16_t*>(at.out);
  const bool past_caches = f.streams && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  PBM_UNROLL for (int j = 0; j + 1 < NV; j += 2) {
    const int64_t col = j * kWidth;
    const Vec bias0 = at.bias ? load(at.bias + col) : zero(), bias1 = at.bias ? load(at.bias + col + kWidth) : zero();
    PBM_UNROLL for (int i = 0; i < MR; i++) {
      const int64_t at_sum = i * ldc + col;
      const Vec sum0 = before ? add(load(before + at_sum), acc[i][j]) : acc[i][j];
      const Vec sum1 = before ? add(load(before + at_sum + kWidth), acc[i][j + 1]) : acc[i][j + 1];
      store_bf16_pair(out + i * f.out_row + col, finished(f, at, sum0, bias0, i, col, kWidth),
                      finished(f, at, sum1, bias1, i, col + kWidth, kWidth), past_caches);
    }
  }
}

// c: what was summed before, or null.
template <int MR, int NV>
PBM_INLINE void finish_tile(const Finish& f, const FinishAt& at, Vec (&acc)[MR][NV], const void* c, int64_t ldc) {
  const float* before = static_cast<const float*>(c);
  if constexpr (NV % 2 == 0)
    if (f.out_type == Operand::bf16 && at.columns >= NV * kWidth) return finish_pairs(f, at, acc, before, ldc);
  PBM_UNROLL for (int j = 0; j < NV; j++) {
    const int n = lanes_of<NV>(at, j);
    const Vec bias = at.bias ? load_some(at.bias + j * kWidth, n) : zero();
    PBM_UNROLL for (int i = 0; i < MR; i++) {
      const Vec sum = before ? add(load(before + i * ldc + j * kWidth), acc[i][j]) : acc[i][j];
      const Vec y = finished(f, at, sum, bias, i, j * kWidth, n);
      const int64_t out = i * f.out_row + j * kWidth;
      if (f.out_type == Operand::bf16)
        store16_n<DType::bf16>(at.out, out, y, n);
      else if (f.streams)
        stream(reinterpret_cast<float*>(at.out) + out, y);
      else
        store16_n<DType::f32>(at.out, out, y, n);
    }
  }
}

// Panel j of a tile of integers, as y in units of the output.
template <int MR, int NV>
PBM_INLINE void scale_panel(const Finish& f, const FinishAt& at, const IVec (&acc)[MR][NV], int j,
                            const int32_t* before, int64_t ldc, Vec (&y)[MR]) {
  const int n = lanes_of<NV>(at, j);
  const IVec hidden = imul(iload(at.sums + j * f.sums_panel), iset1(f.x_zero));
  const Vec scale = mul(load_some(at.col_scale + j * kWidth, n), set1(f.x_scale));
  const Vec bias = at.bias ? mul(load_some(at.bias + j * kWidth, n), set1(f.out_inverse)) : zero();
  PBM_UNROLL for (int i = 0; i < MR; i++) {
    const IVec sum = before ? iadd(iload(before + i * ldc + j * kWidth), acc[i][j]) : acc[i][j];
    y[i] = fmadd(to_float(isub(sum, hidden)), scale, bias);
  }
}

PBM_INLINE Vec with_scaled_residual(const Finish& f, Vec y, const char* at, int64_t i, int n) {
  if (f.residual_type == Operand::f32)
    return fmadd(load_some(reinterpret_cast<const float*>(at) + i, n), set1(f.out_inverse), y);
  const uint8_t* from = reinterpret_cast<const uint8_t*>(at) + i;
  alignas(16) uint8_t some[16] = {};
  if (n < kWidth) from = static_cast<const uint8_t*>(std::memcpy(some, from, static_cast<size_t>(n)));
  return fmadd(to_float(isub(widen_u8(from), iset1(f.residual_zero))), set1(f.residual_scale), y);
}

// NaN becomes the least byte that the activation leaves: the first operand.
PBM_INLINE IVec byte_of(const Finish& f, Vec y) {
  return iadd(to_int(vmin(vmax(y, set1(f.low)), set1(f.high))), iset1(f.out_zero));
}

template <int NV>
PBM_INLINE void store_bytes(const IVec (&bytes)[NV], uint8_t* out, int last) {
  if constexpr (NV == 4) {
    if (last == kWidth) return saturate_bytes<false>(out, bytes);
  }
  PBM_UNROLL for (int j = 0; j < NV; j++) {
    if (j < NV - 1 || last == kWidth) {
      narrow_u8(out + j * kWidth, bytes[j]);
    } else {
      uint8_t some[16];
      narrow_u8(some, bytes[j]);
      std::memcpy(out + j * kWidth, some, static_cast<size_t>(last));
    }
  }
}

template <int MR, int NV>
PBM_INLINE void finish_tile(const Finish& f, const FinishAt& at, IVec (&acc)[MR][NV], const void* c, int64_t ldc) {
  Vec y[NV][MR];
  PBM_UNROLL for (int j = 0; j < NV; j++) scale_panel<MR, NV>(f, at, acc, j, static_cast<const int32_t*>(c), ldc, y[j]);
  if (f.residual_type != Operand::none)
    PBM_UNROLL for (int i = 0; i < MR; i++) PBM_UNROLL for (int j = 0; j < NV; j++)
      y[j][i] = with_scaled_residual(f, y[j][i], at.residual, i * f.residual_row + j * kWidth, lanes_of<NV>(at, j));
  PBM_UNROLL for (int i = 0; i < MR; i++) {
    if (f.out_type == Operand::u8) {
      IVec bytes[NV];
      PBM_UNROLL for (int j = 0; j < NV; j++) bytes[j] = byte_of(f, y[j][i]);
      store_bytes<NV>(bytes, reinterpret_cast<uint8_t*>(at.out) + i * f.out_row, lanes_of<NV>(at, NV - 1));
    } else {
      PBM_UNROLL for (int j = 0; j < NV; j++)
        store16_n<DType::f32>(at.out, i * f.out_row + j * kWidth, vmin(set1(f.high), vmax(set1(f.low), y[j][i])),
                              lanes_of<NV>(at, j));
    }
  }
}

// The bounds of an activation that only cuts off, and whether it does.
inline bool clamps(Activation a, float* low, float* high) {
  constexpr float kInfinity = __builtin_inff();
  *low = a == Activation::none ? -kInfinity : 0.f;
  *high = a == Activation::relu6 ? 6.f : kInfinity;
  return a == Activation::none || a == Activation::relu || a == Activation::relu6;
}

inline Operand operand_of(DType t) {
  return t == DType::f32 ? Operand::f32 : t == DType::bf16 ? Operand::bf16 : t == DType::u8 ? Operand::u8 : Operand::none;
}

// Whether an output is more than caches keep, and whole cache lines: it is not read before it is written then.
inline bool streams(const Gemm& g, const Conv& conv) {
  constexpr int64_t kBytes = int64_t{16} << 20;
  const int64_t pixels = conv.batch * conv.out[0] * conv.out[1] * conv.out[2];
  const int64_t size = size_of(g.c_dtype), line = 64 / size;
  return g.flavour != Flavour::u8s8 && (g.c_dtype == DType::f32 || g.c_dtype == DType::bf16) &&
         pixels * g.c_row * size >= kBytes && g.n % line == 0 && g.c_row % line == 0 &&
         reinterpret_cast<uintptr_t>(g.c) % 64 == 0;
}

// The epilogue of a group, if it is of the kind that is done here, and where its first value is.
inline bool finish_of(const Gemm& g, const Conv& conv, Finish* f, FinishAt* at) {
  if (!clamps(g.activation, &f->low, &f->high) || (g.bias && g.bias_dtype != DType::f32) ||
      (g.residual && !g.residual_first))
    return false;
  const bool integers = g.flavour == Flavour::u8s8, bytes = g.c_dtype == DType::u8;
  f->out_type = operand_of(g.c_dtype);
  if (f->out_type == Operand::none || f->out_type == (integers ? Operand::bf16 : Operand::u8)) return false;
  f->out_row = g.c_row;
  f->streams = streams(g, conv);
  f->residual_row = g.residual_row;
  f->residual_type = bytes ? Operand::f32 : f->out_type;
  if (integers && g.residual_scale != 0) f->residual_type = Operand::u8;
  if (!g.residual) f->residual_type = Operand::none;
  f->out_inverse = bytes ? g.c_inverse_scale : 1.f;
  *at = {static_cast<char*>(g.c), static_cast<const char*>(g.residual), static_cast<const float*>(g.bias), nullptr,
         nullptr, g.n};
  if (!integers) return true;
  f->x_scale = conv.x_scale * f->out_inverse;
  f->residual_scale = g.residual_scale * f->out_inverse;
  // Their product with a column's scale must not leave the normal numbers.
  const auto usual = [](float scale) { return scale > 0x1p-40f && scale < 0x1p40f; };
  if (!usual(f->x_scale) || !usual(f->out_inverse) || (g.residual_scale != 0 && !usual(f->residual_scale)))
    return false;
  at->col_scale = g.col_scale;
  f->x_zero = conv.x_zero;
  f->residual_zero = g.residual_zero;
  f->out_zero = g.c_zero_point;
  if (bytes) {
    const float zero = static_cast<float>(g.c_zero_point);
    f->low = f->low * f->out_inverse > -zero ? f->low * f->out_inverse : -zero;
    f->high = f->high * f->out_inverse < 255.f - zero ? f->high * f->out_inverse : 255.f - zero;
  }
  return true;
}

}  // namespace pbm::PBM_TIER

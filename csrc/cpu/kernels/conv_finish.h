// What is done to a tile of accumulators of a convolution while it is in registers: the common epilogues, those that
// cut off; the others go through memory (epilogue.cpp).
#pragma once

#include "cpu/kernels/convert.h"
#include "cpu/kernels/impl.h"

namespace pbm::PBM_TIER {

enum class Operand : int { none, f32, bf16, u8 };

struct Finish {
  void* out;  // the tile's first value; f32, bf16, u8
  Operand out_type;
  int64_t out_row;  // elements
  const float* bias;
  const void* residual;
  Operand residual_type;
  int64_t residual_row;
  float low, high;  // what the activation cuts off
  // u8s8: y = (acc − x_zero·sum)·col_scale·x_scale, and all of it times out_inverse, which is 1 for floats.
  const float* col_scale;
  const int32_t* sums;
  int64_t sums_panel;
  float x_scale, residual_scale, out_inverse;
  int32_t x_zero, residual_zero, out_zero;
};

PBM_INLINE Vec with_residual(const Finish& f, Vec y, int64_t at) {
  if (f.residual_type == Operand::none) return y;
  if (f.residual_type == Operand::bf16) return add(y, load16<DType::bf16>(f.residual, at));
  return add(y, load(static_cast<const float*>(f.residual) + at));
}

PBM_INLINE void finish_value(const Finish& f, Vec y, int64_t row, int64_t column) {
  y = with_residual(f, y, row * f.residual_row + column);
  y = vmin(set1(f.high), vmax(set1(f.low), y));  // NaN stays: the second operand
  const int64_t at = row * f.out_row + column;
  f.out_type == Operand::bf16 ? store16<DType::bf16>(f.out, at, y) : store16<DType::f32>(f.out, at, y);
}

PBM_INLINE Vec with_residual(const Finish& f, Vec y, Vec inverse, int64_t at) {
  if (f.residual_type == Operand::none) return y;
  if (f.residual_type == Operand::f32) return fmadd(load(static_cast<const float*>(f.residual) + at), inverse, y);
  const IVec r = isub(widen_u8(static_cast<const uint8_t*>(f.residual) + at), iset1(f.residual_zero));
  return fmadd(to_float(r), set1(f.residual_scale), y);
}

// y, its bounds and its residual's scale are in units of the output.
PBM_INLINE void finish_integer(const Finish& f, Vec y, int64_t row, int64_t column) {
  y = with_residual(f, y, set1(f.out_inverse), row * f.residual_row + column);
  const int64_t at = row * f.out_row + column;
  if (f.out_type == Operand::u8) {  // here NaN becomes the least byte: the first operand
    y = vmin(vmax(y, set1(f.low)), set1(f.high));
    narrow_u8(static_cast<uint8_t*>(f.out) + at, iadd(to_int(y), iset1(f.out_zero)));
  } else {
    store(static_cast<float*>(f.out) + at, vmin(set1(f.high), vmax(set1(f.low), y)));
  }
}

// c: what was summed before, or null.
template <int MR, int NV>
PBM_INLINE void finish_tile(const Finish& f, Vec (&acc)[MR][NV], const void* c, int64_t ldc) {
  const float* before = static_cast<const float*>(c);
  PBM_UNROLL for (int j = 0; j < NV; j++) {
    const Vec bias = f.bias ? load(f.bias + j * kWidth) : zero();
    PBM_UNROLL for (int i = 0; i < MR; i++) {
      const Vec sum = before ? add(load(before + i * ldc + j * kWidth), acc[i][j]) : acc[i][j];
      finish_value(f, add(sum, bias), i, j * kWidth);
    }
  }
}

template <int MR, int NV>
PBM_INLINE void finish_tile(const Finish& f, IVec (&acc)[MR][NV], const void* c, int64_t ldc) {
  const int32_t* before = static_cast<const int32_t*>(c);
  PBM_UNROLL for (int j = 0; j < NV; j++) {
    const IVec hidden = imul(iload(f.sums + j * f.sums_panel), iset1(f.x_zero));
    const Vec scale = mul(load(f.col_scale + j * kWidth), set1(f.x_scale));
    const Vec bias = f.bias ? mul(load(f.bias + j * kWidth), set1(f.out_inverse)) : zero();
    PBM_UNROLL for (int i = 0; i < MR; i++) {
      const IVec sum = before ? iadd(iload(before + i * ldc + j * kWidth), acc[i][j]) : acc[i][j];
      finish_integer(f, fmadd(to_float(isub(sum, hidden)), scale, bias), i, j * kWidth);
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

// The epilogue of a group from its first row and column on, if it is of the kind that is done here.
inline bool finish_of(const Gemm& g, const Conv& conv, Finish* f) {
  if (!clamps(g.activation, &f->low, &f->high) || (g.bias && g.bias_dtype != DType::f32) ||
      (g.residual && !g.residual_first))
    return false;
  const bool integers = g.flavour == Flavour::u8s8, bytes = g.c_dtype == DType::u8;
  f->out_type = operand_of(g.c_dtype);
  if (f->out_type == Operand::none || (integers && f->out_type == Operand::bf16)) return false;
  f->out = g.c;
  f->out_row = g.c_row;
  f->bias = static_cast<const float*>(g.bias);
  f->residual = g.residual;
  f->residual_row = g.residual_row;
  f->residual_type = bytes ? Operand::f32 : f->out_type;
  if (integers && g.residual_scale != 0) f->residual_type = Operand::u8;
  if (!g.residual) f->residual_type = Operand::none;
  f->out_inverse = bytes ? g.c_inverse_scale : 1.f;
  if (!integers) return true;
  f->x_scale = conv.x_scale * f->out_inverse;
  f->residual_scale = g.residual_scale * f->out_inverse;
  const auto usual = [](float scale) { return scale > 0x1p-80f && scale < 0x1p80f; };
  if (!usual(f->x_scale) || !usual(f->out_inverse) || (g.residual_scale != 0 && !usual(f->residual_scale)))
    return false;
  f->col_scale = g.col_scale;
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

// The same from another row and column on; `first` is what finish_of gave.
inline void move_finish(const Finish& first, int64_t row, int64_t col, Finish* f) {
  const auto size = [](Operand t) { return t == Operand::f32 ? 4 : t == Operand::bf16 ? 2 : 1; };
  f->out = static_cast<char*>(first.out) + (row * first.out_row + col) * size(first.out_type);
  if (first.bias) f->bias = first.bias + col;
  if (first.residual)
    f->residual = static_cast<const char*>(first.residual) +
                  (row * first.residual_row + col) * size(first.residual_type);
  if (first.col_scale) f->col_scale = first.col_scale + col;
}

}  // namespace pbm::PBM_TIER

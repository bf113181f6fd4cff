// What is done to the accumulators of products and convolutions: random choices of it with exact-size operands, and what
// comes out in double.
#pragma once

#include <cmath>

#include "cpu/kernels/gemm.h"
#include "elements.h"

namespace pbm::test {

inline double activation(Activation a, double x, double slope) {
  if (std::isnan(x)) return x;
  switch (a) {
    case Activation::none: return x;
    case Activation::relu: return x > 0 ? x : 0;
    case Activation::gelu_erf: return 0.5 * x * std::erfc(-x * std::sqrt(0.5));
    case Activation::gelu_tanh: return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::silu: return x / (1 + std::exp(-x));
    case Activation::relu6: return std::fmin(std::fmax(x, 0), 6);
    case Activation::hardswish: return x * std::fmin(std::fmax(x + 3, 0), 6) / 6;
    case Activation::leaky_relu: return x < 0 ? x * slope : x;
  }
  return x;
}

inline DType residual_dtype(const Gemm& g) {
  return g.residual_scale != 0 ? DType::u8 : g.c_dtype == DType::u8 ? DType::f32 : g.c_dtype;
}

struct EpilogueOperands {
  Exact c, scale, bias, residual;
};

// Everything but C itself, for `rows` rows of `columns`.
inline void choose_epilogue(Rng& rng, Gemm& g, EpilogueOperands& o, int64_t rows, int64_t columns) {
  if (g.flavour == Flavour::u8s8) {
    o.scale = random_elements(rng, DType::f32, columns);
    for (int64_t j = 0; j < columns; j++) o.scale.as<float>()[j] = (std::fabs(rng.value()) + 0.01f) / 64;
    g.col_scale = o.scale.as<float>();
  }
  if (rng.chance(2)) {
    g.bias_dtype = rng.chance(2) || g.c_dtype == DType::u8 ? DType::f32 : g.c_dtype;
    o.bias = random_elements(rng, g.bias_dtype, columns);
    g.bias = o.bias.data();
  }
  g.activation = rng.chance(2) ? Activation::none : static_cast<Activation>(rng.below(kActivationCount));
  g.slope = 0.1f;
  g.residual_first = rng.chance(2);
  if (rng.chance(2)) {
    g.residual_row = rng.chance(10) ? 0 : columns + rng.below(3);
    if (g.flavour == Flavour::u8s8 && g.prepare != APrepare::digits && rng.chance(2)) {  // of bytes
      g.residual_scale = 0.001f + std::fabs(rng.value()) / 32;
      g.residual_zero = static_cast<int32_t>(rng.below(256));
    }
    o.residual = random_elements(rng, residual_dtype(g), rows ? (rows - 1) * g.residual_row + columns : 0);
    g.residual = o.residual.data();
  }
}

inline void choose_c_dtype(Rng& rng, Gemm& g) {
  constexpr DType kFloats[] = {DType::f32, DType::bf16, DType::f16};
  g.c_dtype = rng.chance(5) ? DType::u8 : rng.of(kFloats);
  if (g.c_dtype != DType::u8) return;
  g.c_inverse_scale = 4 + 4 * std::fabs(rng.value());
  g.c_zero_point = static_cast<int32_t>(rng.below(256));
}

// One output in double, and how far the kernel may be from it.
struct Expected {
  double y, bound;

  bool admits(double got) const {
    if (std::isnan(y)) return std::isnan(got);
    return got == y || std::fabs(got - y) <= bound;
  }
};

// C(i, j) of accumulators that are worth `sum` and may be off by `bound`.
inline Expected finished(const Gemm& g, int64_t i, int64_t j, double sum, double bound) {
  const double bias = g.bias ? get(g.bias_dtype, g.bias, j) : 0;
  double residual = g.residual ? get(residual_dtype(g), g.residual, i * g.residual_row + j) : 0;
  if (g.residual && g.residual_scale != 0) {
    residual = (residual - g.residual_zero) * static_cast<double>(g.residual_scale);
    bound += std::fabs(residual) * 0x1p-23;
  }
  const double before = sum + bias + (g.residual_first ? residual : 0);
  bound += (std::fabs(before) + std::fabs(sum + bias)) * 0x1p-24;
  double y = activation(g.activation, before, g.slope);
  // |act'| <= 1.5; the activations' own error, relative to x (vecmath.h).
  bound = 1.5 * bound + (g.activation > Activation::relu ? std::fabs(before) * 1e-6 : 0);
  if (!g.residual_first) {
    y += residual;
    bound += std::fabs(y) * 0x1p-24;
  }
  if (g.c_dtype == DType::u8) {
    const double q = y * g.c_inverse_scale + g.c_zero_point;
    if (!std::isfinite(q)) return {q > 0 ? 255. : 0., 0};
    return {std::fmin(std::fmax(q, 0), 255), bound * g.c_inverse_scale * 1.01 + 0.5 + std::fabs(q) * 0x1p-22};
  }
  if (!std::isfinite(y)) return {y, 0};
  return {y, bound * 1.01 + rounding(g.c_dtype, std::fabs(y) + bound)};
}

}  // namespace pbm::test

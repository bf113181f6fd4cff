// The words that kernels and their callers share: dtypes, flavours of product, activations.
#pragma once

#include <cstdint>

namespace pbm {

enum class DType : int { f32, bf16, f16, u8, s8, s32 };
constexpr int64_t size_of(DType t) {
  return t == DType::f32 || t == DType::s32 ? 4 : t == DType::bf16 || t == DType::f16 ? 2 : 1;
}

// fp32·fp32 → fp32, bf16·bf16 → fp32, u8·s8 → s32.
enum class Flavour : int { f32, bf16, u8s8 };
// Values of k that one 4-byte lane holds.
constexpr int64_t k_per_lane(Flavour f) { return f == Flavour::f32 ? 1 : f == Flavour::bf16 ? 2 : 4; }

enum class Activation : int { none, relu, gelu_erf, gelu_tanh, silu };
constexpr int kActivationCount = 5;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Packed B: panels of 16 columns, each a sequence of 64-byte groups of 16 lanes; see docs/design.md.
constexpr int64_t kPanel = 16;
constexpr int64_t kGroupBytes = 64;

}  // namespace pbm

// The words of every device: activations and the packed layout. constexpr functions run in CUDA kernels too (nvcc's
// --expt-relaxed-constexpr).
#pragma once

#include <cstdint>

namespace pbm {

// The integers of the op schemas. Linear layers have the first five.
enum class Activation : int { none, relu, gelu_erf, gelu_tanh, silu, relu6, hardswish, leaky_relu };
constexpr int kLinearActivationCount = 5, kActivationCount = 8;

// fp32·fp32 → fp32, bf16·bf16 → fp32, u8·s8 → s32.
enum class Flavour : int { f32, bf16, u8s8 };
// Values of k that one 4-byte lane holds.
constexpr int64_t k_per_lane(Flavour f) { return f == Flavour::f32 ? 1 : f == Flavour::bf16 ? 2 : 4; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Packed B: panels of 16 columns, each a sequence of 64-byte groups of 16 lanes; see docs/design.md.
constexpr int64_t kPanel = 16;
constexpr int64_t kGroupBytes = 64;
constexpr int64_t panel_groups(int64_t k, Flavour f) { return ceil_div(k, k_per_lane(f)); }

// int32 sums of k products of u8 and s8 are exact while 255·128·k < 2³¹.
constexpr int64_t kMaxInt8K = 65793;

}  // namespace pbm

// Argument checks at the torch boundary. Every message names the op, the argument, what was expected and what came.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <sstream>
#include <string>

#include "common/types.h"

namespace pbm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& t) {
  std::ostringstream s;
  s << '(';
  for (int64_t i = 0; i < t.dim(); i++) s << (i ? ", " : "") << t.size(i);
  s << (t.dim() == 1 ? ",)" : ")");
  return s.str();
}

inline const char* dtype_name(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline bool is_float_dtype(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half;
}

inline void check_float(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(is_float_dtype(t.scalar_type()), op, ": ", name, " must be float32, bfloat16 or float16, got ",
                  dtype_name(t.scalar_type()));
}

inline void check_dtype(const char* op, const char* name, const Tensor& t, ScalarType expected) {
  STD_TORCH_CHECK(t.scalar_type() == expected, op, ": ", name, " must be ", dtype_name(expected), ", got ",
                  dtype_name(t.scalar_type()));
}

inline void check_dim(const char* op, const char* name, const Tensor& t, int64_t dim) {
  STD_TORCH_CHECK(t.dim() == dim, op, ": ", name, " must have ", dim, dim == 1 ? " dimension" : " dimensions",
                  ", got shape ", shape_of(t));
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& input) {
  STD_TORCH_CHECK(t.is_cuda() == input.is_cuda() && t.get_device_index() == input.get_device_index(), op, ": ", name,
                  " must be on the device of input");
}

// n values, on the input's device.
inline void check_vector(const char* op, const char* name, const Tensor& t, int64_t n, const Tensor& input) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == n, op, ": ", name, " must have shape (", n, ",), got ", shape_of(t));
  check_same_device(op, name, t, input);
}

inline void check_bias(const char* op, const std::optional<Tensor>& bias, int64_t n, const Tensor& input) {
  if (!bias) return;
  check_vector(op, "bias", *bias, n, input);
  const ScalarType t = bias->scalar_type();
  STD_TORCH_CHECK(t == input.scalar_type() || t == ScalarType::Float, op, ": bias must be ",
                  dtype_name(input.scalar_type()), " as input is, or float32; got ", dtype_name(t));
}

// A residual, or a gradient of the output: the output's shape (leading dimensions of input, then n) and input's dtype.
inline void check_like_output(const char* op, const char* name, const Tensor& t, int64_t n, const Tensor& input) {
  check_same_device(op, name, t, input);
  check_dtype(op, name, t, input.scalar_type());
  bool same = t.dim() == input.dim() && t.size(t.dim() - 1) == n;
  for (int64_t i = 0; same && i + 1 < t.dim(); i++) same = t.size(i) == input.size(i);
  STD_TORCH_CHECK(same, op, ": ", name, " must have the output's shape, input's ", shape_of(input),
                  " with the last dimension ", n, "; got ", shape_of(t));
}

inline void check_residual(const char* op, const std::optional<Tensor>& residual, int64_t n, const Tensor& input) {
  if (residual) check_like_output(op, "residual", *residual, n, input);
}

inline void check_activation(const char* op, int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation < kLinearActivationCount, op,
                  ": activation must be 0 (none), 1 (relu), 2 (gelu), 3 (gelu_tanh) or 4 (silu), got ", activation);
}

inline void check_int8_k(const char* op, int64_t k) {
  STD_TORCH_CHECK(k <= kMaxInt8K, op, ": in_features must be at most ", kMaxInt8K,
                  ", so that int32 sums cannot overflow; got ", k);
}

// As pack_int8_linear_weight makes it, for n columns and k rows of B.
inline void check_packed_int8_weight(const char* op, const Tensor& packed_weight, int64_t n, int64_t k,
                                     const Tensor& input) {
  check_dim(op, "packed_weight", packed_weight, 3);
  check_dtype(op, "packed_weight", packed_weight, ScalarType::Char);
  const int64_t panels = ceil_div(n, kPanel), groups = panel_groups(k, Flavour::u8s8) + 1;
  STD_TORCH_CHECK(packed_weight.is_contiguous() && packed_weight.size(0) == panels && packed_weight.size(1) == groups &&
                      packed_weight.size(2) == kGroupBytes,
                  op, ": packed_weight for in_features = ", k, " (the last dimension of input) and out_features = ", n,
                  " (the size of weight_scale) must be contiguous with shape (", panels, ", ", groups, ", ",
                  kGroupBytes, "), got ", shape_of(packed_weight));
  check_same_device(op, "packed_weight", packed_weight, input);
}

}  // namespace pbm

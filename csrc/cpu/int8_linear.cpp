#include "cpu/run_gemm.h"

namespace pbm {
namespace {

// Both int8 products: they differ in how the activations become integers.
Tensor product(const char* op, APrepare prepare, const Tensor& input, const Tensor& packed_weight,
               const Tensor& weight_scale, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
               int64_t activation) {
  check_float(op, "input", input);
  STD_TORCH_CHECK(input.dim() >= 1, op, ": input must have at least 1 dimension, got a scalar");
  check_dtype(op, "weight_scale", weight_scale, ScalarType::Float);
  check_dim(op, "weight_scale", weight_scale, 1);
  const int64_t k = input.size(input.dim() - 1), n = weight_scale.size(0);
  check_int8_k(op, k);
  check_packed_int8_weight(op, packed_weight, n, k, input);
  check_same_device(op, "weight_scale", weight_scale, input);
  check_bias(op, bias, n, input);
  check_residual(op, residual, n, input);
  check_activation(op, activation);

  const RowView x = row_view("input", input);
  const Tensor scale = as_contiguous(weight_scale);
  Tensor out = output_like(input, n);
  Gemm g = gemm_over(x, out, n);
  g.flavour = Flavour::u8s8;
  g.prepare = prepare;
  g.b = data_of("packed_weight", packed_weight);
  g.b_packed = true;
  g.col_scale = static_cast<const float*>(data_of("weight_scale", scale));
  const EpilogueTensors kept = set_epilogue(&g, bias, residual, activation);
  run_gemm(g);
  return out;
}

Tensor int8_linear(const Tensor& input, const Tensor& packed_weight, const Tensor& weight_scale,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, int64_t activation,
                   bool symmetric) {
  return product("int8_linear", symmetric ? APrepare::symmetric : APrepare::asymmetric, input, packed_weight,
                 weight_scale, bias, residual, activation);
}

Tensor int8_weight_only_linear(const Tensor& input, const Tensor& packed_weight, const Tensor& weight_scale,
                               const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                               int64_t activation) {
  return product("int8_weight_only_linear", APrepare::digits, input, packed_weight, weight_scale, bias, residual,
                 activation);
}

std::tuple<Tensor, Tensor, Tensor> quantize_per_token(const Tensor& input, bool symmetric) {
  const char* op = "quantize_per_token";
  check_float(op, "input", input);
  STD_TORCH_CHECK(input.dim() >= 1, op, ": input must have at least 1 dimension, got a scalar");
  const RowView x = row_view("input", input);
  const int64_t lead = input.dim() - 1;
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i <= lead; i++) sizes.push_back(input.size(i));
  Tensor q = empty_cpu(sizes.data(), lead + 1, symmetric ? ScalarType::Char : ScalarType::Byte);
  Tensor scale = empty_cpu(sizes.data(), lead, ScalarType::Float);
  Tensor zero_point = empty_cpu(sizes.data(), lead, ScalarType::Int);
  QuantizeRows r;
  r.k = r.q_row = r.q_padded = x.columns;
  r.kind = symmetric ? QuantKind::symmetric_s8 : QuantKind::asymmetric;
  r.x = x.data;
  r.dtype = dtype_of(input);
  r.row = x.row_stride;
  r.q = q.mutable_data_ptr();
  r.scale = static_cast<float*>(scale.mutable_data_ptr());
  r.zero_point = static_cast<int32_t*>(zero_point.mutable_data_ptr());
  over_parts(x.rows, 1, threads_worth(x.rows * x.columns),
             [&](Range rows) { kernels().quantize_rows(r, rows.begin, rows.end); });
  return {q, scale, zero_point};
}

}  // namespace
}  // namespace pbm

STABLE_TORCH_LIBRARY_IMPL(pybigmodel, CPU, m) {
  m.impl("quantize_per_token", TORCH_BOX(&pbm::quantize_per_token));
  m.impl("int8_linear", TORCH_BOX(&pbm::int8_linear));
  m.impl("int8_weight_only_linear", TORCH_BOX(&pbm::int8_weight_only_linear));
}

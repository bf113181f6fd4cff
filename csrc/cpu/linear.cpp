#include "cpu/run_gemm.h"

namespace pbm {
namespace {

Flavour flavour_of(const char* op, const Tensor& input, int64_t precision) {
  STD_TORCH_CHECK(precision == 0 || precision == 1, op, ": precision must be 0 (fp32) or 1 (bf16), got ", precision);
  return precision == 1 || input.scalar_type() == ScalarType::BFloat16 ? Flavour::bf16 : Flavour::f32;
}

bool native(DType t, Flavour f) { return t == (f == Flavour::f32 ? DType::f32 : DType::bf16); }

void check_linear(const char* op, const Tensor& input, const Tensor& weight) {
  check_float(op, "input", input);
  STD_TORCH_CHECK(input.dim() >= 1, op, ": input must have at least 1 dimension, got a scalar");
  check_dim(op, "weight", weight, 2);
  check_dtype(op, "weight", weight, input.scalar_type());
  check_same_device(op, "weight", weight, input);
  STD_TORCH_CHECK(input.size(input.dim() - 1) == weight.size(1), op,
                  ": input's last dimension must be in_features = ", weight.size(1), " (weight has shape ",
                  shape_of(weight), "), got input of shape ", shape_of(input));
}

Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, int64_t precision) {
  check_linear("linear", input, weight);
  const int64_t n = weight.size(0);
  check_bias("linear", bias, n, input);
  const RowView x = row_view("input", input), w = row_view("weight", weight);
  Tensor out = output_like(input, n);
  Gemm g = gemm_over(x, out, n);
  g.flavour = flavour_of("linear", input, precision);
  g.prepare = native(g.a_dtype, g.flavour) ? APrepare::none : APrepare::convert;
  g.b = w.data;
  g.b_dtype = dtype_of(weight);
  g.b_row = 1;
  g.b_col = w.row_stride;
  const EpilogueTensors kept = set_epilogue(&g, bias, std::nullopt, 0);
  run_gemm(g);
  return out;
}

Tensor input_gradient(const RowView& dy, const RowView& w, const Tensor& input, Flavour flavour) {
  Tensor out = output_like(input, w.columns);
  Gemm g = gemm_over(dy, out, w.columns);
  g.flavour = flavour;
  g.prepare = native(g.a_dtype, flavour) ? APrepare::none : APrepare::convert;
  g.b = w.data;
  g.b_dtype = dtype_of(w.tensor);
  g.b_row = w.row_stride;
  g.b_col = 1;
  run_gemm(g);
  return out;
}

Tensor weight_gradient(const RowView& dy, const RowView& x, const Tensor& weight, Flavour flavour) {
  const int64_t sizes[2] = {weight.size(0), weight.size(1)};
  Tensor out = empty_cpu(sizes, 2, weight.scalar_type());
  Gemm g = gemm_over(dy, out, sizes[1]);
  g.flavour = flavour;
  g.m = sizes[0];
  g.k = dy.rows;
  g.a_row = 1;
  g.a_col = dy.row_stride;
  g.prepare = APrepare::convert;
  g.b = x.data;
  g.b_dtype = dtype_of(x.tensor);
  g.b_row = x.row_stride;
  g.b_col = 1;
  run_gemm(g);
  return out;
}

// In fp32 whatever the gradient's dtype: a bias may be fp32 beside bf16 tensors, and rounding twice helps nobody.
Tensor bias_gradient(const RowView& dy) {
  Tensor out = empty_cpu(&dy.columns, 1, ScalarType::Float);
  const ColumnSum s{dy.rows,      dy.columns, dy.data, dtype_of(dy.tensor), dy.row_stride, out.mutable_data_ptr(),
                    dtype_of(out)};
  over_parts(dy.columns, kPanel, threads_worth(dy.rows * dy.columns),
             [&](Range c) { kernels().column_sum(s, c.begin, c.end); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                   int64_t precision, bool need_input, bool need_weight,
                                                   bool need_bias) {
  check_linear("linear_backward", input, weight);
  check_like_output("linear_backward", "grad_output", grad_output, weight.size(0), input);
  const Flavour flavour = flavour_of("linear_backward", input, precision);
  const RowView dy = row_view("grad_output", grad_output), x = row_view("input", input), w = row_view("weight", weight);
  const int64_t nothing = 0;
  const auto none = [&](ScalarType t) { return empty_cpu(&nothing, 1, t); };
  return {need_input ? input_gradient(dy, w, input, flavour) : none(input.scalar_type()),
          need_weight ? weight_gradient(dy, x, weight, flavour) : none(input.scalar_type()),
          need_bias ? bias_gradient(dy) : none(ScalarType::Float)};
}

void pack_all(PackB p) {
  const int64_t panels = ceil_div(p.n, kPanel);
  over_parts(panels, 1, threads_worth(p.n * p.k), [&](Range r) { kernels().pack_b(p, r.begin, r.end); });
}

Tensor pack_linear_weight(const Tensor& weight, int64_t precision) {
  const char* op = "pack_linear_weight";
  check_float(op, "weight", weight);
  check_dim(op, "weight", weight, 2);
  const Flavour flavour = flavour_of(op, weight, precision);
  const RowView w = row_view("weight", weight);
  const int64_t sizes[3] = {ceil_div(w.rows, kPanel), panel_groups(w.columns, flavour), kPanel * k_per_lane(flavour)};
  Tensor out = empty_cpu(sizes, 3, flavour == Flavour::bf16 ? ScalarType::BFloat16 : ScalarType::Float);
  pack_all({w.rows, w.columns, flavour, w.data, dtype_of(weight), 1, w.row_stride, false, out.mutable_data_ptr()});
  return out;
}

Tensor pack_int8_linear_weight(const Tensor& weight) {
  const char* op = "pack_int8_linear_weight";
  check_dtype(op, "weight", weight, ScalarType::Char);
  check_dim(op, "weight", weight, 2);
  check_int8_k(op, weight.size(1));
  const RowView w = row_view("weight", weight);
  const int64_t sizes[3] = {ceil_div(w.rows, kPanel), panel_groups(w.columns, Flavour::u8s8) + 1, kGroupBytes};
  Tensor out = empty_cpu(sizes, 3, ScalarType::Char);
  pack_all({w.rows, w.columns, Flavour::u8s8, w.data, DType::s8, 1, w.row_stride, true, out.mutable_data_ptr()});
  return out;
}

Tensor linear_packed(const Tensor& input, const Tensor& packed_weight, int64_t out_features,
                     const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, int64_t activation) {
  const char* op = "linear_packed";
  check_float(op, "input", input);
  STD_TORCH_CHECK(input.dim() >= 1, op, ": input must have at least 1 dimension, got a scalar");
  check_dim(op, "packed_weight", packed_weight, 3);
  const ScalarType packed = packed_weight.scalar_type();
  STD_TORCH_CHECK(packed == ScalarType::Float || packed == ScalarType::BFloat16, op,
                  ": packed_weight must be float32 or bfloat16, as pack_linear_weight makes it, got ",
                  dtype_name(packed));
  const Flavour flavour = packed == ScalarType::Float ? Flavour::f32 : Flavour::bf16;
  const int64_t k = input.size(input.dim() - 1);
  STD_TORCH_CHECK(
      packed_weight.is_contiguous() && packed_weight.size(0) == ceil_div(out_features, kPanel) &&
          packed_weight.size(1) == panel_groups(k, flavour) && packed_weight.size(2) == kPanel * k_per_lane(flavour),
      op, ": packed_weight for in_features = ", k, " (the last dimension of input) and out_features = ", out_features,
      " must be contiguous with shape (", ceil_div(out_features, kPanel), ", ", panel_groups(k, flavour), ", ",
      kPanel * k_per_lane(flavour), "), got ", shape_of(packed_weight));
  check_same_device(op, "packed_weight", packed_weight, input);
  check_bias(op, bias, out_features, input);
  check_residual(op, residual, out_features, input);
  check_activation(op, activation);
  const RowView x = row_view("input", input);
  Tensor out = output_like(input, out_features);
  Gemm g = gemm_over(x, out, out_features);
  g.flavour = flavour;
  g.prepare = native(g.a_dtype, flavour) ? APrepare::none : APrepare::convert;
  g.b = data_of("packed_weight", packed_weight);
  g.b_packed = true;
  const EpilogueTensors kept = set_epilogue(&g, bias, residual, activation);
  run_gemm(g);
  return out;
}

}  // namespace
}  // namespace pbm

STABLE_TORCH_LIBRARY_IMPL(pybigmodel, CPU, m) {
  m.impl("linear", TORCH_BOX(&pbm::linear));
  m.impl("linear_backward", TORCH_BOX(&pbm::linear_backward));
  m.impl("pack_linear_weight", TORCH_BOX(&pbm::pack_linear_weight));
  m.impl("pack_int8_linear_weight", TORCH_BOX(&pbm::pack_int8_linear_weight));
  m.impl("linear_packed", TORCH_BOX(&pbm::linear_packed));
}

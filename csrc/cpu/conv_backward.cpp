#include "cpu/conv.h"

namespace pbm {
namespace {

bool is_winograd(ConvAlgorithm a) { return a == ConvAlgorithm::winograd2 || a == ConvAlgorithm::winograd4; }

// Of contiguous planes: sixteen sums a plane, which bound the rounding error too.
void sum_planes(const Tensor& grad_output, int64_t pixels, float* out) {
  const float* dy = static_cast<const float*>(grad_output.const_data_ptr());
  const int64_t batch = grad_output.size(0), channels = grad_output.size(1);
  in_parallel(channels, [&](int64_t c) {
    double total = 0;
    for (int64_t n = 0; n < batch; n++) {
      const float* plane = dy + (n * channels + c) * pixels;
      float sums[16] = {};
      int64_t i = 0;
      for (; i + 16 <= pixels; i += 16)
        for (int j = 0; j < 16; j++) sums[j] += plane[i + j];
      for (; i < pixels; i++) sums[i % 16] += plane[i];
      for (const float sum : sums) total += sum;
    }
    out[c] = static_cast<float>(total);
  });
}

// Of few channels, innermost: sixteen pixels are one row of sums, whose lanes are full and whose rounding error is that of
// a sixteenth of the terms.
constexpr int64_t kPixelsARow = 16;

void sum_pixels(const ColumnSum& s, float* out) {
  const int64_t wide = s.columns * kPixelsARow, rest = s.rows % kPixelsARow;
  std::vector<float> sums(static_cast<size_t>(wide)), last(static_cast<size_t>(s.columns));
  const ColumnSum rows{s.rows / kPixelsARow, wide, s.x, s.dtype, wide, sums.data(), DType::f32};
  over_parts(wide, kPanel, threads_worth(s.rows * s.columns),
             [&](Range c) { kernels().column_sum(rows, c.begin, c.end); });
  const char* x = static_cast<const char*>(s.x) + (s.rows - rest) * s.columns * size_of(s.dtype);
  kernels().column_sum({rest, s.columns, x, s.dtype, s.columns, last.data(), DType::f32}, 0, s.columns);
  for (int64_t c = 0; c < s.columns; c++) {
    double total = last[static_cast<size_t>(c)];
    for (int64_t i = c; i < wide; i += s.columns) total += sums[static_cast<size_t>(i)];
    out[c] = static_cast<float>(total);
  }
}

// In fp32 whatever the gradient's dtype, as linear's.
Tensor bias_gradient(const Tensor& grad_output) {
  const int64_t channels = grad_output.size(1);
  int64_t size[3];
  for (int i = 0; i < 3; i++) {
    const int64_t axis = axis_of(grad_output.dim(), i);
    size[i] = axis < 0 ? 1 : grad_output.size(axis);
  }
  const Tensor out = empty_cpu(&channels, 1, ScalarType::Float);
  const int64_t pixels = size[0] * size[1] * size[2];
  if (pixels > 1 && grad_output.is_contiguous() && dtype_of(grad_output) == DType::f32) {
    sum_planes(grad_output, pixels, static_cast<float*>(out.mutable_data_ptr()));
    return out;
  }
  const ImageView dy = image_of("grad_output", dense(grad_output), size, dtype_of(grad_output));
  const int64_t rows = grad_output.size(0) * size[0] * size[1] * size[2];
  const ColumnSum s{rows, channels, dy.image.data, dtype_of(grad_output), channels, out.mutable_data_ptr(), DType::f32};
  if (channels < kPanel && rows >= kPixelsARow) {
    sum_pixels(s, static_cast<float*>(out.mutable_data_ptr()));
    return out;
  }
  over_parts(channels, kPanel, threads_worth(rows * channels),
             [&](Range c) { kernels().column_sum(s, c.begin, c.end); });
  return out;
}

Tensor none(ScalarType t) {
  const int64_t nothing = 0;
  return empty_cpu(&nothing, 1, t);
}

// --- ops -------------------------------------------------------------------------------------------------------------

void check_grad_output(const char* op, const Tensor& grad_output, const Tensor& input, int64_t channels,
                       const int64_t (&size)[3]) {
  check_dtype(op, "grad_output", grad_output, input.scalar_type());
  check_same_device(op, "grad_output", grad_output, input);
  bool fits =
      grad_output.dim() == input.dim() && grad_output.size(0) == input.size(0) && grad_output.size(1) == channels;
  for (int i = 0; fits && i < 3; i++) {
    const int64_t axis = axis_of(input.dim(), i);
    fits = axis < 0 || grad_output.size(axis) == size[i];
  }
  STD_TORCH_CHECK(fits, op, ": grad_output must have the output's shape, ", channels,
                  " channels and spatial sizes (d, h, w) ", list_of(size, 3), "; got ", shape_of(grad_output));
}

std::tuple<Tensor, Tensor, Tensor> conv_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                 Ints stride, Ints padding, Ints dilation, int64_t groups,
                                                 int64_t precision, int64_t algorithm, bool channels_last,
                                                 bool need_input, bool need_weight, bool need_bias) {
  const char* op = "conv_backward";
  check_operands(op, input, weight);
  const ConvGeometry g{stride, padding, dilation, groups};
  const ConvShape s = shape_for(op, input, weight.size(0), weight.size(1), kernel_of(weight), g);
  const int64_t size[3] = {s.out(0), s.out(1), s.out(2)};
  check_grad_output(op, grad_output, input, weight.size(0), size);
  const Flavour flavour = flavour_of(op, input, precision);
  const ConvAlgorithm chosen = algorithm_of(op, s, flavour, algorithm, !channels_last);
  const bool exact = !is_winograd(chosen);  // as the forward
  return {need_input
              ? run_transposed(grad_output, s, flavour, filters_of(weight, s), exact, std::nullopt, channels_last)
              : none(input.scalar_type()),
          need_weight ? weight_gradient(input, grad_output, s, weight, exact) : none(input.scalar_type()),
          need_bias ? bias_gradient(grad_output) : none(ScalarType::Float)};
}

// The convolution whose transpose it is: from images of the output's size to those of the input's.
ConvShape transposed_shape(const char* op, const Tensor& input, const Tensor& weight, const ConvGeometry& g,
                           const int64_t* out) {
  check_operands(op, input, weight);
  STD_TORCH_CHECK(input.size(1) == weight.size(0), op, ": input must have ", weight.size(0),
                  " channels, as weight has filters, got shape ", shape_of(input));
  check_geometry(op, input.dim() - 2, kernel_of(weight), g);
  STD_TORCH_CHECK(weight.size(0) % g.groups == 0, op, ": groups must divide the ", weight.size(0),
                  " input channels, got ", g.groups);
  ConvShape s{};
  s.batch = input.size(0);
  s.groups = g.groups;
  s.c = weight.size(1);
  s.n = weight.size(0) / g.groups;
  for (int i = 0; i < 3; i++) {
    const int64_t axis = axis_of(input.dim(), i), at = axis - 2;
    const bool there = axis >= 0;
    s.in[i] = there ? out[at] : 1;
    s.kernel[i] = there ? weight.size(axis) : 1;
    s.stride[i] = there ? g.stride[static_cast<size_t>(at)] : 1;
    s.dilation[i] = there ? g.dilation[static_cast<size_t>(at)] : 1;
    s.pad[i] = there ? g.padding[static_cast<size_t>(2 * at)] : 0;
    s.pad_end[i] = there ? g.padding[static_cast<size_t>(2 * at + 1)] : 0;
  }
  return s;
}

Tensor conv_transpose(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, Ints stride,
                      Ints padding, Ints output_padding, Ints dilation, int64_t groups, int64_t precision, bool exact,
                      bool channels_last) {
  const char* op = "conv_transpose";
  const ConvGeometry g{stride, padding, dilation, groups};
  check_operands(op, input, weight);
  const size_t axes = static_cast<size_t>(input.dim() - 2);
  check_geometry(op, input.dim() - 2, kernel_of(weight), g);
  STD_TORCH_CHECK(output_padding.size() == axes, op, ": output_padding must have ", axes, " entries, got ",
                  output_padding.size());
  int64_t out[3] = {1, 1, 1};
  for (size_t i = 0; i < axes; i++) {
    const int64_t axis = static_cast<int64_t>(i) + 2;
    STD_TORCH_CHECK(output_padding[i] >= 0 && (output_padding[i] < stride[i] || output_padding[i] < dilation[i]), op,
                    ": output_padding must be at least 0 and less than stride or dilation, got ", output_padding[i],
                    " beside stride ", stride[i], " and dilation ", dilation[i]);
    out[i] = (input.size(axis) - 1) * stride[i] - padding[2 * i] - padding[2 * i + 1] +
             dilation[i] * (weight.size(axis) - 1) + output_padding[i] + 1;
    STD_TORCH_CHECK(out[i] > 0, op, ": padding leaves nothing of the output: its size would be ", out[i],
                    ", input has shape ", shape_of(input));
  }
  const ConvShape s = transposed_shape(op, input, weight, g, out);
  check_bias(op, bias, s.c_all(), input);
  return run_transposed(input, s, flavour_of(op, input, precision), filters_of(weight, s), exact, bias, channels_last);
}

std::tuple<Tensor, Tensor, Tensor> conv_transpose_backward(const Tensor& grad_output, const Tensor& input,
                                                           const Tensor& weight, Ints stride, Ints padding,
                                                           Ints dilation, int64_t groups, int64_t precision, bool exact,
                                                           bool channels_last, bool need_input, bool need_weight,
                                                           bool need_bias) {
  const char* op = "conv_transpose_backward";
  const ConvGeometry g{stride, padding, dilation, groups};
  check_operands(op, input, weight);
  STD_TORCH_CHECK(grad_output.dim() == input.dim(), op,
                  ": grad_output must have as many dimensions as input (3, 4 or 5), got ", shape_of(grad_output));
  int64_t out[3] = {1, 1, 1};
  for (int64_t i = 2; i < grad_output.dim(); i++) out[i - 2] = grad_output.size(i);
  ConvShape s = transposed_shape(op, input, weight, g, out);
  int64_t size[3];
  for (int i = 0; i < 3; i++) size[i] = s.in[i];
  check_grad_output(op, grad_output, input, s.c_all(), size);
  // Outputs of that convolution beyond the input, which an output_padding beyond the stride makes, do not exist.
  for (int i = 0; i < 3; i++) {
    const int64_t axis = axis_of(input.dim(), i);
    if (axis < 0) continue;
    const int64_t beyond = s.out(i) - input.size(axis);
    STD_TORCH_CHECK(beyond >= 0, op, ": input of shape ", shape_of(input), " does not belong to grad_output of shape ",
                    shape_of(grad_output));
    s.pad_end[i] -= beyond * s.stride[i];
  }
  const Flavour flavour = flavour_of(op, input, precision);
  const ConvAlgorithm chosen = choose_conv(s, flavour, exact, !channels_last);
  const auto grad_input = [&] {
    const Tensor packed = pack_filters(s, flavour, chosen, filters_of(weight, s));
    return run_conv(grad_output, s, flavour, chosen, packed, {}, channels_last);
  };
  return {
      need_input ? grad_input() : none(input.scalar_type()),
      need_weight ? weight_gradient(grad_output, input, s, weight, !is_winograd(chosen)) : none(input.scalar_type()),
      need_bias ? bias_gradient(grad_output) : none(ScalarType::Float)};
}

}  // namespace
}  // namespace pbm

STABLE_TORCH_LIBRARY_IMPL(pybigmodel, CPU, m) {
  m.impl("conv_backward", TORCH_BOX(&pbm::conv_backward));
  m.impl("conv_transpose", TORCH_BOX(&pbm::conv_transpose));
  m.impl("conv_transpose_backward", TORCH_BOX(&pbm::conv_transpose_backward));
}

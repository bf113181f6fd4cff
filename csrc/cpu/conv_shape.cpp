#include "cpu/conv.h"

namespace pbm {

std::string list_of(const int64_t* values, int64_t count) {
  std::ostringstream s;
  s << '(';
  for (int64_t i = 0; i < count; i++) s << (i ? ", " : "") << values[i];
  s << ')';
  return s.str();
}

void check_list(const char* op, const char* name, const Ints& list, int64_t count, int64_t least) {
  STD_TORCH_CHECK(static_cast<int64_t>(list.size()) == count, op, ": ", name, " must have ", count, " entries, got ",
                  list_of(list.data(), static_cast<int64_t>(list.size())));
  for (const int64_t value : list)  // so that no size overflows
    STD_TORCH_CHECK(value >= least && value <= INT32_MAX, op, ": ", name, " must be between ", least, " and ",
                    INT32_MAX, ", got ", list_of(list.data(), count));
}

void check_operands(const char* op, const Tensor& input, const Tensor& weight) {
  check_float(op, "input", input);
  check_image(op, input);
  check_dtype(op, "weight", weight, input.scalar_type());
  check_same_device(op, "weight", weight, input);
  check_dim(op, "weight", weight, input.dim());
}

void check_image(const char* op, const Tensor& input) {
  STD_TORCH_CHECK(input.dim() >= 3 && input.dim() <= 5, op,
                  ": input must have 3, 4 or 5 dimensions (N, C, spatial), got shape ", shape_of(input));
  for (int64_t axis = 2; axis < input.dim(); axis++)
    STD_TORCH_CHECK(input.size(axis) > 0, op, ": input must have pixels, got shape ", shape_of(input));
}

void check_geometry(const char* op, int64_t axes, const Ints& kernel, const ConvGeometry& g) {
  check_list(op, "kernel_size", kernel, axes, 1);
  check_list(op, "stride", g.stride, axes, 1);
  check_list(op, "padding", g.padding, 2 * axes, 0);
  check_list(op, "dilation", g.dilation, axes, 1);
  STD_TORCH_CHECK(g.groups >= 1, op, ": groups must be at least 1, got ", g.groups);
}

ConvShape shape_for(const char* op, const Tensor& input, int64_t n_all, int64_t c, const Ints& kernel,
                    const ConvGeometry& g) {
  const int64_t dim = input.dim(), axes = dim - 2;
  check_geometry(op, axes, kernel, g);
  STD_TORCH_CHECK(n_all % g.groups == 0, op, ": groups must divide the ", n_all, " output channels, got ", g.groups);
  STD_TORCH_CHECK(input.size(1) == g.groups * c, op, ": input must have ", g.groups * c,
                  " channels (groups = ", g.groups, " of ", c, "), got shape ", shape_of(input));
  ConvShape s{};
  s.batch = input.size(0);
  s.groups = g.groups;
  s.c = c;
  s.n = n_all / g.groups;
  for (int i = 0; i < 3; i++) {
    const int64_t axis = axis_of(dim, i), at = axis - 2;
    const bool there = axis >= 0;
    s.in[i] = there ? input.size(axis) : 1;
    s.kernel[i] = there ? kernel[at] : 1;
    s.stride[i] = there ? g.stride[at] : 1;
    s.dilation[i] = there ? g.dilation[at] : 1;
    s.pad[i] = there ? g.padding[2 * at] : 0;
    s.pad_end[i] = there ? g.padding[2 * at + 1] : 0;
    STD_TORCH_CHECK(s.out(i) > 0 || !there, op, ": the kernel reaches over ", (s.kernel[i] - 1) * s.dilation[i] + 1,
                    " pixels of an input of ", s.in[i] + s.pad[i] + s.pad_end[i],
                    " with its padding: nothing is left, input has shape ", shape_of(input));
  }
  return s;
}

ConvShape shape_of_weight(const char* op, const Tensor& weight, int64_t groups) {
  STD_TORCH_CHECK(weight.dim() >= 3 && weight.dim() <= 5, op,
                  ": weight must have 3, 4 or 5 dimensions (out_channels, in_channels of a group, kernel…), got shape ",
                  shape_of(weight));
  STD_TORCH_CHECK(groups >= 1 && weight.size(0) % groups == 0, op, ": groups must divide the ", weight.size(0),
                  " output channels, got ", groups);
  ConvShape s{};
  s.groups = groups;
  s.n = weight.size(0) / groups;
  s.c = weight.size(1);
  for (int i = 0; i < 3; i++) {
    const int64_t axis = axis_of(weight.dim(), i);
    s.kernel[i] = axis < 0 ? 1 : weight.size(axis);
    STD_TORCH_CHECK(s.kernel[i] > 0, op, ": weight must have taps, got shape ", shape_of(weight));
    s.stride[i] = s.dilation[i] = s.in[i] = 1;
  }
  return s;
}

void check_groups(const char* op, const Tensor& input, int64_t groups) {
  STD_TORCH_CHECK(groups >= 1 && input.size(1) % groups == 0, op, ": groups must divide the ", input.size(1),
                  " channels of input, got ", groups);
}

void check_conv_activation(const char* op, int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation < kActivationCount, op, ": activation must be in [0, ",
                  kActivationCount, "), got ", activation);
}

void check_conv_output(const char* op, const char* name, const Tensor& t, const ConvShape& s, int64_t dim) {
  bool fits = t.dim() == dim && t.size(0) == s.batch && t.size(1) == s.n_all();
  for (int i = 0; fits && i < 3; i++) fits = axis_of(dim, i) < 0 || t.size(axis_of(dim, i)) == s.out(i);
  STD_TORCH_CHECK(fits, op, ": ", name, " must have the output's shape, ", s.n_all(),
                  " channels and spatial sizes (d, h, w) ", s.out(0), ", ", s.out(1), ", ", s.out(2), "; got ",
                  shape_of(t));
}

Flavour flavour_of(const char* op, const Tensor& input, int64_t precision) {
  STD_TORCH_CHECK(precision == 0 || precision == 1, op, ": precision must be 0 (fp32) or 1 (bf16), got ", precision);
  return precision == 1 || input.scalar_type() == ScalarType::BFloat16 ? Flavour::bf16 : Flavour::f32;
}

ConvAlgorithm algorithm_of(const char* op, const ConvShape& shape, Flavour flavour, int64_t value, bool planes) {
  STD_TORCH_CHECK(value >= 0 && value < kConvAlgorithmCount, op, ": algorithm must be in [0, ", kConvAlgorithmCount,
                  "), got ", value);
  const auto algorithm = static_cast<ConvAlgorithm>(value);
  if (algorithm == ConvAlgorithm::automatic) return choose_conv(shape, flavour, false, planes);
  STD_TORCH_CHECK(conv_admits(shape, flavour, algorithm), op, ": algorithm ", value,
                  " does not compute a convolution of this kernel, stride, dilation, groups and precision");
  return algorithm;
}

}  // namespace pbm

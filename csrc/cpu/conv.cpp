#include "cpu/conv.h"

namespace pbm {
namespace {

Tensor conv(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, Ints stride, Ints padding,
            Ints dilation, int64_t groups, int64_t precision, int64_t algorithm, bool channels_last) {
  const char* op = "conv";
  check_operands(op, input, weight);
  const ConvGeometry g{stride, padding, dilation, groups};
  const ConvShape s = shape_for(op, input, weight.size(0), weight.size(1), kernel_of(weight), g);
  check_bias(op, bias, weight.size(0), input);
  const Flavour flavour = flavour_of(op, input, precision);
  const ConvAlgorithm chosen = algorithm_of(op, s, flavour, algorithm, !channels_last);
  const Tensor packed = pack_filters(s, flavour, chosen, filters_of(weight, s));
  return run_conv(input, s, flavour, chosen, packed, {bias, std::nullopt}, channels_last);
}

Tensor pack_conv_weight(const Tensor& weight, int64_t groups, int64_t precision, int64_t algorithm) {
  const char* op = "pack_conv_weight";
  check_float(op, "weight", weight);
  const ConvShape s = shape_of_weight(op, weight, groups);
  STD_TORCH_CHECK(algorithm > 0 && algorithm < kConvAlgorithmCount, op, ": algorithm must be in [1, ",
                  kConvAlgorithmCount, "), got ", algorithm);
  const Flavour flavour = flavour_of(op, weight, precision);
  const auto chosen = static_cast<ConvAlgorithm>(algorithm);
  STD_TORCH_CHECK(conv_admits(s, flavour, chosen), op, ": algorithm ", algorithm, " takes no weight of shape ",
                  shape_of(weight), " with groups = ", groups, " in this precision");
  return pack_filters(s, flavour, chosen, filters_of(weight, s));
}

Tensor conv_packed(const Tensor& input, const Tensor& packed_weight, int64_t out_channels, Ints kernel_size,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, Ints stride, Ints padding,
                   Ints dilation, int64_t groups, int64_t activation, double slope, int64_t algorithm,
                   bool channels_last) {
  return packed_conv("conv_packed", input, packed_weight, out_channels, kernel_size,
                     {stride, padding, dilation, groups}, {bias, residual, activation, slope}, algorithm,
                     channels_last);
}

}  // namespace

Tensor packed_conv(const char* op, const Tensor& input, const Tensor& packed_weight, int64_t out_channels,
                   const Ints& kernel_size, const ConvGeometry& g, const ConvEpilogue& epilogue, int64_t algorithm,
                   bool channels_last) {
  const int64_t groups = g.groups;
  check_float(op, "input", input);
  check_image(op, input);
  check_groups(op, input, groups);
  STD_TORCH_CHECK(out_channels >= 0, op, ": out_channels must be at least 0, got ", out_channels);
  const ConvShape s = shape_for(op, input, out_channels, input.size(1) / groups, kernel_size, g);
  check_bias(op, epilogue.bias, out_channels, input);
  check_conv_activation(op, epilogue.activation);
  const ScalarType packed = packed_weight.scalar_type();
  STD_TORCH_CHECK(packed == ScalarType::Float || packed == ScalarType::BFloat16, op,
                  ": packed_weight must be float32 or bfloat16, as pack_conv_weight makes it, got ",
                  dtype_name(packed));
  STD_TORCH_CHECK(algorithm > 0, op, ": algorithm must be the one that packed_weight was packed for, got ", algorithm);
  const Flavour flavour = packed == ScalarType::Float ? Flavour::f32 : Flavour::bf16;
  const ConvAlgorithm chosen = algorithm_of(op, s, flavour, algorithm, !channels_last);
  int64_t sizes[3];
  packed_sizes(s, flavour, chosen, sizes);
  bool same = packed_weight.dim() == 3 && packed_weight.is_contiguous();
  for (int i = 0; same && i < 3; i++) same = packed_weight.size(i) == sizes[i];
  STD_TORCH_CHECK(same, op, ": packed_weight must be contiguous with shape ", list_of(sizes, 3),
                  ", as pack_conv_weight makes it for this convolution and algorithm, got ", shape_of(packed_weight));
  check_same_device(op, "packed_weight", packed_weight, input);
  if (epilogue.residual) {
    check_dtype(op, "residual", *epilogue.residual, input.scalar_type());
    check_same_device(op, "residual", *epilogue.residual, input);
    check_conv_output(op, "residual", *epilogue.residual, s, input.dim());
  }
  return run_conv(input, s, flavour, chosen, packed_weight, epilogue, channels_last);
}

}  // namespace pbm

STABLE_TORCH_LIBRARY_IMPL(pybigmodel, CPU, m) {
  m.impl("conv", TORCH_BOX(&pbm::conv));
  m.impl("conv_packed", TORCH_BOX(&pbm::conv_packed));
  m.impl("pack_conv_weight", TORCH_BOX(&pbm::pack_conv_weight));
}

// From torch tensors to the kernels' convolutions.
#pragma once

#include <vector>

#include "cpu/kernels/conv_algorithm.h"
#include "cpu/run_gemm.h"

namespace pbm {

using Ints = std::vector<int64_t>;

// What every op of the family is told beside its tensors; padding: before and after, axis by axis.
struct ConvGeometry {
  const Ints& stride;
  const Ints& padding;
  const Ints& dilation;
  int64_t groups;
};

// --- shapes: conv_shape.cpp

std::string list_of(const int64_t* values, int64_t count);
// `count` numbers from `least` on.
void check_list(const char* op, const char* name, const Ints& list, int64_t count, int64_t least);
void check_image(const char* op, const Tensor& input);
void check_operands(const char* op, const Tensor& input, const Tensor& weight);
void check_geometry(const char* op, int64_t axes, const Ints& kernel, const ConvGeometry& g);
// The convolution of an input (N, groups·c, …) with n_all filters of these sizes.
ConvShape shape_for(const char* op, const Tensor& input, int64_t n_all, int64_t c, const Ints& kernel,
                    const ConvGeometry& g);
// Of its channels and kernel alone; all else is 1 or 0.
ConvShape shape_of_weight(const char* op, const Tensor& weight, int64_t groups);
void check_groups(const char* op, const Tensor& input, int64_t groups);
void check_conv_activation(const char* op, int64_t activation);
// A residual, or a gradient of the output.
void check_conv_output(const char* op, const char* name, const Tensor& t, const ConvShape& s, int64_t dim);
Flavour flavour_of(const char* op, const Tensor& input, int64_t precision);
ConvAlgorithm algorithm_of(const char* op, const ConvShape& shape, Flavour flavour, int64_t value, bool planes);

inline Ints kernel_of(const Tensor& weight) {
  Ints kernel;
  for (int64_t i = 2; i < weight.dim(); i++) kernel.push_back(weight.size(i));
  return kernel;
}

// The axis of a tensor (N, C, spatial…) that stands for axis i of (d, h, w), or −1.
inline int64_t axis_of(int64_t dim, int i) { return i + dim - 3 >= 2 ? i + dim - 3 : -1; }

// The part of the lanes that so many values fill.
inline double filled(int64_t values) {
  return static_cast<double>(values) / static_cast<double>(ceil_div(values, kPanel) * kPanel);
}

struct Strides {
  int64_t batch, channel, spatial[3];
};

inline Strides strides_of(const Tensor& t) {
  Strides s{t.stride(0), t.stride(1), {}};
  for (int i = 0; i < 3; i++) {
    const int64_t axis = axis_of(t.dim(), i);
    s.spatial[i] = axis < 0 ? 0 : t.stride(axis);
  }
  return s;
}

inline ScalarType scalar_of(DType t) {
  switch (t) {
    case DType::bf16: return ScalarType::BFloat16;
    case DType::f16: return ScalarType::Half;
    case DType::u8: return ScalarType::Byte;
    case DType::s8: return ScalarType::Char;
    case DType::s32: return ScalarType::Int;
    default: return ScalarType::Float;
  }
}

// --- images: conv_images.cpp

// A tensor as an image whose channels are contiguous, in a copy where it is not one already.
struct ImageView {
  Tensor tensor;  // keeps a copy alive
  ConvImage image;
};

// An image (N, channels, size…) of `dim` dimensions, channels innermost or outermost.
Tensor empty_image(int64_t dim, int64_t batch, int64_t channels, const int64_t* size, ScalarType dtype,
                   bool channels_last);
// In this dtype, with `before` and `after` pixels of zeros around the rows of w; touching: whose pixels lie side by side.
ImageView image_of(const char* name, const Tensor& tensor, const int64_t* size, DType dtype, int64_t before = 0,
                   int64_t after = 0, bool touching = false);
// The tensor, or a copy whose pixels lie at one distance.
Tensor dense(const Tensor& t);
// The tensor, or a copy that has a contiguous axis among channels and w, from which rows of pixels can be copied.
Tensor regular(const Tensor& t, const int64_t* size);
// Channels-last pixels to a tensor of other strides.
void copy_image(const Tensor& from, const Tensor& to, const int64_t* size);

// Each of `count` on some thread.
template <class F>
void in_parallel(int64_t count, const F& f) {
  const int64_t threads = torch::stable::get_num_threads(), parts = count < threads ? count : threads;
  if (count == 0) return;
  over_parts(count, 1, parts, [&](Range r) {
    for (int64_t at = r.begin; at < r.end; at++) f(at);
  });
}

// --- weights: conv_weights.cpp

// How a weight is read: output channel, input channel of the group, tap; strides in elements.
struct Filters {
  const void* data;
  DType dtype;
  int64_t group, n, c, kernel[3];
};

float value_of(const void* data, DType dtype, int64_t i);  // of a floating dtype
Filters filters_of(const Tensor& weight, const ConvShape& shape);
// The sizes of a packed weight, and the packing.
void packed_sizes(const ConvShape& shape, Flavour flavour, ConvAlgorithm algorithm, int64_t (&sizes)[3]);
Tensor pack_filters(const ConvShape& shape, Flavour flavour, ConvAlgorithm algorithm, const Filters& filters);

// --- running: conv_run.cpp

// What an op does to the accumulators.
struct ConvEpilogue {
  std::optional<Tensor> bias, residual;
  int64_t activation = 0;
  double slope = 0;
};

// What an epilogue reads, kept alive; residuals are images of `size`.
struct EpilogueImages {
  Tensor bias;
  ImageView residual;
};
EpilogueImages set_epilogue(Gemm* g, const ConvEpilogue& epilogue, const int64_t (&size)[3]);
ConvWindow window_of(const ConvShape& shape);  // along h and w
// Without weight, output and epilogue; the input with contiguous rows of pixels.
ConvPlanes planes_of(const ConvShape& shape, const Tensor& input);
Tensor in_planes(const Tensor& t);
Tensor run_conv(const Tensor& input, const ConvShape& shape, Flavour flavour, ConvAlgorithm algorithm,
                const Tensor& packed, const ConvEpilogue& epilogue, bool channels_last);
// conv_packed, with its checks.
Tensor packed_conv(const char* op, const Tensor& input, const Tensor& packed_weight, int64_t out_channels,
                   const Ints& kernel_size, const ConvGeometry& geometry, const ConvEpilogue& epilogue,
                   int64_t algorithm, bool channels_last);
// The transpose of this convolution's matrix: from its outputs (N, groups·n, …) to its inputs, plus a bias.
Tensor run_transposed(const Tensor& input, const ConvShape& shape, Flavour flavour, const Filters& filters, bool exact,
                      const std::optional<Tensor>& bias, bool channels_last);

// --- gradients: conv_weight_gradient.cpp

// exact: without Winograd. Products in fp32, whatever the tensors' dtype.
Tensor weight_gradient(const Tensor& input, const Tensor& grad_output, const ConvShape& s, const Tensor& weight,
                       bool exact);

}  // namespace pbm

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

// The axis of a tensor (N, C, spatial…) that stands for axis i of (d, h, w), or −1.
inline int64_t axis_of(int64_t dim, int i) { return i + dim - 3 >= 2 ? i + dim - 3 : -1; }

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
  return t == DType::f32 ? ScalarType::Float : t == DType::bf16 ? ScalarType::BFloat16 : ScalarType::Half;
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
// In this dtype, with `before` and `after` pixels of zeros around the rows of w.
ImageView image_of(const char* name, const Tensor& tensor, const int64_t* size, DType dtype, int64_t before = 0,
                   int64_t after = 0);
// Channels-last pixels to a tensor of other strides.
void copy_image(const Tensor& from, const Tensor& to, const int64_t* size);

// --- weights: conv_weights.cpp

// How a weight is read: output channel, input channel of the group, tap; strides in elements.
struct Filters {
  const void* data;
  DType dtype;
  int64_t group, n, c, kernel[3];
};

Filters filters_of(const Tensor& weight, const ConvShape& shape);
// The sizes of a packed weight, and the packing.
void packed_sizes(const ConvShape& shape, Flavour flavour, ConvAlgorithm algorithm, int64_t (&sizes)[3]);
Tensor pack_filters(const ConvShape& shape, Flavour flavour, ConvAlgorithm algorithm, const Filters& filters);

}  // namespace pbm

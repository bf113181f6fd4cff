// Which algorithm computes a convolution: a pure function of its shape.
#pragma once

#include <cstdint>

#include "cpu/kernels/gemm.h"

namespace pbm {

// The integers of the op schemas; automatic: the choice below. direct: taps as the batch of the product; direct_rows: a
// kernel's rows, whose taps and channels lie side by side, for images of few channels; planes: images whose channels, in
// and out, are so few that pixels are the better lanes, and lie plane by plane.
enum class ConvAlgorithm : int { automatic, direct, direct_rows, winograd2, winograd4, depthwise, planes };
constexpr int kConvAlgorithmCount = 7;

// Spatial axes are d, h, w; those that the convolution lacks have size, kernel, stride and dilation 1, padding 0.
struct ConvShape {
  int64_t batch, groups;
  int64_t c, n;  // channels of a group, in and out
  int64_t in[3], kernel[3], stride[3], pad[3], pad_end[3], dilation[3];

  int64_t out(int axis) const {
    const int64_t reach = (kernel[axis] - 1) * dilation[axis] + 1;
    const int64_t free = in[axis] + pad[axis] + pad_end[axis] - reach;
    return free < 0 ? 0 : free / stride[axis] + 1;
  }
  int64_t c_all() const { return groups * c; }
  int64_t n_all() const { return groups * n; }
  int64_t pixels() const { return batch * out(0) * out(1) * out(2); }
  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
};

// Whether the algorithm can compute it at all.
bool conv_admits(const ConvShape& shape, Flavour flavour, ConvAlgorithm algorithm);
// The one expected to be the fastest. exact: none that rounds more than the sum of the products does; planes: the result
// is to lie plane by plane.
ConvAlgorithm choose_conv(const ConvShape& shape, Flavour flavour, bool exact, bool planes);

// How the pixels of a grid are cut over threads, rows into m parts and panels into n, for one group.
Grid direct_grid(int64_t rows, int64_t unit, int64_t taps, int64_t lanes, int64_t panels, int64_t threads);
// How Winograd's tiles are cut over threads: tiles into m parts, panels of output channels into n.
Grid winograd_grid(const ConvShape& shape, int m, int64_t threads);

}  // namespace pbm

// What the gradients of a convolution's weight share.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/conv.h"

namespace pbm {

// FilterSums to (groups·n, c, kernel…) in the weight's dtype; that of tap t, filter k, channel c is at t·tap + k·row + c.
struct FilterSums {
  const float* data;
  int64_t tap, row;
};

void write_weight(const ConvShape& s, const FilterSums& sums, int64_t group, const Tensor& out);
Tensor zeroed(int64_t floats);

// FilterSums of dy and x over some pixels, for each tap: what is read stays in L2 while filters and channels pass by, and the
// rounding error is that of so many terms.
constexpr int64_t kPixelsAtOnce = 256;

// f(rows, w) of whole rows of outputs, or of pieces of one.
template <class F>
void over_pieces(const ConvShape& s, Range rows, const F& f) {
  const int64_t width = s.out(2), at_once = width < kPixelsAtOnce ? kPixelsAtOnce / width : 1;
  for (int64_t row = rows.begin; row < rows.end; row += at_once)
    for (int64_t w = 0; w < width; w += kPixelsAtOnce)
      f(Range{row, std::min<int64_t>(row + at_once, rows.end)}, Range{w, std::min<int64_t>(w + kPixelsAtOnce, width)});
}

struct GradientImages {
  const float *dy, *x;  // of the group
  ConvImage dy_image, x_image;
};

GradientImages images_of(const ConvShape& s, const ImageView& x, const ImageView& dy, int64_t group);
// The stretches of outputs w of some rows (image, d, h) that tap t sees.
void stretches_of(const ConvShape& s, const GradientImages& images, int64_t t, Range rows, Range w,
                  std::vector<WeightSum::Stretch>* stretches);

// --- images of few channels: conv_weight_gradient_few.cpp

// What an output sees, taps and channels side by side, is one row of a matrix.
void patches_gradient(const ConvShape& s, const ImageView& x, const ImageView& dy, const Tensor& out);
// What an output sees of one row of the kernel is one run of the image, whose rows have their padding with them.
// Dilation 1 along w.
void runs_gradient(const ConvShape& s, const ImageView& x, const ImageView& dy, const Tensor& out);
// Both images as planes.
void planes_gradient(const ConvShape& s, const Tensor& input, const Tensor& grad_output, const Tensor& out);

}  // namespace pbm

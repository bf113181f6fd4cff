// Convolution of channels-last images: products of gathered rows with packed panels, Winograd, depthwise.
// Images have three spatial axes, d, h and w; those that a convolution lacks have size 1.
#pragma once

#include <cstdint>

#include "cpu/kernels/gemm.h"

namespace pbm {

// An image whose channels are contiguous; strides in elements.
struct ConvImage {
  const void* data;
  int64_t size[3];
  int64_t batch_stride, stride[3];
};

// One tap of the kernel, where it reads: at output pixel i of the grid the input pixel i·in_step + at.
struct ConvTap {
  int64_t at[3];
  int64_t weight;  // its place in a packed panel
};

// Output pixels out_begin + i·out_step, i < count, whose taps read the input at the same distances. A convolution is one
// grid; what runs over its outputs with a stride (a transposed convolution, a data gradient) is one for each remainder.
struct ConvGrid {
  int64_t count[3];
  int64_t out_begin[3], out_step[3], in_step[3];
  const ConvTap* taps;
  int64_t tap_count;
  int64_t run;  // pixels along w that a tap reads as one, some of which may lie beyond the image: zeros; 0: one pixel
};

// How a grid's rows of pixels are cut over threads and blocks: whole, or in pieces where they are long, so that what is
// made for one stays small.
struct RowCut {
  int64_t across, piece;

  explicit RowCut(int64_t across) : across(across), piece(across > 1024 ? 144 : across) {}
  bool is_long() const { return piece < across; }
  // The pieces of so many pixels, and where one begins.
  int64_t of(int64_t pixels) const { return pixels / across * pieces(); }
  int64_t begin(int64_t i) const { return i / pieces() * across + i % pieces() * piece; }
  // Pixels from this one to the end of its piece.
  int64_t left(int64_t pixel) const {
    const int64_t at = pixel % across, in_piece = piece - at % piece;
    return in_piece < across - at ? in_piece : across - at;
  }

 private:
  int64_t pieces() const { return ceil_div(across, piece); }
};

struct Conv {
  int64_t batch, groups;
  int64_t c;    // input channels of a group
  ConvImage x;  // in the flavour's dtype, the groups side by side; u8s8: as QuantizeImage has them, strides in bytes
  int64_t out[3];
  const void* weight;  // [group][panel][tap][lane of c], the lanes of a tap filled up with zeros; u8s8: then the sums
  int64_t taps;
  const void* zeros;  // c elements that taps outside the image read: zeros, or the zero point
  float x_scale;      // u8s8: of the whole image
  int32_t x_zero;
  // The epilogue: n output channels of a group, rows = all output pixels, group g's columns from g·n on. Its operands of
  // the product are not read.
  Gemm out_rows;
};

// Winograd's F(m×m, 3×3) of stride 1, m 2 or 4: y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A over tiles of m×m outputs (Lavin and Gray,
// "Fast Algorithms for Convolutional Neural Networks", 2016). Axes h and w; in fp32.
struct Winograd {
  Conv conv;  // weight: [group][panel][(m + 2)²][c] groups of 16 fp32
  int m;
  int64_t pad[2];
};

// Weights to U = G g Gᵀ; strides in elements, negative where the kernel is turned around.
struct WinogradPack {
  int m;
  int64_t groups, n, c;  // of a group
  const float* w;
  int64_t w_group, w_n, w_c, w_h, w_w;
  float* out;
};

// Winograd's tiles of dy, as A dy Aᵀ, and of x, as Bᵀ d B, for a weight gradient: [place][tile][channel].
struct WinogradTiles {
  Winograd p;    // conv.x is the input; conv.out and pad are the convolution's
  ConvImage dy;  // in fp32
  int64_t n;     // channels of a group of dy
  float *x_tiles, *dy_tiles;
  int64_t x_row, dy_row;    // floats from one tile to the next
  int64_t x_next, dy_next;  // from one place to the next
};

// One filter a channel (groups = channels, n = 1); weight: [16 channels][tap][16] fp32, accumulated in fp32.
struct Depthwise {
  Conv conv;
  DType dtype;                                        // of x
  int64_t kernel[3], stride[3], pad[3], dilation[3];  // pad may be negative
  int64_t out_batch, out_stride[3];                   // elements: the outputs may lie apart; a residual may not
};

// A part of a weight gradient, sum[n][c] += Σ dy·x: over stretches of pixels (or of Winograd's tiles), whose channels lie
// side by side, dy_lane and x_lane floats from one pixel to the next.
struct WeightSum {
  struct Stretch {
    const float *dy, *x;
    int64_t lanes;
  };
  const Stretch* stretches;
  int64_t count;
  int64_t dy_lane, x_lane;
  int64_t c;  // channels of x that exist; sum's rows are filled up to whole panels
  float* sum;
  int64_t sum_row;
};

// A kernel that moves along h and w.
struct ConvWindow {
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// Few channels in planes (N, C, H, W); stride 1 along w; groups 1. Strides in elements, pixels of a row contiguous.
struct ConvPlanes : ConvWindow {
  int64_t c, n;
  DType dtype;  // of x, out and residual
  const void* x;
  int64_t h, w, x_batch, x_channel, x_row;
  const float* weight;  // [eight filters][c][tap][8]
  void* out;            // dense
  int64_t out_h, out_w;
  const void* bias;
  DType bias_dtype;
  const void* residual;  // dense, added before the activation
  Activation activation;
  float slope;
};

// A transposed convolution to few channels, along h and w: pixel i of dy gives to the outputs i·stride − pad +
// tap·dilation, with dilation 1 along w; groups 1.
constexpr int64_t kSpreadVectors = 3;  // of a row of taps, kernel_w·c lanes
struct ConvSpread : ConvWindow {
  int64_t n, c;         // channels in and out
  ConvImage dy;         // in fp32
  const float* weight;  // [tap row][n][vectors of (tap, c)], filled up with zeros
  void* out;            // dense, channels innermost
  DType dtype;
  int64_t out_h, out_w;
};

// The weight gradient of depthwise convolutions: out[tap][channel] += Σ dy·x over rows of outputs.
struct DepthwiseWeightSum {
  int64_t batch, channels, out[3];
  DType dtype;  // of both
  ConvImage x, dy;
  int64_t kernel[3], stride[3], pad[3], dilation[3];
  float* sum;  // [block of 16 channels][tap][16]
};

// An image to other strides and another floating dtype (u8 stays u8), with pixels of zeros before and after each row of w. One of the strides
// along channels and w is 1 on each side.
struct ConvCopy {
  int64_t batch, channels, size[3];
  const void* x;
  DType x_dtype;
  int64_t x_batch, x_channel, x_stride[3];
  void* out;  // the first pixel after the zeros
  DType out_dtype;
  int64_t out_batch, out_channel, out_stride[3];
  int64_t zeros_before, zeros_after;  // pixels; only where out_channel is 1
};

}  // namespace pbm

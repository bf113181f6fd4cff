#include "cpu/kernels/conv_algorithm.h"

#include <initializer_list>

namespace pbm {

bool conv_admits(const ConvShape& s, Flavour flavour, ConvAlgorithm algorithm) {
  switch (algorithm) {
    case ConvAlgorithm::winograd2:
    case ConvAlgorithm::winograd4:
      return flavour == Flavour::f32 && s.in[0] == 1 && s.kernel[0] == 1 && s.pad[0] == 0 && s.pad_end[0] == 0 &&
             s.kernel[1] == 3 && s.kernel[2] == 3 && s.stride[1] == 1 && s.stride[2] == 1 && s.dilation[1] == 1 &&
             s.dilation[2] == 1;
    case ConvAlgorithm::depthwise: return flavour != Flavour::u8s8 && s.c == 1 && s.n == 1;
    case ConvAlgorithm::planes: {
      const int64_t row = s.out(2) + 16 + (s.kernel[2] - 1) * s.dilation[2], rows = s.in[1] + s.pad[1] + s.pad_end[1];
      // A sum is one chain of c·taps terms: of more its rounding error would be twice that of the others.
      return flavour == Flavour::f32 && s.groups == 1 && s.in[0] == 1 && s.kernel[0] == 1 && s.pad[0] == 0 &&
             s.pad_end[0] == 0 && s.stride[2] == 1 && s.c * s.taps() <= 400 && s.c * rows * row * 4 <= int64_t{1} << 20;
    }
    case ConvAlgorithm::direct_rows: return s.groups == 1 && s.dilation[2] == 1 && s.pad_end[2] >= 0;
    default: return true;
  }
}

ConvAlgorithm choose_conv(const ConvShape& s, Flavour flavour, bool exact, bool planes) {
  if (s.groups > 1 && conv_admits(s, flavour, ConvAlgorithm::depthwise)) return ConvAlgorithm::depthwise;
  if (planes && s.c <= 16 && s.n <= 16 && s.out(2) >= 8 && conv_admits(s, flavour, ConvAlgorithm::planes))
    return ConvAlgorithm::planes;
  // Sixteen lanes a tap keep the tile busy between two of them.
  if (s.c < 16 && s.kernel[2] > 1 && conv_admits(s, flavour, ConvAlgorithm::direct_rows))
    return ConvAlgorithm::direct_rows;
  if (exact || s.c < 16 || s.n < 16 || !conv_admits(s, flavour, ConvAlgorithm::winograd4)) return ConvAlgorithm::direct;
  // In multiply-adds: products, transforms, and the weights, which in a network of more than a few layers come from
  // memory: one takes as long there as 26 multiply-adds (261 GFLOP/s a core, two cores at 40 GB/s).
  struct Cost {
    ConvAlgorithm algorithm;
    int64_t m;
  };
  constexpr double kFromMemory = 26;
  const double weights = static_cast<double>(s.c * s.n);
  ConvAlgorithm best = ConvAlgorithm::direct;
  double least = static_cast<double>(s.pixels()) * 9 * weights + 9 * weights * kFromMemory;
  for (const Cost c : {Cost{ConvAlgorithm::winograd2, 2}, Cost{ConvAlgorithm::winograd4, 4}}) {
    const int64_t tiles = s.batch * ceil_div(s.out(1), c.m) * ceil_div(s.out(2), c.m), places = (c.m + 2) * (c.m + 2);
    const double t = static_cast<double>(tiles * places);
    // Transforms: about 12 operations a value in, 10 out, each as dear as a multiply-add of a whole register.
    const double transforms = t * static_cast<double>(12 * s.c + 10 * s.n);
    const double reading = static_cast<double>(places) * weights * kFromMemory;
    const double cost = t * weights + transforms * 4 + reading;
    if (cost < least) {
      least = cost;
      best = c.algorithm;
    }
  }
  return best;
}

Grid direct_grid(int64_t rows, int64_t unit, int64_t taps, int64_t lanes, int64_t panels, int64_t threads) {
  // In steps of one lane and panel: where a tap reads costs about 6, a step of weights from L3 about 4.
  const double work = static_cast<double>(rows) * static_cast<double>(taps * lanes * panels);
  const int64_t most = work < 4096 * static_cast<double>(threads) ? 1 : threads;
  Grid best = {1, 1};
  double least = -1;
  for (int64_t n = 1; n <= most; n++) {
    const int64_t m = most / n;
    const double height = static_cast<double>(ceil_div(ceil_div(rows, unit), m) * unit);
    const double width = static_cast<double>(ceil_div(panels, n));
    const double cost = static_cast<double>(taps) * (height * 6 + (height + 4) * static_cast<double>(lanes) * width);
    if (least < 0 || cost < least) {
      least = cost;
      best = {m, n};
    }
  }
  return best;
}

Grid winograd_grid(const ConvShape& s, int m, int64_t threads) {
  const int64_t tiles = s.batch * ceil_div(s.out(1), m) * ceil_div(s.out(2), m), panels = ceil_div(s.n, kPanel);
  const double transform_in = 12.0 * static_cast<double>(s.c) / 16, transform_out = 10;  // a place, a panel
  Grid best = {1, 1};
  double least = -1;
  for (int64_t n = 1; n <= threads; n++) {
    const int64_t parts = threads / n;
    const double rows = static_cast<double>(ceil_div(ceil_div(tiles, parts), 6) * 6);
    const double width = static_cast<double>(ceil_div(panels, n));
    // Weights are read once a block of rows; a group of them costs about as much as four products.
    const double cost = rows * (transform_in + width * transform_out) + (rows + 4) * width * static_cast<double>(s.c);
    if (least < 0 || cost < least) {
      least = cost;
      best = {parts, n};
    }
  }
  return best;
}

}  // namespace pbm

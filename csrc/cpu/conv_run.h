// What the convolutions of every kind share: outputs, grids over threads.
#pragma once

#include "cpu/conv.h"

namespace pbm {

// An output in the layout asked for, and channels-last, as the kernels write it.
struct OutputImage {
  Tensor out, rows;
  int64_t size[3];

  OutputImage(int64_t dim, int64_t batch, int64_t channels, const int64_t (&sizes)[3], ScalarType dtype,
              bool channels_last)
      : out(empty_image(dim, batch, channels, sizes, dtype, channels_last)), rows(out) {
    for (int i = 0; i < 3; i++) size[i] = sizes[i];
    const bool one_layout = channels == 1 || sizes[0] * sizes[1] * sizes[2] == 1;
    turned = !channels_last && !one_layout;
    if (turned) rows = empty_image(dim, batch, channels, sizes, dtype, true);
  }
  Tensor finish() const {
    if (turned) copy_image(rows, out, size);
    return out;
  }

 private:
  bool turned;
};

// f(rows, channels) over threads: rows cut or channels, at multiples of a unit, whichever gives the fullest thread less.
template <class F>
void over_rows_or_channels(int64_t rows, int64_t channels, int64_t unit, int64_t threads, const F& f) {
  const int64_t blocks = ceil_div(channels, unit);
  const bool by_rows = ceil_div(rows, threads) * blocks <= ceil_div(blocks, threads) * rows;
  if (by_rows)
    over_parts(rows, 1, threads, [&](Range r) { f(r, {0, channels}); });
  else
    over_parts(channels, unit, threads, [&](Range c) { f({0, rows}, c); });
}

// c and n: channels of a group, in and out.
Conv conv_over(const ConvShape& s, int64_t c, int64_t n, Flavour flavour, const ConvImage& x, const OutputImage& out);
void run_grid(const ConvShape& s, const Conv& conv, const ConvGrid& grid);
// How taps are read: each for itself, or a row of them, whose channels lie side by side, as one, from an image with or
// without its padding along w.
enum class Taps { single, padded_rows, rows };
void run_direct(const ConvShape& s, Conv conv, Taps how);
Depthwise depthwise_of(const ConvShape& s, const Conv& conv, DType dtype);
// p.conv.out pixels of every channel.
void run_depthwise(const Depthwise& p);

}  // namespace pbm

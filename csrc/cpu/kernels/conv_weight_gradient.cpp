// Gradients of a convolution's weight: products over pixels, with the taps as distances between them.
#include "cpu/kernels/convert.h"
#include "cpu/kernels/impl.h"

namespace pbm::PBM_TIER {
namespace {

template <int MR, int NV, bool Tail>
void outer_product(const WeightSum& p, int64_t n, int64_t c) {
  const int last = Tail ? static_cast<int>(p.c - c - (NV - 1) * kWidth) : kWidth;
  Vec acc[MR][NV];
  PBM_UNROLL for (int i = 0; i < MR; i++) PBM_UNROLL for (int j = 0; j < NV; j++) acc[i][j] = zero();
  for (int64_t s = 0; s < p.count; s++) {
    const float *dy = p.stretches[s].dy + n, *x = p.stretches[s].x + c;
    for (int64_t l = 0; l < p.stretches[s].lanes; l++, dy += p.dy_lane, x += p.x_lane) {
      Vec v[NV];
      PBM_UNROLL for (int j = 0; j < NV; j++)
        v[j] = Tail && j == NV - 1 ? load_n(x + j * kWidth, last) : load(x + j * kWidth);
      PBM_UNROLL for (int i = 0; i < MR; i++) {
        const Vec g = set1(dy[i]);
        PBM_UNROLL for (int j = 0; j < NV; j++) acc[i][j] = fmadd(g, v[j], acc[i][j]);
      }
    }
  }
  float* sum = p.sum + n * p.sum_row + c;
  PBM_UNROLL for (int i = 0; i < MR; i++) PBM_UNROLL for (int j = 0; j < NV; j++) {
    float* to = sum + i * p.sum_row + j * kWidth;
    store(to, add(load(to), acc[i][j]));
  }
}

using OuterFn = void (*)(const WeightSum&, int64_t n, int64_t c);

template <int MR, int NV, bool Tail>
constexpr OuterFn outer_or_null() {
  if constexpr (MR <= (NV <= kTile.panels ? kTile.max_rows : kTile.wide_rows)) return outer_product<MR, NV, Tail>;
  return nullptr;
}

#define PBM_OUTER(MR)                                                                                 \
  {{outer_or_null<MR, 1, false>(), outer_or_null<MR, 2, false>(), outer_or_null<MR, 3, false>(),       \
    outer_or_null<MR, 4, false>()},                                                                    \
   {outer_or_null<MR, 1, true>(), outer_or_null<MR, 2, true>(), outer_or_null<MR, 3, true>(), \
    outer_or_null<MR, 4, true>()}}

constexpr int kTaps = 7;  // of a row of the kernel, whose sums are in registers

}  // namespace

void conv_weight_sum(const WeightSum& p, Range rows, Range panels) {
  static const OuterFn products[8][2][4] = {PBM_OUTER(1), PBM_OUTER(2), PBM_OUTER(3), PBM_OUTER(4),
                                            PBM_OUTER(5), PBM_OUTER(6), PBM_OUTER(7), PBM_OUTER(8)};
  for (int64_t j = panels.begin, width; j < panels.end; j += width) {
    width = min64(kTile.wide_panels, panels.end - j);
    const bool tail = (j + width) * kPanel > p.c;
    const int64_t tallest = width <= kTile.panels ? kTile.max_rows : kTile.wide_rows;
    for (int64_t n = rows.begin, height; n < rows.end; n += height) {
      height = ceil_div(rows.end - n, ceil_div(rows.end - n, tallest));
      products[height - 1][tail][width - 1](p, n, j * kPanel);
    }
  }
}

namespace {

// One row of the kernel, one row of outputs, 16 channels: up to kTaps taps along w.
template <DType T, int N>
void add_row(const DepthwiseWeightSum& p, const void* x, const void* dy, int64_t first, int n, float* sum) {
  Vec acc[N];
  PBM_UNROLL for (int q = 0; q < N; q++) acc[q] = load(sum + q * kWidth);
  for (int64_t w = 0; w < p.out[2]; w++) {
    const Vec g = load16_n<T>(dy, w * p.dy.stride[2], n);
    const int64_t at = first + w * p.stride[2];
    PBM_UNROLL for (int q = 0; q < N; q++) {
      const int64_t column = at + q * p.dilation[2];
      if (static_cast<uint64_t>(column) < static_cast<uint64_t>(p.x.size[2]))
        acc[q] = fmadd(load16_n<T>(x, column * p.x.stride[2], n), g, acc[q]);
    }
  }
  PBM_UNROLL for (int q = 0; q < N; q++) store(sum + q * kWidth, acc[q]);
}

using RowFn = void (*)(const DepthwiseWeightSum&, const void* x, const void* dy, int64_t first, int n, float* sum);
#define PBM_TAPS(T) \
  {add_row<T, 1>, add_row<T, 2>, add_row<T, 3>, add_row<T, 4>, add_row<T, 5>, add_row<T, 6>, add_row<T, 7>}

}  // namespace

// Blocks of sixteen channels.
void depthwise_weight_sum(const DepthwiseWeightSum& p, Range blocks) {
  static const RowFn add[3][kTaps] = {PBM_TAPS(DType::f32), PBM_TAPS(DType::bf16), PBM_TAPS(DType::f16)};
  note_kernel("conv_depthwise_weight_gradient." PBM_TIER_NAME);
  const int64_t size = size_of(p.dtype), taps = p.kernel[0] * p.kernel[1] * p.kernel[2];
  const auto address = [&](const ConvImage& image, int64_t n, int64_t d, int64_t h, int64_t c) {
    const int64_t at = n * image.batch_stride + d * image.stride[0] + h * image.stride[1] + c;
    return static_cast<const char*>(image.data) + at * size;
  };
  for (int64_t block = blocks.begin; block < blocks.end; block++) {
    const int64_t c = block * kWidth;
    const int channels = static_cast<int>(min64(kWidth, p.channels - c));
    for (int64_t n = 0; n < p.batch; n++)
      for (int64_t d = 0; d < p.out[0]; d++)
        for (int64_t h = 0; h < p.out[1]; h++)
          for (int64_t i = 0; i < p.kernel[0]; i++)
            for (int64_t j = 0; j < p.kernel[1]; j++) {
              const int64_t at_d = d * p.stride[0] - p.pad[0] + i * p.dilation[0];
              const int64_t at_h = h * p.stride[1] - p.pad[1] + j * p.dilation[1];
              if (at_d < 0 || at_d >= p.x.size[0] || at_h < 0 || at_h >= p.x.size[1]) continue;
              const char* x = address(p.x, n, at_d, at_h, c);
              const char* dy = address(p.dy, n, d, h, c);
              float* sum = p.sum + (block * taps + (i * p.kernel[1] + j) * p.kernel[2]) * kWidth;
              for (int64_t q = 0; q < p.kernel[2]; q += kTaps) {
                const int64_t count = min64(kTaps, p.kernel[2] - q);
                add[static_cast<int>(p.dtype)][count - 1](p, x, dy, q * p.dilation[2] - p.pad[2], channels,
                                                          sum + q * kWidth);
              }
            }
  }
}

}  // namespace pbm::PBM_TIER

// Transposed convolutions to few channels, innermost: what a pixel gives to a row of outputs, taps and channels side by
// side, is one row of a product; rows of neighbouring pixels overlap and are added up in L1. Channels alone would leave
// most lanes empty, and an output would multiply the zeros around the image too.
#include "common/scratch.h"
#include "cpu/kernels/convert.h"
#include "cpu/kernels/tile.h"

namespace pbm::PBM_TIER {
namespace {

// Some pixels of a row times a row of taps, over those rows of dy that the output sees.
struct SpreadTile {
  const float* const* dy;  // the first pixel of each row
  const float* const* weight;
  int64_t rows;
  int64_t n, pixel;  // floats of a pixel, and to the next
  int last;          // lanes of the last vector
  float* out;
  int64_t out_pixel;
};

template <int MR, int NV>
void spread(const SpreadTile& p) {
  using D = Dot<Flavour::f32>;
  Vec acc[MR][NV];
  PBM_UNROLL for (int i = 0; i < MR; i++) PBM_UNROLL for (int j = 0; j < NV; j++) acc[i][j] = zero();
  for (int64_t row = 0; row < p.rows; row++) {
    const char* a[MR];
    PBM_UNROLL for (int i = 0; i < MR; i++) a[i] = reinterpret_cast<const char*>(p.dy[row] + i * p.pixel);
    const char* b = reinterpret_cast<const char*>(p.weight[row]);
    for (int64_t k = 0; k < p.n; k++, b += NV * kGroupBytes) multiply_rows<D, MR, NV>(acc, a, k * 4, b, kGroupBytes);
  }
  PBM_UNROLL for (int i = 0; i < MR; i++) {
    PBM_UNROLL for (int j = 0; j + 1 < NV; j++) store(p.out + i * p.out_pixel + j * kWidth, acc[i][j]);
    // Beyond the taps a NaN times a zero of the weight would reach outputs that do not see it.
    store_n(p.out + i * p.out_pixel + (NV - 1) * kWidth, acc[i][NV - 1], p.last);
  }
}

using SpreadFn = void (*)(const SpreadTile&);

template <int MR, int NV>
constexpr SpreadFn spread_or_null() {
  if constexpr (MR <= (NV <= kTile.panels ? kTile.max_rows : kTile.wide_rows)) return spread<MR, NV>;
  return nullptr;
}

#define PBM_SPREADS(MR) {spread_or_null<MR, 1>(), spread_or_null<MR, 2>(), spread_or_null<MR, 3>()}
constexpr SpreadFn kSpreads[8][kSpreadVectors] = {PBM_SPREADS(1), PBM_SPREADS(2), PBM_SPREADS(3), PBM_SPREADS(4),
                                                  PBM_SPREADS(5), PBM_SPREADS(6), PBM_SPREADS(7), PBM_SPREADS(8)};

}  // namespace

// Rows (image, h) of outputs.
void conv_spread(const ConvSpread& p, int64_t begin, int64_t end) {
  note_kernel("conv_spread." PBM_TIER_NAME);
  const int64_t taps = p.kernel_w * p.c, vectors = ceil_div(taps, kWidth), pixels = p.dy.size[2];
  const int64_t patch = (vectors + 1) * kWidth, step = p.stride_w * p.c, before = p.pad_w * p.c, row = p.out_w * p.c;
  const float** dy = static_cast<const float**>(
      scratch(ScratchSlot::a_rows, static_cast<size_t>(2 * p.kernel_h) * sizeof(const float*)));
  const float** weight = dy + p.kernel_h;
  const size_t bytes = static_cast<size_t>(pixels * patch + kWidth) * sizeof(float);
  float* patches = static_cast<float*>(scratch(ScratchSlot::accumulators, bytes));
  std::memset(patches, 0, bytes);  // each patch stays between zeros
  patches += kWidth;
  const int64_t tallest = vectors <= kTile.panels ? kTile.max_rows : kTile.wide_rows;
  for (int64_t r = begin; r < end; r++) {
    const int64_t image = r / p.out_h, h = r % p.out_h;
    int64_t count = 0;
    for (int64_t i = 0; i < p.kernel_h; i++) {
      const int64_t at = h + p.pad_h - i * p.dilation_h;
      if (at < 0 || at % p.stride_h || at / p.stride_h >= p.dy.size[1]) continue;
      dy[count] = static_cast<const float*>(p.dy.data) + image * p.dy.batch_stride + at / p.stride_h * p.dy.stride[1];
      weight[count++] = p.weight + i * p.n * vectors * kWidth;
    }
    for (int64_t w = 0, height; w < pixels; w += height) {
      height = ceil_div(pixels - w, ceil_div(pixels - w, tallest));
      kSpreads[height - 1][vectors - 1]({dy, weight, count, p.n, p.dy.stride[2],
                                         static_cast<int>(taps - (vectors - 1) * kWidth), patches + w * patch, patch});
      for (int64_t i = 0; i < count; i++) dy[i] += height * p.dy.stride[2];
    }
    with_float_dtype(p.dtype, [&]<DType T>() {
      for (int64_t o = 0; o < row; o += kWidth) {
        // Patch w lies at w·step − before.
        const int64_t first = max64(o + before - taps + step, 0) / step;
        const int64_t last = min64((o + before + kWidth - 1) / step, pixels - 1);
        Vec sum = zero();
        for (int64_t w = first; w <= last; w++) sum = add(sum, load(patches + w * patch + o + before - w * step));
        store16_n<T>(p.out, r * row + o, sum, static_cast<int>(min64(kWidth, row - o)));
      }
    });
  }
}

}  // namespace pbm::PBM_TIER

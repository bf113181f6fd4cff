// Convolution of few channels, plane by plane: sixteen pixels of a row at a time, a few output channels beside each
// other. Where channels fill no vector, pixels do.
#include "common/scratch.h"
#include "cpu/kernels/convert.h"
#include "cpu/kernels/impl.h"
#include "cpu/kernels/vecmath.h"

namespace pbm::PBM_TIER {
namespace {

constexpr int kVectors = 3;  // of pixels in a tile
constexpr int kChannels = 8;
constexpr int kTaps = 5;  // of a row of the kernel, in a tile of a weight gradient

// The planes of one image in fp32, rows with zeros around them, so that every load is one.
class Planes {
 public:
  Planes(const ConvPlanes& p, Range rows) : p_(p) {
    first_ = rows.begin * p.stride_h - p.pad_h;
    height_ = (rows.end - rows.begin - 1) * p.stride_h + (p.kernel_h - 1) * p.dilation_h + 1;
    row_ = ceil_div(p.out_w, kWidth) * kWidth + (p.kernel_w - 1) * p.dilation_w;
    const size_t bytes = static_cast<size_t>(p.c * height_ * row_) * sizeof(float);
    data_ = static_cast<float*>(scratch(ScratchSlot::a_rows, bytes));
    std::memset(data_, 0, bytes);
  }

  void fill(int64_t image) {
    const int64_t skipped = max64(-p_.pad_w, 0);  // of a row, with a negative padding
    const int64_t columns = min64(p_.w - skipped, row_ - max64(p_.pad_w, 0));
    for (int64_t c = 0; c < p_.c; c++)
      for (int64_t h = max64(first_, 0); h < min64(first_ + height_, p_.h); h++) {
        const int64_t from = image * p_.x_batch + c * p_.x_channel + h * p_.x_row + skipped;
        float* to = data_ + (c * height_ + h - first_) * row_ + max64(p_.pad_w, 0);
        with_float_dtype(p_.dtype, [&]<DType T>() {
          for (int64_t w = 0; w < columns; w += kWidth) {
            const int n = static_cast<int>(min64(kWidth, columns - w));
            store_n(to + w, load16_n<T>(p_.x, from + w, n), n);
          }
        });
      }
  }

  // Where tap (0, 0) of an output row, counted from the first, reads channel c.
  const float* at(int64_t c, int64_t row) const { return data_ + (c * height_ + row * p_.stride_h) * row_; }
  int64_t row() const { return row_; }

 private:
  const ConvPlanes& p_;
  int64_t first_, height_, row_;
  float* data_;
};

// Some vectors of pixels times some output channels; x: of channel 0.
template <int KB, int NV>
void tile(const ConvPlanes& p, const float* const* x, int64_t plane, int64_t row, const float* weight, float* out) {
  Vec acc[KB][NV];
  PBM_UNROLL for (int k = 0; k < KB; k++) PBM_UNROLL for (int v = 0; v < NV; v++) acc[k][v] = zero();
  for (int64_t c = 0; c < p.c; c++)
    for (int64_t i = 0; i < p.kernel_h; i++) {
      const int64_t at = c * plane + i * p.dilation_h * row;
      for (int64_t j = 0; j < p.kernel_w; j++, weight += kChannels) {
        Vec pixels[NV];
        PBM_UNROLL for (int v = 0; v < NV; v++) pixels[v] = load(x[v] + at + j * p.dilation_w);
        PBM_UNROLL for (int k = 0; k < KB; k++) {
          const Vec w = set1(weight[k]);
          PBM_UNROLL for (int v = 0; v < NV; v++) acc[k][v] = fmadd(w, pixels[v], acc[k][v]);
        }
      }
    }
  PBM_UNROLL for (int k = 0; k < KB; k++) PBM_UNROLL for (int v = 0; v < NV; v++)
    store(out + (k * NV + v) * kWidth, acc[k][v]);
}

using TileFn = void (*)(const ConvPlanes&, const float* const*, int64_t, int64_t, const float*, float*);
#define PBM_VECTORS(KB) {tile<KB, 1>, tile<KB, 2>, tile<KB, 3>}
constexpr TileFn kTiles[kChannels][kVectors] = {PBM_VECTORS(1), PBM_VECTORS(2), PBM_VECTORS(3), PBM_VECTORS(4),
                                                PBM_VECTORS(5), PBM_VECTORS(6), PBM_VECTORS(7), PBM_VECTORS(8)};

Vec activated(Activation a, Vec y, float slope) {
  switch (a) {
    case Activation::relu: return activate<Activation::relu>(y, slope);
    case Activation::gelu_erf: return activate<Activation::gelu_erf>(y, slope);
    case Activation::gelu_tanh: return activate<Activation::gelu_tanh>(y, slope);
    case Activation::silu: return activate<Activation::silu>(y, slope);
    case Activation::relu6: return activate<Activation::relu6>(y, slope);
    case Activation::hardswish: return activate<Activation::hardswish>(y, slope);
    case Activation::leaky_relu: return activate<Activation::leaky_relu>(y, slope);
    default: return y;
  }
}

// Sums of one channel's pixels to the output.
template <DType T>
PBM_INLINE void put(const ConvPlanes& p, int64_t at, float bias, const float* sums, int n) {
    Vec y = load(sums);
    if (p.bias) y = add(y, set1(bias));
    if (p.residual) y = add(y, load16_n<T>(p.residual, at, n));
    store16_n<T>(p.out, at, activated(p.activation, y, p.slope), n);
}

}  // namespace

// Rows of outputs of one image.
void conv_planes(const ConvPlanes& p, int64_t image, Range rows) {
  note_kernel("conv_planes." PBM_TIER_NAME);
  Planes planes(p, rows);
  planes.fill(image);
  const int64_t across = ceil_div(p.out_w, kWidth), vectors = (rows.end - rows.begin) * across;
  const int64_t plane = p.c ? planes.at(1, 0) - planes.at(0, 0) : 0, taps = p.kernel_h * p.kernel_w;
  alignas(64) float sums[kChannels * kVectors * kWidth];
  float biases[kChannels] = {};
  for (int64_t k = 0; k < p.n; k += kChannels) {
    const int64_t channels = min64(kChannels, p.n - k);
    if (p.bias)
      with_float_dtype(p.bias_dtype, [&]<DType B>() {
        store_n(biases, load16_n<B>(p.bias, k, static_cast<int>(channels)), static_cast<int>(channels));
      });
    for (int64_t v = 0; v < vectors; v += kVectors) {
      const int64_t count = min64(kVectors, vectors - v);
      const float* x[kVectors];
      for (int64_t i = 0; i < count; i++) x[i] = planes.at(0, (v + i) / across) + (v + i) % across * kWidth;
      kTiles[channels - 1][count - 1](p, x, plane, planes.row(), p.weight + k * p.c * taps, sums);
      with_float_dtype(p.dtype, [&]<DType T>() {
        for (int64_t i = 0; i < count; i++) {
          const int64_t w = (v + i) % across * kWidth, h = rows.begin + (v + i) / across;
          const int n = static_cast<int>(min64(kWidth, p.out_w - w));
          for (int64_t q = 0; q < channels; q++) {
            const int64_t at = ((image * p.n + k + q) * p.out_h + h) * p.out_w + w;
            put<T>(p, at, biases[q], sums + (q * count + i) * kWidth, n);
          }
        }
      });
    }
  }
}

namespace {

// Filters [k, k + KB) and taps [j, j + NT) of one row of the kernel, over all rows of outputs; sums of lanes.
template <int KB, int NT>
void gradient_tile(const ConvPlanes& p, const float* x, int64_t x_row, const float* dy, int64_t dy_plane, int64_t dy_row,
                   float* sums, int64_t sums_k) {
  Vec acc[KB][NT];
  PBM_UNROLL for (int k = 0; k < KB; k++) PBM_UNROLL for (int j = 0; j < NT; j++)
    acc[k][j] = load(sums + k * sums_k + j * kWidth);
  for (int64_t h = 0; h < p.out_h; h++)
    for (int64_t w = 0; w < p.out_w; w += kWidth) {
      const int n = static_cast<int>(min64(kWidth, p.out_w - w));
      const float *pixels = x + h * p.stride_h * x_row + w, *g = dy + h * dy_row + w;
      Vec v[NT];
      PBM_UNROLL for (int j = 0; j < NT; j++) v[j] = load_n(pixels + j * p.dilation_w, n);
      PBM_UNROLL for (int k = 0; k < KB; k++) {
        const Vec d = load_n(g + k * dy_plane, n);
        PBM_UNROLL for (int j = 0; j < NT; j++) acc[k][j] = fmadd(d, v[j], acc[k][j]);
      }
    }
  PBM_UNROLL for (int k = 0; k < KB; k++) PBM_UNROLL for (int j = 0; j < NT; j++)
    store(sums + k * sums_k + j * kWidth, acc[k][j]);
}

using GradientFn = void (*)(const ConvPlanes&, const float*, int64_t, const float*, int64_t, int64_t, float*, int64_t);
#define PBM_GRADIENTS(KB) \
  {gradient_tile<KB, 1>, gradient_tile<KB, 2>, gradient_tile<KB, 3>, gradient_tile<KB, 4>, gradient_tile<KB, 5>}
constexpr GradientFn kGradients[4][kTaps] = {PBM_GRADIENTS(1), PBM_GRADIENTS(2), PBM_GRADIENTS(3), PBM_GRADIENTS(4)};

}  // namespace

// Adds the products of images [begin, end) to sums [n][c][tap][16], whose lanes are to be added up; dy: [n][h][w], dense.
void conv_planes_gradient(const ConvPlanes& p, const void* dy, Range images, float* sums) {
  note_kernel("conv_planes_weight_gradient." PBM_TIER_NAME);
  Planes planes(p, {0, p.out_h});
  const int64_t taps = p.kernel_h * p.kernel_w, pixels = p.out_h * p.out_w, sums_k = p.c * taps * kWidth;
  float* gradients = static_cast<float*>(
      scratch(ScratchSlot::accumulators, static_cast<size_t>(p.n * pixels + kWidth) * sizeof(float)));
  for (int64_t image = images.begin; image < images.end; image++) {
    planes.fill(image);
    const float* g = gradients;
    if (p.dtype == DType::f32)
      g = static_cast<const float*>(dy) + image * p.n * pixels;
    else
      with_float_dtype(p.dtype, [&]<DType T>() {
        for (int64_t i = 0; i < p.n * pixels; i += kWidth) {
          const int n = static_cast<int>(min64(kWidth, p.n * pixels - i));
          store_n(gradients + i, load16_n<T>(dy, image * p.n * pixels + i, n), n);
        }
      });
    for (int64_t c = 0; c < p.c; c++)
      for (int64_t i = 0; i < p.kernel_h; i++)
        for (int64_t j = 0; j < p.kernel_w; j += kTaps)
          for (int64_t k = 0, filters; k < p.n; k += filters) {
            filters = ceil_div(p.n - k, ceil_div(p.n - k, 4));
            const int64_t count = min64(kTaps, p.kernel_w - j);
            const float* x = planes.at(c, 0) + i * p.dilation_h * planes.row() + j * p.dilation_w;
            float* to = sums + k * sums_k + (c * taps + i * p.kernel_w + j) * kWidth;
            kGradients[filters - 1][count - 1](p, x, planes.row(), g + k * pixels, pixels, p.out_w, to, sums_k);
          }
  }
}

}  // namespace pbm::PBM_TIER

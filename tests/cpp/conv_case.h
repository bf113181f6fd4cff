// Random convolutions for the tests of their kernels: images and weights of exactly their size, with NaN in the gaps
// between pixels, and what comes out in double, by plain loops.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels/conv_algorithm.h"
#include "cpu/kernels/tiers.h"
#include "epilogue_case.h"

namespace pbm::test {

// Elements (batch, d, h, w, channel) of any strides.
struct Image {
  DType dtype = DType::f32;
  int64_t batch = 0, channels = 0, size[3] = {};
  int64_t batch_stride = 0, channel_stride = 1, stride[3] = {};
  Exact memory;

  int64_t offset(int64_t b, int64_t d, int64_t h, int64_t w, int64_t c) const {
    return b * batch_stride + d * stride[0] + h * stride[1] + w * stride[2] + c * channel_stride;
  }
  double at(int64_t b, int64_t d, int64_t h, int64_t w, int64_t c) const {
    return get(dtype, memory.data(), offset(b, d, h, w, c));
  }
  int64_t pixels() const { return batch * size[0] * size[1] * size[2]; }
  ConvImage view() const {
    return {memory.data(), {size[0], size[1], size[2]}, batch_stride, {stride[0], stride[1], stride[2]}};
  }
  template <class F>
  void each(const F& f) const {
    for (int64_t b = 0; b < batch; b++)
      for (int64_t d = 0; d < size[0]; d++)
        for (int64_t h = 0; h < size[1]; h++)
          for (int64_t w = 0; w < size[2]; w++)
            for (int64_t c = 0; c < channels; c++) f(b, d, h, w, c);
  }
};

enum class Gaps { none, pixels, all };  // beside nothing, each pixel, also each row

inline Image image_of(Rng& rng, DType dtype, int64_t batch, int64_t channels, const int64_t (&size)[3], Gaps gaps,
                      bool planes = false) {
  Image x;
  x.dtype = dtype;
  x.batch = batch;
  x.channels = channels;
  const auto gap = [&] { return gaps == Gaps::all && rng.chance(2) ? rng.below(4) : 0; };
  int64_t stride = planes ? 1 : channels + (gaps == Gaps::none ? 0 : rng.below(4));
  for (int axis = 2; axis >= 0; axis--) {
    x.size[axis] = size[axis];
    x.stride[axis] = stride;
    stride = stride * size[axis] + gap();
  }
  x.channel_stride = planes ? stride : 1;
  x.batch_stride = planes ? stride * channels + gap() : stride;
  const int64_t count =
      x.pixels() * channels == 0 ? 0 : x.offset(batch - 1, size[0] - 1, size[1] - 1, size[2] - 1, channels - 1) + 1;
  x.memory = Exact(count * size_of(dtype), rng.chance(2) ? size_of(dtype) : 0, 0xff);  // floats: NaN
  return x;
}

inline Image random_image(Rng& rng, DType dtype, int64_t batch, int64_t channels, const int64_t (&size)[3], Gaps gaps,
                          bool planes = false) {
  Image x = image_of(rng, dtype, batch, channels, size, gaps, planes);
  x.each([&](int64_t b, int64_t d, int64_t h, int64_t w, int64_t c) {
    const float value = dtype == DType::u8 ? static_cast<float>(rng.below(256)) : rng.value();
    put(dtype, x.memory.data(), x.offset(b, d, h, w, c), value);
  });
  return x;
}

struct ConvCase : EpilogueOperands {
  ConvShape s{};
  bool transposed = false;  // the input spread by the stride, as the gradient of a convolution is
  int64_t out[3] = {};
  Gemm g{};
  Image x, y;
  DType weight_dtype = DType::f32;
  Exact weight;  // [output channel][tap][c]
  float x_scale = 0;
  int32_t x_zero = 0;

  // Where tap t of output o reads the input along an axis; −1: beside it.
  int64_t reads(int axis, int64_t o, int64_t t) const {
    const int64_t step = s.stride[axis], along = t * s.dilation[axis];
    const int64_t at = transposed ? o + s.pad[axis] - along : o * step - s.pad[axis] + along;
    if (at < 0 || (transposed && at % step)) return -1;
    const int64_t pixel = transposed ? at / step : at;
    return pixel < s.in[axis] ? pixel : -1;
  }
  double weight_at(int64_t channel, int64_t tap, int64_t c) const {
    return get(weight_dtype, weight.data(), (channel * s.taps() + tap) * s.c + c);
  }

  // f(x, weight) of what one output sums.
  template <class F>
  void over(int64_t b, const int64_t (&o)[3], int64_t channel, const F& f) const {
    int64_t tap = 0;
    for (int64_t i = 0; i < s.kernel[0]; i++)
      for (int64_t j = 0; j < s.kernel[1]; j++)
        for (int64_t q = 0; q < s.kernel[2]; q++, tap++) {
          const int64_t d = reads(0, o[0], i), h = reads(1, o[1], j), w = reads(2, o[2], q);
          if (d < 0 || h < 0 || w < 0) continue;
          for (int64_t c = 0; c < s.c; c++) f(x.at(b, d, h, w, channel / s.n * s.c + c), weight_at(channel, tap, c));
        }
  }

  int64_t rows() const { return s.batch * out[0] * out[1] * out[2]; }
  double steps() const { return static_cast<double>(rows() * s.n_all()) * static_cast<double>(s.taps() * s.c); }

  // Every output (pixel, channel). bound_of(channel, size): how far its sum may be off, where the products' magnitudes
  // add up to size.
  template <class F>
  std::vector<Expected> expected(const F& bound_of) const {
    std::vector<Expected> all;
    for (int64_t row = 0; row < rows(); row++) {
      const int64_t o[3] = {row / (out[1] * out[2]) % out[0], row / out[2] % out[1], row % out[2]};
      for (int64_t j = 0; j < s.n_all(); j++) {
        double sum = 0, size = 0;
        over(row / (out[0] * out[1] * out[2]), o, j, [&](double v, double w) {
          sum += (v - x_zero) * w;
          size += std::fabs(v * w);
        });
        if (g.flavour == Flavour::u8s8) sum *= static_cast<double>(x_scale) * static_cast<double>(g.col_scale[j]);
        all.push_back(finished(g, row, j, sum, bound_of(j, g.flavour == Flavour::u8s8 ? std::fabs(sum) : size)));
      }
    }
    return all;
  }

  std::string describe() const {
    char text[400];
    const auto l = [](int64_t v) { return static_cast<long long>(v); };
    std::snprintf(text, sizeof text,
                  "%s%s, %lld of %lld×%lld channels %lldx%lldx%lld, n %lld, kernel %lldx%lldx%lld, stride %lld %lld "
                  "%lld, pad %lld %lld %lld (%lld %lld %lld), dilation %lld %lld %lld, C %s, act %d%s%s%s",
                  name(g.flavour), transposed ? " transposed" : "", l(s.batch), l(s.groups), l(s.c), l(s.in[0]),
                  l(s.in[1]), l(s.in[2]), l(s.n), l(s.kernel[0]), l(s.kernel[1]), l(s.kernel[2]), l(s.stride[0]),
                  l(s.stride[1]), l(s.stride[2]), l(s.pad[0]), l(s.pad[1]), l(s.pad[2]), l(s.pad_end[0]),
                  l(s.pad_end[1]), l(s.pad_end[2]), l(s.dilation[0]), l(s.dilation[1]), l(s.dilation[2]),
                  name(g.c_dtype), static_cast<int>(g.activation), g.bias ? ", bias" : "",
                  g.residual ? ", residual" : "", g.residual_first ? " first" : "");
    return text;
  }
};

// Sizes of one axis that reach edges: one pixel, a stride beyond the kernel, a padding of one side, beyond the kernel, or
// negative at the end, where outputs are left out.
inline void choose_axis(Rng& rng, ConvShape& s, int axis, int64_t longest) {
  constexpr int64_t kKernels[] = {1, 1, 2, 3, 3, 5};
  s.in[axis] = rng.chance(4) ? 1 : rng.between(1, longest);
  s.kernel[axis] = rng.of(kKernels);
  s.stride[axis] = rng.chance(2) ? 1 : rng.between(1, 3);
  s.dilation[axis] = rng.chance(4) ? 2 : 1;
  s.pad[axis] = rng.below(s.kernel[axis] + 1);
  s.pad_end[axis] = rng.chance(2) ? s.pad[axis] : rng.between(rng.chance(4) ? -3 : 0, s.kernel[axis]);
}

inline ConvShape plain_shape() {
  ConvShape s{};
  s.batch = s.groups = s.c = s.n = 1;
  for (int axis = 0; axis < 3; axis++) s.in[axis] = s.kernel[axis] = s.stride[axis] = s.dilation[axis] = 1;
  return s;
}

// Floats, bytes where the kernel knows them, and often fp32, which some kernels write from registers.
inline void choose_y_dtype(Rng& rng, Gemm& g, bool bytes) {
  choose_c_dtype(rng, g);
  if (rng.chance(3) || (g.c_dtype == DType::u8 && !bytes)) g.c_dtype = DType::f32;
}

// The output, the epilogue and the operands of a shape; `values`: of the image, `weights`: of the filters.
inline void choose_operands(Rng& rng, ConvCase& c, DType values, DType weights, Gaps x_gaps, Gaps y_gaps) {
  const ConvShape& s = c.s;
  c.x = random_image(rng, values, s.batch, s.c_all(), s.in, x_gaps);
  c.weight_dtype = weights;
  c.weight = random_elements(rng, weights, s.n_all() * s.taps() * s.c);
  if (c.g.flavour == Flavour::u8s8) {
    c.x_scale = 0.01f + std::fabs(rng.value()) / 64;
    c.x_zero = c.transposed ? 0 : static_cast<int32_t>(rng.below(256));  // sums of columns are those of all taps
  }
  c.g.n = s.n;
  choose_epilogue(rng, c.g, c, c.rows(), s.n_all());
  if (rng.chance(3)) c.g.activation = rng.chance(2) ? Activation::relu : Activation::relu6;  // likewise
  c.y = image_of(rng, c.g.c_dtype, s.batch, s.n_all(), c.out, y_gaps);
  c.g.c = c.y.memory.data();
  c.g.c_row = c.y.stride[2];
}

// Some NaN and infinities, and an epilogue that says what becomes of them.
inline void poison(Rng& rng, ConvCase& c) {
  const int64_t pixels = c.x.pixels() * c.x.channels;
  if (pixels == 0 || c.x.dtype == DType::u8) return;
  constexpr Activation kDefined[] = {Activation::none, Activation::relu, Activation::relu6, Activation::leaky_relu};
  c.g.activation = rng.of(kDefined);
  for (float bad : {NAN, INFINITY, -INFINITY}) {
    const int64_t i = rng.below(pixels), pixel = i / c.x.channels, *size = c.x.size;
    const int64_t at = c.x.offset(pixel / (size[0] * size[1] * size[2]), pixel / (size[1] * size[2]) % size[0],
                                  pixel / size[2] % size[1], pixel % size[2], i % c.x.channels);
    if (rng.chance(2)) put(c.x.dtype, c.x.memory.data(), at, bad);
  }
}

constexpr unsigned char kGuard = 0xa5;

inline void clear(const Image& y) { std::memset(y.memory.data(), kGuard, static_cast<size_t>(y.memory.bytes())); }

// That an image has the elements expected, in the order of each(), and that nothing was written between them.
inline void check_image(const Image& y, const std::vector<Expected>& expected, Isa isa, const std::string& what) {
  std::vector<char> element(static_cast<size_t>(y.memory.bytes()));
  size_t i = 0;
  y.each([&](int64_t b, int64_t d, int64_t h, int64_t w, int64_t c) {
    const int64_t at = y.offset(b, d, h, w, c), size = size_of(y.dtype);
    const double got = get(y.dtype, y.memory.data(), at);
    const Expected& e = expected[i++];
    CHECK(e.admits(got), "%s: %s: (%lld, %lld, %lld, %lld, %lld) is %.9g, expected %.9g ± %.2g", isa_name(isa),
          what.c_str(), (long long)b, (long long)d, (long long)h, (long long)w, (long long)c, got, e.y, e.bound);
    for (int64_t q = 0; q < size; q++) element[static_cast<size_t>(at * size + q)] = 1;
  });
  for (size_t at = 0; at < element.size(); at++)
    CHECK(element[at] || static_cast<unsigned char>(y.memory.data()[at]) == kGuard,
          "%s: %s: wrote to byte %lld between", isa_name(isa), what.c_str(), (long long)at);
}

inline std::vector<char> bytes_of(const Image& y) { return {y.memory.data(), y.memory.data() + y.memory.bytes()}; }

// Bit by bit, but for which NaN it is.
inline bool same(const Image& y, const std::vector<char>& before) {
  bool all = true;
  y.each([&](int64_t b, int64_t d, int64_t h, int64_t w, int64_t c) {
    const int64_t at = y.offset(b, d, h, w, c), size = size_of(y.dtype);
    const char* now = y.memory.data() + at * size;
    all = all && (std::memcmp(now, &before[static_cast<size_t>(at * size)], static_cast<size_t>(size)) == 0 ||
                  (std::isnan(get(y.dtype, now, 0)) && std::isnan(get(y.dtype, before.data(), at))));
  });
  return all;
}

// A range in parts, at multiples of a unit.
inline std::vector<Range> cut(Rng& rng, int64_t total, int64_t unit) {
  std::vector<Range> parts;
  for (int64_t at = 0; at < total;) {
    const int64_t units = ceil_div(total - at, unit), take = rng.chance(3) ? units : rng.between(1, units);
    const int64_t end = at + take * unit < total ? at + take * unit : total;
    parts.push_back({at, end});
    at = end;
  }
  return parts;
}

}  // namespace pbm::test

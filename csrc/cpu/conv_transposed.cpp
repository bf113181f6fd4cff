// Transposed convolutions: convolutions turned around, or one grid for each remainder of the outputs by the strides.
#include <algorithm>

#include "cpu/conv_run.h"

namespace pbm {
namespace {

// Taps t of a kernel that output r + j·stride of a transposed convolution meets, and the inputs j + at that they read.
struct Phase {
  std::vector<int64_t> taps, at;

  Phase(const ConvShape& s, int axis, int64_t r) {
    for (int64_t t = 0; t < s.kernel[axis]; t++) {
      const int64_t distance = r + s.pad[axis] - t * s.dilation[axis];
      if (distance % s.stride[axis]) continue;
      taps.push_back(t);
      at.push_back(distance / s.stride[axis]);
    }
  }
};

// Each remainder of the outputs by the strides that there is.
template <class F>
void over_phases(const ConvShape& s, const F& f) {
  int64_t count[3];
  for (int axis = 0; axis < 3; axis++) count[axis] = std::min<int64_t>(s.stride[axis], s.in[axis]);
  for (int64_t d = 0; d < count[0]; d++)
    for (int64_t h = 0; h < count[1]; h++)
      for (int64_t w = 0; w < count[2]; w++) {
        const int64_t first[3] = {d, h, w};
        const Phase phases[3] = {{s, 0, d}, {s, 1, h}, {s, 2, w}};
        f(first, phases);
      }
}

int64_t count_from(int64_t first, int64_t size, int64_t stride) {
  return first < size ? ceil_div(size - first, stride) : 0;
}

void transposed_direct(const ConvShape& s, const Conv& conv) {
  over_phases(s, [&](const int64_t (&first)[3], const Phase(&phases)[3]) {
    ConvGrid grid{};
    std::vector<ConvTap> taps;
    for (size_t i = 0; i < phases[0].taps.size(); i++)
      for (size_t j = 0; j < phases[1].taps.size(); j++)
        for (size_t q = 0; q < phases[2].taps.size(); q++)
          taps.push_back({{phases[0].at[i], phases[1].at[j], phases[2].at[q]},
                          (phases[0].taps[i] * s.kernel[1] + phases[1].taps[j]) * s.kernel[2] + phases[2].taps[q]});
    for (int axis = 0; axis < 3; axis++) {
      grid.out_begin[axis] = first[axis];
      grid.out_step[axis] = s.stride[axis];
      grid.count[axis] = count_from(first[axis], conv.out[axis], s.stride[axis]);
      grid.in_step[axis] = 1;
    }
    grid.taps = taps.data();
    grid.tap_count = static_cast<int64_t>(taps.size());
    run_grid(s, conv, grid);
  });
}

// Each phase is a convolution of stride 1 with a part of the kernel, turned around. Dilation 1.
void transposed_depthwise(const ConvShape& s, const Conv& whole, const Filters& f, DType dtype) {
  over_phases(s, [&](const int64_t (&first)[3], const Phase(&phases)[3]) {
    ConvShape part = s;
    Filters turned = f;
    Depthwise p = depthwise_of(s, whole, dtype);
    int64_t tap = 0, out = 0;
    for (int axis = 0; axis < 3; axis++) {
      const Phase& phase = phases[axis];
      const int64_t count = static_cast<int64_t>(phase.taps.size());
      part.kernel[axis] = p.kernel[axis] = count;
      p.stride[axis] = p.dilation[axis] = 1;
      p.pad[axis] = count ? -phase.at[count - 1] : 0;
      p.conv.out[axis] = count_from(first[axis], whole.out[axis], s.stride[axis]);
      tap += count ? phase.taps[count - 1] * f.kernel[axis] : 0;
      turned.kernel[axis] = -s.stride[axis] * f.kernel[axis];
      out += first[axis] * p.out_stride[axis];
      p.out_stride[axis] *= s.stride[axis];
    }
    turned.data = static_cast<const char*>(f.data) + tap * size_of(f.dtype);
    const Tensor packed = pack_filters(part, Flavour::f32, ConvAlgorithm::depthwise, turned);
    p.conv.weight = packed.const_data_ptr();
    p.conv.taps = part.taps();
    p.conv.out_rows.c = static_cast<char*>(whole.out_rows.c) + out * size_of(whole.out_rows.c_dtype);
    if (p.conv.out[0] * p.conv.out[1] * p.conv.out[2] > 0) run_depthwise(p);
  });
}

// The convolution of stride 1 that a transposed one of stride 1 is; whether its padding is one.
bool as_convolution(const ConvShape& s, const int64_t (&size)[3], ConvShape* turned) {
  *turned = s;
  turned->c = s.n;
  turned->n = s.c;
  for (int axis = 0; axis < 3; axis++) {
    const int64_t reach = (s.kernel[axis] - 1) * s.dilation[axis];
    turned->in[axis] = size[axis];
    turned->pad[axis] = reach - s.pad[axis];
    turned->pad_end[axis] = s.in[axis] - size[axis] - turned->pad[axis] + reach;
    if (s.stride[axis] != 1 || turned->pad[axis] < 0 || turned->pad_end[axis] < 0) return false;
  }
  return true;
}

// Rows of taps, channels side by side, as the lanes: where channels alone would leave most of them empty.
bool may_spread(const ConvShape& s, Flavour flavour) {
  constexpr int64_t kLongest = 4096;  // of a row of pixels, whose products lie beside each other before they are summed
  return s.out(2) <= kLongest && flavour == Flavour::f32 && s.groups == 1 && s.in[0] == 1 && s.kernel[0] == 1 &&
         s.stride[0] == 1 && s.pad[0] == 0 && s.pad_end[0] == 0 && s.dilation[2] == 1 && s.c > 0 && s.c < kPanel &&
         s.kernel[2] > 1 && s.kernel[2] * s.c <= kSpreadVectors * kPanel;
}

// Pixels as the lanes instead; they multiply the zeros around the image too.
bool planes_are_fuller(const ConvShape& s, const ConvShape& turned) {
  const double inside = static_cast<double>(turned.in[1] * turned.in[2]) / static_cast<double>(s.in[1] * s.in[2]);
  return choose_conv(turned, Flavour::f32, true, true) == ConvAlgorithm::planes &&
         filled(s.in[2]) * inside > filled(s.kernel[2] * s.c);
}

std::vector<float> pack_for_spread(const ConvShape& s, const Filters& f) {
  const int64_t lanes = ceil_div(s.kernel[2] * s.c, kPanel) * kPanel;
  std::vector<float> packed(static_cast<size_t>(s.kernel[1] * s.n * lanes));
  for (int64_t i = 0; i < s.kernel[1]; i++)
    for (int64_t n = 0; n < s.n; n++)
      for (int64_t j = 0; j < s.kernel[2]; j++)
        for (int64_t c = 0; c < s.c; c++)
          packed[static_cast<size_t>((i * s.n + n) * lanes + j * s.c + c)] =
              value_of(f.data, f.dtype, n * f.n + c * f.c + i * f.kernel[1] + j * f.kernel[2]);
  return packed;
}

void transposed_spread(const ConvShape& s, const ConvImage& dy, const Filters& f, const Tensor& out) {
  const std::vector<float> packed = pack_for_spread(s, f);
  ConvSpread p{};
  static_cast<ConvWindow&>(p) = window_of(s);
  p.n = s.n;
  p.c = s.c;
  p.dy = dy;
  p.weight = packed.data();
  p.out = out.mutable_data_ptr();
  p.dtype = dtype_of(out);
  p.out_h = s.in[1];
  p.out_w = s.in[2];
  const int64_t rows = s.batch * p.out_h, products = s.batch * dy.size[1] * dy.size[2] * s.taps() * s.n * s.c;
  over_parts(rows, 1, threads_worth(products), [&](Range r) { kernels().conv_spread(p, r.begin, r.end); });
}

}  // namespace

Tensor run_transposed(const Tensor& input, const ConvShape& s, Flavour flavour, const Filters& f, bool exact,
                      const std::optional<Tensor>& bias, bool channels_last) {
  Filters swapped = f;  // its outputs are the inputs of the convolution
  swapped.n = f.c;
  swapped.c = f.n;
  int64_t size[3];  // that of s.out, but for an output_padding beyond the stride
  for (int axis = 0; axis < 3; axis++)
    size[axis] = axis_of(input.dim(), axis) < 0 ? 1 : input.size(axis_of(input.dim(), axis));
  ConvShape turned;
  const bool convolution = as_convolution(s, size, &turned);
  if (!bias && may_spread(s, flavour) && !(convolution && planes_are_fuller(s, turned))) {
    const OutputImage out(input.dim(), s.batch, s.c, s.in, input.scalar_type(), channels_last);
    if (out.out.numel() == 0) return out.out;
    const ImageView dy = image_of("input", input, size, DType::f32);
    transposed_spread(s, dy.image, f, out.rows);
    return out.finish();
  }
  if (convolution) {
    char* last = static_cast<char*>(const_cast<void*>(f.data));
    for (int axis = 0; axis < 3; axis++) {
      last += (s.kernel[axis] - 1) * f.kernel[axis] * size_of(f.dtype);
      swapped.kernel[axis] = -f.kernel[axis];
    }
    swapped.data = last;
    const bool planes = !channels_last || (may_spread(s, flavour) && planes_are_fuller(s, turned));
    const ConvAlgorithm algorithm = choose_conv(turned, flavour, exact, planes);
    const Tensor packed = pack_filters(turned, flavour, algorithm, swapped);
    return run_conv(input, turned, flavour, algorithm, packed, {bias, std::nullopt}, channels_last);
  }
  turned = s;
  turned.c = s.n;
  turned.n = s.c;
  const OutputImage out(input.dim(), s.batch, s.c_all(), s.in, input.scalar_type(), channels_last);
  if (out.out.numel() == 0) return out.out;
  bool undilated = true;
  for (int axis = 0; axis < 3; axis++) undilated = undilated && (s.dilation[axis] == 1 || s.kernel[axis] == 1);
  const bool depthwise = undilated && s.c == 1 && s.n == 1 && s.groups > 1;
  const DType dtype = depthwise ? dtype_of(input) : flavour == Flavour::f32 ? DType::f32 : DType::bf16;
  const ImageView x = image_of("input", input, size, dtype);
  Conv conv = conv_over(s, s.n, s.c, depthwise ? Flavour::f32 : flavour, x.image, out);
  const EpilogueImages kept = set_epilogue(&conv.out_rows, {bias, std::nullopt}, s.in);
  if (depthwise) {
    transposed_depthwise(s, conv, swapped, dtype);
  } else {
    const Tensor packed = pack_filters(turned, flavour, ConvAlgorithm::direct, swapped);
    conv.weight = packed.const_data_ptr();
    transposed_direct(s, conv);
  }
  return out.finish();
}

}  // namespace pbm

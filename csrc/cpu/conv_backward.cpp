#include <cstring>

#include "cpu/conv.h"

namespace pbm {
namespace {

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// --- the gradient of the weight --------------------------------------------------------------------------------------

// One axis of the pixels: outputs, and the inputs of one remainder by the stride, at one pitch. Place u holds output u
// and input (u + low)·stride + remainder.
struct Axis {
  int64_t low, size, pitch = 1;

  Axis(const ConvShape& s, int axis) {
    const int64_t reach = (s.kernel[axis] - 1) * s.dilation[axis];
    low = floor_div(-s.pad[axis], s.stride[axis]);
    size = s.out(axis) + floor_div(reach - s.pad[axis], s.stride[axis]) - low;
  }
};

// The pixels of one image, row by row, with what the taps reach beyond the outputs.
struct Lattice {
  Axis axes[3];
  int64_t pitch;  // from one image to the next
  int64_t lanes;  // of an image up to its last output

  explicit Lattice(const ConvShape& s) : axes{{s, 0}, {s, 1}, {s, 2}} {
    axes[1].pitch = axes[2].size;
    axes[0].pitch = axes[1].pitch * axes[1].size;
    pitch = axes[0].pitch * axes[0].size;
    lanes = 1;
    for (int axis = 0; axis < 3; axis++) lanes += (s.out(axis) - 1) * axes[axis].pitch;
  }
};

// Taps that read inputs of the same remainders.
struct TapPhase {
  int64_t remainder[3];
  std::vector<int64_t> taps, distance;
};

std::vector<TapPhase> tap_phases(const ConvShape& s, const Lattice& lattice) {
  std::vector<TapPhase> phases;
  for (int64_t t = 0; t < s.taps(); t++) {
    const int64_t tap[3] = {t / (s.kernel[1] * s.kernel[2]), t / s.kernel[2] % s.kernel[1], t % s.kernel[2]};
    TapPhase here{};
    int64_t distance = 0;
    for (int axis = 0; axis < 3; axis++) {
      const int64_t at = tap[axis] * s.dilation[axis] - s.pad[axis], shift = floor_div(at, s.stride[axis]);
      here.remainder[axis] = at - shift * s.stride[axis];
      distance += (shift - lattice.axes[axis].low) * lattice.axes[axis].pitch;
    }
    TapPhase* phase = nullptr;
    for (TapPhase& p : phases)
      if (!std::memcmp(p.remainder, here.remainder, sizeof here.remainder)) phase = &p;
    if (!phase) phase = &phases.emplace_back(here);
    phase->taps.push_back(t);
    phase->distance.push_back(distance);
  }
  return phases;
}

// Channels [c, c + 16) of some images' inputs of these remainders, 16 floats a lane; the rest stays as it is.
void fill_panel(const ConvShape& s, const Lattice& lattice, const TapPhase& phase, const ImageView& x, int64_t image,
                int64_t images, int64_t c, int64_t channels, float* out) {
  ConvCopy p{};
  p.batch = images;
  p.channels = channels;
  p.x_dtype = dtype_of(x.tensor);
  p.x_batch = x.image.batch_stride;
  p.x_channel = p.out_channel = 1;
  p.out_dtype = DType::f32;
  p.out_batch = lattice.pitch * kPanel;
  int64_t from = image * p.x_batch + c;
  for (int axis = 0; axis < 3; axis++) {
    const Axis& a = lattice.axes[axis];
    const int64_t stride = s.stride[axis], first = a.low * stride + phase.remainder[axis];
    const int64_t skipped = first < 0 ? ceil_div(-first, stride) : 0, start = first + skipped * stride;
    const int64_t there = start < s.in[axis] ? ceil_div(s.in[axis] - start, stride) : 0;
    p.size[axis] = there < a.size - skipped ? there : a.size - skipped;
    if (p.size[axis] <= 0) return;
    p.x_stride[axis] = x.image.stride[axis] * stride;
    p.out_stride[axis] = a.pitch * kPanel;
    from += start * x.image.stride[axis];
    out += skipped * a.pitch * kPanel;
  }
  p.x = static_cast<const char*>(x.image.data) + from * size_of(p.x_dtype);
  p.out = out;
  kernels().conv_copy(p, 0, p.batch * p.size[0] * p.size[1]);
}

// Some images' gradients of channels [n, n + count), a row of lanes each.
void fill_rows(const Lattice& lattice, const ImageView& dy, int64_t image, int64_t images, int64_t n, int64_t count,
               float* out, int64_t row) {
  ConvCopy p{};
  p.batch = images;
  p.channels = count;
  p.x_dtype = dtype_of(dy.tensor);
  p.x = static_cast<const char*>(dy.image.data) + (image * dy.image.batch_stride + n) * size_of(p.x_dtype);
  p.x_batch = dy.image.batch_stride;
  p.x_channel = 1;
  p.out = out;
  p.out_dtype = DType::f32;
  p.out_batch = lattice.pitch;
  p.out_channel = row;
  for (int axis = 0; axis < 3; axis++) {
    p.size[axis] = dy.image.size[axis];
    p.x_stride[axis] = dy.image.stride[axis];
    p.out_stride[axis] = lattice.axes[axis].pitch;
  }
  kernels().conv_copy(p, 0, images * p.size[0] * p.size[1]);
}

Tensor zeroed(int64_t floats) {
  Tensor t = empty_cpu(&floats, 1, ScalarType::Float);
  std::memset(t.mutable_data_ptr(), 0, static_cast<size_t>(floats) * sizeof(float));
  return t;
}

template <class F>
void in_parallel(int64_t count, const F& f) {
  const int64_t threads = torch::stable::get_num_threads(), parts = count < threads ? count : threads;
  if (count == 0) return;
  parallel(parts, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const Range r = part(count, 1, parts, i);
      for (int64_t at = r.begin; at < r.end; at++) f(at);
    }
  });
}

// Sums to (groups·n, c, kernel…) in the weight's dtype; that of tap t, filter k, channel c is at t·tap + k·row + c.
struct Sums {
  const float* data;
  int64_t tap, row;
};

void write_weight(const ConvShape& s, const Sums& sums, int64_t group, const Tensor& out) {
  const int64_t each = s.c * s.taps();
  const DType dtype = dtype_of(out);
  void* data = out.mutable_data_ptr();
  in_parallel(s.n, [&](int64_t k) {
    std::vector<float> filter(static_cast<size_t>(each));
    const float* from = sums.data + k * sums.row;
    for (int64_t t = 0; t < s.taps(); t++)
      for (int64_t c = 0; c < s.c; c++) filter[static_cast<size_t>(c * s.taps() + t)] = from[t * sums.tap + c];
    ConvCopy p{};
    p.batch = p.size[0] = p.size[1] = p.size[2] = 1;
    p.channels = each;
    p.x = filter.data();
    p.x_dtype = DType::f32;
    p.x_channel = p.out_channel = 1;
    p.out = static_cast<char*>(data) + (group * s.n + k) * each * size_of(dtype);
    p.out_dtype = dtype;
    kernels().conv_copy(p, 0, 1);
  });
}

// How the sums are cut over threads: filters where there are enough, else taps, else panels.
void run_sums(const ConvWeightSum& p, int64_t taps, int64_t n, int64_t panels) {
  const int64_t threads = torch::stable::get_num_threads();
  const bool by_n = n >= 8 * threads, by_taps = !by_n && taps >= 2 * threads;
  parallel(threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const Range t = by_taps ? part(taps, 1, threads, i) : Range{0, taps};
      const Range r = by_n ? part(n, 1, threads, i) : Range{0, n};
      const Range j = by_n || by_taps ? Range{0, panels} : part(panels, 1, threads, i);
      kernels().conv_weight_sum(p, t, r, j);
    }
  });
}

// Lanes that are laid out at a time.
constexpr int64_t kLanesAtOnce = 8192;

void taps_gradient(const ConvShape& s, const ImageView& x, const ImageView& dy, const Tensor& out) {
  const Lattice lattice(s);
  const std::vector<TapPhase> phases = tap_phases(s, lattice);
  const int64_t panels = ceil_div(s.c, kPanel), fit = kLanesAtOnce / lattice.pitch;
  const int64_t images = fit < 1 ? 1 : fit < s.batch ? fit : s.batch;
  // An odd number of cache lines from one row to the next.
  const int64_t lanes = images * lattice.pitch, row = (ceil_div(lanes, 16) | 1) * 16;
  const int64_t panel = lanes * kPanel, phase_floats = panels * panel;
  const Tensor x_panels = zeroed(static_cast<int64_t>(phases.size()) * phase_floats), dy_rows = zeroed(s.n * row);
  float *xp = static_cast<float*>(x_panels.mutable_data_ptr()), *rows = static_cast<float*>(dy_rows.mutable_data_ptr());
  const Sums shape{nullptr, s.n * panels * kPanel, panels * kPanel};
  for (int64_t group = 0; group < s.groups; group++) {
    const Tensor sums = zeroed(s.taps() * shape.tap);
    float* sum = static_cast<float*>(sums.mutable_data_ptr());
    for (int64_t image = 0; image < s.batch; image += images) {
      const int64_t count = images < s.batch - image ? images : s.batch - image;
      const int64_t x_items = static_cast<int64_t>(phases.size()) * panels;
      in_parallel(x_items + ceil_div(s.n, kPanel), [&](int64_t i) {
        if (i < x_items) {
          const int64_t c = i % panels * kPanel, channels = s.c - c < kPanel ? s.c - c : kPanel;
          fill_panel(s, lattice, phases[static_cast<size_t>(i / panels)], x, image, count, group * s.c + c, channels,
                     xp + i * panel);
        } else {
          const int64_t n = (i - x_items) * kPanel, filters = s.n - n < kPanel ? s.n - n : kPanel;
          fill_rows(lattice, dy, image, count, group * s.n + n, filters, rows + n * row, row);
        }
      });
      for (size_t i = 0; i < phases.size(); i++) {
        std::vector<float*> to;
        for (const int64_t t : phases[i].taps) to.push_back(sum + t * shape.tap);
        ConvWeightSum p{};
        p.lanes = (count - 1) * lattice.pitch + lattice.lanes;
        p.dy = rows;
        p.dy_row = row;
        p.x = xp + static_cast<int64_t>(i) * phase_floats;
        p.x_panel = panel;
        p.distance = phases[i].distance.data();
        p.sum = to.data();
        p.sum_row = shape.row;
        run_sums(p, static_cast<int64_t>(to.size()), s.n, panels);
      }
    }
    write_weight(s, {sum, shape.tap, shape.row}, group, out);
  }
}

// Images of few channels: everything that an output sees is one lane of the panels, taps and channels side by side.
void patches_gradient(const ConvShape& s, const ImageView& x, const ImageView& dy, const Tensor& out) {
  const int64_t columns = s.taps() * s.c, panels = ceil_div(columns, kPanel);
  const int64_t pixels = s.out(0) * s.out(1) * s.out(2), fit = kLanesAtOnce / pixels;
  const int64_t images = fit < 1 ? 1 : fit < s.batch ? fit : s.batch;
  const int64_t lanes = images * pixels, row = (ceil_div(lanes, 16) | 1) * 16, panel = lanes * kPanel;
  ConvShape still = s;  // outputs without what lies between them
  for (int axis = 0; axis < 3; axis++) {
    still.in[axis] = s.out(axis);
    still.kernel[axis] = still.stride[axis] = still.dilation[axis] = 1;
    still.pad[axis] = still.pad_end[axis] = 0;
  }
  const Lattice lattice(still);
  const Tensor x_panels = zeroed(panels * panel), dy_rows = zeroed(s.n * row), sums = zeroed(s.n * panels * kPanel);
  float *xp = static_cast<float*>(x_panels.mutable_data_ptr()), *rows = static_cast<float*>(dy_rows.mutable_data_ptr());
  float* sum = static_cast<float*>(sums.mutable_data_ptr());
  const float* image_data = static_cast<const float*>(x.image.data);
  const int64_t row_outputs = s.out(2), output_rows = s.out(0) * s.out(1);

  // What the outputs of one row see.
  const auto fill_patches = [&](int64_t image, int64_t slot, int64_t r) {
    const int64_t d = r / s.out(1) * s.stride[0] - s.pad[0], h = r % s.out(1) * s.stride[1] - s.pad[1];
    float patch[1024];
    for (int64_t w = 0; w < row_outputs; w++) {
      float* to = patch;
      for (int64_t i = 0; i < s.kernel[0]; i++)
        for (int64_t j = 0; j < s.kernel[1]; j++) {
          const int64_t at_d = d + i * s.dilation[0], at_h = h + j * s.dilation[1];
          const bool there = at_d >= 0 && at_d < s.in[0] && at_h >= 0 && at_h < s.in[1];
          // Rows of the image have their padding with them.
          const float* from = image_data + image * x.image.batch_stride + at_d * x.image.stride[0] +
                              at_h * x.image.stride[1] + w * s.stride[2] * x.image.stride[2];
          for (int64_t q = 0; q < s.kernel[2]; q++)
            for (int64_t c = 0; c < s.c; c++) *to++ = there ? from[q * s.dilation[2] * x.image.stride[2] + c] : 0.f;
        }
      while (to < patch + panels * kPanel) *to++ = 0.f;
      const int64_t lane = slot * pixels + r * row_outputs + w;
      for (int64_t p = 0; p < panels; p++) std::memcpy(xp + p * panel + lane * kPanel, patch + p * kPanel, 64);
    }
  };

  for (int64_t image = 0; image < s.batch; image += images) {
    const int64_t count = images < s.batch - image ? images : s.batch - image;
    in_parallel(count * output_rows,
                [&](int64_t i) { fill_patches(image + i / output_rows, i / output_rows, i % output_rows); });
    in_parallel(ceil_div(s.n, kPanel), [&](int64_t i) {
      const int64_t n = i * kPanel, filters = s.n - n < kPanel ? s.n - n : kPanel;
      fill_rows(lattice, dy, image, count, n, filters, rows + n * row, row);
    });
    const int64_t nothing = 0;
    ConvWeightSum p{};
    p.lanes = count * pixels;
    p.dy = rows;
    p.dy_row = row;
    p.x = xp;
    p.x_panel = panel;
    p.distance = &nothing;
    p.sum = &sum;
    p.sum_row = panels * kPanel;
    run_sums(p, 1, s.n, panels);
  }
  write_weight(s, {sum, s.c, panels * kPanel}, 0, out);
}

void depthwise_gradient(const ConvShape& s, const ImageView& x, const ImageView& dy, const Tensor& out) {
  const int64_t blocks = ceil_div(s.groups, kPanel), taps = s.taps();
  const Tensor sums = zeroed(blocks * taps * kPanel);
  float* sum = static_cast<float*>(sums.mutable_data_ptr());
  DepthwiseWeightSum p{};
  p.batch = s.batch;
  p.channels = s.groups;
  p.dtype = dtype_of(x.tensor);
  p.x = x.image;
  p.dy = dy.image;
  p.sum = sum;
  for (int axis = 0; axis < 3; axis++) {
    p.out[axis] = s.out(axis);
    p.kernel[axis] = s.kernel[axis];
    p.stride[axis] = s.stride[axis];
    p.pad[axis] = s.pad[axis];
    p.dilation[axis] = s.dilation[axis];
  }
  in_parallel(blocks, [&](int64_t i) { kernels().depthwise_weight_sum(p, {i, i + 1}); });
  // [block][tap][channel] is, for one filter a channel, tap·16 + channel.
  for (int64_t g = 0; g < s.groups; g++) {
    ConvShape one = s;
    one.n = 1;
    write_weight(one, {sum + g / kPanel * taps * kPanel + g % kPanel, kPanel, 0}, g, out);
  }
}

// Images with channels innermost and in the dtype that the weight has.
Tensor weight_gradient(const Tensor& input, const Tensor& grad_output, const ConvShape& s, const Tensor& weight) {
  int64_t sizes[5];
  for (int64_t i = 0; i < weight.dim(); i++) sizes[i] = weight.size(i);
  const Tensor out = empty_cpu(sizes, weight.dim(), weight.scalar_type());
  if (out.numel() == 0) return out;
  const int64_t out_size[3] = {s.out(0), s.out(1), s.out(2)};
  if (s.pixels() == 0 || s.in[0] * s.in[1] * s.in[2] == 0) {
    std::memset(out.mutable_data_ptr(), 0, static_cast<size_t>(out.numel() * size_of(dtype_of(out))));
    return out;
  }
  const DType dtype = dtype_of(input);
  const ImageView dy = image_of("grad_output", grad_output, out_size, dtype);
  const bool few = s.groups == 1 && s.c < kPanel && s.taps() > 1 && s.taps() * s.c <= 1008 && s.pad_end[2] >= 0;
  if (few) {
    patches_gradient(s, image_of("input", input, s.in, DType::f32, s.pad[2], s.pad_end[2]), dy, out);
    return out;
  }
  const ImageView x = image_of("input", input, s.in, dtype);
  s.groups > 1 && s.c == 1 && s.n == 1 ? depthwise_gradient(s, x, dy, out) : taps_gradient(s, x, dy, out);
  return out;
}

// In fp32 whatever the gradient's dtype, as linear's.
Tensor bias_gradient(const Tensor& grad_output) {
  const int64_t channels = grad_output.size(1);
  int64_t size[3];
  for (int i = 0; i < 3; i++) {
    const int64_t axis = axis_of(grad_output.dim(), i);
    size[i] = axis < 0 ? 1 : grad_output.size(axis);
  }
  const Tensor out = empty_cpu(&channels, 1, ScalarType::Float);
  const ImageView dy = image_of("grad_output", dense(grad_output), size, dtype_of(grad_output));
  const int64_t rows = grad_output.size(0) * size[0] * size[1] * size[2];
  const ColumnSum s{rows, channels, dy.image.data, dtype_of(grad_output), channels, out.mutable_data_ptr(), DType::f32};
  const int64_t parts = rows * channels > 65536 ? torch::stable::get_num_threads() : 1;
  parallel(parts, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const Range c = part(channels, kPanel, parts, i);
      kernels().column_sum(s, c.begin, c.end);
    }
  });
  return out;
}

Tensor none(ScalarType t) {
  const int64_t nothing = 0;
  return empty_cpu(&nothing, 1, t);
}

// --- ops -------------------------------------------------------------------------------------------------------------

void check_grad_output(const char* op, const Tensor& grad_output, const Tensor& input, int64_t channels,
                       const int64_t (&size)[3]) {
  check_dtype(op, "grad_output", grad_output, input.scalar_type());
  check_same_device(op, "grad_output", grad_output, input);
  bool fits =
      grad_output.dim() == input.dim() && grad_output.size(0) == input.size(0) && grad_output.size(1) == channels;
  for (int i = 0; fits && i < 3; i++) {
    const int64_t axis = axis_of(input.dim(), i);
    fits = axis < 0 || grad_output.size(axis) == size[i];
  }
  STD_TORCH_CHECK(fits, op, ": grad_output must have the output's shape, ", channels,
                  " channels and spatial sizes (d, h, w) ", list_of(size, 3), "; got ", shape_of(grad_output));
}

std::tuple<Tensor, Tensor, Tensor> conv_backward(const Tensor& grad_output, const Tensor& input, const Tensor& weight,
                                                 Ints stride, Ints padding, Ints dilation, int64_t groups,
                                                 int64_t precision, int64_t algorithm, bool channels_last,
                                                 bool need_input, bool need_weight, bool need_bias) {
  const char* op = "conv_backward";
  check_float(op, "input", input);
  check_dtype(op, "weight", weight, input.scalar_type());
  check_same_device(op, "weight", weight, input);
  check_dim(op, "weight", weight, input.dim());
  const ConvGeometry g{stride, padding, dilation, groups};
  const ConvShape s = shape_for(op, input, weight.size(0), weight.size(1), kernel_of(weight), g);
  const int64_t size[3] = {s.out(0), s.out(1), s.out(2)};
  check_grad_output(op, grad_output, input, weight.size(0), size);
  const Flavour flavour = flavour_of(op, input, precision);
  const ConvAlgorithm chosen = algorithm_of(op, s, flavour, algorithm);
  const bool exact = algorithm != 0 && chosen != ConvAlgorithm::winograd2 && chosen != ConvAlgorithm::winograd4;
  return {need_input
              ? run_transposed(grad_output, s, flavour, filters_of(weight, s), exact, std::nullopt, channels_last)
              : none(input.scalar_type()),
          need_weight ? weight_gradient(input, grad_output, s, weight) : none(input.scalar_type()),
          need_bias ? bias_gradient(grad_output) : none(ScalarType::Float)};
}

// The convolution whose transpose it is: from images of the output's size to those of the input's.
ConvShape transposed_shape(const char* op, const Tensor& input, const Tensor& weight, const ConvGeometry& g,
                           const int64_t* out) {
  check_float(op, "input", input);
  check_dtype(op, "weight", weight, input.scalar_type());
  check_same_device(op, "weight", weight, input);
  STD_TORCH_CHECK(input.dim() >= 3 && input.dim() <= 5, op,
                  ": input must have 3, 4 or 5 dimensions (N, C, spatial), got shape ", shape_of(input));
  check_dim(op, "weight", weight, input.dim());
  STD_TORCH_CHECK(input.size(1) == weight.size(0), op, ": input must have ", weight.size(0),
                  " channels, as weight has filters, got shape ", shape_of(input));
  check_geometry(op, input.dim() - 2, kernel_of(weight), g);
  STD_TORCH_CHECK(weight.size(0) % g.groups == 0, op, ": groups must divide the ", weight.size(0),
                  " input channels, got ", g.groups);
  ConvShape s{};
  s.batch = input.size(0);
  s.groups = g.groups;
  s.c = weight.size(1);
  s.n = weight.size(0) / g.groups;
  for (int i = 0; i < 3; i++) {
    const int64_t axis = axis_of(input.dim(), i), at = axis - 2;
    const bool there = axis >= 0;
    s.in[i] = there ? out[at] : 1;
    s.kernel[i] = there ? weight.size(axis) : 1;
    s.stride[i] = there ? g.stride[static_cast<size_t>(at)] : 1;
    s.dilation[i] = there ? g.dilation[static_cast<size_t>(at)] : 1;
    s.pad[i] = there ? g.padding[static_cast<size_t>(2 * at)] : 0;
    s.pad_end[i] = there ? g.padding[static_cast<size_t>(2 * at + 1)] : 0;
  }
  return s;
}

Tensor conv_transpose(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, Ints stride,
                      Ints padding, Ints output_padding, Ints dilation, int64_t groups, int64_t precision,
                      bool channels_last) {
  const char* op = "conv_transpose";
  const ConvGeometry g{stride, padding, dilation, groups};
  int64_t out[3] = {1, 1, 1};
  const size_t axes = static_cast<size_t>(input.dim() >= 3 && input.dim() <= 5 ? input.dim() - 2 : 0);
  if (stride.size() == axes && dilation.size() == axes && padding.size() == 2 * axes && weight.dim() == input.dim()) {
    STD_TORCH_CHECK(output_padding.size() == axes, op, ": output_padding must have ", axes, " entries, got ",
                    output_padding.size());
    for (size_t i = 0; i < axes; i++) {
      const int64_t axis = static_cast<int64_t>(i) + 2;
      STD_TORCH_CHECK(output_padding[i] >= 0 && (output_padding[i] < stride[i] || output_padding[i] < dilation[i]), op,
                      ": output_padding must be at least 0 and less than stride or dilation, got ", output_padding[i],
                      " beside stride ", stride[i], " and dilation ", dilation[i]);
      out[i] = (input.size(axis) - 1) * stride[i] - padding[2 * i] - padding[2 * i + 1] +
               dilation[i] * (weight.size(axis) - 1) + output_padding[i] + 1;
      STD_TORCH_CHECK(out[i] > 0, op, ": padding leaves nothing of the output: its size would be ", out[i],
                      ", input has shape ", shape_of(input));
    }
  }
  const ConvShape s = transposed_shape(op, input, weight, g, out);
  check_bias(op, bias, s.c_all(), input);
  return run_transposed(input, s, flavour_of(op, input, precision), filters_of(weight, s), false, bias, channels_last);
}

std::tuple<Tensor, Tensor, Tensor> conv_transpose_backward(const Tensor& grad_output, const Tensor& input,
                                                           const Tensor& weight, Ints stride, Ints padding,
                                                           Ints dilation, int64_t groups, int64_t precision,
                                                           bool channels_last, bool need_input, bool need_weight,
                                                           bool need_bias) {
  const char* op = "conv_transpose_backward";
  const ConvGeometry g{stride, padding, dilation, groups};
  STD_TORCH_CHECK(grad_output.dim() == input.dim() && input.dim() >= 3 && input.dim() <= 5, op,
                  ": grad_output must have as many dimensions as input (3, 4 or 5), got ", shape_of(grad_output));
  int64_t out[3] = {1, 1, 1};
  for (int64_t i = 2; i < grad_output.dim(); i++) out[i - 2] = grad_output.size(i);
  ConvShape s = transposed_shape(op, input, weight, g, out);
  int64_t size[3];
  for (int i = 0; i < 3; i++) size[i] = s.in[i];
  check_grad_output(op, grad_output, input, s.c_all(), size);
  // Outputs of that convolution beyond the input, which an output_padding beyond the stride makes, do not exist.
  for (int i = 0; i < 3; i++) {
    const int64_t axis = axis_of(input.dim(), i);
    if (axis < 0) continue;
    const int64_t beyond = s.out(i) - input.size(axis);
    STD_TORCH_CHECK(beyond >= 0, op, ": input of shape ", shape_of(input), " does not belong to grad_output of shape ",
                    shape_of(grad_output));
    s.pad_end[i] -= beyond * s.stride[i];
  }
  const Flavour flavour = flavour_of(op, input, precision);
  const auto grad_input = [&] {
    const ConvAlgorithm chosen = choose_conv(s, flavour, false);
    const Tensor packed = pack_filters(s, flavour, chosen, filters_of(weight, s));
    return run_conv(grad_output, s, flavour, chosen, packed, {}, channels_last);
  };
  return {need_input ? grad_input() : none(input.scalar_type()),
          need_weight ? weight_gradient(grad_output, input, s, weight) : none(input.scalar_type()),
          need_bias ? bias_gradient(grad_output) : none(ScalarType::Float)};
}

}  // namespace
}  // namespace pbm

STABLE_TORCH_LIBRARY_IMPL(pybigmodel, CPU, m) {
  m.impl("conv_backward", TORCH_BOX(&pbm::conv_backward));
  m.impl("conv_transpose", TORCH_BOX(&pbm::conv_transpose));
  m.impl("conv_transpose_backward", TORCH_BOX(&pbm::conv_transpose_backward));
}

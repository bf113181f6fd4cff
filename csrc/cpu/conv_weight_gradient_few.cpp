// The gradient of a weight whose images have few channels.
#include "cpu/conv_weight_gradient.h"

namespace pbm {
namespace {

// Of filters [n][c][tap], as the weight is.
void write_filters(const ConvShape& s, const std::vector<float>& filters, const Tensor& out) {
  ConvShape whole = s;
  whole.c = s.c * s.taps();
  whole.kernel[0] = whole.kernel[1] = whole.kernel[2] = 1;
  write_weight(whole, {filters.data(), 0, whole.c}, 0, out);
}

// One image of dy, channels innermost, to planes; where from and where to are still to be set.
ConvCopy to_planes(const ConvShape& s, const Tensor& dy) {
  const Strides strides = strides_of(dy);
  ConvCopy p{};
  p.batch = 1;
  p.channels = s.n;
  p.x_dtype = p.out_dtype = dtype_of(dy);
  p.x_channel = 1;
  for (int i = 0; i < 3; i++) {
    p.size[i] = s.out(i);
    p.x_stride[i] = strides.spatial[i];
  }
  p.out_channel = s.out(1) * s.out(2);
  p.out_stride[1] = s.out(2);
  p.out_stride[2] = 1;
  return p;
}

}  // namespace

void patches_gradient(const ConvShape& s, const ImageView& x, const ImageView& dy, const Tensor& out) {
  const int64_t columns = ceil_div(s.taps() * s.c, kPanel) * kPanel, rows = s.batch * s.out(0) * s.out(1);
  const float *image_data = static_cast<const float*>(x.image.data),
              *dy_data = static_cast<const float*>(dy.image.data);
  const int64_t threads = torch::stable::get_num_threads(), sum_floats = s.n * columns;
  const Tensor sums = zeroed(threads * sum_floats);
  float* sum = static_cast<float*>(sums.mutable_data_ptr());

  const auto fill_patch = [&](int64_t row, int64_t w, float* to) {
    const int64_t h = row % s.out(1) * s.stride[1] - s.pad[1];
    const int64_t d = row / s.out(1) % s.out(0) * s.stride[0] - s.pad[0], image = row / (s.out(1) * s.out(0));
    const float* end = to + columns;
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
    while (to < end) *to++ = 0.f;
  };
  // Each thread its rows, and its sums.
  parallel(threads, [&](int64_t i) {
    std::vector<float> patches;
    std::vector<WeightSum::Stretch> stretches;
    over_pieces(s, part(rows, 1, threads, i), [&](Range some, Range w) {
      const int64_t width = w.end - w.begin;
      patches.resize(static_cast<size_t>((some.end - some.begin) * width * columns));
      stretches.clear();
      for (int64_t r = some.begin; r < some.end; r++) {
        float* patch = patches.data() + (r - some.begin) * width * columns;
        for (int64_t at = w.begin; at < w.end; at++) fill_patch(r, at, patch + (at - w.begin) * columns);
        const int64_t h = r % s.out(1), d = r / s.out(1) % s.out(0), image = r / (s.out(1) * s.out(0));
        stretches.push_back({dy_data + image * dy.image.batch_stride + d * dy.image.stride[0] + h * dy.image.stride[1] +
                                 w.begin * dy.image.stride[2],
                             patch, width});
      }
      const WeightSum p{stretches.data(),
                        static_cast<int64_t>(stretches.size()),
                        dy.image.stride[2],
                        columns,
                        columns,
                        sum + i * sum_floats,
                        columns};
      kernels().conv_weight_sum(p, {0, s.n}, {0, columns / kPanel});
    });
  });
  for (int64_t i = 1; i < threads; i++)
    for (int64_t k = 0; k < sum_floats; k++) sum[k] += sum[i * sum_floats + k];
  write_weight(s, {sum, s.c, columns}, 0, out);
}

// Each thread its rows, and its sums.
void runs_gradient(const ConvShape& s, const ImageView& x, const ImageView& dy, const Tensor& out) {
  const int64_t run = s.kernel[2] * s.c, columns = ceil_div(run, kPanel) * kPanel, runs = s.kernel[0] * s.kernel[1];
  const int64_t rows = s.batch * s.out(0) * s.out(1), sum_run = s.n * columns;
  const int64_t threads = torch::stable::get_num_threads(), all = runs * sum_run;
  const Tensor sums = zeroed(threads * all);
  float* sum = static_cast<float*>(sums.mutable_data_ptr());
  ConvShape padded = s;  // its rows end with their padding, so that every output sees a whole run
  padded.in[2] = x.image.size[2];
  padded.pad[2] = padded.pad_end[2] = 0;
  const GradientImages images = images_of(s, x, dy, 0);
  parallel(threads, [&](int64_t i) {
    std::vector<WeightSum::Stretch> stretches;
    over_pieces(s, part(rows, 1, threads, i), [&](Range some, Range w) {
      for (int64_t r = 0; r < runs; r++) {
        stretches_of(padded, images, r * s.kernel[2], some, w, &stretches);
        const WeightSum p{stretches.data(),
                          static_cast<int64_t>(stretches.size()),
                          dy.image.stride[2],
                          s.c * s.stride[2],
                          run,
                          sum + i * all + r * sum_run,
                          columns};
        if (p.count) kernels().conv_weight_sum(p, {0, s.n}, {0, columns / kPanel});
      }
    });
  });
  std::vector<float> filters(static_cast<size_t>(s.n * s.c * s.taps()));
  for (int64_t k = 0; k < s.n; k++)
    for (int64_t t = 0; t < s.taps(); t++)
      for (int64_t c = 0; c < s.c; c++) {
        const int64_t at = t / s.kernel[2] * sum_run + k * columns + t % s.kernel[2] * s.c + c;
        float total = 0;
        for (int64_t i = 0; i < threads; i++) total += sum[i * all + at];
        filters[static_cast<size_t>((k * s.c + c) * s.taps() + t)] = total;
      }
  write_filters(s, filters, out);
}

// Each thread its images, and its sums.
void planes_gradient(const ConvShape& s, const Tensor& input, const Tensor& grad_output, const Tensor& out) {
  const Tensor x = in_planes(input);
  // Pixels become planes image by image, in L1.
  const bool turn = s.n > 1 && grad_output.stride(1) == 1;
  const Tensor dy = turn ? grad_output : as_contiguous(grad_output);
  const ConvPlanes p = planes_of(s, x);
  const int64_t count = s.n * s.c * s.taps(), threads = torch::stable::get_num_threads();
  const int64_t parts = s.batch < threads ? s.batch : threads, size = size_of(p.dtype);
  const Tensor sums = zeroed(parts * count * kPanel);
  float* sum = static_cast<float*>(sums.mutable_data_ptr());
  const char* gradients = static_cast<const char*>(data_of("grad_output", dy));
  parallel(parts, [&](int64_t i) {
    const Range images = part(s.batch, 1, parts, i);
    float* mine = sum + i * count * kPanel;
    if (!turn) {
      kernels().conv_planes_gradient(p, gradients, images, mine);
      return;
    }
    std::vector<char> planes(static_cast<size_t>(s.n * s.out(1) * s.out(2) * size));
    ConvCopy copy = to_planes(s, dy);
    copy.out = planes.data();
    ConvPlanes one = p;
    for (int64_t image = images.begin; image < images.end; image++) {
      copy.x = gradients + image * dy.stride(0) * size;
      kernels().conv_copy(copy, 0, s.out(1));
      one.x = static_cast<const char*>(p.x) + image * p.x_batch * size;
      kernels().conv_planes_gradient(one, planes.data(), {0, 1}, mine);
    }
  });
  std::vector<float> filters(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; i++) {
    float total = 0;
    for (int64_t t = 0; t < parts; t++)
      for (int64_t lane = 0; lane < kPanel; lane++) total += sum[(t * count + i) * kPanel + lane];
    filters[static_cast<size_t>(i)] = total;
  }
  write_filters(s, filters, out);
}

}  // namespace pbm

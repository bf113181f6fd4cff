// The gradient of a convolution's weight.
#include "cpu/conv_weight_gradient.h"

#include <cstring>

namespace pbm {

Tensor zeroed(int64_t floats) {
  Tensor t = empty_cpu(&floats, 1, ScalarType::Float);
  std::memset(t.mutable_data_ptr(), 0, static_cast<size_t>(floats) * sizeof(float));
  return t;
}

void write_weight(const ConvShape& s, const FilterSums& sums, int64_t group, const Tensor& out) {
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

GradientImages images_of(const ConvShape& s, const ImageView& x, const ImageView& dy, int64_t group) {
  return {static_cast<const float*>(dy.image.data) + group * s.n, static_cast<const float*>(x.image.data) + group * s.c,
          dy.image, x.image};
}

namespace {

// Outputs w that tap `at` (its distance from the output's first input) sees inside of a row.
Range seen(const ConvShape& s, int axis, int64_t at) {
  const int64_t first = at < 0 ? ceil_div(-at, s.stride[axis]) : 0;
  const int64_t end = at >= s.in[axis] ? 0 : (s.in[axis] - 1 - at) / s.stride[axis] + 1;
  return {first, end < s.out(axis) ? end : s.out(axis)};
}

}  // namespace

void stretches_of(const ConvShape& s, const GradientImages& images, int64_t t, Range rows, Range w,
                  std::vector<WeightSum::Stretch>* stretches) {
  const int64_t tap[3] = {t / (s.kernel[1] * s.kernel[2]), t / s.kernel[2] % s.kernel[1], t % s.kernel[2]};
  int64_t at[3];
  for (int axis = 0; axis < 3; axis++) at[axis] = tap[axis] * s.dilation[axis] - s.pad[axis];
  const Range d_seen = seen(s, 0, at[0]), h_seen = seen(s, 1, at[1]), all = seen(s, 2, at[2]);
  const Range w_seen = {std::max<int64_t>(all.begin, w.begin), std::min<int64_t>(all.end, w.end)};
  stretches->clear();
  if (w_seen.begin >= w_seen.end) return;
  for (int64_t row = rows.begin; row < rows.end; row++) {
    const int64_t h = row % s.out(1), d = row / s.out(1) % s.out(0), image = row / (s.out(1) * s.out(0));
    if (h < h_seen.begin || h >= h_seen.end || d < d_seen.begin || d >= d_seen.end) continue;
    const ConvImage &x = images.x_image, &dy = images.dy_image;
    stretches->push_back(
        {images.dy + image * dy.batch_stride + d * dy.stride[0] + h * dy.stride[1] + w_seen.begin * dy.stride[2],
         images.x + image * x.batch_stride + (d * s.stride[0] + at[0]) * x.stride[0] +
             (h * s.stride[1] + at[1]) * x.stride[1] + (w_seen.begin * s.stride[2] + at[2]) * x.stride[2],
         w_seen.end - w_seen.begin});
  }
}

namespace {

// How filters, channels and taps are cut over threads: filters where there are enough, else taps, else channels.
struct Cut {
  Range taps, n, panels;

  Cut(const ConvShape& s, int64_t threads, int64_t i) {
    const int64_t all = ceil_div(s.c, kPanel);
    const bool by_n = s.n >= 8 * threads, by_taps = !by_n && s.taps() >= 2 * threads;
    taps = by_taps ? part(s.taps(), 1, threads, i) : Range{0, s.taps()};
    n = by_n ? part(s.n, 1, threads, i) : Range{0, s.n};
    panels = by_n || by_taps ? Range{0, all} : part(all, 1, threads, i);
  }
};

void taps_gradient(const ConvShape& s, const ImageView& x, const ImageView& dy, const Tensor& out) {
  const int64_t sum_row = ceil_div(s.c, kPanel) * kPanel, sum_tap = s.n * sum_row, rows = s.batch * s.out(0) * s.out(1);
  const int64_t threads = torch::stable::get_num_threads();
  for (int64_t group = 0; group < s.groups; group++) {
    const GradientImages images = images_of(s, x, dy, group);
    const Tensor sums = zeroed(s.taps() * sum_tap);
    float* sum = static_cast<float*>(sums.mutable_data_ptr());
    parallel(threads, [&](int64_t i) {
      const Cut cut(s, threads, i);
      std::vector<WeightSum::Stretch> stretches;
      over_pieces(s, {0, rows}, [&](Range some, Range w) {
        for (int64_t t = cut.taps.begin; t < cut.taps.end; t++) {
          stretches_of(s, images, t, some, w, &stretches);
          const WeightSum p{stretches.data(),
                            static_cast<int64_t>(stretches.size()),
                            dy.image.stride[2],
                            x.image.stride[2] * s.stride[2],
                            s.c,
                            sum + t * sum_tap,
                            sum_row};
          if (p.count) kernels().conv_weight_sum(p, cut.n, cut.panels);
        }
      });
    });
    write_weight(s, {sum, sum_tap, sum_row}, group, out);
  }
}

// Winograd's tiles of x and dy, the sums of their products at each of the (m + 2)² places, and from these the filters.
void winograd_gradient(const ConvShape& s, const ImageView& x, const ImageView& dy, int m, const Tensor& out) {
  constexpr int64_t kTileBytes = int64_t{4} << 20;
  const int64_t places = (m + 2) * (m + 2), tiles = s.batch * ceil_div(s.out(1), m) * ceil_div(s.out(2), m);
  const int64_t c = ceil_div(s.c, kPanel) * kPanel, n = ceil_div(s.n, kPanel) * kPanel;
  WinogradTiles g{};
  g.p.m = m;
  g.p.pad[0] = s.pad[1];
  g.p.pad[1] = s.pad[2];
  g.p.conv.c = s.c;
  g.p.conv.x = x.image;
  for (int axis = 0; axis < 3; axis++) g.p.conv.out[axis] = s.out(axis);
  g.dy = dy.image;
  g.n = s.n;
  g.x_row = c + kPanel;  // an odd number of cache lines, mostly
  g.dy_row = n + kPanel;
  const int64_t fit = kTileBytes / (places * (g.x_row + g.dy_row) * 4), most = fit < 1 ? 1 : fit < tiles ? fit : tiles;
  g.x_next = most * g.x_row;
  g.dy_next = most * g.dy_row;
  const int64_t floats = places * (g.x_next + g.dy_next), sum_place = s.n * c, nine = 9 * sum_place;
  const Tensor transformed = empty_cpu(&floats, 1, ScalarType::Float), filters = empty_cpu(&nine, 1, ScalarType::Float);
  float *const x_tiles = static_cast<float*>(transformed.mutable_data_ptr()), *const dy_tiles =
                                                                                  x_tiles + places * g.x_next;
  for (int64_t group = 0; group < s.groups; group++) {
    const Tensor sums = zeroed(places * sum_place);
    float *sum = static_cast<float*>(sums.mutable_data_ptr()), *nines = static_cast<float*>(filters.mutable_data_ptr());
    for (int64_t t = 0; t < tiles; t += most) {
      const int64_t count = most < tiles - t ? most : tiles - t;
      over_parts(count, 1, torch::stable::get_num_threads(), [&](Range r) {
        WinogradTiles mine = g;
        mine.x_tiles = x_tiles + r.begin * g.x_row;
        mine.dy_tiles = dy_tiles + r.begin * g.dy_row;
        kernels().winograd_gradient_tiles(mine, group, {t + r.begin, t + r.end});
      });
      in_parallel(places, [&](int64_t place) {
        const WeightSum::Stretch stretch{dy_tiles + place * g.dy_next, x_tiles + place * g.x_next, count};
        const WeightSum p{&stretch, 1, g.dy_row, g.x_row, c, sum + place * sum_place, c};
        kernels().conv_weight_sum(p, {0, s.n}, {0, c / kPanel});
      });
    }
    in_parallel(s.n, [&](int64_t k) {
      kernels().winograd_gradient_output(m, sum + k * c, sum_place, nines + k * c, sum_place, c);
    });
    write_weight(s, {nines, sum_place, c}, group, out);
  }
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

// Rather than patches, whose lanes are fuller: in cycles a pixel, of which copying one value takes about one and the
// product of one by sixteen half of one.
bool worth_runs(const ConvShape& s) {
  const int64_t patch = ceil_div(s.taps() * s.c, kPanel), run = ceil_div(s.kernel[2] * s.c, kPanel);
  return s.dilation[2] == 1 && s.kernel[0] * s.kernel[1] * run * s.n < patch * s.n + 2 * s.taps() * s.c;
}

// Where the sums of all places stay in the last-level cache, and the tiles are not mostly border.
bool worth_winograd(const ConvShape& s) {
  return s.c >= kPanel && s.n >= kPanel && 36 * s.c * s.n * 4 <= int64_t{12} << 20 && s.out(1) >= 4 && s.out(2) >= 4;
}

}  // namespace

Tensor weight_gradient(const Tensor& input, const Tensor& grad_output, const ConvShape& s, const Tensor& weight,
                       bool exact) {
  int64_t sizes[5];
  for (int64_t i = 0; i < weight.dim(); i++) sizes[i] = weight.size(i);
  const Tensor out = empty_cpu(sizes, weight.dim(), weight.scalar_type());
  if (out.numel() == 0) return out;
  const int64_t out_size[3] = {s.out(0), s.out(1), s.out(2)};
  if (s.pixels() == 0 || s.in[0] * s.in[1] * s.in[2] == 0) {
    std::memset(out.mutable_data_ptr(), 0, static_cast<size_t>(out.numel() * size_of(dtype_of(out))));
    return out;
  }
  if (s.groups > 1 && s.c == 1 && s.n == 1) {
    const DType dtype = dtype_of(input);
    depthwise_gradient(s, image_of("input", input, s.in, dtype), image_of("grad_output", grad_output, out_size, dtype),
                       out);
    return out;
  }
  const bool few = s.groups == 1 && s.c < kPanel && s.taps() > 1 && s.pad_end[2] >= 0, runs = few && worth_runs(s);
  const bool pixels = runs && filled(s.kernel[2] * s.c) > filled(s.out(2));
  if (!pixels && s.c < kPanel && s.n <= kPanel && s.n * s.c * s.taps() <= 8192 &&
      conv_admits(s, Flavour::f32, ConvAlgorithm::planes)) {
    planes_gradient(s, input, grad_output, out);
    return out;
  }
  const ImageView dy = image_of("grad_output", grad_output, out_size, DType::f32);
  const ImageView x = image_of("input", input, s.in, DType::f32, few ? s.pad[2] : 0, few ? s.pad_end[2] : 0, runs);
  if (runs)
    runs_gradient(s, x, dy, out);
  else if (few)
    patches_gradient(s, x, dy, out);
  else if (!exact && conv_admits(s, Flavour::f32, ConvAlgorithm::winograd4) && worth_winograd(s))
    winograd_gradient(s, x, dy, 4, out);
  else
    taps_gradient(s, x, dy, out);
  return out;
}

}  // namespace pbm

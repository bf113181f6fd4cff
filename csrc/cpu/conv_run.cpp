#include "cpu/conv_run.h"

#include <cstring>
#include <memory>

namespace pbm {
namespace {

// What taps outside the image read.
const void* zeros(int64_t bytes) {
  static const auto few = std::make_unique<char[]>(size_t{1} << 16);
  thread_local std::vector<char> many;
  if (bytes <= int64_t{1} << 16) return few.get();
  if (static_cast<int64_t>(many.size()) < bytes) many.resize(static_cast<size_t>(bytes));
  return many.data();
}

// Threads over rows and panels of every group.
template <class F>
void over_groups(int64_t groups, Grid grid, int64_t rows, int64_t n, const F& f) {
  const int64_t each = grid.m * grid.n;
  parallel(groups * each, [&](int64_t i) {
    const Range r = part(rows, 1, grid.m, i % each / grid.n);
    const Range columns = part(n, kPanel, grid.n, i % grid.n);
    const Range panels = {columns.begin / kPanel, ceil_div(columns.end, kPanel)};
    if (r.begin < r.end && panels.begin < panels.end) f(i / each, r, panels);
  });
}

}  // namespace

void run_grid(const ConvShape& s, const Conv& conv, const ConvGrid& grid) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t rows = s.batch * grid.count[0] * grid.count[1] * grid.count[2];
  if (rows == 0) return;
  const Gemm& g = conv.out_rows;
  const RowCut pieces(grid.count[2]);
  const Grid cut = s.groups >= 2 * threads
                       ? Grid{1, 1}
                       : direct_grid(rows, pieces.piece, grid.tap_count, panel_groups(conv.c, g.flavour),
                                     ceil_div(g.n, kPanel), threads);
  over_groups(s.groups, cut, pieces.of(rows), g.n, [&](int64_t group, Range r, Range panels) {
    kernels().conv_direct(conv, grid, group, {pieces.begin(r.begin), pieces.begin(r.end)}, panels);
  });
}

void run_direct(const ConvShape& s, Conv conv, Taps how) {
  ConvGrid grid{};
  const int64_t width = how == Taps::single ? 1 : s.kernel[2];  // taps that are read as one
  std::vector<ConvTap> taps;
  for (int64_t i = 0; i < s.kernel[0]; i++)
    for (int64_t j = 0; j < s.kernel[1]; j++)
      for (int64_t q = 0; q < s.kernel[2]; q += width)
        taps.push_back({{i * s.dilation[0] - s.pad[0], j * s.dilation[1] - s.pad[1],
                         how == Taps::padded_rows ? 0 : q * s.dilation[2] - s.pad[2]},
                        static_cast<int64_t>(taps.size())});
  if (how == Taps::rows) grid.run = width;
  for (int axis = 0; axis < 3; axis++) {
    grid.count[axis] = s.out(axis);
    grid.out_step[axis] = 1;
    grid.in_step[axis] = s.stride[axis];
  }
  conv.c *= width;
  conv.taps = grid.tap_count = static_cast<int64_t>(taps.size());
  grid.taps = taps.data();
  run_grid(s, conv, grid);
}

namespace {

void run_winograd(const ConvShape& s, const Conv& conv, int m) {
  const Winograd p{conv, m, {s.pad[1], s.pad[2]}};
  const int64_t tiles = s.batch * ceil_div(s.out(1), m) * ceil_div(s.out(2), m);
  const int64_t threads = torch::stable::get_num_threads();
  const Grid cut = s.groups >= 2 * threads ? Grid{1, 1} : winograd_grid(s, m, threads);
  over_groups(s.groups, cut, tiles, s.n,
              [&](int64_t group, Range r, Range panels) { kernels().conv_winograd(p, group, r, panels); });
}

}  // namespace

void run_depthwise(const Depthwise& p) {
  const Conv& c = p.conv;
  const int64_t rows = c.batch * c.out[0] * c.out[1], blocks = ceil_div(c.groups, kPanel);
  const int64_t values = rows * c.out[2] * c.groups * c.taps;
  over_rows_or_channels(rows, blocks, 1, threads_worth(values),
                        [&](Range r, Range some) { kernels().conv_depthwise(p, r, some); });
}

Depthwise depthwise_of(const ConvShape& s, const Conv& conv, DType dtype) {
  Depthwise p{};
  p.conv = conv;
  p.dtype = dtype;
  p.out_batch = conv.out_rows.c_row;
  for (int axis = 2; axis >= 0; axis--) {
    p.kernel[axis] = s.kernel[axis];
    p.stride[axis] = s.stride[axis];
    p.pad[axis] = s.pad[axis];
    p.dilation[axis] = s.dilation[axis];
    p.out_stride[axis] = p.out_batch;
    p.out_batch *= conv.out[axis];
  }
  return p;
}

Conv conv_over(const ConvShape& s, int64_t c, int64_t n, Flavour flavour, const ConvImage& x, const OutputImage& out) {
  Conv conv{};
  conv.batch = s.batch;
  conv.groups = s.groups;
  conv.c = c;
  conv.x = x;
  for (int axis = 0; axis < 3; axis++) conv.out[axis] = out.size[axis];
  conv.taps = s.taps();
  conv.zeros = zeros(s.kernel[2] * c * 4);
  Gemm& g = conv.out_rows;
  g.flavour = flavour;
  g.n = n;
  g.c = out.rows.mutable_data_ptr();
  g.c_dtype = dtype_of(out.rows);
  g.c_row = s.groups * n;
  g.residual_first = true;
  return conv;
}

ConvWindow window_of(const ConvShape& s) {
  return {s.kernel[1], s.kernel[2], s.stride[1], s.stride[2], s.pad[1], s.pad[2], s.dilation[1], s.dilation[2]};
}

ConvPlanes planes_of(const ConvShape& s, const Tensor& input) {
  const Strides strides = strides_of(input);
  ConvPlanes p{};
  static_cast<ConvWindow&>(p) = window_of(s);
  p.c = s.c;
  p.n = s.n;
  p.dtype = dtype_of(input);
  p.x = data_of("input", input);
  p.h = s.in[1];
  p.w = s.in[2];
  p.x_batch = strides.batch;
  p.x_channel = strides.channel;
  p.x_row = strides.spatial[1];
  p.out_h = s.out(1);
  p.out_w = s.out(2);
  return p;
}

Tensor in_planes(const Tensor& t) {
  const int64_t axis = t.dim() - 1;
  return t.size(axis) == 1 || t.stride(axis) == 1 ? t : torch::stable::contiguous(t);
}

static Tensor run_planes(const Tensor& input, const ConvShape& s, const Tensor& packed, const ConvEpilogue& e,
                         bool channels_last) {
  const int64_t size[3] = {1, s.out(1), s.out(2)};
  const Tensor out = empty_image(input.dim(), s.batch, s.n, size, input.scalar_type(), false);
  if (out.numel() == 0) return out;
  const Tensor x = in_planes(input);
  ConvPlanes p = planes_of(s, x);
  p.weight = static_cast<const float*>(packed.const_data_ptr());
  p.out = out.mutable_data_ptr();
  Tensor bias, residual;
  if (e.bias) {
    bias = as_contiguous(*e.bias);
    p.bias = data_of("bias", bias);
    p.bias_dtype = dtype_of(bias);
  }
  if (e.residual) {
    residual = as_contiguous(*e.residual);
    p.residual = data_of("residual", residual);
  }
  p.activation = static_cast<Activation>(e.activation);
  p.slope = static_cast<float>(e.slope);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t cuts = s.batch < 2 * threads && s.pixels() > 1024 ? ceil_div(2 * threads, s.batch) : 1;
  const int64_t parts = s.batch * cuts < threads ? s.batch * cuts : threads;
  over_parts(s.batch * cuts, 1, parts, [&](Range items) {
    for (int64_t item = items.begin; item < items.end; item++) {
      const Range rows = part(p.out_h, 1, cuts, item % cuts);
      if (rows.begin < rows.end) kernels().conv_planes(p, item / cuts, rows);
    }
  });
  if (!channels_last || s.n == 1 || s.pixels() == s.batch) return out;
  const ImageView turned = image_of("output", out, size, dtype_of(out));
  const Tensor last = empty_image(input.dim(), s.batch, s.n, size, input.scalar_type(), true);
  std::memcpy(last.mutable_data_ptr(), turned.image.data, static_cast<size_t>(out.numel() * size_of(dtype_of(out))));
  return last;
}

// A bias as tiles take it that are finished in registers.
static Tensor in_floats(const Tensor& bias) {
  if (dtype_of(bias) == DType::f32) return bias;
  const int64_t n = bias.numel();
  const Tensor out = empty_cpu(&n, 1, ScalarType::Float);
  const void* data = data_of("bias", bias);
  float* to = static_cast<float*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < n; i++) to[i] = value_of(data, dtype_of(bias), i);
  return out;
}

EpilogueImages set_epilogue(Gemm* g, const ConvEpilogue& e, const int64_t (&size)[3]) {
  EpilogueImages kept;
  if (e.bias) {
    kept.bias = in_floats(as_contiguous(*e.bias));
    g->bias = data_of("bias", kept.bias);
    g->bias_dtype = DType::f32;
  }
  if (e.residual) {
    kept.residual = image_of("residual", dense(*e.residual), size, dtype_of(*e.residual));
    g->residual = kept.residual.image.data;
    g->residual_row = e.residual->size(1);
  }
  g->activation = static_cast<Activation>(e.activation);
  g->slope = static_cast<float>(e.slope);
  return kept;
}

Tensor run_conv(const Tensor& input, const ConvShape& s, Flavour flavour, ConvAlgorithm algorithm, const Tensor& packed,
                const ConvEpilogue& e, bool channels_last) {
  const int64_t n = s.n_all(), size[3] = {s.out(0), s.out(1), s.out(2)};
  if (algorithm == ConvAlgorithm::planes) return run_planes(input, s, packed, e, channels_last);
  const OutputImage out(input.dim(), s.batch, n, size, input.scalar_type(), channels_last);
  if (out.out.numel() == 0) return out.out;
  const bool merged = algorithm == ConvAlgorithm::direct_rows, depthwise = algorithm == ConvAlgorithm::depthwise;
  const DType dtype = depthwise ? dtype_of(input) : flavour == Flavour::f32 ? DType::f32 : DType::bf16;
  const ImageView x = image_of("input", input, s.in, dtype, 0, 0, merged);
  Conv conv = conv_over(s, s.c, s.n, depthwise ? Flavour::f32 : flavour, x.image, out);
  conv.weight = packed.const_data_ptr();
  const EpilogueImages kept = set_epilogue(&conv.out_rows, e, size);
  switch (algorithm) {
    case ConvAlgorithm::winograd2: run_winograd(s, conv, 2); break;
    case ConvAlgorithm::winograd4: run_winograd(s, conv, 4); break;
    case ConvAlgorithm::depthwise: run_depthwise(depthwise_of(s, conv, dtype)); break;
    default: run_direct(s, conv, merged ? Taps::rows : Taps::single);
  }
  return out.finish();
}

}  // namespace pbm

#include "cpu/conv.h"

#include <memory>

namespace pbm {
namespace {

// --- shapes ----------------------------------------------------------------------------------------------------------

std::string list_of(const int64_t* values, int64_t count) {
  std::ostringstream s;
  s << '(';
  for (int64_t i = 0; i < count; i++) s << (i ? ", " : "") << values[i];
  s << ')';
  return s.str();
}

void check_list(const char* op, const char* name, const Ints& list, int64_t count, int64_t least) {
  STD_TORCH_CHECK(static_cast<int64_t>(list.size()) == count, op, ": ", name, " must have ", count, " entries, got ",
                  list_of(list.data(), static_cast<int64_t>(list.size())));
  for (const int64_t value : list)
    STD_TORCH_CHECK(value >= least, op, ": ", name, " must be at least ", least, ", got ", list_of(list.data(), count));
}

// The convolution of an input (N, groups·c, …) with n_all filters of these sizes.
ConvShape shape_for(const char* op, const Tensor& input, int64_t n_all, int64_t c, const Ints& kernel,
                    const ConvGeometry& g) {
  const int64_t dim = input.dim(), axes = dim - 2;
  STD_TORCH_CHECK(dim >= 3 && dim <= 5, op, ": input must have 3, 4 or 5 dimensions (N, C, spatial), got shape ",
                  shape_of(input));
  check_list(op, "kernel_size", kernel, axes, 1);
  check_list(op, "stride", g.stride, axes, 1);
  check_list(op, "padding", g.padding, 2 * axes, 0);
  check_list(op, "dilation", g.dilation, axes, 1);
  STD_TORCH_CHECK(g.groups >= 1 && n_all % g.groups == 0, op, ": groups must divide the ", n_all,
                  " output channels, got ", g.groups);
  STD_TORCH_CHECK(input.size(1) == g.groups * c, op, ": input must have ", g.groups * c,
                  " channels (groups = ", g.groups, " of ", c, "), got shape ", shape_of(input));
  ConvShape s{};
  s.batch = input.size(0);
  s.groups = g.groups;
  s.c = c;
  s.n = n_all / g.groups;
  for (int i = 0; i < 3; i++) {
    const int64_t axis = axis_of(dim, i), at = axis - 2;
    const bool there = axis >= 0;
    s.in[i] = there ? input.size(axis) : 1;
    s.kernel[i] = there ? kernel[at] : 1;
    s.stride[i] = there ? g.stride[at] : 1;
    s.dilation[i] = there ? g.dilation[at] : 1;
    s.pad[i] = there ? g.padding[2 * at] : 0;
    s.pad_end[i] = there ? g.padding[2 * at + 1] : 0;
    STD_TORCH_CHECK(s.out(i) > 0 || !there, op, ": the kernel reaches over ", (s.kernel[i] - 1) * s.dilation[i] + 1,
                    " pixels of an input of ", s.in[i] + s.pad[i] + s.pad_end[i],
                    " with its padding: nothing is left, input has shape ", shape_of(input));
  }
  return s;
}

Flavour flavour_of(const char* op, const Tensor& input, int64_t precision) {
  STD_TORCH_CHECK(precision == 0 || precision == 1, op, ": precision must be 0 (fp32) or 1 (bf16), got ", precision);
  return precision == 1 || input.scalar_type() == ScalarType::BFloat16 ? Flavour::bf16 : Flavour::f32;
}

ConvAlgorithm algorithm_of(const char* op, const ConvShape& shape, Flavour flavour, int64_t value) {
  STD_TORCH_CHECK(value >= 0 && value < kConvAlgorithmCount, op, ": algorithm must be in [0, ", kConvAlgorithmCount,
                  "), got ", value);
  const auto algorithm = static_cast<ConvAlgorithm>(value);
  if (algorithm == ConvAlgorithm::automatic) return choose_conv(shape, flavour, false);
  STD_TORCH_CHECK(conv_admits(shape, flavour, algorithm), op, ": algorithm ", value,
                  " does not compute a convolution of this kernel, stride, dilation, groups and precision");
  return algorithm;
}

// --- running ---------------------------------------------------------------------------------------------------------

// What taps outside the image read.
const void* zeros(int64_t bytes) {
  static const auto few = std::make_unique<char[]>(size_t{1} << 16);
  thread_local std::vector<char> many;
  if (bytes <= int64_t{1} << 16) return few.get();
  if (static_cast<int64_t>(many.size()) < bytes) many.resize(static_cast<size_t>(bytes));
  return many.data();
}

// Threads over rows, cut at multiples of a unit, and panels of every group.
template <class F>
void over_groups(int64_t groups, Grid grid, int64_t rows, int64_t unit, int64_t n, const F& f) {
  const int64_t each = grid.m * grid.n;
  parallel(groups * each, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const Range r = part(rows, unit, grid.m, i % each / grid.n);
      const Range columns = part(n, kPanel, grid.n, i % grid.n);
      const Range panels = {columns.begin / kPanel, ceil_div(columns.end, kPanel)};
      if (r.begin < r.end && panels.begin < panels.end) f(i / each, r, panels);
    }
  });
}

void run_direct(const ConvShape& s, Conv conv, bool rows) {
  ConvGrid grid{};
  const int64_t width = rows ? s.kernel[2] : 1;  // taps that are read as one
  std::vector<ConvTap> taps;
  for (int64_t i = 0; i < s.kernel[0]; i++)
    for (int64_t j = 0; j < s.kernel[1]; j++)
      for (int64_t q = 0; q < s.kernel[2]; q += width)
        taps.push_back(
            {{i * s.dilation[0] - s.pad[0], j * s.dilation[1] - s.pad[1], rows ? 0 : q * s.dilation[2] - s.pad[2]},
             static_cast<int64_t>(taps.size())});
  for (int axis = 0; axis < 3; axis++) {
    grid.count[axis] = s.out(axis);
    grid.out_step[axis] = 1;
    grid.in_step[axis] = s.stride[axis];
  }
  conv.c = width * s.c;
  conv.taps = grid.tap_count = static_cast<int64_t>(taps.size());
  grid.taps = taps.data();
  const int64_t threads = torch::stable::get_num_threads();
  const Grid cut = s.groups >= 2 * threads
                       ? Grid{1, 1}
                       : direct_grid(s.pixels(), conv.taps, panel_groups(conv.c, conv.out_rows.flavour),
                                     ceil_div(s.n, kPanel), threads);
  over_groups(s.groups, cut, s.pixels(), s.out(2), s.n,
              [&](int64_t group, Range r, Range panels) { kernels().conv_direct(conv, grid, group, r, panels); });
}

// A 1×1 convolution of stride 1 is a product of pixels; whether these lie at one distance.
bool is_product(const ConvShape& s, const ConvImage& x) {
  if (s.taps() != 1 || s.groups != 1) return false;
  int64_t distance = x.stride[2] * x.size[2];
  for (int axis = 2; axis >= 0; axis--)
    if (s.stride[axis] != 1 || s.pad[axis] || s.pad_end[axis]) return false;
  if (x.size[1] > 1 && x.stride[1] != distance) return false;
  distance *= x.size[1];
  if (x.size[0] > 1 && x.stride[0] != distance) return false;
  return s.batch == 1 || x.batch_stride == distance * x.size[0];
}

void run_product(const ConvShape& s, const Conv& conv) {
  Gemm g = conv.out_rows;
  g.m = s.pixels();
  g.k = s.c;
  g.a = conv.x.data;
  g.a_dtype = g.flavour == Flavour::f32 ? DType::f32 : DType::bf16;
  g.a_row = conv.x.stride[2];
  g.a_col = 1;
  g.prepare = APrepare::none;
  g.b = conv.weight;
  g.b_packed = true;
  run_gemm(g);
}

void run_winograd(const ConvShape& s, const Conv& conv, int m) {
  const Winograd p{conv, m, {s.pad[1], s.pad[2]}};
  const int64_t tiles = s.batch * ceil_div(s.out(1), m) * ceil_div(s.out(2), m);
  const int64_t threads = torch::stable::get_num_threads();
  const Grid cut = s.groups >= 2 * threads ? Grid{1, 1} : winograd_grid(s, m, threads);
  over_groups(s.groups, cut, tiles, 1, s.n,
              [&](int64_t group, Range r, Range panels) { kernels().conv_winograd(p, group, r, panels); });
}

void run_depthwise(const ConvShape& s, const Conv& conv, DType dtype) {
  Depthwise p{};
  p.conv = conv;
  p.dtype = dtype;
  for (int axis = 0; axis < 3; axis++) {
    p.kernel[axis] = s.kernel[axis];
    p.stride[axis] = s.stride[axis];
    p.pad[axis] = s.pad[axis];
    p.dilation[axis] = s.dilation[axis];
  }
  const int64_t rows = s.batch * s.out(0) * s.out(1), blocks = ceil_div(s.groups, kPanel);
  const int64_t values = s.pixels() * s.groups * s.taps();
  const int64_t threads = values > 65536 ? torch::stable::get_num_threads() : 1;
  const bool by_rows = ceil_div(rows, threads) * blocks <= ceil_div(blocks, threads) * rows;
  parallel(threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const Range r = by_rows ? part(rows, 1, threads, i) : Range{0, rows};
      const Range b = by_rows ? Range{0, blocks} : part(blocks, 1, threads, i);
      kernels().conv_depthwise(p, r, b);
    }
  });
}

// Rows of pixels at one distance, as the output's are.
Tensor dense(const Tensor& t) {
  int64_t stride = t.size(1);
  for (int64_t axis = t.dim() - 1; axis >= 2; axis--) {
    if (t.size(axis) > 1 && t.stride(axis) != stride) return torch::stable::contiguous(t);
    stride *= t.size(axis);
  }
  return t.size(0) > 1 && t.stride(0) != stride ? torch::stable::contiguous(t) : t;
}

// What an op does to the accumulators.
struct ConvEpilogue {
  std::optional<Tensor> bias, residual;
  int64_t activation = 0;
  double slope = 0;
};

Tensor run_conv(const Tensor& input, const ConvShape& s, Flavour flavour, ConvAlgorithm algorithm, const Tensor& packed,
                const ConvEpilogue& e, bool channels_last) {
  const int64_t n = s.n_all(), size[3] = {s.out(0), s.out(1), s.out(2)}, pixels = size[0] * size[1] * size[2];
  const bool one_layout = n == 1 || pixels == 1;
  Tensor out = empty_image(input.dim(), s.batch, n, size, input.scalar_type(), channels_last);
  if (out.numel() == 0) return out;
  const bool turned = !channels_last && !one_layout;
  const Tensor rows = turned ? empty_image(input.dim(), s.batch, n, size, input.scalar_type(), true) : out;

  const bool merged = algorithm == ConvAlgorithm::direct_rows, depthwise = algorithm == ConvAlgorithm::depthwise;
  const DType dtype = depthwise ? dtype_of(input) : flavour == Flavour::f32 ? DType::f32 : DType::bf16;
  const ImageView x = image_of("input", input, s.in, dtype, merged ? s.pad[2] : 0, merged ? s.pad_end[2] : 0);
  Conv conv{};
  conv.batch = s.batch;
  conv.groups = s.groups;
  conv.c = s.c;
  conv.x = x.image;
  for (int axis = 0; axis < 3; axis++) conv.out[axis] = size[axis];
  conv.weight = packed.const_data_ptr();
  conv.taps = s.taps();
  conv.zeros = zeros((merged ? s.kernel[2] : 1) * s.c * 4);
  Gemm& g = conv.out_rows;
  g.flavour = depthwise ? Flavour::f32 : flavour;
  g.n = s.n;
  g.c = rows.mutable_data_ptr();
  g.c_dtype = dtype_of(rows);
  g.c_row = n;
  Tensor bias;
  if (e.bias) {
    bias = as_contiguous(*e.bias);
    g.bias = data_of("bias", bias);
    g.bias_dtype = dtype_of(bias);
  }
  ImageView residual;
  if (e.residual) {
    residual = image_of("residual", dense(*e.residual), size, g.c_dtype);
    g.residual = residual.image.data;
    g.residual_row = n;
  }
  g.activation = static_cast<Activation>(e.activation);
  g.slope = static_cast<float>(e.slope);
  g.residual_first = true;
  switch (algorithm) {
    case ConvAlgorithm::winograd2: run_winograd(s, conv, 2); break;
    case ConvAlgorithm::winograd4: run_winograd(s, conv, 4); break;
    case ConvAlgorithm::depthwise: run_depthwise(s, conv, dtype); break;
    default: is_product(s, x.image) ? run_product(s, conv) : run_direct(s, conv, merged);
  }
  if (turned) copy_image(rows, out, size);
  return out;
}

// --- ops -------------------------------------------------------------------------------------------------------------

Ints kernel_of(const Tensor& weight) {
  Ints kernel;
  for (int64_t i = 2; i < weight.dim(); i++) kernel.push_back(weight.size(i));
  return kernel;
}

Tensor conv(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, Ints stride, Ints padding,
            Ints dilation, int64_t groups, int64_t precision, int64_t algorithm, bool channels_last) {
  const char* op = "conv";
  check_float(op, "input", input);
  check_dtype(op, "weight", weight, input.scalar_type());
  check_same_device(op, "weight", weight, input);
  check_dim(op, "weight", weight, input.dim());
  const ConvGeometry g{stride, padding, dilation, groups};
  const ConvShape s = shape_for(op, input, weight.size(0), weight.size(1), kernel_of(weight), g);
  check_bias(op, bias, weight.size(0), input);
  const Flavour flavour = flavour_of(op, input, precision);
  const ConvAlgorithm chosen = algorithm_of(op, s, flavour, algorithm);
  const Tensor packed = pack_filters(s, flavour, chosen, filters_of(weight, s));
  return run_conv(input, s, flavour, chosen, packed, {bias, std::nullopt}, channels_last);
}

Tensor pack_conv_weight(const Tensor& weight, int64_t groups, int64_t precision, int64_t algorithm) {
  const char* op = "pack_conv_weight";
  check_float(op, "weight", weight);
  STD_TORCH_CHECK(weight.dim() >= 3 && weight.dim() <= 5, op,
                  ": weight must have 3, 4 or 5 dimensions (out_channels, in_channels / groups, kernel…), got shape ",
                  shape_of(weight));
  STD_TORCH_CHECK(groups >= 1 && weight.size(0) % groups == 0, op, ": groups must divide the ", weight.size(0),
                  " output channels, got ", groups);
  STD_TORCH_CHECK(algorithm > 0 && algorithm < kConvAlgorithmCount, op, ": algorithm must be in [1, ",
                  kConvAlgorithmCount, "), got ", algorithm);
  ConvShape s{};
  s.groups = groups;
  s.n = weight.size(0) / groups;
  s.c = weight.size(1);
  for (int i = 0; i < 3; i++) {
    const int64_t axis = axis_of(weight.dim(), i);
    s.kernel[i] = axis < 0 ? 1 : weight.size(axis);
    s.stride[i] = s.dilation[i] = s.in[i] = 1;
  }
  const Flavour flavour = flavour_of(op, weight, precision);
  const auto chosen = static_cast<ConvAlgorithm>(algorithm);
  STD_TORCH_CHECK(conv_admits(s, flavour, chosen), op, ": algorithm ", algorithm, " takes no weight of shape ",
                  shape_of(weight), " with groups = ", groups, " in this precision");
  return pack_filters(s, flavour, chosen, filters_of(weight, s));
}

Tensor conv_packed(const Tensor& input, const Tensor& packed_weight, int64_t out_channels, Ints kernel_size,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, Ints stride, Ints padding,
                   Ints dilation, int64_t groups, int64_t activation, double slope, int64_t algorithm,
                   bool channels_last) {
  const char* op = "conv_packed";
  check_float(op, "input", input);
  STD_TORCH_CHECK(groups >= 1 && input.dim() >= 2 && input.size(1) % groups == 0, op, ": groups must divide the ",
                  input.dim() >= 2 ? input.size(1) : 0, " channels of input, got ", groups);
  const ConvGeometry g{stride, padding, dilation, groups};
  const ConvShape s = shape_for(op, input, out_channels, input.size(1) / groups, kernel_size, g);
  check_bias(op, bias, out_channels, input);
  STD_TORCH_CHECK(activation >= 0 && activation < kActivationCount, op, ": activation must be in [0, ",
                  kActivationCount, "), got ", activation);
  const ScalarType packed = packed_weight.scalar_type();
  STD_TORCH_CHECK(packed == ScalarType::Float || packed == ScalarType::BFloat16, op,
                  ": packed_weight must be float32 or bfloat16, as pack_conv_weight makes it, got ",
                  dtype_name(packed));
  STD_TORCH_CHECK(algorithm > 0, op, ": algorithm must be the one that packed_weight was packed for, got ", algorithm);
  const Flavour flavour = packed == ScalarType::Float ? Flavour::f32 : Flavour::bf16;
  const ConvAlgorithm chosen = algorithm_of(op, s, flavour, algorithm);
  int64_t sizes[3];
  packed_sizes(s, flavour, chosen, sizes);
  bool same = packed_weight.dim() == 3 && packed_weight.is_contiguous();
  for (int i = 0; same && i < 3; i++) same = packed_weight.size(i) == sizes[i];
  STD_TORCH_CHECK(same, op, ": packed_weight must be contiguous with shape ", list_of(sizes, 3),
                  ", as pack_conv_weight makes it for this convolution and algorithm, got ", shape_of(packed_weight));
  check_same_device(op, "packed_weight", packed_weight, input);
  if (residual) {
    check_dtype(op, "residual", *residual, input.scalar_type());
    check_same_device(op, "residual", *residual, input);
    bool fits = residual->dim() == input.dim() && residual->size(0) == s.batch && residual->size(1) == out_channels;
    for (int i = 0; fits && i < 3; i++)
      fits = axis_of(input.dim(), i) < 0 || residual->size(axis_of(input.dim(), i)) == s.out(i);
    STD_TORCH_CHECK(fits, op, ": residual must have the output's shape, ", out_channels,
                    " channels and spatial sizes (d, h, w) ", s.out(0), ", ", s.out(1), ", ", s.out(2), "; got ",
                    shape_of(*residual));
  }
  return run_conv(input, s, flavour, chosen, packed_weight, {bias, residual, activation, slope}, channels_last);
}

}  // namespace
}  // namespace pbm

STABLE_TORCH_LIBRARY_IMPL(pybigmodel, CPU, m) {
  m.impl("conv", TORCH_BOX(&pbm::conv));
  m.impl("conv_packed", TORCH_BOX(&pbm::conv_packed));
  m.impl("pack_conv_weight", TORCH_BOX(&pbm::pack_conv_weight));
}

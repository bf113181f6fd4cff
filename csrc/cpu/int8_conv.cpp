#include <cmath>
#include <cstring>

#include "cpu/conv_run.h"

namespace pbm {
namespace {

constexpr Flavour kInt8 = Flavour::u8s8;

// What is quantised: x ≈ (q − zero_point)·scale; scale 0: not quantised.
struct Quantised {
  double scale;
  int64_t zero_point;
};

void check_quantised(const char* op, const char* name, const Quantised& q) {
  STD_TORCH_CHECK(q.scale >= 0 && std::isfinite(q.scale), op, ": ", name, "_scale must be finite and at least 0, got ",
                  q.scale);
  STD_TORCH_CHECK(q.scale == 0 || (q.scale >= 0x1p-126 && q.scale <= 0x1p126), op, ": ", name,
                  "_scale must be between 2^-126 and 2^126, got ", q.scale);
  STD_TORCH_CHECK(q.zero_point >= 0 && q.zero_point <= 255, op, ": ", name,
                  "_zero_point must be between 0 and 255, got ", q.zero_point);
}

void check_input(const char* op, const Tensor& input, const Quantised& q) {
  const ScalarType t = input.scalar_type();
  STD_TORCH_CHECK(t == ScalarType::Byte || t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half,
                  op, ": input must be uint8, float32, bfloat16 or float16, got ", dtype_name(t));
  check_image(op, input);
  check_quantised(op, "input", q);
  STD_TORCH_CHECK(t != ScalarType::Byte || q.scale > 0, op, ": input_scale must be above 0 where input is uint8, got ",
                  q.scale);
}

// kernel, stride, padding before and after, dilation, axis by axis.
struct Window {
  Ints kernel, stride, padding, dilation;

  Window(const char* op, const Ints& list, int64_t axes) {
    STD_TORCH_CHECK(static_cast<int64_t>(list.size()) == 5 * axes, op, ": window must have ", 5 * axes,
                    " entries, kernel, stride, padding before and after and dilation of each axis; got ",
                    list_of(list.data(), static_cast<int64_t>(list.size())));
    for (int64_t i = 0; i < axes; i++) {
      const int64_t* w = &list[static_cast<size_t>(5 * i)];
      kernel.push_back(w[0]);
      stride.push_back(w[1]);
      padding.push_back(w[2]);
      padding.push_back(w[3]);
      dilation.push_back(w[4]);
    }
  }
};

void check_operands(const char* op, const Tensor& input, const Tensor& packed, const ConvShape& s) {
  STD_TORCH_CHECK(s.c * s.taps() <= kMaxInt8K, op, ": in_channels of a group times the kernel's taps must be at most ",
                  kMaxInt8K, ", so that int32 sums cannot overflow; got ", s.c * s.taps());
  int64_t sizes[3];
  packed_sizes(s, kInt8, ConvAlgorithm::direct, sizes);
  check_dtype(op, "packed_weight", packed, ScalarType::Char);
  bool same = packed.dim() == 3 && packed.is_contiguous();
  for (int i = 0; same && i < 3; i++) same = packed.size(i) == sizes[i];
  STD_TORCH_CHECK(same, op, ": packed_weight must be contiguous with shape ", list_of(sizes, 3),
                  ", as pack_int8_conv_weight makes it for this convolution, got ", shape_of(packed));
  check_same_device(op, "packed_weight", packed, input);
}

void check_residual(const char* op, const Tensor& residual, const ConvShape& s, const Tensor& input, ScalarType out,
                    const Quantised& q) {
  check_quantised(op, "residual", q);
  const ScalarType wanted = q.scale > 0 ? ScalarType::Byte : out == ScalarType::Byte ? ScalarType::Float : out;
  STD_TORCH_CHECK(residual.scalar_type() == wanted, op, ": residual must be ", dtype_name(wanted),
                  q.scale > 0 ? " where residual_scale is above 0, got " : " where residual_scale is 0, got ",
                  dtype_name(residual.scalar_type()));
  check_same_device(op, "residual", residual, input);
  check_conv_output(op, "residual", residual, s, input.dim());
}

void check_bias_of(const char* op, const Tensor& bias, int64_t n, const Tensor& input) {
  if (input.scalar_type() != ScalarType::Byte) return check_bias(op, bias, n, input);
  check_vector(op, "bias", bias, n, input);
  check_dtype(op, "bias", bias, ScalarType::Float);
}

// In any order of the axes that has no gaps.
Tensor without_gaps(const Tensor& t) {
  if (t.is_contiguous() || (t.stride(1) == 1 && dense(t).const_data_ptr() == t.const_data_ptr())) return t;
  return torch::stable::contiguous(t);
}

// Scale and zero point of the whole tensor; a scale of NaN where a value is not finite.
Quantised dynamic(const Tensor& input) {
  const Tensor x = without_gaps(input);
  const int64_t count = x.numel(), parts = threads_worth(count);
  std::vector<ValueRange> ranges(static_cast<size_t>(parts));
  parallel(parts, [&](int64_t i) {
    const Range r = part(count, 1, parts, i);
    ranges[static_cast<size_t>(i)] = kernels().value_range(data_of("input", x), dtype_of(x), r.begin, r.end);
  });
  float low = 0, high = 0;
  bool finite = true;
  for (const ValueRange& r : ranges) {
    finite = finite && !std::isnan(r.low);
    low = r.low < low ? r.low : low;
    high = r.high > high ? r.high : high;
  }
  const ByteScale found = byte_scale(low, high);
  return {finite ? found.scale : NAN, finite ? found.zero_point : 0};
}

// The image as the products read it: in place where it is that already, or quantised with its padding along w.
struct Bytes {
  Tensor tensor;
  ConvImage image;
  bool rows;  // whether a row of taps can be read as one

  Bytes(const Tensor& input, const ConvShape& s, const Quantised& q) {
    const Strides strides = strides_of(input);
    const int64_t lane = kernels().tile.u8_lane_bytes;
    const bool one = input.size(1) == 1;
    image.size[0] = s.in[0], image.size[1] = s.in[1], image.size[2] = s.in[2];
    rows = false;
    if (dtype_of(input) == DType::u8 && lane == 4 && s.c % 4 == 0 && strides.channel == 1) {
      tensor = input;
      image.data = data_of("input", input);
      image.batch_stride = strides.batch;
      for (int i = 0; i < 3; i++) image.stride[i] = strides.spatial[i];
      return;
    }
    // Few lanes a tap: a row of taps as one keeps the tile busy between two of them.
    rows = s.c <= 16 && s.groups == 1 && s.kernel[2] > 1 && s.dilation[2] == 1;
    const Tensor from = regular(input, s.in);
    const Strides f = strides_of(from);
    QuantizeImage p{};
    p.batch = s.batch;
    p.groups = s.groups;
    p.c = s.c;
    p.x = data_of("input", from);
    p.x_dtype = dtype_of(from);
    p.x_batch = f.batch;
    p.x_channel = one ? 1 : f.channel;
    for (int i = 0; i < 3; i++) {
      p.size[i] = s.in[i];
      p.x_stride[i] = f.spatial[i];
    }
    p.inverse_scale = 1.f / static_cast<float>(q.scale);
    p.zero_point = static_cast<int32_t>(q.zero_point);
    p.before = rows ? s.pad[2] : 0;
    p.after = rows ? s.pad_end[2] : 0;
    image.size[2] += p.before + p.after;
    image.stride[2] = s.groups * panel_groups(s.c, kInt8) * lane;
    image.stride[1] = image.size[2] * image.stride[2];
    image.stride[0] = s.in[1] * image.stride[1];
    image.batch_stride = s.in[0] * image.stride[0];
    const int64_t bytes = s.batch * image.batch_stride;
    tensor = empty_cpu(&bytes, 1, ScalarType::Byte);
    p.out = static_cast<char*>(tensor.mutable_data_ptr());
    image.data = p.out;
    over_parts(s.batch * s.in[0] * s.in[1], 1, threads_worth(2 * bytes),
               [&](Range r) { kernels().quantize_image(p, r.begin, r.end); });
  }
};

// What taps outside the image read: the zero point, as often as one tap has bytes.
struct ZeroPoints {
  std::vector<uint16_t> bytes;

  ZeroPoints(int64_t count, int64_t zero_point) {
    const bool widened = kernels().tile.u8_lane_bytes > 4;
    bytes.assign(static_cast<size_t>(count / 2 + 1), static_cast<uint16_t>(widened ? zero_point : zero_point * 257));
  }
};

Tensor pack_int8_conv_weight(const Tensor& weight, int64_t groups) {
  const char* op = "pack_int8_conv_weight";
  check_dtype(op, "weight", weight, ScalarType::Char);
  const ConvShape s = shape_of_weight(op, weight, groups);
  return pack_filters(s, kInt8, ConvAlgorithm::direct, filters_of(weight, s));
}

Tensor int8_conv(const Tensor& input, const Tensor& packed_weight, const Tensor& weight_scale,
                 const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, Ints window, int64_t groups,
                 int64_t activation, double slope, double input_scale, int64_t input_zero_point, double residual_scale,
                 int64_t residual_zero_point, double output_scale, int64_t output_zero_point, bool channels_last) {
  const char* op = "int8_conv";
  Quantised x_q{input_scale, input_zero_point};
  const Quantised r_q{residual_scale, residual_zero_point}, out_q{output_scale, output_zero_point};
  check_input(op, input, x_q);
  check_quantised(op, "output", out_q);
  check_dtype(op, "weight_scale", weight_scale, ScalarType::Float);
  check_dim(op, "weight_scale", weight_scale, 1);
  check_same_device(op, "weight_scale", weight_scale, input);
  check_groups(op, input, groups);
  const Window w(op, window, input.dim() - 2);
  const int64_t n = weight_scale.size(0);
  const ConvShape s =
      shape_for(op, input, n, input.size(1) / groups, w.kernel, {w.stride, w.padding, w.dilation, groups});
  check_operands(op, input, packed_weight, s);
  const bool bytes_in = input.scalar_type() == ScalarType::Byte;
  const ScalarType dtype = output_scale > 0 ? ScalarType::Byte : bytes_in ? ScalarType::Float : input.scalar_type();
  if (bias) check_bias_of(op, *bias, n, input);
  check_conv_activation(op, activation);
  if (residual) check_residual(op, *residual, s, input, dtype, r_q);

  const int64_t size[3] = {s.out(0), s.out(1), s.out(2)};
  const OutputImage out(input.dim(), s.batch, n, size, dtype, channels_last);
  if (out.out.numel() == 0) return out.out;
  if (x_q.scale == 0) x_q = dynamic(input);
  const Bytes x(input, s, x_q);
  Conv conv = conv_over(s, panel_groups(s.c, kInt8) * 4, s.n, kInt8, x.image, out);
  const ZeroPoints hidden(s.kernel[2] * panel_groups(s.c, kInt8) * kernels().tile.u8_lane_bytes, x_q.zero_point);
  conv.zeros = hidden.bytes.data();
  conv.weight = packed_weight.const_data_ptr();
  conv.x_scale = static_cast<float>(x_q.scale);
  conv.x_zero = static_cast<int32_t>(x_q.zero_point);
  Gemm& g = conv.out_rows;
  const Tensor scale = as_contiguous(weight_scale);
  g.col_scale = static_cast<const float*>(data_of("weight_scale", scale));
  ConvEpilogue epilogue{bias, residual, activation, slope};
  const EpilogueImages kept = set_epilogue(&g, epilogue, size);
  g.residual_scale = residual ? static_cast<float>(r_q.scale) : 0.f;
  g.residual_zero = static_cast<int32_t>(r_q.zero_point);
  g.c_inverse_scale = output_scale > 0 ? 1.f / static_cast<float>(output_scale) : 0.f;
  g.c_zero_point = static_cast<int32_t>(output_zero_point);
  run_direct(s, conv, x.rows ? Taps::padded_rows : Taps::single);
  return out.finish();
}

}  // namespace
}  // namespace pbm

STABLE_TORCH_LIBRARY_IMPL(pybigmodel, CPU, m) {
  m.impl("int8_conv", TORCH_BOX(&pbm::int8_conv));
  m.impl("pack_int8_conv_weight", TORCH_BOX(&pbm::pack_int8_conv_weight));
}

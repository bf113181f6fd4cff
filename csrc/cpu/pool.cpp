#include "cpu/kernels/pool.h"

#include "cpu/conv_run.h"

namespace pbm {
namespace {

using Spans = std::vector<PoolSpan>;

// What an op is told of its windows, axis by axis.
struct Windows {
  Ints kernel, stride, padding, dilation;
  bool ceil_mode;
  bool count_padding;  // in the divisors of averages
};

void check_pooled(const char* op, const Tensor& input, bool average) {
  const ScalarType t = input.scalar_type();
  STD_TORCH_CHECK(is_float_dtype(t) || (!average && t == ScalarType::Byte), op, ": input must be float32, bfloat16",
                  average ? " or float16" : ", float16 or uint8", ", got ", dtype_name(t));
  check_dim(op, "input", input, 4);
  STD_TORCH_CHECK(input.size(2) > 0 && input.size(3) > 0, op, ": input must have pixels, got shape ", shape_of(input));
}

void check_windows(const char* op, const Windows& w) {
  check_list(op, "kernel_size", w.kernel, 2, 1);
  check_list(op, "stride", w.stride, 2, 1);
  check_list(op, "padding", w.padding, 2, 0);
  check_list(op, "dilation", w.dilation, 2, 1);
  for (size_t i = 0; i < 2; i++)
    STD_TORCH_CHECK(w.padding[i] <= w.kernel[i] / 2, op, ": padding must be at most half of kernel_size, got ",
                    list_of(w.padding.data(), 2), " and ", list_of(w.kernel.data(), 2));
}

// As torch has it: with ceil_mode a last window that begins in the image or in the padding before it.
int64_t count_of_windows(const char* op, const Windows& w, const Tensor& input, size_t i) {
  const int64_t size = input.size(static_cast<int64_t>(i) + 2), reach = (w.kernel[i] - 1) * w.dilation[i] + 1;
  const int64_t room = size + 2 * w.padding[i] - reach + (w.ceil_mode ? w.stride[i] - 1 : 0);
  STD_TORCH_CHECK(room >= 0, op, ": the kernel reaches over ", reach, " pixels of an input of ",
                  size + 2 * w.padding[i], " with its padding: nothing is left, input has shape ", shape_of(input));
  const int64_t count = room / w.stride[i] + 1;
  return w.ceil_mode && (count - 1) * w.stride[i] >= size + w.padding[i] ? count - 1 : count;
}

Spans spans_of(const char* op, const Windows& w, const Tensor& input, size_t i) {
  const int64_t size = input.size(static_cast<int64_t>(i) + 2), step = w.dilation[i];
  Spans spans(static_cast<size_t>(count_of_windows(op, w, input, i)));
  int64_t start = -w.padding[i];
  for (PoolSpan& span : spans) {
    const int64_t last = start + (w.kernel[i] - 1) * step,
                  begin = start < 0 ? start + ceil_div(-start, step) * step : start;
    const int64_t end = last < size - 1 ? last : size - 1;
    const int64_t count = begin <= end ? (end - begin) / step + 1 : 0;
    const int64_t padded = start + w.kernel[i] < size + w.padding[i] ? w.kernel[i] : size + w.padding[i] - start;
    const int64_t divisor = w.count_padding ? padded : count;
    span = {count ? begin : 0, count, divisor > 1 ? divisor : 1};
    start += w.stride[i];
  }
  return spans;
}

// Windows of about equal size that cover the image: from ⌊i·size/count⌋ to ⌈(i + 1)·size/count⌉.
Spans adaptive_spans(int64_t size, int64_t count) {
  Spans spans;
  for (int64_t i = 0; i < count; i++) {
    const int64_t begin = i * size / count, length = ceil_div((i + 1) * size, count) - begin;
    spans.push_back({begin, length, length});
  }
  return spans;
}

// Whether joining columns once pays: pixels are in more than one window along w, of more than one row.
bool are_shared(const Spans& rows, const Spans& columns) {
  int64_t read = 0, high = 0, tall = 0;
  for (const PoolSpan& c : columns) {
    read += c.count;
    high = c.begin + c.count > high ? c.begin + c.count : high;
  }
  for (const PoolSpan& r : rows) tall = r.count > tall ? r.count : tall;
  return tall > 1 && read > high;
}

void run_pool(const Pool& p, int64_t rows, int64_t values) {
  over_rows_or_channels(rows, p.channels, 64 / size_of(p.dtype), threads_worth(values),
                        [&](Range r, Range channels) { kernels().pool(p, r, channels); });
}

Tensor pooled(const Tensor& input, bool average, const Spans (&spans)[2], const int64_t (&step)[2], int64_t divisor,
              bool channels_last) {
  const int64_t in[3] = {1, input.size(2), input.size(3)};
  const int64_t size[3] = {1, static_cast<int64_t>(spans[0].size()), static_cast<int64_t>(spans[1].size())};
  const OutputImage out(4, input.size(0), input.size(1), size, input.scalar_type(), channels_last);
  if (out.out.numel() == 0) return out.out;
  const ImageView x = image_of("input", input, in, dtype_of(input));
  Pool p{};
  p.average = average;
  p.dtype = dtype_of(input);
  p.channels = input.size(1);
  for (int i = 0; i < 2; i++) {
    p.out_size[i] = size[i + 1];
    p.step[i] = step[i];
  }
  p.rows = spans[0].data();
  p.columns = spans[1].data();
  p.shared = are_shared(spans[0], spans[1]);
  p.divisor = static_cast<float>(divisor);
  p.x = x.image.data;
  p.x_batch = x.image.batch_stride;
  p.x_row = x.image.stride[1];
  p.x_pixel = x.image.stride[2];
  p.out = out.rows.mutable_data_ptr();
  run_pool(p, input.size(0) * size[1], input.numel());
  return out.finish();
}

Tensor windowed(const char* op, const Tensor& input, bool average, const Windows& w, int64_t divisor,
                bool channels_last) {
  check_pooled(op, input, average);
  check_windows(op, w);
  const Spans spans[2] = {spans_of(op, w, input, 0), spans_of(op, w, input, 1)};
  return pooled(input, average, spans, {w.dilation[0], w.dilation[1]}, divisor, channels_last);
}

Tensor max_pool2d(const Tensor& input, Ints kernel_size, Ints stride, Ints padding, Ints dilation, bool ceil_mode,
                  bool channels_last) {
  return windowed("max_pool2d", input, false, {kernel_size, stride, padding, dilation, ceil_mode, false}, 0,
                  channels_last);
}

Tensor avg_pool2d(const Tensor& input, Ints kernel_size, Ints stride, Ints padding, bool ceil_mode,
                  bool count_include_pad, int64_t divisor, bool channels_last) {
  return windowed("avg_pool2d", input, true, {kernel_size, stride, padding, {1, 1}, ceil_mode, count_include_pad},
                  divisor, channels_last);
}

Tensor adaptive_avg_pool2d(const Tensor& input, Ints output_size, bool channels_last) {
  const char* op = "adaptive_avg_pool2d";
  check_pooled(op, input, true);
  check_list(op, "output_size", output_size, 2, 1);
  const Spans spans[2] = {adaptive_spans(input.size(2), output_size[0]), adaptive_spans(input.size(3), output_size[1])};
  return pooled(input, true, spans, {1, 1}, 0, channels_last);
}

}  // namespace
}  // namespace pbm

STABLE_TORCH_LIBRARY_IMPL(pybigmodel, CPU, m) {
  m.impl("max_pool2d", TORCH_BOX(&pbm::max_pool2d));
  m.impl("avg_pool2d", TORCH_BOX(&pbm::avg_pool2d));
  m.impl("adaptive_avg_pool2d", TORCH_BOX(&pbm::adaptive_avg_pool2d));
}

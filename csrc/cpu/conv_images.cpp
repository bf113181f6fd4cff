#include "cpu/conv.h"

namespace pbm {

Tensor empty_image(int64_t dim, int64_t batch, int64_t channels, const int64_t* size, ScalarType dtype,
                   bool channels_last) {
  int64_t sizes[5] = {batch, channels}, strides[5];
  for (int i = 0; i < 3; i++)
    if (axis_of(dim, i) >= 0) sizes[axis_of(dim, i)] = size[i];
  int64_t stride = channels_last ? channels : 1;
  if (channels_last) strides[1] = 1;
  for (int64_t i = dim - 1; i >= (channels_last ? 2 : 1); i--) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  strides[0] = stride;
  return empty_strided_cpu(sizes, strides, dim, dtype);
}

namespace {

void run_copy(const ConvCopy& p) {
  const int64_t rows = p.batch * p.size[0] * p.size[1];
  const int64_t values = rows * p.size[2] * p.channels;
  if (values == 0) return;
  const int64_t threads = threads_worth(values);
  if (rows >= threads) return over_parts(rows, 1, threads, [&](Range r) { kernels().conv_copy(p, r.begin, r.end); });
  over_parts(p.size[2], kPanel, threads, [&](Range w) {
    ConvCopy some = p;
    some.x = static_cast<const char*>(p.x) + w.begin * p.x_stride[2] * size_of(p.x_dtype);
    some.out = static_cast<char*>(p.out) + w.begin * p.out_stride[2] * size_of(p.out_dtype);
    some.size[2] = w.end - w.begin;
    if (w.begin > 0) some.zeros_before = 0;
    if (w.end < p.size[2]) some.zeros_after = 0;
    kernels().conv_copy(some, 0, rows);
  });
}

ConvCopy copy_from(const char* name, const Tensor& t, const int64_t* size) {
  const Strides s = strides_of(t);
  ConvCopy p{};
  p.batch = t.size(0);
  p.channels = t.size(1);
  p.x = data_of(name, t);
  p.x_dtype = dtype_of(t);
  p.x_batch = s.batch;
  p.x_channel = s.channel;
  for (int i = 0; i < 3; i++) {
    p.size[i] = size[i];
    p.x_stride[i] = s.spatial[i];
  }
  return p;
}

}  // namespace

Tensor regular(const Tensor& t, const int64_t* size) {
  const Strides s = strides_of(t);
  const bool fine = s.channel == 1 || s.spatial[2] == 1 || t.size(1) == 1 || size[2] == 1;
  return fine ? t : torch::stable::contiguous(t);
}

ImageView image_of(const char* name, const Tensor& tensor, const int64_t* sizes, DType dtype, int64_t before,
                   int64_t after, bool touching) {
  const int64_t channels = tensor.size(1);
  Strides s = strides_of(tensor);
  ImageView view;
  for (int i = 0; i < 3; i++) view.image.size[i] = sizes[i];
  const bool apart = touching && s.spatial[2] != channels && sizes[2] > 1;
  if (dtype_of(tensor) == dtype && (s.channel == 1 || channels == 1) && before + after == 0 && !apart) {
    view.tensor = tensor;
    view.image.data = data_of(name, tensor);
    view.image.batch_stride = s.batch;
    for (int i = 0; i < 3; i++) view.image.stride[i] = s.spatial[i];
    return view;
  }
  const Tensor from = regular(tensor, sizes);
  int64_t size[3] = {sizes[0], sizes[1], before + sizes[2] + after};
  view.tensor = empty_image(5, tensor.size(0), channels, size, scalar_of(dtype), true);
  ConvCopy p = copy_from(name, from, sizes);
  // An axis of one element counts as contiguous.
  if (p.x_channel != 1 && p.x_stride[2] != 1) (channels == 1 ? p.x_channel : p.x_stride[2]) = 1;
  p.out_dtype = dtype;
  p.out_channel = 1;
  p.out_batch = view.image.batch_stride = size[0] * size[1] * size[2] * channels;
  p.out_stride[0] = view.image.stride[0] = size[1] * size[2] * channels;
  p.out_stride[1] = view.image.stride[1] = size[2] * channels;
  p.out_stride[2] = view.image.stride[2] = channels;
  p.out = static_cast<char*>(view.tensor.mutable_data_ptr()) + before * channels * size_of(dtype);
  p.zeros_before = before;
  p.zeros_after = after;
  run_copy(p);
  view.image.data = view.tensor.const_data_ptr();
  view.image.size[2] = size[2];
  return view;
}

Tensor dense(const Tensor& t) {
  int64_t stride = t.size(1);
  for (int64_t axis = t.dim() - 1; axis >= 2; axis--) {
    if (t.size(axis) > 1 && t.stride(axis) != stride) return torch::stable::contiguous(t);
    stride *= t.size(axis);
  }
  return t.size(0) > 1 && t.stride(0) != stride ? torch::stable::contiguous(t) : t;
}

void copy_image(const Tensor& from, const Tensor& to, const int64_t* size) {
  const Strides s = strides_of(to);
  ConvCopy p = copy_from("output", from, size);
  p.x_channel = 1;
  p.out = to.mutable_data_ptr();
  p.out_dtype = dtype_of(to);
  p.out_batch = s.batch;
  p.out_channel = s.channel;
  for (int i = 0; i < 3; i++) p.out_stride[i] = s.spatial[i];
  p.out_stride[2] = 1;  // of one axis less, or of one pixel
  run_copy(p);
}

}  // namespace pbm

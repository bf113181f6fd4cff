// From torch tensors to the kernels' Gemm, and over torch's own threads.
#pragma once

#include <atomic>
#include <new>
#include <vector>

#include "common/checks.h"
#include "cpu/kernels/tiers.h"

namespace pbm {

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Byte: return DType::u8;
    case ScalarType::Char: return DType::s8;
    case ScalarType::Int: return DType::s32;
    default: return DType::f32;
  }
}

// A fresh CPU tensor; the shim is half a microsecond cheaper than torch::stable::empty.
inline Tensor empty_strided_cpu(const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType dtype) {
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STD_TORCH_CHECK(aoti_torch_empty_strided(dim, sizes, strides, code, aoti_torch_device_type_cpu(), 0, &handle) ==
                      AOTI_TORCH_SUCCESS,
                  "pybigmodel: not enough memory for a tensor of ", dim ? sizes[0] * strides[0] : 1, " elements of ",
                  dtype_name(dtype));
  return Tensor(handle);
}

inline Tensor empty_cpu(const int64_t* sizes, int64_t dim, ScalarType dtype) {
  int64_t strides[64];
  STD_TORCH_CHECK(dim <= 64, "at most 64 dimensions are supported, got ", dim);
  int64_t stride = 1;
  for (int64_t i = dim - 1; i >= 0; i--) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  return empty_strided_cpu(sizes, strides, dim, dtype);
}

// torch::stable::contiguous goes through the dispatcher, a third of a microsecond, even where there is nothing to do.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline const void* data_of(const char* name, const Tensor& t) {
  const void* data = t.const_data_ptr();
  STD_TORCH_CHECK(data || t.numel() == 0, "pybigmodel: ", name, " must have its storage, got a tensor of shape ",
                  shape_of(t), " whose storage was freed");
  return data;
}

// A tensor seen as rows of its last dimension.
struct RowView {
  Tensor tensor;  // keeps a copy alive, where one was needed
  const void* data;
  int64_t rows, columns, row_stride;  // elements
};

// Without a copy where the last dimension is contiguous and the leading ones have one common stride.
inline RowView row_view(const char* name, const Tensor& t) {
  const int64_t dim = t.dim(), columns = dim ? t.size(dim - 1) : 1;
  int64_t rows = 1, row_stride = columns;
  bool regular = dim < 1 || t.stride(dim - 1) == 1 || columns <= 1;
  bool first = true;
  for (int64_t i = dim - 2; i >= 0; i--) {
    const int64_t size = t.size(i);
    if (size != 1 && regular) {
      if (first) {
        row_stride = t.stride(i);
        first = false;
      } else {
        regular = t.stride(i) == row_stride * rows;
      }
    }
    rows *= size;
  }
  if (!regular) {
    const Tensor copy = torch::stable::contiguous(t);
    return {copy, data_of(name, copy), rows, columns, columns};
  }
  return {t, data_of(name, t), rows, columns, row_stride};
}

// The output of a product over rows of `input`: its leading dimensions, then n.
inline Tensor output_like(const Tensor& input, int64_t n) {
  const int64_t dim = input.dim();
  int64_t sizes[64];
  STD_TORCH_CHECK(dim <= 64, "at most 64 dimensions are supported, got ", dim);
  for (int64_t i = 0; i + 1 < dim; i++) sizes[i] = input.size(i);
  sizes[dim - 1] = n;
  return empty_cpu(sizes, dim, input.scalar_type());
}

// f(i) for each i < count, over the threads.
template <class F>
void parallel(int64_t count, const F& f) {
  if (count == 1) return f(int64_t{0});
  std::atomic<bool> out_of_memory = false;  // an exception would lose its text on the way through torch's C interface
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    try {
      for (int64_t i = begin; i < end; i++) f(i);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  STD_TORCH_CHECK(!out_of_memory, "pybigmodel: not enough memory to prepare the operands of a product");
}

// f(range) of so many parts of 0 … count, cut at multiples of a unit, over the threads.
template <class F>
void over_parts(int64_t count, int64_t unit, int64_t parts, const F& f) {
  parallel(parts, [&](int64_t i) {
    const Range r = part(count, unit, parts, i);
    if (r.begin < r.end) f(r);
  });
}

// One where waking the others takes longer than a pass over so many values.
inline int64_t threads_worth(int64_t values) { return values > 65536 ? torch::stable::get_num_threads() : 1; }

inline void run_gemm(const Gemm& g) {
  if (g.m == 0 || g.n == 0) return;
  const Kernels& k = kernels();
  const Grid grid = partition(g, torch::stable::get_num_threads());
  parallel(grid.m * grid.n, [&](int64_t i) {
    const Range m = part(g.m, 1, grid.m, i / grid.n), n = part(g.n, kPanel, grid.n, i % grid.n);
    if (m.begin < m.end && n.begin < n.end) k.gemm(g, m, n);
  });
}

// The fields of an epilogue that every op of the family shares; the returned tensors keep copies alive.
struct EpilogueTensors {
  std::optional<Tensor> bias, residual;
};

inline EpilogueTensors set_epilogue(Gemm* g, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                                    int64_t activation) {
  EpilogueTensors kept;
  if (bias) {
    kept.bias = as_contiguous(*bias);
    g->bias = data_of("bias", *kept.bias);
    g->bias_dtype = dtype_of(*kept.bias);
  }
  if (residual) {
    const RowView view = row_view("residual", *residual);
    kept.residual = view.tensor;
    g->residual = view.data;
    g->residual_row = view.row_stride;
  }
  g->activation = static_cast<Activation>(activation);
  return kept;
}

inline Gemm gemm_over(const RowView& x, const Tensor& out, int64_t n) {
  Gemm g{};
  g.m = x.rows;
  g.n = n;
  g.k = x.columns;
  g.a = x.data;
  g.a_dtype = dtype_of(x.tensor);
  g.a_row = x.row_stride;
  g.a_col = 1;
  g.c = out.mutable_data_ptr();
  g.c_dtype = dtype_of(out);
  g.c_row = n;
  return g;
}

}  // namespace pbm

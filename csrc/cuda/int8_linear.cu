#include <optional>
#include <vector>

#include "common/checks.h"
#include "cuda/elements.h"
#include "cuda/kernels/int8_linear_sm80.cuh"
#include "cuda/launch.h"
#include "cuda/quantize_per_token.h"

namespace pbm::cuda {
namespace {

constexpr const char* kOp = "int8_linear";

void check_packed_weight(const Tensor& packed_weight, int64_t n, int64_t k, const Tensor& input) {
  check_packed_int8_weight(kOp, packed_weight, n, k, input);
  // The copies into shared memory move 16 bytes.
  STD_TORCH_CHECK(is_aligned(packed_weight.const_data_ptr(), 16), kOp,
                  ": packed_weight must start at a multiple of 16 bytes, as what "
                  "pack_int8_linear_weight returns does; got a view at storage offset ",
                  packed_weight.storage_offset());
}

template <typename T, typename Q, typename Tile>
void launch_tile(const Int8LinearParams<T>& params, cudaStream_t stream) {
  const int64_t blocks = int8_linear_blocks<Tile>(params.rows, params.columns);
  STD_TORCH_CHECK(blocks <= kMaxBlocks, kOp, ": the output must have at most ", kMaxBlocks, " tiles, got ", blocks);
  launch("int8_linear_sm80", int8_linear_sm80<T, Q, Tile>, blocks, Tile::kThreads, stream, params);
}

template <typename T, typename Q>
void launch_product(const Int8LinearParams<T>& params, const LaunchScope& scope) {
  switch (choose_int8_linear({params.rows, params.columns, scope.multiprocessors()})) {
    case Int8LinearTileName::small: return launch_tile<T, Q, Int8LinearTileSmall>(params, scope.stream());
    case Int8LinearTileName::medium: return launch_tile<T, Q, Int8LinearTileMedium>(params, scope.stream());
    case Int8LinearTileName::large: return launch_tile<T, Q, Int8LinearTileLarge>(params, scope.stream());
  }
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  return torch::stable::contiguous(*tensor);
}

Tensor int8_linear(const Tensor& input, const Tensor& packed_weight, const Tensor& weight_scale,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, int64_t activation,
                   bool symmetric) {
  check_float(kOp, "input", input);
  STD_TORCH_CHECK(input.dim() >= 1, kOp, ": input must have at least 1 dimension, got a scalar");
  check_dtype(kOp, "weight_scale", weight_scale, ScalarType::Float);
  check_dim(kOp, "weight_scale", weight_scale, 1);
  check_same_device(kOp, "weight_scale", weight_scale, input);
  const int64_t depth = input.size(input.dim() - 1), columns = weight_scale.size(0);
  check_int8_k(kOp, depth);
  check_packed_weight(packed_weight, columns, depth, input);
  check_bias(kOp, bias, columns, input);
  check_residual(kOp, residual, columns, input);
  check_activation(kOp, activation);

  std::vector<int64_t> sizes;
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < input.dim(); i++) {
    sizes.push_back(input.size(i));
    rows *= input.size(i);
  }
  sizes.push_back(columns);
  Tensor output = torch::stable::new_empty(input, sizes);
  if (rows == 0 || columns == 0) return output;

  const LaunchScope scope(input);
  const Tensor x = torch::stable::contiguous(input);
  const Tensor w_scale = torch::stable::contiguous(weight_scale);
  const std::optional<Tensor> b = contiguous(bias), r = contiguous(residual);
  // Rows of q at 16-byte boundaries, as the product's copies want them.
  const int64_t q_stride = ceil_div(depth, 16) * 16;
  using Sizes = std::vector<int64_t>;
  Tensor q = torch::stable::new_empty(x, Sizes{rows, q_stride}, ScalarType::Byte);
  Tensor scale = torch::stable::new_empty(x, Sizes{rows}, ScalarType::Float);
  Tensor zero_point = torch::stable::new_empty(x, Sizes{rows}, ScalarType::Int);
  const QuantizedRows quantized{q.mutable_data_ptr<uint8_t>(), q_stride, scale.mutable_data_ptr<float>(),
                                zero_point.mutable_data_ptr<int32_t>()};
  quantize_rows(x, rows, depth, symmetric, quantized, scope.stream());

  with_element_type(x.scalar_type(), [&]<typename T>() {
    Int8LinearParams<T> p{};
    p.q = quantized.q;
    p.q_stride = q_stride;
    p.x_scale = quantized.scale;
    p.zero_point = quantized.zero_point;
    p.packed_weight = packed_weight.const_data_ptr<int8_t>();
    p.w_scale = w_scale.const_data_ptr<float>();
    p.bias = b.has_value() ? b->const_data_ptr() : nullptr;
    p.bias_is_float = b.has_value() && b->scalar_type() == ScalarType::Float;
    p.residual = r.has_value() ? static_cast<const T*>(r->const_data_ptr()) : nullptr;
    p.output = static_cast<T*>(output.mutable_data_ptr());
    p.rows = rows;
    p.columns = columns;
    p.groups = panel_groups(depth, Flavour::u8s8);
    p.activation = static_cast<Activation>(activation);
    const size_t packet = kColumnsPerLane * sizeof(T);
    p.vectorized = columns % kColumnsPerLane == 0 && is_aligned(p.output, packet) && is_aligned(p.residual, packet);
    if (symmetric) {
      launch_product<T, int8_t>(p, scope);
    } else {
      launch_product<T, uint8_t>(p, scope);
    }
  });
  return output;
}

}  // namespace
}  // namespace pbm::cuda

STABLE_TORCH_LIBRARY_IMPL(pybigmodel, CUDA, m) { m.impl("int8_linear", TORCH_BOX(&pbm::cuda::int8_linear)); }

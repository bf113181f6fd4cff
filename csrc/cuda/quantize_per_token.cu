#include <tuple>
#include <vector>

#include "common/checks.h"
#include "cuda/elements.h"
#include "cuda/kernels/quantize_per_token_sm80.cuh"
#include "cuda/launch.h"
#include "cuda/quantize_per_token.h"

namespace pbm::cuda {
namespace {

template <typename T, int kVector>
void launch_quantize(const QuantizePerTokenParams<T>& params, bool symmetric, const QuantizePerTokenConfig& config,
                     cudaStream_t stream) {
  launch("quantize_per_token_sm80",
         symmetric ? quantize_per_token_sm80<T, kVector, true> : quantize_per_token_sm80<T, kVector, false>,
         config.blocks, config.threads, stream, params);
}

std::tuple<Tensor, Tensor, Tensor> quantize_per_token(const Tensor& input, bool symmetric) {
  const char* op = "quantize_per_token";
  check_float(op, "input", input);
  STD_TORCH_CHECK(input.dim() >= 1, op, ": input must have at least 1 dimension, got a scalar");

  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < input.dim(); i++) sizes.push_back(input.size(i));
  Tensor q = torch::stable::new_empty(input, sizes, symmetric ? ScalarType::Char : ScalarType::Byte);
  const int64_t depth = sizes.back();
  sizes.pop_back();
  Tensor scale = torch::stable::new_empty(input, sizes, ScalarType::Float);
  Tensor zero_point = torch::stable::new_empty(input, sizes, ScalarType::Int);

  const LaunchScope scope(input);
  const Tensor x = torch::stable::contiguous(input);
  quantize_rows(x, scale.numel(), depth, symmetric,
                {static_cast<uint8_t*>(q.mutable_data_ptr()), depth, scale.mutable_data_ptr<float>(),
                 zero_point.mutable_data_ptr<int32_t>()},
                scope.stream());
  return {q, scale, zero_point};
}

}  // namespace

void quantize_rows(const Tensor& input, int64_t rows, int64_t depth, bool symmetric, const QuantizedRows& out,
                   cudaStream_t stream) {
  if (rows == 0) return;
  with_element_type(input.scalar_type(), [&]<typename T>() {
    const auto* x = static_cast<const T*>(input.const_data_ptr());
    const QuantizePerTokenParams<T> params{x, rows, depth, out.q, out.q_stride, out.scale, out.zero_point};
    const QuantizePerTokenConfig config =
        choose_quantize_per_token({rows, depth, out.q_stride, sizeof(T), is_aligned(x, 16) && is_aligned(out.q, 16)});
    if (config.vectorized) {
      launch_quantize<T, 16 / sizeof(T)>(params, symmetric, config, stream);
    } else {
      launch_quantize<T, 1>(params, symmetric, config, stream);
    }
  });
}

}  // namespace pbm::cuda

STABLE_TORCH_LIBRARY_IMPL(pybigmodel, CUDA, m) {
  m.impl("quantize_per_token", TORCH_BOX(&pbm::cuda::quantize_per_token));
}

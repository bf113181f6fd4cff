#include <vector>

#include "common/checks.h"
#include "cuda/kernels/pack_int8_linear_weight_sm80.cuh"
#include "cuda/launch.h"

namespace pbm::cuda {
namespace {

Tensor pack_int8_linear_weight(const Tensor& weight) {
  const char* op = "pack_int8_linear_weight";
  check_dtype(op, "weight", weight, ScalarType::Char);
  check_dim(op, "weight", weight, 2);
  const int64_t columns = weight.size(0), depth = weight.size(1);
  check_int8_k(op, depth);
  const int64_t panels = ceil_div(columns, kPanel);
  STD_TORCH_CHECK(panels <= kMaxBlocks, op, ": weight must have at most ", kMaxBlocks * kPanel, " rows, got ", columns);

  const LaunchScope scope(weight);
  const Tensor w = torch::stable::contiguous(weight);
  Tensor packed =
      torch::stable::new_empty(w, std::vector<int64_t>{panels, panel_groups(depth, Flavour::u8s8) + 1, kGroupBytes});
  if (panels > 0) {
    launch("pack_int8_linear_weight_sm80", pack_int8_linear_weight_sm80, panels, kPackThreads, scope.stream(),
           {w.const_data_ptr<int8_t>(), columns, depth, packed.mutable_data_ptr<int8_t>()});
  }
  return packed;
}

}  // namespace
}  // namespace pbm::cuda

STABLE_TORCH_LIBRARY_IMPL(pybigmodel, CUDA, m) {
  m.impl("pack_int8_linear_weight", TORCH_BOX(&pbm::cuda::pack_int8_linear_weight));
}

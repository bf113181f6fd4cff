// From torch's dtypes to the kernels' element types.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstddef>
#include <cstdint>

#include "cuda/kernels/element.h"

namespace pbm::cuda {

// f.template operator()<T>() with the element type of a dtype that passed check_float().
template <typename F>
void with_element_type(torch::headeronly::ScalarType dtype, F&& f) {
  using torch::headeronly::ScalarType;
  if (dtype == ScalarType::Float) return f.template operator()<float>();
  if (dtype == ScalarType::BFloat16) return f.template operator()<BFloat16>();
  f.template operator()<Float16>();
}

inline bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

}  // namespace pbm::cuda

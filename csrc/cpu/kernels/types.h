// The words that kernels and their callers share: dtypes here, flavours of product and activations in common/types.h.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace pbm {

enum class DType : int { f32, bf16, f16, u8, s8, s32 };
constexpr int64_t size_of(DType t) {
  return t == DType::f32 || t == DType::s32 ? 4 : t == DType::bf16 || t == DType::f16 ? 2 : 1;
}

}  // namespace pbm

#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace pbm::cuda {

struct QuantizedRows {
  uint8_t* q;        // int8 if symmetric
  int64_t q_stride;  // bytes, ≥ depth; the bytes in between become 0
  float* scale;
  int32_t* zero_point;
};

// Quantises a contiguous, checked (rows, depth) input on `stream`; its device is current.
void quantize_rows(const torch::stable::Tensor& input, int64_t rows, int64_t depth, bool symmetric,
                   const QuantizedRows& out, cudaStream_t stream);

}  // namespace pbm::cuda

// What a kernel sees of the machine besides the instructions in ptx/. Kernels use nothing else of CUDA C++, so the
// simulator (tests/cpp/cuda_sim, put before csrc on the include path) runs their source on the host.
#pragma once

#include <cstdint>

#include "cuda/kernels/host_device.h"

namespace pbm::cuda {

constexpr int kWarpSize = 32;

PBM_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
PBM_DEVICE int lane_index() { return thread_index() % kWarpSize; }
PBM_DEVICE int warp_index() { return thread_index() / kWarpSize; }
PBM_DEVICE int block_size() { return static_cast<int>(blockDim.x); }
PBM_DEVICE int64_t block_index() { return blockIdx.x; }
PBM_DEVICE int64_t grid_size() { return gridDim.x; }

// Every thread of the block arrives; what any of them wrote to shared or global memory before is visible after.
PBM_DEVICE void barrier() { __syncthreads(); }

// Every lane of the warp calls it and gets the value of lane ^ mask.
PBM_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// The block's shared memory as a T: uninitialised, one object per T and kernel. T is trivial; statically allocated, so
// at most 48 KiB.
template <typename T>
PBM_DEVICE T& shared_storage() {
  static_assert(sizeof(T) <= 48 * 1024, "statically allocated shared memory ends at 48 KiB");
  __shared__ T storage;
  return storage;
}

}  // namespace pbm::cuda

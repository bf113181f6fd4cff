// csrc/cuda/kernels/device.h, simulated.
#pragma once

#include <cstdint>

#include "cuda/kernels/host_device.h"
#include "simulator.h"

namespace pbm::cuda {

constexpr int kWarpSize = 32;

inline cuda_sim::Simulator& simulator() { return cuda_sim::Simulator::instance(); }

inline int thread_index() { return simulator().thread(); }
inline int lane_index() { return thread_index() % kWarpSize; }
inline int warp_index() { return thread_index() / kWarpSize; }
inline int block_size() { return simulator().threads(); }
inline int64_t block_index() { return simulator().block(); }
inline int64_t grid_size() { return simulator().grid_size(); }

inline void barrier() { simulator().barrier(); }

inline float shuffle_xor(float value, int mask) {
  return simulator().gather(value)[static_cast<size_t>(lane_index() ^ mask)];
}

template <typename T>
T& shared_storage() {
  static_assert(sizeof(T) <= cuda_sim::Simulator::kSharedBytes);
  return *static_cast<T*>(simulator().shared());
}

}  // namespace pbm::cuda

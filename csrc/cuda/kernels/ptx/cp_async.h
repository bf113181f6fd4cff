// Asynchronous copies from global to shared memory.
// PTX ISA, "Data Movement and Conversion Instructions: cp.async", "cp.async.commit_group", "cp.async.wait_group"; since
// PTX ISA 7.0, sm_80.
#pragma once

#include <cstdint>

#include "cuda/kernels/host_device.h"

namespace pbm::cuda::ptx {

// 16 bytes at `target` (shared) become the 16 at `source` (global) if `valid`, else zeros, and `source` is not read.
// Both addresses are 16-byte aligned. L1 is bypassed (.cg): each block reads a byte once.
PBM_DEVICE void cp_async_16(void* target, const void* source, bool valid) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
  const int source_bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(source_bytes)
               : "memory");
}

// Closes the group of this thread's copies since the last call; the group may be empty.
PBM_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns when all but the newest kPending groups of this thread have landed. Other threads see them after a barrier.
template <int kPending>
PBM_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace pbm::cuda::ptx

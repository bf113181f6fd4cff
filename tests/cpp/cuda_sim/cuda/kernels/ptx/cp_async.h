// csrc/cuda/kernels/ptx/cp_async.h, simulated.
#pragma once

#include "cuda/kernels/device.h"

namespace pbm::cuda::ptx {

inline void cp_async_16(void* target, const void* source, bool valid) { simulator().copy_async(target, source, valid); }
inline void cp_async_commit() { simulator().commit_copies(); }
template <int kPending>
void cp_async_wait() {
  simulator().wait_copies(kPending);
}

}  // namespace pbm::cuda::ptx

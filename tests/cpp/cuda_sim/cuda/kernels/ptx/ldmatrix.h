// csrc/cuda/kernels/ptx/ldmatrix.h, simulated.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/kernels/device.h"

namespace pbm::cuda::ptx {

// PTX ISA, ldmatrix: "threads 0–7, 8–15, 16–23, 24–31" give the row addresses of matrices 0 to 3; thread 4·r + c gets
// the c-th 32-bit word of row r of each.
inline void ldmatrix_x4(uint32_t (&registers)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) cuda_sim::stop("ldmatrix: unaligned row");
  if (!simulator().inside_shared(row, 16)) cuda_sim::stop("ldmatrix outside shared memory");
  const auto rows = simulator().gather(row);
  const int lane = lane_index();
  for (int matrix = 0; matrix < 4; matrix++) {
    const auto* source = static_cast<const unsigned char*>(rows[static_cast<size_t>(8 * matrix + lane / 4)]);
    std::memcpy(&registers[matrix], source + 4 * (lane % 4), 4);
  }
}

}  // namespace pbm::cuda::ptx

// Four 8×16-byte matrices from shared memory into the fragments of mma.
// PTX ISA, "Warp-level matrix load instruction: ldmatrix"; since PTX ISA 6.5, sm_75.
#pragma once

#include <cstdint>

#include "cuda/kernels/host_device.h"

namespace pbm::cuda::ptx {

// Lane l gives the shared-memory address of row l % 8 of matrix l / 8: 16 bytes, 16-byte aligned.
// registers[q] of lane l: bytes 4·(l % 4) … +3 of row l / 4 of matrix q.
PBM_DEVICE void ldmatrix_x4(uint32_t (&registers)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
}

}  // namespace pbm::cuda::ptx

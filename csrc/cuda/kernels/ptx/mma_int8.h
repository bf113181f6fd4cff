// Integer tensor-core product of a warp.
// PTX ISA, "Multiply-and-Accumulate Instruction: mma" and "Matrix Fragments for mma.m16n8k32"; .s8/.u8 with this shape
// since PTX ISA 7.0, sm_80.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/kernels/host_device.h"

namespace pbm::cuda::ptx {

// d (16×8, int32) += a (16×32, A = uint8_t or int8_t) · b (32×8, int8). Wraps around on overflow (no .satfinite).
// Fragments of lane l, g = l / 4, t = l % 4; a register holds 4 consecutive k, the lowest in its low byte:
//   a[0] row g, k 4t      a[1] row g+8, k 4t      a[2] row g, k 16+4t      a[3] row g+8, k 16+4t
//   b[0] column g, k 4t   b[1] column g, k 16+4t
//   d[0], d[1] row g, columns 2t, 2t+1            d[2], d[3] row g+8, columns 2t, 2t+1
template <typename A>
PBM_DEVICE void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<A, uint8_t> || std::is_same_v<A, int8_t>);
  if constexpr (std::is_same_v<A, uint8_t>) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

}  // namespace pbm::cuda::ptx

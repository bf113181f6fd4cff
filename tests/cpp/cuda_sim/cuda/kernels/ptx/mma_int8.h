// csrc/cuda/kernels/ptx/mma_int8.h, simulated from the tables of the PTX ISA, which are written out here element by
// element and owe nothing to the kernels' index functions.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

#include "cuda/kernels/device.h"

namespace pbm::cuda::ptx {

// Where an element of a fragment lives: the lane, and the index i of aᵢ, bᵢ or cᵢ.
struct FragmentElement {
  int lane, i;
};

// PTX ISA, "Matrix Fragments for mma.m16n8k32", .u8/.s8 (groupID = lane >> 2, threadID_in_group = lane % 4).
struct MmaTables {
  FragmentElement a[16][32], b[32][8];

  static int a_row(int lane, int i) {
    const int group = lane >> 2;
    return (0 <= i && i < 4) || (8 <= i && i < 12) ? group : group + 8;
  }
  static int a_column(int lane, int i) {
    const int thread = lane % 4;
    return i < 8 ? thread * 4 + (i & 3) : thread * 4 + (i & 3) + 16;
  }
  static int b_row(int lane, int i) {
    const int thread = lane % 4;
    return i < 4 ? thread * 4 + (i & 3) : thread * 4 + (i & 3) + 16;
  }
  static int b_column(int lane, int /*i*/) { return lane >> 2; }
  static int c_row(int lane, int i) {
    const int group = lane >> 2;
    return i < 2 ? group : group + 8;
  }
  static int c_column(int lane, int i) { return (lane % 4) * 2 + (i & 1); }

  MmaTables() {
    for (int lane = 0; lane < 32; lane++) {
      for (int i = 0; i < 16; i++) a[a_row(lane, i)][a_column(lane, i)] = {lane, i};
      for (int i = 0; i < 8; i++) b[b_row(lane, i)][b_column(lane, i)] = {lane, i};
    }
  }
  static const MmaTables& instance() {
    static const MmaTables tables;
    return tables;
  }
};

template <typename A>
void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    A a[16];
    int8_t b[8];
  } mine;
  std::memcpy(mine.a, a, sizeof(mine.a));
  std::memcpy(mine.b, b, sizeof(mine.b));
  const auto lanes = simulator().gather(mine);
  const MmaTables& tables = MmaTables::instance();
  for (int i = 0; i < 4; i++) {
    const int row = MmaTables::c_row(lane_index(), i), column = MmaTables::c_column(lane_index(), i);
    for (int k = 0; k < 32; k++) {
      const FragmentElement left = tables.a[row][k], right = tables.b[k][column];
      d[i] += lanes[static_cast<size_t>(left.lane)].a[left.i] * lanes[static_cast<size_t>(right.lane)].b[right.i];
    }
  }
}

}  // namespace pbm::cuda::ptx

// One block per panel. Packing happens once per weight, so nothing here is tuned.
#pragma once

#include <cstdint>

#include "cuda/kernels/device.h"
#include "cuda/kernels/element.h"
#include "cuda/kernels/packed_int8_layout.h"

namespace pbm::cuda {

struct PackInt8LinearWeightParams {
  const int8_t* weight;  // (columns, depth), contiguous
  int64_t columns, depth;
  int8_t* packed;  // (ceil(columns/16), ceil(depth/4) + 1, 64), 16-byte aligned
};

constexpr int kPackThreads = 256;
constexpr int kPackStrands = kPackThreads / kPanel;  // groups in work at once

struct PackExchange {
  int32_t sums[kPackStrands][kPanel];
};

PBM_KERNEL void PBM_LAUNCH_BOUNDS(kPackThreads) pack_int8_linear_weight_sm80(const PackInt8LinearWeightParams p) {
  auto& exchange = shared_storage<PackExchange>();
  const int64_t groups = panel_groups(p.depth, Flavour::u8s8);
  const int lane_column = thread_index() % kPanel;
  const int strand = thread_index() / kPanel;
  const int64_t column = block_index() * kPanel + lane_column;

  int32_t sum = 0;
  for (int64_t group = strand; group < groups; group += kPackStrands) {
    Packet<int8_t, kGroupDepth> bytes;
  PBM_UNROLL
    for (int i = 0; i < kGroupDepth; i++) {
      const int64_t k = group * kGroupDepth + i;
      const bool inside = column < p.columns && k < p.depth;
      bytes.values[i] = inside ? p.weight[column * p.depth + k] : int8_t{0};
      sum += bytes.values[i];
    }
    *reinterpret_cast<Packet<int8_t, kGroupDepth>*>(p.packed +
                                                    int8_weight_offset(groups, column, group * kGroupDepth)) = bytes;
  }
  exchange.sums[strand][lane_column] = sum;
  barrier();
  if (strand == 0) {
    for (int other = 1; other < kPackStrands; other++) sum += exchange.sums[other][lane_column];
    *reinterpret_cast<int32_t*>(p.packed + int8_column_sum_offset(groups, column)) = sum;
  }
}

}  // namespace pbm::cuda

// One block per row: a pass for the extremes, a pass to quantise (the row is then in L1 or L2).
#pragma once

#include <cstdint>

#include "cuda/kernels/device.h"
#include "cuda/kernels/element.h"
#include "cuda/kernels/quantize_per_token_config.h"
#include "cuda/kernels/quantize_rule.h"

namespace pbm::cuda {

template <typename T>
struct QuantizePerTokenParams {
  const T* input;  // (rows, depth), contiguous
  int64_t rows, depth;
  uint8_t* q;        // (rows, depth), int8 or uint8
  int64_t q_stride;  // bytes between rows of q, ≥ depth; the bytes in between become 0
  float* scale;      // (rows)
  int32_t* zero_point;
};

struct RangeExchange {
  float low[kQuantizeMaxThreads / kWarpSize], high[kQuantizeMaxThreads / kWarpSize];
};

// The union of all threads' ranges, in every thread.
PBM_DEVICE RowRange reduce_range(RowRange range, RangeExchange& exchange) {
  PBM_UNROLL
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) {
    range.merge(shuffle_xor(range.low, mask), shuffle_xor(range.high, mask));
  }
  if (lane_index() == 0) {
    exchange.low[warp_index()] = range.low;
    exchange.high[warp_index()] = range.high;
  }
  barrier();
  for (int warp = 0; warp < block_size() / kWarpSize; warp++) {
    range.merge(exchange.low[warp], exchange.high[warp]);
  }
  barrier();  // the next row overwrites exchange
  return range;
}

template <typename T, int kVector, bool kSymmetric>
PBM_KERNEL void PBM_LAUNCH_BOUNDS(kQuantizeMaxThreads) quantize_per_token_sm80(const QuantizePerTokenParams<T> p) {
  using Input = Packet<T, kVector>;
  using Output = Packet<uint8_t, kVector>;
  auto& exchange = shared_storage<RangeExchange>();
  const int64_t step = static_cast<int64_t>(block_size()) * kVector;

  for (int64_t row = block_index(); row < p.rows; row += grid_size()) {
    const T* x = p.input + row * p.depth;
    uint8_t* q = p.q + row * p.q_stride;

    RowRange range;
    for (int64_t k = thread_index() * kVector; k < p.depth; k += step) {
      const Input packet = *reinterpret_cast<const Input*>(x + k);
      PBM_UNROLL
      for (int i = 0; i < kVector; i++) range.include(to_float(packet.values[i]));
    }
    const RowQuantization rule = quantize_row<kSymmetric>(reduce_range(range, exchange));

    for (int64_t k = thread_index() * kVector; k < p.depth; k += step) {
      const Input packet = *reinterpret_cast<const Input*>(x + k);
      Output quantized;
      PBM_UNROLL
      for (int i = 0; i < kVector; i++) {
        quantized.values[i] = quantize_value<kSymmetric>(to_float(packet.values[i]), rule);
      }
      *reinterpret_cast<Output*>(q + k) = quantized;
    }
    for (int64_t k = p.depth + thread_index(); k < p.q_stride; k += block_size()) q[k] = 0;
    if (thread_index() == 0) {
      p.scale[row] = rule.scale;
      p.zero_point[row] = rule.zero_point;
    }
  }
}

}  // namespace pbm::cuda

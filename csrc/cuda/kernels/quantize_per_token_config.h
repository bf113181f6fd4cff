// Launch shape of quantize_per_token. Pure: a problem in, numbers out.
#pragma once

#include <cstdint>

namespace pbm::cuda {

struct QuantizePerTokenProblem {
  int64_t rows, depth, q_stride;  // elements; q_stride bytes between rows of q
  int element_bytes;              // of the input
  bool aligned;                   // input and q start at 16-byte boundaries
};

struct QuantizePerTokenConfig {
  bool vectorized;  // 16 bytes of input per load; else one element
  int threads;
  int64_t blocks;  // each takes rows block, block + blocks, …
};

constexpr int kQuantizeMaxThreads = 512;

constexpr QuantizePerTokenConfig choose_quantize_per_token(const QuantizePerTokenProblem& p) {
  const int vector = 16 / p.element_bytes;
  // Every row of input and of q then starts at a boundary of its own packets.
  const bool vectorized = p.aligned && p.depth % vector == 0 && p.q_stride % vector == 0;
  // Two packets per thread and pass: enough loads in flight while short rows still spread over small blocks.
  const int64_t per_thread = 2 * (vectorized ? vector : 1);
  int threads = 32;
  while (threads < kQuantizeMaxThreads && threads * per_thread < p.depth) threads *= 2;
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  return {vectorized, threads, p.rows < kMaxBlocks ? p.rows : kMaxBlocks};
}

}  // namespace pbm::cuda

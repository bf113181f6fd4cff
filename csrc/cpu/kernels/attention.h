// Attention on packed blocks of keys (Dao et al., FlashAttention, 2022): pointers, sizes and strides; no torch.
//
// s_ij = scale·q_i·k_j, then softcap, mask and ALiBi; p = softmax_j(s); out_i = Σ_j p_ij·v_j. Key j is visible to query
// i if  i + offset − left ≤ j ≤ i + offset + right.
#pragma once

#include <cstdint>

#include "cpu/kernels/gemm.h"

namespace pbm {

// Element (b, h, i, d) is data[b·batch + h·head + i·row + d]; strides in elements.
struct AttentionOperand {
  const void* data;
  DType dtype;
  int64_t batch, head, row;
};

enum class MaskKind : int { none, boolean, additive };

struct AttentionMask {
  MaskKind kind;
  const void* data;
  DType dtype;  // of an additive mask
  int64_t batch, head, row;
  int64_t col;  // 1, or 0 for one value for all keys
};

// Element (b, h, i, j) is kept if the upper 24 bits of word j mod 4 of Philox4x32-10 with counter (j/4, i, b·heads + h, 0)
// and the seed as its key are at least `threshold`; what is kept is multiplied with `factor`.
struct Dropout {
  uint64_t seed;
  int32_t threshold;  // 0: no dropout
  float factor;
};

struct Attention {
  Flavour flavour;  // f32 or bf16
  int64_t batch, heads, kv_heads;
  int64_t queries, keys;  // of one sequence, where all are of one length
  int64_t d, dv;
  AttentionOperand q, k, v, out;  // out is written
  // Packed sequences: b's queries are rows [query_start[b], query_start[b + 1]) of batch 0; null: all of one length.
  const int64_t *query_start, *key_start;
  // Per row: the log-sum-exp, the largest score (q·k itself, where only the scale is applied to it), and the reciprocal of
  // the sum that the softmax divides by (0 where nothing is visible). With the latter two backward repeats forward's probabilities, to the bit up to D = 128; from lse
  // alone they would be off by its rounding. Null: not wanted.
  float *lse, *max, *inverse_sum;
  int64_t row_batch, row_head;  // of these three

  float scale, softcap;  // softcap 0: none
  int64_t left, right;   // negative: unbounded
  bool bottom_right;     // offset = keys − queries, otherwise 0
  AttentionMask mask;
  const float* slopes;  // ALiBi, or null
  int64_t slopes_batch;
  Dropout dropout;
};

// Rows [begin, end) of the `group × queries` rows that share a head of keys: row r is query r mod queries of query head
// kv_head·group + r / queries.
struct AttentionItem {
  int64_t b, kv_head, begin, end;
};

// How many items the rows of one (batch, kv head) are cut into.
int64_t attention_parts(int64_t rows, int64_t heads, int64_t threads);

// out, max and inverse_sum are the forward pass's; the gradients are written. With several parts of the keys, d_q is fp32 and has
// batch·parts entries, part p of sequence b at p·batch + b, to be added by the caller.
struct AttentionGradients {
  AttentionOperand out, d_out;
  const float *max, *inverse_sum, *d_lse;  // d_lse may be null
  AttentionOperand d_q, d_k, d_v;
};

// Keys [begin, end) of one head.
struct AttentionBackwardItem {
  int64_t b, kv_head, begin, end, part;
};

// Keys and queries of the gradient of a mask that all these sequences and heads share. The gradient of query i and key j is
// added to out[i·row + j·col]. Items of a gradient are cut at multiples of these, and do not add to the same elements.
constexpr int64_t kMaskBlockKeys = 96, kMaskChunkQueries = 128;
struct AttentionMaskItem {
  Range batch, head, queries, keys;
  float* out;
  int64_t row, col;
};

inline int64_t queries_of(const Attention& a, int64_t b) {
  return a.query_start ? a.query_start[b + 1] - a.query_start[b] : a.queries;
}
inline int64_t keys_of(const Attention& a, int64_t b) {
  return a.key_start ? a.key_start[b + 1] - a.key_start[b] : a.keys;
}

}  // namespace pbm

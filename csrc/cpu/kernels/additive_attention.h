// Additive attention (Bahdanau et al., 2015), fused: pointers, sizes and strides; no torch.
//
// s_ij = Σ_h v_h·tanh(q_ih + k_jh), then the mask; p = softmax_j(s); out_i = Σ_j p_ij·m_ij·value_j with m of dropout.
//
// No exponential is left for a pair of rows. With a = e^(2k) and b = e^(2q)
//   tanh(q + k) = (a·b − 1)/(a·b + 1),              the large form, exact to about 2^-24 absolutely;
// and with a = tanh k and b = tanh q
//   tanh(q + k) = (a + b)/(1 + a·b),                 the small form, exact relatively, for |k| ≤ 0.75.
// Both are (a·x + y)/(a·z + w) with x, y, z, w of the query alone, so that every column h of a block of keys takes its
// own form at no cost. A block with |k| > 15 somewhere is computed by tanh itself.
#pragma once

#include <cstdint>

#include "cpu/kernels/attention.h"

namespace pbm {

constexpr int64_t kAdditiveKeys = 64;  // of a block
// Up to so many queries have a way of their own: preparing a key takes as long as four of its tanhs.
constexpr int64_t kFewQueries = 3;
constexpr int64_t kAdditiveRows = 64;  // of a unit of queries: sums over queries are sums of sums over units

struct AdditiveMask {
  MaskKind kind;
  const void* data;
  DType dtype;  // of an additive mask
  int64_t batch, row;
  int64_t column;  // 1, or 0: one value for all keys
};

struct AdditiveAttention {
  int64_t batch, queries, keys, hidden, values;
  AttentionOperand query, key, value, out;  // of one head; out is written
  const float* v;                           // padded with zeros to padded_hidden
  bool direct;                              // no block is prepared: v is too large
  AdditiveMask mask;
  Dropout dropout;
  float* lse;  // batch × queries; written, may be null
  // Prepared by additive_prepare, for every block of keys of every sequence:
  float* blocks;   // padded_hidden × kAdditiveKeys of a, or of k where the block is direct
  int32_t* forms;  // padded_hidden: where in a chunk of a query's coefficients those for h stand; −1 in front: direct
  float* columns;  // of a sequence: padded_hidden/16 panels of padded_keys × 16, the same values; null: not wanted
  // Packed panels of each sequence's values: of value itself (forward), or of its transpose (backward).
  const float* panels;
};

inline int64_t padded_hidden(const AdditiveAttention& a) { return ceil_div(a.hidden, 16) * 16; }
inline int64_t key_blocks(const AdditiveAttention& a) { return ceil_div(a.keys, kAdditiveKeys); }
inline int64_t padded_keys(const AdditiveAttention& a) { return key_blocks(a) * kAdditiveKeys; }

// Queries [rows.begin, rows.end) of sequence b; in the backward pass, of the strip from row `at` on.
struct AdditiveItem {
  int64_t b;
  Range rows;
  int64_t at;
};

// The backward pass goes through strips of queries, so that p and the gradient of s exist for these only.
struct AdditiveGradients {
  AttentionOperand d_out;
  const float* d_lse;  // batch × queries; may be null
  float *p, *d_s;      // strip × padded_keys + 16; p with dropout's factors
  AttentionOperand d_query, d_key;
  float* d_columns;  // sums for d_key between strips, in the layout of columns
  float* d_v;        // batch × padded_hidden
  float* d_value;    // batch × keys × values
  float* d_mask;     // with the mask's strides below; may be null
  int64_t d_mask_batch, d_mask_row;
};

// Sixteen columns of hidden, or some keys, for the rows of one item.
struct AdditivePart {
  AdditiveItem item;
  Range part;        // of padded_hidden / 16, or of keys
  bool first, last;  // whether the sequence starts or ends in this strip
};

// Few queries: nothing is prepared, and each key is read once a pass.
struct AdditiveFew {
  float* p;  // batch · queries rows of padded_keys + 16
  // The backward pass only; data of what is not wanted is null.
  float* d_s;
  AttentionOperand d_out, d_query, d_key, d_value;
  const float* d_lse;
  float *part_query, *part_v;  // batch × parts × (queries ×) padded_hidden
  float* d_v;                  // batch × padded_hidden
};
constexpr int64_t kFewKeys = 128;  // of a part
inline int64_t few_parts(const AdditiveAttention& a) { return ceil_div(a.keys, kFewKeys); }

struct AdditiveKernels {
  // A block of keys; then the output of an item's queries.
  void (*prepare)(const AdditiveAttention&, int64_t b, int64_t block);
  void (*forward)(const AdditiveAttention&, const AdditiveItem&);
  // p and the gradients of the scores of an item's queries; from these the others.
  void (*score_gradients)(const AdditiveAttention&, const AdditiveGradients&, const AdditiveItem&);
  void (*hidden_gradients)(const AdditiveAttention&, const AdditiveGradients&, const AdditivePart&);
  void (*value_gradients)(const AdditiveAttention&, const AdditiveGradients&, const AdditivePart&);
  void (*mask_gradient)(const AdditiveAttention&, const AdditiveGradients&, const AdditiveItem&, Range keys);
  // Few queries: scores, of a part of the keys; output, of a sequence. Backward: scores and products, of a part;
  // p and the gradients of scores, of a sequence; gradients, of a part; their sums, of a sequence.
  void (*few_scores)(const AdditiveAttention&, const AdditiveFew&, int64_t b, int64_t part);
  void (*few_output)(const AdditiveAttention&, const AdditiveFew&, int64_t b);
  void (*few_score_gradients)(const AdditiveAttention&, const AdditiveFew&, int64_t b);
  void (*few_gradients)(const AdditiveAttention&, const AdditiveFew&, int64_t b, int64_t part);
  void (*few_sums)(const AdditiveAttention&, const AdditiveFew&, int64_t b);
};

}  // namespace pbm

// What forward and backward of attention have in common at the torch boundary: checks, and tensors as the kernels see
// them.
#pragma once

#include <cmath>

#include "cpu/run_gemm.h"

namespace pbm {

// The arguments that are the same for both, in the order of the schemas.
struct AttentionOptions {
  const std::optional<Tensor>&attn_mask, &alibi_slopes, &dropout_seed;
  int64_t window_left, window_right;
  bool bottom_right;
  double softcap, dropout_p, scale;
  int64_t precision;
};

// A problem and the tensors that it points into, some of them copies.
struct AttentionProblem {
  Attention a{};
  std::vector<Tensor> kept;
  std::vector<int64_t> query_start, key_start;
};

AttentionProblem attention_problem(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                   const AttentionOptions& o);
AttentionProblem varlen_problem(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, const AttentionOptions& o);

// Refuses what no kernel can do with; `o` of a problem of `batch` sequences and `heads` query heads.
void check_options(const char* op, const AttentionOptions& o, const Tensor& q, int64_t batch, int64_t heads);
// Everything of `o` but the mask to p->a, whose heads are set.
void set_options(const AttentionOptions& o, AttentionProblem* p);

// (b, h, i, d) in place where the last dimension is contiguous; 3-dimensional tensors are (i, h, d).
AttentionOperand operand(const char* name, const Tensor& t, AttentionProblem* p);

void check_dropout(const char* op, const std::optional<Tensor>& seed, double dropout_p, const Tensor& q);
Dropout dropout_of(const std::optional<Tensor>& seed, double dropout_p);

// Items to the threads as they come free: of a window or a causal mask they are not alike, and cores are not either.
template <class F>
void for_each_item(int64_t count, const F& f) {
  std::atomic<int64_t> next = 0;
  const int64_t threads = torch::stable::get_num_threads();
  parallel(count < threads ? (count > 0 ? count : 1) : threads, [&](int64_t) {
    for (int64_t i = next++; i < count; i = next++) f(i);
  });
}

}  // namespace pbm

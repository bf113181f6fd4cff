#include "cpu/attention_decode.h"

namespace pbm {
namespace {

// Of each sequence the last rows first, which see most under a causal mask.
std::vector<AttentionItem> items_of(const Attention& a) {
  const int64_t threads = torch::stable::get_num_threads(), group = a.kv_heads ? a.heads / a.kv_heads : 1;
  std::vector<AttentionItem> items;
  for (int64_t b = 0; b < a.batch; b++) {
    const int64_t rows = group * queries_of(a, b);
    if (rows == 0) continue;
    const int64_t parts = attention_parts(rows, a.batch * a.kv_heads, threads);
    for (int64_t i = parts - 1; i >= 0; i--) {
      const Range r = part(rows, 1, parts, i);
      for (int64_t h = 0; r.begin < r.end && h < a.kv_heads; h++) items.push_back({b, h, r.begin, r.end});
    }
  }
  return items;
}

// Whether a head's rows are so few that packing its keys and values does not pay. Packing a few keys is soon done, and
// bf16's packed products are faster.
bool has_few_rows(const Attention& a) {
  const bool bf16 = a.q.dtype == DType::bf16, own_precision = (a.flavour == Flavour::bf16) == bf16;
  const int64_t most = a.keys < 256 ? (bf16 ? 2 : 4) : (bf16 ? 8 : 12);
  return own_precision && a.dropout.threshold == 0 && a.kv_heads > 0 && decode_rows(a) <= most;
}

using Results = std::tuple<Tensor, Tensor, Tensor>;

Results run(AttentionProblem p, bool packed, Tensor out, Tensor lse, Tensor statistics) {
  Attention& a = p.a;
  a.out = operand("out", out, &p);
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  a.max = static_cast<float*>(statistics.mutable_data_ptr());
  a.inverse_sum = a.max + lse.numel();
  a.row_head = lse.size(lse.dim() - 1);  // of (B, Hq, Sq) or (Hq, Tq)
  a.row_batch = a.heads * a.row_head;
  if (!packed && has_few_rows(a)) {
    run_attention_decode({a, {}, {}, nullptr, 0}, std::vector<int64_t>(a.batch, a.keys));
    return {out, lse, statistics};
  }
  const std::vector<AttentionItem> items = items_of(a);
  const Kernels& kernel = kernels();
  for_each_item(static_cast<int64_t>(items.size()), [&](int64_t i) { kernel.attention_forward(a, items[i]); });
  return {out, lse, statistics};
}

Results attention(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& attn_mask,
                  const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& dropout_seed,
                  int64_t window_left, int64_t window_right, bool bottom_right, double softcap, double dropout_p,
                  double scale, int64_t precision, bool for_backward) {
  AttentionProblem p = attention_problem("attention", q, k, v,
                                         {attn_mask, alibi_slopes, dropout_seed, window_left, window_right,
                                          bottom_right, softcap, dropout_p, scale, precision});
  // A query's heads side by side, as the next projection wants them: joining them copies nothing.
  const int64_t sizes[4] = {p.a.batch, p.a.queries, p.a.heads, p.a.dv};
  const int64_t statistics[4] = {2, p.a.batch, p.a.heads, p.a.queries};
  Tensor out = torch::stable::transpose(empty_cpu(sizes, 4, q.scalar_type()), 1, 2);
  return run(std::move(p), for_backward, std::move(out), empty_cpu(statistics + 1, 3, ScalarType::Float),
             empty_cpu(statistics, 4, ScalarType::Float));
}

Results attention_varlen(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                         const Tensor& cu_seqlens_k, const std::optional<Tensor>& alibi_slopes,
                         const std::optional<Tensor>& dropout_seed, int64_t window_left, int64_t window_right,
                         bool bottom_right, double softcap, double dropout_p, double scale, int64_t precision) {
  AttentionProblem p = varlen_problem("attention_varlen", q, k, v, cu_seqlens_q, cu_seqlens_k,
                                      {std::nullopt, alibi_slopes, dropout_seed, window_left, window_right,
                                       bottom_right, softcap, dropout_p, scale, precision});
  const int64_t sizes[3] = {q.size(0), p.a.heads, p.a.dv}, statistics[3] = {2, p.a.heads, q.size(0)};
  return run(std::move(p), true, empty_cpu(sizes, 3, q.scalar_type()), empty_cpu(statistics + 1, 2, ScalarType::Float),
             empty_cpu(statistics, 3, ScalarType::Float));
}

}  // namespace
}  // namespace pbm

STABLE_TORCH_LIBRARY_IMPL(pybigmodel, CPU, m) {
  m.impl("attention", TORCH_BOX(&pbm::attention));
  m.impl("attention_varlen", TORCH_BOX(&pbm::attention_varlen));
}

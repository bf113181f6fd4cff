#include "cpu/attention.h"

namespace pbm {
namespace {

struct Saved {
  const Tensor& grad_out;
  const std::optional<Tensor>& grad_lse;
  const Tensor &q, &k, &v, &out, &statistics;
};

// Parts of the keys of one head. Each beyond the first costs another copy of dQ in fp32 and packing the queries again, so
// there are several only where heads alone would leave threads without work, and their copies are bounded.
int64_t key_parts(const Attention& a, const Saved& s) {
  constexpr int64_t kFewestKeys = 192, kCopyBytes = int64_t{64} << 20;
  const int64_t heads = a.batch * a.kv_heads, threads = torch::stable::get_num_threads();
  if (heads == 0 || heads >= 4 * threads) return 1;
  int64_t longest = 0;
  for (int64_t b = 0; b < a.batch; b++) longest = std::max(longest, keys_of(a, b));
  const int64_t inputs = (s.q.numel() + s.k.numel() + s.v.numel()) * size_of(a.q.dtype);
  const int64_t copies = std::max(2 * inputs, kCopyBytes) / std::max<int64_t>(s.q.numel() * 4, 1);
  const int64_t most = std::max<int64_t>(std::min({longest / kFewestKeys, 2 * threads, copies}), 1);
  int64_t best = 1, least = -1;
  for (int64_t parts = 1; parts <= most; parts++) {
    const int64_t cost = ceil_div(heads * parts, threads) * (ceil_div(longest, parts) + 32);
    if (least < 0 || cost < least) {
      least = cost;
      best = parts;
    }
  }
  return best;
}

AttentionOperand written(const Tensor& t, AttentionProblem* p) { return operand("a gradient", t, p); }

// dQ's parts, added in their order.
void add_parts(const Tensor& parts, const Tensor& out) {
  const int64_t n = out.numel();
  const ColumnSum s{parts.size(0), n, parts.mutable_data_ptr(), DType::f32, n, out.mutable_data_ptr(), dtype_of(out)};
  const int64_t threads = torch::stable::get_num_threads();
  over_parts(n, kPanel, threads, [&](Range c) { kernels().column_sum(s, c.begin, c.end); });
}

void check_saved(const char* op, const Saved& s, const AttentionProblem& p) {
  const bool packed = s.q.dim() == 3;
  const auto check = [&](const char* name, const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> shape) {
    check_dtype(op, name, t, dtype);
    check_same_device(op, name, t, s.q);
    bool same = t.dim() == static_cast<int64_t>(shape.size());
    int64_t i = 0;
    for (int64_t size : shape) same = same && t.size(i++) == size;
    std::ostringstream expected;
    i = 0;
    for (int64_t size : shape) expected << (i++ ? ", " : "(") << size;
    STD_TORCH_CHECK(same, op, ": ", name, " must have shape ", expected.str(), "), got ", shape_of(t));
  };
  const Attention& a = p.a;
  const ScalarType dtype = s.q.scalar_type();
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"grad_out", s.grad_out}, {"out", s.out}})
    packed ? check(name, t, dtype, {s.q.size(0), a.heads, a.dv})
           : check(name, t, dtype, {a.batch, a.heads, a.queries, a.dv});
  const auto check_rows = [&](const char* name, const Tensor& t) {
    packed ? check(name, t, ScalarType::Float, {a.heads, s.q.size(0)})
           : check(name, t, ScalarType::Float, {a.batch, a.heads, a.queries});
  };
  packed ? check("statistics", s.statistics, ScalarType::Float, {2, a.heads, s.q.size(0)})
         : check("statistics", s.statistics, ScalarType::Float, {2, a.batch, a.heads, a.queries});
  if (s.grad_lse) check_rows("grad_lse", *s.grad_lse);
}

AttentionGradients gradients_of(const Saved& s, AttentionProblem* p) {
  AttentionGradients g{};
  g.out = operand("out", s.out, p);
  g.d_out = operand("grad_out", s.grad_out, p);
  const Tensor statistics = as_contiguous(s.statistics);
  p->kept.push_back(statistics);
  g.max = static_cast<const float*>(data_of("statistics", statistics));
  g.inverse_sum = g.max + statistics.numel() / 2;
  if (s.grad_lse) {
    const Tensor d_lse = as_contiguous(*s.grad_lse);
    p->kept.push_back(d_lse);
    g.d_lse = static_cast<const float*>(data_of("grad_lse", d_lse));
  }
  const bool packed = s.q.dim() == 3;
  p->a.row_head = packed ? s.q.size(0) : p->a.queries;
  p->a.row_batch = p->a.heads * p->a.queries;
  return g;
}

// Of t's shape; with `parts`, that many of them.
Tensor empty_gradient(const Tensor& t, ScalarType dtype, std::optional<int64_t> parts = std::nullopt) {
  std::vector<int64_t> sizes;
  if (parts) sizes.push_back(*parts);
  for (int64_t i = 0; i < t.dim(); i++) sizes.push_back(t.size(i));
  return empty_cpu(sizes.data(), static_cast<int64_t>(sizes.size()), dtype);
}

std::tuple<Tensor, Tensor, Tensor> run(const Saved& s, AttentionProblem* p, AttentionGradients g) {
  const Attention& a = p->a;
  const int64_t parts = key_parts(a, s);
  const ScalarType dtype = s.q.scalar_type();
  Tensor d_q = empty_gradient(s.q, dtype), d_k = empty_gradient(s.k, dtype), d_v = empty_gradient(s.v, dtype);
  std::optional<Tensor> d_q_parts;
  if (parts > 1) d_q_parts = empty_gradient(s.q, ScalarType::Float, parts);
  g.d_k = written(d_k, p);
  g.d_v = written(d_v, p);
  g.d_q = written(d_q, p);
  if (parts > 1) {
    g.d_q.data = d_q_parts->mutable_data_ptr();
    g.d_q.dtype = DType::f32;
    if (s.q.dim() == 3) g.d_q.batch = s.q.numel();
  }
  std::vector<AttentionBackwardItem> items;
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t i = parts - 1; i >= 0; i--) {
      const Range r = part(keys_of(a, b), 2, parts, i);  // also an empty one: its dQ is zeros
      for (int64_t h = 0; h < a.kv_heads; h++) items.push_back({b, h, r.begin, r.end, i});
    }
  const Kernels& kernel = kernels();
  for_each_item(static_cast<int64_t>(items.size()), [&](int64_t i) { kernel.attention_backward(a, g, items[i]); });
  if (parts > 1) add_parts(*d_q_parts, d_q);
  return {d_q, d_k, d_v};
}

// What is broadcast is summed by one item in a row: nothing depends on the threads. Blocks of keys and chunks of queries
// that have elements of their own are items of their own.
std::vector<AttentionMaskItem> mask_items(const Attention& a, const int64_t (&sizes)[4], float* out) {
  const bool rows = sizes[2] > 1, cols = sizes[3] > 1;
  const auto of = [](int64_t size, int64_t n, int64_t count) { return size > 1 ? Range{n, n + 1} : Range{0, count}; };
  const int64_t keys = cols ? kMaskBlockKeys : std::max<int64_t>(a.keys, 1);
  // Each chunk of queries packs its keys again: only where there would be too few items.
  const bool few = sizes[0] * sizes[1] * ceil_div(a.keys, keys) < 4 * torch::stable::get_num_threads();
  const int64_t queries = rows && few ? kMaskChunkQueries : std::max<int64_t>(a.queries, 1);
  std::vector<AttentionMaskItem> items;
  for (int64_t b = 0; b < sizes[0]; b++)
    for (int64_t h = 0; h < sizes[1]; h++)
      for (int64_t i = 0; i < a.queries; i += queries)
        for (int64_t j = 0; j < a.keys; j += keys)
          items.push_back({of(sizes[0], b, a.batch),
                           of(sizes[1], h, a.heads),
                           {i, std::min(i + queries, a.queries)},
                           {j, std::min(j + keys, a.keys)},
                           out + (b * sizes[1] + h) * sizes[2] * sizes[3],
                           rows ? sizes[3] : 0,
                           cols ? 1 : 0});
  return items;
}

Tensor mask_gradient(const Tensor& mask, AttentionProblem* p, const AttentionGradients& g) {
  const Attention& a = p->a;
  const int64_t dim = mask.dim();
  const auto size = [&](int64_t from_end) { return dim >= from_end ? mask.size(dim - from_end) : 1; };
  const int64_t sizes[4] = {size(4), size(3), size(2), size(1)};
  Tensor full = empty_cpu(sizes, 4, ScalarType::Float);
  torch::stable::zero_(full);
  const std::vector<AttentionMaskItem> items = mask_items(a, sizes, static_cast<float*>(full.mutable_data_ptr()));
  const Kernels& kernel = kernels();
  for_each_item(static_cast<int64_t>(items.size()), [&](int64_t i) { kernel.attention_mask_gradient(a, g, items[i]); });
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < dim; i++) shape.push_back(mask.size(i));
  full = torch::stable::reshape(full, shape);
  return mask.scalar_type() == ScalarType::Float ? full : torch::stable::to(full, mask.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& statistics, const std::optional<Tensor>& attn_mask,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& dropout_seed, int64_t window_left,
    int64_t window_right, bool bottom_right, double softcap, double dropout_p, double scale, int64_t precision,
    bool need_mask) {
  const char* op = "attention_backward";
  AttentionProblem p = attention_problem(op, q, k, v,
                                         {attn_mask, alibi_slopes, dropout_seed, window_left, window_right,
                                          bottom_right, softcap, dropout_p, scale, precision});
  const Saved saved = {grad_out, grad_lse, q, k, v, out, statistics};
  check_saved(op, saved, p);
  const AttentionGradients g = gradients_of(saved, &p);
  const auto [d_q, d_k, d_v] = run(saved, &p, g);
  const int64_t nothing = 0;
  const bool with_mask = need_mask && attn_mask;
  return {d_q, d_k, d_v, with_mask ? mask_gradient(*attn_mask, &p, g) : empty_cpu(&nothing, 1, q.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> attention_varlen_backward(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& statistics, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& dropout_seed, int64_t window_left,
    int64_t window_right, bool bottom_right, double softcap, double dropout_p, double scale, int64_t precision) {
  const char* op = "attention_varlen_backward";
  AttentionProblem p = varlen_problem(op, q, k, v, cu_seqlens_q, cu_seqlens_k,
                                      {std::nullopt, alibi_slopes, dropout_seed, window_left, window_right,
                                       bottom_right, softcap, dropout_p, scale, precision});
  const Saved saved = {grad_out, grad_lse, q, k, v, out, statistics};
  check_saved(op, saved, p);
  return run(saved, &p, gradients_of(saved, &p));
}

}  // namespace
}  // namespace pbm

STABLE_TORCH_LIBRARY_IMPL(pybigmodel, CPU, m) {
  m.impl("attention_backward", TORCH_BOX(&pbm::attention_backward));
  m.impl("attention_varlen_backward", TORCH_BOX(&pbm::attention_varlen_backward));
}

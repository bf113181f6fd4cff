#include "cpu/attention.h"

namespace pbm {
namespace {

void check_mask(const char* op, const Tensor& mask, const Tensor& q, const Tensor& k) {
  const ScalarType t = mask.scalar_type();
  STD_TORCH_CHECK(t == ScalarType::Bool || t == ScalarType::Float || t == q.scalar_type(), op,
                  ": attn_mask must be bool, float32 or ", dtype_name(q.scalar_type()), " as q is, got ",
                  dtype_name(t));
  check_same_device(op, "attn_mask", mask, q);
  const int64_t full[4] = {q.size(0), q.size(1), q.size(2), k.size(2)};
  bool fits = mask.dim() <= 4;
  for (int64_t i = 0; fits && i < mask.dim(); i++) {
    const int64_t size = mask.size(i), expected = full[4 - mask.dim() + i];
    fits = size == 1 || size == expected;
  }
  STD_TORCH_CHECK(fits, op, ": attn_mask must be broadcastable to (", full[0], ", ", full[1], ", ", full[2], ", ",
                  full[3], "), got shape ", shape_of(mask));
}

// The keys of a row lie side by side or share one value; other masks are copied, but not what is broadcast in them.
Tensor readable(const Tensor& mask) {
  const int64_t dim = mask.dim();
  if (dim == 0 || mask.size(dim - 1) <= 1 || mask.stride(dim - 1) <= 1) return mask;
  Tensor m = mask;
  for (int64_t i = 0; i < dim; i++)
    if (m.stride(i) == 0 && m.size(i) > 1) m = torch::stable::narrow(m, i, 0, 1);
  return torch::stable::contiguous(m);
}

AttentionMask mask_of(const Tensor& mask, AttentionProblem* p) {
  const Tensor m = readable(mask);
  p->kept.push_back(m);
  AttentionMask out{};
  out.kind = m.scalar_type() == ScalarType::Bool ? MaskKind::boolean : MaskKind::additive;
  out.data = data_of("attn_mask", m);
  out.dtype = dtype_of(m);
  const int64_t n = m.dim();
  const auto stride = [&](int64_t from_end) {
    return n >= from_end && m.size(n - from_end) > 1 ? m.stride(n - from_end) : 0;
  };
  out.col = stride(1);
  out.row = stride(2);
  out.head = stride(3);
  out.batch = stride(4);
  return out;
}

Flavour flavour_of(const Tensor& q, int64_t precision) {
  return precision == 1 || q.scalar_type() == ScalarType::BFloat16 ? Flavour::bf16 : Flavour::f32;
}

std::vector<int64_t> starts_of(const char* op, const char* name, const Tensor& t, const char* of, const Tensor& rows) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long, op, ": ", name,
                  " must be int32 or int64, got ", dtype_name(dtype));
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) >= 1, op, ": ", name, " must have shape (sequences + 1,), got ",
                  shape_of(t));
  check_same_device(op, name, t, rows);
  const int64_t total = rows.size(0);
  const Tensor c = as_contiguous(t);
  const void* data = data_of(name, c);
  std::vector<int64_t> starts(t.size(0));
  for (size_t i = 0; i < starts.size(); i++)
    starts[i] = dtype == ScalarType::Int ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
  bool ordered = starts.front() == 0 && starts.back() == total;
  for (size_t i = 1; i < starts.size(); i++) ordered = ordered && starts[i - 1] <= starts[i];
  STD_TORCH_CHECK(ordered, op, ": ", name, " must rise from 0 to ", total, ", the rows of ", of, "; got ",
                  starts.front(), " to ", starts.back(), starts.size() > 2 ? " or a fall between" : "");
  return starts;
}

void check_attention(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, int64_t dim) {
  check_float(op, "q", q);
  check_dim(op, "q", q, dim);
  const int64_t heads_at = 1, rows_at = dim == 4 ? 2 : 0;  // (B, H, S, D) or (T, H, D)
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"k", k}, {"v", v}}) {
    check_dim(op, name, t, dim);
    check_dtype(op, name, t, q.scalar_type());
    check_same_device(op, name, t, q);
    STD_TORCH_CHECK(dim != 4 || t.size(0) == q.size(0), op, ": ", name, " must have q's batch size ", q.size(0),
                    ", got shape ", shape_of(t));
  }
  STD_TORCH_CHECK(k.size(heads_at) == v.size(heads_at) && k.size(rows_at) == v.size(rows_at), op,
                  ": v must have k's heads and length, k has shape ", shape_of(k), ", got v of shape ", shape_of(v));
  const int64_t hq = q.size(heads_at), hkv = k.size(heads_at);
  STD_TORCH_CHECK(hkv > 0 ? hq % hkv == 0 : hq == 0, op, ": q's heads must be a multiple of k's ", hkv, ", got ", hq);
  STD_TORCH_CHECK(k.size(dim - 1) == q.size(dim - 1), op, ": k must have q's last dimension ", q.size(dim - 1),
                  ", got shape ", shape_of(k));
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"q", q}, {"v", v}})
    STD_TORCH_CHECK(t.size(dim - 1) >= 1 && t.size(dim - 1) <= 256, op, ": ", name,
                    "'s last dimension must be in 1..256, got ", t.size(dim - 1));
}

}  // namespace

void check_options(const char* op, const AttentionOptions& o, const Tensor& q, int64_t batch, int64_t heads) {
  // Of what float32 holds, and the products with log2 e too.
  STD_TORCH_CHECK(o.softcap == 0 || (o.softcap >= 1e-30 && o.softcap <= 1e30), op,
                  ": softcap must be 0 or in 1e-30..1e30, got ", o.softcap);
  STD_TORCH_CHECK(std::fabs(o.scale) <= 1e38, op, ": scale must be in -1e38..1e38, got ", o.scale);
  STD_TORCH_CHECK(o.precision == 0 || o.precision == 1, op, ": precision must be 0 (fp32) or 1 (bf16), got ",
                  o.precision);
  check_dropout(op, o.dropout_seed, o.dropout_p, q);
  if (o.alibi_slopes) {
    const Tensor& s = *o.alibi_slopes;
    check_dtype(op, "alibi_slopes", s, ScalarType::Float);
    check_same_device(op, "alibi_slopes", s, q);
    const bool fits =
        (s.dim() == 1 && s.size(0) == heads) || (s.dim() == 2 && s.size(0) == batch && s.size(1) == heads);
    STD_TORCH_CHECK(fits, op, ": alibi_slopes must have shape (", heads, ",) or (", batch, ", ", heads, "), got ",
                    shape_of(s));
  }
}

void set_options(const AttentionOptions& o, AttentionProblem* p) {
  Attention& a = p->a;
  a.scale = static_cast<float>(o.scale);
  a.softcap = static_cast<float>(o.softcap);
  // No sequence is as long as 2⁴⁰, and sums with what lies beyond might leave the range of int64.
  constexpr int64_t kUnbounded = int64_t{1} << 40;
  a.left = o.window_left < kUnbounded ? o.window_left : -1;
  a.right = o.window_right < kUnbounded ? o.window_right : -1;
  a.bottom_right = o.bottom_right;
  if (o.alibi_slopes) {
    const Tensor slopes = as_contiguous(*o.alibi_slopes);
    p->kept.push_back(slopes);
    a.slopes = static_cast<const float*>(data_of("alibi_slopes", slopes));
    a.slopes_batch = slopes.dim() == 2 ? a.heads : 0;
  }
  a.dropout = dropout_of(o.dropout_seed, o.dropout_p);
}

void check_dropout(const char* op, const std::optional<Tensor>& seed, double dropout_p, const Tensor& q) {
  STD_TORCH_CHECK(dropout_p >= 0 && dropout_p <= 1, op, ": dropout_p must be in [0, 1], got ", dropout_p);
  if (dropout_p == 0) return;
  STD_TORCH_CHECK(seed, op, ": dropout_seed must be given where dropout_p is not 0");
  check_dtype(op, "dropout_seed", *seed, ScalarType::Long);
  check_same_device(op, "dropout_seed", *seed, q);
  STD_TORCH_CHECK(seed->numel() == 1, op, ": dropout_seed must have one element, got shape ", shape_of(*seed));
}

Dropout dropout_of(const std::optional<Tensor>& seed, double dropout_p) {
  if (dropout_p == 0) return {};
  return {static_cast<uint64_t>(*static_cast<const int64_t*>(data_of("dropout_seed", *seed))),
          static_cast<int32_t>(std::nearbyint(dropout_p * (1 << 24))),
          dropout_p < 1 ? static_cast<float>(1 / (1 - dropout_p)) : 0.f};
}

AttentionOperand operand(const char* name, const Tensor& t, AttentionProblem* p) {
  const int64_t dim = t.dim();
  Tensor x = t.stride(dim - 1) == 1 || t.size(dim - 1) <= 1 ? t : torch::stable::contiguous(t);
  p->kept.push_back(x);
  const bool packed = dim == 3;
  return {data_of(name, x), dtype_of(x), packed ? 0 : x.stride(0), x.stride(1), packed ? x.stride(0) : x.stride(2)};
}

AttentionProblem attention_problem(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                   const AttentionOptions& o) {
  check_attention(op, q, k, v, 4);
  check_options(op, o, q, q.size(0), q.size(1));
  if (o.attn_mask) check_mask(op, *o.attn_mask, q, k);
  AttentionProblem p;
  Attention& a = p.a;
  a.flavour = flavour_of(q, o.precision);
  a.batch = q.size(0);
  a.heads = q.size(1);
  a.kv_heads = k.size(1);
  a.queries = q.size(2);
  a.keys = k.size(2);
  a.d = q.size(3);
  a.dv = v.size(3);
  a.q = operand("q", q, &p);
  a.k = operand("k", k, &p);
  a.v = operand("v", v, &p);
  set_options(o, &p);
  if (o.attn_mask) a.mask = mask_of(*o.attn_mask, &p);
  return p;
}

AttentionProblem varlen_problem(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, const AttentionOptions& o) {
  check_attention(op, q, k, v, 3);
  AttentionProblem p;
  p.query_start = starts_of(op, "cu_seqlens_q", cu_seqlens_q, "q", q);
  p.key_start = starts_of(op, "cu_seqlens_k", cu_seqlens_k, "k", k);
  STD_TORCH_CHECK(p.query_start.size() == p.key_start.size(), op, ": cu_seqlens_k must have cu_seqlens_q's shape (",
                  p.query_start.size(), ",), got ", shape_of(cu_seqlens_k));
  Attention& a = p.a;
  a.flavour = flavour_of(q, o.precision);
  a.batch = static_cast<int64_t>(p.query_start.size()) - 1;
  a.heads = q.size(1);
  a.kv_heads = k.size(1);
  a.d = q.size(2);
  a.dv = v.size(2);
  check_options(op, o, q, a.batch, a.heads);
  a.q = operand("q", q, &p);
  a.k = operand("k", k, &p);
  a.v = operand("v", v, &p);
  set_options(o, &p);
  a.query_start = p.query_start.data();  // stays where it is when the struct is moved
  a.key_start = p.key_start.data();
  return p;
}

}  // namespace pbm

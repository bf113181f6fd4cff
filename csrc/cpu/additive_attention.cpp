#include "cpu/additive_attention.h"

#include <algorithm>
#include <cstring>

namespace pbm {
namespace {

void check_shapes(const char* op, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& v) {
  check_float(op, "query", query);
  check_dim(op, "query", query, 3);
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"key", key}, {"value", value}}) {
    check_dim(op, name, t, 3);
    check_dtype(op, name, t, query.scalar_type());
    check_same_device(op, name, t, query);
    STD_TORCH_CHECK(t.size(0) == query.size(0), op, ": ", name, " must have query's batch size ", query.size(0),
                    ", got shape ", shape_of(t));
  }
  STD_TORCH_CHECK(key.size(2) == query.size(2), op, ": key must have query's last dimension ", query.size(2),
                  ", got shape ", shape_of(key));
  STD_TORCH_CHECK(value.size(1) == key.size(1), op, ": value must have key's length ", key.size(1), ", got shape ",
                  shape_of(value));
  check_dtype(op, "v", v, query.scalar_type());
  check_vector(op, "v", v, query.size(2), query);
}

void check_mask(const char* op, const Tensor& mask, const Tensor& query, const Tensor& key) {
  const ScalarType t = mask.scalar_type();
  STD_TORCH_CHECK(t == ScalarType::Bool || t == ScalarType::Float || t == query.scalar_type(), op,
                  ": attn_mask must be bool, float32 or ", dtype_name(query.scalar_type()), " as query is, got ",
                  dtype_name(t));
  check_same_device(op, "attn_mask", mask, query);
  const int64_t full[3] = {query.size(0), query.size(1), key.size(1)};
  bool fits = mask.dim() <= 3;
  for (int64_t i = 0; fits && i < mask.dim(); i++) {
    const int64_t size = mask.size(i);
    fits = size == 1 || size == full[3 - mask.dim() + i];
  }
  STD_TORCH_CHECK(fits, op, ": attn_mask must be broadcastable to (", full[0], ", ", full[1], ", ", full[2],
                  "), got shape ", shape_of(mask));
}

AdditiveMask mask_of(const Tensor& mask, AdditiveProblem* p) {
  const int64_t dim = mask.dim(), keys = p->a.keys;
  const bool every_key = dim > 0 && mask.size(dim - 1) == keys;
  const Tensor m = every_key && keys > 1 && mask.stride(dim - 1) != 1 ? torch::stable::contiguous(mask) : mask;
  p->kept.push_back(m);
  const auto stride = [&](int64_t from_end) {
    return dim >= from_end && m.size(dim - from_end) > 1 ? m.stride(dim - from_end) : 0;
  };
  const MaskKind kind = m.scalar_type() == ScalarType::Bool ? MaskKind::boolean : MaskKind::additive;
  return {kind, data_of("attn_mask", m), dtype_of(m), stride(3), stride(2), every_key ? 1 : 0};
}

// v in fp32, padded. Returns whether quotients can carry it: their terms reach e^60 times v.
bool set_v(const Tensor& v, AdditiveProblem* p) {
  const int64_t hidden = p->a.hidden, padded = padded_hidden(p->a);
  Tensor narrow = as_contiguous(v);
  if (v.scalar_type() != ScalarType::Float) {
    narrow = empty_cpu(&hidden, 1, ScalarType::Float);
    torch::stable::copy_(narrow, v);
  }
  Tensor wide = empty_cpu(&padded, 1, ScalarType::Float);
  float* out = static_cast<float*>(wide.mutable_data_ptr());
  std::memset(out, 0, padded * sizeof(float));
  if (hidden) std::memcpy(out, data_of("v", narrow), hidden * sizeof(float));
  p->kept.push_back(wide);
  p->a.v = out;
  return std::all_of(out, out + padded, [](float x) { return std::fabs(x) < 1e10f || std::isnan(x); });
}

}  // namespace

AttentionOperand matrices(const char* name, const Tensor& t, AdditiveProblem* p) {
  const Tensor x = t.stride(2) == 1 || t.size(2) <= 1 ? t : torch::stable::contiguous(t);
  p->kept.push_back(x);
  return {data_of(name, x), dtype_of(x), x.stride(0), 0, x.stride(1)};
}

AdditiveProblem additive_problem(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                                 const Tensor& v, const std::optional<Tensor>& attn_mask,
                                 const std::optional<Tensor>& dropout_seed, double dropout_p) {
  check_shapes(op, query, key, value, v);
  if (attn_mask) check_mask(op, *attn_mask, query, key);
  check_dropout(op, dropout_seed, dropout_p, query);
  AdditiveProblem p;
  AdditiveAttention& a = p.a;
  a.batch = query.size(0);
  a.queries = query.size(1);
  a.keys = key.size(1);
  a.hidden = query.size(2);
  a.values = value.size(2);
  a.query = matrices("query", query, &p);
  a.key = matrices("key", key, &p);
  a.value = matrices("value", value, &p);
  a.direct = !set_v(v, &p);
  if (attn_mask) a.mask = mask_of(*attn_mask, &p);
  a.dropout = dropout_of(dropout_seed, dropout_p);
  return p;
}

void prepare(AdditiveProblem* p, bool backward) {
  AdditiveAttention& a = p->a;
  const int64_t columns = backward ? a.keys : a.values, depth = backward ? a.values : a.keys;
  const int64_t panels = ceil_div(columns, kPanel), panel_floats = depth * kPanel;
  float* out = workspace<float>(p, a.batch * panels * panel_floats);
  a.panels = out;
  const bool blocks = backward || !a.direct;
  if (blocks) {
    a.blocks = workspace<float>(p, a.batch * padded_hidden(a) * padded_keys(a));
    a.forms = workspace<int32_t>(p, a.batch * padded_hidden(a) * key_blocks(a));
  }
  if (backward) a.columns = workspace<float>(p, a.batch * padded_hidden(a) * padded_keys(a));
  constexpr int64_t kPanelsAtOnce = 3;
  const int64_t block_items = blocks ? key_blocks(a) : 0, items = block_items + ceil_div(panels, kPanelsAtOnce);
  const Kernels& kernel = kernels();
  for_each(a, a.batch * items, [&](int64_t n) {
    const int64_t b = n / items, item = n % items;
    if (item < block_items) return kernel.additive.prepare(a, b, item);
    const char* value = static_cast<const char*>(a.value.data) + b * a.value.batch * size_of(a.value.dtype);
    const PackB pack{columns,
                     depth,
                     Flavour::f32,
                     value,
                     a.value.dtype,
                     backward ? 1 : a.value.row,
                     backward ? a.value.row : 1,
                     false,
                     out + b * panels * panel_floats};
    const int64_t begin = (item - block_items) * kPanelsAtOnce;
    kernel.pack_b(pack, begin, std::min(begin + kPanelsAtOnce, panels));
  });
}

int64_t rows_per_item(const AdditiveAttention& a, int64_t rows) {
  constexpr int64_t kTerms = 1 << 17, kMost = 16;  // 6 µs; so many rows share what is read of the keys
  const int64_t least = ceil_div(kTerms, std::max<int64_t>(a.keys * a.hidden, 1));
  const int64_t even = ceil_div(rows, 4 * torch::stable::get_num_threads());
  return std::clamp<int64_t>(even, std::min<int64_t>(least, kAdditiveRows),
                             std::max(std::min<int64_t>(least, kAdditiveRows), kMost));
}

namespace {

void few_forward(AdditiveProblem* p) {
  const AdditiveAttention& a = p->a;
  AdditiveFew f{};
  f.p = workspace<float>(p, a.batch * a.queries * (padded_keys(a) + 16));
  const int64_t parts = few_parts(a);
  const AdditiveKernels& kernel = kernels().additive;
  for_each(a, a.batch * parts, [&](int64_t n) { kernel.few_scores(a, f, n / parts, n % parts); });
  for_each(a, a.batch, [&](int64_t b) { kernel.few_output(a, f, b); });
}

void forward(AdditiveProblem* p) {
  const AdditiveAttention& a = p->a;
  prepare(p, false);
  const int64_t rows = rows_per_item(a, a.batch * a.queries), items = ceil_div(a.queries, rows);
  const AdditiveKernels& kernel = kernels().additive;
  for_each(a, a.batch * items, [&](int64_t n) {
    const int64_t begin = n % items * rows;
    kernel.forward(a, {n / items, {begin, std::min(begin + rows, a.queries)}, 0});
  });
}

std::tuple<Tensor, Tensor> additive_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                              const Tensor& v, const std::optional<Tensor>& attn_mask,
                                              const std::optional<Tensor>& dropout_seed, double dropout_p) {
  AdditiveProblem p = additive_problem("additive_attention", query, key, value, v, attn_mask, dropout_seed, dropout_p);
  AdditiveAttention& a = p.a;
  const int64_t sizes[3] = {a.batch, a.queries, a.values};
  Tensor out = empty_cpu(sizes, 3, query.scalar_type()), lse = empty_cpu(sizes, 2, ScalarType::Float);
  a.out = matrices("out", out, &p);
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (a.batch * a.queries > 0) a.queries <= kFewQueries ? few_forward(&p) : forward(&p);
  return {out, lse};
}

}  // namespace
}  // namespace pbm

STABLE_TORCH_LIBRARY_IMPL(pybigmodel, CPU, m) { m.impl("additive_attention", TORCH_BOX(&pbm::additive_attention)); }

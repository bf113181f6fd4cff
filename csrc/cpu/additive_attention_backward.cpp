#include <algorithm>
#include <cstring>

#include "cpu/additive_attention.h"

namespace pbm {
namespace {

// Bytes of p and of the gradients of the scores at a time: what the threads share between two barriers.
constexpr int64_t kStripBytes = int64_t{4} << 20;

// Consecutive queries, of one sequence or of several, in pieces of one sequence that start at a whole unit.
std::vector<std::vector<AdditiveItem>> strips_of(const AdditiveAttention& a, int64_t most) {
  std::vector<std::vector<AdditiveItem>> strips;
  int64_t used = most;
  for (int64_t b = 0; b < a.batch; b++)
    for (int64_t i = 0; i < a.queries;) {
      const int64_t left = a.queries - i;
      const int64_t count = left <= most - used ? left : (most - used) / kAdditiveRows * kAdditiveRows;
      if (count == 0) {
        strips.emplace_back();
        used = 0;
        continue;
      }
      strips.back().push_back({b, {i, i + count}, used});
      i += count;
      used += count;
    }
  return strips;
}

struct Wanted {
  bool hidden, value, mask;
};

void score_gradients(const AdditiveAttention& a, const AdditiveGradients& g, const std::vector<AdditiveItem>& strip) {
  int64_t total = 0;
  for (const AdditiveItem& x : strip) total += x.rows.end - x.rows.begin;
  const int64_t rows = rows_per_item(a, total);
  std::vector<AdditiveItem> items;
  for (const AdditiveItem& x : strip)
    for (int64_t i = x.rows.begin; i < x.rows.end; i += rows)
      items.push_back({x.b, {i, std::min(i + rows, x.rows.end)}, x.at + i - x.rows.begin});
  const AdditiveKernels& kernel = kernels().additive;
  for_each(a, static_cast<int64_t>(items.size()), [&](int64_t n) { kernel.score_gradients(a, g, items[n]); });
}

// A mask's gradient from that of the scores: sequences may share it, so one thread adds all of a block's.
void add_to_mask(const AdditiveAttention& a, const AdditiveGradients& g, const std::vector<AdditiveItem>& strip,
                 int64_t block) {
  const int64_t j = block * kAdditiveKeys;
  for (const AdditiveItem& x : strip)
    kernels().additive.mask_gradient(a, g, x, {j, std::min(j + kAdditiveKeys, a.keys)});
}

void other_gradients(const AdditiveAttention& a, const AdditiveGradients& g, const std::vector<AdditiveItem>& strip,
                     const Wanted& wanted) {
  constexpr int64_t kValueKeys = 256;  // that meet one packing of dO
  std::vector<AdditivePart> hidden, value;
  for (const AdditiveItem& x : strip) {
    const bool first = x.rows.begin == 0, last = x.rows.end == a.queries;
    for (int64_t h = 0; wanted.hidden && h < padded_hidden(a) / 16; h++) hidden.push_back({x, {h, h + 1}, first, last});
    for (int64_t j = 0; wanted.value && j < a.keys; j += kValueKeys)
      value.push_back({x, {j, std::min(j + kValueKeys, a.keys)}, first, last});
  }
  const int64_t hiddens = static_cast<int64_t>(hidden.size()), values = static_cast<int64_t>(value.size());
  const int64_t masks = wanted.mask ? key_blocks(a) : 0;
  const AdditiveKernels& kernel = kernels().additive;
  for_each(a, hiddens + values + masks, [&](int64_t n) {
    if (n < hiddens) return kernel.hidden_gradients(a, g, hidden[n]);
    if (n < hiddens + values) return kernel.value_gradients(a, g, value[n - hiddens]);
    add_to_mask(a, g, strip, n - hiddens - values);
  });
}

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty_cpu(sizes.begin(), static_cast<int64_t>(sizes.size()), dtype);
}

void zero_out(const Tensor& t) {
  const int64_t bytes = t.numel() * size_of(dtype_of(t));
  if (bytes) std::memset(t.mutable_data_ptr(), 0, bytes);
}

// The gradients in the order of the schema; of those not wanted, empty tensors.
struct Gradients {
  Tensor query, key, value, v, mask;
};

Tensor sum_of_sequences(const AdditiveAttention& a, const Tensor& parts) {
  const float* part = static_cast<const float*>(parts.mutable_data_ptr());
  Tensor sum = empty_cpu(&a.hidden, 1, ScalarType::Float);
  for (int64_t h = 0; h < a.hidden; h++) {
    double s = 0;
    for (int64_t b = 0; b < a.batch; b++) s += part[b * padded_hidden(a) + h];
    static_cast<float*>(sum.mutable_data_ptr())[h] = static_cast<float>(s);
  }
  return sum;
}

void check_gradients(const char* op, const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& query,
                     const AdditiveAttention& a) {
  check_dtype(op, "grad_out", grad_out, query.scalar_type());
  check_same_device(op, "grad_out", grad_out, query);
  STD_TORCH_CHECK(grad_out.dim() == 3 && grad_out.size(0) == a.batch && grad_out.size(1) == a.queries &&
                      grad_out.size(2) == a.values,
                  op, ": grad_out must have shape (", a.batch, ", ", a.queries, ", ", a.values, "), got ",
                  shape_of(grad_out));
  if (!grad_lse) return;
  check_dtype(op, "grad_lse", *grad_lse, ScalarType::Float);
  check_same_device(op, "grad_lse", *grad_lse, query);
  STD_TORCH_CHECK(grad_lse->dim() == 2 && grad_lse->size(0) == a.batch && grad_lse->size(1) == a.queries, op,
                  ": grad_lse must have shape (", a.batch, ", ", a.queries, "), got ", shape_of(*grad_lse));
}

void check_mask_gradient(const char* op, const std::optional<Tensor>& mask, const AdditiveAttention& a) {
  STD_TORCH_CHECK(mask && a.mask.kind == MaskKind::additive && a.mask.column, op,
                  ": attn_mask must be floating with a value for each of ", a.keys,
                  " keys where need_mask is set, got ", mask ? shape_of(*mask) : "None",
                  mask ? std::string(" of ") + dtype_name(mask->scalar_type()) : "");
}

// fp32 zeros of the mask's shape.
Tensor mask_gradient_of(const Tensor& mask, AdditiveGradients* g) {
  const int64_t dim = mask.dim();
  int64_t sizes[3] = {1, 1, 1};
  for (int64_t i = 0; i < dim; i++) sizes[3 - dim + i] = mask.size(i);
  const Tensor t = empty_cpu(sizes, 3, ScalarType::Float);
  zero_out(t);
  g->d_mask = static_cast<float*>(t.mutable_data_ptr());
  g->d_mask_row = sizes[1] > 1 ? sizes[2] : 0;
  g->d_mask_batch = sizes[0] > 1 ? sizes[1] * sizes[2] : 0;
  return dim == 3 ? t : torch::stable::view(t, {sizes + 3 - dim, static_cast<size_t>(dim)});
}

void few_backward(AdditiveProblem* p, AdditiveGradients g, const Wanted& wanted, const Gradients& out) {
  const AdditiveAttention& a = p->a;
  const int64_t parts = few_parts(a), rows = a.batch * a.queries, row_floats = padded_keys(a) + 16;
  AdditiveFew f{};
  f.p = workspace<float>(p, rows * row_floats);
  f.d_s = g.d_s = workspace<float>(p, rows * row_floats);
  f.d_out = g.d_out;
  f.d_lse = g.d_lse;
  f.d_v = g.d_v;
  if (wanted.hidden) {
    f.d_query = g.d_query;
    f.d_key = g.d_key;
    f.part_query = workspace<float>(p, rows * parts * padded_hidden(a));
    f.part_v = workspace<float>(p, a.batch * parts * padded_hidden(a));
  }
  if (wanted.value) f.d_value = matrices("grad_value", out.value, p);
  const AdditiveKernels& kernel = kernels().additive;
  for_each(a, a.batch * parts, [&](int64_t n) { kernel.few_scores(a, f, n / parts, n % parts); });
  for_each(a, a.batch, [&](int64_t b) { kernel.few_score_gradients(a, f, b); });
  for_each(a, a.batch * parts, [&](int64_t n) { kernel.few_gradients(a, f, n / parts, n % parts); });
  for (int64_t b = 0; wanted.hidden && b < a.batch; b++) kernel.few_sums(a, f, b);
  if (!wanted.mask) return;
  std::vector<AdditiveItem> strip;
  for (int64_t b = 0; b < a.batch; b++) strip.push_back({b, {0, a.queries}, b * a.queries});
  for_each(a, key_blocks(a), [&](int64_t block) { add_to_mask(a, g, strip, block); });
}

void backward(AdditiveProblem* p, AdditiveGradients g, const Wanted& wanted, Gradients* out) {
  const AdditiveAttention& a = p->a;
  const bool convert = wanted.value && out->value.scalar_type() != ScalarType::Float;
  Tensor d_value = convert ? empty({a.batch, a.keys, a.values}, ScalarType::Float) : out->value;
  g.d_value = static_cast<float*>(d_value.mutable_data_ptr());
  const int64_t row_floats = padded_keys(a) + 16;
  const int64_t fit = kStripBytes / (2 * row_floats * static_cast<int64_t>(sizeof(float)));
  const int64_t most = std::max(fit / kAdditiveRows, int64_t{1}) * kAdditiveRows;
  const int64_t strip_floats = std::min(most, a.batch * a.queries) * row_floats;
  g.p = workspace<float>(p, strip_floats);
  g.d_s = workspace<float>(p, strip_floats);
  if (wanted.hidden) g.d_columns = workspace<float>(p, a.batch * padded_hidden(a) * padded_keys(a));
  prepare(p, true);
  for (const std::vector<AdditiveItem>& strip : strips_of(a, most)) {
    score_gradients(a, g, strip);
    other_gradients(a, g, strip, wanted);
  }
  if (convert) torch::stable::copy_(out->value, d_value);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> additive_attention_backward(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& v, const std::optional<Tensor>& attn_mask,
    const std::optional<Tensor>& dropout_seed, double dropout_p, bool need_hidden, bool need_value, bool need_mask) {
  const char* op = "additive_attention_backward";
  AdditiveProblem p = additive_problem(op, query, key, value, v, attn_mask, dropout_seed, dropout_p);
  const AdditiveAttention& a = p.a;
  check_gradients(op, grad_out, grad_lse, query, a);
  if (need_mask) check_mask_gradient(op, attn_mask, a);
  const ScalarType dtype = query.scalar_type();
  const auto wanted = [](bool want, std::initializer_list<int64_t> sizes, ScalarType t) {
    return want ? empty(sizes, t) : empty({0}, t);
  };
  AdditiveGradients g{};
  const Tensor d_v = wanted(need_hidden, {a.batch, padded_hidden(a)}, ScalarType::Float);
  Gradients out = {wanted(need_hidden, {a.batch, a.queries, a.hidden}, dtype),
                   wanted(need_hidden, {a.batch, a.keys, a.hidden}, dtype),
                   wanted(need_value, {a.batch, a.keys, a.values}, dtype), d_v,
                   need_mask ? mask_gradient_of(*attn_mask, &g) : empty({0}, ScalarType::Float)};
  g.d_out = matrices("grad_out", grad_out, &p);
  if (grad_lse) {
    p.kept.push_back(as_contiguous(*grad_lse));
    g.d_lse = static_cast<const float*>(data_of("grad_lse", p.kept.back()));
  }
  if (need_hidden) {
    g.d_query = matrices("grad_query", out.query, &p);
    g.d_key = matrices("grad_key", out.key, &p);
  }
  g.d_v = static_cast<float*>(d_v.mutable_data_ptr());
  const Wanted want = {need_hidden, need_value, need_mask};
  if (a.batch * a.queries == 0) {
    for (const Tensor& t : {out.key, out.value, d_v}) zero_out(t);
  } else if (a.queries <= kFewQueries) {
    few_backward(&p, g, want, out);
  } else {
    backward(&p, g, want, &out);
  }
  if (need_hidden) out.v = sum_of_sequences(a, d_v);
  return {out.query, out.key, out.value, out.v, out.mask};
}

}  // namespace
}  // namespace pbm

STABLE_TORCH_LIBRARY_IMPL(pybigmodel, CPU, m) {
  m.impl("additive_attention_backward", TORCH_BOX(&pbm::additive_attention_backward));
}

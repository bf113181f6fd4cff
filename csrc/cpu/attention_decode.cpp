#include "cpu/attention_decode.h"

#include <memory>

#include "common/scratch.h"

namespace pbm {
namespace {

// --- parts -----------------------------------------------------------------------------------------------------------

// The parts of one (sequence, kv head): consecutive items.
struct DecodeGroup {
  int64_t first, count;
};

struct DecodePlan {
  std::vector<DecodeItem> items;
  std::vector<DecodeGroup> groups;
  std::vector<int64_t> group_of;  // of an item
};

// The keys that any query of a sequence sees: a hull, so that a part may see nothing.
Range seen_keys(const Attention& a, int64_t length) {
  const int64_t first = a.bottom_right ? length - a.queries : 0, last = first + a.queries - 1;
  const int64_t begin = a.left < 0 ? 0 : std::max<int64_t>(first - a.left, 0);
  const int64_t end = a.right < 0 ? length : std::min(last + a.right + 1, length);
  return {std::min(begin, std::max<int64_t>(end, 0)), std::max<int64_t>(end, 0)};
}

// Every group has a part, be it empty: its rows are written too.
DecodePlan plan_of(const AttentionDecode& p, const std::vector<int64_t>& lengths) {
  DecodePlan plan;
  for (int64_t b = 0; b < p.a.batch; b++) {
    const Range keys = seen_keys(p.a, lengths[b]);
    const int64_t parts = std::max<int64_t>(ceil_div(keys.end - keys.begin, kSplitKeys), 1);
    for (int64_t h = 0; h < p.a.kv_heads; h++) {
      plan.groups.push_back({static_cast<int64_t>(plan.items.size()), parts});
      for (int64_t i = 0; i < parts; i++) {
        const int64_t begin = keys.begin + i * kSplitKeys;
        plan.items.push_back({b, h, lengths[b], {begin, std::min(begin + kSplitKeys, keys.end)}, nullptr});
        plan.group_of.push_back(static_cast<int64_t>(plan.groups.size()) - 1);
      }
    }
  }
  return plan;
}

int64_t threads_for(const AttentionDecode& p, const DecodePlan& plan) {
  int64_t keys = 0;
  for (const DecodeItem& item : plan.items) keys += item.keys.end - item.keys.begin;
  const int64_t bytes = keys * (p.a.d * size_of(p.a.k.dtype) + p.a.dv * size_of(p.a.v.dtype));
  // Below 128 KiB of cache waking the other threads takes longer than the work.
  const int64_t threads = bytes < (128 << 10) ? 1 : torch::stable::get_num_threads();
  return std::min(threads, static_cast<int64_t>(plan.items.size()));
}

}  // namespace

void run_attention_decode(const AttentionDecode& p, const std::vector<int64_t>& lengths) {
  if (p.a.queries == 0 || p.a.heads == 0 || p.a.batch == 0) return;
  DecodePlan plan = plan_of(p, lengths);
  const int64_t count = static_cast<int64_t>(plan.items.size()), floats = decode_partial_floats(p.a);
  float* partials = static_cast<float*>(scratch(ScratchSlot::b_panels, count * floats * sizeof(float)));
  for (int64_t i = 0; i < count; i++) plan.items[i].partial = partials + i * floats;

  // Who finishes the last part of a group merges all of them, in their order: nothing depends on who it is.
  const std::unique_ptr<std::atomic<int64_t>[]> left(new std::atomic<int64_t>[plan.groups.size()]);
  for (size_t g = 0; g < plan.groups.size(); g++) left[g].store(plan.groups[g].count, std::memory_order_relaxed);
  const Kernels& kernel = kernels();
  std::atomic<int64_t> next = 0;
  parallel(threads_for(p, plan), [&](int64_t) {
    for (int64_t i = next++; i < count;) {
      const int64_t after = next++;
      kernel.attention_decode(p, plan.items[i], after < count ? &plan.items[after] : nullptr);
      const int64_t g = plan.group_of[i];
      if (left[g].fetch_sub(1, std::memory_order_acq_rel) == 1)
        kernel.attention_decode_merge(p, &plan.items[plan.groups[g].first], plan.groups[g].count);
      i = after;
    }
  });
}

namespace {

// --- arguments -------------------------------------------------------------------------------------------------------

void check_last_dimension(const char* op, const char* name, const Tensor& t) {
  const int64_t dim = t.dim();
  STD_TORCH_CHECK(t.stride(dim - 1) == 1 || t.size(dim - 1) <= 1, op, ": ", name,
                  "'s last dimension must be contiguous, since a cache is used in place; got stride ",
                  t.stride(dim - 1));
}

struct Caches {
  const Tensor &k, &v;
  const std::optional<Tensor>&k_scale, &v_scale, &block_table;
};

void check_scale(const char* op, const char* name, const std::optional<Tensor>& scale, const Caches& c,
                 const Tensor& q) {
  const bool wanted = c.k.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK(scale.has_value() == wanted, op, ": ", name,
                  wanted ? " must be given beside" : " must not be given beside",
                  wanted ? " an int8 cache" : " a floating cache");
  if (!scale) return;
  check_dtype(op, name, *scale, ScalarType::Float);
  check_same_device(op, name, *scale, q);
  STD_TORCH_CHECK(scale->dim() == 3 && scale->size(0) == c.k.size(0) && scale->size(1) == c.k.size(1) &&
                      scale->size(2) == c.k.size(2),
                  op, ": ", name, " must have shape (", c.k.size(0), ", ", c.k.size(1), ", ", c.k.size(2),
                  "), k_cache's without the last dimension; got ", shape_of(*scale));
}

// q: queries or new keys, (B, H, S, D), whose dtype a floating cache has.
void check_caches(const char* op, const char* q_name, const Tensor& q, const Caches& c, const Tensor& cache_seqlens) {
  check_float(op, q_name, q);
  check_dim(op, q_name, q, 4);
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"k_cache", c.k}, {"v_cache", c.v}}) {
    check_dim(op, name, t, 4);
    check_same_device(op, name, t, q);
    const ScalarType dtype = t.scalar_type();
    STD_TORCH_CHECK(dtype == q.scalar_type() || dtype == ScalarType::Char, op, ": ", name, " must be ",
                    dtype_name(q.scalar_type()), " as ", q_name, " is, or int8, got ", dtype_name(dtype));
    check_last_dimension(op, name, t);
  }
  STD_TORCH_CHECK(c.v.scalar_type() == c.k.scalar_type(), op, ": v_cache must be ", dtype_name(c.k.scalar_type()),
                  " as k_cache is, got ", dtype_name(c.v.scalar_type()));
  STD_TORCH_CHECK(c.v.size(0) == c.k.size(0) && c.v.size(1) == c.k.size(1) && c.v.size(2) == c.k.size(2), op,
                  ": v_cache must have k_cache's shape but for the last dimension, k_cache has shape ", shape_of(c.k),
                  ", got ", shape_of(c.v));
  STD_TORCH_CHECK(q.size(3) == c.k.size(3), op, ": ", q_name, " must have k_cache's last dimension ", c.k.size(3),
                  ", got shape ", shape_of(q));
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"k_cache", c.k}, {"v_cache", c.v}})
    STD_TORCH_CHECK(t.size(3) >= 1 && t.size(3) <= 256, op, ": ", name, "'s last dimension must be in 1..256, got ",
                    t.size(3));
  check_scale(op, "k_scale", c.k_scale, c, q);
  check_scale(op, "v_scale", c.v_scale, c, q);
  check_dtype(op, "cache_seqlens", cache_seqlens, ScalarType::Int);
  check_vector(op, "cache_seqlens", cache_seqlens, q.size(0), q);
  if (c.block_table) {
    check_dtype(op, "block_table", *c.block_table, ScalarType::Int);
    check_same_device(op, "block_table", *c.block_table, q);
    STD_TORCH_CHECK(c.block_table->dim() == 2 && c.block_table->size(0) == q.size(0), op,
                    ": block_table must have shape (", q.size(0), ", blocks), got ", shape_of(*c.block_table));
  } else {
    STD_TORCH_CHECK(c.k.size(0) == q.size(0), op, ": k_cache must have ", q_name, "'s batch size ", q.size(0),
                    " without a block_table, got shape ", shape_of(c.k));
  }
}

// Where the tokens of each sequence lie.
struct Slots {
  Tensor seqlens;
  std::optional<Tensor> table;
  const int32_t* block_table = nullptr;
  int64_t table_row = 0;
  std::vector<int64_t> lengths;  // with the new tokens
};

// Refuses lengths that the cache has no room for, and blocks that do not exist among those in use.
Slots slots_of(const char* op, const Caches& c, const Tensor& cache_seqlens, int64_t new_tokens) {
  Slots s;
  s.seqlens = as_contiguous(cache_seqlens);
  const int32_t* lengths = static_cast<const int32_t*>(data_of("cache_seqlens", s.seqlens));
  const int64_t keys = c.k.size(2);
  int64_t room = keys;
  if (c.block_table) {
    s.table = as_contiguous(*c.block_table);
    s.block_table = static_cast<const int32_t*>(data_of("block_table", *s.table));
    s.table_row = s.table->size(1);
    room *= s.table_row;
  }
  for (int64_t b = 0; b < s.seqlens.size(0); b++) {
    const int64_t length = lengths[b] + new_tokens;
    STD_TORCH_CHECK(lengths[b] >= 0 && length <= room, op, ": cache_seqlens must be in 0..", room - new_tokens,
                    " for a cache of ", room, " tokens and ", new_tokens, " new ones, got ", lengths[b],
                    " of sequence ", b);
    for (int64_t n = 0; s.block_table && n * keys < length; n++) {
      const int32_t block = s.block_table[b * s.table_row + n];
      STD_TORCH_CHECK(block >= 0 && block < c.k.size(0), op, ": block_table must hold blocks in 0..", c.k.size(0) - 1,
                      ", got ", block, " as block ", n, " of sequence ", b);
    }
    s.lengths.push_back(length);
  }
  return s;
}

CacheScales scales_of(const char* name, const std::optional<Tensor>& t) {
  if (!t) return {};
  return {static_cast<const float*>(data_of(name, *t)), t->stride(0), t->stride(1), t->stride(2)};
}

// --- ops -------------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> attention_decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                                            const Tensor& cache_seqlens, const std::optional<Tensor>& block_table,
                                            const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
                                            const std::optional<Tensor>& alibi_slopes, int64_t new_tokens,
                                            int64_t window_left, double softcap, double scale) {
  const char* op = "attention_decode";
  const Caches caches{k_cache, v_cache, k_scale, v_scale, block_table};
  check_caches(op, "q", q, caches, cache_seqlens);
  const int64_t heads = q.size(1), kv_heads = k_cache.size(1);
  STD_TORCH_CHECK(kv_heads > 0 ? heads % kv_heads == 0 : heads == 0, op, ": q's heads must be a multiple of k_cache's ",
                  kv_heads, ", got ", heads);
  STD_TORCH_CHECK(new_tokens >= 0, op, ": new_tokens must be at least 0, got ", new_tokens);
  const AttentionOptions options{std::nullopt, alibi_slopes, std::nullopt, window_left, 0, true, softcap, 0., scale, 0};
  check_options(op, options, q, q.size(0), heads);
  const Slots slots = slots_of(op, caches, cache_seqlens, new_tokens);

  AttentionProblem problem;
  Attention& a = problem.a;
  a.batch = q.size(0);
  a.heads = heads;
  a.kv_heads = kv_heads;
  a.queries = q.size(2);
  a.keys = k_cache.size(2);
  a.d = q.size(3);
  a.dv = v_cache.size(3);
  a.q = operand("q", q, &problem);
  a.k = operand("k_cache", k_cache, &problem);
  a.v = operand("v_cache", v_cache, &problem);
  set_options(options, &problem);
  const int64_t sizes[4] = {a.batch, heads, a.queries, a.dv};
  Tensor out = empty_cpu(sizes, 4, q.scalar_type()), lse = empty_cpu(sizes, 3, ScalarType::Float);
  a.out = operand("out", out, &problem);
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  a.row_head = a.queries;
  a.row_batch = heads * a.queries;
  run_attention_decode(
      {a, scales_of("k_scale", k_scale), scales_of("v_scale", v_scale), slots.block_table, slots.table_row},
      slots.lengths);
  return {out, lse};
}

// One of the two caches, and the tokens that go into it.
struct Append {
  const Tensor &tokens, &cache;
  const std::optional<Tensor>& scale;
};

// Token i of head h of sequence b to its slot: as it is, or quantised with a scale of its own.
void append_token(const Append& to, const Slots& slots, int64_t b, int64_t h, int64_t i, void* cache, float* scale) {
  const Tensor &x = to.tokens, &c = to.cache;
  const int64_t keys = c.size(2), at = slots.lengths[b] - x.size(2) + i, d = x.size(3);
  const int64_t block = slots.block_table ? slots.block_table[b * slots.table_row + at / keys] : b;
  const int64_t size = size_of(dtype_of(x)), slot = block * c.stride(0) + h * c.stride(1) + at % keys * c.stride(2);
  const char* from =
      static_cast<const char*>(x.const_data_ptr()) + (b * x.stride(0) + h * x.stride(1) + i * x.stride(2)) * size;
  if (!scale) {
    std::memcpy(static_cast<char*>(cache) + slot * size, from, d * size);
    return;
  }
  const Tensor& s = *to.scale;
  QuantizeRows q{};
  q.k = q.q_row = q.q_padded = d;
  q.kind = QuantKind::symmetric_s8;
  q.x = from;
  q.dtype = dtype_of(x);
  q.q = static_cast<char*>(cache) + slot;
  q.scale = scale + block * s.stride(0) + h * s.stride(1) + at % keys * s.stride(2);
  kernels().quantize_rows(q, 0, 1);
}

void append(const Append& to, const Slots& slots) {
  const Tensor& x = to.tokens;
  const int64_t heads = x.size(1), queries = x.size(2), count = x.size(0) * heads * queries;
  void* cache = const_cast<void*>(data_of("cache", to.cache));
  float* scale = to.scale ? static_cast<float*>(const_cast<void*>(data_of("scale", *to.scale))) : nullptr;
  over_parts(count, 1, threads_worth(count * x.size(3)), [&](Range r) {
    for (int64_t n = r.begin; n < r.end; n++)
      append_token(to, slots, n / (heads * queries), n / queries % heads, n % queries, cache, scale);
  });
}

void check_new_tokens(const char* op, const char* name, const Tensor& t, const char* cache_name, const Tensor& cache,
                      const Tensor& k) {
  check_dim(op, name, t, 4);
  check_dtype(op, name, t, k.scalar_type());
  check_same_device(op, name, t, k);
  STD_TORCH_CHECK(
      t.size(0) == k.size(0) && t.size(1) == cache.size(1) && t.size(2) == k.size(2) && t.size(3) == cache.size(3), op,
      ": ", name, " must have shape (", k.size(0), ", ", cache.size(1), ", ", k.size(2), ", ", cache.size(3),
      ") to go into ", cache_name, ", got ", shape_of(t));
}

void check_written(const char* op, const char* name, const Tensor& t) {
  for (int64_t i = 0; i < t.dim(); i++)
    STD_TORCH_CHECK(t.stride(i) != 0 || t.size(i) <= 1, op, ": ", name,
                    " is written, and must have a place for each element; got stride 0 in dimension ", i, " of shape ",
                    shape_of(t));
}

void attention_append_(const Tensor& k_cache, const Tensor& v_cache, const std::optional<Tensor>& k_scale,
                       const std::optional<Tensor>& v_scale, const Tensor& k, const Tensor& v,
                       const Tensor& cache_seqlens, const std::optional<Tensor>& block_table) {
  const char* op = "attention_append_";
  const Caches caches{k_cache, v_cache, k_scale, v_scale, block_table};
  check_caches(op, "k", k, caches, cache_seqlens);
  check_new_tokens(op, "k", k, "k_cache", k_cache, k);
  check_new_tokens(op, "v", v, "v_cache", v_cache, k);
  check_written(op, "k_cache", k_cache);
  check_written(op, "v_cache", v_cache);
  if (k_scale) check_written(op, "k_scale", *k_scale);
  if (v_scale) check_written(op, "v_scale", *v_scale);
  const Slots slots = slots_of(op, caches, cache_seqlens, k.size(2));
  for (const auto& [x, cache, scale] :
       {std::tuple<const Tensor&, const Tensor&, const std::optional<Tensor>&>{k, k_cache, k_scale},
        {v, v_cache, v_scale}}) {
    const Tensor rows = x.stride(3) == 1 || x.size(3) <= 1 ? x : torch::stable::contiguous(x);
    append({rows, cache, scale}, slots);
  }
}

}  // namespace
}  // namespace pbm

STABLE_TORCH_LIBRARY_IMPL(pybigmodel, CPU, m) {
  m.impl("attention_append_", TORCH_BOX(&pbm::attention_append_));
  m.impl("attention_decode", TORCH_BOX(&pbm::attention_decode));
}

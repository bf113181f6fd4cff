// What the backward pass of attention works on: an item's keys and a chunk of its queries, packed, with the chunk's
// statistics.
#pragma once

#include "common/scratch.h"
#include "cpu/kernels/attention_rows.h"
#include "cpu/kernels/attention_scores.h"
#include "cpu/kernels/impl.h"

namespace pbm::PBM_TIER {

constexpr int64_t kChunkQueries = kMaskChunkQueries;
constexpr int64_t kBlockKeys = 96;    // even; a multiple of a strip's rows
constexpr int64_t kPartialKeys = 48;  // of a block that not all queries see: the less is computed in vain. Divides it
static_assert(kMaskBlockKeys == kBlockKeys);
constexpr int64_t kPitch = kChunkQueries + 16;

struct Work {
  char *q_t, *do_t;                         // panels of queries: Qᵀ, dOᵀ
  char *q, *d_o;                            // panels of D and Dv: Q, dO
  char *k, *v;                              // rows converted, where they cannot be read in place
  char* k_t;                                // Kᵀ of each block: D rows of kBlockKeys
  float *s, *dp;                            // kBlockKeys × kPitch: scores, and gradients of probabilities
  char *p, *ds;                             // the same in the flavour's dtype; in fp32 they take their place
  char* ds_panels;                          // dSᵀ as panels of queries
  float* dq_t;                              // D × kPitch
  float *dk, *dv;                           // keys × stride
  float *max, *base, *inverse_sum, *delta;  // of the chunk; base: what exponents are relative to
  float* slope_of_cap;                      // kBlockKeys × kPitch
};

struct Backward {
  const Attention& a;
  const AttentionGradients& g;
  const AttentionBackwardItem& item;
  int64_t queries, keys, offset;
  int64_t per_lane, size;                 // of the flavour: elements a lane, bytes an element
  int64_t dk_stride, dv_stride;           // elements
  int64_t k_stride, v_stride, kt_stride;  // bytes
  int64_t q_groups, do_groups;            // of panels over queries
  bool convert_k, convert_v;
  bool bad_k, bad_v;  // whether any of the item's keys or values is not finite: see clean_keys
  Work w;
};

struct Chunk {
  int64_t head;
  Range i;
  bool large = false;  // whether a row's maximum is so large that exponents are computed apart: see is_large
};

// Keys [j.begin, j.end) by columns [c.begin, c.end) of the chunk, multiples of 16.
struct Tile {
  Range j, c;
};

inline int64_t key_count(const Backward& f) { return f.item.end - f.item.begin; }

inline Work carve(const Backward& f) {
  const int64_t n = kChunkQueries, keys = key_count(f);
  const int64_t block_groups = kBlockKeys / f.per_lane * kGroupBytes, chunk_groups = n / f.per_lane * kGroupBytes;
  const int64_t scores = kBlockKeys * kPitch * 4;
  const bool bf16 = f.a.flavour == Flavour::bf16;
  Carver c;
  const int64_t q_t = c.take(n / kPanel * f.q_groups * kGroupBytes),
                do_t = c.take(n / kPanel * f.do_groups * kGroupBytes);
  const int64_t q = c.take(f.dk_stride / kPanel * chunk_groups), d_o = c.take(f.dv_stride / kPanel * chunk_groups);
  const int64_t k = c.take(f.convert_k ? keys * f.k_stride : 0), v = c.take(f.convert_v ? keys * f.v_stride : 0);
  const int64_t k_t = c.take(ceil_div(keys, kBlockKeys) * f.a.d * f.kt_stride);
  const int64_t s = c.take(scores), dp = c.take(scores);
  const int64_t p = bf16 ? c.take(scores / 2) : s, ds = bf16 ? c.take(scores / 2) : dp;
  const int64_t panels = c.take(n / kPanel * block_groups);
  const int64_t dq_t = c.take(f.a.d * kPitch * 4);
  const int64_t dk = c.take(keys * f.dk_stride * 4), dv = c.take(keys * f.dv_stride * 4);
  const int64_t max = c.take(n * 4), base_at = c.take(n * 4), inverse = c.take(n * 4), delta = c.take(n * 4);
  const int64_t cap = c.take(f.a.softcap != 0.f ? scores : 0);
  char* base = static_cast<char*>(scratch(ScratchSlot::attention, c.bytes));
  const auto floats = [&](int64_t at) { return reinterpret_cast<float*>(base + at); };
  return {base + q_t, base + do_t, base + q,        base + d_o,      base + k,      base + v,     base + k_t,
          floats(s),  floats(dp),  base + p,        base + ds,       base + panels, floats(dq_t), floats(dk),
          floats(dv), floats(max), floats(base_at), floats(inverse), floats(delta), floats(cap)};
}

inline void convert(const Backward& f, const AttentionOperand& x, int64_t d, int64_t j, int64_t count, bool transposed,
                    char* out, int64_t stride) {
  Gemm g{};
  g.k = transposed ? count : d;
  g.flavour = f.a.flavour;
  g.a = key_row(f.a, x, f.item.b, f.item.kv_head, j);
  g.a_dtype = x.dtype;
  g.a_row = transposed ? 1 : x.row;
  g.a_col = transposed ? x.row : 1;
  convert_rows(g, 0, transposed ? d : count, out, stride);
}

inline char* block_transposed(const Backward& f, int64_t j) {
  const int64_t at = j - f.item.begin;
  return f.w.k_t + at / kBlockKeys * f.a.d * f.kt_stride + at % kBlockKeys * f.size;
}

// Whether keys [j.begin, j.end) are finite in all of d elements: x·0 is 0 then.
inline bool are_finite(const Attention& a, const AttentionOperand& x, const AttentionBackwardItem& item, Range j,
                       int64_t d) {
  Vec even = zero(), odd = zero();
  with_float_dtype(x.dtype, [&]<DType T>() {
    for (int64_t i = j.begin; i < j.end; i++) {
      const char* row = key_row(a, x, item.b, item.kv_head, i);
      int64_t e = 0;
      for (; e + 2 * kWidth <= d; e += 2 * kWidth) {
        even = fmadd(load16<T>(row, e), zero(), even);
        odd = fmadd(load16<T>(row, e + kWidth), zero(), odd);
      }
      for (; e < d; e += kWidth)
        even = fmadd(load16_n<T>(row, e, static_cast<int>(min64(kWidth, d - e))), zero(), even);
    }
  });
  return reduce_add(add(even, odd)) == 0.f;
}

inline bool is_finite_key(const Backward& f, int64_t j) { return are_finite(f.a, f.a.k, f.item, {j, j + 1}, f.a.d); }
inline bool is_finite_value(const Backward& f, int64_t j) { return are_finite(f.a, f.a.v, f.item, {j, j + 1}, f.a.dv); }

// Zeros where keys and values that are not finite meet gradients of scores, or gradients of the output, of rows that do
// not see them: 0·NaN is NaN. Rows that do see them have NaN in their statistics and in δ, and need no other.
inline void clean_keys(const Backward& f) {
  for (int64_t j = f.item.begin; j < f.item.end; j++) {
    if (f.bad_k && !is_finite_key(f, j))
      for (int64_t d = 0; d < f.a.d; d++) std::memset(block_transposed(f, j) + d * f.kt_stride, 0, f.size);
    if (f.bad_v && !is_finite_value(f, j)) std::memset(f.w.v + (j - f.item.begin) * f.v_stride, 0, f.v_stride);
  }
}

inline void prepare_keys(const Backward& f) {
  const int64_t keys = key_count(f);
  if (f.convert_k) convert(f, f.a.k, f.a.d, f.item.begin, keys, false, f.w.k, f.k_stride);
  if (f.convert_v) convert(f, f.a.v, f.a.dv, f.item.begin, keys, false, f.w.v, f.v_stride);
  for (int64_t j = f.item.begin; j < f.item.end; j += kBlockKeys)
    convert(f, f.a.k, f.a.d, j, min64(kBlockKeys, f.item.end - j), true, block_transposed(f, j), f.kt_stride);
  if (f.bad_k || f.bad_v) clean_keys(f);
  std::memset(f.w.dk, 0, keys * f.dk_stride * 4);
  std::memset(f.w.dv, 0, keys * f.dv_stride * 4);
}

// What a chunk's statistics are to the lanes: queries that do not exist, or see nothing, have P = 0.
inline void prepare_statistics(const Backward& f, Chunk* chunk) {
  const Chunk& c = *chunk;
  const Attention& a = f.a;
  const int64_t first = row_index(a, f.item.b, c.head, c.i.begin);
  for (int64_t x = 0; x < kChunkQueries; x++) {
    const int64_t i = c.i.begin + x;
    const bool sees = i < c.i.end && f.g.inverse_sum[first + x] != 0.f;
    f.w.max[x] = sees ? f.g.max[first + x] : 0.f;
    f.w.base[x] = sees ? f.w.max[x] * score_factor(a) : INFINITY;
    chunk->large = chunk->large || (sees && is_large(f.w.base[x]));
    f.w.inverse_sum[x] = sees ? f.g.inverse_sum[first + x] : 0.f;
    f.w.delta[x] = 0.f;
    if (!sees) continue;
    const char* out = query_row(a, f.g.out, f.item.b, c.head, i);
    const char* d_out = query_row(a, f.g.d_out, f.item.b, c.head, i);
    Vec sum = zero();
    with_float_dtype(f.g.out.dtype, [&]<DType T>() {
      for (int64_t d = 0; d < a.dv; d += kWidth) {
        const int n = static_cast<int>(min64(kWidth, a.dv - d));
        sum = fmadd(load16_n<T>(out, d, n), load16_n<T>(d_out, d, n), sum);
      }
    });
    f.w.delta[x] = reduce_add(sum) - (f.g.d_lse ? f.g.d_lse[first + x] : 0.f);
  }
  for (int64_t x = 0; chunk->large && x < kChunkQueries; x++)  // subtract_max has subtracted it
    if (f.w.inverse_sum[x] != 0.f) f.w.base[x] = 0.f;
}

// Zeros for query x in a matrix of d columns: packed with the queries as columns, as dOᵀ is, or along k, as dO and Q are.
inline void clear_columns(int64_t x, int64_t groups, char* panels) {
  char* at = panels + x / kPanel * groups * kGroupBytes + x % kPanel * 4;
  for (int64_t g = 0; g < groups; g++) std::memset(at + g * kGroupBytes, 0, 4);
}
inline void clear_rows(const Backward& f, int64_t x, int64_t count, int64_t d, char* panels) {
  const int64_t panel = panel_groups(count, f.a.flavour) * kGroupBytes;
  char* at = panels + x / f.per_lane * kGroupBytes + x % f.per_lane * f.size;
  for (int64_t e = 0; e < d; e++) std::memset(at + e / kPanel * panel + e % kPanel * 4, 0, f.size);
}

// Nothing comes of a row that sees nothing, whatever its query and the gradient of its output are.
inline void clear_blind_rows(const Backward& f, const Chunk& c) {
  const int64_t n = c.i.end - c.i.begin;
  for (int64_t x = 0; x < n; x++) {
    if (f.w.inverse_sum[x] != 0.f) continue;
    clear_columns(x, f.do_groups, f.w.do_t);
    clear_rows(f, x, n, f.a.dv, f.w.d_o);
    clear_rows(f, x, n, f.a.d, f.w.q);
  }
}

inline void prepare_chunk(const Backward& f, Chunk* chunk) {
  const Chunk& c = *chunk;
  const Attention& a = f.a;
  const int64_t n = c.i.end - c.i.begin;
  const char* q = query_row(a, a.q, f.item.b, c.head, c.i.begin);
  const char* d_out = query_row(a, f.g.d_out, f.item.b, c.head, c.i.begin);
  const char* out = query_row(a, f.g.out, f.item.b, c.head, c.i.begin);
  const int64_t size = size_of(a.q.dtype), q_row = a.q.row * size, do_row = f.g.d_out.row * size,
                out_row = f.g.out.row * size;
  const PackB q_t = {n, a.d, a.flavour, q, a.q.dtype, 1, a.q.row, false, f.w.q_t};
  for (int64_t p = 0; p < ceil_div(n, kPanel); p++) {
    const int64_t now = p * kPanel, next = now + kPanel, rows = min64(kPanel, n - now);
    if (next < n) fetch_rows<3>(q + next * q_row, min64(kPanel, n - next), q_row, a.d * size);
    fetch_rows<2>(d_out + now * do_row, rows, do_row, a.dv * size);
    fetch_rows<2>(out + now * out_row, rows, out_row, a.dv * size);
    pack_b(q_t, p, p + 1);
  }
  pack_b({n, a.dv, a.flavour, d_out, f.g.d_out.dtype, 1, f.g.d_out.row, false, f.w.do_t}, 0, ceil_div(n, kPanel));
  pack_b({a.d, n, a.flavour, q, a.q.dtype, a.q.row, 1, false, f.w.q}, 0, ceil_div(a.d, kPanel));
  pack_b({a.dv, n, a.flavour, d_out, f.g.d_out.dtype, f.g.d_out.row, 1, false, f.w.d_o}, 0, ceil_div(a.dv, kPanel));
  prepare_statistics(f, chunk);
  clear_blind_rows(f, c);
}

}  // namespace pbm::PBM_TIER

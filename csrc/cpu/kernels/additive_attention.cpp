#include "cpu/kernels/additive_attention.h"

#include "common/scratch.h"
#include "cpu/kernels/additive_attention_rows.h"

namespace pbm::PBM_TIER {
namespace {

// Columns of hidden whose terms are added before they go to memory: their keys (8 KB) stay in L1 while rows pass by, and
// sums of sums keep the rounding error low.
constexpr int64_t kChunk = 32;
// Vectors of keys that meet one load of a query's x, y, z, w.
constexpr int kVectors = PBM_TIER_LEVEL >= 2 ? 4 : 2;

float* block_of(const AdditiveAttention& a, int64_t b, int64_t block) {
  return a.blocks + (b * key_blocks(a) + block) * padded_hidden(a) * kAdditiveKeys;
}
int32_t* forms_of(const AdditiveAttention& a, int64_t b, int64_t block) {
  return a.forms + (b * key_blocks(a) + block) * padded_hidden(a);
}
int keys_in(const AdditiveAttention& a, int64_t block) {
  return static_cast<int>(min64(kAdditiveKeys, a.keys - block * kAdditiveKeys));
}

// --- keys -------------------------------------------------------------------------------------------------------------

// out[h·64 + j], zeros where there is no key or no h.
template <DType T>
void transpose_keys(const AdditiveAttention& a, int64_t b, int64_t block, float* out) {
  for (int64_t h = 0; h < a.hidden; h += 16)
    for (int64_t j = 0; j < kAdditiveKeys; j += 16) {
      IVec r[16];
  PBM_UNROLL for (int x = 0; x < 16; x++) {
        const int64_t key = block * kAdditiveKeys + j + x;
        r[x] = key < a.keys ? as_int(load16_n<T>(row_of(a.key, b, 0, key), h, static_cast<int>(min64(16, a.hidden - h))))
                            : izero();
      }
      transpose16(r);
      PBM_UNROLL for (int x = 0; x < 16; x++) istore(out + (h + x) * kAdditiveKeys + j, r[x]);
    }
}

// Of what is not NaN: the order of the operands keeps those out.
float largest_of(const float* keys) {
  Vec m = zero();
  for (int j = 0; j < kAdditiveKeys; j += 16) m = vmax(vabs(load(keys + j)), m);
  return reduce_max(m);
}

void transform(float* keys, bool small) {
  for (int j = 0; j < kAdditiveKeys; j += 16) {
    const Vec k = load(keys + j);
    store(keys + j, small ? vtanh(k) : vexp(add(k, k)));
  }
}

// The block as panels of sixteen columns.
void to_columns(const AdditiveAttention& a, int64_t b, int64_t block, const float* keys) {
  for (int64_t h = 0; h < padded_hidden(a); h += 16)
    for (int64_t j = 0; j < kAdditiveKeys; j += 16) {
      IVec r[16];
      PBM_UNROLL for (int x = 0; x < 16; x++) r[x] = iload(keys + (h + x) * kAdditiveKeys + j);
      transpose16(r);
      float* out = a.columns + (b * padded_hidden(a) + h) * padded_keys(a) + (block * kAdditiveKeys + j) * 16;
      PBM_UNROLL for (int x = 0; x < 16; x++) istore(out + x * 16, r[x]);
    }
}

// --- scores -----------------------------------------------------------------------------------------------------------

// For each h of a query: x·v, y·v, z, w of the small form, then of the large one. A chunk of all queries lies together.
template <DType T>
void query_coefficients(const AdditiveAttention& a, int64_t b, int64_t i, float* out, int64_t chunk_stride) {
  const Vec one = set1(1.f);
  for (int64_t h = 0; h < a.hidden; h += 16) {
    const Vec q = load16_n<T>(row_of(a.query, b, 0, i), h, static_cast<int>(min64(16, a.hidden - h)));
    const Vec v = load(a.v + h);
    const QueryForms f = query_forms(q);
    const Vec each[8] = {v, mul(v, f.small), f.small, one, mul(v, f.z), mul(v, sub(zero(), f.w)), f.z, f.w};
    IVec r[16];
    PBM_UNROLL for (int x = 0; x < 8; x++) r[x] = as_int(each[x]);
    PBM_UNROLL for (int x = 8; x < 16; x++) r[x] = izero();
    transpose16(r);
    float* to = out + h / kChunk * chunk_stride + h % kChunk * 8;
    for (int x = 0; x < 15; x++) istore(to + x * 8, r[x]);  // the next one overwrites its upper half
    store_n(to + 15 * 8, as_float(r[15]), 8);
  }
}

// s[j] (+)= Σ_h v_h·tanh(q_h + k_jh) over pairs of h, for 16·N keys. Two quotients share a division: n0/d0 + n1/d1 =
// (n0·d1 + n1·d0)/(d0·d1).
template <int N>
void score_tile(const float* keys, const int32_t* forms, const float* coefficients, int64_t pairs, float* s, bool more) {
  Vec sum[N];
  PBM_UNROLL for (int u = 0; u < N; u++) sum[u] = zero();
  for (int64_t p = 0; p < pairs; p++, keys += 2 * kAdditiveKeys, forms += 2) {
    const float *c0 = coefficients + forms[0], *c1 = coefficients + forms[1];
    const Vec x0 = set1(c0[0]), y0 = set1(c0[1]), z0 = set1(c0[2]), w0 = set1(c0[3]);
    const Vec x1 = set1(c1[0]), y1 = set1(c1[1]), z1 = set1(c1[2]), w1 = set1(c1[3]);
    PBM_UNROLL for (int u = 0; u < N; u++) {
      const Vec k0 = load(keys + 16 * u), k1 = load(keys + kAdditiveKeys + 16 * u);
      const Vec n0 = fmadd(k0, x0, y0), d0 = fmadd(k0, z0, w0), n1 = fmadd(k1, x1, y1), d1 = fmadd(k1, z1, w1);
      sum[u] = add_quotient(sum[u], fmadd(n0, d1, mul(n1, d0)), mul(d0, d1));
    }
  }
  PBM_UNROLL for (int u = 0; u < N; u++) store(s + 16 * u, more ? add(load(s + 16 * u), sum[u]) : sum[u]);
}

void score_row(const float* keys, const int32_t* forms, const float* coefficients, int64_t pairs, int count, float* s,
               bool more) {
  int j = 0;
  for (; j + 16 * kVectors <= count; j += 16 * kVectors)
    score_tile<kVectors>(keys + j, forms, coefficients, pairs, s + j, more);
  if constexpr (kVectors == 4) {
    if (j + 32 <= count) {
      score_tile<2>(keys + j, forms, coefficients, pairs, s + j, more);
      j += 32;
    }
  }
  for (; j < count; j += 16) score_tile<1>(keys + j, forms, coefficients, pairs, s + j, more);
}

// --- the mask and the softmax -------------------------------------------------------------------------------------------

const uint8_t* visible(const AdditiveMask& m, int64_t b, int64_t i) {
  return static_cast<const uint8_t*>(m.data) + b * m.batch + i * m.row;
}

// Whether a bool mask hides all of a block from these queries.
bool hidden_block(const AdditiveAttention& a, int64_t b, Range rows, Range keys) {
  if (a.mask.kind != MaskKind::boolean) return false;
  for (int64_t i = rows.begin; i < (a.mask.row ? rows.end : rows.begin + 1); i++) {
    const uint8_t* row = visible(a.mask, b, i);
    if (a.mask.column ? std::memchr(row + keys.begin, 1, keys.end - keys.begin) != nullptr : *row != 0) return false;
  }
  return true;
}

// Sixteen scores, or −∞ where the mask has a 0. What is hidden may be NaN.
PBM_INLINE Vec where_visible(const uint8_t* row, int n, Vec s) {
  uint8_t last[16] = {};
  std::memcpy(last, row, n);
  return where_negative(to_float(isub(widen_u8(last), iset1(1))), set1(-INFINITY), s);
}

void apply_mask(const AdditiveAttention& a, int64_t b, int64_t i, float* s) {
  const AdditiveMask& m = a.mask;
  if (m.kind == MaskKind::none) return;
  const int64_t at = b * m.batch + i * m.row;
  const auto over_keys = [&](auto&& f) {
    for (int64_t j = 0; j < a.keys; j += 16) store(s + j, f(j, static_cast<int>(min64(16, a.keys - j)), load(s + j)));
  };
  if (m.kind == MaskKind::boolean && m.column) {
    over_keys([&](int64_t j, int n, Vec x) { return where_visible(visible(m, b, i) + j, n, x); });
  } else if (m.kind == MaskKind::boolean) {
    if (!*visible(m, b, i)) over_keys([](int64_t, int, Vec) { return set1(-INFINITY); });
  } else {
    with_float_dtype(m.dtype, [&]<DType T>() {
      const Vec one_for_all = set1(reduce_add(load16_n<T>(m.data, at, 1)));
      over_keys([&](int64_t j, int n, Vec x) {
        return add(x, m.column ? load16_n<T>(m.data, at + j, n) : one_for_all);
      });
    });
  }
}

// s to p in place; the logarithm of the sum. Lanes behind the last key become zeros.
float softmax(float* s, int64_t keys) {
  for (int64_t j = keys; j % 16; j++) s[j] = -INFINITY;
  Vec largest = set1(-INFINITY);
  for (int64_t j = 0; j < keys; j += 16) largest = vmax(largest, load(s + j));
  const float m = reduce_max(largest);
  if (!(m > -INFINITY && m < INFINITY)) {  // nothing is visible, or a score is infinite or NaN
    float lse = m;
    for (int64_t j = 0; j < keys; j++) lse = std::isnan(s[j]) ? NAN : lse;
    const float p = lse == -INFINITY ? 0 : NAN;  // of an infinite score, ∞ − ∞
    for (int64_t j = 0; j < ceil_div(keys, 16) * 16; j++) s[j] = p;
    return lse;
  }
  Vec sums[2] = {zero(), zero()};
  for (int64_t j = 0; j < keys; j += 16) {
    const Vec e = vexp(sub(load(s + j), set1(m)));
    store(s + j, e);
    sums[j / 16 % 2] = add(sums[j / 16 % 2], e);
  }
  const float sum = reduce_add(add(sums[0], sums[1]));
  for (int64_t j = 0; j < keys; j += 16) store(s + j, div(load(s + j), set1(sum)));
  return static_cast<float>(m + std::log(static_cast<double>(sum)));
}

template <DType T>
void scores(const AdditiveAttention& a, int64_t b, Range rows, float* s) {
  const int64_t count = rows.end - rows.begin, pitch = score_pitch(a), chunk_stride = count * kChunk * 8;
  float* coefficients = nullptr;
  if (!a.direct) {
    const int64_t floats = ceil_div(a.hidden, kChunk) * chunk_stride;
    coefficients = static_cast<float*>(scratch(ScratchSlot::additive, floats * sizeof(float)));
    for (int64_t r = 0; r < count; r++)
      query_coefficients<T>(a, b, rows.begin + r, coefficients + r * kChunk * 8, chunk_stride);
  }
  for (int64_t block = 0; block < key_blocks(a); block++) {
    const int in_block = keys_in(a, block);
    const Range keys = {block * kAdditiveKeys, block * kAdditiveKeys + in_block};
    if (hidden_block(a, b, rows, keys)) continue;
    float* to = s + keys.begin;
    const int32_t* forms = a.direct ? nullptr : forms_of(a, b, block);
    if (!forms || forms[0] < 0) {
      for (int64_t r = 0; r < count; r++) additive_direct_scores(a, b, rows.begin + r, keys, to + r * pitch);
      continue;
    }
    const float* prepared = block_of(a, b, block);
    for (int64_t h = 0; h < a.hidden; h += kChunk) {
      const int64_t pairs = (min64(kChunk, a.hidden - h) + 1) / 2;
      const float* chunk = coefficients + h / kChunk * chunk_stride;
      for (int64_t r = 0; r < count; r++)
        score_row(prepared + h * kAdditiveKeys, forms + h, chunk + r * kChunk * 8, pairs, in_block, to + r * pitch, h > 0);
    }
  }
}

}  // namespace

void additive_prepare(const AdditiveAttention& a, int64_t b, int64_t block) {
  float* keys = block_of(a, b, block);
  int32_t* forms = forms_of(a, b, block);
  with_float_dtype(a.key.dtype, [&]<DType T>() { transpose_keys<T>(a, b, block, keys); });
  float largest = 0;
  for (int64_t h = 0; h < padded_hidden(a); h++) {
    const float k = largest_of(keys + h * kAdditiveKeys);
    if (k > largest) largest = k;
    forms[h] = static_cast<int32_t>(h % kChunk * 8 + (k <= kSmallKey ? 0 : 4));
  }
  if (a.direct || largest > kLargestKey) {
    if (a.hidden) forms[0] = -1;
  } else {
    for (int64_t h = 0; h < a.hidden; h++) transform(keys + h * kAdditiveKeys, forms[h] % 8 == 0);
  }
  if (a.columns) to_columns(a, b, block, keys);
}

void additive_softmax(const AdditiveAttention& a, int64_t b, int64_t i, float* s) {
  apply_mask(a, b, i, s);
  const float lse = softmax(s, a.keys);
  if (a.lse) a.lse[b * a.queries + i] = lse;
}

void additive_probabilities(const AdditiveAttention& a, int64_t b, Range rows, float* p) {
  const int64_t pitch = score_pitch(a);
  if (a.hidden == 0) std::memset(p, 0, (rows.end - rows.begin) * pitch * sizeof(float));
  if (a.hidden) with_float_dtype(a.query.dtype, [&]<DType T>() { scores<T>(a, b, rows, p); });
  for (int64_t i = rows.begin; i < rows.end; i++) additive_softmax(a, b, i, p + (i - rows.begin) * pitch);
}

void additive_forward(const AdditiveAttention& a, const AdditiveItem& item) {
  const int64_t count = item.rows.end - item.rows.begin, pitch = score_pitch(a);
  float* p = static_cast<float*>(scratch(ScratchSlot::attention, count * pitch * sizeof(float)));
  additive_probabilities(a, item.b, item.rows, p);
  for (int64_t r = 0; r < count; r++) drop(a, item.b, item.rows.begin + r, p + r * pitch);
  Gemm g{};
  g.m = count;
  g.n = a.values;
  g.k = a.keys;
  g.a = p;
  g.a_row = pitch;
  g.a_col = 1;
  g.b = a.panels + item.b * ceil_div(a.values, kPanel) * a.keys * kPanel;
  g.b_packed = true;
  g.c = const_cast<char*>(row_of(a.out, item.b, 0, item.rows.begin));
  g.c_dtype = a.out.dtype;
  g.c_row = a.out.row;
  gemm(g, {0, count}, {0, a.values});
  note_kernel("additive_attention." PBM_TIER_NAME);
}

}  // namespace pbm::PBM_TIER

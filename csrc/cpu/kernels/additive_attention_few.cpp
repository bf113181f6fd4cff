// Additive attention for few queries (a decoder's steps): each key is met a few times only, so that reading it is half of
// the work. Keys and values are read where they lie, along hidden and along their columns.
#include "common/scratch.h"
#include "cpu/kernels/additive_attention_rows.h"

namespace pbm::PBM_TIER {
namespace {

int64_t row_index(const AdditiveAttention& a, int64_t b, int64_t i) { return (b * a.queries + i) * score_pitch(a); }

Range keys_of_part(const AdditiveAttention& a, int64_t part) {
  return {part * kFewKeys, min64(part * kFewKeys + kFewKeys, a.keys)};
}

// Calls f(h, n) for sixteen columns at a time, and for the n that are left.
template <class F>
PBM_INLINE void each16(int64_t columns, F&& f) {
  int64_t h = 0;
  for (; h + 16 <= columns; h += 16) f(h, 16);
  if (h < columns) f(h, static_cast<int>(columns - h));
}

// out[j] = the sum of the lanes of term(sum, x, y_j, h) over columns, four rows y at a time.
template <DType T, class F>
void sums_along(const char* x, const AttentionOperand& y, int64_t b, Range rows, int64_t columns, float* out,
                F&& term) {
  constexpr int kAtOnce = 4;
  const int64_t stride = y.row * size_of(T);
  for (int64_t j = rows.begin; j < rows.end; j += kAtOnce) {
    const int count = static_cast<int>(min64(kAtOnce, rows.end - j));
    const char* first = row_of(y, b, 0, j);
    Vec sum[kAtOnce];
  PBM_UNROLL for (int r = 0; r < kAtOnce; r++) sum[r] = zero();
    each16(columns, [&](int64_t h, int n) __attribute__((always_inline)) {
      const Vec u = load16_n<T>(x, h, n);
      PBM_UNROLL for (int r = 0; r < kAtOnce; r++)
        sum[r] = term(sum[r], u, load16_n<T>(first + (r < count ? r : 0) * stride, h, n), h);
    });
    for (int r = 0; r < count; r++) out[j - rows.begin + r] = reduce_add(sum[r]);
  }
}

// out_i = Σ_j p_ij·value_j, in pieces of columns that stay in registers, and sums of at most 256 terms.
template <DType T>
void output_row(const AdditiveAttention& a, int64_t b, int64_t i, const float* p) {
  constexpr int kVectors = 8;
  constexpr int64_t kTerms = 256;
  char* out = const_cast<char*>(row_of(a.out, b, 0, i));
  for (int64_t d = 0; d < a.values; d += 16 * kVectors) {
    const int64_t left = a.values - d;
    const auto width = [&](int u) { return static_cast<int>(left - 16 * u < 16 ? left - 16 * u : 16); };
    const int vectors = static_cast<int>(min64(kVectors, ceil_div(left, 16)));
    Vec total[kVectors];
    for (int u = 0; u < kVectors; u++) total[u] = zero();
    for (int64_t j0 = 0; j0 < a.keys; j0 += kTerms) {
      Vec sum[kVectors];
      PBM_UNROLL for (int u = 0; u < kVectors; u++) sum[u] = zero();
      for (int64_t j = j0; j < min64(j0 + kTerms, a.keys); j++) {
        const char* value = row_of(a.value, b, 0, j);
        if (left >= 16 * kVectors) {
          PBM_UNROLL for (int u = 0; u < kVectors; u++)
            sum[u] = fmadd(set1(p[j]), load16<T>(value, d + 16 * u), sum[u]);
        } else {
          for (int u = 0; u < vectors; u++)
            sum[u] = fmadd(set1(p[j]), load16_n<T>(value, d + 16 * u, width(u)), sum[u]);
        }
      }
      PBM_UNROLL for (int u = 0; u < kVectors; u++) total[u] = add(total[u], sum[u]);
    }
    for (int u = 0; u < vectors; u++) store16_n<T>(out, d + 16 * u, total[u], width(u));
  }
}

// The gradient of one key, and its terms of those of the queries and of v.
template <DType T>
void key_gradient(const AdditiveAttention& a, const AdditiveFew& f, int64_t b, int64_t j, float* d_query, float* d_v) {
  const int64_t width = padded_hidden(a);
  const char* key = row_of(a.key, b, 0, j);
  char* d_key = const_cast<char*>(row_of(f.d_key, b, 0, j));
  each16(a.hidden, [&](int64_t h, int n) __attribute__((always_inline)) {
    const Vec k = load16_n<T>(key, h, n);
    Vec by_v = load(d_v + h), by_key = zero();
    for (int64_t i = 0; i < a.queries; i++) {
      const TanhSech t = tanh_sech2(add(load16_n<T>(row_of(a.query, b, 0, i), h, n), k));
      const Vec d_s = set1(f.d_s[row_index(a, b, i) + j]), by_x = mul(d_s, t.sech2);
      float* to = d_query + i * width + h;
      store(to, add(load(to), by_x));
      by_key = add(by_key, by_x);
      by_v = fmadd(d_s, t.tanh, by_v);
    }
    store(d_v + h, by_v);
    store16_n<T>(d_key, h, mul(by_key, load(a.v + h)), n);
  });
}

template <DType T>
void value_gradient(const AdditiveAttention& a, const AdditiveFew& f, int64_t b, int64_t j) {
  char* out = const_cast<char*>(row_of(f.d_value, b, 0, j));
  each16(a.values, [&](int64_t d, int n) __attribute__((always_inline)) {
    Vec sum = zero();
    for (int64_t i = 0; i < a.queries; i++)
      sum = fmadd(set1(f.p[row_index(a, b, i) + j]), load16_n<T>(row_of(f.d_out, b, 0, i), d, n), sum);
    store16_n<T>(out, d, sum, n);
  });
}

const char kForward[] = "additive_attention_few." PBM_TIER_NAME;
const char kBackward[] = "additive_attention_few_backward." PBM_TIER_NAME;

}  // namespace

void additive_direct_scores(const AdditiveAttention& a, int64_t b, int64_t i, Range keys, float* s) {
  with_float_dtype(a.key.dtype, [&]<DType T>() {
    const float* v = a.v;
    sums_along<T>(row_of(a.query, b, 0, i), a.key, b, keys, a.hidden, s,
                  [v](Vec sum, Vec q, Vec k, int64_t h) __attribute__((always_inline)) {
                    return fmadd(load(v + h), vtanh(add(q, k)), sum);
                  });
  });
}

void additive_few_scores(const AdditiveAttention& a, const AdditiveFew& f, int64_t b, int64_t part) {
  const Range keys = keys_of_part(a, part);
  for (int64_t i = 0; i < a.queries; i++) {
    const int64_t at = row_index(a, b, i) + keys.begin;
    additive_direct_scores(a, b, i, keys, f.p + at);
    if (!f.d_s) continue;
    with_float_dtype(a.value.dtype, [&]<DType T>() {
      sums_along<T>(row_of(f.d_out, b, 0, i), a.value, b, keys, a.values, f.d_s + at,
                    [](Vec sum, Vec x, Vec y, int64_t) __attribute__((always_inline)) { return fmadd(x, y, sum); });
    });
  }
}

void additive_few_output(const AdditiveAttention& a, const AdditiveFew& f, int64_t b) {
  for (int64_t i = 0; i < a.queries; i++) {
    float* p = f.p + row_index(a, b, i);
    additive_softmax(a, b, i, p);
    drop(a, b, i, p);
    with_float_dtype(a.value.dtype, [&]<DType T>() { output_row<T>(a, b, i, p); });
  }
  note_kernel(kForward);
}

void additive_few_score_gradients(const AdditiveAttention& a, const AdditiveFew& f, int64_t b) {
  for (int64_t i = 0; i < a.queries; i++) {
    const int64_t at = row_index(a, b, i);
    additive_softmax(a, b, i, f.p + at);
    additive_score_gradient(a, b, i, f.d_lse, f.p + at, f.d_s + at);
  }
}

void additive_few_gradients(const AdditiveAttention& a, const AdditiveFew& f, int64_t b, int64_t part) {
  const Range keys = keys_of_part(a, part);
  const int64_t width = padded_hidden(a), at = b * few_parts(a) + part;
  with_float_dtype(a.key.dtype, [&]<DType T>() {
    if (f.d_key.data) {
      float *d_query = f.part_query + at * a.queries * width, *d_v = f.part_v + at * width;
      std::memset(d_query, 0, a.queries * width * sizeof(float));
      std::memset(d_v, 0, width * sizeof(float));
      for (int64_t j = keys.begin; j < keys.end; j++) key_gradient<T>(a, f, b, j, d_query, d_v);
    }
    if (f.d_value.data)
      for (int64_t j = keys.begin; j < keys.end; j++) value_gradient<T>(a, f, b, j);
  });
  note_kernel(kBackward);
}

void additive_few_sums(const AdditiveAttention& a, const AdditiveFew& f, int64_t b) {
  const int64_t width = padded_hidden(a), parts = few_parts(a), rows = a.queries * width;
  const auto sum = [&](const float* part, int64_t stride) {
    Vec s = zero();
    for (int64_t x = 0; x < parts; x++) s = add(s, load(part + x * stride));
    return s;
  };
  for (int64_t h = 0; h < a.hidden; h += 16) {
    const int n = static_cast<int>(min64(16, a.hidden - h));
    store(f.d_v + b * width + h, sum(f.part_v + b * parts * width + h, width));
    for (int64_t i = 0; i < a.queries; i++) {
      const Vec by_query = mul(sum(f.part_query + b * parts * rows + i * width + h, rows), load(a.v + h));
      with_float_dtype(f.d_query.dtype, [&]<DType T>() {
        store16_n<T>(const_cast<char*>(row_of(f.d_query, b, 0, i)), h, by_query, n);
      });
    }
  }
}

}  // namespace pbm::PBM_TIER

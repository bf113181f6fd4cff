// The parts of a row of attention, each relative to its own maximum, to its output and its log-sum-exp.
#include "cpu/kernels/attention_decode.h"
#include "cpu/kernels/attention_scores.h"
#include "cpu/kernels/impl.h"

namespace pbm::PBM_TIER {
namespace {

// What a part is multiplied with. One that sees nothing holds zeros, or NaN where a hidden key has NaN: they stay.
PBM_INLINE float factor_of(const Attention& a, float largest, float of_all) {
  if (largest == of_all) return 1.f;
  return reduce_max(vexp2(rescaling(set1(largest), set1(of_all), set1(score_factor(a)))));
}

void put_row(const Attention& a, const float* out, float factor, int64_t at) {
  with_float_dtype(a.out.dtype, [&]<DType T>() {
    for (int64_t d = 0; d < a.dv; d += kWidth) {
      const int n = static_cast<int>(a.dv - d < kWidth ? a.dv - d : kWidth);
      // Zeros where nothing is visible, whatever the values are.
      store16_n<T>(const_cast<void*>(a.out.data), at + d, factor == 0.f ? zero() : mul(load(out + d), set1(factor)), n);
    }
  });
}

void merge_row(const Attention& a, const DecodeItem* items, int64_t count, int64_t r) {
  const int64_t stride = decode_out_stride(a), padded = decode_padded_rows(a);
  float largest = kHidden, sum = 0.f;
  for (int64_t n = 0; n < count; n++) largest = __builtin_fmaxf(largest, items[n].partial[padded * stride + r]);
  alignas(64) float out[256] = {};
  for (int64_t n = 0; n < count; n++) {
    const float* part = items[n].partial;
    const float factor = factor_of(a, part[padded * stride + r], largest);
    sum += part[padded * (stride + 1) + r] * factor;
    for (int64_t d = 0; d < a.dv; d += kWidth)
      store(out + d, fmadd(load(part + r * stride + d), set1(factor), load(out + d)));
  }
  const int64_t head = items->kv_head * (a.heads / a.kv_heads) + r / a.queries, i = r % a.queries, b = items->b;
  const bool empty = sum == 0.f;
  const float inverse = empty ? 0.f : 1.f / sum;
  put_row(a, out, inverse, b * a.out.batch + head * a.out.head + i * a.out.row);
  const int64_t at = b * a.row_batch + head * a.row_head + i;
  if (a.lse) a.lse[at] = empty ? kHidden : reduce_max(log_sum_exp(a, set1(largest), set1(sum)));
  if (a.max) a.max[at] = largest;
  if (a.inverse_sum) a.inverse_sum[at] = inverse;
}

}  // namespace

void attention_decode_merge(const AttentionDecode& p, const DecodeItem* items, int64_t count) {
  for (int64_t r = 0; r < decode_rows(p.a); r++) merge_row(p.a, items, count, r);
}

}  // namespace pbm::PBM_TIER

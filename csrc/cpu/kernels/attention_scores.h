// From raw products q·k to what the softmax sees: visibility, and the options that change a score.
#pragma once

#include <cmath>

#include "cpu/kernels/attention.h"
#include "cpu/kernels/convert.h"
#include "cpu/kernels/philox.h"
#include "cpu/kernels/vecmath.h"

namespace pbm::PBM_TIER {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kHidden = -INFINITY;

// The keys that are visible to query i: [begin, end).
PBM_INLINE Range visible_keys(const Attention& a, int64_t i, int64_t queries, int64_t keys) {
  const int64_t at = i + (a.bottom_right ? keys - queries : 0);
  int64_t begin = a.left < 0 || at - a.left < 0 ? 0 : at - a.left;
  int64_t end = a.right < 0 || at + a.right + 1 > keys ? keys : at + a.right + 1;
  if (begin > keys) begin = keys;
  if (end < begin) end = begin;
  return {begin, end};
}

// Where nothing but the scale stands between q·k and the softmax, the products themselves are the scores, and the
// exponential applies the scale; otherwise adjust_scores makes them what the formula calls s.
PBM_INLINE bool plain_scores(const Attention& a) {
  return a.softcap == 0.f && a.mask.kind == MaskKind::none && !a.slopes && a.scale >= 0x1p-126f &&
         a.k.dtype != DType::s8;
}
// What a score is to be multiplied with to be an s; and to be an exponent of base 2.
PBM_INLINE float score_unit(const Attention& a) { return plain_scores(a) ? a.scale : 1.f; }
PBM_INLINE float score_factor(const Attention& a) { return score_unit(a) * kLog2e; }

// --- the softmax's exponents: weights are 2^(score·factor − max·factor) -----------------------------------------------

// With base = max·factor rounded, 2^fma(score, factor, −base) has an error that is common to a row and cancels, but for
// huge scores it leaves the range of floats: rows with such a base take 2^((score − max)·factor), which is as good.
constexpr float kLargeBase = 0x1p22f;
PBM_INLINE bool is_large(float base) { return !(__builtin_fabsf(base) < kLargeBase); }  // NaN and infinity are
PBM_INLINE Vec where_large(Vec base, Vec a, Vec b) { return where_negative(sub(vabs(base), set1(kLargeBase)), b, a); }

// The exponent of what turns weights relative to the maximum `from` to such relative to `to`, which is not −∞.
PBM_INLINE Vec rescaling(Vec from, Vec to, Vec factor) {
  const Vec base = mul(from, factor), to_base = mul(to, factor);
  const Vec small = where_large(base, fmadd(from, factor, sub(zero(), to_base)), sub(base, to_base));
  const Vec large = where_large(base, mul(sub(from, to), factor), sub(zero(), fmadd(to, factor, sub(zero(), base))));
  return where_large(to_base, large, small);
}

// The log-sum-exp of rows with these maxima and sums of weights, −∞ where the maximum is.
PBM_INLINE Vec log_sum_exp(const Attention& a, Vec max, Vec sum) {
  const Vec base = mul(max, set1(score_factor(a))), log2 = vlog2(sum);
  const Vec small = mul(add(base, log2), set1(kLn2));
  const Vec large = fmadd(max, set1(score_unit(a)), mul(log2, set1(kLn2)));
  return where_hidden(max, add(max, log2), where_large(base, large, small));  // NaN stays
}

// What a product is multiplied with before tanh: finite, so that 0 stays 0.
PBM_INLINE float cap_factor(float scale, float softcap) {
  constexpr float kMost = 0x1.fffffep127f;
  return __builtin_fminf(__builtin_fmaxf(scale / softcap, -kMost), kMost);
}

// --- masks -----------------------------------------------------------------------------------------------------------

// Sixteen elements of a mask as what is added to scores.
PBM_INLINE Vec mask_at(const AttentionMask& m, int64_t at) {
  if (m.kind == MaskKind::boolean) {
    const IVec visible = widen_u8(static_cast<const uint8_t*>(m.data) + at);  // 0 or 1
    return as_float(iand(isub(visible, iset1(1)), as_int(set1(kHidden))));
  }
  return with_float_dtype(m.dtype, [&]<DType T>() { return load16<T>(m.data, at); });
}

// Hidden is hidden, whatever the score is.
PBM_INLINE Vec add_mask(Vec score, Vec mask) { return where_hidden(mask, mask, add(score, mask)); }

// The same for n keys from j on, of the row whose element for key 0 is at `row`.
PBM_INLINE Vec mask_at_n(const AttentionMask& m, int64_t row, int64_t j, int n) {
  if (m.col != 0 && n >= 16) return mask_at(m, row + j);
  alignas(64) char buffer[64] = {};
  const int64_t size = m.kind == MaskKind::boolean ? 1 : size_of(m.dtype);
  std::memcpy(buffer, static_cast<const char*>(m.data) + (row + j * m.col) * size, (m.col ? n : 1) * size);
  AttentionMask copy = m;
  copy.data = buffer;
  if (m.col != 0) return mask_at(copy, 0);
  alignas(64) float value[16];
  store(value, mask_at(copy, 0));
  return set1(value[0]);
}

}  // namespace pbm::PBM_TIER

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

// Scores are kept as base-2 exponents. Where nothing but the scale stands between q·k and the softmax, the exponential
// applies it; otherwise adjust_scores does.
PBM_INLINE bool plain_scores(const Attention& a) {
  return a.softcap == 0.f && a.mask.kind == MaskKind::none && !a.slopes && a.scale > 0.f;
}

// Sixteen elements of a mask as what is added to the exponents.
PBM_INLINE Vec mask_at(const AttentionMask& m, int64_t at) {
  if (m.kind == MaskKind::boolean) {
    const IVec visible = widen_u8(static_cast<const uint8_t*>(m.data) + at);  // 0 or 1
    return as_float(iand(isub(visible, iset1(1)), as_int(set1(kHidden))));
  }
  return with_float_dtype(m.dtype, [&]<DType T>() { return mul(load16<T>(m.data, at), set1(kLog2e)); });
}

PBM_INLINE Vec mask_at_n(const AttentionMask& m, int64_t at, int n) {
  if (n >= 16) return mask_at(m, at);
  alignas(64) char buffer[64] = {};
  const int64_t size = m.kind == MaskKind::boolean ? 1 : size_of(m.dtype);
  std::memcpy(buffer, static_cast<const char*>(m.data) + at * size, n * size);
  AttentionMask copy = m;
  copy.data = buffer;
  return mask_at(copy, 0);
}

}  // namespace pbm::PBM_TIER

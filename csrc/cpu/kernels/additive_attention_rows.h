// What the forward and the backward kernels of additive attention share.
#pragma once

#include <cmath>

#include "cpu/kernels/additive_attention.h"
#include "cpu/kernels/attention_rows.h"
#include "cpu/kernels/convert.h"
#include "cpu/kernels/philox.h"
#include "cpu/kernels/vecmath.h"

namespace pbm::PBM_TIER {

// The small form's denominator is at least 1 − tanh 0.75 = 0.36. From 0.5 to 1.5 errors are the same.
constexpr float kSmallKey = 0.75f;
// Two denominators of the large form are multiplied: e^60 leaves 2^40 for v.
constexpr float kLargestKey = 15.f;

// Rows of p an odd number of cache lines apart, so that they do not share a few sets of the L1 cache.
inline int64_t score_pitch(const AdditiveAttention& a) { return padded_keys(a) + 16; }

// Sixteen columns of a query in both forms: tanh q; and e^(2q), 1 as z, w, both scaled by e^(−2q) where q is positive.
struct QueryForms {
  Vec small, z, w;
};

PBM_INLINE QueryForms query_forms(Vec q) {
  const Vec e = vexp(mul(vabs(q), set1(-2.f))), one = set1(1.f);
  return {vtanh(q), where_negative(q, e, one), where_negative(q, one, e)};
}

// Scores of one query by tanh itself, along hidden.
void additive_direct_scores(const AdditiveAttention& a, int64_t b, int64_t i, Range keys, float* s);
// Scores of one query to p in place, behind the mask, and the query's lse.
void additive_softmax(const AdditiveAttention& a, int64_t b, int64_t i, float* s);
// p of queries `rows` of sequence b.
void additive_probabilities(const AdditiveAttention& a, int64_t b, Range rows, float* p);
// One row of dO·value to ds, and of p to what multiplies dO.
void additive_score_gradient(const AdditiveAttention& a, int64_t b, int64_t i, const float* d_lse, float* p,
                             float* d_s);

// x_j times what dropout multiplies the p of key j with, for a row.
inline void drop(const AdditiveAttention& a, int64_t b, int64_t i, float* row) {
  for (int64_t j = 0; a.dropout.threshold && j < a.keys; j += 64) {
    IVec c[4] = {iadd(to_int(iota()), iset1(static_cast<int32_t>(j / 4))), iset1(static_cast<int32_t>(i)),
                 iset1(static_cast<int32_t>(b)), izero()};
    philox4x32(c, a.dropout.seed);
    float factors[4][16], in_order[64];
    for (int w = 0; w < 4; w++) store(factors[w], kept(c[w], a.dropout.threshold, a.dropout.factor));
    for (int x = 0; x < 64; x++) in_order[x] = factors[x % 4][x / 4];
    for (int64_t x = 0; x < min64(64, a.keys - j); x += kWidth)
      store(row + j + x, mul(load(row + j + x), load(in_order + x)));
  }
}

}  // namespace pbm::PBM_TIER

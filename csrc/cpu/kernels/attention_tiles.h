// The two products of a strip of queries, with what stands between them: QKᵀ finds the rows' maxima on the way out of the
// registers, P·V rescales what it adds to.
#pragma once

#include "cpu/kernels/attention_rows.h"
#include "cpu/kernels/tile.h"

namespace pbm::PBM_TIER {

struct ScoreStrip {
  const char* q;
  int64_t q_stride;  // bytes
  int64_t lanes;
  const char* k;  // panels of keys, `lanes` groups each, one behind the other
  int64_t panels;
  float* scores;
  int64_t pitch;  // elements
  float* max;     // of each row
};

struct ValueStrip {
  const char* p;
  int64_t p_stride;  // bytes
  int64_t lanes;     // of keys
  const char* v;     // panels of values
  int64_t v_panel;   // bytes
  int64_t panels;
  float* out;
  int64_t out_stride;    // elements
  const float* rescale;  // what out is multiplied with before P·V is added; null: out is not read
};

// How far ahead P·V fetches a panel; QKᵀ, whose panels are short, fetches the ones of the next step.
constexpr int64_t kValuePrefetch = 32 * kGroupBytes;

// Lanes of D that are summed in one chain: see docs/numerics.md.
constexpr int64_t kChainLanes = 128;

template <Flavour F, int MR, int NV>
PBM_INLINE void score_tile(const ScoreStrip& s, const char* k, int64_t panel, float* scores, Vec (&max)[MR]) {
  using D = Dot<F>;
  const char* q = s.q;
  const char* next = k + NV * panel;
  int64_t lane = 0;
  do {  // once, unless D is above kChainLanes
    typename D::Acc acc[MR][NV];
  PBM_UNROLL for (int r = 0; r < MR; r++) PBM_UNROLL for (int j = 0; j < NV; j++) acc[r][j] = D::zero();
    const int64_t end = min64(lane + kChainLanes, s.lanes);
    const bool first = lane == 0, last = end == s.lanes;
    for (; lane < end; lane++) {
      PBM_UNROLL for (int j = 0; j < NV; j++) __builtin_prefetch(next + j * panel, 0, 3);
      multiply<D, MR, NV>(acc, q, s.q_stride, k, panel);
      q += 4;
      k += kGroupBytes;
      next += kGroupBytes;
    }
    PBM_UNROLL for (int r = 0; r < MR; r++) {
      PBM_UNROLL for (int j = 0; j < NV; j++) {
        float* at = scores + r * s.pitch + j * kWidth;
        if (!first) acc[r][j] = add(load(at), acc[r][j]);
        store(at, acc[r][j]);
        if (last) max[r] = vmax(acc[r][j], max[r]);
      }
    }
  } while (lane < s.lanes);
}

template <Flavour F, int MR>
void score_strip(const ScoreStrip& s) {
  const int64_t panel = s.lanes * kGroupBytes;
  Vec max[MR];
  PBM_UNROLL for (int r = 0; r < MR; r++) max[r] = set1(-INFINITY);
  int64_t j = 0;
  for (; j + kStripPanels <= s.panels; j += kStripPanels)
    score_tile<F, MR, kStripPanels>(s, s.k + j * panel, panel, s.scores + j * kPanel, max);
  const int64_t rest = s.panels - j;
  if constexpr (kStripPanels == 4) {
    if (rest == 3) score_tile<F, MR, 3>(s, s.k + j * panel, panel, s.scores + j * kPanel, max);
    if (rest == 2) score_tile<F, MR, 2>(s, s.k + j * panel, panel, s.scores + j * kPanel, max);
    if (rest == 1) score_tile<F, MR, 1>(s, s.k + j * panel, panel, s.scores + j * kPanel, max);
  }
  PBM_UNROLL for (int r = 0; r < MR; r++) s.max[r] = reduce_max(max[r]);
}

template <Flavour F, int MR, int NV>
PBM_INLINE void value_tile(const ValueStrip& s, const char* v, float* out) {
  using D = Dot<F>;
  typename D::Acc acc[MR][NV];
  PBM_UNROLL for (int r = 0; r < MR; r++) PBM_UNROLL for (int j = 0; j < NV; j++) acc[r][j] = D::zero();
  const char* p = s.p;
  for (int64_t l = 0; l < s.lanes; l++) {
    PBM_UNROLL for (int j = 0; j < NV; j++) __builtin_prefetch(v + j * s.v_panel + kValuePrefetch, 0, 3);
    multiply<D, MR, NV>(acc, p, s.p_stride, v, s.v_panel);
    p += 4;
    v += kGroupBytes;
  }
  // A block's sum on its own first: with one chain over all keys the rounding error would grow with their number.
  PBM_UNROLL for (int r = 0; r < MR; r++) {
    const Vec factor = s.rescale ? set1(s.rescale[r]) : zero();
    PBM_UNROLL for (int j = 0; j < NV; j++) {
      float* at = out + r * s.out_stride + j * kWidth;
      store(at, s.rescale ? fmadd(load(at), factor, acc[r][j]) : acc[r][j]);
    }
  }
}

template <Flavour F, int MR>
void value_strip(const ValueStrip& s) {
  int64_t j = 0;
  for (; j + kStripPanels <= s.panels; j += kStripPanels)
    value_tile<F, MR, kStripPanels>(s, s.v + j * s.v_panel, s.out + j * kPanel);
  const int64_t rest = s.panels - j;
  if constexpr (kStripPanels == 4) {
    if (rest == 3) value_tile<F, MR, 3>(s, s.v + j * s.v_panel, s.out + j * kPanel);
    if (rest == 2) value_tile<F, MR, 2>(s, s.v + j * s.v_panel, s.out + j * kPanel);
    if (rest == 1) value_tile<F, MR, 1>(s, s.v + j * s.v_panel, s.out + j * kPanel);
  }
}

static_assert(kStrip == 6 && (kStripPanels == 4 || kStripPanels == 1));
template <Flavour F>
PBM_INLINE void score_strip(int rows, const ScoreStrip& s) {
  static constexpr void (*kRows[])(const ScoreStrip&) = {score_strip<F, 1>, score_strip<F, 2>, score_strip<F, 3>,
                                                         score_strip<F, 4>, score_strip<F, 5>, score_strip<F, 6>};
  kRows[rows - 1](s);
}
template <Flavour F>
PBM_INLINE void value_strip(int rows, const ValueStrip& s) {
  static constexpr void (*kRows[])(const ValueStrip&) = {value_strip<F, 1>, value_strip<F, 2>, value_strip<F, 3>,
                                                         value_strip<F, 4>, value_strip<F, 5>, value_strip<F, 6>};
  kRows[rows - 1](s);
}

}  // namespace pbm::PBM_TIER

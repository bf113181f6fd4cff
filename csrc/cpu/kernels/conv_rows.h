// The product of a convolution's tile: rows that a table points to, tap by tap, times packed panels.
#pragma once

#include "cpu/kernels/conv_finish.h"
#include "cpu/kernels/tile.h"

namespace pbm::PBM_TIER {

// A few rows times a few panels, over some taps and a part of their lanes.
struct RowProduct {
  const char* const* rows;  // [row][tap]
  int64_t rows_next;        // pointers from one row to the next
  int64_t a_offset;         // bytes from where a row points
  const char* b;            // the panel, and within a tap the same lane as a_offset
  int64_t b_panel, b_tap;   // bytes from one panel, one tap to the next
  const ConvTap* taps;
  int64_t tap_count;
  int64_t k;          // elements of each tap
  const char* ahead;  // what is read after this: fetched into L2 on the way, so many bytes a lane
  int64_t ahead_step;
  void* c;
  int64_t ldc;  // elements
  bool accumulate;
  const Finish* finish;  // null: the accumulators go to c
  FinishAt at;
  int64_t repeats;  // groups of panels, one after another; of more than one each is the whole sum and finished
};

template <Flavour F, int MR, int NV>
PBM_INLINE const char* one_product(const RowProduct& p, const char* panels, const FinishAt& at, const char* ahead) {
  using D = Dot<F>;
  constexpr int64_t kPerLane = k_per_lane(F);
  constexpr int64_t kLaneBytes = lane_bytes(F);
  constexpr bool filled_up = kLaneBytes > 4;
  typename D::Acc acc[MR][NV];
  PBM_UNROLL for (int i = 0; i < MR; i++) PBM_UNROLL for (int j = 0; j < NV; j++) acc[i][j] = D::zero();
  const int64_t lanes = filled_up ? ceil_div(p.k, kPerLane) : p.k / kPerLane;
  const int64_t tail_bytes = filled_up ? 0 : p.k % kPerLane * (4 / kPerLane);
  const int64_t b_panel = p.b_panel, ahead_step = p.ahead_step;
  for (int64_t t = 0; t < p.tap_count; t++) {
    const char* a[MR];
    PBM_UNROLL for (int i = 0; i < MR; i++) a[i] = p.rows[i * p.rows_next + t] + p.a_offset;
    const char* b = panels + p.taps[t].weight * p.b_tap;
    for (int64_t l = 0; l < lanes; l++) {
      if constexpr (MR >= 4) {
        __builtin_prefetch(ahead, 0, 2);
        ahead += ahead_step;
      }
      multiply_rows<D, MR, NV>(acc, a, l * kLaneBytes, b, b_panel);
      b += kGroupBytes;
    }
    if (tail_bytes) {
      alignas(4) char last[MR][kLaneBytes] = {};
      const char* from[MR];
      PBM_UNROLL for (int i = 0; i < MR; i++) {
        uint32_t lane = 0;
        std::memcpy(&lane, a[i] + lanes * kLaneBytes, F == Flavour::bf16 ? 2 : tail_bytes);
        std::memcpy(last[i], &lane, 4);
        from[i] = last[i];
      }
      multiply_rows<D, MR, NV>(acc, from, 0, b, b_panel);
    }
  }
  if (p.finish)
    finish_tile<MR, NV>(*p.finish, at, acc, p.accumulate ? p.c : nullptr, p.ldc);
  else
    PBM_UNROLL for (int i = 0; i < MR; i++) PBM_UNROLL for (int j = 0; j < NV; j++)
      D::put(static_cast<char*>(p.c) + (i * p.ldc + j * 16) * 4, acc[i][j], p.accumulate);
  return ahead;
}

template <Flavour F, int MR, int NV>
void row_product(const RowProduct& p) {
  FinishAt at = p.at;
  const char *panels = p.b, *ahead = p.ahead;
  for (int64_t i = p.repeats;; panels += NV * p.b_panel) {
    ahead = one_product<F, MR, NV>(p, panels, at, ahead);
    if (--i == 0) return;
    at.move(*p.finish, 0, NV * kWidth, NV);
  }
}

using ProductFn = void (*)(const RowProduct&);

template <Flavour F, int MR, int NV>
constexpr ProductFn product_or_null() {
  if constexpr (MR <= (NV <= kTile.panels ? kTile.max_rows : kTile.wide_rows)) return row_product<F, MR, NV>;
  return nullptr;
}

#define PBM_ROW(F, MR) \
  {product_or_null<F, MR, 1>(), product_or_null<F, MR, 2>(), product_or_null<F, MR, 3>(), product_or_null<F, MR, 4>()}
#define PBM_PRODUCTS(F)                                                                                     \
  {PBM_ROW(F, 1), PBM_ROW(F, 2), PBM_ROW(F, 3), PBM_ROW(F, 4), PBM_ROW(F, 5), PBM_ROW(F, 6), PBM_ROW(F, 7), \
   PBM_ROW(F, 8)}

inline void row_product(const RowProduct& p, Flavour flavour, int64_t rows, int64_t panels) {
  static const ProductFn products[3][8][4] = {PBM_PRODUCTS(Flavour::f32), PBM_PRODUCTS(Flavour::bf16),
                                              PBM_PRODUCTS(Flavour::u8s8)};
  products[static_cast<int>(flavour)][rows - 1][panels - 1](p);
}

}  // namespace pbm::PBM_TIER
